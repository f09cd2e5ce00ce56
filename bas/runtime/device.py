"""Where, in what precision and how repeatably to compute: decided once, from the flags and what the machine has."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch

from bas.errors import InputError

log = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU if there is one. Raises InputError for a device that is not there.

    A GPU becomes the current one, where events, graphs and Triton's kernels go, and TF32 is off until training asks.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = str(name)
    try:
        device = torch.empty(0, device=name).device  # "cuda" with its number
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if name.startswith("cuda") else "expected cpu, cuda or cuda:N"
        raise InputError(f"--device {name} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise InputError("--device meta cannot be used here: it computes nothing")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


# From this many weights of the UNet on, bf16 pays on a CPU that multiplies in it: a step of a small SD 2-style UNet at
# 512x512 took 0.65 of its float32 time, one of the miniature (5 million weights, 64x64) about as long as before.
CPU_BF16_WEIGHTS = 20_000_000


def pick_precision(name: str, device: torch.device, weights: int = 0) -> str:
    """Resolve `auto`: bf16 on a GPU that has it, else fp16; on a CPU float32, or bf16 where that pays.

    weights: how many the UNet has.
    """
    if name == "bf16" and device.type == "cuda" and not gpu_multiplies_bf16(device):
        warn_of_emulation(device)
    if name != "auto":
        return name
    if device.type == "cpu":
        return "bf16" if weights >= CPU_BF16_WEIGHTS and cpu_multiplies_bf16() else "no"
    return "bf16" if gpu_multiplies_bf16(device) else "fp16"


def gpu_multiplies_bf16(device: torch.device) -> bool:
    """Whether this GPU has bf16 products in hardware; NVIDIA's before Ampere only emulate them, slowly."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def warn_of_emulation(device: torch.device) -> None:
    """Say, once for each GPU, that bf16 costs time on it."""
    name = torch.cuda.get_device_name(device)
    log.warning("%s (%s) only emulates bf16, slowly and in more memory than is counted: use fp16 there", device, name)


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has bf16 products in hardware; an older PyTorch does not tell, and that is a no."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Mixed precision: float32 weights, products in `precision`, softmax and losses in float32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=DTYPES[precision] != torch.float32)


OUT_OF_MEMORY = (  # what PyTorch has no class of its own for: the machine's memory, and CUDA's beside its allocator
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, the device's or the machine's."""
    told = any(text in str(error) for text in OUT_OF_MEMORY)
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


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
