"""From a prompt to images: guided denoising from pure noise (paper, section 4; Ho and Salimans 2022 for guidance)."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bas.config import SampleConfig
from bas.data.batches import encode_images
from bas.errors import NotFiniteError
from bas.io.images import to_images
from bas.losses import average_maps
from bas.models.bundle import Models, ModelSpec
from bas.models.text import Conditioning, join, tokenize
from bas.models.unet import AttentionMap, Hide, ReturnMaps, UNetOutput
from bas.runtime.device import DTYPES
from bas.runtime.progress import ImageProgress
from bas.sampling.layout import cells_inside
from bas.sampling.own_pixels import left_out, paste
from bas.sampling.prompt_strength import bare_handles, encode_negative, encode_prompts, read_prompt, unread_weights
from bas.sampling.steer import Steer, Steering, check_steer, plan_steering, read_steer
from bas.schedulers import (
    EULER,
    KARRAS,
    NoiseSchedule,
    add_noise,
    clean_and_noise,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    earlier_step,
    initial_scale,
    previous_timestep,
    sampling_timesteps,
    seen_by,
    used_spacing,
)

log = logging.getLogger(__name__)


def sample(
    models: Models,
    prompts: str | list[str],
    config: SampleConfig | None = None,
    steer: Steer | None = None,
    **overrides,
) -> list[Image.Image]:
    """Generate `num_images` images for each prompt, prompt by prompt.

    Settings come from `config`; single ones can be given by name: `sample(models, "a photo of <asset0>", seed=3)`.
    `steer` takes the place of the settings `separate`, `layout` and `own_pixels`.
    Image i of each prompt depends on seed + i alone, not on the batch in which it is generated.
    InputError for unknown handles, for sizes that the model cannot take and for a wrong layout, NotFiniteError for
    numbers that are not finite.
    """
    config = (config or SampleConfig()).changed(**overrides)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    steer = steer or read_steer(config)
    check_request(models.spec, prompts, config, steer)
    return list(sample_each(models, prompts, config, steer=steer))


def check_request(spec: ModelSpec, prompts: list[str], config: SampleConfig, steer: Steer | None = None) -> None:
    """Check handles, strengths, sizes, steps and layouts before any weight is read. InputError for what is wrong.

    Warn of what is likely a slip: a handle without its brackets, a weight that is not read, a setting without effect.
    """
    check_settings(spec, config)
    for prompt in prompts:
        tokenize(spec.tokenizer, [read_prompt(prompt).text])
    if steer := steer or read_steer(config):
        check_steer(spec, prompts, steer, latent_shape(spec, config)[1:])
    for setting, reason in without_effect(spec, config).items():
        log.warning("--%s has no effect: %s", setting, reason)
    for prompt in (*prompts, config.negative_prompt):
        if bare := bare_handles(prompt, spec.handles):
            log.warning("%r: for the concept write %s, with < >", prompt, " ".join(bare))
    warn_of_weights([*prompts, config.negative_prompt])


def warn_of_weights(prompts: Iterable[str]) -> None:
    """Warn of other tools' syntax that stays text. InputError for weights around a handle, and for <lora:NAME:1>."""
    for piece in dict.fromkeys(piece for prompt in prompts for piece in unread_weights(prompt)):
        log.warning("%r stays text: bas reads weights as (words:1.3) or (<asset0>:1.3)", piece)


def check_settings(spec: ModelSpec, config: SampleConfig) -> None:
    """Check what `check_request` checks without a prompt, without its warnings."""
    latent_shape(spec, config)
    denoising_timesteps(spec.schedule, config)
    tokenize(spec.tokenizer, [read_prompt(config.negative_prompt).text])


def without_effect(spec: ModelSpec, config: SampleConfig) -> dict[str, str]:
    """Settings that were given but change nothing: the reason by name."""
    unused = {}
    if config.eta and config.sampler != "ddim":
        unused["eta"] = f"only --sampler ddim adds this noise, and the sampler is {config.sampler}"
    if (scale := guidance_scale(spec, config)) <= 1:
        off = [name for name in ("negative_prompt", "guidance_rescale") if getattr(config, name)]
        unused |= dict.fromkeys(off, f"--guidance_scale {scale:g} turns guidance off")
    if config.steps_offset is not None:
        spacing = used_spacing(spec.schedule, config.sampler)
        if spacing != "leading":
            unused["steps_offset"] = f"the timesteps of --sampler {config.sampler} are spaced as {spacing!r} here"
    return unused


