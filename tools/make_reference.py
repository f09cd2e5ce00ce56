"""Reference numbers for the tests: each network of bas, and what diffusers and transformers compute in its place.

    python tools/make_reference.py            writes tests/reference/networks.safetensors and schedulers.safetensors
    python tools/make_reference.py --check    recomputes them and says how far they are from the files

Weights and inputs are drawn from PCG64's raw bits under the name of each tensor. NumPy guarantees those bits for all
versions, so the files hold results only. diffusers is imported here alone; the tests use it when it is installed.
"""

import argparse
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bas.models import attention, layers, vae
from bas.models.config import UNetConfig, VAEConfig
from bas.models.text import build_text_encoder
from bas.models.unet import UNet

REFERENCE = Path(__file__).parent.parent / "tests" / "reference"


# --------------------------------------------------------------------------------------------------------------
# Numbers that every machine draws alike
# --------------------------------------------------------------------------------------------------------------


def uniform(name: str, *shape: int) -> Tensor:
    """Values in [-sqrt(3), sqrt(3)), so of variance 1, that depend on the name and nothing else. -> float32"""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy((math.sqrt(3) * (2 * unit - 1)).astype(np.float32)).reshape(shape)


def fill(module: nn.Module) -> nn.Module:
    """Set every parameter from its name: matrices keep the variance of their input, norms stay near 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = uniform(name.removeprefix("text_model."), *parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(values * (parameter.shape[0] / parameter.numel()) ** 0.5)
            else:
                parameter.copy_(0.1 * values + name.endswith("weight"))
    return module


# --------------------------------------------------------------------------------------------------------------
# The cases
# --------------------------------------------------------------------------------------------------------------

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

Named = dict[str, Tensor]


@dataclass
class Case:
    """One network of bas, its counterpart, and what to feed both. Runners return their outputs by name."""

    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    inputs: dict[str, tuple[int, ...] | Tensor]  # a shape is drawn, a tensor is taken as it is
    run_ours: Callable[..., Tensor | Named] = lambda module, *inputs: module(*inputs)
    run_theirs: Callable[..., Tensor | Named] = lambda module, *inputs: module(*inputs)


def measure(name: str, module: nn.Module, run: Callable[..., Tensor | Named], case: Case) -> Named:
    """Outputs and gradients of one network: `out.*`, `grad.<input>` and `grad.param.<parameter>`.

    The gradients are those of the outputs' inner products with fixed random tensors.
    """
    fill(module)
    inputs = {
        key: value if isinstance(value, Tensor) else uniform(f"{name}.{key}", *value).requires_grad_()
        for key, value in case.inputs.items()
    }
    outputs = run(module, *inputs.values())
    outputs = outputs if isinstance(outputs, dict) else {"sample": outputs}
    loss = sum(
        (output * uniform(f"{name}.direction.{key}", *output.shape)).sum() / output.numel() ** 0.5
        for key, output in outputs.items()
    )
    parameters = {key.removeprefix("text_model."): value for key, value in module.named_parameters()}
    leaves = {f"grad.{key}": value for key, value in inputs.items() if value.requires_grad}
    leaves |= {f"grad.param.{key}": parameters[key] for key in sorted(parameters)}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    outputs = {f"out.{key}": value.detach() for key, value in outputs.items()}
    return outputs | dict(zip(leaves, grads, strict=True))


def condense(measured: Named) -> Named:
    """The same with each parameter's gradient reduced to two numbers: its projection on a fixed direction, its norm."""
    kept = {key: value for key, value in measured.items() if not key.startswith("grad.param.")}
    rows = [
        torch.stack([(value * uniform(key, *value.shape)).sum(), value.norm()])
        for key, value in measured.items()
        if key.startswith("grad.param.")
    ]
    return kept | {"grad.params": torch.stack(rows)} if rows else kept


def ours(name: str) -> Named:
    """Measure bas."""
    return measure(name, CASES[name].ours(), CASES[name].run_ours, CASES[name])


def theirs(name: str) -> Named:
    """Measure diffusers or transformers."""
    return measure(name, CASES[name].theirs(), CASES[name].run_theirs, CASES[name])


# How each layer of bas is called in diffusers.


def diffusers_resnet(c_in: int, c_out: int, time_dim: int | None, groups: int, eps: float) -> nn.Module:
    from diffusers.models.resnet import ResnetBlock2D

    return ResnetBlock2D(in_channels=c_in, out_channels=c_out, temb_channels=time_dim, groups=groups, eps=eps)


def diffusers_resample(kind: str, channels: int, **options) -> nn.Module:
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.upsampling import Upsample2D

    return {"down": Downsample2D, "up": Upsample2D}[kind](channels, use_conv=True, **options)


def diffusers_time_embedding(features: int, dim: int) -> nn.Module:
    from diffusers.models.embeddings import TimestepEmbedding

    return TimestepEmbedding(features, dim)


