"""The UNet against diffusers, its attention maps, gradient checkpointing and torch.compile."""

import json
from dataclasses import replace

import pytest
import torch

from bas.errors import InputError
from bas.losses import average_maps
from bas.models.attention import SpatialTransformer
from bas.models.config import UNetConfig
from bas.models.layers import ResnetBlock
from bas.models.unet import UNet
from bas.pretrained.hub import KNOWN_CONFIGS
from tests.helpers.compare import assert_equals_live, assert_equals_stored, cases, filled
from tools.reference import cases as reference
from tools.reference.measure import fill, uniform
from tools.reference.models import POOLED, TIMESTEPS, UNETS, UNETS_XL

networks = cases("unet")


@networks
def test_unet_equals_stored_reference(name):
    """Prediction, every map in order, gradients of inputs and of all parameters."""
    assert_equals_stored(name)


@networks
def test_unet_equals_diffusers(name):
    """The same live; the parameters' names are compared too."""
    assert_equals_live(name)


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (2, 4, 16, 24), timesteps and a context for a reference UNet."""
    width = UNETS[name.removeprefix("unet-")]["cross_attention_dim"]
    return uniform("latents", 2, 4, 16, 24), TIMESTEPS, uniform("context", 2, 7, width)


# --- Maps ---------------------------------------------------------------------------------------------------------


def test_maps_come_in_execution_order_with_place_and_grid():
    """SD's own shape: two layers a level on the way down, one in the middle, three a level on the way up."""
    with torch.no_grad():
        maps = filled("unet-sd1")(*inputs("sd1"), return_maps=True).maps
    grids = [(m.place, tuple(m.probs.shape[2:4])) for m in maps]
    down = [("down", grid) for grid in ((16, 24), (8, 12), (4, 6)) for _ in range(2)]
    up = [("up", grid) for grid in ((4, 6), (8, 12), (16, 24)) for _ in range(3)]
    assert grids == [*down, ("mid", (2, 3)), *up]
    transformers = [
        name for name, module in filled("unet-sd1").named_modules() if isinstance(module, SpatialTransformer)
    ]
    assert sorted(m.layer for m in maps) == sorted(transformers)
    assert [m.layer for m in (maps[0], maps[6], maps[-1])] == [
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.3.attentions.2",
    ]


def test_maps_of_sdxl_are_one_for_each_block_and_the_middle_is_left_out_of_their_mean():
    """Three levels put the middle on the grid of the last one: 2 x 3 maps down, 3 x 3 up and 3 in the middle.

    Each row sums to 1, and the mean is that of the 15 maps beside the middle, each head with the same weight.
    """
    config = UNETS_XL["sdxl"]
    latents, pooled = uniform("latents", 2, 4, 16, 24), uniform("pooled", 2, POOLED)
    context = uniform("context", 2, 7, config["cross_attention_dim"])
    with torch.no_grad():
        maps = filled("unet-sdxl")(latents, TIMESTEPS, context, return_maps=(4, 6), pooled=pooled).maps
    assert [m.place for m in maps] == ["down"] * 6 + ["mid"] * 3 + ["up"] * 9
    assert len({m.layer for m in maps}) == 18
    for each in maps:
        torch.testing.assert_close(each.probs.sum(dim=-1), torch.ones(2, 3, 4, 6), atol=1e-6, rtol=0)
    wanted = torch.cat([m.probs for m in maps if m.place != "mid"], dim=1).mean(dim=1)
    torch.testing.assert_close(average_maps(maps), wanted, atol=1e-6, rtol=0)
    assert (torch.cat([m.probs for m in maps], dim=1).mean(dim=1) - wanted).abs().max() > 1e-5


def test_gradients_of_sdxl_are_those_of_diffusers_to_1e_5():
    """Of two rows with other sizes, one of them cropped and not square: of the inputs, the first and last convolution
    and a key of the middle, relative to the largest."""
    pytest.importorskip("diffusers", reason="diffusers is the reference")
    ours, theirs = reference.ours("unet-sdxl"), reference.theirs("unet-sdxl")
    key = "mid_block.attentions.0.transformer_blocks.2.attn2.to_k.weight"
    for name in ("context", "pooled", "param.conv_in.weight", "param.conv_out.weight", f"param.{key}"):
        wanted = theirs[f"grad.{name}"]
        assert (ours[f"grad.{name}"] - wanted).abs().max() < 1e-5 * wanted.abs().max(), name
        assert wanted.abs().max() > 0


def test_one_timestep_stands_for_all():
    unet, (latents, _, context) = filled("unet-sd1"), inputs("sd1")
    with torch.no_grad():
        each = unet(latents, torch.full((len(latents),), 500), context).sample
        for one in (500, torch.tensor(500), torch.tensor([500])):
            assert torch.equal(unet(latents, one, context).sample, each)


