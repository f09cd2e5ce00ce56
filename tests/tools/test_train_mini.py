"""The training of the miniature: its set latents, its loop, and small runs of every stage."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

import bas
from bas.models.unet import UNet
from bas.models.vae import VAE
from tools.mini_world.captions import describe
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import compose, compose_concepts
from tools.mini_world.random_drawings import random_drawing
from tools.mini_world.shapes import SHAPES
from tools.train_mini import __main__ as train_mini
from tools.train_mini.codec import NOISE, Scaling, haar, measure_scaling, set_encoder, to_latents, to_tensor
from tools.train_mini.decoder import LatentDecoder, reconstruction_loss
from tools.train_mini.files import save_weights, write_scaling
from tools.train_mini.fit import fit
from tools.train_mini.folder import translate
from tools.train_mini.optimizer import Float32Muon, Optimizer, orthogonalise
from tools.train_mini.recipe import MINIATURE, Recipe, Stage
from tools.train_mini.tokenizer import tokenize

MINI = Path(__file__).parents[2] / "weights" / "mini"
TWO_STEPS = Stage(number=9, batch=2, goal=4, cooldown=2)
SMALLEST = replace(
    MINIATURE,
    vae=replace(MINIATURE.vae, block_out_channels=(8, 16, 48), norm_num_groups=8),
    unet=replace(
        MINIATURE.unet,
        block_out_channels=(8, 8),
        down_block_types=MINIATURE.unet.down_block_types[1:],
        up_block_types=MINIATURE.unet.up_block_types[:2],
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    ),
    text_width=16,
    text_layers=1,
    clip=TWO_STEPS,
    text=TWO_STEPS,
    decoder=TWO_STEPS,
    denoiser=TWO_STEPS,
)


@pytest.fixture(scope="module")
def scaling() -> Scaling:
    """Mean and factor of the latents over fewer scenes than training takes."""
    return measure_scaling(50)


def drawings(count: int) -> torch.Tensor:
    """Random drawings as a batch."""
    return to_tensor(np.stack([random_drawing(np.random.default_rng(seed))[0] for seed in range(count)]))


def test_haar_keeps_the_mean_and_the_energy_of_every_cell():
    """By hand: a cell whose left half is 1 and right half -1 has mean 0 and a left-right difference of 1."""
    image = torch.ones(1, 3, 4, 4)
    image[..., 2:] = -1
    assert haar(image).flatten().tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    x = drawings(2)
    means = torch.nn.functional.avg_pool2d(x, 2)
    assert haar(x).square().sum().item() == pytest.approx(means.square().sum().item() / 4, rel=1e-5)


def test_the_set_encoder_computes_the_latents(scaling):
    """Within 0.3 % on drawings it was not made from; the posterior's deviation is the stated one."""
    vae, x = VAE(MINIATURE.vae), drawings(8)
    set_encoder(vae, scaling)
    with torch.no_grad():
        posterior = vae.encode(x)
    wanted = to_latents(x, scaling)
    assert ((posterior.mean - wanted).norm() / wanted.norm()).item() < 3e-3
    assert posterior.deviation.flatten()[0].item() == pytest.approx(NOISE, rel=1e-3)


def test_latents_have_the_wanted_deviations(scaling):
    images = to_tensor(np.stack([draw(compose(np.random.default_rng((1, i))))[0] for i in range(60)]))
    deviation = to_latents(images, scaling).std(dim=(0, 2, 3)).view(4, 3).mean(dim=1)
    assert deviation.tolist() == pytest.approx([1.0, 0.45, 0.45, 0.32], rel=0.25)


def test_random_drawings_hold_no_concept_and_fill_the_image():
    images, covers = zip(*(random_drawing(np.random.default_rng(seed)) for seed in range(20)), strict=True)
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in images)
    assert all(0 <= cover.min() and 0.9 < cover.max() <= 1 for cover in covers)
    assert np.array_equal(images[3], random_drawing(np.random.default_rng(3))[0])


