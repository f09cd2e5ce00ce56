"""Attention on this machine's CPU in bf16: fused, and as `bas.models.dot_product.attend` chooses, forward and backward.

`python -m tools.bench.attention` prints CPU milliseconds of one call of each on one thread, the lower quartile of
several, in turns. The last column is the time of the choice divided by that of the fused attention: below 1 it pays.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bas.models.dot_product import attend

SHAPES = (  # batch, heads, queries, keys, features: the miniature's training, SD 1 at 256 and at 512 pixels
    *((24, 2, 256, 256, 32), (24, 2, 256, 77, 32), (24, 4, 64, 64, 32)),
    *((2, 8, 1024, 1024, 40), (2, 8, 1024, 77, 40), (2, 8, 4096, 4096, 40), (2, 8, 4096, 77, 40)),
)
ROUNDS = 8


def measure(shape: tuple[int, int, int, int, int], trains: bool, rounds: int = ROUNDS) -> dict[str, float]:
    """CPU seconds of one call, by the way of computing it. trains: with the backward pass"""
    batch, heads, queries, keys, features = shape
    sizes = ((batch, heads, n, features) for n in (queries, keys, keys))
    inputs = [torch.randn(size, dtype=torch.bfloat16, requires_grad=trains) for size in sizes]
    ways: dict[str, Callable[..., Tensor]] = {"fused": F.scaled_dot_product_attention, "attend": attend}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            out = way(*inputs)
            if trains:
                torch.autograd.grad(out.sum(), inputs)
            seconds[name].append(time.process_time() - began)
    return {name: statistics.quantiles(values, n=4)[0] for name, values in seconds.items()}


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| batch, heads, queries, keys, features | pass | fused (ms) | attend (ms) | ratio |\n|---|---|---|---|---|")
    for shape in SHAPES:
        for trains in (False, True):
            fused, chosen = (1000 * value for value in measure(shape, trains).values())
            kind = "forward and backward" if trains else "forward"
            print(f"| {', '.join(map(str, shape))} | {kind} | {fused:.1f} | {chosen:.1f} | {chosen / fused:.2f} |")


if __name__ == "__main__":
    main()
