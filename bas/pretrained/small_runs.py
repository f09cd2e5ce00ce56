"""Small runs: a folder that holds what was trained, and the hash of its base model in place of a copy.

    RUN/tuned.safetensors       unet.NAME, text_encoder.text_model.NAME and text_encoder_2.text_model.NAME: adapters, or
                                whole weights
    RUN/concepts.safetensors    the handles' rows; the run's settings, and the name and hash of the base

Such a run reads as a whole model: the base with the trained weights in their places and the adapters added.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bas.errors import InputError, RunError
from bas.io.json_files import check_shape
from bas.io.run_files import CONCEPTS, ROWS, TUNED, TUNED_FORMAT, handle_rows, read_concepts
from bas.io.tensors import WEIGHT_TYPES, read_tensors, write_tensors
from bas.models.adapters import Change, Difference, changed, is_change_of
from bas.models.bundle import TEXT_ENCODERS, ModelSpec, is_adapter, is_finite
from bas.models.text import check_handles
from bas.presets import KINDS
from bas.pretrained.additions import Additions, with_additions
from bas.pretrained.folder import read_parts
from bas.pretrained.hashes import base_hash
from bas.pretrained.hub import SHIPPED, find, is_known_elsewhere, manifest
from bas.pretrained.loading import TEXT_PREFIX, Parts, name_of

ADVICE = "copy the run again"


@dataclass(frozen=True)
class Tuned:
    """What a small run holds of its networks."""

    weights: Mapping[str, Tensor]  # by their names in checkpoints
    scale: float = 1.0  # of the adapters: alpha / rank
    token_ranks: tuple[int, ...] = ()  # by handle, of adapters that act at the handles' own tokens
    count: int | None = None  # of the tensors that were written; earlier versions did not say it


def save_tuned(tuned: Tuned, run: Path, dtype: torch.dtype) -> None:
    """Write the trained weights of a small run, but for the handles, which have a file of their own.

    RunError, before anything is written, for weights that are not finite in `dtype`.
    """
    tensors = {_public(name): tensor.to(dtype) for name, tensor in tuned.weights.items() if name not in ROWS}
    if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise RunError(
            f"the weights cannot be saved in {name_of(dtype)}, {len(broken)} tensors are beyond its range or not "
            f"finite ({broken[0]}): use --save_precision fp32 or bf16"
        )
    texts = {"token_ranks": json.dumps(tuned.token_ranks)} if tuned.token_ranks else {}
    texts |= {"bas": TUNED_FORMAT, "scale": repr(tuned.scale), "tensors": str(len(tensors))}
    write_tensors(run / TUNED, tensors, texts)


def _public(name: str) -> str:
    """Return a weight's name as in files: every version of transformers writes `text_model.` there."""
    component, _, rest = name.partition(".")
    return f"{component}.{TEXT_PREFIX}{rest.removeprefix(TEXT_PREFIX)}" if component in TEXT_ENCODERS else name


def read_small_run(run: Path, prediction_type: str | None, base: Path | None = None) -> Parts:
    """Read a small run as the parts of a whole model. InputError if its base is not here or its files do not fit.

    base: where that is, if it was moved.
    """
    concepts, metadata = read_concepts(run)
    parts = with_tuned(read_base(run, metadata, base, prediction_type), read_tuned(run), run, metadata)
    return with_handles(parts, run, metadata, handle_rows(concepts))


def read_base(
    run: Path, metadata: dict[str, Any], base: Path | None = None, prediction_type: str | None = None
) -> Parts:
    """Read the base of a small run. metadata: of the run; base: where it is, if it was moved.

    Raises InputError if it is not here.
    """
    additions = Additions.of_base(metadata["config"], run)
    place, own = find_base(run, metadata, additions, base), metadata["config"]["prediction_type"]
    parts = read_parts(place, prediction_type or own)
    return with_additions(parts, additions) if additions else parts


