"""What a CUDA graph of a step relies on: fixed buffers, constant shapes, no randomness; the replay itself on a GPU."""

import random
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch

from bas.config import TrainConfig
from bas.data.batches import draw_batch
from bas.training import loop as training
from bas.training.cuda_graph import WARM_UP, CapturedStep, Inputs
from bas.training.master_weights import Masters
from bas.training.optimizer import build_optimizer, set_rate
from bas.training.setup import check_input
from tests.helpers.tiny import refused

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and there is none here")


def drawn(prepared, config, count: int, phase: int = -1) -> list:
    """The first batches of a phase."""
    models, material = prepared
    generator = torch.Generator().manual_seed(0)
    return [draw_batch(material, models, config.phases[phase], config, generator) for _ in range(count)]


@pytest.mark.parametrize("phase", [0, 1])
def test_any_subset_of_the_concepts_gives_the_same_shapes(bench, phase):
    config = bench.config()
    batches = drawn(bench.prepared(config), config, 12, phase)
    assert {int(batch.present.sum()) for batch in batches} == {1, 2, 3}  # concepts shown
    assert len({tuple((t.shape, t.dtype) for t in batch.tensors()) for batch in batches}) == 1


def test_inputs_are_copied_into_the_same_memory(bench):
    config = bench.config()
    first, second = drawn(bench.prepared(config), config, 2)
    inputs = Inputs([first])
    places = [tensor.data_ptr() for tensor in inputs.batches[0].tensors()]
    inputs.fill([second])
    assert [tensor.data_ptr() for tensor in inputs.batches[0].tensors()] == places
    for ours, theirs in zip(inputs.batches[0].tensors(), second.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(first.eps, second.eps)
    with pytest.raises(ValueError, match=r"a batch tensor is \(1,"):
        inputs.fill([replace(second, t=second.t[:1])])


def test_a_step_is_recorded_once_on_the_stream_of_the_warm_up(bench, monkeypatch):
    """Not on PyTorch's own: the process keeps that on the GPU which recorded first. Without a GPU, by stand-ins."""
    config = bench.config()
    for name in ("Stream", "CUDAGraph", "current_stream", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    step = CapturedStep(MagicMock())
    for batch in drawn(bench.prepared(config), config, WARM_UP + 2):
        step([batch])
    torch.cuda.graph.assert_called_once_with(step.graph, stream=step.stream)
    assert step.step.call_count == WARM_UP + 1
    assert step.graph.replay.call_count == 2


def test_a_step_draws_nothing(bench):
    """All randomness lies in `draw_batch`: a recorded step would repeat one draw for ever."""
    config = bench.config()
    prepared = bench.prepared(config)
    (batch,) = drawn(prepared, config, 1)
    states = random.getstate(), torch.get_rng_state()
    weights = training.trainable_parameters(prepared[0], config.phases[1])
    training.training_step(prepared[0], batch, config)[0].backward()
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    for weight in weights.values():
        weight.grad = None


def test_the_rate_of_a_captured_step_is_a_tensor():
    """`set_rate` writes into it, so a replay sees the new one; without capture it is a number."""
    weight = torch.nn.Parameter(torch.zeros(2))
    for graphs in (True, False):
        optimizer = build_optimizer([weight], TrainConfig(cuda_graphs=graphs))
        group = optimizer.param_groups[0]
        held = group["lr"]
        set_rate(optimizer, 0.5)
        assert group["lr"] == 0.5
        assert (group["lr"] is held) == torch.is_tensor(held) == group["capturable"] == graphs


def test_cuda_graphs_need_a_gpu(bench, tmp_path):
    with refused("--cuda_graphs needs a CUDA device"):
        check_input(bench.config(tmp_path / "run", cuda_graphs=True))


@ON_GPU
def test_a_replayed_step_has_the_bits_of_a_plain_one(bench):
    """Five steps, three of them before the recording: the same weights as without a graph."""
    config = bench.config(cuda_graphs=True)
    ends = []
    for captured in (False, True):
        models, material = bench.prepared(config)
        models.to("cuda")
        phase = config.phases[1]
        weights = training.trainable_parameters(models, phase)
        clipped = Masters(weights, {})
        optimizer = build_optimizer(weights.values(), config)
        scaler = torch.amp.GradScaler("cuda", enabled=False)

        def step(batches, models=models, optimizer=optimizer, scaler=scaler, clipped=clipped):
            return training.optimizer_step(models, batches, config, optimizer, scaler, clipped, "no")

        if captured:
            step = CapturedStep(step)
        for i, batch in enumerate(drawn((models, material), config, WARM_UP + 2)):
            set_rate(optimizer, 1e-4 * (i + 1))
            step([batch.to(models.device)])
        ends.append([weight.detach().clone() for weight in weights.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
