"""Merge several small runs into one: their changes are joined, and their handles stand side by side.

    lora    A and B of all runs are joined along the rank: exactly the sum of the changes
    kv, v   Custom Diffusion's closed form (Kumari et al. 2023, section 3.3): each run's own prompts keep their keys and
            values, and other words change as little as that allows
    token   adapters of single tokens stand side by side, and change no other word
    mixed   the sum of the changes, as adapters of the rank that is asked for

The result is a small run on the same base.
"""

import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bas.errors import InputError
from bas.io.files import filling
from bas.io.json_files import write_json
from bas.io.run_files import (
    BETWEEN_SCENES,
    SCENE,
    SETTINGS,
    TUNED,
    handle_rows,
    numbered_first,
    read_concepts,
    save_concepts,
)
from bas.models.adapters import Change, Difference, changed
from bas.models.attention import CrossAttention
from bas.models.bundle import Models
from bas.models.text import LONGEST_NAME, check_name, encode_ids, handle_ids, tokenize
from bas.presets import KINDS
from bas.pretrained.additions import Additions
from bas.pretrained.folder import load_parts
from bas.pretrained.loading import Parts
from bas.pretrained.lora_files import Adapters, as_lora
from bas.pretrained.small_runs import (
    Tuned,
    changes_of,
    check_rows,
    read_base,
    read_tuned,
    save_tuned,
    with_handles,
    with_tuned,
)

log = logging.getLogger(__name__)

RENAME = re.compile(r"(.+):(<[^<>]*>)=(<[^<>]*>)")
RIDGE = 1e-6  # of the mean squared text feature, beside the captions' own
MOST_RESIDUAL = 1e-6  # of the closed form's constraints, relative; a sound one leaves 1e-9 or less
AT_ONCE = 16  # prompts that are encoded together
THINGS = (
    *("man", "woman", "child", "cat", "dog", "bird", "horse", "fish", "car", "bicycle", "house", "tree", "flower"),
    *("chair", "table", "cup", "book", "shoe", "apple", "toy"),
)
PLACES = (
    *("at the beach", "in the jungle", "in the snow", "in the street", "on a wooden floor", "in front of a city"),
    *("under water", "on a table", "in a garden", "at night"),
)
CAPTIONS = tuple(f"a photo of a {thing} {place}" for thing, place in product(THINGS, PLACES))


@dataclass(frozen=True)
class Source:
    """A run that is merged: its strength, and the names that its handles have afterwards."""

    run: Path
    weight: float
    handles: tuple[str, ...]  # as they are called in the merged run
    tuned: Tuned
    concepts: dict[str, Tensor]
    metadata: dict[str, Any]
    base: Path | None  # where the base is, if it was moved

    def read_base(self) -> Parts:
        """Read the parts of the base afresh."""
        return read_base(self.run, self.metadata, self.base)

    @property
    def kind(self) -> str:
        """What it trained, a row of KINDS."""
        return self.metadata["config"]["train"]


Method = Callable[[Parts, Sequence[Source], Sequence[Adapters]], Adapters]


# --- Reading ------------------------------------------------------------------------------------------------------


def read_sources(
    runs: Sequence[Path], weights: Sequence[float], renames: Iterable[str], base: Path | None = None
) -> list[Source]:
    """Read the runs to merge.

    renames: `RUN:<old>=<new>`, RUN as it was named or by its folder's name. base: where their base is, if it was moved.
    A handle of several runs gets the name of its run in front, as `prefixed` writes it. Raises
    InputError for a run that keeps a whole model, for runs on different bases, and for names that are wrong or remain
    equal.
    """
    read = []
    if twice := [run for run, times in Counter(run.resolve() for run in runs).items() if times > 1]:
        raise InputError(
            f"{twice[0]} is named twice: name each run once, and say with --weights how strongly it counts"
        )
    for run in runs:
        if not (run / TUNED).is_file():
            raise InputError(f"{run} is not a small run: it holds no {TUNED}; train with --train lora, kv, v or token")
        read.append(read_concepts(run))
    for run, (_, metadata) in zip(runs, read, strict=True):
        if metadata["base"] != read[0][1]["base"]:
            raise InputError(f"{run} was trained on another base than {runs[0]}: only runs on one base can be merged")
        if metadata["config"]["prediction_type"] != read[0][1]["config"]["prediction_type"]:
            raise InputError(f"{run} was trained with another --prediction_type than {runs[0]}")
    names = _renamed(runs, [metadata["handles"] for _, metadata in read], renames)
    return [
        Source(run, weight, handles, read_tuned(run), concepts, metadata, base)
        for run, weight, handles, (concepts, metadata) in zip(runs, weights, names, read, strict=True)
    ]


