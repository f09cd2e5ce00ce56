"""Measures bas against the official training loop, both sides in one run, and writes a table and a JSON file.

    python -m tools.bench --output speed.json          everything this machine can run; hours on a CPU
    python -m tools.bench --quick                      a check under two minutes on a CPU
    python -m tools.bench --rows steps memory          some groups of rows only
    python -m tools.bench --markdown docs/speed.json   the Markdown table of an earlier run

Official: google/break-a-scene at commit b142cf2 ported to current PyTorch and diffusers (`official_loop.py`), as it is
and with its UNet compiled. Sides take turns (A B A B) on the same files and random weights; figures are medians with
quartiles after a warm-up. What this machine cannot run is listed as not measured.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tools.bench.clock import ceilings, free_bytes
from tools.bench.goals import NAMES, failure, unmeasured
from tools.bench.material import MODELS, Material, make_material, make_model
from tools.bench.table import Line, markdown, text_table
from tools.command_line import run as run_tool

GROUPS = tuple(NAMES)


@dataclass(frozen=True)
class Setting:
    """A model on a device."""

    model: str  # of MODELS
    device: str
    groups: tuple[str, ...] = GROUPS
    needs_gb: float = 8  # free memory of the machine
    side: int | None = None  # pixels, where not those of the bench

    @property
    def name(self) -> str:
        return f"{self.model}, {'GPU' if self.device == 'cuda' else 'CPU'}"


SETTINGS = (
    Setting("SD 2.1", "cuda", needs_gb=30),
    Setting("small SD 2", "cpu", tuple(group for group in GROUPS if group != "loading")),
    Setting("small SD 1", "cpu", ("steps", "memory"), needs_gb=16),
    Setting("half SD 2.1", "cpu", ("adapters",), needs_gb=12, side=256),
    Setting("SD 2.1", "cpu", ("loading",), needs_gb=14),
)
QUICK = {("small SD 2", group) for group in ("imports", "steps", "memory", "images")}


class Bench:
    """What a run of the bench shares: its arguments, its folder, the models on disk."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.quick, self.threads, self.folder = arguments.quick, arguments.threads, folder
        self.groups, self.models = arguments.rows, arguments.models
        self.device, self.compile = arguments.device, not (arguments.quick or arguments.no_compile)
        self.rounds, self.budget = (2, 8.0) if self.quick else (arguments.rounds, arguments.budget)
        self.side = 256 if self.quick else 512  # pixels
        self.count = 0

    def fresh(self, name: str) -> Path:
        """A path in the bench's folder that is not used yet."""
        self.count += 1
        return self.folder / f"{name}-{self.count}"

    def model(self, name: str) -> Path:
        """One of MODELS on disk, written at the first call."""
        path = self.folder / name.replace(" ", "-")
        return path if path.exists() else make_model(name, path)

    def material(self, setting: Setting, side: int | None = None, concepts: int | None = None) -> Material:
        """Scene and class images for a setting."""
        return make_material(
            self.fresh("material"),
            self.model(setting.model),
            side or setting.side or self.side,
            setting.device,
            concepts,
        )


def why_not(bench: Bench, setting: Setting, group: str) -> str:
    """Empty, or why this run leaves a group of rows out."""
    if setting.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if setting.device != bench.device:
        return f"run with --device {setting.device}"
    if setting.model not in bench.models or group not in bench.groups:
        return "left out of this run"
    if bench.quick and (setting.model, group) not in QUICK:
        return "not part of the quick check"
    if free_bytes() < setting.needs_gb * 2**30:
        return f"needs {setting.needs_gb:.0f} GB of free memory"
    return ""


def measure(bench: Bench, save: Callable[[list[Line]], None]) -> None:
    """All lines, those left out among them; `save` sees them after each new one."""
    from tools.bench.rows import MEASURES  # imports diffusers: only now

    lines: list[Line] = []
    for setting in SETTINGS:
        for group in setting.groups:
            began = time.perf_counter()
            if reason := why_not(bench, setting, group):
                lines += unmeasured(setting, group, reason)
                save(lines)
            else:
                print(f"{setting.name}: {group} ...", file=sys.stderr, flush=True)
                try:
                    for line in MEASURES[group](bench, setting, tuple(lines)):
                        lines.append(line)
                        save(lines)
                except Exception as error:  # the other groups still count
                    lines += unmeasured(setting, group, failure(error))
                    save(lines)
                print(f"    {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


# --- The result ---------------------------------------------------------------------------------------------------


def machine_name() -> str:
    """The GPU's name and the CPU's."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        named = (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line)
        cpu = next(named, cpu)
    return f"{torch.cuda.get_device_name()} with {cpu}" if torch.cuda.is_available() else cpu


def versions() -> dict[str, str]:
    """The versions that figures depend on."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "diffusers", "accelerate"):
        found[name] = metadata.version(name) if find_spec(name) else "not installed"
    return found


def load_average() -> float:
    """Processes that wanted to run in the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def describe(bench: Bench) -> dict:
    """The result's frame, without any line."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else 0
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "name": machine_name(),
            "cores": os.cpu_count(),
            "threads": bench.threads,
            "memory_gb": memory,
            "load_before": load_average(),
            "load_after": load_average(),
        },
        "versions": versions(),
        "ceilings": ceilings(bench.device),
        "models": MODELS,
        "quick": f"{bench.side}x{bench.side} pixels, {bench.rounds} rounds" if bench.quick else "",
        "seconds": 0.0,
        "lines": [],
    }


def read_arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line; argparse ends with code 2 when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a check under two minutes on a CPU, at 256x256 pixels")
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file, line by line")
    parser.add_argument(
        "--markdown", type=Path, metavar="JSON", help="print an earlier result as Markdown; run nothing"
    )
    parser.add_argument("--rows", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows (default: all)")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="default: all")
    devices, found = ("cpu", "cuda"), "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=devices, default=found, help="whose rows to measure (default: %(default)s)")
    parser.add_argument("--no_compile", action="store_true", help="leave out what torch.compile makes of either side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="least number of rounds of each side (--quick: 2)")
    parser.add_argument(
        "--budget",
        type=float,
        default=120,
        help="seconds of a row, if up to 30 rounds fit (--quick: 8)",
    )
    arguments = parser.parse_args(given)
    if arguments.threads < 1 or arguments.rounds < 1:
        parser.error("--threads and --rounds are 1 or more")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    if arguments.markdown and not arguments.markdown.is_file():
        parser.error(f"--markdown {arguments.markdown}: there is no such file")
    if arguments.output and arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a folder: name a file in it")
    if arguments.output and not arguments.output.resolve().parent.is_dir():
        parser.error(f"--output {arguments.output}: its folder does not exist")
    return arguments


def main(given: list[str] | None = None) -> None:
    arguments = read_arguments(given)
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text(encoding="utf-8"))), end="")
        return
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the reference is float32
    began = time.perf_counter()
    with TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(arguments, Path(folder))
        result = describe(bench)

        def save(lines: list[Line]) -> None:
            result["lines"] = [line.to_json() for line in lines]
            result["seconds"], result["machine"]["load_after"] = time.perf_counter() - began, load_average()
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

        measure(bench, save)
    print(text_table(result))


if __name__ == "__main__":
    run_tool(main)
