"""Original single files (CompVis, Stability AI): UNet, VAE and text tower in one .safetensors, without a config."""

from pathlib import Path

from bas.parts import Parts


def read_single_file(path: Path, prediction_type: str | None) -> Parts:
    raise NotImplementedError


def write_single_file(path: Path, parts: Parts) -> None:
    raise NotImplementedError
