"""The form of a training: the card that is here is chosen, and what was chosen is what the command says."""

import sys
from types import SimpleNamespace

import pytest
import torch

from bas.web.studio import forms


@pytest.fixture
def gpu(monkeypatch):
    """Give the machine a GPU with so many bytes."""

    def give(memory, eight_bit=True):
        monkeypatch.setattr(forms, "pick_device", lambda name: torch.device(name or "cuda"))
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
        for name in ("bitsandbytes", "bitsandbytes.optim"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(AdamW8bit=None) if eight_bit else None)

    return give


@pytest.mark.parametrize(
    ("base", "memory", "eight_bit", "card"),
    [
        ("sd21", 12_622_168_064, True, "12gb"),  # as PyTorch counts an RTX 3060
        ("sd21", 15_843_721_216, True, "16gb"),  # T4
        ("sd21", 15_843_721_216, False, "12gb"),  # without what 16gb needs
        ("sd21", 11_720_130_560, True, "8gb"),  # GTX 1080 Ti, of 11 GB
        ("sd21", 84_987_740_160, True, "80gb"),
        ("sd15", 4 * 2**30, True, "any"),
        ("sdxl", 25_438_126_080, True, "24gb"),
        ("sdxl", 8_361_345_024, True, "any"),  # none is so small there
        (None, 12_622_168_064, True, "any"),  # the presets do not speak of the miniature
    ],
)
def test_the_card_that_is_here_is_chosen(gpu, base, memory, eight_bit, card):
    gpu(memory, eight_bit)
    assert forms.card_for(base) == card
    assert forms.card_for(base, "cpu") == "any"


def settings_of(studio, query):
    """The defaults of the form of a training."""
    return {row["name"]: row["default"] for row in studio.get(f"api/settings?{query}")["train"]}


def test_the_command_says_what_the_form_shows(studio, gpu):
    """The card and what it brings, unless something else is chosen; also a value that is the default without it."""
    (studio.home.folder / "scenes" / "toy").mkdir()
    assert studio.get("api/settings?base=sd21")["memory"] is None
    gpu(12_622_168_064)
    assert studio.get("api/settings?base=sd21")["memory"] == 12_622_168_064
    shown = settings_of(studio, "base=sd21")
    assert (shown["card"], shown["train"], shown["gradient_checkpointing"]) == ("12gb", "cross_attention", True)
    shown = settings_of(studio, "base=sd21&card=any&train=lora")
    assert (shown["card"], shown["train"], shown["gradient_checkpointing"]) == ("12gb", "full", False)
    assert shown["learning_rate"] == 1e-4
    for settings, more in (
        ({}, ["--card=12gb"]),
        ({"card": "any"}, []),
        ({"gradient_checkpointing": False}, ["--no_gradient_checkpointing", "--card=12gb"]),
        ({"card": "any", "train": "lora", "learning_rate": 2e-6}, ["--train=lora", "--learning_rate=2e-06"]),
    ):
        config, words = forms.config_of(studio.home, {"scene": "toy", "base": "sd21", "settings": settings})
        assert words[6:] == more
        assert {name: getattr(config, name) for name in settings} == settings
