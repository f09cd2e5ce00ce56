"""Models on disk: recognised by content, read strictly, saved whole.

Two layouts are read and written: diffusers' folder (here) and the original single file (single_file.py).
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bas.errors import InputError, check_bool
from bas.io.files import replacing, write_text
from bas.io.json_files import check_json_size, read_json, read_text, write_json
from bas.io.run_files import CONCEPTS, METRICS, TUNED, handle_rows, read_concepts
from bas.io.tensors import read_tensors, write_tensors
from bas.models.adapters import adapt_tokens
from bas.models.bundle import COMPONENTS, TEXT_ENCODERS, Models, ModelSpec
from bas.models.config import UNetConfig, VAEConfig
from bas.models.text import build_text_encoder, known_handles, load_tokenizer, text_config
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.presets import GUIDANCE
from bas.pretrained.component_files import STEMS, read_component
from bas.pretrained.ldm_keys import new_vae_name
from bas.pretrained.loading import (
    EMBEDDING,
    PROJECTION,
    TEXT_PREFIX,
    Parts,
    blaming,
    check_parts,
    fit_text_encoders,
    load_weights,
    unwrap_keys,
)
from bas.pretrained.own_settings import read_own_settings, read_stored, write_own_settings
from bas.pretrained.single_file import SD_STEPS_OFFSET, has_second_encoder, read_single_file
from bas.pretrained.unsupported import (
    check_channels,
    check_class,
    check_edm,
    check_kind,
    check_merges,
    check_pipeline,
    check_tokenizer_config,
)
from bas.schedulers import NoiseSchedule

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from bas.pretrained.additions import Additions

T = TypeVar("T")

FILLING = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)  # with random numbers


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction_type: str | None = None,
    additions: Additions | None = None,
    base: Path | None = None,
    own: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Models:
    """Load a diffusers folder, an original single file (.safetensors) of Stable Diffusion 1, 2 or XL, or a small run.

    `prediction_type` ("epsilon" or "v_prediction") overrides the files; `additions` are LoRA and embedding files;
    `base` says where the base of a small run is, if it was moved; `own` are precisions of single networks, by name. No
    weight stays memory-mapped, so a file that changes later changes no model. Raises InputError when anything is
    missing, unexpected or of another kind.
    """
    return load_parts(_read_with(Path(path), prediction_type, additions, base), device, dtype, own)


def load_parts(
    parts: Parts,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    own: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Models:
    """Build the networks of a model's parts, and give them their weights. Raises InputError as `load` does."""
    models, parts = _build(parts)
    source = parts.spec.source
    for component, network in models.networks.items():
        kind = parts.spec.dtype_of(component, own.get(component, dtype))
        changes = parts.changes.get(component)
        name = f"{parts.sources.get(component, source)} ({component})"
        load_weights(network, parts.tensors[component], name, device, kind, changes)
    return models


def build_on_meta(
    path: Path, prediction_type: str | None = None, additions: Additions | None = None, base: Path | None = None
) -> tuple[Models, dict[str, dict[str, Tensor]]]:
    """Build a model's networks on the meta device, with shapes but no weights, and return its tensors beside it.

    The tensors are memory-mapped: only those that are used are read. Those of a small run are without its adapters.
    """
    models, parts = _build(_read_with(path, prediction_type, additions, base))
    return models, parts.tensors


def _build(parts: Parts) -> tuple[Models, Parts]:
    """Build a model's networks on the meta device. -> the networks, and parts with the names of their weights"""
    models, tensors, changes = build_networks(parts.spec), dict(parts.tensors), dict(parts.changes)
    for component, rows in parts.rows.items():
        text = tensors[component]
        tensors[component] = text | {EMBEDDING: torch.cat([text[EMBEDDING].float(), rows])}
    for component in parts.spec.text_encoders:
        network = models.networks[component]
        tensors[component] = _with_prefix_of(network, tensors[component])
        changes[component] = _with_prefix_of(network, changes.get(component, {}))
    return models, replace(parts, tensors=tensors, changes=changes)


