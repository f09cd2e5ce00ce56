"""Kills a training at random moments, resumes it with one command, and compares what it leaves with a whole run.

    python -m tests.helpers.random_kills --runs 60 --seed 0      # prints a line for each run, and the count

A kill comes after a random time, or inside a random operation on a file: while it is written, before or after it takes
its place, while it is appended to, or before it is removed. The operation is chosen by name, all names alike, so that
rare files are hit as often as checkpoints. Each run is one command of 4 + 4 steps in a process of its own.
"""

import argparse
import hashlib
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from bas.cli.entry import main as bas_main
from bas.io import tensors
from bas.io.tensors import read_tensors
from bas.training.metrics import MetricsLog
from tests.helpers.kills import child
from tests.helpers.tiny import Bench, file_hashes, write_model, write_scene

STEPS = 4  # of each phase
FLAGS = {
    "phase1_train_steps": STEPS,
    "phase2_train_steps": STEPS,
    "checkpointing_steps": 2,
    "img_log_steps": 4,
    "preview_inference_steps": 1,
    "log_steps": 1,
}
KINDS = ("close-ups", "accumulation", "many scenes", "another method", "another model")


@dataclass(frozen=True)
class Kill:
    """One kill: after so many seconds, or inside an operation of this name, at so many of its calls."""

    seconds: float | None = None
    operation: str = ""
    call: int = 1
    share: float = 0.5  # of the file that is written by then; above 1 the kill comes after the operation

    def __str__(self):
        if self.seconds is not None:
            return f"after {self.seconds:.2f} s"
        return f"{self.operation} #{self.call}, {'after it' if self.share > 1 else f'{self.share:.0%} done'}"


# --- In the process that is killed ------------------------------------------------------------------------------------


class FileOperations:
    """Names and counts what a process does to files, and kills it inside one operation."""

    def __init__(self, root: Path, kill: Kill | None = None):
        self.root, self.kill, self.counts = root, kill or Kill(), {}

    def name(self, operation: str, path: object) -> str | None:
        """The operation with its file, numbers of processes left out. None for files outside the run."""
        path = Path(os.fsdecode(path))  # type: ignore[arg-type]
        if self.root not in path.parents:
            return None
        place = re.sub(r"\.\d+\.tmp$", ".tmp", "/".join(path.relative_to(self.root).parts[-2:]))
        return f"{operation} {re.sub(r'[0-9]{6}', 'N', place)}"

    def is_here(self, name: str | None) -> bool:
        """Count a call, and tell whether it is the one to kill in."""
        if name is None:
            return False
        self.counts[name] = self.counts.get(name, 0) + 1
        return name == self.kill.operation and self.counts[name] == self.kill.call

    def install(self) -> None:
        """Patch the functions that put files in their places, append to them and remove them."""
        replace, unlink, rmdir, flush, save_file = os.replace, os.unlink, os.rmdir, MetricsLog.flush, tensors.save_file

        def replacing(source, target, **more):
            here = self.is_here(self.name("write", target))
            if here and self.kill.share <= 1:
                if os.path.isfile(source):
                    os.truncate(source, int(self.kill.share * os.path.getsize(source)))
                die()
            replace(source, target, **more)
            if here:
                die()

        def removing(original):
            def remove(path, **more):
                if self.is_here(self.name("remove", path)):
                    die()
                original(path, **more)

            return remove

        def appending(log):
            here = self.is_here(self.name("append", log.path))
            before = log.length
            rows = flush(log)
            if here:
                os.truncate(log.path, before + int(min(1, self.kill.share) * (log.length - before)))
                die()
            return rows

        def saving(whole, path, metadata):
            if self.is_here(self.name("save", path)):  # the library writes beside the file, and renames at the end
                (Path(path).parent / ".tmpa1B2c3").write_bytes(b"half")
                die()
            save_file(whole, path, metadata)

        tensors.save_file = saving
        os.replace, os.unlink, os.rmdir = replacing, removing(unlink), removing(rmdir)
        MetricsLog.flush = appending


