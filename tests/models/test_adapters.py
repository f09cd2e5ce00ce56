"""Adapters: they begin as the base, compute what merged weights compute, and are as many as the papers' layers have."""

import pytest
import torch

from bas.config import TrainConfig
from bas.models.adapters import (
    AdaptedConv2d,
    AdaptedLinear,
    Change,
    adapt_tokens,
    adapted_layers,
    add_adapters,
    changed,
    remove_adapters,
)
from bas.models.attention import CrossAttention
from bas.models.bundle import Models, weight_groups
from bas.models.text import context_width, encode_ids, tokenize
from bas.pretrained.folder import build_networks
from bas.pretrained.hub import find_spec
from tests.helpers.families import tiny

EVERYWHERE = {"train": "lora", "rank": 4, "conv_rank": 3, "alpha": 6.0}


def adapted(family: str, values: bool = True, **settings) -> Models:
    """A tiny model with adapters; with `values`, as if they had been trained."""
    models = tiny(family)
    add_adapters(models, TrainConfig(**EVERYWHERE | settings), 0)
    generator = torch.Generator().manual_seed(3)
    for network in (models.unet, models.text_encoder):
        for _, layer in adapted_layers(network):
            if values:
                layer.lora_B.weight.data = 0.1 * torch.randn(layer.lora_B.weight.shape, generator=generator)
    return models


@torch.no_grad()
def outputs(models: Models) -> list[torch.Tensor]:
    """Token states of a prompt, the prediction for one latent, and all attention maps."""
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    context = encode_ids(models.text_encoders, tokenize(models.tokenizer, ["a photo of a bowl"])).states
    prediction, maps = models.unet(z, 500, context, return_maps=True)
    return [context, prediction, *(each.probs for each in maps)]


