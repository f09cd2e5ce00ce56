"""What changes a model while it is loaded: `--lora FILE:0.8`, `--embedding FILE`, `--vae FILE`, `--clip_skip 2`.

A LoRA changes its weights, an embedding adds a handle, a VAE takes the place of its own, and a clip skip leaves out the
last layers of the text encoder.

In `bas train` the first two are part of the base: its hash counts them, and a small run needs them with its base.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bas.errors import InputError, check_float, check_positive
from bas.models.adapters import Change, Difference
from bas.models.text import check_handles
from bas.pretrained.embedding_files import read_embedding
from bas.pretrained.loading import Parts, fit_text_encoders
from bas.pretrained.lora_files import lora_file, read_lora
from bas.pretrained.vae_files import with_vae

log = logging.getLogger(__name__)

STRONGEST = 10.0


@dataclass(frozen=True)
class Additions:
    """What is added to a model, or changed in it, while it is loaded."""

    loras: tuple[tuple[Path, float], ...] = ()  # each with its weight
    embeddings: tuple[Path, ...] = ()
    vae: Path | None = None
    clip_skip: int | None = None  # 1: the text encoder's last layer is read, 2: the last but one, ...

    @classmethod
    def read(
        cls, loras: Iterable[str], embeddings: Iterable[str], vae: str | None = None, clip_skip: int | None = None
    ) -> "Additions":
        """Read the values of --lora, `FILE` or `FILE:WEIGHT`, and of the other flags. InputError for a wrong weight."""
        if clip_skip is not None:
            check_positive("--clip_skip", clip_skip)
        weighed = [(lora_file(path), weight) for path, weight in map(split_weight, loras)]
        for path, times in Counter(path.resolve() for path, _ in weighed).items():
            if times > 1:
                log.warning("--lora %s is given %d times: its weights add up", path, times)
        files = tuple(weighed), tuple(map(Path, embeddings))
        return cls(*files, None if vae is None else Path(vae), clip_skip)

    @classmethod
    def of_base(cls, settings: Mapping[str, Any], run: Path | None = None) -> "Additions | None":
        """Return the additions that a training's settings name; None without any.

        A file that is no longer in its place is looked for in the folder `run`. InputError if it is not there either.
        """
        found = cls.read(settings["lora"], settings["embedding"])

        def place(path: Path) -> Path:
            inside = run / path.name if run and not path.exists() else path
            if not inside.exists():
                where = f"put it back, or into {run}" if run else "name another file"
                raise InputError(f"{path} does not exist, and the base model needs it: {where}")
            return lora_file(inside)

        loras = tuple((place(path), weight) for path, weight in found.loras)
        return cls(loras, tuple(map(place, found.embeddings))) if settings["lora"] or settings["embedding"] else None


def split_weight(text: str) -> tuple[Path, float]:
    """Split `FILE:WEIGHT`; without a weight it is 1. A file whose own name ends so is that file."""
    file, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists() or weight.endswith(".safetensors"):
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        raise InputError(f"--lora {text}: expected FILE or FILE:WEIGHT, as style.safetensors:0.8") from None
    return Path(file), check_float(f"--lora {file}: the weight", value, -STRONGEST, STRONGEST)


def with_clip_skip(parts: Parts, clip_skip: int) -> Parts:
    """Leave out the text encoder's last layers but keep its final norm, so that its layer `-clip_skip` is read.

    InputError where there are not so many, and for SDXL, which was trained with the last but one of both.
    """
    spec, layers = parts.spec, parts.spec.text_encoder["num_hidden_layers"]
    if spec.text_encoder_2 is not None:
        if clip_skip != 2:
            raise InputError(f"--clip_skip {clip_skip}: SDXL reads the last layer but one, which is 2: leave it out")
        return parts
    if clip_skip > layers:
        raise InputError(f"--clip_skip {clip_skip}: the text encoder of {spec.source} has {layers} layers")
    text = spec.text_encoder | {"num_hidden_layers": layers - clip_skip + 1}
    return fit_text_encoders(replace(parts, spec=replace(spec, text_encoder=text)))


def with_additions(parts: Parts, additions: Additions) -> Parts:
    """Put files into the parts of a model. InputError for a file that does not fit it."""
    if additions.vae is not None:
        parts = with_vae(parts, additions.vae)
    changes: dict[str, dict[str, list[Change | Difference]]] = {
        component: {name: list(each) for name, each in parts.changes.get(component, {}).items()}
        for component in parts.tensors
    }
    for path, weight in additions.loras:
        read = read_lora(path, parts, weight)
        if all(change.is_zero for layers in read.values() for change in layers.values()):
            log.warning("--lora %s changes nothing: its weight, its alpha or its matrices are 0", path)
        for component, layers in read.items():
            for layer, change in layers.items():
                changes[component].setdefault(f"{layer}.weight", []).append(change)
    parts = replace(parts, changes=dict(changes))
    if additions.clip_skip is not None:  # behind the LoRA files, which change layers that are left out too
        parts = with_clip_skip(parts, additions.clip_skip)
    from transformers import AddedToken

    for path in additions.embeddings:
        handle, rows = read_embedding(path, {n: text["hidden_size"] for n, text in parts.spec.text_encoders.items()})
        vectors = len(rows["text_encoder"])
        names = [handle, *(f"{handle}_{i}" for i in range(1, vectors))]  # as diffusers names the further vectors
        check_handles(parts.spec.tokenizer, (handle,))
        parts.spec.tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
        parts = parts.with_rows(rows, (handle,))
    return parts
