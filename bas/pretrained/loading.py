"""The way from the tensors of a file to the weights of a network: renamed, checked key by key, converted, assigned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bas.errors import InputError, RunError, is_own_fault
from bas.io.tensors import WEIGHT_TYPES
from bas.models.adapters import Changes, changed
from bas.models.bundle import Models, ModelSpec, is_adapter, is_finite
from bas.models.layers import PIXELS_PER_CELL
from bas.models.text import merged_state_dict
from bas.runtime.device import is_out_of_memory

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TEXT_PREFIX = "text_model."  # of the text encoder's keys in older versions of transformers
PROJECTION = "text_projection.weight"  # of SDXL's second text encoder, beside the text model
EMBEDDING = "embeddings.token_embedding.weight"
TEXT_UNUSED = {"embeddings.position_ids", "logit_scale"}  # no part of Stable Diffusion
PADDING = 8, 128  # rows of an embedding are padded to a multiple of the first, by fewer than the second
WRAPPERS = {  # parts of names that wrappers add: torch.compile, parallel training, Lightning
    *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "state_dict"),
}
WORKERS = 4  # threads that convert weights: most of the time is spent in allocating memory
WORTH_THREADS = 2**26  # bytes of a network from which on threads pay
BROKEN = "holds broken weights"
SHOWN = 20  # problems listed in an error; the rest is counted


@dataclass
class Parts:
    """The content of a folder or a single file, under the names of bas, before any network is built."""

    spec: ModelSpec
    tensors: dict[str, dict[str, Tensor]]  # by component, memory-mapped
    changes: dict[str, Changes] = field(default_factory=dict)  # of weights, by component; added when they are loaded
    sources: dict[str, Path] = field(default_factory=dict)  # of components that are not the model's own
    rows: dict[str, Tensor] = field(default_factory=dict)  # (N, d) of handles, by text encoder: its embedding's last

    def with_rows(self, rows: Mapping[str, Tensor], handles: Iterable[str]) -> Parts:
        """Return the parts with further rows (N, d) of each token embedding, and the handles that they belong to."""
        both = {name: torch.cat([self.rows[name], own]) if name in self.rows else own for name, own in rows.items()}
        configs = {
            name: config | {"vocab_size": config["vocab_size"] + len(rows[name])}
            for name, config in self.spec.text_encoders.items()
        }
        return replace(self, spec=replace(self.spec, handles=(*self.spec.handles, *handles), **configs), rows=both)

    @classmethod
    def of(cls, models: Models, dtype: torch.dtype) -> Parts:
        """Return a model's parts as they are saved: handles are rows of the embedding, the text encoder's keys bare.

        Raises RunError for weights beyond the range of `dtype`, or that are not finite.
        """
        states = {"unet": models.unet.state_dict(), "vae": models.vae.state_dict()}
        for name, network in models.text_networks.items():
            states[name] = {k.removeprefix(TEXT_PREFIX): v for k, v in merged_state_dict(network).items()}
        if any(map(is_adapter, states["unet"])):
            raise InputError("adapters at single tokens have no place in a whole model: keep the run and its base")
        tensors = {component: {k: v.to(dtype) for k, v in state.items()} for component, state in states.items()}
        broken = [f"{part} {key}" for part in tensors for key, tensor in tensors[part].items() if not is_finite(tensor)]
        if broken:
            raise RunError(_not_savable(broken, dtype))
        return cls(models.spec, tensors)


def check_savable(models: Models, dtype: torch.dtype) -> None:
    """Raise InputError for weights that are beyond the range of the precision in which the model will be saved."""
    broken = [
        f"{component} {name}"
        for component, network in models.networks.items()
        for name, weight in network.named_parameters()
        if weight.dtype != dtype and not is_finite(weight.detach().to(dtype))
    ]
    if broken:
        raise InputError(_not_savable(broken, dtype))


def _not_savable(broken: list[str], dtype: torch.dtype) -> str:
    """Return the message about weights that cannot be saved."""
    return (
        f"the model cannot be saved in {name_of(dtype)}, {len(broken)} weights are beyond its range or not "
        f"finite ({broken[0]}): use --save_precision fp32 or bf16"
    )


def name_of(dtype: torch.dtype) -> str:
    """Return the short name of a number format: fp16, bf16, fp32, int64."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def unwrap_keys(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Remove what torch.compile (`_orig_mod.`) and other WRAPPERS put into the names of weights, wherever it stands.

    Raises InputError if two names become one.
    """
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in tensors}
    if len(set(names.values())) < len(names):
        raise InputError(f"{source} holds weights twice, with and without a wrapper's prefix: save it again")
    return {new: tensors[name] for name, new in names.items()}


def fit_text_encoders(parts: Parts) -> Parts:
    """Leave out what a text encoder's file holds beyond its configuration and its tokenizer.

    That is layers behind the last one that is used (clip skip), rows by which the embedding is padded, and a projection
    where nothing is pooled.
    """
    spec, tokens, (multiple, least) = parts.spec, len(parts.spec.tokenizer), PADDING
    fitted, configs = dict(parts.tensors), dict(spec.text_encoders)
    for component, config in spec.text_encoders.items():
        tensors = {name.removeprefix(TEXT_PREFIX): tensor for name, tensor in parts.tensors[component].items()}
        layers, rows = config["num_hidden_layers"], config["vocab_size"]
        unused = {name for name in tensors if (layer := _layer_of(name)) is not None and layer >= layers}
        unused |= TEXT_UNUSED | ({PROJECTION} if component == "text_encoder" else set())
        fitted[component] = tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
        if 0 < rows - tokens < least and rows % multiple == 0:
            configs[component] = config | {"vocab_size": tokens}
            if EMBEDDING in tensors and len(tensors[EMBEDDING]) == rows:
                tensors[EMBEDDING] = tensors[EMBEDDING][:tokens]
    return replace(parts, spec=replace(spec, **configs), tensors=fitted)


def _layer_of(name: str) -> int | None:
    """Return the number of the layer that a weight of the text encoder belongs to."""
    layer = re.match(r"encoder\.layers\.([0-9]{1,4})\.", name)
    return int(layer[1]) if layer else None


def check_parts(spec: ModelSpec) -> None:
    """Raise InputError unless the parts of a model belong together."""
    source, texts = spec.source, spec.text_encoders.values()
    width = sum(text["hidden_size"] for text in texts)
    if spec.unet.cross_attention_dim != width:
        several = "encoder gives" if len(texts) == 1 else "encoders give"
        raise InputError(
            f"{source}: the UNet reads text of width {spec.unet.cross_attention_dim}, the text {several} {width}: "
            "they belong to different models"
        )
    second = spec.text_encoder_2
    pooled = second.get("projection_dim", second["hidden_size"]) if second else 0
    if spec.unet.pooled_dim != pooled:
        raise InputError(
            f"{source}: the UNet reads a pooled text of width {spec.unet.pooled_dim}, the text encoders give {pooled}: "
            "they belong to different models"
        )
    if pooled and spec.vae.factor != PIXELS_PER_CELL:
        raise InputError(
            f"{source}: the VAE makes one latent cell of {spec.vae.factor} pixels a side, those of Stable Diffusion XL "
            f"of {PIXELS_PER_CELL}: they belong to different models"
        )
    if spec.unet.in_channels != spec.vae.latent_channels:
        raise InputError(
            f"{source}: the UNet has {spec.unet.in_channels} latent channels, the VAE {spec.vae.latent_channels}: "
            "they belong to different models"
        )
    for text in texts:
        _check_tokens(source, spec.tokenizer, text["vocab_size"])


def _check_tokens(source: Path | None, tokenizer: CLIPTokenizer, rows: int) -> None:
    """Raise InputError unless the tokens of a tokenizer are the rows of an embedding."""
    if len(tokenizer) != rows:
        raise InputError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the text encoder {rows} rows: "
            "they belong to different models"
        )
    if (numbers := sorted(tokenizer.get_vocab().values())) != list(range(rows)):
        wrong = next(number for i, number in enumerate(numbers) if number != i)
        raise InputError(
            f"{source}: the tokenizer's numbers go up to {numbers[-1]}, {wrong} among them, the text encoder has "
            f"{rows} rows: they belong to different models"
        )


def load_weights(
    module: nn.Module,
    tensors: dict[str, Tensor],
    source: str,
    device: torch.device | str,
    dtype: torch.dtype,
    changes: Changes | None = None,
) -> None:
    """Give a module built on the meta device its weights, converted to `device` and `dtype`; it ends in eval mode.

    `changes` are added to the weights in float32, before these are converted. `tensors` is emptied on the way, so that
    a file's pages leave memory once they are converted. Raises InputError as `check_keys` does, and one that lists
    every weight that is not finite after conversion.
    """
    given = check_keys(module, tensors, source)
    tensors.clear()
    device = torch.empty(0, device=device).device  # "cuda" with its number: each thread has a current GPU of its own

    def convert(name: str) -> Tensor | str:
        own, added = given.pop(name), (changes or {}).get(name, [])
        tensor = changed(own, added)
        converted = tensor.to(device=device, dtype=dtype, copy=True)  # no mapping stays: the file may change
        if is_finite(converted):
            return converted
        if is_finite(tensor):
            return f"{name} holds values beyond the range of {name_of(dtype)}"
        if added and is_finite(own):
            return f"{name} is finite alone, but not with the LoRA that is added: lower its weight, or leave it out"
        return f"{name} holds values that are not finite numbers"

    names, large = list(given), sum(tensor.nbytes for tensor in given.values()) >= WORTH_THREADS
    with ThreadPoolExecutor(WORKERS) as pool:
        weights = dict(zip(names, (pool.map if large else map)(convert, names), strict=True))
    _raise_for([[problem for problem in weights.values() if isinstance(problem, str)]], source, BROKEN)
    module.load_state_dict(weights, strict=True, assign=True)
    _fill_position_ids(module, device)
    module.eval()


def check_keys(module: nn.Module, tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the tensors in the shapes of a module, which may be on the meta device. No weight is read.

    Raises one InputError for all missing, unexpected or wrong-shaped keys; another for tensors that are not weights.
    """
    wanted = module.state_dict()
    given = {name: _reshape(tensor, wanted.get(name)) for name, tensor in tensors.items()}
    missing = [f"{name} is missing" for name in wanted if name not in given]
    unexpected = [f"{name} is unexpected" for name in given if name not in wanted]
    misshapen = [
        f"{name} is {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    _raise_for([missing, unexpected, misshapen], source, "does not hold the weights that its configuration describes")
    kinds = {name: given[name].dtype for name in wanted if given[name].dtype not in WEIGHT_TYPES.values()}
    foreign = [f"{name} is {str(kind).removeprefix('torch.')}, not fp16, bf16 or fp32" for name, kind in kinds.items()]
    _raise_for([foreign], source, BROKEN)
    return {name: given[name] for name in wanted}


def _reshape(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    """Return a 1x1 convolution of the original layout as the linear layer of the module: (c, c, 1, 1) -> (c, c)"""
    if wanted is not None and wanted.ndim == 2 and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor


def _raise_for(problems: list[list[str]], source: str, what: str) -> None:
    """Raise InputError if there are problems. A long list shows as many of each kind, since they explain each other."""
    count = sum(map(len, problems))
    if not count:
        return
    in_turn: Iterable[str | None] = chain.from_iterable(zip_longest(*problems))
    shown = set(islice(filter(None, in_turn), SHOWN))
    listed = [problem for kind in problems for problem in kind if problem in shown]
    rest = f"; and {count - SHOWN} more" if count > SHOWN else ""
    raise InputError(f"{source} {what} ({count}): {'; '.join(listed)}{rest}")


def _fill_position_ids(module: nn.Module, device: torch.device) -> None:
    """Compute the text encoder's table 0, 1, 2, ..., which is in no file and has no values on the meta device."""
    for owner in module.modules():
        buffer = owner._buffers.get("position_ids")
        if buffer is not None:
            owner.register_buffer(
                "position_ids", torch.arange(buffer.shape[-1], device=device).expand(buffer.shape), persistent=False
            )


# --- Errors -------------------------------------------------------------------------------------------------------


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn any error that a damaged file or folder causes into an InputError that names it.

    A missing package, too little memory and mistakes of bas itself stay what they are.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # safetensors, tokenizers and transformers raise nothing more specific
        known = isinstance(error, InputError) and str(path) in str(error)
        if known or is_own_fault(error) or is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be used: {reason}") from error