class _Unfilled(TorchFunctionMode):
    """Within the block no network's weights are initialised: on the meta device that has no result, and takes time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FILLING:
            return (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def build_networks(spec: ModelSpec) -> Models:
    """Build the networks of a description on the meta device."""
    with torch.device("meta"), _Unfilled():
        unet, vae, text_encoder = UNet(spec.unet), VAE(spec.vae), build_text_encoder(spec.text_encoder)
        second = build_text_encoder(spec.text_encoder_2, projection=True) if spec.text_encoder_2 else None
    own = spec.tokenizer, spec.schedule, spec.handles, spec.source, spec.guidance_scale
    models = Models(
        unet,
        vae,
        cast("CLIPTextModel", text_encoder),
        *own,
        text_encoder_2=cast("CLIPTextModelWithProjection | None", second),
        zeros_for_empty=spec.zeros_for_empty,
        training=spec.training,
    )
    if spec.adapted_tokens:
        adapt_tokens(models, dict(spec.adapted_tokens), 1.0, torch.Generator())
    return models


def _read_with(path: Path, prediction_type: str | None, additions: Additions | None, base: Path | None) -> Parts:
    """Read the parts of a model and of the files that are added to it."""
    parts = read_parts(path, prediction_type, base)
    if additions is None:
        return parts
    from bas.pretrained.additions import with_additions

    return with_additions(parts, additions)


def read_spec(
    path: Path, prediction_type: str | None = None, additions: Additions | None = None, base: Path | None = None
) -> ModelSpec:
    """Describe a model without building its networks: enough to check a request. No weight is read.

    Raises InputError as `build_on_meta` does, without importing transformers' networks.
    """
    return _read_with(path, prediction_type, additions, base).spec


def read_parts(path: Path, prediction_type: str | None, base: Path | None = None) -> Parts:
    """Take a folder, a single file or a small run apart, and check its parts alone and against each other.

    base: where the base of a small run is, if it was moved.
    """
    if (path / TUNED).is_file():
        from bas.pretrained.small_runs import read_small_run  # which reads its base by this module

        return read_small_run(path, prediction_type, base)
    if base is not None:
        raise InputError(f"--base {base}: {path} is a whole model and has no other base; leave it out")
    with blaming(path):
        folder = path.is_dir()
        parts = _read_folder(path, prediction_type) if folder else read_single_file(path, prediction_type)
    for component, config in parts.spec.text_encoders.items():
        with blaming(path / component / "config.json" if folder else path):
            text_config(config, projection=component == "text_encoder_2")
    parts = fit_text_encoders(parts)
    spec = parts.spec
    check_parts(spec)
    # A tokenizer that states no length would pad prompts to any.
    spec.tokenizer.model_max_length = int(
        min(spec.tokenizer.model_max_length, spec.text_encoder["max_position_embeddings"])
    )
    return parts


def _with_prefix_of(text_encoder: nn.Module, tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename the keys of the text encoder to those of the installed version of transformers."""
    prefixed = any(name.startswith(TEXT_PREFIX) for name in text_encoder.state_dict())
    return _with_prefix(tensors) if prefixed else dict(tensors)


