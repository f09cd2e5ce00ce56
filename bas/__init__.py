"""Break-A-Scene in plain PyTorch: several concepts from a single image (Avrahami et al., SIGGRAPH Asia 2023).

run = bas.train(bas.train_config("my_scene", weights="sd21-base", output_dir="runs/creature"))
models = bas.load(run)
images = bas.sample(models, "a photo of <asset0> at the beach", seed=1)
"""

import importlib
import os
from typing import TYPE_CHECKING

# Before PyTorch is imported: its idle CPU threads sleep instead of spinning, which on a busy machine takes the cores
# from those that work. They spin for microseconds first: waking them between small operations costs more. What the user
# has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
__all__ = ["InputError", "RunError", "SampleConfig", "TrainConfig", "load", "sample", "train", "train_config"]

if TYPE_CHECKING:
    from bas.config import SampleConfig, TrainConfig
    from bas.errors import InputError, RunError
    from bas.pretrained.hub import load, train_config
    from bas.sampling.sampler import sample
    from bas.training.loop import train
else:
    # Imported on first use: `import bas` and `bas --help` do without PyTorch.
    _HOMES = {
        "InputError": "bas.errors",
        "RunError": "bas.errors",
        "SampleConfig": "bas.config",
        "TrainConfig": "bas.config",
        "load": "bas.pretrained.hub",
        "sample": "bas.sampling.sampler",
        "train": "bas.training.loop",
        "train_config": "bas.pretrained.hub",
    }

    def __getattr__(name: str):
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'bas' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
