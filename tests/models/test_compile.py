"""--compile: whole and regional compile without a graph break, in place."""

import pytest
import torch
from torch._dynamo.utils import counters

import bas
from bas.cli.entry import main
from bas.cli.flags import Parser, add_fields
from bas.config import TrainConfig
from bas.errors import InputError
from bas.models.attention import TransformerBlock
from bas.models.compile import compile_unet
from bas.models.layers import ResnetBlock
from bas.models.unet import UNet
from tests.helpers.tiny import UNET, WIDTH, refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "absent"),
        (["--compile"], "whole"),
        (["--compile", "--seed", "1"], "whole"),
        (["--compile", "regional"], "regional"),
    ],
)
def test_the_flag_alone_means_the_whole_unet(words, expected):
    parser = Parser()
    add_fields(parser, TrainConfig, only=("compile", "seed"))
    assert getattr(parser.parse_args(words), "compile", "absent") == expected


def test_an_unknown_kind_is_one_line(capsys):
    assert main(["train", "scene", "--compile", "half"]) == 2
    assert "--compile" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("kind", "modules"), [("regional", {ResnetBlock, TransformerBlock}), ("whole", {UNet})])
def test_each_shape_gets_code_of_its_own(monkeypatch, kind, modules):
    """Left to itself, the compiler would make phase 2's larger batch a symbol, and slower code for it."""
    given = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: given.append((type(module), how)))
    with torch.device("meta"):
        compile_unet(UNet(UNET), kind)
    assert {module for module, _ in given} == modules
    assert all(how == {"fullgraph": True, "dynamic": False, "backend": "inductor"} for _, how in given)


@pytest.mark.parametrize(("kind", "graphs"), [("regional", 2), pytest.param("whole", 1, marks=pytest.mark.slow)])
def test_compiled_training_has_no_graph_break_and_the_same_gradients(kind, graphs):
    """`fullgraph` raises at a break; the counters agree. Regional compiles many small graphs, whole a single one."""
    torch.manual_seed(0)
    unet = UNet(UNET)
    keys = list(unet.state_dict())
    latents, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, WIDTH)

    def gradients() -> list[torch.Tensor]:
        output = unet(latents, torch.tensor([3, 900]), context, (4, 4))
        loss = output.sample.square().mean() + sum(m.probs.amax() for m in output.maps)
        return list(torch.autograd.grad(loss, list(unet.parameters())))

    plain = gradients()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    try:
        compile_unet(unet, kind, backend="eager")
        compiled = gradients()
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"]
        found = counters["stats"]["unique_graphs"]
        assert found == 1 if graphs == 1 else found >= graphs
    finally:
        torch.compiler.reset()
    assert list(unet.state_dict()) == keys
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_sizes_follow_one_another_without_end():
    """As when one process trains on scenes of many shapes: more of them than the compiler takes by itself."""
    block = ResnetBlock(8, 8, 16, groups=4, eps=1e-5)
    compile_unet(torch.nn.ModuleList([block]), "regional", backend="eager")
    counters.clear()
    for side in range(4, 80):
        block(torch.zeros(1, 8, side, 4), torch.zeros(1, 16))
    assert counters["stats"]["unique_graphs"] == 76


def test_class_images_are_not_compiled(bench, tmp_path, monkeypatch):
    """A later scene's would go through the UNet that an earlier one compiled, in batches of their own size."""
    stances = []

    def stop(*args):
        stances.append(torch._dynamo.eval_frame._stance.stance)
        raise InputError("seen")

    monkeypatch.setattr("bas.training.base_model.class_images", stop)
    with refused("seen"):
        bas.train(bench.config(tmp_path / "run"))
    assert stances == ["force_eager"]
