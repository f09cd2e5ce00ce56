"""The settings of a training as a form, made of the rows of `TrainConfig`; what it would take; and its command."""

import os
import re
import shlex
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import Field
from pathlib import Path
from typing import Any

import torch

from bas.config import GROUPS, SampleConfig, TrainConfig, flag_of, setting_rows, value_type
from bas.data.batches import check_scene
from bas.data.mask_report import SceneView, view_scene, warnings
from bas.data.scene_folder import load_scene
from bas.errors import InputError
from bas.presets import CARDS, CARDS_XL
from bas.pretrained.hub import download_bytes, find_spec, is_known_elsewhere, is_sdxl, manifest, train_config
from bas.runtime.device import pick_device
from bas.training.dry_run import TOO_LITTLE, dry_run
from bas.training.setup import check_extras
from bas.training.unused_settings import without_effect
from bas.web.studio.hearing import hearing
from bas.web.studio.measured import measured
from bas.web.studio.refusal import Refusal
from bas.web.studio.scenes import open_scene
from bas.web.studio.store import RUNS, SCENES, Home

FIRST = ("card", "phase1_train_steps", "phase2_train_steps", "seed", "close_ups", "background_handle", "img_log_steps")
# Paths and what the rest of the page says: a request names no file.
NOT_ASKED = {
    *("instance_data_dir", "output_dir", "pretrained_model_name_or_path", "lora", "embedding", "class_data_dir"),
    *("resume_from_checkpoint", "num_of_assets", "initializer_tokens", "placeholder_token", "handles"),
}
SAMPLING = (
    *("num_images", "seed", "num_inference_steps", "guidance_scale", "sampler", "negative_prompt", "separate"),
    *("guidance_rescale", "eta", "steps_offset", "batch_size", "height", "width"),
)
LAYERS = ("preset", "card", "method", "train", "optimizer", "device")  # settings that bring others with them
SOLD_AS = 0.98e9  # bytes for each GB in the name of a card, which keeps a part for itself
# What the command's lines advise, as one does it on the page.
SAID = (
    ("name one in scene.json", 'write it under "It is a"'),
    ("raise --resolution", "raise Resolution in Train"),
)
counting = threading.Lock()  # one dry run at a time: each takes a core


def bases() -> list[dict[str, Any]]:
    """List the known base models: whether each is on this machine, its licence, and about how many bytes it has."""
    return [
        {
            "name": name,
            "title": row["title"],
            "license": row["license"],
            "here": not is_known_elsewhere(name),
            "bytes": download_bytes(name),
        }
        for name, row in manifest().items()
    ]


def base_of(body: dict) -> str | None:
    """Return the base model that a request names, None for the miniature. Refusal for one that is not known."""
    name = body.get("base") or "mini"
    if name not in manifest():
        raise Refusal(422, "this base model is not known", "base", "base")
    return None if name == "mini" else name


def fields(base: str | None, chosen: dict[str, str]) -> list[dict[str, Any]]:
    """List the settings of the form, each with the default that suits the base and what was chosen of LAYERS."""
    config = resolved(base, chosen)
    rows = [row for name, row in setting_rows(TrainConfig).items() if name not in NOT_ASKED]
    rows.sort(key=lambda row: (FIRST.index(row.name) if row.name in FIRST else 99, GROUPS.index(row.metadata["group"])))
    others = {name: {key: value for key, value in chosen.items() if key != name} for name in chosen}
    of = {name: resolved(base, rest) for name, rest in others.items()}
    return [field(row, getattr(of.get(row.name, config), row.name)) for row in rows]


def resolved(base: str | None, settings: dict[str, Any], scene: Path | str = "scene") -> TrainConfig:
    """Return the settings of a training on a base: those given, the card that is there, and what suits them."""
    return train_config(scene, **of_base(base), **({"card": card_for(base, settings.get("device"))} | settings))


def card_for(base: str | None, device: str | None = None) -> str:
    """Return the largest preset for the memory of the GPU that is here. "any" without one, and for the miniature."""
    memory = gpu_memory(device)
    if base is None or memory is None:
        return "any"
    for card in CARDS_XL if is_sdxl(base) else CARDS:  # the largest first
        if card != "any" and memory >= SOLD_AS * int(card.removesuffix("gb")):
            with suppress(InputError):  # what it needs is not installed
                check_extras(train_config("scene", **of_base(base), card=card))
                return card
    return "any"


def gpu_memory(device: str | None = None) -> int | None:
    """Return the bytes of memory of the GPU that trains on a device, None for the processor."""
    place = pick_device(device)
    return torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else None


def sampling_fields() -> list[dict[str, Any]]:
    """Return the settings of drawing."""
    rows = setting_rows(SampleConfig)
    return [field(rows[name], rows[name].default) for name in SAMPLING]


def field(row: Field, default: Any) -> dict[str, Any]:
    """Return one setting for the page."""
    kind, several, optional = value_type(row)
    group, limits = row.metadata["group"], row.metadata["limits"]
    return {
        "name": row.name,
        "flag": flag_of(row) if kind is not bool else f"--{row.name}",
        "help": row.metadata["help"],
        "kind": "list" if several else "choice" if row.metadata["choices"] else kind.__name__,
        "choices": list(row.metadata["choices"]),
        "optional": optional,
        "default": list(default) if several else default,
        "group": group,
        "first": row.name in FIRST,
        "layer": row.name in LAYERS,
        "least": limits.get("least", limits.get("above")),
        "most": limits.get("most", limits.get("below")),
    }