def _renamed(runs: Sequence[Path], handles: Sequence[Sequence[str]], renames: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the names of all runs' handles in the merged run."""
    wanted: dict[tuple[int, str], str] = {}
    for text in renames:
        parts = RENAME.fullmatch(text)
        places = [i for i, run in enumerate(runs) if parts and Path(parts[1]) in (run, Path(run.name))]
        if parts is None or len(places) != 1 or parts[2] not in handles[places[0]]:
            raise InputError(f"--rename {text}: expected RUN:<handle>=<new>, with one of the runs and a handle of it")
        check_name(parts[3])
        if (places[0], parts[2]) in wanted:
            raise InputError(f"--rename {text}: {parts[2]} of {parts[1]} is renamed twice")
        wanted[places[0], parts[2]] = parts[3]
    names = [[wanted.get((i, old), old) for old in olds] for i, olds in enumerate(handles)]
    taken = Counter(name for own in names for name in own)
    for i, own in enumerate(names):
        given = {new for (run, _), new in wanted.items() if run == i}
        own[:] = [prefixed(name, runs[i], i + 1) if taken[name] > 1 and name not in given else name for name in own]
        for name in own:
            check_name(name)
    if twice := [name for name, times in Counter(name for own in names for name in own).items() if times > 1]:
        raise InputError(f"several runs have the handle {twice[0]}: rename it with --rename RUN:<handle>=<new>")
    return [tuple(own) for own in names]


def prefixed(handle: str, run: Path, number: int) -> str:
    """Return a handle with the name of its run's folder in front: <asset0> of runs/toys is <toys-asset0>.

    Where that is too long for a handle, the beginning of the folder's name and the run's number stand in front.
    InputError if there is no room for the number.
    """
    prefix, name = re.sub(r"[^A-Za-z0-9_-]", "-", run.resolve().name), handle[1:-1]
    room, end = LONGEST_NAME - len(f"-{name}"), str(number)
    if len(prefix) > room:
        if len(end) > room:
            raise InputError(
                f"several runs have the handle {handle}, and it is too long for a prefix: rename it with "
                f"--rename {run.name}:{handle}=<new>"
            )
        prefix = prefix[: room - len(end)] + end
    return f"<{prefix}-{name}>"


# --- Joining ------------------------------------------------------------------------------------------------------


def joined(changes: Sequence[tuple[Change, float]]) -> Change:
    """Return one adapter that changes a weight by w_1 x change_1 + w_2 x change_2 + ...: A and B joined along the rank.

    Each factor is divided between A and B, so that both stay in the range of 16-bit files.
    """
    factors = [weight * change.scale for change, weight in changes]
    roots = [abs(factor) ** 0.5 for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    down = torch.cat([root * change.down.float() for root, (change, _) in zip(roots, changes, strict=True)])
    up = torch.cat([root * change.up.float() for root, (change, _) in zip(signed, changes, strict=True)], dim=1)
    return Change(down, up, 1.0)


def summed(changes: Sequence[tuple[Change | Difference, float]]) -> Difference:
    """Return the same sum as a difference of the weight."""
    return Difference(torch.stack([weight * change.delta() for change, weight in changes]).sum(0))


def closed_form(weight: Tensor, states: Tensor, targets: Tensor, values: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the weight W nearest to W0 for ordinary text that maps given token states to given outputs.

    It minimises ||(W - W0) R^T||^2 + l ||W - W0||^2 subject to T W^T = V (Kumari et al. 2023, eq. 4 and 5), where l is
    `ridge` times the mean diagonal entry of R^T R. In float64: in float32 the constraints hold, the rest does not.

    weight: W0 (o, d); states: R (n, d); targets: T (s, d); values: V (s, o) -> (o, d) in float64
    """
    weight, states, targets, values = (tensor.double() for tensor in (weight, states, targets, values))
    gram = states.T @ states
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    directions = torch.linalg.solve(gram, targets.T).T
    missing = values - targets @ weight.T
    return weight + torch.linalg.solve(directions @ targets.T, missing).T @ directions


# --- Merging ------------------------------------------------------------------------------------------------------


def merge_runs(sources: Sequence[Source], target: Path, rank: int | None, dtype: torch.dtype) -> dict[str, float]:
    """Write the small run that holds the concepts of all sources. -> by handle, the drift of its attention's output

    rank: of the adapters that are written; without it, LoRA has the sum of the ranks, and keys and values are whole.
    Raises InputError for kinds that cannot be merged without a rank.
    """
    base = sources[0].read_base()
    for name in ("resolution", "attention_grid"):
        values = [source.metadata["config"][name] for source in sources]
        if len({*values}) > 1:
            log.warning("the runs have another --%s each, %s: the merged run takes the first", name, values)
    for source in sources:
        check_rows(source.run, handle_rows(source.concepts), len(source.handles), base.spec)
    changes = [changes_of(base, with_tuned(base, source.tuned, source.run, source.metadata)) for source in sources]
    method = choose_method([source.kind for source in sources], rank)
    merged = method(base, sources, changes)
    if rank:
        merged = {part: {name: as_lora(c, rank) for name, c in layers.items()} for part, layers in merged.items()}
    weights = dict(_tensors(base, merged))
    ranks = [own for source in sources for own in source.tuned.token_ranks or (0,) * len(source.handles)]
    tuned = Tuned(weights, token_ranks=tuple(ranks) if any(ranks) else ())
    metadata = _metadata(sources, target, weights, rank)
    rows = _rows(sources)
    whole = with_handles(with_tuned(base, tuned, target, metadata), target, metadata, rows)
    drift = measure_drift(sources, whole)
    metadata["merged"] |= {"drift": drift}
    with filling(target) as folder:
        _copy_additions(sources[0], folder)
        for source, offset in zip(sources, _offsets(sources), strict=True):
            _copy_scene(source.run / SCENE, folder / SCENE, offset)
        save_tuned(tuned, folder, dtype)
        write_json(folder / SETTINGS, metadata)
        masks = _side_by_side([source.concepts["masks"] for source in sources])
        save_concepts(folder, rows, masks, metadata["handles"], metadata)
    return drift


def choose_method(kinds: Sequence[str], rank: int | None) -> Method:
    """Return how runs of these kinds are merged. InputError for kinds that cannot be merged, or not without a rank."""
    methods, named = {METHODS[kind] for kind in kinds}, ", ".join(dict.fromkeys(kinds))
    if any(KINDS[kind].own_tokens for kind in kinds) and (len({*kinds}) > 1 or rank):
        raise InputError(
            f"runs of the kinds {named}: adapters of single tokens merge only with each other, without --rank"
        )
    if len(methods) > 1 and rank is None:
        raise InputError(f"runs of the kinds {named} merge into adapters alone: give a --rank")
    return merge_sums if len(methods) > 1 else methods.pop()


def merge_loras(base: Parts, sources: Sequence[Source], changes: Sequence[Adapters]) -> Adapters:
    """Join the adapters of each layer. Those of single tokens stand side by side: each acts at its own run's tokens."""
    return {
        part: {name: joined(cast("list[tuple[Change, float]]", each)) for name, each in layers.items()}
        for part, layers in _by_layer(sources, changes).items()
    }


def merge_sums(base: Parts, sources: Sequence[Source], changes: Sequence[Adapters]) -> Adapters:
    """Add up the changes of each layer."""
    return {
        part: {name: summed(each) for name, each in layers.items()}
        for part, layers in _by_layer(sources, changes).items()
    }


def merge_keys_and_values(base: Parts, sources: Sequence[Source], changes: Sequence[Adapters]) -> Adapters:
    """Merge keys and values in closed form: each source's prompts have those of its own weights."""
    rows, first = _rows(sources), sources[0]
    names = {"handles": [name for source in sources for name in source.handles]}
    again = first.read_base()  # whose tokenizer gets the handles
    models = load_parts(with_handles(again, first.run, first.metadata | names, rows))
    states, targets = text_states(models, CAPTIONS, ()), [concept_states(models, source.handles) for source in sources]
    found: dict[str, Change | Difference] = {}
    for name in dict.fromkeys(name for each in changes for name in each["unet"]):
        weight = changed(base.tensors["unet"][f"{name}.weight"], base.changes.get("unet", {}).get(f"{name}.weight", ()))
        weight, values = weight.double(), []
        for source, own, each in zip(sources, targets, changes, strict=True):
            delta = each["unet"][name].delta().double() if name in each["unet"] else 0.0
            values.append(own @ (weight + source.weight * delta).T)
        found[name] = Difference((_constrained(weight, states, torch.cat(targets), torch.cat(values)) - weight).float())
    return {"unet": found}


def _constrained(weight: Tensor, states: Tensor, targets: Tensor, values: Tensor) -> Tensor:
    """Solve the closed form. InputError if no weight meets the constraints: handles are too alike, or too many."""
    try:
        merged = closed_form(weight, states, targets, values)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        merged = None
    if merged is None or not (targets @ merged.T - values).norm() <= MOST_RESIDUAL * values.norm():
        raise InputError(
            "the handles of these runs are too alike, or too many, for each to keep its keys and values: train one "
            "again with another --seed, or merge fewer runs"
        )
    return merged


# How the runs of one kind are merged.
METHODS: dict[str, Method] = {
    "lora": merge_loras,
    "kv": merge_keys_and_values,
    "v": merge_keys_and_values,
    "token": merge_loras,
}


def _by_layer(
    sources: Sequence[Source], changes: Sequence[Adapters]
) -> dict[str, dict[str, list[tuple[Change | Difference, float]]]]:
    """Return the changes of all sources with their weights, by component and layer."""
    found: dict[str, dict[str, list[tuple[Change | Difference, float]]]] = {part: {} for part in changes[0]}
    for source, each in zip(sources, changes, strict=True):
        for part, layers in each.items():
            for name, change in layers.items():
                found[part].setdefault(name, []).append((change, source.weight))
    return found


def _rows(sources: Sequence[Source]) -> list[Tensor]:
    """Return the rows of all sources' handles, (N, d) for each text encoder."""
    return [torch.cat(each) for each in zip(*(handle_rows(source.concepts) for source in sources), strict=True)]


def _tensors(base: Parts, merged: Adapters) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors of a small run's file: adapters, or whole weights."""
    for part, layers in merged.items():
        for name, change in layers.items():
            if isinstance(change, Change):
                yield f"{part}.{name}.lora_A.weight", change.down
                yield f"{part}.{name}.lora_B.weight", change.scale * change.up
            else:
                key = f"{name}.weight"
                before = changed(base.tensors[part][key], base.changes.get(part, {}).get(key, ()))
                yield f"{part}.{key}", before.float() + change.delta()


def _metadata(sources: Sequence[Source], target: Path, tuned: dict[str, Tensor], rank: int | None) -> dict[str, Any]:
    """Return what the merged run says of itself: the first run's settings but for what was merged."""
    first, configs = sources[0].metadata, [source.metadata["config"] for source in sources]
    adapters, kinds = any(".lora_A." in name for name in tuned), {source.kind for source in sources}
    ranks = [len(tensor) for name, tensor in tuned.items() if ".lora_A." in name]
    config = first["config"] | {
        "output_dir": str(target),
        "instance_data_dir": BETWEEN_SCENES.join(dict.fromkeys(config["instance_data_dir"] for config in configs)),
        "train": first["config"]["train"] if len(kinds) == 1 and not rank else "lora" if adapters else "kv",
        "rank": max(ranks, default=first["config"]["rank"]),
        "alpha": None,
        "phase1_train_steps": 0,
        "phase2_train_steps": 0,
    }
    merged = {"runs": [str(source.run) for source in sources], "weights": [source.weight for source in sources]}
    return {
        "config": config,
        "handles": [name for source in sources for name in source.handles],
        "base": first["base"],
        "version": first["version"],
        "merged": merged | {"rank": rank},
    }


# --- Prompts and drift --------------------------------------------------------------------------------------------


@torch.no_grad()
def text_states(models: Models, prompts: Sequence[str], handles: Sequence[str]) -> Tensor:
    """Return prompts' token states, without repeats, from the first of `handles` to the end of text: (n, d) float64.

    Without a handle in it, a prompt's states begin behind the start of text.
    """
    marks = {number for handle in handles for number in handle_ids(models.tokenizer, handle)}
    rows = []
    for i in range(0, len(prompts), AT_ONCE):
        ids = tokenize(models.tokenizer, list(prompts[i : i + AT_ONCE]))
        states = encode_ids(models.text_encoders, ids.to(models.device)).states.double().cpu()
        for line, state in zip(ids.tolist(), states, strict=True):
            end = line.index(models.tokenizer.eos_token_id)
            begin = next((place for place, number in enumerate(line) if number in marks), 1)
            rows.append(state[begin : end + 1])
    return torch.cat(rows).unique(dim=0)


def concept_states(models: Models, handles: Sequence[str]) -> Tensor:
    """Return the token states of the prompts of one run's handles, each alone and all together: (n, d) float64."""
    prompts = [text for handle in handles for text in (handle, f"a photo of {handle}")]
    return text_states(models, [*prompts, f"a photo of {' and '.join(handles)}"], handles)


def measure_drift(sources: Sequence[Source], merged: Parts) -> dict[str, float]:
    """Measure how far each concept's attention output moves from that in its own run: the mean relative change.

    Compared is the output of every cross-attention layer for "a photo of <handle>", on noise half way through.
    """
    own: dict[str, list[Tensor]] = {}
    for source in sources:
        parts = with_tuned(source.read_base(), source.tuned, source.run, source.metadata)
        models = load_parts(with_handles(parts, source.run, source.metadata, handle_rows(source.concepts)))
        for old, new in zip(source.metadata["handles"], source.handles, strict=True):
            own[new] = attention_outputs(models, old, merged.spec.unet.sample_size)
    models = load_parts(merged)
    found = {}
    for handle, before in own.items():
        pairs = zip(attention_outputs(models, handle, merged.spec.unet.sample_size), before, strict=True)
        changes = [float((after - output).norm() / output.norm()) for after, output in pairs]
        found[handle] = sum(changes) / len(changes)
    return found


@torch.no_grad()
def attention_outputs(models: Models, handle: str, side: int) -> list[Tensor]:
    """Return the output of each cross-attention layer for a photo of one concept, layer by layer.

    side: of the latents, in cells.
    """
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
        for layer in models.unet.modules()
        if isinstance(layer, CrossAttention)
    ]
    noise = torch.randn(1, models.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    context = encode_ids(models.text_encoders, tokenize(models.tokenizer, [f"a photo of {handle}"]))
    models.unet(noise, models.schedule.num_train_timesteps // 2, context.states, pooled=context.pooled)
    for hook in hooks:
        hook.remove()
    return found


# --- Files --------------------------------------------------------------------------------------------------------


def _copy_additions(source: Source, folder: Path) -> None:
    """Copy what the base was changed by, and lies in the run alone: the merged run is opened with it too."""
    added = Additions.of_base(source.metadata["config"], source.run)
    for path in () if added is None else (*(lora for lora, _ in added.loras), *added.embeddings):
        if path.resolve().parent == source.run.resolve():
            shutil.copy(path, folder)


# --- Scenes -------------------------------------------------------------------------------------------------------


def _offsets(sources: Sequence[Source]) -> list[int]:
    """Return how many handles stand before those of each source."""
    sizes = [len(source.handles) for source in sources]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _copy_scene(scene: Path, target: Path, offset: int) -> None:
    """Copy a run's images and masks: into the scene itself for the first run, as further images for the others."""
    for image in (*scene.glob("img.png"), *sorted(scene.glob("*/img.png"), key=numbered_first)):
        number = next(i for i in count() if not (target / (str(i) if i else "") / "img.png").exists())
        folder = target / str(number) if number else target
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / "img.png")
        for mask in image.parent.glob("mask*.png"):
            place = int(mask.stem.removeprefix("mask")) + offset
            shutil.copy(mask, folder / f"mask{place}.png")


def _side_by_side(masks: Sequence[Tensor]) -> Tensor:
    """Return the masks of all runs in one tensor, 0..1, smaller ones padded on the right and below: (N, H, W)"""
    h, w = (max(each.shape[side] for each in masks) for side in (1, 2))
    return torch.cat([F.pad(each / 255, (0, w - each.shape[2], 0, h - each.shape[1])) for each in masks])
