"""A tiny SDXL and what it takes to train on it: a photograph and class images."""

from pathlib import Path

from bas.config import TrainConfig
from bas.pretrained.folder import save_model
from tests.helpers.families import tiny
from tests.helpers.tiny import Bench, write_class_images
from tools.reference import cases

PHOTO = cases.REFERENCE / "official" / "scene"


class XLBench(Bench):
    """The bench of the other tests with a tiny SDXL, on a photograph."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, folder / "model"
        save_model(tiny("sdxl"), self.model)
        self.scene, self.class_images = PHOTO, write_class_images(folder / "class images", size=(64, 64))

    def config(self, run="run", **changes) -> TrainConfig:
        """A short training on the whole photograph, whose sides are multiples of 32."""
        return super().config(run, **{"resolution": 64, "center_crop": True, "mixed_precision": "no"} | changes)
