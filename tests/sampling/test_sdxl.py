"""SDXL's images: prompts, guidance and denoising as diffusers' pipeline has them, from the same noise."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bas.config import SampleConfig
from bas.models.text import Conditioning, encode_ids, tokenize
from bas.models.unet import UNetOutput
from bas.pretrained.folder import load, save_model
from bas.sampling import sampler as sampler_module
from bas.sampling.prompt_strength import encode_negative, encode_prompts
from bas.sampling.sampler import (
    decode,
    denoise,
    denoising_timesteps,
    generate,
    guided_output,
    standard_normal,
)
from bas.schedulers import NoiseSchedule, initial_scale
from tests.helpers.families import tiny

PROMPTS = ["a photo of a bowl at the beach", "", "a stone and the creature", "a photo of the " * 30]


@pytest.fixture(scope="module")
def models():
    return tiny("sdxl")


@pytest.fixture(scope="module")
def pipeline(models, tmp_path_factory):
    """diffusers' pipeline of the saved folder, with Euler as SDXL's own files say."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reference")
    folder = tmp_path_factory.mktemp("sdxl")
    save_model(models, folder)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline, prompt, start, steps=10, **options):
    """The image (1, 3, H, W) in 0..1 that diffusers makes from this noise, of variance 1."""
    with torch.no_grad():
        return pipeline(
            prompt,
            num_inference_steps=steps,
            latents=start,
            output_type="pt",
            height=8 * start.shape[-2],
            width=8 * start.shape[-1],
            **options,
        ).images


def test_prompts_are_encoded_as_diffusers_does(models, pipeline):
    """States and pooled text of four prompts, one beyond 77 tokens, to the bit."""
    with torch.no_grad():
        ours = encode_ids(models.text_encoders, tokenize(models.tokenizer, PROMPTS))
        states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(ours.states, states)
    assert torch.equal(ours.pooled, pooled)