def with_handles(parts: Parts, run: Path, metadata: dict[str, Any], rows: Sequence[Tensor]) -> Parts:
    """Add the handles of a small run to its base. rows: (N, d) for each text encoder.

    InputError for rows of another number or width.
    """
    handles, texts = tuple(metadata["handles"]), parts.spec.text_encoders
    check_rows(run, rows, len(handles), parts.spec)
    from transformers import AddedToken

    check_handles(parts.spec.tokenizer, handles)
    parts.spec.tokenizer.add_tokens([AddedToken(handle, normalized=False) for handle in handles])
    spec = replace(parts.spec, source=run)
    if resolution := metadata["config"]["resolution"]:
        spec = replace(spec, unet=replace(spec.unet, sample_size=resolution // spec.vae.factor))
    return replace(parts, spec=spec).with_rows(dict(zip(texts, rows, strict=True)), handles)


def check_rows(run: Path, rows: Sequence[Tensor], count: int, base: ModelSpec) -> None:
    """Raise InputError unless a run has one row for each of its handles, of the width of each text encoder."""
    wanted = [(count, config["hidden_size"]) for config in base.text_encoders.values()]
    for each in rows:
        check_type(run / CONCEPTS, "the rows of its handles", each)
    if (found := [tuple(each.shape) for each in rows]) != wanted:
        raise InputError(f"{run} has rows of the shapes {found} for its handles, not {wanted}: {ADVICE}")


def read_tuned(run: Path) -> Tuned:
    """Read a run's trained weights. InputError for a file of another kind."""
    path = run / TUNED
    weights, texts = read_tensors(path)
    try:
        scale, ranks = float(texts["scale"]), json.loads(texts.get("token_ranks", "[]"))
        count = int(texts["tensors"]) if "tensors" in texts else None
        check_shape(ranks, [int])
        if texts["bas"] != TUNED_FORMAT or not math.isfinite(scale) or min(ranks, default=0) < 0:
            raise ValueError
    except (KeyError, ValueError, RecursionError):
        raise InputError(f"{path} was not written by bas, or by a later version: {ADVICE}") from None
    return Tuned(weights, scale, tuple(ranks), count)


def check_type(path: Path, name: str, tensor: Tensor) -> None:
    """Raise InputError for numbers of a type that no weights have."""
    if tensor.dtype not in WEIGHT_TYPES.values():
        raise InputError(f"{path}: {name} is {name_of(tensor.dtype)}, not fp16, bf16 or fp32: {ADVICE}")


def check_kind(path: Path, tuned: Tuned, metadata: Mapping[str, Any]) -> None:
    """Raise InputError unless a run's trained weights are complete, and of the kind that its settings say.

    The file of another run may lie in the folder, or another program may have written a part of it.
    """
    if tuned.count not in (None, len(tuned.weights)):
        raise InputError(
            f"{path} holds {len(tuned.weights)} of the {tuned.count} tensors that it was written with: {ADVICE}"
        )
    name, adapters = metadata["config"]["train"], sum(map(is_adapter, tuned.weights))
    kind, handles = KINDS.get(name), len(metadata["handles"])
    if kind is None or kind.whole:
        raise InputError(f"{path} lies in a run that was trained with --train {name}, which keeps none: {ADVICE}")
    if tuned.weights and adapters != (len(tuned.weights) if kind.reads else 0):
        others = "adapters" if adapters else "whole weights"
        raise InputError(f"{path} holds {others}, but the run was trained with --train {name}: {ADVICE}")
    if tuned.weights and len(tuned.token_ranks) != (handles if kind.own_tokens else 0):
        raise InputError(
            f"{path} has adapters for {len(tuned.token_ranks)} handles' own tokens, but the run was trained with "
            f"--train {name} and has {handles} handles: {ADVICE}"
        )


def with_tuned(parts: Parts, tuned: Tuned, run: Path, metadata: Mapping[str, Any]) -> Parts:
    """Put a run's trained weights into the parts of its base. metadata: of the run

    InputError for a tensor that has no place there, and for weights that are not those of the run.
    """
    path = run / TUNED
    tensors = {component: dict(weights) for component, weights in parts.tensors.items()}
    changes: dict[str, dict[str, list[Change | Difference]]] = {
        component: {name: [*each] for name, each in parts.changes.get(component, {}).items()} for component in tensors
    }
    for name, tensor in tuned.weights.items():
        component, _, key = name.partition(".")
        key = key.removeprefix(TEXT_PREFIX)
        layer, _, kind = key.removesuffix(".weight").rpartition(".")
        weight = f"{layer}.weight" if is_adapter(key) else key
        place = tensors.get(component, {}).get(weight)
        if place is None:
            raise InputError(f"{path} holds {name}, for which its base has no place: {ADVICE}")
        check_type(path, name, tensor)
        if not is_adapter(key):
            if tensor.shape != place.shape:
                raise InputError(f"{path}: {name} is {list(tensor.shape)}, the base has {list(place.shape)}: {ADVICE}")
            tensors[component][weight] = tensor
            changes[component].pop(weight, None)  # of the base, which this weight was trained with
        elif kind == "lora_A":
            up = tuned.weights.get(name.replace(".lora_A.", ".lora_B."))
            if up is None or not fits(tensor, up, place):
                raise InputError(f"{path}: {name} has no fitting lora_B beside it: {ADVICE}")
            if tuned.token_ranks:
                tensors[component] |= {key: tensor, f"{layer}.lora_B.weight": tuned.scale * up.float()}
            else:
                changes[component].setdefault(weight, []).append(Change(tensor, up, tuned.scale))
        elif name.replace(".lora_B.", ".lora_A.") not in tuned.weights:
            raise InputError(f"{path}: {name} has no lora_A beside it: {ADVICE}")
    check_kind(path, tuned, metadata)
    begin = parts.spec.text_encoder["vocab_size"]  # the run's handles follow
    adapted = tuple(enumerate(tuned.token_ranks, start=begin))
    return replace(parts, spec=replace(parts.spec, adapted_tokens=adapted), tensors=tensors, changes=dict(changes))


def changes_of(base: Parts, run: Parts) -> dict[str, dict[str, Change | Difference]]:
    """Return what a small run changes in its base, by component and layer. run: the base's parts `with_tuned`

    Adapters at single tokens are among it, though they change no weight for other tokens.
    """
    found: dict[str, dict[str, Change | Difference]] = {name: {} for name in ("unet", *base.spec.text_encoders)}
    for component, layers in found.items():
        before = base.changes.get(component, {})
        for name, each in run.changes.get(component, {}).items():
            for change in each[len(before.get(name, ())) :]:  # behind those of the base
                layers[name.removesuffix(".weight")] = change
        for name, weight in run.tensors[component].items():
            first, layer = base.tensors[component].get(name), name.removesuffix(".weight")
            if first is None and (layer := layer.removesuffix(".lora_A")) != name.removesuffix(".weight"):
                layers[layer] = Change(weight, run.tensors[component][f"{layer}.lora_B.weight"], 1.0)
            elif first is not None and weight is not first:
                layers[layer] = Difference(weight.float() - changed(first, before.get(name, ())).float())
    return found


def fits(down: Tensor, up: Tensor, weight: Tensor) -> bool:
    """Return whether an adapter's two matrices multiply to the shape of a weight."""
    if down.ndim < 2 or up.ndim < 2 or not len(down) or up.shape[1] != len(down) or up[0].numel() != len(down):
        return False
    return is_change_of((len(up), *down.shape[1:]), weight)


def base_of(run: Path, base: Path | None = None) -> Path:
    """Return where the base of a small run is. base: where, if it was moved. InputError if it is not here."""
    _, metadata = read_concepts(run)
    return find_base(run, metadata, Additions.of_base(metadata["config"], run), base)


def small_bases(run: Path, base: Path | None = None) -> list[Path]:
    """Return the small runs that a small run was trained on top of, the nearest first. Raises as `base_of`."""
    place = base_of(run, base)
    return [place, *small_bases(place)] if (place / TUNED).is_file() else []


def find_base(run: Path, metadata: dict[str, Any], additions: Additions | None, base: Path | None) -> Path:
    """Find the base of a small run by the name that it was trained with, else by its hash among the known models.

    base: where it is, if it was moved. Raises InputError that says what to fetch.
    """
    name, wanted = metadata["config"]["pretrained_model_name_or_path"], metadata["base"]
    if base is not None:
        if (found := base_hash(base, additions)) != wanted:
            raise InputError(f"--base {base} has the hash {found[:16]}, {run} was trained on one with {wanted[:16]}")
        return base
    others = [known for known in manifest() if known != name and not is_known_elsewhere(known)]
    for candidate in (name, *others):
        try:
            place = find(candidate)
            if base_hash(place, additions) == wanted:
                return place
        except InputError:
            continue
    fetch, back = f"bas download {name}", f"put it back as {name or SHIPPED}, or say where it is with --base"
    advice = fetch if is_known_elsewhere(name) else back
    raise InputError(f"{run} keeps no base model, and the one with the hash {wanted[:16]} is not here: {advice}")
