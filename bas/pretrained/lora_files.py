"""LoRA files: written for other programs, and read from them.

A file adds to each of its layers' weights the change scale x up down (Change) or a whole difference (Difference). The
scale is strength x alpha / rank, or the strength where alpha is missing, as in every other reader.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bas.errors import InputError, RunError
from bas.io.files import not_a_file
from bas.io.tensors import read_tensors, write_tensors
from bas.models.adapters import Change, Difference
from bas.models.bundle import is_finite
from bas.models.config import UNetConfig
from bas.pretrained.embedding_files import EMBEDDING_KEYS
from bas.pretrained.ldm_keys import rename, unet_table
from bas.pretrained.loading import Parts, name_of
from bas.pretrained.lora_names import (
    KOHYA_XL,
    OF_SDXL,
    find_place,
    foreign_kind,
    is_text_reader,
    kohya_name,
    peft_name,
    split_role,
)

log = logging.getLogger(__name__)

Adapters = Mapping[str, Mapping[str, Change | Difference]]  # by component, then by the layer's path


# --- Writing ------------------------------------------------------------------------------------------------------


def kohya_tensors(adapters: Adapters, xl: UNetConfig | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a kohya file in float32, and the part of its metadata that describes them.

    xl: the configuration of SDXL's UNet, whose layers have their original names there.

    All layers of a network have one alpha: diffusers applies the commonest one to all. What differs is folded into B.
    """
    tensors: dict[str, Tensor] = {}
    ranks, alphas, original = set(), set(), unet_table(xl) if xl else None
    for component, layers in adapters.items():
        alpha = common_alpha(layers)
        for layer, change in layers.items():
            name = kohya_name(component, layer, original)
            if isinstance(change, Difference):
                tensors[f"{name}.diff"] = change.delta()
                continue
            rank = len(change.down)
            tensors[f"{name}.lora_down.weight"] = change.down.float()
            tensors[f"{name}.lora_up.weight"] = folded(change.up, change.scale * rank / alpha)
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
            ranks.add(rank)
            alphas.add(alpha)
    described = {name: str(min(of)) if len(of) == 1 else "Dynamic" for name, of in (("dim", ranks), ("alpha", alphas))}
    network = {"ss_network_module": "networks.lora"}
    return tensors, network | ({f"ss_network_{name}": text for name, text in described.items()} if ranks else {})


def common_alpha(layers: Mapping[str, Change | Difference]) -> float:
    """The alpha of a network: that of its largest adapter, in bf16, which every precision of a file expresses."""
    adapters = [change for change in layers.values() if isinstance(change, Change)]
    largest = max(adapters, key=lambda change: len(change.down), default=None)
    if largest is None or not largest.scale:
        return 1.0
    return abs(float(torch.tensor(largest.scale * len(largest.down)).bfloat16())) or 1.0


def folded(up: Tensor, factor: float) -> Tensor:
    """An adapter's second matrix in float32, multiplied by a factor."""
    return up.float() if factor == 1 else up.float() * factor