def guidance_scale(model: ModelSpec | Models, config: SampleConfig) -> float:
    """Return the guidance scale that is asked for, or else the model's own."""
    return model.guidance_scale if config.guidance_scale is None else config.guidance_scale


def as_record(models: Models, config: SampleConfig) -> dict[str, Any]:
    """Return all settings as an image file keeps them: with the guidance scale and the precision that were taken."""
    dtype = models.unet.conv_in.weight.dtype
    precision = next(name for name, kind in DTYPES.items() if kind == dtype and name != "no")
    return asdict(config) | {"guidance_scale": guidance_scale(models, config), "precision": precision}


def sample_each(
    models: Models,
    prompts: list[str],
    config: SampleConfig,
    progress: ImageProgress | None = None,
    steer: Steer | None = None,
) -> Iterator[Image.Image]:
    """Yield the images of `sample`, one by one, each as soon as its batch is done. `progress` counts the steps."""

    def count(_i: int, _t: float, z: Tensor, _maps: list[AttentionMap]) -> Tensor:
        if progress:
            progress.step(len(z))
        return z

    steer = steer or read_steer(config)  # once: the files may change while images are generated
    jobs = [(prompt, config.seed + i) for prompt in prompts for i in range(config.num_images)]
    for start in range(0, len(jobs), config.batch_size):
        batch = jobs[start : start + config.batch_size]
        texts, seeds = [prompt for prompt, _ in batch], [seed for _, seed in batch]
        steering = plan_steering(models.spec, texts, steer, latent_shape(models.spec, config)[1:]) if steer else None
        latents = generate(texts, seeds, models, config, count, steering=steering)
        yield from to_images(decode(models, latents))


# Sees (i, prev_t, z, maps): the latents after step i, now at timestep prev_t (below 0 at the end), and the attention
# maps of the prompt in this step, those that were asked for. Returns the latents to go on with.
OnStep = Callable[[int, float, Tensor, list[AttentionMap]], Tensor]


@torch.inference_mode()
def generate(
    prompts: list[str],
    seeds: list[int],
    models: Models,
    config: SampleConfig,
    on_step: OnStep | None = None,
    return_maps: ReturnMaps = False,
    steering: Steering | None = None,
) -> Tensor:
    """Denoise one latent per prompt and seed. -> (b, c, h, w) float32, scaled as the UNet sees them

    `on_step` and `return_maps` as in `denoise`, and its NotFiniteError. Without `steering` the settings decide it.
    """
    _, *latent = latent_shape(models.spec, config)
    if steering is None and (steer := read_steer(config)):
        steering = plan_steering(models.spec, prompts, steer, (latent[0], latent[1]))
    context = encode_prompts(models.text_encoders, models.tokenizer, prompts)
    negative = encode_negative(models, config.negative_prompt, len(prompts))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = standard_normal(latent_shape(models.spec, config), generators).to(models.device)
    start, timesteps = 0, denoising_timesteps(models.schedule, config)
    if steering is not None and steering.segments is not None:
        start = left_out(config.num_inference_steps)
        z = start_from_pixels(models, z, steering, timesteps[start])
    else:
        z = z * initial_scale(models.schedule, timesteps[0], config.sampler)
    return denoise(models, z, context, negative, config, generators, on_step, start, return_maps, steering)


def start_from_pixels(models: Models, eps: Tensor, steering: Steering, t: float) -> Tensor:
    """Noise the concepts' own pixels in a layout to timestep t. eps: (b, c, h, w), noise; elsewhere it stays alone."""
    factor, (h, w) = models.vae.config.factor, eps.shape[-2:]
    images, insides = [], []
    for named in steering.present.tolist():
        own = {h: s for h, s in (steering.segments or {}).items() if named[steering.handles.index(h)]}
        image, mask = paste(own, steering.steer.layout or {}, factor * h, factor * w)
        images.append(image)
        insides.append(cells_inside(mask[0].numpy(), h, w))
    z0 = encode(models, images) * torch.stack(insides)[:, None].to(eps.device)
    return add_noise(models.schedule, z0, eps, torch.full((len(eps),), round(t)))