@pytest.mark.parametrize("name", ["unet-sd1", "unet-sd2"])
def test_maps_are_those_asked_for(name):
    """False none, True all, a grid only that grid; the prediction is the same in every case."""
    unet = filled(name)
    with torch.no_grad():
        without, everything, some = (unet(*inputs(name), return_maps=ask) for ask in (False, True, (4, 6)))
    assert without.maps == []
    expected = [m for m in everything.maps if m.probs.shape[2:4] == (4, 6)]
    assert len(expected) == {"unet-sd1": 5, "unet-sd2": 1}[name]
    for ours, theirs in zip(some.maps, expected, strict=True):
        assert ours.place == theirs.place
        torch.testing.assert_close(ours.probs, theirs.probs, atol=1e-6, rtol=0)
    for other in (everything, some):
        torch.testing.assert_close(other.sample, without.sample, atol=1e-5, rtol=0)


def test_no_map_on_a_grid_without_attention():
    """An unknown grid gives an empty list; the losses turn that into an error."""
    with torch.no_grad():
        assert filled("unet-sd2")(*inputs("sd2"), return_maps=(5, 5)).maps == []


def test_rows_and_columns_of_a_map_are_those_of_the_image():
    """Changing the upper right corner of the latents moves the maps there first: at the finest grid, nowhere else.

    Only the first layer is looked at, before self-attention of later layers spreads the change.
    """
    unet = filled("unet-sd1")
    transformer = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    torch.nn.init.zeros_(transformer.attn1.to_out[0].weight)  # no exchange between cells before the first map
    torch.nn.init.zeros_(transformer.attn1.to_out[0].bias)
    for norm in (unet.down_blocks[0].resnets[0].norm1, unet.down_blocks[0].resnets[0].norm2):
        torch.nn.init.zeros_(norm.weight)  # group statistics would carry the change everywhere
    unet.down_blocks[0].attentions[0].norm = torch.nn.Identity()
    latents, timesteps, context = inputs("sd1")
    changed = latents.clone()
    changed[:, :, 0, 23] += 5
    with torch.no_grad():
        before, after = (unet(z, timesteps, context, return_maps=(16, 24)).maps[0].probs for z in (latents, changed))
    moved = (before - after).abs().amax(dim=(0, 1, 4))
    assert (moved[:2, 22:] > 1e-4).all()
    moved[:2, 22:] = 0
    assert moved.max() < 1e-6