def diffusers_attention(dim: int, context_dim: int | None, heads: int) -> nn.Module:
    from diffusers.models.attention_processor import Attention

    return Attention(dim, context_dim, heads=heads, dim_head=dim // heads)


def diffusers_vae_attention(channels: int, groups: int) -> nn.Module:
    from diffusers.models.attention_processor import Attention

    return Attention(
        channels,
        heads=1,
        dim_head=channels,
        eps=1e-6,
        norm_num_groups=groups,
        residual_connection=True,
        bias=True,
        _from_deprecated_attn_block=True,
    )


def diffusers_feed_forward(dim: int) -> nn.Module:
    from diffusers.models.attention import FeedForward

    return FeedForward(dim, activation_fn="geglu")


def diffusers_transformer_block(dim: int, context_dim: int, heads: int) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(dim, heads, dim // heads, cross_attention_dim=context_dim)


def diffusers_spatial_transformer(channels: int, context_dim: int, heads: int, groups: int, linear: bool) -> nn.Module:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return Transformer2DModel(
        heads,
        channels // heads,
        in_channels=channels,
        norm_num_groups=groups,
        cross_attention_dim=context_dim,
        use_linear_projection=linear,
    )


def diffusers_unet(config: dict) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def diffusers_vae(config: dict) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**config)


def transformers_text(config: dict) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


class Recorder:
    """An attention processor for diffusers that computes cross-attention openly and keeps the probabilities."""

    def __init__(self, place: str, kept: list[tuple[str, Tensor]]):
        self.place, self.kept = place, kept

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, **_) -> Tensor:
        """(b, n, dim), (b, k, context_dim) -> (b, n, dim)"""
        query, key, value = (
            attn.head_to_batch_dim(project(x))
            for project, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        probs = attn.get_attention_scores(query, key)
        self.kept.append((self.place, probs.unflatten(0, (len(hidden_states), attn.heads))))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probs, value))))


