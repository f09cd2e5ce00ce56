"""The rename table against diffusers' own converters, and at the full size of SD 1.5 and SD 2.1."""

from itertools import chain
from pathlib import Path

import pytest
import torch

from bas.models.config import UNetConfig, VAEConfig
from bas.models.text import build_text_encoder
from bas.models.unet import UNet
from bas.models.vae import VAE as AutoEncoder
from bas.pretrained.ldm_keys import (
    CLIP,
    OPEN_CLIP,
    UNET,
    VAE,
    from_original,
    inverse,
    open_clip_table,
    rename,
    to_original,
    unet_table,
    vae_table,
)
from bas.pretrained.loading import Parts
from bas.pretrained.single_file import infer_configs
from tests.helpers.families import FAMILIES, tiny

HEADS = (5, 10, 20, 20)
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77}
FULL = {
    "SD 1.5": (
        UNetConfig(attention_head_dim=(8, 8, 8, 8)),
        TEXT
        | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"hidden_act": "quick_gelu"},
    ),
    "SD 2.1": (
        UNetConfig(attention_head_dim=HEADS, cross_attention_dim=1024, use_linear_projection=True),
        TEXT
        | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
        | {"hidden_act": "gelu"},
    ),
}
# (ours, original) as they stand in the published files
KNOWN_PAIRS = [
    ("unet", "conv_in.weight", f"{UNET}input_blocks.0.0.weight"),
    ("unet", "time_embedding.linear_2.bias", f"{UNET}time_embed.2.bias"),
    ("unet", "down_blocks.0.downsamplers.0.conv.weight", f"{UNET}input_blocks.3.0.op.weight"),
    ("unet", "down_blocks.1.resnets.0.conv_shortcut.bias", f"{UNET}input_blocks.4.0.skip_connection.bias"),
    ("unet", "down_blocks.2.attentions.1.proj_in.weight", f"{UNET}input_blocks.8.1.proj_in.weight"),
    ("unet", "down_blocks.3.resnets.1.time_emb_proj.weight", f"{UNET}input_blocks.11.0.emb_layers.1.weight"),
    ("unet", "mid_block.resnets.1.norm2.weight", f"{UNET}middle_block.2.out_layers.0.weight"),
    ("unet", "up_blocks.0.upsamplers.0.conv.weight", f"{UNET}output_blocks.2.1.conv.weight"),
    ("unet", "up_blocks.1.upsamplers.0.conv.weight", f"{UNET}output_blocks.5.2.conv.weight"),
    ("unet", "up_blocks.3.resnets.2.conv1.weight", f"{UNET}output_blocks.11.0.in_layers.2.weight"),
    ("unet", "conv_norm_out.bias", f"{UNET}out.0.bias"),
    ("vae", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight", f"{VAE}encoder.down.1.block.0.nin_shortcut.weight"),
    ("vae", "decoder.up_blocks.0.resnets.2.norm1.weight", f"{VAE}decoder.up.3.block.2.norm1.weight"),
    ("vae", "decoder.up_blocks.2.upsamplers.0.conv.bias", f"{VAE}decoder.up.1.upsample.conv.bias"),
    ("vae", "encoder.mid_block.attentions.0.to_out.0.weight", f"{VAE}encoder.mid.attn_1.proj_out.weight"),
    ("vae", "encoder.mid_block.resnets.1.conv2.weight", f"{VAE}encoder.mid.block_2.conv2.weight"),
    ("vae", "post_quant_conv.weight", f"{VAE}post_quant_conv.weight"),
]


def full_size(name: str) -> tuple[UNetConfig, dict, dict[str, dict[str, torch.Tensor]]]:
    """Configurations and tensors without content of a published model, the text encoder without prefix."""
    unet, text = FULL[name]
    with torch.device("meta"):
        networks = {"unet": UNet(unet), "vae": AutoEncoder(VAEConfig()), "text_encoder": build_text_encoder(text)}
    states = {part: network.state_dict() for part, network in networks.items()}
    states["text_encoder"] = {k.removeprefix("text_model."): v for k, v in states["text_encoder"].items()}
    return unet, text, states


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", FULL)
def test_full_size_keys_go_there_and_back(name):
    unet, text, ours = full_size(name)
    theirs = to_original(ours, unet, VAEConfig(), open_clip=name == "SD 2.1")
    counts = {prefix: sum(key.startswith(prefix) for key in theirs) for prefix in (UNET, VAE, CLIP, OPEN_CLIP)}
    # 686 and 248 are the published counts. SD 2.1's text encoder has 12 for each of 23 layers and 4 more. Strict
    # readers look for a 24th layer, a projection and a scale.
    expected_text = {CLIP: 196, OPEN_CLIP: 0} if name == "SD 1.5" else {CLIP: 0, OPEN_CLIP: 24 * 12 + 6}
    assert counts == {UNET: 686, VAE: 248, **expected_text}
    back = from_original(theirs, unet, VAEConfig())
    assert [list(t.shape) for k, t in theirs.items() if ".mid.attn_1.q.weight" in k] == [[512, 512, 1, 1]] * 2
    for part in ("unet", "text_encoder"):
        assert shapes(back[part]) == shapes(ours[part])
    assert back["vae"].keys() == ours["vae"].keys()
    tables = {"unet": (UNET, unet_table(unet)), "vae": (VAE, vae_table(VAEConfig()))}
    for part, our_key, their_key in KNOWN_PAIRS:
        prefix, table = tables[part]
        assert our_key in ours[part]
        assert their_key in theirs
        assert prefix + rename(our_key, table) == their_key
    inferred = infer_configs(theirs, {}, "epsilon", Path("file"))
    assert inferred[:2] == (unet, VAEConfig())
    assert inferred[2].items() >= text.items()


@pytest.mark.parametrize("name", FULL)
def test_full_size_keys_and_shapes_are_those_of_diffusers(name):
    """Our original layout, converted by diffusers, is what diffusers' and transformers' own networks expect."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reference")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet, _, ours = full_size(name)
    theirs = to_original(ours, unet, VAEConfig(), open_clip=name == "SD 2.1")
    with torch.device("meta"):
        reference_unet = diffusers.UNet2DConditionModel.from_config(unet.to_json())
        reference_vae = diffusers.AutoencoderKL.from_config(VAEConfig().to_json())
    converted = convert_ldm_unet_checkpoint(theirs, reference_unet.config)
    assert shapes(converted) == shapes(reference_unet.state_dict()) == shapes(ours["unet"])
    assert shapes(ours["vae"]) == shapes(reference_vae.state_dict())
    assert (
        sum(tensor.numel() for tensor in ours["unet"].values()) == {"SD 1.5": 859_520_964, "SD 2.1": 865_910_724}[name]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_values_agree_with_the_converters_of_diffusers(family):
    pytest.importorskip("diffusers", reason="diffusers is not installed: its converters are the reference")
    from diffusers.loaders import single_file_utils as reference

    models = tiny(family)
    parts = Parts.of(models, torch.float32)
    theirs = to_original(parts.tensors, parts.spec.unet, parts.spec.vae, open_clip=family != "sd1")
    # These converters change the dict they are given.
    unet = reference.convert_ldm_unet_checkpoint(dict(theirs), parts.spec.unet.to_json())
    vae = reference.convert_ldm_vae_checkpoint(dict(theirs), parts.spec.vae.to_json())
    if family == "sd1":
        text = reference.convert_ldm_clip_checkpoint(dict(theirs))
    else:
        text = reference.convert_open_clip_checkpoint(models.text_encoder, dict(theirs))
    text = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    ours = from_original(theirs, parts.spec.unet, parts.spec.vae)
    for part, converted in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        assert converted.keys() == ours[part].keys() == parts.tensors[part].keys()
        for key, tensor in converted.items():
            assert torch.equal(tensor, parts.tensors[part][key]), key
            assert torch.equal(ours[part][key].reshape(tensor.shape), tensor), key


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_tables_are_one_to_one_at_any_depth(levels, layers):
    widths = (32, 64, 64, 128)[:levels]
    unet = UNetConfig(
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    )
    vae = VAEConfig(block_out_channels=widths, layers_per_block=layers)
    with torch.device("meta"):
        networks = UNet(unet), AutoEncoder(vae)
    for network, table in zip(networks, (unet_table(unet), vae_table(vae)), strict=True):
        keys = list(network.state_dict())
        renamed = [rename(key, table) for key in keys]
        assert None not in renamed
        assert len(set(renamed)) == len(keys)
        assert [rename(key, inverse(table)) for key in renamed] == keys


def test_fused_attention_is_split_and_the_last_layer_of_open_clip_dropped():
    fused = {"in_proj_weight": torch.arange(12.0).view(6, 2), "in_proj_bias": torch.arange(6.0)}
    layers = {f"{OPEN_CLIP}transformer.resblocks.{i}.attn.{k}": v for i in (0, 22, 23) for k, v in fused.items()}
    head = {f"{OPEN_CLIP}{name}": torch.zeros(1) for name in ("text_projection", "logit_scale")}
    text = from_original(layers | head, UNetConfig(), VAEConfig())["text_encoder"]
    assert set(text) == {
        f"encoder.layers.{i}.self_attn.{x}_proj.{kind}" for i in (0, 22) for x in "qkv" for kind in ("weight", "bias")
    }
    attention = "encoder.layers.22.self_attn"
    assert text[f"{attention}.q_proj.weight"].tolist() == [[0, 1], [2, 3]]
    assert text[f"{attention}.k_proj.weight"].tolist() == [[4, 5], [6, 7]]
    assert text[f"{attention}.v_proj.bias"].tolist() == [4, 5]


def test_what_a_model_does_not_use_is_left_out_and_what_is_unknown_is_kept():
    unused = (
        "model_ema.diffusion_modelconv_inweight",
        "model_ema.decay",
        "betas",
        "alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "first_stage_model.loss.logvar",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.logit_scale",
        "hyper_parameters",
    )
    ours = from_original({key: torch.zeros(1) for key in unused}, UNetConfig(), VAEConfig())
    assert list(chain(*ours.values())) == []
    for part, unknown in (("unet", f"{UNET}label_emb.0.0.weight"), ("vae", "first_stage_model.encoder.extra.bias")):
        assert len(from_original({unknown: torch.zeros(1)}, UNetConfig(), VAEConfig())[part]) == 1


def test_a_name_without_entry_has_no_other_name():
    table = open_clip_table(2)
    assert rename("final_layer_norm.weight", table) == "ln_final.weight"
    assert rename("final_layer_normal.weight", table) is None
    assert rename("encoder.layers.2.layer_norm1.bias", table) is None