# --- Gradient checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet-sd1", "unet-sd2"])
def test_gradient_checkpointing_changes_nothing_but_memory(name, monkeypatch):
    """Same outputs and gradients, those through the maps included; every residual block runs once more for it."""
    runs = []
    original = ResnetBlock.forward
    monkeypatch.setattr(ResnetBlock, "forward", lambda self, *a: runs.append(self) or original(self, *a))
    unet = filled(name)
    latents, timesteps, context = inputs(name)
    results, counts = [], []
    for on in (False, True):
        runs.clear()
        unet.set_gradient_checkpointing(on)
        z, c = latents.clone().requires_grad_(), context.clone().requires_grad_()
        out = unet(z, timesteps, c, return_maps=(4, 6))
        maps = sum(m.probs.square().sum() for m in out.maps)
        leaves = (z, c, *unet.parameters())
        # The maps' own gradient first: the loss that the official code loses under checkpointing.
        alone = torch.autograd.grad(maps, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        both = torch.autograd.grad(out.sample.square().sum() + maps, leaves)
        results.append([out.sample.detach(), *(m.probs.detach() for m in out.maps), *alone, *both])
        counts.append(len(runs))
    blocks = len([m for m in unet.modules() if isinstance(m, ResnetBlock)])
    assert counts[0] == blocks
    assert counts[1] > 2 * blocks
    assert any(g.abs().max() > 1e-3 for g in results[1][len(results[1]) // 2 :])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6 * max(1.0, a.abs().max().item()), rtol=0)


def test_gradient_checkpointing_stands_aside_without_gradients(monkeypatch):
    """Sampling with the switch left on runs each block once."""
    unet = filled("unet-sd2")
    unet.set_gradient_checkpointing(True)
    calls = []
    monkeypatch.setattr("bas.models.unet.checkpoint", lambda *a, **k: calls.append(a))
    with torch.no_grad():
        unet(*inputs("sd2"))
    assert calls == []


# --- Compilation --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_unet():
    """Every kind of block once, as tracing takes its time; no graph of another test is reused."""
    torch._dynamo.reset()
    types = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    types["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    yield fill(
        UNet(replace(UNetConfig.from_json(UNETS["sd2"]), block_out_channels=(16, 32), attention_head_dim=2, **types))
    )
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("ask", [(16, 24), False, True])
def test_unet_compiles_to_one_graph(small_unet, ask):
    """fullgraph=True raises at any graph break. Maps come out of the compiled UNet as they do out of the eager one."""
    keys = list(small_unet.state_dict())
    with torch.no_grad():
        eager = small_unet(*inputs("sd2"), ask)
        small_unet.compile(fullgraph=True, backend="eager")
        compiled = small_unet(*inputs("sd2"), ask)
    assert list(small_unet.state_dict()) == keys  # compiled in place: no _orig_mod prefix
    torch.testing.assert_close(compiled.sample, eager.sample, atol=1e-5, rtol=0)
    assert [m.place for m in compiled.maps] == [m.place for m in eager.maps]
    assert len(compiled.maps) == {False: 0, True: 4, (16, 24): 3}[ask]
    for a, b in zip(compiled.maps, eager.maps, strict=True):
        torch.testing.assert_close(a.probs, b.probs, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_unet_trains_in_one_graph(small_unet, checkpointing):
    """Forward and backward are traced as a whole, with and without gradient checkpointing: equal gradients."""
    small_unet.set_gradient_checkpointing(checkpointing)
    latents, timesteps, context = inputs("sd2")
    gradients = []
    for compiled in (False, True):
        if compiled:
            small_unet.compile(fullgraph=True, backend="aot_eager")
        c = context.clone().requires_grad_()
        out = small_unet(latents, timesteps, c, (16, 24))
        loss = out.sample.square().mean() + sum(m.probs.square().sum() for m in out.maps)
        gradients.append(torch.autograd.grad(loss, (c, *small_unet.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, b.abs().max().item()), rtol=0)


@pytest.mark.slow
def test_unet_compiles_with_inductor(small_unet):
    """The default backend, as --compile uses it, on the CPU."""
    with torch.no_grad():
        eager = small_unet(*inputs("sd2"), (16, 24))
        small_unet.compile(fullgraph=True)
        compiled = small_unet(*inputs("sd2"), (16, 24))
    torch.testing.assert_close(compiled.sample, eager.sample, atol=2e-5, rtol=0)
    torch.testing.assert_close(compiled.maps[0].probs, eager.maps[0].probs, atol=1e-5, rtol=0)


# --- Configuration ------------------------------------------------------------------------------------------------


def test_config_survives_a_round_trip():
    for config in UNETS.values():
        first = UNetConfig.from_json(config)
        second = UNetConfig.from_json(first.to_json())
        assert second == replace(first, attention_head_dim=first.heads)  # one number becomes one per level


@pytest.mark.parametrize(
    ("changes", "millions"),
    [
        ({}, 579.4),  # BK-SDM-Base, small-sd
        ({"mid_block_type": None}, 482.3),  # BK-SDM-Small
        ({"mid_block_type": None, "block_out_channels": [320, 640, 1280]}, 323.4),  # BK-SDM-Tiny, tiny-sd
    ],
)
def test_smaller_relatives_of_sd1_are_rows_of_data(changes, millions):
    """The number of the UNet's weights, as their publishers give it; all levels of the smallest have attention."""
    config = json.loads(KNOWN_CONFIGS.read_text())["sd15"]["unet"] | {"layers_per_block": 1} | changes
    if len(config["block_out_channels"]) == 3:
        config |= {f"{way}_block_types": [f"CrossAttn{way.title()}Block2D"] * 3 for way in ("down", "up")}
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_json(config))
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == millions


def test_heads_are_counted_in_spite_of_the_name():
    """attention_head_dim is the number of heads: one for all levels in SD 1, one per level in SD 2."""
    assert UNetConfig.from_json(UNETS["sd1"]).heads == (2, 2, 2, 2)
    assert UNetConfig.from_json(UNETS["sd2"]).heads == (1, 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "inpainting or depth"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"norm_num_groups": 5}, "not divisible"),
        ({"block_out_channels": [16, 32, 10**9]}, "8192"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3}, "down_block_types"),
        ({"attention_head_dim": [1, 2]}, "attention_head_dim"),
    ],
)
def test_a_config_bas_cannot_honour_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        UNetConfig.from_json(UNETS["sd2"] | change)


def test_unet_is_built_without_memory_on_the_meta_device():
    """Nothing is computed at construction, so a full-size model costs nothing until its weights arrive."""
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964  # Stable Diffusion 1.5's UNet
    assert not list(unet.buffers())
