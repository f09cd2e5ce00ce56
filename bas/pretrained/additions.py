"""LoRA and embedding files beside a model: `--lora FILE:0.8` changes its weights, `--embedding FILE` adds a handle.

In `bas train` they are a part of the base: its hash counts them, and a small run looks for them beside it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bas.errors import InputError, check_float
from bas.models.adapters import Change, Difference
from bas.models.text import check_handles
from bas.pretrained.embedding_files import read_embedding
from bas.pretrained.loading import Parts
from bas.pretrained.lora_files import read_lora

STRONGEST = 10.0


@dataclass(frozen=True)
class Additions:
    """Files that are added to a model while it is loaded."""

    loras: tuple[tuple[Path, float], ...] = ()  # each with its weight
    embeddings: tuple[Path, ...] = ()

    @classmethod
    def read(cls, loras: Iterable[str], embeddings: Iterable[str]) -> "Additions":
        """Read the values of --lora, `FILE` or `FILE:WEIGHT`, and of --embedding. InputError for a wrong weight."""
        return cls(tuple(map(split_weight, loras)), tuple(map(Path, embeddings)))

    @classmethod
    def of_base(cls, settings: Mapping[str, Any], run: Path | None = None) -> "Additions | None":
        """Those of a training's settings, by name; None without any.

        A file that is no more where it was is looked for in the folder `run`. InputError for one that is nowhere.
        """
        found = cls.read(settings["lora"], settings["embedding"])

        def place(path: Path) -> Path:
            inside = run / path.name if run and not path.exists() else path
            if not inside.exists():
                where = f"put it back, or into {run}" if run else "name another file"
                raise InputError(f"{path} does not exist, and the base model needs it: {where}")
            return inside

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


def with_additions(parts: Parts, additions: Additions) -> Parts:
    """Put files into the parts of a model. InputError for a file that does not fit it."""
    changes: dict[str, dict[str, list[Change | Difference]]] = {
        component: {name: list(each) for name, each in parts.changes.get(component, {}).items()}
        for component in ("unet", "text_encoder")
    }
    for path, weight in additions.loras:
        for component, layers in read_lora(path, parts, weight).items():
            for layer, change in layers.items():
                changes[component].setdefault(f"{layer}.weight", []).append(change)
    spec, rows, handles = parts.spec, [] if parts.rows is None else [parts.rows], []
    from transformers import AddedToken

    for path in additions.embeddings:
        handle, vectors = read_embedding(path, spec.text_encoder["hidden_size"])
        names = [handle, *(f"{handle}_{i}" for i in range(1, len(vectors)))]  # as diffusers names the further vectors
        check_handles(spec.tokenizer, (handle,))
        spec.tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
        rows.append(vectors)
        handles.append(handle)
    if not handles:
        return replace(parts, changes=dict(changes))
    count = spec.text_encoder["vocab_size"] + sum(map(len, rows[-len(handles) :]))
    spec = replace(spec, text_encoder=spec.text_encoder | {"vocab_size": count}, handles=(*spec.handles, *handles))
    return replace(parts, spec=spec, changes=dict(changes), rows=torch.cat(rows))
