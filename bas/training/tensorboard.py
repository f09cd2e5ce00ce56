"""TensorBoard events of a run, `--report_to tensorboard`: the scalars of metrics.jsonl and the preview sheets."""

from pathlib import Path

import numpy as np
from PIL import Image

from bas.errors import InputError

EVENTS = "tensorboard"  # folder of a run


class EventLog:
    """Writes RUN/tensorboard. InputError where the package tensorboard, an extra, is missing."""

    def __init__(self, run: Path, done: int):
        """Open the log. A resumed run continues after `done` steps: later points are dropped from the curves."""
        self.writer = writer_class()(str(run / EVENTS), purge_step=done + 1 if done else None)

    def add(self, rows: list[dict]) -> None:
        """Add rows of metrics.jsonl as scalars by their names."""
        for row in rows:
            for name, value in row.items():
                if name not in ("phase", "step"):
                    self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def add_sheet(self, path: Path, step: int) -> None:
        """Add a preview sheet as an image."""
        with Image.open(path) as sheet:
            self.writer.add_image("preview", np.asarray(sheet.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


def writer_class() -> type:
    """PyTorch's SummaryWriter, imported only when asked for. InputError without the package tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--report_to tensorboard needs an extra: pip install tensorboard") from None
    return SummaryWriter
