"""Kills a training with SIGKILL at every point that matters, resumes it, and compares what it leaves with a whole run.

    python -m tests.helpers.kills            # every point; prints a table and the count

A run of 20 + 20 steps, each of two batches, on a tiny model. A child process patches one function to kill it there;
the next child resumes. The finished runs must agree bit for bit: model, handles, metrics, and the state of the last
checkpoint (weights, optimizer, random generator).
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

import bas
from bas.config import TrainConfig
from bas.io import files, run_files
from bas.pretrained import folder as model_folder
from bas.training import checkpoints
from bas.training import loop as training
from tests.helpers.tiny import Bench, file_hashes

PHASE_STEPS, SAVE_EVERY = 20, 3
FEW_STEPS = 5  # of a phase, in the ordinary tests
PRELOADED = [  # once, in the process that children are forked from
    "tests.helpers.kills",
    "bas.cli.commands.train",
    "torch._dynamo",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
]
LONGEST = 900  # seconds that a child may take; it needs a few
BORDER = PHASE_STEPS // SAVE_EVERY * SAVE_EVERY  # the last save before the phases meet
MODEL_FILES = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "concepts")


def die(*args, **kwargs):
    """What a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def patch(module, name: str, wanted: Callable[..., bool], before: Callable[..., None] = lambda *args: None) -> None:
    """Let `module.name` kill the process at its first call whose arguments are `wanted`, after `before`."""
    original = getattr(module, name)

    def patched(*args, **kwargs):
        if wanted(*args):
            before(*args)
            die()
        return original(*args, **kwargs)

    setattr(module, name, patched)


Arrange = Callable[[int], None]  # patches the process, which goes on after so many steps, to be killed somewhere

# --- The points -------------------------------------------------------------------------------------------------------


def in_step(step: int) -> Arrange:
    """Between the two batches of a step: one gradient is there, the other's draws are not."""

    def arrange(done: int) -> None:
        batches = iter(range(2 * done + 1, 4 * PHASE_STEPS + 1))
        patch(training, "sample_batch", lambda *args: next(batches) == 2 * step)

    return arrange


def half_written(path: Path, *args) -> None:
    """What a write that is cut off leaves."""
    path.write_bytes(b"\x10\x00")


def in_save(name: str, step: int) -> Arrange:
    """A named point inside the save of a step."""
    folder = f"step-{step:06d}"
    temporary = f".{folder}.tmp"

    def arrange(done: int) -> None:
        if name == "before its folder":
            patch(training, "save_checkpoint", lambda run, number, *rest: number == step)
        elif name == "in its tensors":
            patch(checkpoints, "write_tensors", lambda path, *rest: path.parent.name == temporary, half_written)
        elif name == "before its note":
            patch(checkpoints, "write_json", lambda path, *rest: path.name == "state.json" and temporary in path.parts)
        elif name == "before its manifest":
            patch(checkpoints, "write_json", lambda path, *rest: path.name == "manifest.json")
        elif name == "before its renaming":
            patch(checkpoints.os, "replace", lambda source, *rest: Path(source).name == temporary)
        elif name == "before older ones go":
            patch(checkpoints, "sync", lambda path: path.name == "checkpoints" and (path / folder).exists())
        elif name == "while older ones go":
            patch(checkpoints, "remove_checkpoint", lambda path: is_older(path, folder), remove_one)

    return arrange


def is_older(path: Path, folder: str) -> bool:
    """Whether a checkpoint is removed because this new one is there."""
    return "step-" <= path.name < folder and (path.parent / folder).exists()


def remove_one(folder: Path, *args) -> None:
    """The first of the files that a removal takes."""
    next(iter(sorted(folder.iterdir()))).unlink()


def in_class_images(done: int) -> None:
    """Before the second class image takes its place."""
    patch(files.os, "replace", lambda source, target: Path(target).name == "00001.png")


def in_preview(done: int) -> None:
    """While the preview of a step is drawn."""
    patch(training, "write_preview", lambda *args: True)


def in_final_save(stem: str) -> Arrange:
    """While one file of the finished model is written, its temporary half there."""

    def arrange(done: int) -> None:
        path = f"{stem}.safetensors"
        for module in (model_folder, run_files):
            patch(module, "write_tensors", lambda target, *rest: target.as_posix().endswith(path), leave_temporary)

    return arrange


def leave_temporary(path: Path, *args) -> None:
    path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(b"\x10\x00")


def in_last_clearing(done: int) -> None:
    """When all is saved, and only the checkpoints are to go."""
    patch(training, "remove_all", lambda *args: True)


@dataclass(frozen=True)
class Case:
    """One run that is killed, once or in a chain."""

    name: str
    kills: tuple[Arrange, ...]
    changes: tuple = ()  # settings, as pairs; they must not change the result
    own_class_images: bool = False  # rather than those that the whole run made