def _with_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the keys of a text encoder behind TEXT_PREFIX, that of the projection beside them."""
    return {name if name == PROJECTION else TEXT_PREFIX + name: tensor for name, tensor in tensors.items()}


def holds_sdxl(path: Path) -> bool:
    """Return whether a model folder, a small run or a single file is an SDXL, by the names in it."""
    if (path / TUNED).is_file():
        return len(handle_rows(read_concepts(path)[0])) > 1
    if path.is_dir():
        return (path / "text_encoder_2").is_dir()
    return has_second_encoder(unwrap_keys(read_tensors(path)[0], str(path)))


# --- Reading a folder ---------------------------------------------------------------------------------------------


def _read_folder(folder: Path, prediction_type: str | None) -> Parts:
    """Read a diffusers folder in parts."""
    index, description = folder / "model_index.json", {}
    if index.exists():
        description = read_json(index)
        check_pipeline(description, folder)
    elif not all((folder / component).is_dir() for component in COMPONENTS):
        _raise_for_folder(folder)
    both = "XL" in description.get("_class_name", "") or (folder / "text_encoder_2").is_dir()
    components = (*COMPONENTS, "text_encoder_2") if both else COMPONENTS
    configs = {component: read_json(folder / component / "config.json") for component in components}
    for component in ("unet", "vae"):
        if (name := configs[component].get("_class_name")) is not None:
            check_class(component, name, folder)
    check_channels(configs["unet"].get("in_channels"), configs["vae"].get("latent_channels", 4), folder)
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    check_edm(schedule.get("_class_name"), configs["vae"], folder)
    if prediction_type:
        schedule["prediction_type"] = prediction_type
    with blaming(folder / "unet" / "config.json"):
        unet = UNetConfig.from_json(configs["unet"])
    with blaming(folder / "vae" / "config.json"):
        vae = VAEConfig.from_json(configs["vae"])
    with blaming(folder / "scheduler" / "scheduler_config.json"):
        noise_schedule = (as_in_sdxl if both else as_in_pipeline)(NoiseSchedule.from_json(schedule), schedule)
    tokenizer = _read_tokenizer(folder / "tokenizer")
    tensors = {component: read_component(folder / component, STEMS[component]) for component in components}
    tensors = {part: unwrap_keys(weights, f"{folder} ({part})") for part, weights in tensors.items()}
    tensors["vae"] = {new_vae_name(name): tensor for name, tensor in tensors["vae"].items()}
    own = tokenizer, noise_schedule, known_handles(tokenizer), folder
    sampling = read_own_settings(folder, "sample") or {}
    training = (read_stored(folder) or {}).get("train")
    spec = ModelSpec(unet, vae, configs["text_encoder"], *own, **sampling, training=training)
    if both:
        second = _read_tokenizer(folder / "tokenizer_2")
        if second.get_vocab() != tokenizer.get_vocab():
            raise InputError(f"{folder}: tokenizer and tokenizer_2 have other tokens: bas gives one text to both")
        zeros = check_bool("force_zeros_for_empty_prompt", description.get("force_zeros_for_empty_prompt", True))
        spec = as_sdxl(spec, configs["text_encoder_2"], cast("int", second.pad_token_id), zeros)
    return Parts(spec, tensors)


def as_sdxl(spec: ModelSpec, second: dict, padding: int, zeros_for_empty: bool) -> ModelSpec:
    """Return a model with a second text encoder, which pads by the token `padding`.

    The end of the text is the tokenizer's own: the hub's files say 2, by which transformers would pool the output of a
    handle, whose number is above the end's.
    """
    own = {"bos_token_id": spec.tokenizer.bos_token_id, "eos_token_id": spec.tokenizer.eos_token_id}
    first = spec.text_encoder | own | {"pad_token_id": spec.tokenizer.pad_token_id}
    second = second | own | {"pad_token_id": padding}
    return replace(spec, text_encoder=first, text_encoder_2=second, zeros_for_empty=zeros_for_empty)


def as_in_pipeline(schedule: NoiseSchedule, _config: dict) -> NoiseSchedule:
    """Return the schedule with a steps_offset of 1, as diffusers' StableDiffusionPipeline sets it in any case."""
    return replace(schedule, steps_offset=SD_STEPS_OFFSET)


def as_in_sdxl(schedule: NoiseSchedule, config: dict) -> NoiseSchedule:
    """Return the schedule of an SDXL: as with Euler, which most files name, it ends without noise in any case."""
    return replace(schedule, set_alpha_to_one=True) if "Euler" in config.get("_class_name", "") else schedule


