"""A small run as files that other programs open: a LoRA, one embedding for each handle, and a card beside them.

NAME.safetensors    the adapters        NAME.json    what A1111, Forge and InvokeAI show
HANDLE.safetensors  a row of the token embedding, for each handle
"""

import json
from pathlib import Path

import torch

from bas import __version__
from bas.errors import InputError
from bas.io.json_files import write_json
from bas.io.run_files import METRICS, TUNED, read_concepts, read_rows
from bas.models.adapters import Difference
from bas.models.bundle import ModelSpec
from bas.pretrained.embedding_files import file_names, write_embedding
from bas.pretrained.lora_files import Adapters, as_lora, write_lora
from bas.pretrained.small_runs import changes_of, read_base, read_tuned, with_tuned


def adapters_of(run: Path, rank: int | None = None, base_place: Path | None = None) -> tuple[Adapters, ModelSpec]:
    """The adapters of a small run, and the description of its base. With `rank`, differences become adapters of it.

    base_place: where the base is, if it was moved.
    """
    _, metadata = read_concepts(run)
    base = read_base(run, metadata, base_place)
    adapters = changes_of(base, with_tuned(base, read_tuned(run), run))
    if rank:
        adapters = {
            component: {n: as_lora(c, rank) if isinstance(c, Difference) else c for n, c in layers.items()}
            for component, layers in adapters.items()
        }
    return adapters, base.spec


def export_files(run: Path, target: Path, prefix: str) -> dict[str, Path]:
    """The files that an export writes: under each handle its embedding, the LoRA under "lora", its card under "card".

    InputError for a run that has no adapters of its own, and for two files of one name.
    """
    if not (run / TUNED).is_file():
        raise InputError(f"{run} is a whole model without adapters: use it as it is, or --format single")
    _, metadata = read_concepts(run)
    if read_tuned(run).token_ranks:
        raise InputError(f"{run} was trained with --train token, and other programs have no adapters of single tokens")
    names = file_names(tuple(metadata["handles"]), prefix)
    files = {handle: target.with_name(f"{name}.safetensors") for handle, name in names.items()}
    if same := [handle for handle, path in files.items() if path.stem.lower() == target.stem.lower()]:
        raise InputError(f"{target} would be the file of {same[0]}, too: name another, or give a --prefix")
    return {**files, "lora": target, "card": target.with_suffix(".json")}


def export(run: Path, files: dict[str, Path], form: str, dtype: torch.dtype, rank: int | None = None) -> None:
    """Write the files of `export_files`. form: "kohya" or "peft". InputError if the base is not here."""
    concepts, metadata = read_concepts(run)
    adapters, spec = adapters_of(run, rank)
    words = {handle: files[handle].stem for handle in metadata["handles"]}
    texts = describe(run, metadata, spec, [*words.values()], files["lora"].stem)
    write_lora(files["lora"], adapters, form, dtype, texts | {"modelspec.architecture": f"{family(spec)}/lora"})
    for handle, row in zip(metadata["handles"], concepts["handles"], strict=True):
        own = {
            "bas.handle": handle,
            "bas.base_sha256": metadata["base"],
            "modelspec.architecture": f"{family(spec)}/textual-inversion",
            "modelspec.title": words[handle],
        }
        write_embedding(files[handle], row[None], own)
    card = {
        "description": f"concepts of {Path(metadata['config']['instance_data_dir']).name}, learnt by bas",
        "sd version": "SD2" if is_sd2(spec) else "SD1",
        "activation text": ", ".join(words.values()),
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "put the embeddings of the same name beside it: " + ", ".join(words.values()),
    }
    write_json(files["card"], card)


def is_sd2(spec: ModelSpec) -> bool:
    """Whether a model is of the family of Stable Diffusion 2, whose text encoder is open_clip's."""
    return spec.text_encoder["hidden_act"] == "gelu"


def family(spec: ModelSpec) -> str:
    """The architecture as the ModelSpec convention names it."""
    if not is_sd2(spec):
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if spec.schedule.prediction_type == "v_prediction" else "stable-diffusion-v2-512"


def describe(run: Path, metadata: dict, spec: ModelSpec, words: list[str], name: str) -> dict[str, str]:
    """The metadata of a LoRA file that other programs show. All values are texts."""
    config, velocity = metadata["config"], spec.schedule.prediction_type == "v_prediction"
    steps = len(read_rows(run / METRICS))
    return {
        "ss_v2": str(is_sd2(spec)),
        "ss_base_model_version": ("sd_v2_v" if velocity else "sd_v2") if is_sd2(spec) else "sd_v1",
        "ss_output_name": name,
        "ss_sd_model_name": Path(config["pretrained_model_name_or_path"] or "mini").name,
        "ss_clip_skip": "None",
        "ss_resolution": str(spec.resolution),
        "ss_num_train_images": "1",
        "ss_steps": str(steps),
        "ss_tag_frequency": json.dumps({"scene": dict.fromkeys(words, steps)}),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "modelspec.trigger_phrase": ", ".join(words),
        "bas": f"lora-1 {__version__}",
        "bas.handles": json.dumps(metadata["handles"]),
        "bas.base_sha256": metadata["base"],
    }
