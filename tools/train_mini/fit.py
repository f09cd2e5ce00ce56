"""The training loop that all stages of the miniature share. It counts samples, so a busy machine changes no result."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.train_mini.files import plot_losses, save_weights
from tools.train_mini.optimizer import Optimizer
from tools.train_mini.recipe import AVERAGES, Stage

SAVE_SECONDS, LOG_SECONDS = 600, 60  # wall clock


def fit(
    name: str,
    module: nn.Module,
    draw_batch: Callable[[int], tuple],
    loss_of: Callable[[nn.Module, tuple], tuple[Tensor, dict[str, Tensor]]],
    stage: Stage,
    run: Path,
    validate: Callable[[], float] | None = None,
) -> None:
    """Train `module` up to `stage.goal` samples; leave its averaged weights in it and in run/<name>.safetensors.

    `draw_batch(i)` gives batch i: all randomness is in it, so a stopped run continues from run/<name>.ckpt (every ten
    minutes) as if it had not been stopped. `loss_of` returns the loss and 0-dim tensors to log. `validate` gives a loss
    of the module on held-out data; it sees the averaged weights, and the best ones stay in run/<name>_best.safetensors.
    """
    optimizer = Optimizer(module, stage.lr, stage.lr_matrices, stage.adamw_only)
    parameters = optimizer.parameters
    averages = [[p.detach().clone() for p in parameters] for _ in AVERAGES]
    checkpoint, samples, cpu, best = run / f"{name}.ckpt", 0, 0.0, float("inf")
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=parameters[0].device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["opt"])
        averages, samples, cpu, best = state["ema"], state["samples"], state["cpu"], state.get("best", best)
    sums: dict[str, float] = {}
    steps, begun = 0, time.process_time() - cpu
    logged = saved = time.monotonic()

    def save() -> None:
        nonlocal best
        if validate:
            with torch.no_grad(), swapped(parameters, averages[-1]):
                if (found := validate()) < best:
                    best = found
                    save_weights(module, run / f"{name}_best.safetensors")
            write_line(run / f"{name}_validation.jsonl", {"samples": samples, "loss": found, "best": best})
        state = {"module": module.state_dict(), "opt": optimizer.state_dict(), "ema": averages}
        torch.save(state | {"samples": samples, "cpu": cpu, "best": best}, f"{checkpoint}.part")
        os.replace(f"{checkpoint}.part", checkpoint)

    while samples < stage.goal:
        step = samples // stage.batch
        loss, parts = loss_of(module, draw_batch(stage.seen // stage.batch + step))
        loss.backward()
        left = (stage.goal - samples) / max(1, stage.cooldown)
        optimizer.step(min(1.0, (step + 1) / 100, left))
        for decay, average in zip(AVERAGES, averages, strict=True):
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(decay, (1 + step) / (10 + step)))
        samples += stage.batch
        steps += 1
        cpu = time.process_time() - begun
        for key, value in {"loss": loss.detach(), **parts}.items():
            sums[key] = sums.get(key, 0.0) + float(value)
        now = time.monotonic()
        if now - logged > LOG_SECONDS or samples >= stage.goal:
            means = {key: round(value / steps, 5) for key, value in sums.items()}
            write_line(run / f"{name}.jsonl", {"samples": samples, "cpu_hours": round(cpu / 3600, 3), **means})
            logged, sums, steps = now, {}, 0
        if now - saved > SAVE_SECONDS:
            saved = now
            save()
    save()
    for parameter, mean in zip(parameters, averages[-1], strict=True):
        parameter.data.copy_(mean)
    save_weights(module, run / f"{name}.safetensors")
    plot_losses(run / f"{name}.jsonl")


def load_newest(name: str, module: nn.Module, run: Path) -> bool:
    """Load a stage's newest weights: finished, the average so far of unfinished ones, or those it starts from.

    Returns False where there are none.
    """
    finished, checkpoint, start = (run / f"{name}{end}" for end in (".safetensors", ".ckpt", "_start.safetensors"))
    if not finished.exists() and checkpoint.exists():
        averages = torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"]
        for parameter, mean in zip(trainable(module), averages[-1], strict=True):
            parameter.data.copy_(mean)
        return True
    newest = finished if finished.exists() else start
    if newest.exists():
        module.load_state_dict(load_file(newest))
    return newest.exists()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, in order."""
    return [p for p in module.parameters() if p.requires_grad]


def write_line(log: Path, line: dict) -> None:
    """Append one line to a jsonl log."""
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def swapped(parameters: list[nn.Parameter], others: list[Tensor]) -> Iterator[None]:
    """Within the block, `parameters` hold the values of `others`."""
    kept = [p.detach().clone() for p in parameters]
    torch._foreach_copy_([p.data for p in parameters], others)
    try:
        yield
    finally:
        torch._foreach_copy_([p.data for p in parameters], kept)
