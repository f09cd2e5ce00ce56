"""What `auto` resolves to on each kind of machine."""

import pytest
import torch
from torch import nn

from bas import machine
from bas.machine import CPU_BF16_WEIGHTS, pick_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def network(weights: int) -> nn.Module:
    """One with so many weights, none of them real."""
    return nn.Linear(weights, 1, bias=False, device="meta")


@pytest.mark.parametrize(
    ("has", "weights", "expected"),
    [
        ({"avx512_bf16": True}, CPU_BF16_WEIGHTS, "bf16"),
        ({"amx_bf16": True}, CPU_BF16_WEIGHTS, "bf16"),
        ({"avx512_bf16": True}, CPU_BF16_WEIGHTS - 1, "no"),
        ({"avx512_f": True}, CPU_BF16_WEIGHTS, "no"),
        ({}, CPU_BF16_WEIGHTS, "no"),
    ],
)
def test_auto_on_a_cpu_is_bf16_for_large_models_where_the_processor_has_it(monkeypatch, has, weights, expected):
    monkeypatch.setattr(machine.torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert pick_precision("auto", CPU, network(weights)) == expected
    assert pick_precision("auto", CPU) == "no"


def test_an_older_pytorch_does_not_tell(monkeypatch):
    monkeypatch.delattr(machine.torch.cpu, "get_capabilities", raising=False)
    assert pick_precision("auto", CPU, network(CPU_BF16_WEIGHTS)) == "no"


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu(monkeypatch, has, expected):
    monkeypatch.setattr(machine.torch.cuda, "is_bf16_supported", lambda: has)
    assert pick_precision("auto", GPU, network(1)) == expected


def test_what_is_asked_for_is_taken():
    assert [pick_precision(name, CPU, network(1)) for name in ("no", "fp16", "bf16")] == ["no", "fp16", "bf16"]
