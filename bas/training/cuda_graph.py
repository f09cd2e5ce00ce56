"""A whole training step as one CUDA graph: thousands of launches become one, and the results keep their bits.

A graph replays the same kernels on the same memory. So the step's inputs are copied into fixed buffers, whose shapes
never change (every batch is padded to all concepts), and the learning rate is a tensor. Not measured on a GPU yet.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bas.data.batches import Batch

WARM_UP = 3  # steps before the recording, in which libraries choose their kernels and the optimizer makes its state


class Inputs:
    """Fixed buffers that hold the batches of one step."""

    def __init__(self, batches: list[Batch]):
        self.batches = [Batch(*(tensor.clone() for tensor in batch.tensors())) for batch in batches]

    def fill(self, batches: list[Batch]) -> None:
        """Copy a step's batches into the buffers. Raises ValueError for other shapes: a graph would misread them."""
        for buffer, batch in zip(self.batches, batches, strict=True):
            for ours, theirs in zip(buffer.tensors(), batch.tensors(), strict=True):
                if ours.shape != theirs.shape:
                    raise ValueError(f"a batch tensor is {tuple(theirs.shape)}, its buffer {tuple(ours.shape)}")
                ours.copy_(theirs, non_blocking=True)


class CapturedStep:
    """Takes the first steps as they are, on a stream of its own; records one there; replays it ever after."""

    def __init__(self, step: Callable[[list[Batch]], dict[str, Tensor]]):
        self.step, self.taken = step, 0
        self.stream = torch.cuda.Stream()

    def __call__(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """One step. -> its numbers, valid until the next one"""
        batches = list(batches)
        if self.taken < WARM_UP:
            self.taken += 1
            return self.warm_up(batches)
        if self.taken == WARM_UP:
            self.taken += 1
            self.inputs, self.graph = Inputs(batches), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):  # records, computes nothing
                self.values = self.step(self.inputs.batches)
        self.inputs.fill(batches)
        self.graph.replay()
        return self.values

    def warm_up(self, batches: list[Batch]) -> dict[str, Tensor]:
        """A step as it is, away from the main stream, as recording asks for."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            values = self.step(batches)
        torch.cuda.current_stream().wait_stream(self.stream)
        return values
