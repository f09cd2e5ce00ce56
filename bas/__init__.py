"""Break-A-Scene in plain PyTorch: several concepts out of one photograph (Avrahami et al., SIGGRAPH Asia 2023).

run = bas.train(bas.train_config("my_scene", pretrained_model_name_or_path="sd21-base", output_dir="runs/creature"))
models = bas.load(run)
pictures = bas.sample(models, "a photo of <asset0> at the beach", seed=1)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bas.config import SampleConfig, TrainConfig
    from bas.pretrained.hub import load, train_config
    from bas.sampling.sampler import sample
    from bas.training.loop import train

__version__ = "0.1.0"
__all__ = ["SampleConfig", "TrainConfig", "load", "sample", "train", "train_config"]

# Read on first use: `import bas` and `bas --help` need not wait for PyTorch.
_HOMES = {
    "load": "bas.pretrained.hub",
    "sample": "bas.sampling.sampler",
    "train": "bas.training.loop",
    "train_config": "bas.pretrained.hub",
    "SampleConfig": "bas.config",
    "TrainConfig": "bas.config",
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
