"""Layouts: what a box or a mask means on a grid, what is hidden, own pixels, and every wrong input in one line."""

import json
from dataclasses import replace
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image

import bas.cli.open_model
from bas.cli.entry import main
from bas.config import EditConfig, SampleConfig
from bas.models.text import Conditioning
from bas.pretrained.folder import save_model
from bas.sampling import sampler
from bas.sampling.blended_diffusion import Region, check_edit
from bas.sampling.layout import bounding_box, cells_inside, covered, mask_files, read_layout
from bas.sampling.own_pixels import Segment, left_out, paste, read_segments
from bas.sampling.sampler import check_request, generate, guided_output, sample
from bas.sampling.steer import Steer, plan_steering
from tests.helpers.tiny import refused, taught, write_model, write_scene, write_settings
from tools.reference.measure import uniform

BOTH = "a photo of <asset0> and <asset1>"
SIDES = {"<asset0>": (0.0, 0.0, 0.5, 1.0), "<asset1>": (0.5, 0.0, 1.0, 1.0)}
FAST = {"num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a model that has learnt <asset0> and <asset1> from a scene of 32x32 pixels."""
    folder = tmp_path_factory.mktemp("layout")
    models = taught(write_model(folder / "model"))
    save_model(models, folder / "run")
    write_scene(folder / "run" / "scene", concepts=2)
    return folder / "run"


@pytest.fixture(scope="module")
def models(run):
    return replace(taught(run.parent / "model"), source=run)


def mask(*box, side=8):
    """A mask that is white from (left, top) to (right, bottom), in pixels."""
    left, top, right, bottom = box
    values = np.zeros((side, side), np.float32)
    values[top:bottom, left:right] = 1
    return values


# --- Regions on grids ---------------------------------------------------------------------------------------------


def test_a_cell_is_inside_from_half_of_it_on():
    """From 0.125 on the first of four columns is half inside; from 0.13 on it is not."""
    assert covered(0.125, 0.75, 4).tolist() == pytest.approx([0.5, 1, 1, 0])
    assert cells_inside((0.125, 0, 0.75, 1), 2, 4).tolist() == [[True, True, True, False]] * 2
    assert cells_inside((0.13, 0, 0.75, 1), 2, 4).tolist() == [[False, True, True, False]] * 2
    assert not cells_inside((0.13, 0.13, 0.3, 0.3), 4, 4).any()


@pytest.mark.parametrize("box", [(0, 0, 4, 8), (1, 2, 5, 7), (0, 0, 8, 8)])
def test_a_mask_means_what_its_box_means(box):
    shares = tuple(side / 8 for side in box)
    assert bounding_box(mask(*box)) == bounding_box(shares) == shares
    for h, w in ((8, 8), (4, 4), (2, 4), (1, 1)):
        assert torch.equal(cells_inside(mask(*box), h, w), cells_inside(shares, h, w))


def test_files_are_relative_to_the_json(tmp_path):
    Image.fromarray((255 * mask(0, 0, 4, 8)).astype(np.uint8)).save(tmp_path / "m.png")
    path = tmp_path / "layout.json"
    path.write_text('{"<asset0>": "m.png", "<asset1>": [0, 0.25, 0.5, 1]}')
    layout = read_layout(path)
    assert np.array_equal(layout["<asset0>"], mask(0, 0, 4, 8))
    assert layout["<asset1>"] == [0, 0.25, 0.5, 1]
    assert mask_files(path) == [tmp_path / "m.png"]


# --- Hiding -------------------------------------------------------------------------------------------------------


def test_a_handle_is_hidden_outside_its_region_on_every_grid(models):
    """Its columns alone, on the other side alone; a region that covers no cell of a grid hides nothing there."""
    steering = plan_steering(models.spec, [BOTH], Steer(layout=SIDES), (16, 16))
    assert steering.hide.keys() == {(16, 16), (8, 8), (4, 4)}
    for (h, w), hidden in steering.hide.items():
        left = torch.arange(h * w) % w < w // 2
        assert hidden.shape == (1, h * w, 77)
        assert torch.equal(hidden[0, :, 4], ~left)
        assert torch.equal(hidden[0, :, 6], left)
        assert hidden.sum() == h * w
    corner = {grid: cells_inside((0.0, 0.0, 0.07, 0.07), *grid).repeat(2, 1, 1) for grid in steering.regions}
    small = replace(steering, regions=corner)
    assert small.hide.keys() == {(16, 16)}
    assert plan_steering(models.spec, [BOTH], Steer(layout=SIDES, hide=False), (16, 16)).hide is None
    assert plan_steering(models.spec, [BOTH], Steer(separate=True), (16, 16)).hide is None


@torch.inference_mode()
def test_only_the_prompts_rows_are_hidden(models):
    """Guidance takes its unconditional part from the network as it is, and the conditional one with the mask."""
    z, t = uniform("z", 1, 4, 16, 16), 500
    context, negative = uniform("context", 1, 77, 16), uniform("negative", 1, 77, 16)
    hide = plan_steering(models.spec, [BOTH], Steer(layout=SIDES), (16, 16)).hide
    guided = guided_output(models, z, t, Conditioning(context), Conditioning(negative), 3.0, (4, 4), hide)
    plain, at = models.unet(z, torch.tensor([t]), negative).sample, torch.tensor([t])
    seen, maps = models.unet(z, at, context, (4, 4), hide)
    torch.testing.assert_close(guided.sample, plain + 3 * (seen - plain), atol=5e-5, rtol=0)
    torch.testing.assert_close(guided.maps[0].probs, maps[0].probs, atol=1e-6, rtol=0)
    assert (maps[0].probs[0, :, :, 2:, 4] == 0).all()
    assert (maps[0].probs[0, :, :, :2, 4] > 0).all()
    alone = guided_output(models, z, t, Conditioning(context), Conditioning(negative), 1.0, hide=hide).sample
    assert torch.equal(alone, models.unet(z, at, context, hide=hide).sample)
    assert (seen - models.unet(z, at, context).sample).abs().max() > 1e-4


@torch.inference_mode()
def test_hiding_nothing_is_exactly_nothing(models):
    z, t, context = uniform("z", 2, 4, 16, 16), torch.tensor([500]), uniform("context", 2, 77, 16)
    nothing = {(s, s): torch.zeros(2, s * s, 77, dtype=torch.bool) for s in (16, 8, 4)}
    for return_maps in (False, True):
        plain, hidden = (models.unet(z, t, context, return_maps, hide) for hide in (None, nothing))
        assert torch.equal(plain.sample, hidden.sample)
        assert all(torch.equal(a.probs, b.probs) for a, b in zip(plain.maps, hidden.maps, strict=True))


# --- Own pixels ---------------------------------------------------------------------------------------------------


def test_segments_are_cut_from_the_scene_of_the_run(models, run):
    """Each is the box of its mask: 15 columns, without the soft edge, and rows 4 to 28."""
    segments = read_segments(models.spec, ("<asset0>", "<asset1>"))
    for i, segment in enumerate(segments.values()):
        with Image.open(run / "scene" / "img.png") as image:
            shown = np.asarray(image)[4:28, 16 * i : 16 * i + 15]
        assert segment.image.shape == (3, 24, 15)
        assert segment.mask.shape == (1, 24, 15)
        np.testing.assert_allclose((segment.image.permute(1, 2, 0) + 1) * 127.5, shown, atol=1e-3)
        assert segment.mask.min() == 1


def test_handles_of_the_base_are_not_in_the_scene_of_a_run_on_top(models, run, tmp_path):
    """The scene's masks are numbered by the run's own handles, which stand behind those of its base."""
    place = copytree(run / "scene", tmp_path / "run" / "scene").parent
    write_settings(place)
    (place / "settings.json").write_text(
        json.dumps(json.loads((place / "settings.json").read_text()) | {"handles": ["<asset1>"]})
    )
    spec = replace(models.spec, source=place)
    (segment,) = read_segments(spec, ("<asset1>",)).values()
    (first,) = read_segments(models.spec, ("<asset0>",)).values()
    assert torch.equal(segment.image, first.image)  # that of mask0.png
    with refused("does not show <asset0>, so --own_pixels has no pixels of it"):
        read_segments(spec, ("<asset0>",))


def test_pasting_scales_to_fit_and_centres():
    """A segment of 2x4 in a box of 8x8 becomes 4x8 in its middle; around it is mid grey."""
    segments = {"<a>": Segment(torch.ones(3, 2, 4), torch.ones(1, 2, 4))}
    image, union = paste(segments, {"<a>": (0.5, 0.0, 1.0, 0.5)}, 16, 16)
    expected = torch.zeros(16, 16)
    expected[2:6, 8:16] = 1
    assert torch.equal(union[0], expected)
    assert torch.equal(image, expected.expand(3, -1, -1))


def test_the_walk_starts_from_pixels_inside_and_from_noise_outside(models, monkeypatch):
    """At 40 % of the walk: sqrt(a) z0 + sqrt(1 - a) eps in the left half, sqrt(1 - a) eps in the right one."""
    layout, seen, original = {"<asset0>": (0.0, 0.0, 0.5, 1.0)}, [], sampler.guided_output

    def spy(models, z, t, *args):
        seen.append((z.clone(), t))
        return original(models, z, t, *args)

    monkeypatch.setattr(sampler, "guided_output", spy)
    steer = Steer(layout=layout, own_pixels=True, until=0)
    steering = plan_steering(models.spec, [BOTH], steer, (16, 16))
    generate([BOTH], [5], models, SampleConfig(num_inference_steps=10), steering=steering)
    assert len(seen) == 10 - left_out(10) == 6
    z, t = seen[0]
    a = models.schedule.alphas_cumprod[t]
    eps = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(5))
    signal = (z[0] - (1 - a) ** 0.5 * eps) / a**0.5
    assert signal[:, :, 8:].abs().max() < 1e-4
    image, _ = paste(steering.segments, layout, 32, 32)
    expected = sampler.encode(models, [image])[0]
    # 24x15 pixels become 26x16: rows 3 to 29, of the latents 1.5 to 14.5.
    torch.testing.assert_close(signal[:, 2:14, :8], expected[:, 2:14, :8], atol=1e-4, rtol=0)
    assert signal[:, :1].abs().max() < 1e-4


