"""bas's side of the bench: the modes to measure as rows of data, and its training loop, one step at a time.

The loop is bas's own, `bas.training.loop.train_phase`, held at the end of each step: the figure contains all that a
user's step contains.
"""

import threading
from dataclasses import dataclass, fields
from pathlib import Path

from bas.config import TrainConfig
from bas.training import loop as training
from bas.training.setup import Run, check_input, setup_run
from tools.bench.material import Material

ENDLESS = 100_000  # steps of a phase that is measured for as long as one likes


@dataclass(frozen=True)
class Mode:
    """One way to run bas."""

    name: str
    flags: dict
    phases: tuple[int, ...] = (1, 2)
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False  # also in the quick check

    def available(self) -> str:
        """Empty, or what this version of bas lacks for it."""
        known = {f.name: f for f in fields(TrainConfig)}
        for name, value in self.flags.items():
            if name not in known:
                return f"no --{name} in this version"
            choices = known[name].metadata.get("choices")
            if (choices and value not in choices) or (not choices and not isinstance(value, type(known[name].default))):
                return f"no --{name} {value} in this version"
        return ""


# A new mode is a row here. The first one is the parity mode.
MODES = (
    Mode("fp32", {"mixed_precision": "no"}, quick=True),
    Mode("fp32, exact", {"mixed_precision": "no", "exact_phase1": True}, phases=(1,), quick=True),
    Mode("bf16", {"mixed_precision": "bf16"}, quick=True),
    Mode("bf16, exact", {"mixed_precision": "bf16", "exact_phase1": True}, phases=(1,), devices=("cuda",)),
    Mode("fp32, regional", {"mixed_precision": "no", "compile": "regional"}, devices=("cpu",)),
    Mode("fp32, whole", {"mixed_precision": "no", "compile": "whole"}, devices=("cpu",)),
    Mode("bf16, regional", {"mixed_precision": "bf16", "compile": "regional"}),
    Mode("bf16, whole", {"mixed_precision": "bf16", "compile": "whole"}),
)


def mode_named(name: str) -> Mode:
    """A row of MODES by its name."""
    return next(mode for mode in MODES if mode.name == name)


def chosen_modes(device: str, phase: int, quick: bool, compiled: bool) -> list[Mode]:
    """The modes to measure, in the table's order: those that this version of bas has."""
    wanted = [mode for mode in MODES if device in mode.devices and phase in mode.phases and not mode.available()]
    return [mode for mode in wanted if (mode.quick or not quick) and (compiled or "compile" not in mode.flags)]


# --- Steps ----------------------------------------------------------------------------------------------------------


def configure(material: Material, mode: Mode, phase: int, run: Path) -> TrainConfig:
    """bas's settings for an endless phase on the material, with nothing but steps in it."""
    return TrainConfig(
        instance_data_dir=material.scene,
        pretrained_model_name_or_path=material.model,
        output_dir=str(run),
        class_data_dir=material.class_images,
        num_class_images=len(list(Path(material.class_images).glob("[!.]*.*g"))),
        initializer_tokens=material.words,
        resolution=material.side,
        device=material.device,
        phase1_train_steps=ENDLESS if phase == 1 else 0,
        phase2_train_steps=ENDLESS if phase == 2 else 0,
        img_log_steps=0,
        checkpointing_steps=0,
        **mode.flags,
    )


def start_new(config: TrainConfig) -> Run:
    """A run before its first step, in a new folder."""
    Path(config.output_dir).mkdir(parents=True)
    return setup_run(config, *check_input(config))


class StopLoop(Exception):
    """Ends the loop that a BasSide holds."""


class BasSide:
    """bas's own training loop in a thread of its own, held at the end of each step until the next is asked for.

    All of bas runs in that thread, for PyTorch keeps the compiler's settings by thread.
    """

    def __init__(self, material: Material, mode: Mode, phase: int, run: Path):
        self.config = configure(material, mode, phase, run)
        self.go, self.stepped = threading.Semaphore(0), threading.Semaphore(0)
        self.stopping, self.error = False, None
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()
        self.await_loop()

    def loop(self) -> None:
        """The start of a run and, from the first permission on, the phase."""
        try:
            self.run = start_new(self.config)
            self.note, self.run.metrics.add = self.run.metrics.add, self.hold
            self.stepped.release()
            self.go.acquire()
            if not self.stopping:
                training.train_phase(self.run, self.config.phases[0], 0)
        except StopLoop:
            pass
        except BaseException as error:
            self.error = error
        self.stepped.release()

    def hold(self, *step) -> None:
        """What the loop calls at the end of each step in place of `MetricsLog.add`."""
        self.note(*step)
        self.stepped.release()
        self.go.acquire()
        if self.stopping:
            raise StopLoop

    def step(self) -> None:
        """Take one step; an error in the loop is raised here."""
        self.go.release()
        self.await_loop()

    def await_loop(self) -> None:
        """Wait until the loop is held again; an error in it is raised here."""
        self.stepped.acquire()
        if self.error:
            raise self.error

    def close(self) -> None:
        """End the loop and let go of the models."""
        self.stopping = True
        self.go.release()
        self.thread.join()
        del self.run
