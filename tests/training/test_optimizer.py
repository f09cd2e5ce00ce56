"""The optimizers' settings, the courses of the learning rate, and what is said without the extra for 8-bit moments."""

import sys
from contextlib import nullcontext

import pytest
import torch

from bas.config import TrainConfig
from bas.presets import Phase
from bas.training.dry_run import dry_run
from bas.training.loop import learning_rate
from bas.training.optimizer import build_optimizer
from bas.training.setup import check_input, check_machine
from tests.helpers.tiny import refused


def test_without_the_extra_8_bit_moments_are_refused_in_one_line(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with refused("--optimizer adamw8bit is an extra: pip install bitsandbytes"):
        check_input(bench.config(tmp_path / "run", optimizer="adamw8bit"))


def test_a_dry_run_counts_without_the_extra_and_says_what_to_install(bench, tmp_path, monkeypatch):
    """A machine that plans for another one need not have its packages, as it need not have the base model."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    plain, small = (dry_run(bench.config(tmp_path / "run", optimizer=name)) for name in ("adamw", "adamw8bit"))
    assert small["missing"] == "--optimizer adamw8bit is an extra: pip install bitsandbytes"
    assert plain["missing"] is None
    assert small["memory"]["phase2"] != plain["memory"]["phase2"]


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


@pytest.mark.parametrize(
    ("preset", "kind", "group"),
    [
        ("official", torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}),
        ("paper", torch.optim.Adam, {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 1e-8}),
    ],
)
def test_presets_choose_the_optimizer(preset, kind, group):
    config = TrainConfig.resolve({"preset": preset})
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2))], config)
    assert type(optimizer) is kind
    assert {name: optimizer.param_groups[0][name] for name in group} == group
    assert config.with_prior_preservation == (preset == "official")


COURSES = TrainConfig.__dataclass_fields__["lr_scheduler"].metadata["choices"]


@pytest.mark.parametrize(
    ("kind", "warmup"), [(kind, n) for kind in COURSES for n in (0, 3) if (kind, n) != ("constant", 3)]
)
def test_learning_rate_follows_diffusers(kind, warmup):
    optimization = pytest.importorskip("diffusers.optimization", reason="diffusers is not installed")
    config = TrainConfig(lr_scheduler=kind, lr_warmup_steps=warmup, lr_num_cycles=3, lr_power=2.0)
    phase = Phase("phase", 10, 2e-6, ("handles",), False)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=phase.lr)
    cycles = {"num_cycles": 3} if kind == "cosine_with_restarts" else {}
    schedule = optimization.get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=10, power=2.0, **cycles
    )
    for step in range(10):
        assert learning_rate(config, phase, step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("rate", "ends"), [(1e-7, False), (0.0, False), (1.1e-7, True)])
def test_a_polynomial_course_never_rises(bench, rate, ends):
    """It ends at 1e-7, so it begins above; diffusers refuses the same."""
    config = bench.config(lr_scheduler="polynomial", learning_rate=rate)
    message = f"--lr_scheduler polynomial ends at 1e-07, and phase2 begins at {rate:g}"
    with nullcontext() if ends else refused(message):
        check_machine(config)


def test_an_epsilon_of_zero_is_refused():
    """A row without a gradient would be divided by it: 0 / 0, found after the training."""
    with refused("--adam_epsilon is 0.0: expected a finite number, more than 0"):
        TrainConfig(adam_epsilon=0.0)
