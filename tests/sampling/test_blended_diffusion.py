"""Editing by example: what must stay stays to the last bit, what may change changes, at the right noise level."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from bas.cli.entry import build_parser, main
from bas.config import EditConfig, setting_rows
from bas.errors import RunError
from bas.io.images import pixels, read_image
from bas.pretrained.folder import save_model
from bas.sampling import blended_diffusion as editing
from bas.sampling import sampler as sampling
from bas.sampling.blended_diffusion import (
    Region,
    check_edit,
    composite,
    edit,
    latent_mask,
    read_region,
    read_regions,
    skipped_steps,
    working_size,
)
from bas.sampling.sampler import decode
from bas.schedulers import sampling_timesteps
from tests.helpers.tiny import refused, taught, write_model, write_scene

FAST = {"num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return taught(write_model(tmp_path_factory.mktemp("edit") / "model"))


@pytest.fixture
def image():
    """40x32: not square, and not of a size the model takes."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8))


def left_half(width=40, height=32):
    mask = np.zeros((height, width), np.float32)
    mask[:, : width // 2] = 1
    return mask


def differing(a, b):
    """Which pixels of two images differ. (H, W) bool"""
    return (np.asarray(a) != np.asarray(b)).any(axis=-1)


def test_pixels_outside_the_mask_are_the_inputs_own(models, image):
    mask = left_half()
    (result,) = edit(models, image, [Region(mask, "a photo of <asset0>")], **FAST)
    assert result.size == image.size
    changed = differing(result, image)
    assert not changed[mask == 0].any()
    assert changed[mask == 1].mean() > 0.9


def test_without_the_composite_the_decoder_shows_outside_too(models, image):
    (result,) = edit(models, image, [Region(left_half(), "a photo of <asset0>")], composite=False, **FAST)
    assert result.size == image.size
    assert differing(result, image)[left_half() == 0].mean() > 0.9


@torch.inference_mode()
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_outside_the_mask_each_step_sees_the_source_at_its_own_noise_level(models, sampler, monkeypatch):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    source = models.vae.encode(pixels(image)[None]).mean * models.vae.config.scaling_factor
    cells = ~latent_mask(left_half(64, 64), (32, 32)).expand_as(source)
    config = EditConfig(num_inference_steps=8, sampler=sampler, height=64, width=64, blending_start_percentage=0.25)
    original, seen, noises, ends = sampling.guided_output, [], [], []

    def spy(models, z, t, *args, **kwargs):
        a = models.schedule.alphas_cumprod[t]
        noises.append(((z - a**0.5 * source) / (1 - a) ** 0.5)[cells])
        seen.append(t)
        return original(models, z, t, *args, **kwargs)

    monkeypatch.setattr(sampling, "guided_output", spy)
    monkeypatch.setattr(editing, "decode", lambda models, z: ends.append(z) or decode(models, z))
    edit(models, image, [Region(left_half(64, 64), "a photo of <asset0>")], config)
    # The noisiest quarter of eight steps is left out, and what is left over the source is standard normal noise.
    assert seen == sampling_timesteps(models.schedule, 8, sampler)[2:]
    for noise in noises:
        assert abs(noise.mean()) < 0.1
        assert abs(noise.std() - 1) < 0.1
    # At the end the source stands there clean, beside something else.
    assert torch.equal(ends[0][cells], source[cells])
    assert (ends[0][~cells] != source[~cells]).all()


def test_regions_are_edited_in_order_each_in_the_result_of_the_one_before(models, image):
    first, second = Region(left_half(), "a photo of <asset0>"), Region(1 - left_half(), "a photo of <asset1>")
    (both,) = edit(models, image, [first, second], seed=3, **FAST)
    (half,) = edit(models, image, [first], seed=3, **FAST)
    (whole,) = edit(models, half, [second], seed=3, **FAST)
    (swapped,) = edit(models, image, [second, first], seed=3, **FAST)
    assert both == whole
    assert both != swapped
    assert not differing(both, half)[left_half() == 1].any()


def test_a_result_depends_on_its_seed_alone(models, image):
    region = Region(left_half(), "a photo of <asset0>")
    three = edit(models, image, [region], num_images=3, batch_size=2, seed=5, **FAST)
    (last,) = edit(models, image, [region], seed=7, **FAST)
    assert np.abs(np.asarray(three[2], int) - np.asarray(last, int)).max() <= 1
    assert differing(three[0], three[1]).any()


def test_the_prompt_decides_what_comes_inside(models, image):
    results = [edit(models, image, [Region(left_half(), f"a photo of {h}")], **FAST)[0] for h in models.handles[:2]]
    assert differing(*results)[left_half() == 1].any()


def test_skipping_more_steps_keeps_more_of_what_was_there(models, image):
    region = Region(left_half(), "a photo of <asset0>")
    near, far = (
        edit(models, image, [region], blending_start_percentage=share, composite=False, **FAST)[0]
        for share in (0.75, 0.0)
    )
    distance = [np.abs(np.asarray(p, float) - np.asarray(image))[left_half() == 1].mean() for p in (near, far)]
    assert distance[0] < distance[1]


def test_a_soft_mask_mixes_old_and_new():
    old, new = Image.new("RGB", (3, 1), (100, 0, 7)), Image.new("RGB", (3, 1), (200, 50, 8))
    mixed = composite(old, new, np.array([[0, 0.25, 1]], np.float32))
    assert np.asarray(mixed).tolist() == [[[100, 0, 7], [125, 12, 7], [200, 50, 8]]]


def test_a_cell_may_change_when_half_of_it_is_inside():
    mask = np.zeros((4, 8), np.float32)
    mask[:2, :3] = 1  # cells of 2x2 pixels: one whole, the next just half
    assert latent_mask(mask, (2, 4))[0, 0].tolist() == [[True, True, False, False], [False] * 4]


def test_the_size_to_edit_at_is_the_nearest_the_model_takes(models):
    assert models.size_multiple == 8
    assert models.resolution == 32
    assert working_size(models.spec, (400, 300), EditConfig()) == (40, 32)
    assert working_size(models.spec, (90, 200), EditConfig()) == (32, 72)
    assert working_size(models.spec, (90, 200), EditConfig(width=64)) == (64, 72)
    with refused("--height 31", "multiples of 2"):
        working_size(models.spec, (90, 200), EditConfig(height=31))
    with refused("an image of 10x6000 would become 32x19200 for the model: crop it"):
        working_size(models.spec, (10, 6000), EditConfig())


@pytest.mark.parametrize(("steps", "share", "skipped"), [(100, 0.29, 29), (50, 0.58, 29), (50, 0.25, 12), (8, 0.25, 2)])
def test_the_skipped_share_of_the_steps_is_whole_steps(steps, share, skipped):
    """Rounded down, but not by the last bit of a product."""
    assert skipped_steps(EditConfig(num_inference_steps=steps, blending_start_percentage=share)) == skipped


@torch.inference_mode()
def test_an_encoder_and_a_decoder_that_overflow_are_repeated_in_float32(bench, image, caplog):
    """Not black inside the mask: as with the VAE in float32."""
    models = taught(bench.model)
    for coder in (models.vae.encoder, models.vae.decoder):  # what the one layer multiplies, the next one divides
        factor = 30_000 / coder.conv_norm_out.weight.abs().max()
        coder.conv_norm_out.weight.mul_(factor)
        coder.conv_out.weight.div_(factor)
    models.to(dtype=torch.float16)
    inputs = models, image, [Region(left_half(), "a photo of <asset0>")]
    (result,) = edit(*inputs, **FAST)
    assert sum("the decoder overflows in float16" in message for message in caplog.messages) == 1
    models.vae.float()
    (expected,) = edit(*inputs, **FAST)
    assert np.abs(np.asarray(result, int) - np.asarray(expected, int)).max() <= 1
    assert np.asarray(result)[left_half() == 1].max() > 0


def test_no_edit_of_numbers_that_are_not_finite_is_written(bench, image, monkeypatch):
    models = taught(bench.model)
    original = models.unet.forward

    def broken(*args, **kwargs):
        output = original(*args, **kwargs)
        output.sample[..., 0] = float("inf")  # inside the mask
        return output

    monkeypatch.setattr(models.unet, "forward", broken)
    with pytest.raises(RunError, match="denoising in float32"):
        edit(models, image, [Region(left_half(), "a photo of <asset0>")], **FAST)


# --- Files and the command ----------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, image):
    image.save(tmp_path / "photo.png")
    for name, mask in (("left", left_half()), ("right", 1 - left_half()), ("black", 0 * left_half())):
        Image.fromarray((mask * 255).astype(np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def region_list(folder, rows):
    (folder / "regions.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return folder / "regions.json"


def test_a_list_of_regions_may_be_toml(files, image):
    lines = ["[[regions]]", 'mask = "left.png"', 'prompt = "a <asset0>"'] * 2
    (files / "regions.toml").write_text("\n".join(lines))
    regions = read_regions(files / "regions.toml", files / "photo.png", image)
    assert [region.prompt for region in regions] == ["a <asset0>"] * 2
    assert (regions[0].mask == left_half()).all()
    for text in ("[[regions]", "[[places]]\nmask = 'left.png'", "regions = 3"):
        (files / "regions.toml").write_text(text)
        with refused("regions.toml"):
            read_regions(files / "regions.toml", files / "photo.png", image)


def test_a_list_of_regions_names_masks_beside_it(files, image):
    rows = [{"mask": "right.png", "prompt": "a bowl"}, {"mask": "left.png", "prompt": "a <asset0>"}]
    regions = read_regions(region_list(files, rows), files / "photo.png", image)
    assert [region.prompt for region in regions] == ["a bowl", "a <asset0>"]
    assert (regions[0].mask == 1 - left_half()).all()
    assert (regions[1].mask == left_half()).all()


@pytest.mark.parametrize(
    "rows",
    ["{", "[" * 100_000, "[]", "{}", [1], [{"mask": "left.png"}], [{"mask": "left.png", "prompt": 3}],
     [{"mask": "left.png", "prompt": "a", "seed": 1}]],
)  # fmt: skip
def test_a_bad_list_of_regions_is_refused(files, image, rows):
    with refused(str(files / "regions.json")):
        read_regions(region_list(files, rows), files / "photo.png", image)


def test_masks_that_cannot_be_meant_are_refused(files, image):
    with refused("black.png", "black all over"):
        read_region(files / "black.png", "a", files / "photo.png", image)
    with refused("gone.png"):
        read_region(files / "gone.png", "a", files / "photo.png", image)
    Image.new("L", (32, 40), 255).save(files / "turned.png")
    with refused("turned.png is 32x40", "photo.png is 40x32"):
        read_region(files / "turned.png", "a", files / "photo.png", image)


def test_a_mask_too_small_for_the_grid_is_refused(models, image):
    speck = np.zeros((32, 40), np.float32)
    speck[5, 5] = 1
    with refused("covers no cell of the 20x16 grid"):
        edit(models, image, [Region(speck, "a photo of <asset0>")], **FAST)


def test_python_checks_an_edit_as_the_command_does(models, image, monkeypatch):
    """Before the image is encoded."""
    monkeypatch.setattr(editing, "encode", lambda *args: pytest.fail("the image was encoded"))
    region = Region(left_half(), "a photo of <asset0>")
    with refused("own_pixels: an edit starts from the image that it edits"):
        edit(models, image, [region], own_pixels=True, **FAST)
    with refused("unknown handle <asset9>"):
        edit(models, image, [region, Region(left_half(), "a photo of <asset9>")], **FAST)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_of_steps_outside_0_to_1_is_refused(share):
    with refused("--blending_start_percentage"):
        EditConfig(blending_start_percentage=share)


def test_the_command_writes_the_edited_image_with_its_settings(files, models, capsys):
    run = files / "run"
    save_model(models, run)
    steps = ["--num_inference_steps", "4", "--device", "cpu"]
    where = ["--mask", str(files / "left.png"), "--prompt", "a photo of <asset1>"]
    target = files / "out" / "edited.png"
    common = [str(run), "--init_image", str(files / "photo.png"), "--output_path", str(target), *steps]
    assert main(["edit", *common, *where]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    with Image.open(target) as result:
        note = json.loads(result.text["bas"])
        assert not differing(result, Image.open(files / "photo.png"))[left_half() == 0].any()
    assert note["prompts"] == ["a photo of <asset1>"]
    assert note["blending_start_percentage"] == 0.25
    assert (note["init_image"], note["masks"]) == ("photo.png", ["left.png"])

    regions = region_list(files, [{"mask": "left.png", "prompt": "a"}, {"mask": "right.png", "prompt": "the"}])
    assert main(["edit", *common, "--regions", str(regions), "--num_images", "2"]) == 0
    assert [p.name for p in sorted(target.parent.iterdir())] == ["edited-0.png", "edited-1.png", "edited.png"]

    for wrong in ([], where[:2], where[2:], [*where, "--regions", str(regions)]):
        assert main(["edit", *common, *wrong]) == 2
        assert capsys.readouterr().err.startswith("bas: name a region and a prompt")


def test_the_command_has_every_setting_of_an_edit_but_own_pixels(capsys):
    """An edit starts from its image, so the flag would be an error in any case."""
    command = build_parser("edit")._subparsers._group_actions[0].choices["edit"]
    flags = {action.dest for action in command._actions}
    assert setting_rows(EditConfig).keys() - flags == {"own_pixels"}
    assert main(["edit", "mini", "--own_pixels", "--init_image", "x"]) == 2
    assert capsys.readouterr().err.startswith("bas edit: unknown argument --own_pixels")


def test_the_command_saves_each_image_as_soon_as_it_is_done(files, models, monkeypatch, capsys):
    """The third image is interrupted: the first two are there."""
    save_model(models, files / "run")
    edit_one, seen = editing.edit_region, []

    def interrupted(models, images, region, seeds, *others):
        seen.append(seeds)
        if seeds == [2]:
            raise KeyboardInterrupt
        return edit_one(models, images, region, seeds, *others)

    monkeypatch.setattr(editing, "edit_region", interrupted)
    words = ["edit", files / "run", "--init_image", files / "photo.png", "--mask", files / "left.png", "--prompt", "a"]
    words += ["--num_images", 4, "--batch_size", 1, "--num_inference_steps", 2, "--device", "cpu"]
    assert main([*map(str, words), "--output_path", str(files / "out" / "x.png")]) == 130
    assert seen == [[0], [1], [2]]
    assert sorted(path.name for path in (files / "out").iterdir()) == ["x-0.png", "x-1.png"]
    assert capsys.readouterr().out.split() == [str(files / "out" / f"x-{i}.png") for i in (0, 1)]


def test_an_edit_keeps_the_colour_profile_of_its_image(files, models):
    """Without it the pixels outside the mask would look different, though they are the same."""
    save_model(models, files / "run")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with Image.open(files / "photo.png") as photo:
        photo.convert("RGBA").save(files / "profiled.png", icc_profile=profile)
    words = [
        "edit",
        files / "run",
        "--mask",
        files / "left.png",
        "--prompt",
        "a <asset0>",
        "--num_inference_steps",
        "2",
    ]
    for name, kept in (("profiled", profile), ("photo", None)):
        more = ["--init_image", files / f"{name}.png", "--output_path", files / "edited.png"]
        assert main([*map(str, [*words, *more])]) == 0
        with Image.open(files / "edited.png") as result:
            assert result.info.get("icc_profile") == kept


@pytest.mark.parametrize(("share", "told"), [(0.25, 0), (0.5, 1)])
def test_an_edit_that_leaves_out_the_steps_of_steering_says_so(models, image, caplog, share, told):
    prompt = "a photo of <asset0> and <asset1>"
    config = EditConfig(separate=True, blending_start_percentage=share, **FAST)
    check_edit(models.spec, image, [Region(left_half(), prompt)], config)
    assert [line.startswith("--separate and --layout move no latents") for line in caplog.messages] == [True] * told


def test_a_scene_is_edited_at_its_own_size(models, tmp_path):
    folder = write_scene(tmp_path, size=(50, 34))
    photo = read_image(folder / "img.png")
    region = read_region(folder / "mask1.png", "a photo of <asset0>", folder / "img.png", photo)
    (result,) = edit(models, photo, [region], **FAST)
    changed = differing(result, photo)
    assert not changed[region.mask == 0].any()
    assert changed[region.mask == 1].mean() > 0.9


def test_no_numbered_result_replaces_an_input(files, models, capsys):
    """A result's number may make it the name of an input, or of the mask."""
    run = files / "run"
    save_model(models, run)
    for name in ("photo", "left"):
        (files / f"{name}-1.png").write_bytes((files / f"{name}.png").read_bytes())
    before = {path.name: path.read_bytes() for path in files.glob("*.png")}
    for image, mask, target in (("photo-1", "left", "photo"), ("photo", "left-1", "left")):
        words = ["edit", run, "--init_image", files / f"{image}.png", "--mask", files / f"{mask}.png"]
        words += ["--prompt", "a <asset0>", "--num_images", 2, "--output_path", files / f"{target}.png"]
        assert main([*map(str, words)]) == 2
        assert f"--output_path {files / target}-1.png is an input of this command" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in files.glob("*.png")} == before
