"""Where and in what precision to compute: decided once, from the flags and what the machine has."""

from contextlib import AbstractContextManager

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