def test_own_pixels_need_a_layout_a_scene_and_a_placed_handle(models, tmp_path):
    for settings, spec, prompts, words in (
        ({"separate": True}, models.spec, [BOTH], ["--own_pixels needs a --layout"]),
        ({}, replace(models.spec, source=tmp_path), [BOTH], [str(tmp_path), "holds no scene"]),
        ({}, replace(models.spec, handles=("<asset0>",)), [BOTH], ["does not show <asset1>"]),
        ({}, models.spec, [BOTH, "a bowl"], ["'a bowl' names no handle of the layout"]),
    ):
        layout = {} if settings else {"layout": str(write(tmp_path / "layout.json", SIDES))}
        with refused(*words):
            check_request(spec, prompts, SampleConfig(own_pixels=True, **settings, **layout))


# --- Wrong layouts ------------------------------------------------------------------------------------------------


def write(path, content):
    """A JSON file with this content."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


WRONG = [
    ({"<asset7>": [0, 0, 1, 1]}, ["<asset7>, an unknown handle", "known handles: <asset0>, <asset1>"]),
    ({"asset0": [0, 0, 1, 1]}, ["asset0, an unknown handle"]),
    ({"<asset0>": [0, 0, 1.2, 1]}, ["right of the box of <asset0>", "1.2", "1 or less"]),
    ({"<asset0>": [-0.1, 0, 1, 1]}, ["left of the box of <asset0>", "0 or more"]),
    ({"<asset0>": [0, 0, 200, 300]}, ["right of the box of <asset0>, a share of the image"]),
    ({"<asset0>": [0.6, 0, 0.4, 1]}, ["expected left < right"]),
    ({"<asset0>": [0, 0.5, 1, 0.5]}, ["top < bottom"]),
    ({"<asset0>": [0.01, 0.01, 0.1, 0.1]}, ["<asset0> covers none of the 4x4 cells"]),
    ('{"<asset0>": [0, 0, NaN, 1]}', ["right of the box", "nan", "finite"]),
    ({"<asset0>": [0, 0, True, 1]}, ["right of the box"]),
    ({"<asset0>": [0, 0, "1", 1]}, ["right of the box"]),
    ({"<asset0>": [0, 0, 1]}, ["expected [left, top, right, bottom] or a mask file"]),
    ({"<asset0>": None}, ["the region of <asset0> is None"]),
    ({"<asset0>": "none.png"}, ["none.png"]),
    ({"<asset0>": "black.png"}, ["<asset0> is black all over"]),
    ({"<asset0>": "left.png", "<asset1>": "large.png"}, ["8x8 of <asset0> and 16x16 of <asset1>", "one size"]),
    ({"<asset0>": "wide.png"}, ["16x8, the image 32x32", "same shape"]),
    ('{"<asset0>": [0, 0, 1, 1], "<asset0>": [0, 0, 1, 1]}', ["<asset0>", "twice"]),
    ({}, ["--layout", "is not {"]),
    ([[0, 0, 1, 1]], ["--layout", "is not {"]),
    ("{", ["layout.json", "JSON"]),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder of masks to name in layouts."""
    folder = tmp_path_factory.mktemp("desk")
    for name, values in {
        "black": mask(0, 0, 0, 0),
        "left": mask(0, 0, 4, 8),
        "large": mask(0, 0, 8, 16, side=16),
        "wide": np.ones((8, 16), np.float32),
    }.items():
        Image.fromarray((255 * values).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(("content", "words"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_layout_is_one_line(models, desk, content, words):
    with refused(*words):
        check_request(models.spec, [BOTH], SampleConfig(layout=str(write(desk / "layout.json", content))))


@pytest.mark.parametrize("command", ["sample", "vary", "explore", "attend", "edit"])
def test_each_command_refuses_a_layout_before_it_reads_weights(run, desk, command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bas.cli.open_model, "load", lambda *args: pytest.fail("weights were read"))
    layout = str(write(desk / "layout.json", {"<asset0>": [0, 0, 2, 1]}))
    more = {"sample": ["--prompt", BOTH], "attend": ["--prompt", BOTH, "--output_dir", str(tmp_path / "out")]}
    more["edit"] = ["--prompt", BOTH, "--init_image", str(run / "scene" / "img.png"), "--mask", str(desk / "left.png")]
    assert main([command, str(run), "--layout", layout, *more.get(command, [])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "bas: right of the box of <asset0>" in error
    assert list(tmp_path.iterdir()) == []


def test_a_handle_must_be_in_the_prompt_or_in_one_of_two(models, tmp_path, caplog):
    """A prompt that names none of the layout's handles is told, and stays as it is."""
    config = SampleConfig(layout=str(write(tmp_path / "layout.json", SIDES)))
    with refused("<asset1>, which is not in 'a photo of <asset0>'"):
        check_request(models.spec, ["a photo of <asset0>"], config)
    with refused("<asset0>, which is not in any prompt"):
        check_request(models.spec, ["a photo of <asset1>", "a bowl"], config)
    with refused("<asset0>, which has strength 0: give it another, or leave it out"):
        check_request(models.spec, ["a photo of (<asset0>:0) and <asset1>", "a bowl"], config)
    check_request(models.spec, ["a photo of <asset0>", "a photo of <asset1>", "a bowl"], config)
    assert caplog.messages == ["--layout has nothing to do in 'a bowl': it names no handle of the layout"]


def test_an_edit_needs_its_regions_inside_the_mask(models, tmp_path):
    image, left = Image.new("RGB", (32, 32)), Region(mask(0, 0, 16, 32, side=32), BOTH)
    layout = str(write(tmp_path / "layout.json", SIDES))
    with refused("the layout puts <asset1> where", "may change nothing"):
        check_edit(models.spec, image, [left], EditConfig(layout=layout))
    with refused("own_pixels: an edit starts from the image"):
        check_edit(models.spec, image, [left], EditConfig(layout=layout, own_pixels=True))


def test_the_output_may_not_replace_a_mask(run, desk, capsys):
    write(desk / "layout.json", {"<asset0>": "left.png"})
    flags = ["--prompt", BOTH, "--layout", str(desk / "layout.json"), "--output_path", str(desk / "left.png")]
    assert main(["sample", str(run), *flags]) == 2
    assert "left.png is an input of this command" in capsys.readouterr().err


# --- The commands -------------------------------------------------------------------------------------------------


def test_images_record_their_steering_and_the_settings_give_them_again(run, tmp_path, capsys):
    layout = write(tmp_path / "layout.json", SIDES)
    flags = ["--separate", "--layout", str(layout), "--own_pixels", "--num_inference_steps", "5", "--device", "cpu"]
    target = tmp_path / "image.png"
    assert main(["sample", str(run), "--prompt", BOTH, "--output_path", str(target), *flags]) == 0
    with Image.open(target) as image:
        record = json.loads(image.text["bas"])
        settings = {name: record[name] for name in SampleConfig.__dataclass_fields__}
        assert (settings["separate"], settings["layout"], settings["own_pixels"]) == (True, str(layout), True)
        (again,) = sample(bas.load(run), BOTH, SampleConfig(**settings))
        assert np.array_equal(np.asarray(again), np.asarray(image))
    more = ["--contexts", "at the beach", "--output_dir", str(tmp_path / "all"), *flags[:3], *flags[4:]]
    assert main(["explore", str(run), *more]) == 0
    with Image.open(tmp_path / "all" / "0002.png") as image:
        assert json.loads(image.text["bas"])["layout"] == str(layout)
