"""The device, the precision and the determinism of a computation, from the flags and the machine."""

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
    """Return the named device, or without a name the GPU if there is one. InputError if it is not there.

    A GPU becomes the current one, to which events belong, and TF32 is turned off.
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


# From this many weights of the UNet on, bf16 pays on a CPU that multiplies in it. A training step of the miniature
# (5 million weights, 64x64) took 0.93 of its float32 time at a batch size of 1 and 0.60 at 4; 32 rows of a forward
# pass took 0.55. A step of a small SD 2-style UNet at 512x512 took 0.65.
CPU_BF16_WEIGHTS = 2_000_000


def pick_precision(name: str, device: torch.device, weights: int = 0) -> str:
    """Resolve `auto`: bf16 on a GPU that has it, else fp16; on a CPU float32, or bf16 where that pays.

    weights: how many the UNet has. Logs a warning about bf16 that the device only emulates.
    """
    noticed = device.type == "cuda" or weights >= CPU_BF16_WEIGHTS  # a small model on a CPU is fast enough
    if name == "bf16" and noticed and not native_bf16(device):
        warn_of_emulation(device)
    if name != "auto":
        return name
    if device.type == "cpu":
        return "bf16" if weights >= CPU_BF16_WEIGHTS and cpu_multiplies_bf16() else "no"
    return "bf16" if gpu_multiplies_bf16(device) else "fp16"


def gpu_multiplies_bf16(device: torch.device) -> bool:
    """Return whether a GPU multiplies bf16 in hardware; NVIDIA GPUs before Ampere emulate it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def warn_of_emulation(device: torch.device) -> None:
    """Warn once for each device that it emulates bf16."""
    if device.type == "cpu":
        log.warning("this processor only emulates bf16, many times slower than float32: leave bf16 to other machines")
        return
    name = torch.cuda.get_device_name(device)
    log.warning("%s (%s) only emulates bf16, slowly and in more memory than is counted: use fp16 there", device, name)


def cpu_multiplies_bf16() -> bool:
    """Return whether the processor multiplies bf16 in hardware. False where PyTorch cannot tell."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def native_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bf16 in hardware."""
    return cpu_multiplies_bf16() if device.type == "cpu" else gpu_multiplies_bf16(device)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Compute with float32 weights, products in `precision`, softmax and losses in float32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=DTYPES[precision] != torch.float32)


OUT_OF_MEMORY = (  # errors without a class: of the machine's memory, and of CUDA's libraries
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of the device or of the machine ran out."""
    told = any(text in str(error) for text in OUT_OF_MEMORY)
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within the block, products of float32 matrices on a GPU may be in TF32, or may not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within the block, if `wanted`, use only kernels that give the same bits on every run.

    RuntimeError for an operation without such a kernel. Enter the block before the first matrix product on a GPU,
    because cuBLAS reads its environment variable once (PyTorch's notes on reproducibility).
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it picks kernels by a measurement of their speed
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
