"""What SDXL takes of a card by the dry run's count, at 1024x1024: the tables of docs/hardware.md."""

from types import SimpleNamespace

import pytest
import torch

from bas.config import TrainConfig
from bas.models.adapters import add_adapters, remove_adapters
from bas.models.text import add_handles, mark_tokens
from bas.pretrained.folder import build_networks
from bas.pretrained.hub import find_spec, train_config
from bas.training.dry_run import blank_data, phase_cost, phase_memory

pytestmark = pytest.mark.slow
HANDLES = ("<asset0>", "<asset1>")
KINDS = [  # settings, millions of trained weights, GiB
    ({"train": "token", "rank": 4}, 3.6, 7.1),
    ({"train": "token"}, 14.5, 7.3),
    ({"train": "token", "rank": 64}, 58.0, 8.0),
    ({"train": "lora", "rank": 4}, 10.6, 7.2),
    ({"train": "lora"}, 42.6, 7.8),
    ({"train": "lora", "rank": 64}, 170.2, 9.9),
    ({"train": "lora", "lora_targets": "attention"}, 23.2, 7.4),
    ({"train": "lora", "train_text_encoder": True}, 56.8, 8.1),
    ({"train": "lora", "conv_rank": 16}, 49.2, 7.9),
    ({"train": "kv"}, 340.8, 12.1),
    ({"train": "v"}, 170.4, 9.6),
    ({"train": "cross_attention", "train_text_encoder": True}, 1356.3, 27.4),
    ({"train_text_encoder": True}, 3378.1, 57.5),
    ({"train": "lora", "gradient_checkpointing": False}, 42.6, 22.6),
]


@pytest.fixture(scope="module")
def sdxl():
    """SDXL with two handles on the meta device, in bf16."""
    models = build_networks(find_spec("sdxl"))
    models.tokenizer.model_max_length = 77
    add_handles(models.text_encoders, models.tokenizer, HANDLES, (None, None), 0)
    for network in (models.unet, *models.text_encoders):
        network.bfloat16()
    return models


def count(models, settings: dict) -> tuple[float, float]:
    """The millions of weights that phase 2 trains, and the GiB that it takes."""
    config = train_config("scene", weights="sdxl", mixed_precision="bf16", **settings)
    tokens = models.tokenizer
    models.tokenizer = tokens.__class__.from_pretrained(tokens.name_or_path)  # adapters of tokens come before handles
    add_adapters(models, config, len(HANDLES))
    models.tokenizer = tokens
    networks = (models.unet, *models.text_encoders)
    for network in networks:
        network.bfloat16()
    models.unet.set_gradient_checkpointing(config.gradient_checkpointing)
    data = blank_data(models, SimpleNamespace(handles=HANDLES), torch.ones(2, 1024, 1024), TrainConfig())
    weights = sum(p.nbytes for network in networks for p in network.parameters())
    cost = phase_cost(models, data, config.phases[1], config, count_operations=False)
    for network in networks:
        remove_adapters(network)
        mark_tokens(network, ())
    return cost.trained / 1e6, sum(phase_memory(weights, cost, "bf16", config, 0).values()) / 2**30


def test_small_cards_hold_what_their_settings_take(sdxl):
    """Those of 12 and 16 GB, with a tenth to spare beside a recomputed transformer of 1.7 GiB."""
    for card, gib, counted in (("12gb", 12, 7.8), ("16gb", 16, 10.2)):
        _, taken = count(sdxl, {"card": card, "gradient_checkpointing": True})
        assert taken == pytest.approx(counted, abs=0.06)
        assert taken + 1.7 < 0.9 * gib


def test_every_kind_takes_what_the_page_says(sdxl):
    for settings, millions, gib in KINDS:
        trained, taken = count(sdxl, {"gradient_checkpointing": True} | settings)
        assert trained == pytest.approx(millions, abs=0.06), settings
        assert taken == pytest.approx(gib, abs=0.06), settings
