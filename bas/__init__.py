"""Break-A-Scene in plain PyTorch: several concepts out of one photograph (Avrahami et al., SIGGRAPH Asia 2023).

models = bas.load("runs/creature")
pictures = bas.sample(models, "a photo of <asset0> at the beach", seed=1)
"""

import importlib

__version__ = "0.1.0"

# Read on first use: `import bas` and `bas --help` need not wait for PyTorch.
_HOMES = {"load": "bas.checkpoint", "sample": "bas.sample", "train": "bas.train", "TrainConfig": "bas.config"}
__all__ = ["TrainConfig", "load", "sample", "train"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bas' has no attribute {name!r}")
