"""Break-A-Scene in plain PyTorch: several concepts out of one photograph (Avrahami et al., SIGGRAPH Asia 2023).

run = bas.train(bas.train_config("my_scene", pretrained_model_name_or_path="sd21-base", output_dir="runs/creature"))
models = bas.load(run)
pictures = bas.sample(models, "a photo of <asset0> at the beach", seed=1)
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

# Read on first use: `import bas` and `bas --help` need not wait for PyTorch.
_HOMES = {
    "load": "bas.hub",
    "sample": "bas.sample",
    "train": "bas.train",
    "train_config": "bas.hub",
    "SampleConfig": "bas.config",
    "TrainConfig": "bas.config",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _Package(ModuleType):
    """Python binds an imported submodule to its name in the package; here `train` and `sample` stay the functions."""

    def __setattr__(self, name: str, value):
        if name not in _HOMES:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