@pytest.mark.parametrize(("negative", "size"), [(None, (64, 64)), ("a stone", (64, 96))])
def test_images_are_those_of_diffusers(models, pipeline, negative, size):
    """Ten guided steps; without a negative prompt the states are zeros; square and oblong."""
    config = SampleConfig(height=size[0], width=size[1], num_inference_steps=10, negative_prompt=negative or "")
    config = replace(config, guidance_scale=5.0)
    start = standard_normal((4, size[0] // 8, size[1] // 8), [torch.Generator().manual_seed(3)])
    ours = decode(models, generate([PROMPTS[0]], [3], models, config))
    expected = theirs(pipeline, PROMPTS[0], start, guidance_scale=5.0, negative_prompt=negative)
    assert (ours - expected).abs().max() < 1e-5
    assert ours.std() > 0.01


def test_an_empty_negative_prompt_is_zeros_only_where_the_model_says_so(models):
    with torch.no_grad():
        zeros = encode_negative(models, "", 2)
        other = encode_negative(replace(models, zeros_for_empty=False), "", 2)
    assert (zeros.states.shape, zeros.pooled.shape) == ((2, 77, 192), (2, 96))
    assert not zeros.states.any()
    assert not zeros.pooled.any()
    assert other.states.abs().max() > 0.1
    assert other.pooled.abs().max() > 0.1


def test_a_strength_changes_the_pooled_text_too(models):
    """Twice the strength is twice the way from the states without the word; 1 changes nothing."""
    with torch.no_grad():
        gone, plain, twice = (
            encode_prompts(models.text_encoders, models.tokenizer, [f"a photo of (bowl:{s}) and the stone"])
            for s in (0, 1, 2)
        )
        bare = encode_prompts(models.text_encoders, models.tokenizer, ["a photo of bowl and the stone"])
    for a, b, c, d in zip(gone, plain, twice, bare, strict=True):
        assert torch.equal(b, d)
        torch.testing.assert_close(c, 2 * b - a, atol=1e-5, rtol=0)
        assert (b - a).abs().max() > 1e-3


def test_the_vae_computes_in_float32_under_autocast(models):
    """To the bit, as without autocast; a VAE whose file allows 16 bits does not."""
    z = standard_normal((4, 8, 8), [torch.Generator().manual_seed(0)])
    expected = decode(models, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode(models, z), expected)
        models.vae.config = replace(models.vae.config, force_upcast=False)
        try:
            assert not torch.equal(decode(models, z), expected)
        finally:
            models.vae.config = replace(models.vae.config, force_upcast=True)


def test_half_precision_leaves_the_vae_in_float32(models, tmp_path):
    """Sampling with fp16 weights: no pixel is NaN."""
    save_model(models, tmp_path, torch.float16)
    half = load(tmp_path, dtype=torch.float16)
    image = decode(half, generate(["a bowl"], [0], half, SampleConfig(height=64, width=64, num_inference_steps=2)))
    assert (half.vae.post_quant_conv.weight.dtype, bool(image.isfinite().all())) == (torch.float32, True)


def invented(z, t):
    """What no network predicts: smooth in the latents and in the timestep."""
    return torch.sin(1.3 * z + 0.001 * t) + 0.2 * z


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", None])
@pytest.mark.parametrize(("sampler", "theirs"), [("euler", "EulerDiscrete"), ("euler_a", "EulerAncestralDiscrete")])
def test_eulers_samplers_are_those_of_diffusers(sampler, theirs, spacing, prediction_type, monkeypatch):
    """Whole runs of 1, 7 and 20 steps over an invented model, from the same noise and with the same noise added.

    Where the model says nothing of the spacing, each has the one of its class in diffusers.
    """
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reference")
    settings = {"steps_offset": 1, "prediction_type": prediction_type}
    settings |= {"timestep_spacing": spacing} if spacing else {}
    schedule = NoiseSchedule(**settings)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, f"{theirs}Scheduler")(**betas, **settings)
    monkeypatch.setattr(sampler_module, "guided_output", lambda m, z, t, *_: UNetOutput(invented(z, t), []))
    for steps in (1, 7, 20):
        config = SampleConfig(num_inference_steps=steps, sampler=sampler)
        eps = standard_normal((4, 8, 8), [torch.Generator().manual_seed(0)])
        first = denoising_timesteps(schedule, config)[0]
        models = SimpleNamespace(schedule=schedule, guidance_scale=7.5)
        start = eps * initial_scale(schedule, first, sampler)
        ours = denoise(models, start, None, None, config, [torch.Generator().manual_seed(1)])
        scheduler.set_timesteps(steps)
        x, generator = eps * scheduler.init_noise_sigma, torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            output = invented(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        assert (ours - x).abs().max() < 1e-5 * x.abs().max()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_karras_spacing_is_that_of_diffusers(prediction_type, monkeypatch):
    """DPM++ 2M Karras: whole runs of 2, 7 and 20 steps; the model sees the timestep nearest to each place."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reference")
    schedule = NoiseSchedule(prediction_type=prediction_type)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DPMSolverMultistepScheduler(**betas, prediction_type=prediction_type, use_karras_sigmas=True)
    seen = []

    def output(models, z, t, *_):
        seen.append(t)
        return UNetOutput(invented(z, t), [])

    monkeypatch.setattr(sampler_module, "guided_output", output)
    for steps in (2, 7, 20):
        config = SampleConfig(num_inference_steps=steps, sampler="dpmpp_2m_karras")
        x = start = standard_normal((4, 8, 8), [torch.Generator().manual_seed(0)])
        models = SimpleNamespace(schedule=schedule, guidance_scale=7.5)
        seen.clear()
        ours = denoise(models, start, None, None, config, [])
        scheduler.set_timesteps(steps)
        assert seen == scheduler.timesteps.tolist()
        for t in scheduler.timesteps:
            x = scheduler.step(invented(x, t), t, x).prev_sample
        assert (ours - x).abs().max() < 1e-5 * x.abs().max()


def test_a_model_without_signal_at_its_end_is_sampled_as_in_diffusers(models, tmp_path):
    """Zero terminal SNR: DPM++ 2M, where diffusers leaves a signal of 2^-12, and DDIM, where it leaves none. Euler
    begins at a noise of 4096 there, whose float32 is no finer than 2e-4."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reference")
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    velocity = replace(models, schedule=replace(models.schedule, **settings))
    save_model(velocity, tmp_path)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    plain, start = pipeline.scheduler, standard_normal((4, 8, 8), [torch.Generator().manual_seed(3)])
    for sampler, name, most in (
        ("dpmpp_2m", "DPMSolverMultistepScheduler", 1e-5),
        ("ddim", "DDIMScheduler", 1e-5),
        ("euler", "EulerDiscreteScheduler", 1e-3),
    ):
        pipeline.scheduler = getattr(diffusers, name).from_config(plain.config)
        for steps in (1, 7):
            config = SampleConfig(height=64, width=64, num_inference_steps=steps, guidance_scale=4.0, sampler=sampler)
            ours = generate([PROMPTS[0]], [3], velocity, config)
            with torch.no_grad():
                expected = pipeline(
                    PROMPTS[0], num_inference_steps=steps, guidance_scale=4.0, latents=start, output_type="latent"
                ).images
            assert (ours - expected).abs().max() < most * expected.abs().max(), (sampler, steps)


def test_guidance_rescaled_keeps_the_spread_of_the_prompts_own_prediction():
    """As diffusers' rescale_noise_cfg: wholly, by a share, and not at all."""
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl")

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_in = torch.nn.Conv2d(1, 1, 1)

        def forward(self, z, *_):
            return UNetOutput(outputs, [])

    outputs = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states, z = Conditioning(torch.zeros(2, 77, 8)), torch.zeros(2, 4, 8, 8)
    plain = outputs[:2] + 5 * (outputs[2:] - outputs[:2])
    for share in (0.0, 0.7, 1.0):
        found = guided_output(SimpleNamespace(unet=Fixed()), z, 5, states, states, 5.0, rescale=share).sample
        expected = pipelines.rescale_noise_cfg(plain, outputs[2:], guidance_rescale=share)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert (found.std(dim=(1, 2, 3)) - outputs[2:].std(dim=(1, 2, 3))).abs().max() < 1e-5