def of_base(base: str | None) -> dict[str, Any]:
    """Return the setting that names a base."""
    return {} if base is None else {"weights": base}


def config_of(home: Home, body: dict) -> tuple[TrainConfig, list[str]]:
    """Return the settings of a training that a request asks for, and the words of its command.

    InputError as `train_config`, Refusal for a setting that the form does not offer.
    """
    scene = home.find(SCENES, str(body.get("scene")))
    base, settings = base_of(body), body.get("settings") or {}
    rows = setting_rows(TrainConfig)
    if not isinstance(settings, dict) or not settings.keys() <= rows.keys() - NOT_ASKED:
        raise Refusal(400, "a setting is not one of the form", "bad")
    name = body.get("run") or scene.name
    folder = home.folder / RUNS / home.free_name(RUNS, str(name))
    config = resolved(base, settings | {"output_dir": str(folder)}, scene)
    given = {key: value for key, value in settings.items() if key != "card"}
    given |= {"card": config.card} if config.card != "any" else {}
    words = ["train", str(scene), *(["--weights", base] if base else []), "--output_dir", str(folder)]
    return config, [*words, *as_flags(TrainConfig, given)]


def as_flags(kind: type, given: dict[str, Any]) -> list[str]:
    """Settings as the words of a command."""
    rows, words = setting_rows(kind), []
    for name, value in given.items():
        row = rows[name]
        if row.type is bool:
            off = next(iter(row.metadata["flag"]), f"--no_{name}")
            words.append(f"--{name}" if value else off)
        elif isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def as_command(words: Sequence[str]) -> str:
    """Return the command as one types it."""
    return shlex.join(["bas", *words])


def plan(home: Home, body: dict) -> dict[str, Any]:
    """Plan a training: what it would do and take. InputError if it cannot start. Nothing is written."""
    config, words = config_of(home, body)
    usual = train_config(config.instance_data_dir, **of_base(base_of(body)))
    with counting:
        details = dry_run(config)
    shown = ("scene", "handles", "base", "device", "steps", "time", "memory", "files", "disk")
    enough = not details["disk"].startswith(TOO_LITTLE)
    here = config.pretrained_model_name_or_path is None or not is_known_elsewhere(config.pretrained_model_name_or_path)
    found = {name: details[name] for name in shown if details.get(name)}
    warnings = [details[name] for name in ("missing", "warning") if details[name]]
    warnings += without_effect(config, usual, body.get("settings") or {})
    told = {"facts": found, "warnings": warnings, "measured": measured(home, config)}
    run = Path(config.output_dir).name
    return {**told, "enough": enough, "here": here, "run": run, "command": as_command(words)}


# --- Masks --------------------------------------------------------------------------------------------------------


def check(home: Home, body: dict) -> dict[str, Any]:
    """Check masks: what the losses see of them, and all that `bas masks` says, each line with its concept."""
    base = base_of(body)
    folder = home.find(SCENES, str(body.get("scene")))
    config = train_config(folder, **of_base(base))
    spec, concepts, refusal = find_spec(base), [], None
    painted = [concept.handle for concept in open_scene(folder).concepts if concept.mask is not None]
    with hearing() as lines:
        try:
            scene = load_scene(config)
            view = view_scene(scene, spec, config)
            concepts = seen(view)
            lines += warnings(view)
            check_scene(spec, scene, config, warn=False)
        except InputError as error:
            refusal = str(error)
    said = [(line, False) for line in lines if line != refusal] + ([(refusal, True)] if refusal else [])
    notes = [note(line.replace(f"{folder}{os.sep}", ""), bad, painted) for line, bad in said]
    return {"concepts": concepts, "notes": notes}


def note(line: str, bad: bool, handles: Sequence[str]) -> dict[str, Any]:
    """Return a line about masks with the concept that it names first, by handle or file; None for the whole scene.

    handles: of the painted concepts, in the order of their files. The page shows no files, so it says handles instead.
    """
    for said, meant in SAID:
        line = line.replace(said, meant)
    files = {int(number) for number in re.findall(r"\bmask(\d+)\.png\b", line)}
    if len(files) > 1 or max(files, default=0) >= len(handles):
        return {"handle": None, "text": line, "bad": bad}
    for number in files:
        line = line.replace(f"mask{number}.png", f"the mask of {handles[number]}")
    _, handle = min(((line.index(handle), handle) for handle in handles if handle in line), default=(0, None))
    return {"handle": handle, "text": line, "bad": bad}


def seen(view: SceneView) -> list[dict[str, Any]]:
    """Return each concept on both grids, as rows of values from 0 to 9."""
    return [
        {
            "handle": concept.handle,
            "coverage": concept.coverage,
            "vanishes": list(concept.vanishes),
            **{
                name: ["".join(str(round(float(value) * 9)) for value in row) for row in grid]
                for name, grid in (("latent", concept.latent), ("attention", concept.attention))
            },
        }
        for concept in view.concepts
    ]
