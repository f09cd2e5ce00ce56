"""A run as files that other programs open: a LoRA or a whole model, an embedding for each handle, and a card.

NAME.safetensors         the adapters, differences of weights, or the whole model
NAME-lora.safetensors    beside differences, the nearest LoRA: diffusers reads no differences
HANDLE.safetensors       rows of the token embedding, for each handle
NAME.json    NAME.preview.png    what A1111, Forge and InvokeAI show
NAME.yaml                beside a whole SD 2 that predicts velocity: A1111 reads that there
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from bas import __version__
from bas.errors import InputError
from bas.io.files import replacing
from bas.io.json_files import write_json
from bas.io.run_files import (
    CHECKPOINTS,
    CONCEPTS,
    METRICS,
    MODEL_INDEX,
    PREVIEWS,
    SCENE,
    SETTINGS,
    TIMES,
    TUNED,
    handle_rows,
    read_concepts,
    read_rows,
    read_sessions,
    scene_names,
)
from bas.io.settings_file import CONFIG
from bas.io.tensors import read_tensors
from bas.models.bundle import COMPONENTS, TEXT_ENCODERS, ModelSpec, is_finite
from bas.models.text import handle_ids
from bas.presets import KINDS
from bas.pretrained.additions import Additions
from bas.pretrained.embedding_files import file_names, write_embedding
from bas.pretrained.folder import load, read_spec
from bas.pretrained.lora_files import Adapters, as_lora, bundled, write_lora
from bas.pretrained.own_settings import OWN_SETTINGS
from bas.pretrained.single_file import (
    architecture,
    clip_vocabulary,
    has_clip_vocabulary,
    original_config,
    save_single_file,
    without_handles,
)
from bas.pretrained.small_runs import changes_of, find_base, read_base, read_tuned, small_bases, with_tuned

# By the family of a model: its name on A1111's cards, and in kohya's metadata.
SHORT = {"Stable Diffusion 1": "SD1", "Stable Diffusion 2": "SD2", "Stable Diffusion XL": "SDXL"}
BASE_VERSIONS = {
    "Stable Diffusion 1": "sd_v1",
    "Stable Diffusion 2": "sd_v2",
    "Stable Diffusion XL": "sdxl_base_v1-0",
}
OWN_FILES = (TUNED, CONCEPTS, SETTINGS, CONFIG, METRICS, TIMES, MODEL_INDEX, OWN_SETTINGS)
OWN_FOLDERS = (*COMPONENTS, *TEXT_ENCODERS, "tokenizer", "tokenizer_2", "scheduler", SCENE, PREVIEWS, CHECKPOINTS)
HANDLE = "bas.handle"  # in the metadata of an embedding: its handle
RANK_BESIDE = 64  # of the LoRA beside differences, unless a rank is given


class Unsuited(InputError):
    """A run cannot have this form of export. reason: "whole" model, single "tokens", or own "vocabulary" """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Targets:
    """The files that an export writes."""

    main: Path
    embeddings: dict[str, Path] = field(default_factory=dict)  # by handle
    lora: Path | None = None  # beside differences
    card: Path | None = None
    preview: tuple[Path, Path] | None = None  # an image of the run, and where it goes
    yaml: Path | None = None  # the configuration in the original code

    def __iter__(self) -> Iterator[Path]:
        """Yield all of them, the embeddings first."""
        preview = self.preview[1] if self.preview else None
        each = *self.embeddings.values(), self.main, self.lora, self.card, preview, self.yaml
        yield from (path for path in each if path)


def adapters_of(run: Path, rank: int | None = None, base_place: Path | None = None) -> tuple[Adapters, ModelSpec]:
    """Return a small run's changes, and the description of its base. With `rank`, the nearest adapters of that rank.

    base_place: where the base is, if it was moved.
    """
    _, metadata = read_concepts(run)
    base = read_base(run, metadata, base_place)
    adapters = changes_of(base, with_tuned(base, read_tuned(run), run, metadata))
    return (with_rank(adapters, rank) if rank else adapters), base.spec


def with_rank(adapters: Adapters, rank: int) -> Adapters:
    """Return the nearest adapters of this rank."""
    return {part: {name: as_lora(change, rank) for name, change in layers.items()} for part, layers in adapters.items()}


def plan_export(
    model: Path,
    target: Path,
    form: str,
    prefix: str,
    rank: int | None = None,
    base: Path | None = None,
    prediction_type: str | None = None,
) -> Targets:
    """Return the files that an export writes. form: "kohya", "peft" or "single"; base: of a small run, if it was moved

    Raises Unsuited for a run that cannot have this form, InputError for two files of the same name.
    """
    kind = KINDS[read_concepts(model)[1]["config"]["train"]] if (model / TUNED).is_file() else None
    if kind is None and form != "single":
        raise Unsuited(f"{model} is a whole model without adapters: use it as it is, or --format single", "whole")
    if kind and kind.own_tokens:
        line = f"{model} was trained with --train token: other programs have no adapters of single tokens"
        raise Unsuited(f"{line}; train with --train lora for them", "tokens")
    spec = read_spec(model, prediction_type, None, base)
    if spec.handles and form == "single" and not has_clip_vocabulary(spec.tokenizer):
        line = f"{model} has a vocabulary of its own: a single file carries no tokenizer, use the folder"
        raise Unsuited(line, "vocabulary")
    handles = spec.handles if form == "single" else tuple(read_concepts(model)[1]["handles"])
    beside = form == "kohya" and rank is None and not (kind and kind.reads)
    names = file_names(handles, prefix)
    files = {handle: target.with_name(f"{name}.safetensors") for handle, name in names.items()}
    lora = target.with_name(f"{target.stem}-lora.safetensors") if beside else None
    own = {target.stem.lower(), *([lora.stem.lower()] if lora else [])}
    if same := [handle for handle, path in files.items() if path.stem.lower() in own]:
        raise InputError(f"{target} would be the file of {same[0]}, too: name another, or give a --prefix")
    velocity = SHORT[spec.family] == "SD2" and spec.schedule.prediction_type == "v_prediction"
    yaml = target.with_suffix(".yaml") if form == "single" and velocity else None
    if not (model / CONCEPTS).is_file():
        return Targets(target, files, yaml=yaml)
    images = [model / SCENE / "img.png", *sorted(model.glob(f"{PREVIEWS}/pictures/*/sample-*.png"))]
    shown = next((path for path in reversed(images) if path.is_file()), None)  # of the last step, of all concepts
    preview = (shown, target.with_suffix(".preview.png")) if shown else None
    return Targets(target, files, lora, target.with_suffix(".json"), preview, yaml)


def check_no_input(files: Targets, model: Path, base: Path | None) -> None:
    """Raise InputError for a file of an export that would replace one of the model, or of its base.

    base: of a small run, if it was moved.
    """
    read = files_of(model)
    if (model / TUNED).is_file():
        _, metadata = read_concepts(model)
        additions = Additions.of_base(metadata["config"], model)
        read |= files_of(find_base(model, metadata, additions, base))
        if additions:
            read |= {path.resolve() for path in (*additions.embeddings, *(path for path, _ in additions.loras))}
    if taken := [path for path in files if path.resolve() in read]:
        raise InputError(f"{taken[0]} is a file of the model that is exported: name another file")


def files_of(model: Path) -> set[Path]:
    """Return what a model or a run consists of, links followed. Other files in its folder are not among it."""
    inside = (path for folder in OWN_FOLDERS for path in (model / folder).rglob("*"))
    return {path.resolve() for path in (model, *(model / name for name in OWN_FILES), *inside)}


def export_lora(
    run: Path,
    files: Targets,
    form: str,
    dtype: torch.dtype,
    rank: int | None = None,
    bundle: bool = False,
    base: Path | None = None,
) -> None:
    """Write a small run's LoRA and what belongs to it. form: "kohya" or "peft". InputError if the base is not here.

    bundle: also put the embeddings into the LoRA's file, for A1111. base: where the base is, if it was moved.
    """
    concepts, metadata = read_concepts(run)
    adapters, spec = adapters_of(run, rank, base)
    words = {handle: path.stem for handle, path in files.embeddings.items()}
    rows = {handle: [each[i : i + 1] for each in handle_rows(concepts)] for i, handle in enumerate(metadata["handles"])}
    if broken := [handle for handle, each in rows.items() if not all(map(is_finite, each))]:
        raise InputError(f"{run}: the row of {broken[0]} holds values that are not finite numbers: copy the run again")
    texts = describe(run, metadata, spec, [*words.values()], files.main.stem)
    texts |= {"modelspec.architecture": f"{architecture(spec)}/lora"}
    extra = bundled({words[handle]: row for handle, row in rows.items()}) if bundle else {}
    xl = spec.unet if spec.text_encoder_2 is not None else None
    write_lora(files.main, adapters, form, dtype, texts, extra, xl)
    if files.lora:
        name = {"ss_output_name": files.lora.stem, "modelspec.title": files.lora.stem}
        write_lora(files.lora, with_rank(adapters, RANK_BESIDE), form, dtype, texts | name, xl=xl)
    write_beside(run, files, rows, spec)


def export_single(
    model: Path, files: Targets, dtype: torch.dtype, prediction_type: str | None, base: Path | None = None
) -> None:
    """Write a whole model as one file, without its handles, and what belongs to it."""
    models = load(model, prediction_type=prediction_type, base=base)
    tables = [encoder.get_input_embeddings().get_parameter("weight").detach() for encoder in models.text_encoders]
    rows = {handle: [table[handle_ids(models.tokenizer, handle)] for table in tables] for handle in models.handles}
    save_single_file(without_handles(models), files.main, dtype)
    if files.yaml:
        write_json(files.yaml, original_config(models.spec))  # JSON is YAML
    write_beside(model, files, rows, models.spec)


def write_beside(model: Path, files: Targets, rows: dict[str, list[Tensor]], spec: ModelSpec) -> None:
    """Write the embeddings, the card and the preview. rows: by handle, (n, d) for each text encoder"""
    _, metadata = read_concepts(model) if files.card else (None, {"base": "", "config": {}})
    for handle, path in files.embeddings.items():
        own = {
            HANDLE: handle,
            "bas.base_sha256": metadata["base"],
            "bas.note": f"belongs to {files.main.name}: with another text encoder it means something else",
            "modelspec.architecture": f"{architecture(spec)}/textual-inversion",
            "modelspec.title": path.stem,
        }
        write_embedding(path, rows[handle], own)
    words = ", ".join(path.stem for path in files.embeddings.values())
    if files.card:
        card = {
            "description": about(metadata),
            "sd version": SHORT[spec.family],
            "activation text": words,
            "preferred weight": 1.0,
            "negative text": "",
            "notes": f"put the embeddings of the same name beside it: {words}",
        }
        write_json(files.card, card)
    if files.preview:
        image, target = files.preview
        with replacing(target) as temporary:
            shutil.copyfile(image, temporary)


def describe(run: Path, metadata: dict, spec: ModelSpec, words: list[str], name: str) -> dict[str, str]:
    """Return the metadata of a LoRA file that other programs show. All values are texts."""
    config, velocity = metadata["config"], spec.schedule.prediction_type == "v_prediction"
    merged = [Path(each).name for each in metadata.get("merged", {}).get("runs", ())]
    steps, images = len(read_rows(run / METRICS)), sum(1 for _ in (run / SCENE).rglob("img.png")) or 1
    sd2 = SHORT[spec.family] == "SD2"
    return {
        "ss_v2": str(sd2),
        "ss_base_model_version": BASE_VERSIONS[spec.family] + "_v" * (sd2 and velocity),
        "ss_output_name": name,
        "ss_sd_model_name": Path(config["pretrained_model_name_or_path"] or "mini").name,
        "ss_clip_skip": "None",
        "ss_resolution": str(spec.resolution),
        "ss_num_train_images": str(images),
        "ss_dataset_dirs": json.dumps({"scene": {"n_repeats": 1, "img_count": images}}),
        **({"ss_steps": str(steps)} if steps else {}),  # a merged run took none
        "ss_tag_frequency": json.dumps({"scene": dict.fromkeys(words, steps or 1)}),  # A1111 never takes a word of 0
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.description": about(metadata),
        "modelspec.resolution": f"{spec.resolution}x{spec.resolution}",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "modelspec.trigger_phrase": ", ".join(words),
        "bas": f"lora-1 {__version__}",
        "bas.handles": json.dumps(metadata["handles"]),
        **({"modelspec.merged_from": ", ".join(merged)} if merged else {}),
        "bas.base_sha256": metadata["base"],
        **when_trained(run),
    }


def about(metadata: dict) -> str:
    """Return what a run holds, in words."""
    return f"concepts of {' and '.join(scene_names(metadata))}, learnt by bas"


def when_trained(run: Path) -> dict[str, str]:
    """When a run's training began, as kohya's scripts and ModelSpec write it; nothing where no session says it."""
    try:
        started = datetime.fromisoformat(read_sessions(run)[0]["started"])
    except (IndexError, ValueError):
        return {}
    return {"ss_training_started_at": str(started.timestamp()), "modelspec.date": started.isoformat()}


# --- What lies there --------------------------------------------------------------------------------------------------


def read_export(folder: Path) -> Targets | None:
    """Find the model and the embeddings of an export in a folder, by what its files say. None without both.

    InputError for a damaged file.
    """
    embeddings, models = {}, []
    for path in sorted(folder.glob("*.safetensors")):
        handle = read_tensors(path)[1].get(HANDLE)
        if handle is None:
            models.append(path)
        else:
            embeddings[handle] = path
    if not embeddings or not models:
        return None
    main = min(models, key=lambda path: len(path.stem))  # beside differences lies NAME-lora
    lora = main.with_name(f"{main.stem}-lora.safetensors")
    return Targets(main, embeddings, lora if lora in models else None)


# What to type in each program: {name} is the main file's, {word} an embedding's, {handle} the handle.
USES = {
    "kohya": (
        "ComfyUI: LoraLoader {name}; a photo of embedding:{word}",
        "A1111, Forge: a photo of {word} <lora:{name}:1>",
        "InvokeAI: LoRA {name}; a photo of <{word}>",
    ),
    "single": (
        "ComfyUI: CheckpointLoaderSimple {name}; a photo of embedding:{word}",
        "A1111, Forge: checkpoint {name}; a photo of {word}",
        "InvokeAI: main model {name}; a photo of <{word}>",
    ),
    "peft": (),
}
DIFFUSERS = {
    "single": '{pipeline}.from_single_file("{main}")',
    "kohya": 'load_lora_weights(".", weight_name="{main}")',
    "peft": 'load_lora_weights(".", weight_name="{main}")',
}
EMBEDDINGS = 'load_textual_inversion("{word}.safetensors", token="{handle}")'
EMBEDDINGS_XL = (  # diffusers takes no file of both
    'load_textual_inversion(load_file("{word}.safetensors")["clip_l"], token="{handle}", text_encoder='
    'pipe.text_encoder, tokenizer=pipe.tokenizer), and so with "clip_g", pipe.text_encoder_2 and pipe.tokenizer_2'
)


def how_to_use(files: Targets, form: str, xl: bool) -> list[str]:
    """Return what to type in other programs for the first of the concepts. xl: whether the model is an SDXL"""
    handle, file = next(iter(files.embeddings.items()), ("a bowl", None))
    if file is None:
        return []
    names = {"name": files.main.stem, "main": (files.lora or files.main).name, "word": file.stem, "handle": handle}
    names |= {"pipeline": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"}
    last = f'diffusers: {DIFFUSERS[form]}; {EMBEDDINGS_XL if xl else EMBEDDINGS}; "a photo of {{handle}}"'
    lines = [line.format(**names) for line in (*USES[form], last)]
    words = [path.stem for path in files.embeddings.values() if f"{path.stem.lower()}</w>" in clip_vocabulary()]
    if words and USES[form]:
        lines.append(f"A1111, Forge take {' and '.join(words)} in any prompt for the concept: --prefix my- avoids it")
    return lines


def needed_too(run: Path, base: Path | None = None) -> list[str]:
    """Say what a LoRA of a small run needs beside it: what the run was trained on top of.

    base: where its base is, if it was moved. Raises as `base_of`.
    """
    lines = []
    if added := read_concepts(run)[1]["config"]["lora"]:
        lines.append(f"The run was trained on top of {', '.join(added)}: add that there too")
    if below := small_bases(run, base):
        lines.append(f"The run was trained on top of {', '.join(map(str, below))}: export that too, and add it there")
    return lines
