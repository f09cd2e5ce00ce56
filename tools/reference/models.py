"""References of whole models: small UNets, VAEs and text encoders of bas beside those of diffusers and transformers."""

import math

import torch
from torch import Tensor, nn

from bas.models.config import UNetConfig, VAEConfig
from bas.models.text import build_text_encoder
from bas.models.unet import UNet
from bas.models.vae import VAE
from tools.reference.attention import record
from tools.reference.measure import Case, Named

# Small models of the three kinds of Stable Diffusion; grids are oblong, so rows cannot pass for columns.
UNETS = {
    "sd1": {
        "sample_size": 16,
        "block_out_channels": [16, 32, 32, 32],
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "act_fn": "silu",
        "mid_block_scale_factor": 1,
        "downsample_padding": 1,
        "center_input_sample": False,
    },
    "sd2": {
        "sample_size": 16,
        "block_out_channels": [16, 32, 48],
        "attention_head_dim": [1, 2, 4],
        "cross_attention_dim": 20,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "use_linear_projection": True,
        "dual_cross_attention": False,
        "only_cross_attention": False,
        "num_class_embeds": None,
    },
    "sd2-v": {
        "sample_size": 24,
        "block_out_channels": [16, 16, 32, 32],
        "attention_head_dim": [2, 4, 8, 8],
        "cross_attention_dim": 20,
        "norm_num_groups": 4,
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
}
POOLED = 12
# Of these a forward pass has a pooled text and sizes too, of which one row is cropped and not square.
UNETS_XL = {
    "sdxl": {
        "sample_size": 16,
        "block_out_channels": [16, 32, 48],
        "attention_head_dim": [1, 2, 3],
        "cross_attention_dim": 20,
        "norm_num_groups": 4,
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
        "upcast_attention": None,
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": POOLED + 6 * 6,
    },
}
UNETS_XL["ssd"] = UNETS_XL["sdxl"] | {  # SSD-1B and Vega: a depth for each transformer, a middle without one
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 3], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
UNETS["bk-sdm"] = UNETS["sd1"] | {"layers_per_block": 1, "mid_block_type": None}  # tiny-sd too
SIZES = torch.tensor([[1024.0, 768, 3, 5, 512, 640], [512, 512, 0, 0, 512, 512]])
VAES = {
    "vae": {
        "block_out_channels": [8, 16, 24],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 32,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "act_fn": "silu",
    },
    "vae-deep": {
        "block_out_channels": [8, 8],
        "layers_per_block": 2,
        "norm_num_groups": 2,
        "latent_channels": 3,
        "scaling_factor": 0.2,
        "sample_size": 32,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
}
TEXTS = {
    "text-sd1": {"hidden_act": "quick_gelu", "num_hidden_layers": 3, "num_attention_heads": 4},
    "text-sd2": {"hidden_act": "gelu", "num_hidden_layers": 2, "num_attention_heads": 2},
}
TEXT_COMMON = {
    "model_type": "clip_text_model",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 77,
    "bos_token_id": 58,
    "eos_token_id": 59,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-5,
}

TIMESTEPS = torch.tensor([7, 981])
IDS = torch.tensor([[58, 3, 17, 42, 5, 59, 0, 0], [58, 9, 9, 59, 0, 0, 0, 0]])


def diffusers_unet(config: dict) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def diffusers_vae(config: dict) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**config)


def transformers_text(config: dict) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def run_unet(module: nn.Module, latents: Tensor, context: Tensor, pooled: Tensor | None = None) -> Named:
    """diffusers' UNet with the maps of all its cross-attentions, laid out over their grids."""
    kept = record(module)
    added = None if pooled is None else {"text_embeds": pooled, "time_ids": SIZES}
    outputs = {"sample": module(latents, TIMESTEPS, context, added_cond_kwargs=added).sample}
    h, w = latents.shape[-2:]
    for i, (place, probs) in enumerate(kept):
        scale = math.isqrt(h * w // probs.shape[2])
        outputs[f"map{i}.{place}"] = probs.unflatten(2, (h // scale, w // scale))
    return outputs


def run_our_unet(module: nn.Module, latents: Tensor, context: Tensor, pooled: Tensor | None = None) -> Named:
    """bas's UNet, its maps named by order and place."""
    out = module(latents, TIMESTEPS, context, return_maps=True, pooled=pooled, sizes=SIZES)
    return {"sample": out.sample} | {f"map{i}.{m.place}": m.probs for i, m in enumerate(out.maps)}


def run_vae(module: nn.Module, images: Tensor, latents: Tensor) -> Named:
    """diffusers' VAE, both ways."""
    posterior = module.encode(images).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar, "images": module.decode(latents).sample}


def run_our_vae(module: nn.Module, images: Tensor, latents: Tensor) -> Named:
    """bas's VAE, both ways."""
    posterior = module.encode(images)
    return {"mean": posterior.mean, "logvar": posterior.logvar, "images": module.decode(latents)}


MODELS: dict[str, Case] = {
    **{
        f"unet-{name}": Case(
            lambda config=config: UNet(UNetConfig.from_json(config)),
            lambda config=config: diffusers_unet(config),
            {
                "latents": (2, 4, 16, 24),
                "context": (2, 7, config["cross_attention_dim"]),
                **({"pooled": (2, POOLED)} if name in UNETS_XL else {}),
            },
            run_our_unet,
            run_unet,
        )
        for name, config in (UNETS | UNETS_XL).items()
    },
    **{
        name: Case(
            lambda config=config: VAE(VAEConfig.from_json(config)),
            lambda config=config: diffusers_vae(config),
            {"images": (2, 3, 16, 24), "latents": (2, config["latent_channels"], 4, 6)},
            run_our_vae,
            run_vae,
        )
        for name, config in VAES.items()
    },
    **{
        name: Case(
            lambda config=config: build_text_encoder(TEXT_COMMON | config),
            lambda config=config: transformers_text(TEXT_COMMON | config),
            {"ids": IDS},
            lambda module, ids: module(input_ids=ids).last_hidden_state,
            lambda module, ids: module(input_ids=ids).last_hidden_state,
        )
        for name, config in TEXTS.items()
    },
}
