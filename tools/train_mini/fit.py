"""The training loop that all stages of the miniature share."""

import copy
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

import torch
from torch import nn

from tools.train_mini.files import plot_losses, save_weights
from tools.train_mini.presets import Recipe

PREPARING = 4  # threads that draw batches; what they call leaves Python most of the time
AHEAD = 8  # batches that are drawn, or being drawn, before they are asked for


def batches(draw: Callable, first: int) -> Iterator:
    """draw(first), draw(first + 1), ... in this order. Later ones are drawn while those before them are trained on.

    The first is drawn alone: a tokenizer sets itself up in its first call, which no other may cross.
    """
    pool = ThreadPoolExecutor(PREPARING)
    try:
        yield draw(first)
        waiting = deque(pool.submit(draw, i) for i in range(first + 1, first + AHEAD))
        for i in count(first + AHEAD):
            waiting.append(pool.submit(draw, i))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def fit(stage: str, module: nn.Module, draw, loss_of, recipe: Recipe, run: Path, preview=None, preview_minutes=2.0):
    """Train `module` for `recipe.minutes`, then leave its averaged weights in it and in run/<stage>.safetensors.

    `draw(i)` is batch i, on the CPU, drawn ahead so that a GPU need not wait. `loss_of(module, batch)` returns the loss
    and a dict of 0-dim tensors to log. All randomness is that of `draw`, so a run that was interrupted goes on from its
    checkpoint (every two minutes) as if nothing had happened.
    """
    if recipe.workers > 1:
        torch.set_num_threads(1)
    workers = ThreadPoolExecutor(recipe.workers)
    twins = [module] + [twin_of(module) for _ in range(recipe.workers - 1)]
    parameters = trainable(module)
    optimizer = torch.optim.AdamW(parameters, recipe.lr, betas=(0.9, 0.99), weight_decay=1e-2)
    average = [p.detach().clone() for p in parameters]
    step, before, checkpoint = 0, 0.0, run / f"{stage}.ckpt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=parameters[0].device, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, before = state["average"], state["step"], state["seconds"]

    def work(twin, batch):
        loss, parts = loss_of(twin, batch)
        (loss / recipe.workers).backward()
        return {"loss": loss.detach(), **parts}

    start, saved, shown, seconds = time.monotonic(), before, before, before
    with closing(batches(draw, recipe.workers * step)) as drawn:
        while seconds < 60 * recipe.minutes:
            warm_up = min(1.0, (step + 1) / 100)
            lr = recipe.lr * warm_up * 0.5 * (1 + math.cos(math.pi * seconds / (60 * recipe.minutes)))
            optimizer.param_groups[0]["lr"] = lr
            numbers, *_ = workers.map(work, twins, [next(drawn) for _ in twins])
            for twin in twins[1:]:
                for p, q in zip(parameters, trainable(twin), strict=True):
                    p.grad += q.grad
                    q.grad = None
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(recipe.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            step += 1
            seconds = before + time.monotonic() - start
            if step == 1 or step % 25 == 0:
                numbers = {name: value.item() for name, value in numbers.items()}
                line = {"step": step, "seconds": round(seconds, 1), "lr": lr, **numbers}
                with open(run / f"{stage}.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
            if seconds - saved > 120:
                saved = seconds
                state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"average": average, "step": step, "seconds": seconds}, f"{checkpoint}.part")
                os.replace(f"{checkpoint}.part", checkpoint)
                plot_losses(run / f"{stage}.jsonl")
                if preview and seconds - shown >= 60 * preview_minutes:
                    shown = seconds
                    with torch.no_grad(), swapped(parameters, average):
                        preview(step)
    for p, mean in zip(parameters, average, strict=True):
        p.data.copy_(mean)
    save_weights(module, run / f"{stage}.safetensors")
    plot_losses(run / f"{stage}.jsonl")
    checkpoint.unlink(missing_ok=True)


def trainable(module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def twin_of(module):
    """A copy of the module that shares its weights, but not its gradients."""
    twin = copy.deepcopy(module)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        q.data = p.data
    return twin


@contextmanager
def swapped(parameters, others):
    """Within the block, `parameters` hold the values of `others`."""
    kept = [p.detach().clone() for p in parameters]
    torch._foreach_copy_([p.data for p in parameters], others)
    try:
        yield
    finally:
        torch._foreach_copy_([p.data for p in parameters], kept)