def cases() -> list[Case]:
    """Every point: each step, each part of a save, previews, class images, the final save, and chains."""
    steps = [Case(f"in step {step}", (in_step(step),)) for step in range(1, 2 * PHASE_STEPS + 1)]
    points = (
        "before its folder", "in its tensors", "before its note", "before its manifest", "before its renaming",
        "before older ones go", "while older ones go",
    )  # fmt: skip
    saves = [Case(f"save of step {step}, {name}", (in_save(name, step),)) for step in (BORDER, 27) for name in points]
    finals = [Case(f"final save, in {stem}", (in_final_save(stem),)) for stem in MODEL_FILES]
    others = [
        Case("in a preview", (in_preview,), changes=(("img_log_steps", 8), ("preview_inference_steps", 1))),
        Case("among the class images", (in_class_images,), own_class_images=True),
        Case("when all is saved", (in_last_clearing,)),
        Case("chain: step 5, step 19, save of step 33", (in_step(5), in_step(19), in_save("in its tensors", 33))),
        Case("chain: save of step 6, step 21, final save",
             (in_save("before its manifest", 6), in_step(21), in_final_save(MODEL_FILES[1]))),
        Case("chain: step 2, step 2, step 2", (in_step(2), in_step(2), in_step(2))),
    ]  # fmt: skip
    return steps + saves + finals + others


def few_cases() -> list[Case]:
    """Those of the ordinary tests, in runs of FEW_STEPS a phase."""
    last, first = FEW_STEPS, FEW_STEPS + 1  # of the first phase, and of the second
    return [
        *(Case(f"in step {step}", (in_step(step),)) for step in (last, first)),
        *(Case(f"save of step 9, {name}", (in_save(name, 9),)) for name in ("in its tensors", "before its manifest")),
        Case("final save, in concepts", (in_final_save("concepts"),)),
        Case("chain: step 2, step 2, step 2", (in_step(2), in_step(2), in_step(2))),
    ]


# --- The runs ---------------------------------------------------------------------------------------------------------


def die_in(name: str, number: int, config: TrainConfig) -> None:
    """Train, or go on, until the kill of this number of the case of this name (patches do not travel, names do)."""
    torch.set_num_threads(1)  # cases may run side by side
    case = next(case for case in cases() + few_cases() if case.name == name)
    whole = checkpoints.list_checkpoints(Path(config.output_dir))
    case.kills[number](int(whole[-1].name[-6:]) if whole else 0)
    bas.train(config)


def finish(config: TrainConfig, last: Path) -> None:
    """Train, or go on, to the end; `last` keeps the state of the last checkpoint."""
    torch.set_num_threads(1)
    clear_up = training.finish

    def note_state(run):
        files = sorted(checkpoints.list_checkpoints(run.folder)[-1].glob("*.safetensors"))
        last.write_bytes(b"".join(path.read_bytes() for path in files))
        clear_up(run)

    training.finish = note_state
    bas.train(config)


def child(work: Callable[..., None], *args) -> int | None:
    """Run a module's function in a process of its own -> its exit code, -9 after SIGKILL; None if it was given up.

    Not forked from this process, whose threads would not go along and whose locks would: from a clean server.
    """
    process = forkserver().Process(target=on_threads, args=(torch.get_num_threads(), work, *args))
    process.start()
    process.join(LONGEST)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def forkserver() -> ForkServerContext:
    """Where processes are forked from one that has imported what trainings need and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def on_threads(count: int, work: Callable[..., None], *args) -> None:
    """Run a function on as many threads as its parent has: the order of sums depends on it."""
    torch.set_num_threads(count)
    work(*args)


class Harness:
    """A tiny scene, the settings of its run, and what the whole run leaves."""

    def __init__(self, folder: Path, phase_steps: int = PHASE_STEPS):
        self.folder, self.bench = folder, Bench(folder / "bench")
        self.config = self.bench.config(
            phase1_train_steps=phase_steps,
            phase2_train_steps=phase_steps,
            gradient_accumulation_steps=2,
            checkpointing_steps=SAVE_EVERY,
            checkpoints_total_limit=2,
        )
        self.wanted = self.go_on(Case("whole", ()))

    def config_of(self, case: Case, run: Path) -> TrainConfig:
        """The settings of a case."""
        place = run.parent if case.own_class_images else self.folder
        return replace(
            self.config,
            output_dir=str(run),
            class_data_dir=str(place / "class images"),
            resume_from_checkpoint="latest",
            **dict(case.changes),
        )

    def go_on(self, case: Case) -> dict[str, str]:
        """Kill and resume as the case says -> the hashes of all that is left, by file."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            run, last = Path(place) / "run", Path(place) / "last"
            config = self.config_of(case, run)
            for number in range(len(case.kills)):
                ended = child(die_in, case.name, number, config)
                assert ended == -signal.SIGKILL, f"{case.name}: the run ended with {ended}, not by the kill"
            if not (run / run_files.CONCEPTS).exists():
                assert child(finish, config, last) == 0, f"{case.name}: it could not be resumed"
            left = file_hashes(run)
            if last.exists():
                left["last checkpoint"] = hashlib.sha256(last.read_bytes()).hexdigest()
            return left


def held(harness: Harness, case: Case) -> list[str]:
    """What differs from the whole run; empty when the promise holds."""
    left = harness.go_on(case)
    wanted = {k: v for k, v in harness.wanted.items() if k in left or k != "last checkpoint"}
    return sorted(name for name in wanted.keys() | left.keys() if wanted.get(name) != left.get(name))


def main() -> int:
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        harness, all_cases = Harness(Path(place)), cases()
        for case in all_cases:
            differs = held(harness, case)
            failed += bool(differs)
            print(f"{case.name:60s} {'differs: ' + ', '.join(differs) if differs else 'the same bits'}", flush=True)
    kills = sum(len(case.kills) for case in all_cases)
    print(
        f"{kills} kills in {len(all_cases)} runs, {len(all_cases) - failed} of them ended with the bits of a whole run"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
