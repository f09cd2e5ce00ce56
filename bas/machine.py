"""Where, in what precision and how repeatably to compute: decided once, from the flags and what the machine has."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from bas.config import InputError

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the GPU if there is one. Raises InputError for a device that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve `auto`: float32 on a CPU, bf16 on a GPU that has it, else fp16."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision: float32 weights, products in `precision`, softmax and losses in float32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=DTYPES[precision] != torch.float32)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within the block, if `wanted`, PyTorch takes only kernels that give the same bits on every run.

    An operation that has none raises RuntimeError. Not before the block may the process have multiplied matrices on a
    GPU: cuBLAS reads its variable once (PyTorch's notes on reproducibility).
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # which picks kernels by their speed at the moment
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