def generate_with_maps(
    prompts: list[str],
    seeds: list[int],
    models: Models,
    config: SampleConfig,
    grid: tuple[int, int],
    progress: ImageProgress | None = None,
    steering: Steering | None = None,
) -> tuple[Tensor, Tensor]:
    """`generate`, and the attention to each token of the prompts, averaged over steps, heads and layers.

    grid: (gh, gw) of the layers that are averaged. -> latents (b, c, h, w), maps (b, gh, gw, 77)
    """
    averages: list[Tensor] = []

    def collect(_i: int, _t: float, z: Tensor, maps: list[AttentionMap]) -> Tensor:
        averages.append(average_maps(maps))
        if progress:
            progress.step(len(z))
        return z

    latents = generate(prompts, seeds, models, config, collect, grid, steering)
    return latents, torch.stack(averages).mean(dim=0)


def denoise(
    models: Models,
    z: Tensor,
    context: Conditioning,
    negative: Conditioning,
    config: SampleConfig,
    generators: list[torch.Generator],
    on_step: OnStep | None = None,
    start: int = 0,
    return_maps: ReturnMaps = False,
    steering: Steering | None = None,
) -> Tensor:
    """Denoise z step by step until it is a clean latent. z: (b, c, h, w) float32; context, negative: b rows

    `start` skips that many of the noisiest steps. `on_step` sees the latents after each of the others, with the
    attention maps that `return_maps` asks for, and may change them. `steering` changes the latents before each step,
    and which cells see the handles' tokens. NotFiniteError if the result is not finite.
    """
    if steering is not None:
        steering.to(z.device)
    schedule, hide = seen_by(models.schedule, config.sampler), steering.hide if steering is not None else None
    scale, eta = guidance_scale(models, config), EULER.get(config.sampler, config.eta)
    timesteps = denoising_timesteps(schedule, config)
    last = None
    for i, t in list(enumerate(timesteps))[start:]:
        prev_t = previous_timestep(schedule, timesteps, i, config.sampler)
        if steering is not None and steering.due(i, len(timesteps)):
            z = steering.update(models, z, round(t), context)
        told = t if config.sampler in EULER else round(t)
        output, maps = guided_output(
            models, z, told, context, negative, scale, return_maps, hide, config.guidance_rescale
        )
        if config.sampler in ("dpmpp_2m", KARRAS):
            z0, _ = clean_and_noise(schedule, z, output, t)
            earlier = earlier_step(last, prev_t, len(timesteps))
            z, last = dpmpp_2m_step(schedule, z, z0, t, prev_t, earlier), (z0, t)
        else:
            random = config.sampler == "ddpm" or eta > 0
            noise = standard_normal(z.shape[1:], generators).to(z.device) if random else None
            if config.sampler == "ddpm" and noise is not None:
                z = ddpm_step(schedule, z, output, t, prev_t, noise)
            else:
                z = ddim_step(schedule, z, output, t, prev_t, eta, noise)
        if on_step is not None:
            z = on_step(i, prev_t, z, maps)
    if steering is not None and steering.skipped:
        log.warning("%d updates of steering were skipped: their gradient is not finite", steering.skipped)
    if not z.isfinite().all():
        raise NotFiniteError(f"denoising in {arithmetic(models)} gives numbers that are not finite: {advice(models)}")
    return z


def guided_output(
    models: Models,
    z: Tensor,
    t: float,
    context: Conditioning,
    negative: Conditioning,
    scale: float,
    return_maps: ReturnMaps = False,
    hide: Hide | None = None,
    rescale: float = 0.0,
) -> UNetOutput:
    """Predict with classifier-free guidance (Ho and Salimans 2022): negative + scale (prompt - negative).

    A scale of 1 or less turns guidance off, as in diffusers: the result is the prompt's prediction alone.
    -> sample (b, c, h, w) float32; maps (b, heads, h, w, k) of the prompt, those that `return_maps` asks for. `hide`
    says which tokens of the prompt the cells may not look at, (b, h x w, k) by grid. `rescale`, from 0 to 1, brings the
    standard deviation of each image's prediction back to that of the prompt's own (Lin et al. 2024, section 3.4).
    """
    dtype = models.unet.conv_in.weight.dtype
    timesteps = torch.full((len(z),), t, device=z.device)
    if scale <= 1:
        states, pooled = context.each(lambda tensor: tensor.to(dtype))
        output, maps = models.unet(z.to(dtype), timesteps, states, return_maps, hide, pooled)
        return UNetOutput(output.float(), maps)
    states, pooled = join([negative, context]).each(lambda tensor: tensor.to(dtype))
    hide = {grid: torch.cat([torch.zeros_like(tokens), tokens]) for grid, tokens in (hide or {}).items()}
    output, maps = models.unet(torch.cat([z, z]).to(dtype), timesteps.repeat(2), states, return_maps, hide, pooled)
    unconditional, conditional = output.float().chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    if rescale:
        own, far = (prediction.std(dim=(1, 2, 3), keepdim=True) for prediction in (conditional, guided))
        guided = rescale * (guided * (own / far)) + (1 - rescale) * guided
    return UNetOutput(guided, [m._replace(probs=m.probs[len(z) :]) for m in maps])