def merge(models: Models) -> None:
    """Add what the adapters do to the weights, and take the adapters away."""
    for network in (models.unet, models.text_encoder):
        for _, layer in list(adapted_layers(network)):
            change = Change(layer.lora_A.weight.data, layer.lora_B.weight.data, layer.scale)
            layer.weight.data = changed(layer.weight.data, [change])
        remove_adapters(network)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_untrained_adapters_change_no_bit(family):
    """States, prediction and maps equal those of the base."""
    expected = outputs(tiny(family))
    assert len(expected) > 4
    for ours, theirs in zip(outputs(adapted(family, values=False)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_states_predictions_and_attention_maps_are_those_of_merged_weights(family):
    """Every kind of layer: linear, 1x1, 3x3, strided; to 5e-6 in states, prediction and every attention map, queries
    and keys being adapted too; all differ from the base's by far more."""
    models = adapted(family)
    layers = [layer for network in (models.unet, models.text_encoder) for _, layer in adapted_layers(network)]
    kinds = {(type(layer), getattr(layer, "kernel_size", ()), getattr(layer, "stride", ())) for layer in layers}
    shapes = [((3, 3), (1, 1)), ((3, 3), (2, 2)), ((1, 1), (1, 1))]
    assert kinds == {(AdaptedLinear, (), ()), *((AdaptedConv2d, *shape) for shape in shapes)}
    ours, base = outputs(models), outputs(tiny(family))
    assert len(ours) == 2 + sum(isinstance(module, CrossAttention) for module in models.unet.modules())
    merge(models)
    assert not any(".lora_" in name for name in models.unet.state_dict())
    for adapter, merged, plain in zip(ours, outputs(models), base, strict=True):
        assert (adapter - merged).abs().max() < 5e-6
        assert (adapter - plain).abs().max() > 1e-3


def test_a_change_of_a_convolution_is_the_product_of_its_parts():
    """A 3x3 kernel (o, i, 3, 3) changes by the sum over the rank of up x down."""
    down, up = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    expected = 0.5 * torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
    assert torch.allclose(Change(down, up, 0.5).delta(), expected, atol=1e-6)


def test_the_seed_decides_the_first_values():
    """Adapters of one seed are equal, those of another differ; A spreads as uniform within 1/sqrt(inputs)."""
    one, same, other = (adapted("sd1", values=False, seed=seed) for seed in (1, 1, 2))
    first, second, third = (dict(adapted_layers(m.unet)) for m in (one, same, other))
    assert all(torch.equal(first[n].lora_A.weight, second[n].lora_A.weight) for n in first)
    assert not any(torch.equal(first[n].lora_A.weight, third[n].lora_A.weight) for n in first)
    layer = first["down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"]
    assert 0.9 < layer.lora_A.weight.abs().max() * layer.in_features**0.5 <= 1.0


# Trained millions and numbers of layers of Stable Diffusion 1.5 and 2.1, at rank 4: UNet, then text encoder.
COUNTS = {
    ("sd15", "kv"): (0.198, 32, 0.295, 48),
    ("sd15", "attention"): (0.797, 128, 0.295, 48),
    ("sd15", "transformer"): (1.696, 192, 0.664, 72),
    ("sd15", "convolutions"): (4.203, 278, 0.664, 72),
    ("sd21-base", "kv"): (0.231, 32, 0.754, 92),
    ("sd21-base", "attention"): (0.830, 128, 0.754, 92),
    ("sd21-base", "transformer"): (1.729, 192, 1.696, 138),
    ("sd21-base", "convolutions"): (4.236, 278, 1.696, 138),
}


@pytest.mark.parametrize("name", ["sd15", "sd21-base"])
def test_full_size_models_have_the_known_numbers_of_layers_and_weights(name):
    """Layers and weights of each set, counted without weights; K/V and V weights as well."""
    for (model, targets), expected in COUNTS.items():
        if model == name:
            models = build_networks(find_spec(name))
            extra = {"conv_rank": 4} if targets == "convolutions" else {"lora_targets": targets}
            add_adapters(models, TrainConfig(train="lora", rank=4, **extra), 0)
            groups = weight_groups(models)
            found = []
            for part in ("unet_lora", "text_encoder_lora"):
                found += [round(sum(p.numel() for p in groups[part].values()) / 1e6, 3), len(groups[part]) // 2]
            assert tuple(found) == expected, targets
    kept = {"lora": ("unet_lora", "text_encoder_lora"), "token": ("unet_token",)}
    for kind, parts in kept.items():  # the files of default runs in fp16, with two handles: 40 MB at most
        models, config = build_networks(find_spec(name)), TrainConfig.resolve({"train": kind})
        add_adapters(models, config, 2)
        groups = weight_groups(models)
        numbers = sum(p.numel() for part in parts for p in groups[part].values())
        assert config.save_precision == "fp16"
        assert numbers * 2 < 40e6
    sizes = {part: sum(p.numel() for p in group.values()) for part, group in groups.items()}
    expected = (19.17, 9.58) if name == "sd15" else (25.56, 12.78)
    assert (round(sizes["cross_attention_kv"] / 1e6, 2), round(sizes["cross_attention_v"] / 1e6, 2)) == expected
    assert (len(groups["cross_attention_kv"]), len(groups["cross_attention_v"])) == (32, 16)


def test_rank_16_costs_four_times_rank_4():
    """The number of trained weights grows as the rank."""
    sizes = []
    for rank in (4, 16):
        models = adapted("sd2", values=False, rank=rank, conv_rank=rank)
        sizes.append(sum(p.numel() for p in weight_groups(models)["unet_lora"].values()))
    assert sizes[1] == 4 * sizes[0]


def test_gradient_checkpointing_changes_no_gradient():
    """Adapters' gradients with recomputed blocks equal those without, bit for bit."""
    gradients = []
    for recompute in (False, True):
        models = adapted("sd1")
        models.unet.set_gradient_checkpointing(recompute)
        z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        context = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(2))
        loss = models.unet(z, 500, context).sample.square().sum()
        parameters = list(weight_groups(models)["unet_lora"].values())
        gradients.append(torch.autograd.grad(loss, parameters))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().max() > 0 for g in gradients[0])


@pytest.mark.parametrize("kind", ["lora", "token"])
def test_an_adapted_block_is_one_graph(kind):
    """torch.compile takes a transformer block with adapters as a whole, with the same output."""
    models = adapted("sd1") if kind == "lora" else with_tokens((4, 2))
    block = models.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    x, context = torch.randn(1, 4, 64), torch.randn(1, 5, context_width(models.text_encoders))
    expected, _ = block(x, context)
    block.compile(fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(block(x, context)[0], expected)


# --- Adapters of single tokens ------------------------------------------------------------------------------------


def with_tokens(ranks: tuple[int, ...]) -> Models:
    """A tiny model whose last tokens have adapters of these ranks, with drawn values."""
    models, generator = tiny("sd1"), torch.Generator().manual_seed(3)
    first = len(models.tokenizer) - len(ranks)
    adapt_tokens(models, dict(enumerate(ranks, start=first)), 0.5, generator)
    for _, layer in adapted_layers(models.unet):
        layer.lora_B.weight.data.normal_(0, 0.3, generator=generator)
    return models


def test_an_adapter_of_a_token_acts_at_its_token_alone():
    """Values are W x + s B A x with the rows of the token's own adapter, to 1e-6, and W x bit for bit elsewhere.

    What is predicted without such tokens equals the base bit for bit.
    """
    models, base = with_tokens((4, 2)), tiny("sd1")
    last = len(models.tokenizer) - 1
    ids = torch.randint(0, last - 1, (1, 77), generator=torch.Generator().manual_seed(0))
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, plain = (m.unet(z, 500, encode_ids(m.text_encoders, ids).states).sample for m in (models, base))
    assert torch.equal(ours, plain)
    ids[0, 5], ids[0, 9] = last - 1, last
    layer = models.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_v")
    context = encode_ids(models.text_encoders, ids).states
    assert context.shape == (1, 77, 66)
    assert context[0, :, 64:].sum(dim=0).tolist() == [1, 1]
    states, values = context[0, :, :64], layer(context)[0]
    plain = torch.nn.functional.linear(states, layer.weight)
    for place, rows in ((5, slice(0, 4)), (9, slice(4, 6))):
        change = layer.lora_B.weight[:, rows] @ layer.lora_A.weight[rows] @ states[place]
        assert (values[place] - plain[place] - 0.5 * change).abs().max() < 1e-6
        assert change.abs().max() > 1e-2
    others = [place for place in range(77) if place not in (5, 9)]
    assert torch.equal(values[others], plain[others])