def die() -> None:
    """End the process as a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_command(words: list[str], root: Path, kill: Kill | None, log: Path) -> None:
    """Run one command of bas until it ends, or until the kill; `log` takes its output and, at its end, the counts."""
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    operations = FileOperations(root, kill)
    operations.install()
    if kill and kill.seconds is not None:
        threading.Timer(kill.seconds, die).start()
    code = bas_main(words)
    log.with_suffix(".counts").write_text("\n".join(f"{count} {name}" for name, count in operations.counts.items()))
    os._exit(code)


# --- The runs ---------------------------------------------------------------------------------------------------------


class Kind:
    """One kind of training, and what a whole run of it leaves."""

    def __init__(self, bench: Bench, kind: str, folder: Path):
        self.bench, self.kind, self.folder = bench, kind, folder
        folder.mkdir()
        began = time.monotonic()
        self.run(folder / "whole")
        self.seconds = time.monotonic() - began
        counts = (folder / "whole" / "log.counts").read_text().splitlines()
        self.operations = {name: int(count) for count, name in (line.split(" ", 1) for line in counts)}
        self.wanted = self.left_by(folder / "whole")

    def command(self, root: Path) -> list[str]:
        """The command line of a training into `root`."""
        flags: dict[str, object] = dict(FLAGS)
        scenes = [str(self.bench.scene)]
        if self.kind == "close-ups":
            flags["close_ups"] = None
        elif self.kind == "accumulation":
            flags |= {"gradient_accumulation_steps": 2, "class_data_dir": root / "class images", "sample_batch_size": 1}
        elif self.kind == "many scenes":
            scenes = [str(self.bench.folder / name) for name in ("ant", "bee")]
        elif self.kind == "another method":
            flags["method"] = "cd-m"
        else:
            flags |= {"pretrained_model_name_or_path": self.bench.folder / "other model", "mixed_precision": "bf16"}
        words = self.bench.command(root / "run", *scenes)
        for name, value in flags.items():
            if f"--{name}" in words:
                at = words.index(f"--{name}")
                del words[at : at + 2]
            words += [f"--{name}"] if value is None else [f"--{name}", str(value)]
        return words

    def run(self, root: Path, kill: Kill | None = None) -> int | None:
        """Train into `root`, from the last checkpoint if there is one; returns the exit code."""
        root.mkdir(exist_ok=True)
        words = self.command(root)
        if self.kind != "many scenes":
            words += ["--resume_from_checkpoint", "latest"]
        return child(run_command, words, root, kill, root / "log")

    def runs(self, root: Path) -> list[Path]:
        """The run folders in `root`."""
        return [root / "run" / name for name in ("ant", "bee")] if self.kind == "many scenes" else [root / "run"]

    def is_complete(self, root: Path) -> bool:
        """Whether nothing is left to do: the page of a run is its last file."""
        return all((run / "report.html").exists() for run in self.runs(root))

    def left_by(self, root: Path) -> dict[str, str]:
        """Hashes of all that the training decides, and the names of all files, by file."""
        left = {}
        for run in self.runs(root):
            tensors, _ = read_tensors(run / "concepts.safetensors")
            concepts = b"".join(tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors))
            found = file_hashes(run) | {"concepts": hashlib.sha256(concepts).hexdigest()}
            for path in sorted([*run.rglob("previews/**/*.png"), *run.rglob("scene/**/*.png")]):
                found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
            found["files"] = " ".join(sorted(str(path.relative_to(run)) for path in run.rglob("*")))
            left |= {f"{run.name}/{name}": value for name, value in found.items()}
        return left

    def choose(self, chance: random.Random) -> Kill:
        """A random kill: in one of three after a time, else inside an operation."""
        if chance.random() < 1 / 3:
            return Kill(seconds=chance.uniform(0.05, 1) * self.seconds)
        name = chance.choice(sorted(self.operations))
        share = chance.choice([0, chance.random(), chance.random(), 1, 2])
        return Kill(operation=name, call=chance.randint(1, self.operations[name]), share=share)

    def choose_all(self, seed: int) -> list[Kill]:
        """One to three kills of one run."""
        chance = random.Random(seed)
        return [self.choose(chance) for _ in range(chance.randint(1, 3))]

    def try_kills(self, kills: list[Kill]) -> tuple[list[str], int]:
        """Train with these kills, then once more to the end. -> what is wrong, and how many kills came in time"""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            root, fired = Path(place), 0
            for kill in [*kills, None]:
                if self.is_complete(root):
                    break
                code = self.run(root, kill)
                fired += code == -signal.SIGKILL
                if code != (0 if kill is None else -signal.SIGKILL) and not (code == 0 and kill):
                    last = (root / "log").read_text().splitlines()[-1:]
                    return [f"exit code {code}: {' '.join(last)}"], fired
            left = self.left_by(root)
        names = sorted(self.wanted.keys() | left.keys())
        return [name for name in names if self.wanted.get(name) != left.get(name)], fired


def build_bench(folder: Path) -> Bench:
    """A bench with two more scenes and another model, for the kinds that need them."""
    bench = Bench(folder)
    for name, concepts in (("ant", 2), ("bee", 3)):
        write_scene(folder / name, concepts)
    write_model(folder / "other model", prediction_type="v_prediction")
    return bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="run i has seed + i")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    held = fired = 0
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(args.jobs) as pool:
        bench = build_bench(Path(place) / "bench")
        kinds = list(pool.map(lambda kind: Kind(bench, kind, Path(place) / kind), KINDS))

        def try_run(number: int) -> tuple[str, list[Kill], list[str], int]:
            kind = kinds[number % len(kinds)]
            kills = kind.choose_all(args.seed + number)
            return kind.kind, kills, *kind.try_kills(kills)

        numbers = range(args.first, args.first + args.runs)
        for number, (name, kills, wrong, count) in zip(numbers, pool.map(try_run, numbers), strict=True):
            held, fired = held + (not wrong), fired + count
            told = f"differs: {', '.join(wrong)}" if wrong else "the same bits"
            print(f"{number:3d} {name:15s} {'; '.join(map(str, kills))}: {told}", flush=True)
    print(f"{held} of {args.runs} runs resumed at once, to the bits of a whole run; {fired} kills came in time")
    return int(held < args.runs)


if __name__ == "__main__":
    sys.exit(main())
