"""Sampling: one seed one image, guidance as defined, sizes, samplers, prompts."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bas.cli.commands import sample as sample_command
from bas.cli.entry import main
from bas.cli.open_model import open_model
from bas.config import SampleConfig
from bas.errors import NotFiniteError, RunError
from bas.io.figures import grid, grid_size
from bas.io.images import save_image
from bas.pretrained.folder import save_model
from bas.runtime import device as machine
from bas.sampling import sampler
from bas.sampling.prompt_strength import encode_prompts
from bas.sampling.sampler import check_request, decode, generate, guided_output, sample
from tests.helpers.tiny import refused, taught

PROMPT = "a photo of <asset1> at the beach"
FAST = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def models(bench):
    """The tiny model with the handles <asset0> and <asset1>."""
    return taught(bench.model)


def latents(models, prompts=(PROMPT,), seeds=(0,), **changes):
    """Clean latents of prompts and seeds, made in one batch."""
    return generate(list(prompts), list(seeds), models, SampleConfig(**FAST | changes))


def numbers(images) -> np.ndarray:
    """Images as one array of whole numbers."""
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("changes", [{}, {"eta": 0.7}, {"sampler": "ddpm"}, {"sampler": "dpmpp_2m"}])
def test_an_image_depends_on_its_seed_alone(models, changes):
    """Three seeds together and each alone, also where every step draws noise."""
    together = latents(models, [PROMPT] * 3, (4, 5, 6), guidance_scale=2.0, **changes)
    for i, seed in enumerate((4, 5, 6)):
        alone = latents(models, seeds=(seed,), guidance_scale=2.0, **changes)[0]
        assert (together[i] - alone).abs().max() < 1e-5 * alone.abs().max()
    assert (together[0] - together[1]).abs().max() > 0.1
    assert together.isfinite().all()


def test_samplers_differ_and_repeat(models):
    choices = [{}, {"eta": 1.0}, {"sampler": "ddpm"}, {"sampler": "dpmpp_2m"}, {"num_inference_steps": 5}]
    results = [latents(models, **choice) for choice in choices]
    for i, one in enumerate(results):
        assert torch.equal(one, latents(models, **choices[i]))
        assert all((one - other).abs().max() > 1e-3 for other in results[:i])


def test_images_come_prompt_by_prompt_and_seed_by_seed(models):
    """Two prompts, three seeds, batches of four: the same as one call each."""
    prompts = [PROMPT, "a bowl"]
    images = sample(models, prompts, num_images=3, seed=7, batch_size=4, **FAST)
    singles = [sample(models, prompt, seed=seed, **FAST)[0] for prompt in prompts for seed in (7, 8, 9)]
    assert np.abs(numbers(images) - numbers(singles)).max() <= 1
    assert len({image.tobytes() for image in images}) == 6


def test_settings_come_from_a_config_and_by_name(models):
    config = SampleConfig(**FAST, seed=3)
    assert numbers(sample(models, PROMPT, config)).tolist() == numbers(sample(models, PROMPT, seed=3, **FAST)).tolist()
    assert numbers(sample(models, PROMPT, config, seed=4)).tolist() != numbers(sample(models, PROMPT, config)).tolist()


def test_guidance_pushes_away_from_the_negative_prompt(models):
    """negative + scale x (prompt - negative); at 1 or less it is the prompt's prediction alone, as in diffusers."""
    z, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 500
    with torch.inference_mode():
        context, negative = (encode_prompts(models.text_encoders, models.tokenizer, [p]) for p in (PROMPT, "a bowl"))
        for_prompt, for_negative = (models.unet(z, torch.tensor([t]), c.states).sample for c in (context, negative))
        for scale in (0.0, 0.5, 1.0):
            assert torch.equal(guided_output(models, z, t, context, negative, scale).sample, for_prompt)
        for scale in (1.01, 3.0):
            found = guided_output(models, z, t, context, negative, scale).sample
            assert (found - (for_negative + scale * (for_prompt - for_negative))).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0])
