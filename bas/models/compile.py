"""torch.compile as an option, for the whole UNet or for its repeated blocks.

Modules are compiled in place and keep their names. Compiled code is cached on disk.
"""

import os

import torch

from bas.io.files import cache_dir
from bas.models.attention import TransformerBlock
from bas.models.layers import ResnetBlock
from bas.models.unet import UNet

# Dynamo raises once a module was compiled for more input shapes than this. SD's UNets have 14 shapes of residual blocks
# and 4 of transformers, for each batch size and each scene size of a process.
SHAPES = 4096


def compile_unet(unet: UNet, kind: str, backend: str = "inductor") -> None:
    """Compile the UNet ("whole") or each of its residual and transformer blocks ("regional"); "no" does nothing."""
    if kind == "no":
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    for limit in ("recompile_limit", "accumulated_recompile_limit"):  # shared by blocks of one shape
        setattr(torch._dynamo.config, limit, max(SHAPES, getattr(torch._dynamo.config, limit)))
    blocks = [module for module in unet.modules() if isinstance(module, (ResnetBlock, TransformerBlock))]
    for module in [unet] if kind == "whole" else blocks:
        module.compile(fullgraph=True, dynamic=False, backend=backend)