def peft_tensors(adapters: Adapters, _xl: UNetConfig | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a PEFT file in float32, scales folded into B, and the metadata that PEFT's readers take.

    Its names are the same for SDXL.
    """
    tensors: dict[str, Tensor] = {}
    texts: dict[str, object] = {}
    for component, layers in adapters.items():
        ranks: dict[str, int] = {}
        for layer, change in layers.items():
            if isinstance(change, Difference):
                raise InputError("this format holds adapters, not differences of whole weights: give it a --rank")
            name, rank = peft_name(component, layer), len(change.down)
            tensors[f"{name}.lora_A.weight"] = change.down.float()
            tensors[f"{name}.lora_B.weight"] = folded(change.up, change.scale)
            ranks[layer] = rank  # without `text_model.`: PEFT compares ends, and transformers 5 has no such module
        if ranks:
            commonest = max(ranks.values(), key=list(ranks.values()).count)
            others = {name: rank for name, rank in ranks.items() if rank != commonest}
            texts |= {
                f"{component}.r": commonest,
                f"{component}.lora_alpha": commonest,
                f"{component}.target_modules": sorted(ranks),
                f"{component}.rank_pattern": others,
                f"{component}.alpha_pattern": others,
            }
    return tensors, {"lora_adapter_metadata": json.dumps(texts, sort_keys=True)}


FORMATS = {"kohya": kohya_tensors, "peft": peft_tensors}


def bundled(rows: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The tensors of embeddings inside a LoRA file, as A1111 reads them.

    rows: (n, d) for each text encoder, by name, which has no dot.
    """
    keys = {1: ("string_to_param.*",), 2: EMBEDDING_KEYS}
    return {
        f"bundle_emb.{name}.{key}": row
        for name, own in rows.items()
        for key, row in zip(keys[len(own)], own, strict=True)
    }


def write_lora(
    path: Path,
    adapters: Adapters,
    form: str,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    extra: Mapping[str, Tensor] = MappingProxyType({}),
    xl: UNetConfig | None = None,
) -> None:
    """Write a LoRA file, with further tensors in it. xl: the configuration of the UNet, for SDXL

    RunError for values that are beyond the range of `dtype` or no finite numbers.
    """
    tensors, texts = FORMATS[form](adapters, xl)
    tensors |= extra
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise RunError(f"{len(broken)} tensors are beyond the range of {name_of(dtype)} or not finite ({broken[0]})")
    write_tensors(path, tensors, {**metadata, **texts})


def as_lora(change: Change | Difference, rank: int) -> Change:
    """The adapter of this rank that is nearest to a change of a weight, by its singular values, in float32."""
    u, values, v = change.svd()
    root = values[:rank].sqrt()
    down, up = (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()
    kernel = change.shape[2:]  # of a convolution: the whole of it is A's
    return Change(down.view(-1, *change.shape[1:]), up.view(*up.shape, *(1 for _ in kernel)), 1.0)


# --- Reading ------------------------------------------------------------------------------------------------------


def read_lora(path: Path, parts: Parts, strength: float) -> Adapters:
    """Read a LoRA of any known format for the model of `parts`.

    Raises InputError in one line for another kind of file, for a model of another family, and for a tensor that has no
    place. Embeddings that are bundled in the file are left out with a warning.
    """
    if not path.is_file():
        raise not_a_file(path)
    tensors, texts = read_tensors(path)
    if bundled := sorted({name.split(".")[1] for name in tensors if name.startswith("bundle_emb.")}):
        log.warning("%s also holds the embeddings %s, which are not read from there", path, ", ".join(bundled))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("bundle_emb.")}
    if kind := foreign_kind(tensors):
        raise InputError(f"{path} is {kind}, {UNREAD}")
    layers = layers_of(parts)
    found: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        place = find_place(name, layers)
        if place is None:
            family = family_of(tensors) or "another model"
            raise InputError(f"{path} holds {name}, for which this model has no place: it is a LoRA for {family}")
        if place.role != "alpha" and not tensor.is_floating_point():
            raise InputError(f"{path}: {name} holds {name_of(tensor.dtype)}, not weights: give a LoRA in fp32 or fp16")
        if not is_finite(tensor.float()):
            raise InputError(f"{path}: {name} holds values that are not finite numbers: download it again")
        found[place.component, place.layer][place.role] = tensor
    if not found:
        raise InputError(f"{path} holds no LoRA")
    alphas = _alphas(texts, layers)
    adapters: dict[str, dict[str, Change | Difference]] = defaultdict(dict)
    for (component, layer), roles in found.items():
        weight = parts.tensors[component][f"{layer}.weight"]
        alpha = alphas.get(f"{component}.{layer}")
        adapters[component][layer] = _change(path, layer, roles, weight, strength, alpha)
    return adapters


def layers_of(parts: Parts) -> dict[str, dict[str, str]]:
    """By component, the paths of the layers with a weight, by the names that kohya's files have for them."""
    found, original = {}, unet_table(parts.spec.unet)
    for component in ("unet", *parts.spec.text_encoders):
        paths = [
            name.removesuffix(".weight")
            for name, tensor in parts.tensors[component].items()
            if name.endswith(".weight") and tensor.ndim in (2, 4) and not name.startswith("embeddings.")
        ]
        found[component] = {path.replace(".", "_"): path for path in paths}
        if component == "unet":
            found[component] |= {str(rename(path, original)).replace(".", "_"): path for path in paths}
    return found


def _change(
    path: Path, layer: str, roles: dict[str, Tensor], weight: Tensor, strength: float, alpha: float | None
) -> Change | Difference:
    """What the tensors of one layer do to its weight. InputError unless they are a whole set of the right shapes."""
    if "diff of the bias" in roles:
        raise InputError(f"{path} changes the bias of {layer}, which bas does not read: give a LoRA without it")
    if "diff" in roles:
        if roles.keys() != {"diff"} or roles["diff"].numel() != weight.numel():
            raise InputError(f"{path}: the difference of {layer} does not fit the model's {list(weight.shape)}")
        return Difference(roles["diff"], strength)
    if missing := {"down", "up"} - roles.keys():
        raise InputError(f"{path}: {layer} has no {min(missing)} matrix; copy or download the file again")
    down, up = roles["down"], roles["up"]
    if down.ndim < 2 or up.ndim < 2 or not len(down):
        raise InputError(f"{path}: the matrices of {layer} are {list(down.shape)} and {list(up.shape)}: it is damaged")
    rank = len(down)
    if "mid" in roles:  # Tucker: A reads 1x1, mid has the kernel
        if roles["mid"].ndim != 4 or roles["mid"].shape[:2] != (up.shape[1], rank):
            raise InputError(f"{path}: the matrices of {layer} do not fit each other")
        down = torch.einsum("mnhw,ni->mihw", roles["mid"].float(), down.float().flatten(1))
    if up.shape[1] != len(down) or len(up) * down[0].numel() != weight.numel() or len(up) != len(weight):
        raise InputError(
            f"{path}: {layer} has an input of {down.shape[1]} and an output of {len(up)}, the model's is "
            f"{list(weight.shape)}: it is a LoRA for {FAMILIES.get(down.shape[1], 'another model')}"
        )
    if "alpha" in roles:
        if roles["alpha"].numel() != 1:
            raise InputError(f"{path}: the alpha of {layer} is {list(roles['alpha'].shape)}, not one number")
        alpha = float(roles["alpha"])
    return Change(down, up, strength * (1.0 if alpha is None else alpha / rank))


UNREAD = "which bas does not read: give a LoRA for Stable Diffusion 1.x, 2.x or XL"
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # by the width of the text


def family_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The family of models that a LoRA file is for, by its text encoders and the width of the text; None if unknown."""
    if any(part in name for part in OF_SDXL for name in tensors):
        return FAMILIES[2048]
    roles = {name: split_role(name) for name in tensors}
    readers = [tensors[name] for name, found in roles.items() if found and is_text_reader(*found)]
    widths = {tensor.shape[-1] for tensor in readers if tensor.ndim}
    return ", ".join(sorted(FAMILIES.get(width, f"a model with text of width {width}") for width in widths)) or None


def _alphas(texts: dict[str, str], components: Iterable[str] = KOHYA_XL) -> dict[str, float]:
    """The alpha of each layer that the metadata of a PEFT file names, by component and layer."""
    try:
        described = json.loads(texts.get("lora_adapter_metadata", "{}"))
        alphas = {}
        for component in components:
            if f"{component}.lora_alpha" in described:
                common, own = described[f"{component}.lora_alpha"], described.get(f"{component}.alpha_pattern", {})
                for layer in described.get(f"{component}.target_modules", ()):
                    bare = layer.removeprefix("text_model.")
                    alphas[f"{component}.{bare}"] = float(own.get(layer, common))
    except (ValueError, TypeError, AttributeError):
        return {}
    return alphas


# --- Describing ---------------------------------------------------------------------------------------------------


def describe_lora(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> dict[str, Any]:
    """Say of a LoRA file: its base, ranks, alphas, trigger words, and what of it cannot be used."""
    if kind := foreign_kind(tensors):
        return {"what": kind, "problem": f"{path} is {kind}, {UNREAD}"}
    roles = {name: split_role(name) for name in tensors}
    layers = {found[0] for found in roles.values() if found and found[1] != "alpha"}
    ranks = {
        tensors[name].shape[0] for name, found in roles.items() if found and found[1] == "down" and tensors[name].ndim
    }
    alphas = {
        float(tensors[name])
        for name, found in roles.items()
        if found and found[1] == "alpha" and tensors[name].numel() == 1
    }
    alphas |= set(_alphas(dict(texts)).values())
    text = sum(layer.startswith(("lora_te", "text_encoder", "te_")) for layer in layers)
    return {
        "for": family_of(tensors) or texts.get("ss_base_model_version"),
        "trained on": texts.get("ss_sd_model_name"),
        "base hash": texts.get("bas.base_sha256"),
        "layers": f"{len(layers) - text} of the UNet, {text} of the text encoder",
        "ranks": sorted(ranks),
        "alpha": sorted(alphas) or ("none: the strength counts as it is" if ranks else None),
        "trigger words": trigger_words(texts),
        "not used": sorted(name for name, found in roles.items() if found is None),
    }


def trigger_words(texts: Mapping[str, str]) -> list[str]:
    """The words that a LoRA was trained with, as the metadata of kohya's scripts or of ModelSpec lists them."""
    try:
        folders = json.loads(texts.get("ss_tag_frequency", "{}")).values()
        words = [word for folder in folders for word in folder]
    except (ValueError, AttributeError, TypeError):
        words = []
    return words or [word.strip() for word in texts.get("modelspec.trigger_phrase", "").split(",") if word.strip()]