def _read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer of a model folder, from that folder alone."""
    with blaming(folder):
        for path in folder.glob("*"):
            check_json_size(path)
        if (config := folder / "tokenizer_config.json").is_file():
            check_tokenizer_config(read_json(config), config)
        if (merges := folder / "merges.txt").is_file():
            read_text(merges)
        check_merges(folder)
        with without_marks(folder) as readable:
            return load_tokenizer(readable)


def _has_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(BOM_UTF8)) == BOM_UTF8


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """Yield the folder or, where files begin with a byte order mark, a copy without it: libraries reject the mark."""
    files = [path for path in folder.iterdir() if path.is_file()]
    if not any(map(_has_mark, files)):
        yield folder
        return
    with TemporaryDirectory() as place:
        for path in files:
            (Path(place) / path.name).write_bytes(path.read_bytes().removeprefix(BOM_UTF8))
        yield Path(place)


def _raise_for_folder(folder: Path) -> NoReturn:
    """Raise InputError that says what a folder is, if it is not a model."""
    files = sorted(path.name for path in folder.iterdir())
    check_kind(files, folder)
    single = [name for name in files if name.endswith(".safetensors")]
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("_class_name", "a single network")
        raise InputError(f"{folder} holds {kind}, one part of a model: give the folder of the whole model")
    if CONCEPTS in files:
        raise InputError(
            f"{folder} is a run whose weights are missing, {TUNED} or a model's folders: copy the run again"
        )
    if single:
        raise InputError(f"{folder} is not a diffusers folder: give a file in it, as {folder / single[0]}")
    if (folder / METRICS).is_file():
        raise InputError(f"{folder} is an unfinished run: train on with --resume_from_checkpoint latest")
    raise InputError(f"{folder} is not a model: it has neither model_index.json nor unet, vae and text_encoder")


# --- Writing ------------------------------------------------------------------------------------------------------


def save_model(models: Models, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the whole model as a folder that diffusers opens. Every file is whole or absent; model_index.json is last.

    Handles become rows of the token embedding and added tokens of the tokenizer. Raises RunError, before anything is
    written, for weights that are not finite in `dtype`.
    """
    folder, parts = Path(folder), Parts.of(models, dtype)
    index = MODEL_INDEX if parts.spec.text_encoder_2 is None else MODEL_INDEX_XL
    configs = {"unet": parts.spec.unet.to_json(), "vae": parts.spec.vae.to_json(), **parts.spec.text_encoders}
    for name in (*configs, "scheduler"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for component, config in configs.items():
        write_json(folder / component / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", parts.spec.schedule.to_json())
    _write_tokenizer(models.tokenizer, folder / "tokenizer")
    if parts.spec.text_encoder_2 is not None:
        padding = models.tokenizer.convert_ids_to_tokens(parts.spec.text_encoder_2["pad_token_id"])
        _write_tokenizer(models.tokenizer, folder / "tokenizer_2", {"pad_token": str(padding)})
        index = index | {"force_zeros_for_empty_prompt": models.zeros_for_empty}
    for component, tensors in parts.tensors.items():
        tensors = _with_prefix(tensors) if component in TEXT_ENCODERS else tensors
        write_tensors(folder / component / f"{STEMS[component]}.safetensors", tensors)
    own = {} if models.guidance_scale == GUIDANCE else {"guidance_scale": models.guidance_scale}
    write_own_settings(folder, {"train": models.training, "sample": own})
    write_json(folder / "model_index.json", index)


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.12.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
MODEL_INDEX_XL = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _write_tokenizer(tokenizer: CLIPTokenizer, folder: Path, changes: dict[str, str] | None = None) -> None:
    """Write the files that every version of transformers reads: vocabulary, merges, special and added tokens.

    changes: special tokens of this copy, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    special = {f"{name}_token": str(getattr(tokenizer, f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    special |= changes or {}
    added = {token: i for token, i in tokenizer.get_added_vocab().items() if token not in model["vocab"]}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.model_max_length, **special}
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    decoder = {
        str(i): {flag: getattr(tokenizer.added_tokens_decoder[i], flag) for flag in flags}
        for i in sorted(added.values())
    }
    with replacing(folder / "vocab.json") as temporary:
        temporary.write_text(json.dumps(model["vocab"]), encoding="utf-8")
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "added_tokens.json", added)
    write_json(folder / "tokenizer_config.json", config | ({"added_tokens_decoder": decoder} if decoder else {}))
    (folder / "tokenizer.json").unlink(missing_ok=True)
