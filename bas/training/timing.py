"""How long each stage of a run took and how much memory it held at most: RUN/times.json, a session per start."""

import importlib.metadata
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from bas import __version__
from bas.io.json_files import write_json
from bas.io.run_files import TIMES, read_sessions
from bas.runtime.memory import peak_bytes
from bas.training.disk_space import writing


class Timing:
    """The clock of one session. Created before the first stage; `note` ends a stage and writes the file."""

    def __init__(self):
        self.session = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "bas": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": importlib.metadata.version("transformers"),
            },
            "stages": [],
        }
        self.began = time.monotonic()

    def note(self, stage: str, folder: Path, device: torch.device) -> None:
        """End a stage: add it to FOLDER/times.json, which keeps the sessions before this one."""
        now, path = time.monotonic(), folder / TIMES
        self.session["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.session["stages"].append({"stage": stage, "seconds": round(now - self.began, 3), **peak_memory(device)})
        self.began = now
        earlier = [session for session in read_sessions(folder) if session["started"] != self.session["started"]]
        with writing(folder):
            write_json(path, {"sessions": [*earlier, self.session]})


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the most bytes held: on the GPU since the last call, by the process since its start.

    Omit what is unknown.
    """
    peaks = {}
    if device.type == "cuda":
        peaks["gpu_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    if (held := peak_bytes()) is not None:
        peaks["process_bytes"] = held
    return peaks
