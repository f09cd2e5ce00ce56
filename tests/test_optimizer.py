"""The optimizers' settings, and what is said where 8-bit moments are not installed."""

import sys

import torch
from tiny import refused

from bas.config import TrainConfig
from bas.optimizer import build_optimizer
from bas.train import check_input


def test_without_the_extra_8_bit_moments_are_refused_in_one_line(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with refused("--optimizer adamw8bit is an extra: pip install bitsandbytes"):
        check_input(bench.config(tmp_path / "run", optimizer="adamw8bit"))


def test_the_kernels_are_fused_and_step_as_the_plain_ones_do():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    config = TrainConfig(adam_weight_decay=0.1)
    fused = build_optimizer([ours], config)
    plain = torch.optim.AdamW([theirs], 0.0, (0.9, 0.999), 1e-8, 0.1, fused=False, foreach=False)
    for step in range(3):
        for parameter, optimizer in ((ours, fused), (theirs, plain)):
            optimizer.param_groups[0]["lr"] = 0.01
            parameter.grad = torch.sin(torch.arange(7.0) + step)
            optimizer.step()
    assert fused.param_groups[0]["fused"]
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)
