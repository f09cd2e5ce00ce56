"""The bench's clocks: interleaved rounds of several sides, ceilings of the machine, and processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import bas

ROOT = Path(__file__).parents[2]
MEASURED_ROUNDS = 30  # of every side, when the budget allows


def time_calls(call: Callable[[], object], count: int, device: str) -> list[float]:
    """Seconds of each of `count` calls in a row: by the device's own events on CUDA, which does not wait in between."""
    if not device.startswith("cuda"):
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def interleave(
    sides: dict[str, Callable[[], object]], device: str, least: int, budget: float
) -> dict[str, list[float]]:
    """Seconds of each side's calls after a warm-up, side by side: A B C, A B C, and so on.

    As many rounds as fit into `budget` seconds, from `least` to MEASURED_ROUNDS; on CUDA a side takes five calls in
    its turn.
    """
    block, warm = (5, 5) if device.startswith("cuda") else (1, 1)
    found = {name: [] for name in sides}
    for call in sides.values():
        time_calls(call, warm, device)
    began, rounds = time.perf_counter(), 0
    while rounds < least or (
        rounds * block < MEASURED_ROUNDS and (time.perf_counter() - began) * (rounds + 1) / rounds < budget
    ):
        for name, call in sides.items():
            found[name] += time_calls(call, block, device)
        rounds += 1
    return found


@contextmanager
def optimizer_seconds(device: str) -> Iterator[dict[int, list[float]]]:
    """Within the block, the seconds of the steps of optimizers, by the number of weights that they step."""
    found: dict[int, list[float]] = {}
    began = [0.0]

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(*_) -> None:
        began[0] = now()

    def stop(optimizer: torch.optim.Optimizer, *_) -> None:
        weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        found.setdefault(weights, []).append(now() - began[0])

    hooks = register_optimizer_step_pre_hook(start), register_optimizer_step_post_hook(stop)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def ceilings(device: str) -> list[tuple[str, float, str]]:
    """How fast the machine copies memory and multiplies matrices, the median of seven calls. -> name, value, unit"""
    large, side = (2**29, 8192) if device.startswith("cuda") else (2**25, 2048)
    source = torch.randn(large, device=device)
    target = torch.empty_like(source)

    def middle(call: Callable[[], object]) -> float:
        time_calls(call, 2, device)
        return sorted(time_calls(call, 7, device))[3]

    found = [("copy", 8 * large / middle(lambda: target.copy_(source)) / 1e9, "GB/s")]
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = middle(lambda a=a, b=b: a @ b)
        found.append((f"matmul {name}", 2 * side**3 / seconds / 1e12, "TFLOP/s"))
    return found


# --- Processes of their own ---------------------------------------------------------------------------------------


def free_bytes() -> float:
    """Memory that is free for a new process; endless where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return float("inf")
    line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def child(task: dict, threads: int, environment: dict[str, str] | None = None) -> dict:
    """Run one task of children.py and return what it reports. Raises RuntimeError with the end of its errors."""
    command = [sys.executable, "-m", "tools.bench.children", json.dumps(task | {"threads": threads})]
    return json.loads(run_command(command, threads, environment)[1].splitlines()[-1])


def run_command(command: list[str], threads: int, environment: dict[str, str] | None = None) -> tuple[float, str]:
    """Seconds from start to end of a program, and its output. RuntimeError, its last line first, when it fails."""
    paths = os.pathsep.join([str(Path(bas.__file__).parents[1]), str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), **(environment or {})}
    began = time.perf_counter()
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        errors = done.stderr.strip()[-400:] or "no word"
        raise RuntimeError(f"{errors.splitlines()[-1]}: code {done.returncode} of {command[1:3]}\n{errors}")
    return seconds, done.stdout
