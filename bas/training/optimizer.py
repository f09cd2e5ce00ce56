"""The optimizers: AdamW and Adam as fused kernels, and AdamW with 8-bit moments, which is an extra."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from bas.config import TrainConfig
from bas.errors import InputError

ADAM_BYTES = {"adamw": 8, "adam": 8, "adamw8bit": 2}  # of the two moments per trained number


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer that the config names. Its learning rate is 0 until `set_learning_rate`."""
    parameters = list(parameters)
    betas, decay = (config.adam_beta1, config.adam_beta2), config.adam_weight_decay
    if config.optimizer == "adamw8bit":
        return adamw8bit()(parameters, lr=0.0, betas=betas, eps=config.adam_epsilon, weight_decay=decay)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=0.0, betas=betas, eps=config.adam_epsilon, weight_decay=decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    """AdamW of bitsandbytes (Dettmers et al. 2022). Raises InputError where that is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("--optimizer adamw8bit is an extra: pip install bitsandbytes") from None
    return AdamW8bit
