"""A model as networks and as parts on disk, whatever the layout, and the strict way from one to the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bas.errors import InputError
from bas.io.tensors import WEIGHT_TYPES
from bas.models.bundle import Models, ModelSpec
from bas.models.text import merged_state_dict

TEXT_PREFIX = "text_model."  # older transformers put the tower's keys behind it, newer ones don't
WORKERS = 4  # threads that convert weights: most of that time is the system's, handing out memory
WORTH_THREADS = 2**26  # bytes of a network
BROKEN = "holds broken weights"
SHOWN = 20  # problems listed in an error before the rest is only counted


@dataclass
class Parts:
    """The content of a folder or a single file, under the names of bas, before any network is built."""

    spec: ModelSpec
    tensors: dict[str, dict[str, Tensor]]  # by component, memory-mapped

    @classmethod
    def of(cls, models: Models, dtype: torch.dtype) -> Parts:
        """A model's parts as they are saved: handles are rows of the embedding, the text encoder's keys bare."""
        text = {k.removeprefix(TEXT_PREFIX): v for k, v in merged_state_dict(models.text_encoder).items()}
        states = {"unet": models.unet.state_dict(), "vae": models.vae.state_dict(), "text_encoder": text}
        tensors = {component: {k: v.to(dtype) for k, v in state.items()} for component, state in states.items()}
        return cls(models.spec, tensors)


def check_parts(spec: ModelSpec) -> None:
    """Raise InputError unless the parts of a model belong together."""
    source, width, tokens = spec.source, spec.text_encoder.get("hidden_size"), spec.text_encoder.get("vocab_size")
    if spec.unet.cross_attention_dim != width:
        raise InputError(
            f"{source}: the UNet reads text of width {spec.unet.cross_attention_dim}, the text encoder gives {width}: "
            "they belong to different models"
        )
    if spec.unet.in_channels != spec.vae.latent_channels:
        raise InputError(
            f"{source}: the UNet has {spec.unet.in_channels} latent channels, the VAE {spec.vae.latent_channels}: "
            "they belong to different models"
        )
    if len(spec.tokenizer) != tokens:
        raise InputError(
            f"{source}: the tokenizer has {len(spec.tokenizer)} tokens, the text encoder {tokens} rows: "
            "they belong to different models"
        )
    if (last := max(spec.tokenizer.get_vocab().values())) >= tokens:
        raise InputError(
            f"{source}: the tokenizer's numbers go up to {last}, the text encoder has {tokens} rows: "
            "they belong to different models"
        )


def load_weights(
    module: nn.Module, tensors: dict[str, Tensor], source: str, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Give a module built on the meta device its weights, converted to `device` and `dtype`; it ends in eval mode.

    `tensors` is emptied on the way, so that a file's pages leave memory as soon as they are converted. InputErrors as
    `check_keys` raises them; another lists every weight that is no finite number.
    """
    given = check_keys(module, tensors, source)
    tensors.clear()
    device = torch.empty(0, device=device).device  # "cuda" with its number: each thread has a current GPU of its own

    def convert(name: str) -> Tensor | None:
        tensor = given.pop(name)
        return tensor.to(device=device, dtype=dtype) if _is_finite(tensor) else None

    names, large = list(given), sum(tensor.nbytes for tensor in given.values()) >= WORTH_THREADS
    with ThreadPoolExecutor(WORKERS) as pool:
        weights = dict(zip(names, (pool.map if large else map)(convert, names), strict=True))
    broken = [name for name in names if weights[name] is None]
    _refuse([f"{name} holds values that are not finite numbers" for name in broken], source, BROKEN)
    module.load_state_dict(weights, strict=True, assign=True)
    _fill_position_ids(module, device)
    module.eval()


def check_keys(module: nn.Module, tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors in the shapes of a module, which may be on the meta device. No weight is read.

    One InputError lists every missing, unexpected or wrong-shaped key; another every tensor that is no weight.
    """
    wanted = module.state_dict()
    given = {name: _reshaped(tensor, wanted.get(name)) for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in wanted]
    problems += [
        f"{name} is {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    _refuse(problems, source, "does not hold the weights that its configuration describes")
    foreign = {name: given[name].dtype for name in wanted if given[name].dtype not in WEIGHT_TYPES.values()}
    kinds = {name: str(dtype).removeprefix("torch.") for name, dtype in foreign.items()}
    _refuse([f"{name} is {kind}, not fp16, bf16 or fp32" for name, kind in kinds.items()], source, BROKEN)
    return {name: given[name] for name in wanted}


def _reshaped(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    """1x1 convolutions of the original layout as linear layers, where the module has those: (c, c, 1, 1) -> (c, c)"""
    if wanted is not None and wanted.ndim == 2 and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite numbers."""
    low_and_high = torch.stack(tensor.aminmax())  # one pass without a temporary; not-a-number propagates
    return bool(low_and_high.isfinite().all())


def _refuse(problems: list[str], source: str, what: str) -> None:
    if problems:
        rest = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise InputError(f"{source} {what} ({len(problems)}): {'; '.join(problems[:SHOWN])}{rest}")


def _fill_position_ids(module: nn.Module, device: torch.device | str) -> None:
    """The text tower's table 0, 1, 2 ... is not part of the file: on the meta device it was never computed."""
    for owner in module.modules():
        buffer = owner._buffers.get("position_ids")
        if buffer is not None:
            owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
