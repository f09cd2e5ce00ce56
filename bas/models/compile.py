"""torch.compile as an option: the whole UNet, only its repeated blocks, or what pays for the length of the job.

Compiled in place: the modules stay what they are and keep their names. What was compiled once lies in the cache.
"""

import os

import torch

from bas.io.files import cache_dir
from bas.models.attention import TransformerBlock
from bas.models.layers import ResnetBlock
from bas.models.unet import UNet

# Steps from which on compiling pays on a GPU. Published figures for large denoisers: about 30 s for the repeated blocks
# and 70 s for the whole network before the first step, against some 10 ms of a step saved. Not measured here.
STEPS_TO_PAY = {"whole": 10_000, "regional": 3_000}
# Kinds of a module that may be compiled, then dynamo raises: SD's UNets hold 14 shapes of residual blocks and 4 of
# transformers, which each phase's batch and each size of a scene that one process trains on makes anew.
SHAPES = 4096


def choose_compilation(wanted: str, steps: int, device: torch.device) -> tuple[str, str]:
    """Resolve `auto` for a job of so many steps. -> "no", "regional" or "whole", and the reason in words"""
    if wanted != "auto":
        return wanted, "as asked"
    if device.type != "cuda":
        return "no", "it pays on a GPU only"
    for kind, least in STEPS_TO_PAY.items():
        if steps >= least:
            return kind, f"it pays from {least} steps on, and the job has {steps}"
    return "no", f"it pays from {STEPS_TO_PAY['regional']} steps on, and the job has {steps}"


def compile_unet(unet: UNet, kind: str, backend: str = "inductor") -> None:
    """Compile the UNet ("whole") or each of its residual and transformer blocks ("regional"); "no" does nothing."""
    if kind == "no":
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    for limit in ("recompile_limit", "accumulated_recompile_limit"):  # blocks of one shape share their code
        setattr(torch._dynamo.config, limit, max(SHAPES, getattr(torch._dynamo.config, limit)))
    blocks = [module for module in unet.modules() if isinstance(module, (ResnetBlock, TransformerBlock))]
    for module in [unet] if kind == "whole" else blocks:
        module.compile(fullgraph=True, dynamic=False, backend=backend)