def record(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Put a Recorder into every cross-attention of a diffusers network. -> the list it fills, in execution order"""
    kept: list[tuple[str, Tensor]] = []
    for name, child in module.named_modules():
        if name.endswith("attn2") or name == "":
            place = name.split("_")[0]  # down_blocks..., mid_block..., up_blocks...
            if hasattr(child, "set_processor"):
                child.set_processor(Recorder(place, kept))
    return kept


def run_cross_attention(module: nn.Module, x: Tensor, context: Tensor) -> Named:
    """diffusers' cross-attention with its probabilities."""
    kept = record(module)
    out = module(x, context)
    return {"sample": out, "probs": kept[0][1]}


def run_transformer_block(module: nn.Module, x: Tensor, context: Tensor) -> Named:
    """diffusers' transformer block with its cross-attention's probabilities."""
    kept = record(module)
    out = module(x, encoder_hidden_states=context)
    return {"sample": out, "probs": kept[0][1]}


def run_spatial_transformer(module: nn.Module, x: Tensor, context: Tensor) -> Named:
    """diffusers' spatial transformer, its probabilities laid out over the grid."""
    kept = record(module)
    out = module(x, encoder_hidden_states=context).sample
    return {"sample": out, "probs": kept[0][1].unflatten(2, x.shape[-2:])}


def run_unet(module: nn.Module, latents: Tensor, context: Tensor) -> Named:
    """diffusers' UNet with the maps of all its cross-attentions, laid out over their grids."""
    kept = record(module)
    outputs = {"sample": module(latents, TIMESTEPS, context).sample}
    h, w = latents.shape[-2:]
    for i, (place, probs) in enumerate(kept):
        scale = math.isqrt(h * w // probs.shape[2])
        outputs[f"map{i}.{place}"] = probs.unflatten(2, (h // scale, w // scale))
    return outputs


def run_our_unet(module: nn.Module, latents: Tensor, context: Tensor) -> Named:
    """bas's UNet, its maps named by order and place."""
    out = module(latents, TIMESTEPS, context, return_maps=True)
    return {"sample": out.sample} | {f"map{i}.{m.place}": m.probs for i, m in enumerate(out.maps)}


def run_vae(module: nn.Module, images: Tensor, latents: Tensor) -> Named:
    """diffusers' VAE, both ways."""
    posterior = module.encode(images).latent_dist
    return {"mean": posterior.mean, "logvar": posterior.logvar, "images": module.decode(latents).sample}


def run_our_vae(module: nn.Module, images: Tensor, latents: Tensor) -> Named:
    """bas's VAE, both ways."""
    posterior = module.encode(images)
    return {"mean": posterior.mean, "logvar": posterior.logvar, "images": module.decode(latents)}


TIMESTEPS = torch.tensor([7, 981])
IDS = torch.tensor([[58, 3, 17, 42, 5, 59, 0, 0], [58, 9, 9, 59, 0, 0, 0, 0]])


def with_probs(module: nn.Module, *inputs: Tensor) -> Named:
    """A layer of bas that returns (out, probs)."""
    out, probs = module(*inputs, with_probs=True)
    return {"sample": out, "probs": probs}


CASES: dict[str, Case] = {
    "time-embedding": Case(
        lambda: layers.TimeEmbedding(16, 64), lambda: diffusers_time_embedding(16, 64), {"features": (3, 16)}
    ),
    "resnet": Case(
        lambda: layers.ResnetBlock(16, 16, 24, 4, 1e-5),
        lambda: diffusers_resnet(16, 16, 24, 4, 1e-5),
        {"x": (2, 16, 6, 5), "time": (2, 24)},
    ),
    "resnet-shortcut": Case(
        lambda: layers.ResnetBlock(16, 24, 24, 8, 1e-5),
        lambda: diffusers_resnet(16, 24, 24, 8, 1e-5),
        {"x": (2, 16, 6, 5), "time": (2, 24)},
    ),
    "resnet-without-time": Case(
        lambda: layers.ResnetBlock(8, 12, None, 4, 1e-6),
        lambda: diffusers_resnet(8, 12, None, 4, 1e-6),
        {"x": (2, 8, 6, 5)},
        run_theirs=lambda module, x: module(x, None),
    ),
    "downsample-unet": Case(
        lambda: layers.Downsample(8, pad_all_around=True),
        lambda: diffusers_resample("down", 8, padding=1, name="op"),
        {"x": (2, 8, 6, 10)},
    ),
    "downsample-vae": Case(
        lambda: layers.Downsample(8, pad_all_around=False),
        lambda: diffusers_resample("down", 8, padding=0, name="op"),
        {"x": (2, 8, 6, 10)},
    ),
    "upsample": Case(lambda: layers.Upsample(8), lambda: diffusers_resample("up", 8), {"x": (2, 8, 3, 5)}),
    "feed-forward": Case(lambda: attention.FeedForward(16), lambda: diffusers_feed_forward(16), {"x": (2, 7, 16)}),
    "self-attention": Case(
        lambda: attention.SelfAttention(24, 3),
        lambda: diffusers_attention(24, None, 3),
        {"x": (2, 15, 24)},
    ),
    "cross-attention": Case(
        lambda: attention.CrossAttention(24, 10, 3),
        lambda: diffusers_attention(24, 10, 3),
        {"x": (2, 15, 24), "context": (2, 7, 10)},
        with_probs,
        run_cross_attention,
    ),
    "transformer-block": Case(
        lambda: attention.TransformerBlock(24, 10, 3),
        lambda: diffusers_transformer_block(24, 10, 3),
        {"x": (2, 15, 24), "context": (2, 7, 10)},
        with_probs,
        run_transformer_block,
    ),
    **{
        f"spatial-transformer-{name}": Case(
            lambda linear=linear: attention.SpatialTransformer(24, 10, 3, 4, linear),
            lambda linear=linear: diffusers_spatial_transformer(24, 10, 3, 4, linear),
            {"x": (2, 24, 3, 5), "context": (2, 7, 10)},
            with_probs,
            run_spatial_transformer,
        )
        for name, linear in (("sd1", False), ("sd2", True))
    },
    "vae-attention": Case(
        lambda: vae.SpatialAttention(16, 4), lambda: diffusers_vae_attention(16, 4), {"x": (2, 16, 3, 5)}
    ),
    **{
        f"unet-{name}": Case(
            lambda config=config: UNet(UNetConfig.from_json(config)),
            lambda config=config: diffusers_unet(config),
            {"latents": (2, 4, 16, 24), "context": (2, 7, config["cross_attention_dim"])},
            run_our_unet,
            run_unet,
        )
        for name, config in UNETS.items()
    },
    **{
        name: Case(
            lambda config=config: vae.VAE(VAEConfig.from_json(config)),
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


# --------------------------------------------------------------------------------------------------------------
# The time features
# --------------------------------------------------------------------------------------------------------------

# (features, cosines first, frequency shift)
SINUSOIDS = ((16, True, 0), (16, False, 0), (15, True, 1), (320, True, 0))
SINUSOID_TIMESTEPS = torch.tensor([0, 1, 20, 499, 981, 999])


def sinusoids() -> Named:
    """diffusers' time features."""
    from diffusers.models.embeddings import get_timestep_embedding

    return {
        f"sinusoid.{dim}.{flip}.{shift}": get_timestep_embedding(SINUSOID_TIMESTEPS, dim, flip, shift)
        for dim, flip, shift in SINUSOIDS
    }


def networks() -> Named:
    """Everything that networks.safetensors holds."""
    return sinusoids() | {f"{name}/{key}": value for name in CASES for key, value in condense(theirs(name)).items()}


# --------------------------------------------------------------------------------------------------------------
# Sampling runs
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One sampling run over a made-up model, long enough to show any difference in the arithmetic."""

    sampler: str
    prediction: str
    spacing: str
    offset: int
    steps: int
    eta: float = 0.0
    alpha_to_one: bool = False

    @property
    def name(self) -> str:
        """The key of the run in schedulers.safetensors."""
        return "/".join(str(value) for value in vars(self).values())

    def schedule(self) -> dict:
        """The scheduler_config.json of the run."""
        return {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": self.prediction,
            "timestep_spacing": self.spacing,
            "steps_offset": self.offset,
        }


RUNS = [
    Run(sampler, prediction, spacing, offset, steps, eta, alpha_to_one)
    for sampler in ("ddim", "ddpm", "dpmpp_2m")
    for prediction in ("epsilon", "v_prediction")
    for spacing in ("leading", "trailing", "linspace")
    for offset in (0, 1)
    for steps in (1, 7, 30)
    for eta, alpha_to_one in (((0.0, False), (1.0, False), (0.5, True)) if sampler == "ddim" else ((0.0, False),))
]
LATENTS = (1, 2, 3, 3)


def made_up_model(z: Tensor, t: int) -> Tensor:
    """Stands in for a UNet: smooth, and different at every timestep. -> the shape of z"""
    return torch.tanh(0.8 * z.roll(1, -1) - 0.4 * z + t / 1000)


def diffusers_scheduler(run: Run):
    """diffusers' scheduler for a run, its timesteps set, its float32 tables widened so that rounding does not show."""
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    if run.sampler == "ddim":
        scheduler = DDIMScheduler(**run.schedule(), clip_sample=False, set_alpha_to_one=run.alpha_to_one)
    elif run.sampler == "ddpm":
        scheduler = DDPMScheduler(**run.schedule(), clip_sample=False)
    else:
        scheduler = DPMSolverMultistepScheduler(
            **run.schedule(), algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
        )
    scheduler.set_timesteps(run.steps)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def diffusers_trajectory(run: Run) -> Tensor:
    """The latents after each step of diffusers' scheduler. -> (steps, *LATENTS) float64"""
    from unittest.mock import patch

    scheduler, z, trajectory = diffusers_scheduler(run), uniform("z", *LATENTS).double(), []
    for i, t in enumerate(scheduler.timesteps.tolist()):
        output, noise = made_up_model(z, t), uniform(f"noise{i}", *LATENTS).double()
        options = {"eta": run.eta, "variance_noise": noise} if run.sampler == "ddim" else {}
        with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise):
            z = scheduler.step(output, t, z, **options).prev_sample
        trajectory.append(z)
    return torch.stack(trajectory)


def diffusers_timesteps(run: Run) -> Tensor:
    """The timesteps of a run. -> (steps,) int64"""
    return diffusers_scheduler(run).timesteps


def diffusers_training_pairs(prediction: str) -> Named:
    """diffusers' noisy latents and training targets."""
    scheduler = diffusers_scheduler(Run("ddpm", prediction, "leading", 0, 1))
    z0, eps, t = uniform("z0", 4, 2, 3, 3).double(), uniform("eps", 4, 2, 3, 3).double(), TRAINING_TIMESTEPS
    target = eps if prediction == "epsilon" else scheduler.get_velocity(z0, eps, t)
    return {f"{prediction}/noisy": scheduler.add_noise(z0, eps, t), f"{prediction}/target": target}


TRAINING_TIMESTEPS = torch.tensor([0, 1, 500, 999])


def schedules() -> Named:
    """Everything that schedulers.safetensors holds."""
    trajectories = {f"{run.name}/latents": diffusers_trajectory(run) for run in RUNS}
    timesteps = {f"{run.name}/timesteps": diffusers_timesteps(run) for run in RUNS}
    return trajectories | timesteps | diffusers_training_pairs("epsilon") | diffusers_training_pairs("v_prediction")


FILES = {"networks": networks, "schedulers": schedules}


def main() -> None:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    check = parser.parse_args().check
    for name, make in FILES.items():
        path, values = REFERENCE / f"{name}.safetensors", make()
        values = {key: value.contiguous() for key, value in values.items()}
        if not check:
            REFERENCE.mkdir(parents=True, exist_ok=True)
            save_file(values, path)
            print(f"{path}: {len(values)} tensors, {path.stat().st_size / 1e6:.1f} MB")
            continue
        stored = load_file(path)
        if stored.keys() != values.keys():
            raise SystemExit(f"{path}: other tensors than {parser.prog} makes")
        worst = max((stored[key] - value).abs().max().item() for key, value in values.items())
        print(f"{path}: {len(values)} tensors, largest difference {worst:.1e}")


if __name__ == "__main__":
    main()