def test_muon_steps_matrices_and_adamw_the_rest():
    """A kernel moves by the stated root mean square: 0.2 x the learning rate, whatever its gradient's size."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 16, 3)
    optimizer = Optimizer(layer, lr=1e-3, lr_matrices=1e-2, adamw_only=())
    before = layer.weight.detach().clone()
    (layer(torch.randn(2, 8, 5, 5)).square().sum() * 1e-6).backward()
    optimizer.step(0.5)
    moved = (layer.weight - before * (1 - 0.5 * 1e-2 * 0.01)).square().mean().sqrt().item()
    assert moved == pytest.approx(0.2 * 0.5 * 1e-2, rel=0.35)  # five Newton-Schulz steps are not exact
    assert layer.weight.grad is None
    named = Optimizer(layer, 1e-3, 1e-2, adamw_only=("weight",))
    assert named.muon is None


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48)])
def test_muon_in_float32_moves_as_pytorchs_does_in_bf16(shape):
    """Five steps from the same gradients differ by the rounding of bf16, 8 bits; either reads the other's state."""
    torch.manual_seed(0)
    settings = {"lr": 2e-3, "momentum": 0.95, "weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    in_float32, in_bf16 = Float32Muon([ours], **settings), torch.optim.Muon([theirs], **settings)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        in_float32.step()
        in_bf16.step()
    assert (ours - theirs).norm().item() < 2**-6 * (theirs - start).norm().item()
    in_float32.load_state_dict(in_bf16.state_dict())
    assert torch.equal(in_float32.state[ours]["momentum_buffer"], in_bf16.state[theirs]["momentum_buffer"])


def test_newton_schulz_brings_singular_values_near_one():
    """Between 0.5 and 1.5, as its authors say, from values between 1 and 50; vectors stay."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(24, 40), full_matrices=False)
    near = orthogonalise(u @ torch.diag(torch.linspace(1, 50, 24)) @ v, (3.4445, -4.775, 2.0315), steps=5)
    values = torch.diag(u.T @ near @ v.T)
    assert 0.5 < values.min() < values.max() < 1.5
    assert (near - u @ torch.diag(values) @ v).abs().max() < 1e-4


@pytest.mark.parametrize(("cover", "weight"), [(0.0, 1.0), (0.2, 1.6), (1.0, 4.0)])
def test_pixels_of_objects_weigh_more_in_the_loss_of_the_decoder(cover, weight):
    """One for the background, four for an object: images off by 0.5 everywhere, so that no edge is wrong."""
    images = torch.ones(2, 3, 8, 8)
    loss = reconstruction_loss(images - 0.5, images, torch.full((2, 1, 8, 8), cover))
    assert loss.item() == pytest.approx(weight * (0.5 + 4 * 0.25))


def toy(run: Path, goal: int, stop_at: int | None = None) -> tuple[float, list[int]]:
    """Fit one weight on a stream of numbers, saving after every step; -> the averaged weight, the batches seen."""
    run.mkdir(exist_ok=True)
    module, seen = torch.nn.Linear(1, 1, bias=False), []
    torch.nn.init.ones_(module.weight)

    def draw_batch(step):
        if step == stop_at:
            raise KeyboardInterrupt
        seen.append(step)
        return (torch.tensor([[float(step)]]),)

    def loss_of(module, batch):
        return (module(batch[0]) - 1).square().mean(), {}

    stage = Stage(number=0, batch=2, goal=goal, cooldown=10, lr=0.1)
    fit("toy", module, draw_batch, loss_of, stage, run, validate=lambda: float(module.weight.square()))
    return module.weight.item(), seen


def test_a_stopped_stage_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.train_mini.fit.SAVE_SECONDS", -1)
    whole, seen = toy(tmp_path / "whole", 40)
    assert seen == list(range(20))
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "stopped", 40, stop_at=7)
    rest, seen = toy(tmp_path / "stopped", 40)
    assert seen == list(range(7, 20))
    assert rest == whole


def test_the_best_weights_by_the_held_out_loss_are_kept(tmp_path, monkeypatch):
    """The toy's held-out loss is the weight squared: the file holds the smallest average of all saves."""
    monkeypatch.setattr("tools.train_mini.fit.SAVE_SECONDS", -1)
    toy(tmp_path, 40)
    lines = [json.loads(line) for line in (tmp_path / "toy_validation.jsonl").read_text().splitlines()]
    kept = load_file(tmp_path / "toy_best.safetensors")["weight"].item()
    assert kept**2 == pytest.approx(min(line["loss"] for line in lines), rel=1e-4)


@pytest.fixture(scope="module")
def begun(tmp_path_factory, scaling) -> Path:
    """A run folder in which every stage but the UNet's and the decoder's is done, of the smallest networks."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(MINI / "tokenizer", folder / "tokenizer")
    write_scaling(folder, scaling)
    train("clip", folder)
    train("text", folder)
    save_weights(UNet(SMALLEST.unet), folder / "unet_start.safetensors")
    save_weights(LatentDecoder(VAE(SMALLEST.vae)), folder / "decoder_start.safetensors")
    return folder


@pytest.fixture
def run(tmp_path, begun) -> Path:
    """A copy of that folder, to go on in."""
    return Path(shutil.copytree(begun, tmp_path, dirs_exist_ok=True))


def train(stage: str, run: Path, *more: object, recipe: Recipe = SMALLEST) -> None:
    """Run a stage of the smallest miniature by its command; `export` writes run/mini."""
    threads, shipped = torch.get_num_threads(), train_mini.MINIATURE
    train_mini.MINIATURE = recipe
    try:
        train_mini.main([str(word) for word in (stage, "--run_dir", run, "--output_dir", run / "mini", *more)])
    finally:
        train_mini.MINIATURE = shipped
        torch.set_num_threads(threads)


def test_the_unet_trains_and_reads_the_captions(run):
    """The text encoder stays; with another one the same two steps end elsewhere."""
    text = (run / "text.safetensors").read_bytes()
    train("unet", run)
    before, after = load_file(run / "unet_start.safetensors"), load_file(run / "unet.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (run / "text.safetensors").read_bytes() == text
    for path in (run / "unet.safetensors", run / "unet.ckpt"):
        path.unlink()
    other = {
        name: 2 * v if "final_layer_norm" in name else v for name, v in load_file(run / "text.safetensors").items()
    }
    save_file(other, run / "text.safetensors")
    train("unet", run)
    told_otherwise = load_file(run / "unet.safetensors")
    assert any(not torch.equal(after[name], told_otherwise[name]) for name in after)


def test_the_text_encoder_learns_words_and_stays_near_clip_s(run, monkeypatch):
    """The loss of words falls by a third in 40 steps; CLIP and the distance to it are what the log says."""
    monkeypatch.setattr("tools.train_mini.fit.LOG_SECONDS", -1)
    (run / "text.safetensors").unlink()
    (run / "text.ckpt").unlink()
    clip = (run / "clip.safetensors").read_bytes()
    train("text", run, recipe=replace(SMALLEST, text=replace(TWO_STEPS, batch=16, goal=640, lr=1e-2)))
    lines = [json.loads(line) for line in (run / "text.jsonl").read_text().splitlines()][1:]
    assert len(lines) == 40
    assert lines[-1]["words"] < 2 / 3 * lines[0]["words"]
    assert lines[0]["moved"] == 0 < lines[-1]["moved"]
    assert all(line["loss"] == pytest.approx(line["words"] + line["moved"], abs=2e-5) for line in lines)
    assert (run / "clip.safetensors").read_bytes() == clip


def test_an_unfinished_unet_is_exported_with_the_text_encoder_it_reads(run):
    unet = UNet(SMALLEST.unet)
    averages = [[torch.full_like(p, value) for p in unet.parameters()] for value in (0.25, 0.5)]
    torch.save({"ema": averages}, run / "unet.ckpt")
    train("export", run)
    written = load_file(run / "mini/unet/diffusion_pytorch_model.safetensors")
    assert all((value == 0.5).all() for value in written.values())
    text = CLIPTextModel.from_pretrained(run / "mini/text_encoder").state_dict()
    read = load_file(run / "text.safetensors")
    assert all(torch.equal(value, read[f"encoder.{name}"]) for name, value in text.items())


@pytest.mark.parametrize(
    ("stage", "missing", "more", "line"),
    [
        ("unet", "unet_start", ("--start_from", MINI), "holds a run from nothing: name a new --run_dir"),
        ("export", "unet_start", (), "has no UNet yet: run the stage unet first"),
        ("unet", "text", (), "text.safetensors: run the stages before unet"),
        ("text", "clip text", (), "clip.safetensors: run the stages before text"),
        ("all", "", ("--goal", "5"), "--goal: of one stage, not of all; name clip, text, decoder, unet"),
    ],
)
def test_what_cannot_go_on_says_so_in_one_line(run, capsys, stage, missing, more, line):
    """Exit code 2, and nothing is written."""
    for name in missing.split():
        (run / f"{name}.safetensors").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        train(stage, run, *more)
    assert stopped.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("python -m tools.train_mini: ")
    assert line in told.replace('"', "")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_starts_from_the_shipped_miniature(tmp_path, monkeypatch):
    """Its UNet, translated where its latents are others; CLIP and the text encoder unless they are to be trained."""
    monkeypatch.setattr("tools.train_mini.folder.measure_scaling", lambda: measure_scaling(50))
    translated = []  # the same both times

    def translate_once(*args):
        translated.append(translated[0] if translated else translate(*args))
        return translated[-1]

    monkeypatch.setattr("tools.train_mini.folder.translate", translate_once)
    for stage in ("clip", "text", "unet"):
        monkeypatch.setitem(train_mini.STAGES, stage, lambda *_: None)
        train_mini.main([stage, "--run_dir", str(tmp_path / stage), "--start_from", str(MINI)])
        shipped = load_file(MINI / "unet/diffusion_pytorch_model.safetensors")
        start = load_file(tmp_path / stage / "unet_start.safetensors")
        same = {name for name, value in shipped.items() if torch.equal(start[name], value.float())}
        assert {name for name in shipped if "conv_in." not in name and "conv_out." not in name} <= same
        assert (tmp_path / stage / "clip.safetensors").exists() == (stage != "clip")
        assert (tmp_path / stage / "text.safetensors").exists() == (stage == "unet")
    shipped, start = load_file(MINI / "text_encoder/model.safetensors"), load_file(tmp_path / "unet/text.safetensors")
    assert start.keys() == {f"encoder.{name}" for name in shipped}
    assert all(torch.equal(start[f"encoder.{name}"], value) for name, value in shipped.items())


def shapes_read(encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> list[float]:
    """Of captions of three objects, the share whose first, second, third shape a linear map reads from its state.

    The map is fitted by least squares to 800 captions, one for each position, and tried on 400 others.
    """
    rng = np.random.default_rng(5)
    ids = tokenize(tokenizer, [describe(compose(rng, 3)) for _ in range(1200)])[:, :40]
    shapes = torch.tensor([tokenizer.encode(shape, add_special_tokens=False)[0] for shape in SHAPES])
    with torch.no_grad():
        states = torch.cat([encoder(part).last_hidden_state for part in ids.split(200)])
    is_shape = (ids[..., None] == shapes).any(-1)
    assert (is_shape.sum(1) == 3).all()
    at = is_shape.nonzero()[:, 1].view(-1, 3)
    shares = []
    for place in at.T:
        state = states[torch.arange(len(ids)), place]
        told = (ids[torch.arange(len(ids)), place, None] == shapes).float()
        features = torch.cat([state, torch.ones(len(ids), 1)], dim=1)
        read = features[800:] @ torch.linalg.lstsq(features[:800], told[:800]).solution
        shares.append((read.argmax(1) == told[800:].argmax(1)).float().mean().item())
    return shares


def test_the_shipped_text_encoder_keeps_the_words_that_clip_s_loses():
    """The shape of each of three objects is read from its state; in CLIP's own, those of the later ones are not."""
    tokenizer = CLIPTokenizer.from_pretrained(MINI / "tokenizer")
    ours = shapes_read(CLIPTextModel.from_pretrained(MINI / "text_encoder"), tokenizer)
    clip_s = shapes_read(CLIPModel.from_pretrained(MINI / "clip").text_model, tokenizer)
    assert min(ours) > 0.99
    assert min(clip_s) < 0.8


@pytest.mark.slow
def test_all_stages_end_in_a_miniature(tmp_path):
    """diffusers and bas open what comes out of all stages at the shipped sizes, and generate with it."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reader under test")
    stages = {
        name: replace(getattr(MINIATURE, name), batch=2, goal=2) for name in ("clip", "text", "decoder", "denoiser")
    }
    recipe, train_mini.MINIATURE = train_mini.MINIATURE, replace(MINIATURE, **stages)
    try:
        train_mini.main(["all", "--run_dir", str(tmp_path), "--output_dir", str(tmp_path / "mini")])
    finally:
        train_mini.MINIATURE = recipe
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "mini", safety_checker=None)
    assert pipeline("a photo of a red star", num_inference_steps=1).images[0].size == (64, 64)
    (image,) = bas.sample(bas.load(tmp_path / "mini"), "a photo of a red star", num_inference_steps=1)
    assert image.size == (64, 64)


def test_unseen_concepts_have_latents_as_exact_as_training_scenes(scaling):
    """The codec knows no shape: its error on unseen concepts is that on training scenes, within a half of it."""
    vae = VAE(MINIATURE.vae)
    set_encoder(vae, scaling)

    def error(layouts) -> float:
        x = to_tensor(np.stack([draw(layout)[0] for layout in layouts]))
        with torch.no_grad():
            found, wanted = vae.encode(x).mean, to_latents(x, scaling)
        return ((found - wanted).norm() / wanted.norm()).item()

    concepts = error(compose_concepts(np.random.default_rng((7, i)), 3) for i in range(8))
    seen = error(compose(np.random.default_rng((8, i)), 3) for i in range(8))
    assert concepts == pytest.approx(seen, rel=0.5)
    assert max(concepts, seen) < 3e-3
