"""Small runs that no training had to make: a tiny base, adapters with drawn values, and handles."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from bas.config import TrainConfig
from bas.io.json_files import write_json
from bas.io.run_files import ROWS, SETTINGS, save_concepts
from bas.models.adapters import add_adapters, token_ranks
from bas.models.bundle import is_adapter
from bas.models.text import add_handles
from bas.pretrained.folder import load, save_model
from bas.pretrained.hashes import weights_hash
from bas.pretrained.small_runs import Tuned, save_tuned
from bas.training.phase_state import trained_weights
from tests.helpers.families import tiny

LORA = {"train": "lora", "rank": 4, "alpha": 3.0, "conv_rank": 3}  # adapters of two ranks on every kind of layer


def write_base(folder: Path, family: str, whole_vocabulary: bool = False) -> Path:
    """A tiny base model of a family, whose images are small too: attention on 16x16 takes no time."""
    models = tiny(family, whole_vocabulary)
    models.unet.config = replace(models.unet.config, sample_size=16)
    save_model(models, folder)
    return folder


def write_small_run(folder: Path, base: Path, handles: tuple[str, ...] = ("<asset0>", "<asset1>"), **settings) -> Path:
    """A finished small run on a base, whose adapters change each weight by a third of its spread, or so."""
    folder.mkdir(parents=True)
    config = TrainConfig(instance_data_dir="scene", pretrained_model_name_or_path=str(base), **settings)
    models, generator = load(base), torch.Generator().manual_seed(config.seed + 7)
    add_adapters(models, config, len(handles))
    add_handles(models.text_encoders, models.tokenizer, handles, (None,) * len(handles), config.seed)
    weights = trained_weights(models, config)
    for name, p in weights.items():
        spread = 0.1 if is_adapter(name) and ".lora_B." in name else 0.0 if is_adapter(name) else 0.02
        p.data = p.data + spread * torch.randn(p.shape, generator=generator)
    facts = {"config": asdict(config), "handles": list(handles), "base": weights_hash(base), "version": "1"}
    write_json(folder / SETTINGS, facts)
    save_tuned(Tuned(weights, config.adapter_scale, token_ranks(models.unet)), folder, torch.float32)
    rows = [weights[name].detach() for name in ROWS if name in weights]
    save_concepts(folder, rows, torch.ones(len(handles), 8, 8), handles, facts)
    return folder