def test_guidance_of_one_or_less_ignores_the_negative_prompt(models, scale):
    plain = latents(models, guidance_scale=scale)
    assert torch.equal(plain, latents(models, guidance_scale=scale, negative_prompt="a bowl"))
    assert (plain - latents(models, ("a stone",), guidance_scale=scale)).abs().max() > 1e-3
    assert (plain - latents(models, guidance_scale=7.5)).abs().max() > 1e-3
    assert (latents(models) - latents(models, negative_prompt="a bowl")).abs().max() > 1e-3
    assert (latents(models, negative_prompt=PROMPT) - plain).abs().max() < 1e-5 * plain.abs().max()


def test_sizes(models):
    (image,) = sample(models, PROMPT, height=24, width=40, **FAST)
    assert image.size == (40, 24)
    assert sample(models, PROMPT, **FAST)[0].size == (32, 32)
    for flags, words in (({"height": 31}, ["--height 31", "multiples of 2"]), ({"width": 1}, ["--width 1"])):
        with refused(*words):
            sample(models, PROMPT, **flags)


def test_decoded_latents_become_eight_bit_images(models):
    z = latents(models, seeds=(2,))
    with torch.inference_mode():
        expected = (models.vae.decode(z / 0.18215) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(decode(models, z), expected)
    (image,) = sample(models, PROMPT, seed=2, **FAST)
    assert (numbers([image])[0] == (expected[0].permute(1, 2, 0) * 255).round().numpy()).all()


def test_unknown_handles_are_named_with_the_known_ones(models, bench):
    with refused("<asset7>", "known handles: <asset0>, <asset1>"):
        sample(models, "a photo of <asset7> and <asset1>", **FAST)
    with refused("<asset9>"):
        sample(models, PROMPT, negative_prompt="<asset9>", **FAST)


def test_a_handle_without_brackets_is_told(models, caplog):
    """A name of a pattern in every prompt and in any case."""
    prompts = ["a photo of asset1, at the beach", "<asset1> and asset0", "<asset0> and Asset1", "an asset10", PROMPT]
    check_request(models.spec, prompts, SampleConfig())
    assert caplog.messages == [
        "'a photo of asset1, at the beach': for the concept write <asset1>, with < >",
        "'<asset1> and asset0': for the concept write <asset0>, with < >",
        "'<asset0> and Asset1': for the concept write <asset1>, with < >",
    ]


def test_an_ordinary_word_beside_a_handle_is_meant(models, caplog):
    """But without any handle a prompt that has the word of one is told."""
    spec = replace(models.spec, handles=("<bowl>", "<asset0>"))
    check_request(spec, ["a photo of <asset0> in a bowl", "a bowl", "Bowl"], SampleConfig())
    assert caplog.messages == ["'a bowl': for the concept write <bowl>, with < >"]


def test_a_handle_without_brackets_in_the_negative_prompt_is_told(models, caplog):
    """As people write embeddings of what they do not want."""
    check_request(models.spec, [PROMPT], SampleConfig(negative_prompt="asset1, blurry"))
    check_request(models.spec, [PROMPT], SampleConfig(negative_prompt="<asset1>, blurry"))
    assert caplog.messages == ["'asset1, blurry': for the concept write <asset1>, with < >"]


def test_settings_without_effect_are_told(models, caplog):
    settings = {"sampler": "dpmpp_2m", "eta": 0.5, "guidance_scale": 1.0, "negative_prompt": "a stone"}
    check_request(models.spec, [PROMPT], SampleConfig(**settings))
    assert caplog.messages == [
        "--eta has no effect: only --sampler ddim adds this noise, and the sampler is dpmpp_2m",
        "--negative_prompt has no effect: --guidance_scale 1 turns guidance off",
    ]
    (first,) = sample(models, PROMPT, **FAST | settings)
    (second,) = sample(models, PROMPT, **FAST | settings | {"eta": 0.0, "negative_prompt": ""})
    assert first.tobytes() == second.tobytes()
    caplog.clear()
    check_request(models.spec, [PROMPT], SampleConfig(guidance_scale=0, negative_prompt="a stone"))
    assert caplog.messages == ["--negative_prompt has no effect: --guidance_scale 0 turns guidance off"]
    caplog.clear()
    check_request(models.spec, [PROMPT], SampleConfig(eta=0.5, negative_prompt="a stone"))
    assert caplog.messages == []


def test_long_prompts_are_cut_with_a_warning_but_never_a_handle(models, caplog):
    words = "a photo of the bowl at the beach and " * 10
    sample(models, words, **FAST)
    assert "too long" in caplog.text
    with refused("beyond the 77 tokens"):
        sample(models, words + "<asset0>", **FAST)


def test_more_steps_than_timesteps_are_refused(models):
    with refused("1001 denoising steps"):
        sample(models, PROMPT, num_inference_steps=1001)


# --- Numbers that are not finite ----------------------------------------------------------------------------------


def overflowing(models, network):
    """These models in float16, with last layers whose product float16 cannot hold, though it holds their weights."""
    last = {
        "vae": ("decoder.conv_norm_out", "decoder.conv_out"),
        "unet": ("conv_norm_out", "conv_out"),
        "text_encoder": ("final_layer_norm",),
    }
    modules = dict(getattr(models, network).named_modules())
    for ending in last[network]:
        (layer,) = (module for name, module in modules.items() if name.removeprefix("text_model.") == ending)
        with torch.no_grad():
            layer.weight.mul_(30_000 / layer.weight.abs().max())
    return models.to(dtype=torch.float16)


def test_a_decoder_that_overflows_is_repeated_in_float32(bench, caplog):
    models = overflowing(taught(bench.model), "vae")
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = (models.vae.float().decode(z / 0.18215) / 2 + 0.5).clamp(0, 1)
        models.vae.half()
        assert not models.vae.decode((z / 0.18215).half()).isfinite().all()
    found = decode(models, z)
    assert torch.equal(found, expected)
    assert {parameter.dtype for parameter in models.vae.parameters()} == {torch.float16}
    assert caplog.messages == ["the decoder overflows in float16: 2 images are decoded in float32"]


def test_only_images_that_overflow_are_decoded_again(bench, monkeypatch):
    """The other images of the batch keep their bits."""
    models = taught(bench.model).to(dtype=torch.float16)
    z = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, original = decode(models, z), models.vae.decode

    def broken(latents):
        images = original(latents)
        images[1, 0, 3, 3] = float("inf")
        return images

    monkeypatch.setattr(models.vae, "decode", broken)
    monkeypatch.setattr(sampler, "with_float32_vae", lambda models: replace(models, vae=taught(bench.model).vae))
    found = decode(models, z)
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    assert found[1].isfinite().all()
    assert (found[1] - plain[1]).abs().max() < 0.02


def test_a_decoder_that_is_broken_in_float32_too_ends_the_run(models, monkeypatch):
    monkeypatch.setattr(models.vae, "decode", lambda z: torch.full((len(z), 3, 32, 32), float("nan")))
    with pytest.raises(RunError, match="even in float32: the model's VAE is damaged"):
        sample(models, PROMPT, **FAST)


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_latents_that_are_not_finite_end_the_run_with_advice(bench, network):
    models = overflowing(taught(bench.model), network)
    with pytest.raises(RunError, match=r"denoising in float16 .* not finite: float16 overflowed; use bf16 or fp32"):
        sample(models, PROMPT, **FAST)


@pytest.mark.parametrize("sampler_name", ["ddim", "ddpm", "dpmpp_2m"])
def test_no_sampler_hides_numbers_that_are_not_finite(models, monkeypatch, sampler_name):
    """One value of one step is enough; float32 has other advice."""
    original, calls = models.unet.forward, []

    def broken(*args, **kwargs):
        output = original(*args, **kwargs)
        calls.append(output.sample)
        if len(calls) == 2:
            output.sample[0, 0, 0, 0] = float("nan")
        return output

    monkeypatch.setattr(models.unet, "forward", broken)
    with pytest.raises(RunError, match=r"denoising in float32 .* not finite: lower --guidance_scale"):
        sample(models, PROMPT, sampler=sampler_name, **FAST)


def test_the_command_exits_with_1_and_writes_no_black_image(bench, tmp_path, capsys):
    model = tmp_path / "model"
    save_model(overflowing(taught(bench.model), "unet").to(dtype=torch.float32), model)
    words = ["sample", model, "--prompt", "a bowl", "--num_inference_steps", "2", "--precision", "fp16"]
    assert main([*map(str, words), "--output_path", str(tmp_path / "out" / "x.png")]) == 1
    assert capsys.readouterr().err.endswith("float16 overflowed; use bf16 or fp32 as --precision\n")
    assert not (tmp_path / "out" / "x.png").exists()


# --- Files --------------------------------------------------------------------------------------------------------


def test_an_image_that_would_be_replaced_is_told(bench, tmp_path, caplog):
    words = ["sample", str(bench.model), "--prompt", "a bowl", "--num_inference_steps", "1", "--num_images"]
    out = str(tmp_path / "x.png")
    assert main([*words, "1", "--output_path", out]) == 0
    assert caplog.messages == []
    assert main([*words, "2", "--output_path", out]) == 0  # x-0.png and x-1.png
    assert caplog.messages == []
    assert main([*words, "1", "--output_path", out]) == 0
    assert main([*words, "2", "--output_path", out]) == 0
    assert caplog.messages == [
        f"{tmp_path}/x.png will be replaced; name another file to keep it",
        f"{tmp_path}/x-0.png, x-1.png will be replaced; name another file to keep them",
    ]


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("x.webp", ["--num_images", "90", "--grid"], "pixels, and WEBP holds 16383 a side: name a .png file"),
        ("x.jpg", ["--num_images", "400", "--grid"], "pixels, and JPEG holds 65500 a side: name a .png file"),
        ("x.jpg", ["--negative_prompt", "y " * 40_000], "do not fit a JPEG file: name a .png file"),
    ],
)
def test_an_image_that_its_format_cannot_hold_is_refused_before_it_is_drawn(
    bench, tmp_path, monkeypatch, capsys, name, more, told
):
    monkeypatch.setattr("bas.cli.commands.sample.sample_each", lambda *_: pytest.fail("images are drawn"))
    words = ["sample", str(bench.model), "--prompt", "a bowl", "--output_path", str(tmp_path / name)]
    assert main([*words, *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "too long" not in line]
    assert line.startswith(f"bas: {tmp_path / name}")
    assert line.endswith(told)
    with refused("name a .png file"):
        save_image(Image.new("RGB", (66_000, 1)), tmp_path / name, {"negative_prompt": "y " * 40_000})
    assert list(tmp_path.iterdir()) == []


def test_a_grid_is_as_large_as_it_is_said_to_be():
    rows = [[Image.new("RGB", (9, 6))] * 3, [Image.new("RGB", (9, 6))]]
    labels = [["a long label that takes several lines"] * 3, ["b"]]
    for title in ("", "a title"):
        assert grid(rows, labels, 64, title).size == grid_size(labels, 64, title)


@pytest.mark.parametrize(("last", "code"), [(KeyboardInterrupt, 130), (NotFiniteError("no number"), 1)])
def test_a_grid_holds_what_was_done_when_the_command_was_stopped(bench, tmp_path, monkeypatch, capsys, last, code):
    """Three of two times two images: a row of two, and one below. The grid of an earlier call stays."""

    def stopped(*others):
        yield from (Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")[: left[0]])
        raise last

    monkeypatch.setattr(sample_command, "sample_each", stopped)
    words = ["sample", bench.model, "--prompt", "a", "bowl", "--num_images", 2, "--seed", 5, "--grid"]
    for left in ([3], [1], [0]):
        target = tmp_path / f"grid{left[0]}.png"
        target.write_bytes(b"an earlier grid")
        assert main([*map(str, words), "--output_path", str(target)]) == code
        assert capsys.readouterr().out == (f"{target.with_stem(target.stem + '-partial')}\n" if left[0] else "")
        assert target.read_bytes() == b"an earlier grid"
    with Image.open(tmp_path / "grid3-partial.png") as sheet:
        assert json.loads(sheet.text["bas"])["prompts"] == ["a", "bowl"]
        labels = [["a, seed 5", "a, seed 6"], ["bowl, seed 5"]]
        assert sheet.size == grid_size(labels, 192)
        assert [sheet.getpixel((x, y)) for x, y in [(100, 100), (300, 100), (100, 330)]] == [
            (255, 0, 0),
            (0, 255, 0),
            (0, 0, 255),
        ]
    with Image.open(tmp_path / "grid1-partial.png") as sheet:
        assert json.loads(sheet.text["bas"])["prompts"] == ["a"]
        assert sheet.size == grid_size([["a, seed 5"]], 192)
    assert not (tmp_path / "grid0-partial.png").exists()


def test_what_is_refused_is_not_said_to_be_replaced(bench, tmp_path, caplog, capsys):
    (tmp_path / "x.png").write_bytes(b"mine")
    words = ["sample", str(bench.model), "--prompt", "a bowl", "--output_path", str(tmp_path / "x.png")]
    assert main([*words, "--height", "31"]) == 2
    assert caplog.messages == []
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "x-1.png").mkdir()
    assert main([*words, "--num_images", "2"]) == 2
    assert capsys.readouterr().err == f"bas: --output_path {tmp_path}/x.png: {tmp_path}/x-1.png is in the way\n"


def test_an_image_keeps_how_its_model_was_read(bench, tmp_path):
    words = ["sample", str(bench.model), "--prompt", "a bowl", "--num_inference_steps", "1"]
    notes = []
    for i, more in enumerate((["--precision", "bf16"], ["--precision", "fp32", "--prediction_type", "v_prediction"])):
        assert main([*words, *more, "--output_path", str(tmp_path / f"{i}.png")]) == 0
        with Image.open(tmp_path / f"{i}.png") as image:
            notes.append(json.loads(image.text["bas"]))
    assert [note["precision"] for note in notes] == ["bf16", "fp32"]
    assert [note.get("prediction_type") for note in notes] == [None, "v_prediction"]


@pytest.mark.parametrize(("sampler_name", "told"), [("dpmpp_2m_karras", "'karras'"), ("dpmpp_2m", "'linspace'")])
def test_an_offset_that_moves_no_timestep_is_told(models, caplog, sampler_name, told):
    sample(models, PROMPT, sampler=sampler_name, steps_offset=5, **FAST)
    line = f"--steps_offset has no effect: the timesteps of --sampler {sampler_name} are spaced as {told} here"
    assert caplog.messages == [line]


@pytest.mark.parametrize(
    ("command", "flag"),
    [("vary", "--output_dir"), ("explore", "--output_dir"), ("attend", "--output_dir"), ("sample", "--output_path")],
)
def test_a_refused_command_leaves_no_folder(bench, tmp_path, command, flag):
    words = [command, str(bench.model), flag, str(tmp_path / "new" / "below" / "x.png")]
    words += ["--prompt", "a photo of <asset3>"] if command in ("attend", "sample") else []
    assert main(words) == 2
    assert list(tmp_path.iterdir()) == []


def test_half_precision_comes_close(bench, models):
    exact = latents(models)
    rough = taught(bench.model).to(dtype=torch.bfloat16)
    found = latents(rough)
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.98


def test_a_processor_that_multiplies_in_bf16_draws_large_models_in_it(bench, monkeypatch):
    """The rule is the training's. The images differ by less than one of 255 levels on average."""
    monkeypatch.setattr(machine, "CPU_BF16_WEIGHTS", 1)  # the tiny model counts as a large one
    monkeypatch.setattr(machine, "cpu_multiplies_bf16", lambda: True)
    images = {}
    for precision, dtype in (("auto", torch.bfloat16), ("fp32", torch.float32)):
        words = argparse.Namespace(run=str(bench.model), model_path=None, device="cpu", precision=precision, base=None)
        words.prediction_type, words.lora, words.embedding, words.vae, words.clip_skip = None, [], [], None, None
        models = open_model(words, lambda models: None)
        networks = models.unet, models.vae, models.text_encoder
        assert {weight.dtype for network in networks for weight in network.parameters()} == {dtype}
        images[precision] = numbers(sample(models, "a bowl", num_images=2, num_inference_steps=2, guidance_scale=1.0))
    assert 0 < np.abs(images["auto"] - images["fp32"]).mean() < 1


def test_prompts_given_one_by_one_add_up(bench, tmp_path, capsys):
    """Each image's path is printed, in the order of the prompts."""
    words = ["sample", bench.model, "--prompt", "a", "--prompt", "bowl", "stone", "--num_inference_steps", "1"]
    assert main([*map(str, words), "--output_path", str(tmp_path / "x.png")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == ["x-0.png", "x-1.png", "x-2.png"]
    prompts = []
    for path in paths:
        with Image.open(path) as image:
            prompts.append(json.loads(image.text["bas"])["prompt"])
    assert prompts == ["a", "bowl", "stone"]
