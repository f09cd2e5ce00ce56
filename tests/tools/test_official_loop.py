"""The bench's port of the official loop (tools/bench/official_loop.py) against the official code's own numbers.

The draws of a recorded step go in; losses, gradients, the norm before clipping and the updated handles must come out.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bas.io.images import pixels, read_image
from bas.pretrained.folder import load
from tests.helpers.cases import some_fast
from tests.helpers.tiny import Bench

pytest.importorskip("diffusers", reason="the port of the official loop runs on diffusers")
from tools.bench.official_loop import Example, OfficialLoop, main, read_scene

OFFICIAL = Path(__file__).parents[1] / "reference" / "official"
TRAIN = load_file(OFFICIAL / "train.safetensors")
STEPS = json.loads((OFFICIAL / "trace.json").read_text(encoding="utf-8"))["train"]["steps"]
WORDS = ["creature", "bowl", "stone"]


@pytest.fixture(scope="module")
def scene():
    return read_scene(OFFICIAL / "scene", OFFICIAL / "class_images")


def recorded(step: int, name: str) -> torch.Tensor:
    return TRAIN[f"step{step}.{name}"]


def example(scene, step: int) -> Example:
    """What the official data set drew for a step."""
    told = STEPS[step]["examples"][0]
    image, masks = scene.image, scene.masks[told["token_ids"]]
    if told["flip"]:
        image, masks = image.flip(-1), masks.flip(-1)
    (class_image,) = (path for path in scene.class_images if path.name == told["class_file"])
    images = torch.stack([pixels(read_image(class_image)), image])
    return Example(images, recorded(step, "input_ids"), masks, told["token_ids"])


def near(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of the difference, as a share of the norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(params=some_fast((0, 3), 3), ids=["phase 1", "phase 2"])
def stepped(request, scene):
    """The port after one recorded step, the first of its phase. -> step, loop, parts, gradients, norm"""
    step = request.param
    loop = OfficialLoop(OFFICIAL / "model", WORDS)
    if step:
        loop.embedding.data[-3:] = recorded(step - 1, "handles_after_step")
    loop.begin(STEPS[step]["phase"])
    drawn = recorded(step, "latents"), recorded(step, "noise"), recorded(step, "timesteps")
    loss, parts = loop.losses(example(scene, step), *drawn)
    norm = loop.backward(loss)
    scale = max(1.0, norm.item() + 1e-6)  # undoes the clipping
    raw = {name: p.grad * scale for name, p in loop.unet.named_parameters() if p.grad is not None}
    raw["embedding"] = loop.embedding.grad * scale
    loop.update()
    return step, loop, {**parts, "loss": loss}, raw, norm


def test_one_step_is_the_official_step(stepped):
    """Losses, gradients, norm and handles after the step, as recorded while the official code ran."""
    step, loop, parts, gradients, norm = stepped
    told = STEPS[step]
    assert parts["loss"].item() == pytest.approx(told["loss_total"], rel=1e-5)
    assert parts["reconstruction"].item() == pytest.approx(told["loss_masked_reconstruction"], rel=1e-5)
    assert parts["prior"].item() == pytest.approx(told["loss_prior"], rel=1e-5)
    assert parts["attention"].item() == pytest.approx(told["loss_attention_raw_sum"], rel=1e-5)
    assert norm.item() == pytest.approx(told["grad_norm_returned_by_clip"], rel=1e-4)
    assert near(gradients["embedding"][-3:], recorded(step, "grad_handles")) < 1e-4
    torch.testing.assert_close(
        loop.embedding[-3:].detach(), recorded(step, "handles_after_step"), atol=2e-3 * told["lr_used"][0], rtol=0
    )
    prefix = f"step{step}.grad.unet."
    unet = {name.removeprefix(prefix): value for name, value in TRAIN.items() if name.startswith(prefix)}
    assert bool(unet) == (told["phase"] == 2)
    for name, value in unet.items():
        assert near(gradients[name], value) < 1e-4, name


@pytest.mark.slow
def test_every_attention_layer_keeps_its_probabilities(scene):
    """All 32 have a processor; of a step, the maps of at most 32x32 cells are recorded, for the instance alone."""
    loop = OfficialLoop(OFFICIAL / "model", WORDS)
    loop.begin(1)
    names = list(loop.unet.attn_processors)
    assert len(names) == 32
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 64, 64)
    with torch.no_grad():
        loop.losses(example(scene, 0), latents, latents, torch.tensor([1, 2]))
    counts = {key: len(maps) for key, maps in loop.store.maps.items()}
    # 64x64 cells: two down and three up blocks, whose maps are larger than the official store keeps.
    assert counts == {"down_cross": 4, "mid_cross": 1, "up_cross": 6, "down_self": 4, "mid_self": 1, "up_self": 6}
    halves = {maps.shape[0] for maps in loop.store.maps["mid_cross"]}
    assert halves == {2}, "two heads of the instance alone"


@pytest.mark.slow
def test_phase1_moves_the_handles_alone(scene):
    """A step through the whole data path: other rows are put back, networks keep their weights."""
    torch.manual_seed(0)
    loop = OfficialLoop(OFFICIAL / "model", WORDS)
    loop.begin(1)
    before = loop.embedding.detach().clone(), loop.unet.conv_in.weight.detach().clone()
    logs = loop.step(scene, 0)
    assert 0 < logs["loss"] < 10
    assert torch.equal(loop.embedding[:-3], before[0][:-3])
    assert (loop.embedding[-3:] - before[0][-3:]).abs().max().item() == pytest.approx(5e-4, rel=0.02)
    assert torch.equal(loop.unet.conv_in.weight, before[1])


def test_class_images_are_added_up_to_the_number_asked_for(tmp_path, monkeypatch):
    """Other files do not count, and no image is drawn over: from 1.jpg and a text file to four images."""
    from tools.bench import official_loop

    drawn = []

    def pipeline(prompts):
        drawn.extend(prompts)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), "red") for _ in prompts])

    monkeypatch.setattr(official_loop, "open_pipeline", lambda *_: pipeline)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "1.jpg")
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "1.jpg").read_bytes()
    official_loop.make_class_images(Path("model"), tmp_path, 4, "cpu")
    assert len(drawn) == 3
    assert [path.name for path in official_loop.class_images_in(tmp_path)] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert (tmp_path / "1.jpg").read_bytes() == before
    official_loop.make_class_images(Path("model"), tmp_path, 4, "cpu")
    assert len(drawn) == 3


def test_the_commands_train_save_and_draw(tmp_path, monkeypatch):
    """Class images are made up to the number asked for, handles are saved with the pipeline, an image comes out."""
    tiny = Bench(tmp_path)
    run, images, image = tmp_path / "run", tmp_path / "new class images", tmp_path / "picture.png"
    train = ["train", str(tiny.scene), "--weights", str(tiny.model), "--class_data_dir", str(images), "--device", "cpu"]
    counts = (
        "--phase1_train_steps 1 --phase2_train_steps 1 --num_class_images 1 --initializer_tokens creature bowl stone"
    )
    monkeypatch.setattr("sys.argv", ["official_loop.py", *train, "--output_dir", str(run), *counts.split()])
    main()
    assert len(list(images.iterdir())) == 1
    models = load(run)  # strictly: every weight is there, and the rows of the handles
    assert models.handles == ("<asset0>", "<asset1>", "<asset2>")
    sample = ["sample", str(run), "--output", str(image), "--num_inference_steps", "2", "--device", "cpu", "--prompt"]
    monkeypatch.setattr("sys.argv", ["official_loop.py", *sample, "a photo of <asset0>"])
    main()
    assert Image.open(image).size == (32, 32)