def denoising_timesteps(schedule: NoiseSchedule, config: SampleConfig) -> Sequence[float]:
    """Return the timesteps of a sampling run, noisiest first. InputError for more than the model was trained with."""
    if config.steps_offset is not None:
        schedule = replace(schedule, steps_offset=config.steps_offset)
    return sampling_timesteps(schedule, config.num_inference_steps, config.sampler)


def latent_shape(spec: ModelSpec, config: SampleConfig) -> tuple[int, int, int]:
    """(c, h, w) of the latents for the image size asked for. Raises InputError for a size the model cannot take."""
    sides = []
    for name in ("height", "width"):
        side = getattr(config, name) or spec.resolution
        spec.check_side(f"--{name}", side)
        sides.append(side // spec.vae.factor)
    spec.grids(*sides)
    return spec.unet.in_channels, *sides


def standard_normal(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Sample noise on the CPU, one generator per image, so that a seed means the same on every device. (b, *shape)"""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.inference_mode()
def decode(models: Models, latents: Tensor) -> Tensor:
    """Decode latents (b, c, h, w) as the UNet sees them. -> images (b, 3, H, W) float32 in [0, 1]

    An image that overflows is decoded once more in float32. NotFiniteError if it is not finite there either.
    """
    vae = models.vae
    z = latents / vae.config.scaling_factor
    with models.vae_arithmetic():
        images = vae.decode(z.to(vae.post_quant_conv.weight.dtype)).float()
    broken = ~images.flatten(1).isfinite().all(dim=1)
    if broken.any() and arithmetic(models) != "float32":
        log.warning("the decoder overflows in %s: %d images are decoded in float32", arithmetic(models), broken.sum())
        with torch.autocast(models.device.type, enabled=False):
            images[broken] = with_float32_vae(models).vae.decode(z[broken].float())
        broken = ~images.flatten(1).isfinite().all(dim=1)
    if broken.any():
        raise NotFiniteError(
            "the decoder gives numbers that are not finite, even in float32: the model's VAE is damaged"
        )
    return (images / 2 + 0.5).clamp(0, 1)


def encode(models: Models, images: list[Tensor]) -> Tensor:
    """Encode images (3, H, W) into latents (b, c, h, w) as the UNet sees them, again in float32 if that overflows."""
    mean = encode_images(models, torch.stack(images)).mean
    if not mean.isfinite().all():
        mean = encode_images(with_float32_vae(models), torch.stack(images)).mean
    return (mean * models.vae.config.scaling_factor).to(models.device)


def with_float32_vae(models: Models) -> Models:
    """Return the same models with a copy of the VAE in float32, for images whose numbers are beyond 16 bits."""
    return replace(models, vae=deepcopy(models.vae).float())


def arithmetic(models: Models) -> str:
    """Return the number format in which the networks compute now, as PyTorch names it: "float16"."""
    kind, dtype = models.device.type, models.unet.conv_in.weight.dtype
    return str(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype).removeprefix("torch.")


def advice(models: Models) -> str:
    """Return what to do about numbers that are not finite."""
    if arithmetic(models) == "float16":
        training = torch.is_autocast_enabled(models.device.type)
        return f"float16 overflowed; use bf16 or {'no as --mixed_precision' if training else 'fp32 as --precision'}"
    return "lower --guidance_scale, or name a model whose weights are sound"
