"""The training of the miniature, one step of the smallest networks at a time."""

import pickle
import shutil
import sys
import threading
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

import bas
from bas.io.files import write_json
from bas.models.config import UNetConfig, VAEConfig
from bas.models.unet import UNet
from bas.models.vae import VAE, Posterior
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import compose
from tools.train_mini import __main__ as train_mini
from tools.train_mini.clip import clip_config
from tools.train_mini.files import save_weights
from tools.train_mini.fit import PREPARING, batches, fit
from tools.train_mini.folder import export
from tools.train_mini.presets import PRESETS, Preset, Recipe
from tools.train_mini.vae import reconstruct
from tools.train_mini.world import load_world, make_world

MINI = Path(__file__).parents[2] / "weights" / "mini"
ONE_STEP = Recipe(minutes=1e-9, batch=2, lr=1e-2, ema=0.9)
SCENES = 4
STAGES = ("vae", "clip", "unet", "decoder")  # those that train
SMALLEST = Preset(
    resolution=16,
    scenes=SCENES,
    vae=VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16),
    vae_recipe=ONE_STEP,
    text_width=16,
    text_layers=1,
    patch=8,
    clip_recipe=ONE_STEP,
    unet=UNetConfig(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    ),
    unet_recipe=ONE_STEP,
    decoder_recipe=ONE_STEP,
)


@pytest.fixture
def run(tmp_path):
    """A run folder in which every stage before the UNet's is done."""
    shutil.copytree(MINI / "tokenizer", tmp_path / "tokenizer")
    layouts = [compose(np.random.default_rng(seed)) for seed in range(SCENES)]
    (tmp_path / "layouts.pkl").write_bytes(pickle.dumps(layouts))
    np.save(tmp_path / "images.npy", np.zeros((SCENES, 16, 16, 3), dtype=np.uint8))
    torch.save(torch.ones(SCENES, 2, 4, 8, 8, dtype=torch.float16), tmp_path / "latents.pt")
    torch.save(torch.zeros(SCENES, 8, 8, dtype=torch.float16), tmp_path / "objects.pt")
    write_json(tmp_path / "vae.json", SMALLEST.vae.to_json())
    save_weights(VAE(SMALLEST.vae), tmp_path / "vae.safetensors")
    clip = CLIPModel(clip_config(SMALLEST, CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")))
    save_weights(clip, tmp_path / "clip.safetensors")
    save_weights(UNet(SMALLEST.unet), tmp_path / "unet_start.safetensors")
    return tmp_path


def train(stage, run, monkeypatch, preset=SMALLEST, start_from=None):
    """One step of a stage, or of all, by its command; `export` writes run/mini."""
    monkeypatch.setitem(PRESETS, "cpu", preset)
    monkeypatch.setattr(train_mini, "fast_attention", lambda device: None)  # it sets switches of the whole process
    words = [stage, "--run_dir", run, "--output_dir", run / "mini"]
    words += ["--start_from", start_from] if start_from else []
    monkeypatch.setattr(sys, "argv", ["train_mini.py", *map(str, words)])
    threads = torch.get_num_threads()
    try:
        train_mini.main()
    finally:
        torch.set_num_threads(threads)


def test_the_world_is_drawn_once_with_what_things_cover(tmp_path):
    make_world(SMALLEST, tmp_path)
    images, layouts = load_world(tmp_path)
    covers = np.load(tmp_path / "covers.npy")
    assert len(images) == len(layouts) == len(covers) == SCENES
    for image, layout, cover in zip(images, layouts, covers, strict=True):
        wanted, masks = draw(layout, SMALLEST.resolution)
        assert (image == wanted).all()
        assert np.abs(cover / 255 - masks.sum(0)).max() <= 0.5 / 255 + 1e-6
    assert covers.max() == 255


def test_batches_are_drawn_ahead_and_come_in_order():
    """The third is drawn while the second is still being drawn; a late one is waited for."""
    third_is_drawn, drawn = threading.Event(), []

    def draw(i):
        if i == 6:
            assert third_is_drawn.wait(10)
        drawn.append(i)
        if i == 7:
            third_is_drawn.set()
        return i

    stream = batches(draw, 5)
    assert [next(stream) for _ in range(40)] == list(range(5, 45))
    assert drawn.index(7) < drawn.index(6)
    stream.close()
    with pytest.raises(ZeroDivisionError):
        list(batches(lambda i: 1 // (2 - i), 0))


def test_batches_that_nobody_asks_for_are_not_drawn():
    """Once closed, only what was being drawn is drawn to its end."""
    go_on, started = threading.Event(), []

    def draw(i):
        started.append(i)
        if i > 1:
            assert go_on.wait(10)
        return i

    stream = batches(draw, 0)
    assert [next(stream), next(stream)] == [0, 1]
    threading.Timer(1, go_on.set).start()  # by then those that wait for a thread are called off
    stream.close()
    assert set(started) <= set(range(2 + PREPARING))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stage_that_goes_on_takes_the_next_batch(tmp_path, monkeypatch, workers):
    """Stopped behind its checkpoint and started again, it sees every batch once and ends where a whole one ends."""
    clock = count(0, 50)  # seconds: each look at it is 50 later, so a checkpoint is due in every third step
    monkeypatch.setattr("tools.train_mini.fit.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the whole process
    recipe, seen = Recipe(minutes=10, batch=1, lr=0.1, ema=0.9, workers=workers), []

    def ended(run, stop_at=None):
        run.mkdir(exist_ok=True)
        module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(module.weight)

        def loss_of(module, batch):
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append(int(batch))
            return (module(batch.view(1, 1)) - 1).square().mean(), {}

        fit("toy", module, lambda i: torch.tensor(float(i)), loss_of, recipe, run)
        return module.weight.item()

    whole = ended(tmp_path / "whole")
    assert sorted(seen) == list(range(12 * workers))
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        ended(tmp_path / "stopped", stop_at=6 * workers)
    assert ended(tmp_path / "stopped") == pytest.approx(whole, abs=1e-6)
    assert sorted(seen) == list(range(12 * workers))


@pytest.mark.parametrize(("cover", "weight"), [(0, 1.0), (51, 1.6), (255, 4.0)])
def test_pixels_of_things_weigh_more_in_the_loss_of_the_vae(tmp_path, cover, weight):
    """One for the background, four for a thing: on pictures off by 0.5 everywhere, so that no edge is wrong."""
    grey = np.full((514, 8, 8, 3), 255, dtype=np.uint8)  # +1 once scaled
    np.save(tmp_path / "images.npy", grey)
    np.save(tmp_path / "covers.npy", np.full((514, 8, 8), cover, dtype=np.uint8))
    (tmp_path / "layouts.pkl").write_bytes(pickle.dumps([None] * 514))

    class HalfWhite:
        def encode(self, x):
            return Posterior(torch.zeros(len(x), 4, 4, 4), torch.zeros(len(x), 4, 4, 4))

        def decode(self, z):
            return torch.full((len(z), 3, 8, 8), 0.5)

    draw, loss_of, _, _ = reconstruct(tmp_path, torch.device("cpu"), ONE_STEP)
    loss, parts = loss_of(HalfWhite(), draw(0))
    assert parts["pixels"].item() == pytest.approx(weight * 0.5)
    assert loss.item() == pytest.approx(weight * (0.5 + 4 * 0.25))
    assert parts["psnr"].item() == pytest.approx(12.0412, abs=1e-4)  # 10 log10(4 / 0.25)


def test_the_unet_trains_and_clip_stays(run, monkeypatch):
    clip = (run / "clip.safetensors").read_bytes()
    train("unet", run, monkeypatch)
    before, after = load_file(run / "unet_start.safetensors"), load_file(run / "unet.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (run / "clip.safetensors").read_bytes() == clip


def test_the_unet_reads_the_captions(run, monkeypatch):
    """Its first step is another one where CLIP's text tower is another one."""
    train("unet", run, monkeypatch)
    told = load_file(run / "unet.safetensors")
    (run / "unet.safetensors").unlink()
    clip = load_file(run / "clip.safetensors")
    save_file(
        {name: 2 * value if "final_layer_norm" in name else value for name, value in clip.items()},
        run / "clip.safetensors",
    )
    train("unet", run, monkeypatch)
    told_otherwise = load_file(run / "unet.safetensors")
    assert any(not torch.equal(told[name], told_otherwise[name]) for name in told)


def test_an_unfinished_unet_is_exported_with_the_text_tower_of_clip(run, tmp_path):
    unet = UNet(SMALLEST.unet)
    average = [torch.full_like(p, 0.5) for p in unet.parameters()]
    torch.save({"module": unet.state_dict(), "average": average}, run / "unet.ckpt")
    export(SMALLEST, run, tmp_path / "mini")
    written = load_file(tmp_path / "mini/unet/diffusion_pytorch_model.safetensors")
    assert all((value == 0.5).all() for value in written.values())
    text = CLIPTextModel.from_pretrained(tmp_path / "mini/text_encoder").state_dict()
    clip = load_file(run / "clip.safetensors")
    assert all(torch.equal(value, clip[f"text_model.{name}"]) for name, value in text.items())


def test_a_decoder_trained_alone_is_exported_beside_the_unet_that_the_run_began_with(run, monkeypatch):
    vae, unet = load_file(run / "vae.safetensors"), load_file(run / "unet_start.safetensors")
    learnt = {name: value + name.startswith("decoder") for name, value in vae.items()}
    save_file(learnt, run / "decoder.safetensors")
    train("export", run, monkeypatch)
    for wanted, part in ((unet, "unet"), (learnt, "vae")):
        written = load_file(run / f"mini/{part}/diffusion_pytorch_model.safetensors")
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[name], value.half()) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("stage", "missing", "start_from", "line"),
    [
        ("unet", "unet_start", MINI, "{run} holds a run from nothing, with another VAE: name a new --run_dir"),
        ("export", "unet_start", None, "{run} has no UNet yet: run the stage unet first"),
        ("export", "vae", None, "{run}/vae.safetensors: run the stages before export in {run} first"),
        ("unet", "clip", None, "{run}/clip.safetensors: run the stages before unet in {run} first"),
    ],
)
def test_what_cannot_go_on_says_so_in_one_line(run, monkeypatch, capsys, stage, missing, start_from, line):
    """Latents belong to the VAE that made them, and a stage to those before it: exit code 2, and nothing is written."""
    (run / f"{missing}.safetensors").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        train(stage, run, monkeypatch, start_from=start_from)
    assert stopped.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("python -m tools.train_mini: ")
    assert line.format(run=run) in told.replace('"', "")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stage", ["clip", "unet"])
def test_a_run_starts_from_the_shipped_miniature(tmp_path, monkeypatch, stage):
    """Its UNet is where training starts; CLIP is taken too unless it is to be trained."""
    monkeypatch.setitem(train_mini.STAGES, stage, lambda *_: None)
    train(stage, tmp_path, monkeypatch, start_from=MINI)
    shipped = load_file(MINI / "unet/diffusion_pytorch_model.safetensors")
    start = load_file(tmp_path / "unet_start.safetensors")
    assert all(torch.equal(start[name], value.float()) for name, value in shipped.items())
    assert (tmp_path / "clip.safetensors").exists() == (stage != "clip")


def test_the_shipped_text_tower_is_that_of_the_shipped_clip():
    text, clip = (load_file(MINI / part / "model.safetensors") for part in ("text_encoder", "clip"))
    told = {name.removeprefix("text_model."): value for name, value in clip.items() if name.startswith("text_model.")}
    assert told.keys() == text.keys()
    assert all(torch.equal(told[name], text[name]) for name in text)


def shortened(preset: Preset) -> Preset:
    """The preset's own networks, on 520 pictures of 64x64 and one step of each stage."""
    factor = 2 ** (len(preset.vae.block_out_channels) - 1)
    vae, unet = replace(preset.vae, sample_size=64), replace(preset.unet, sample_size=64 // factor)
    recipes = {f"{stage}_recipe": ONE_STEP for stage in STAGES}
    return replace(preset, resolution=64, scenes=520, vae=vae, unet=unet, **recipes)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_stage_of_a_preset_ends_in_a_miniature(name, tmp_path, monkeypatch):
    """diffusers and bas open what comes out of all stages, and draw with it."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reader under test")
    train("all", tmp_path, monkeypatch, shortened(PRESETS[name]))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "mini", safety_checker=None)
    assert pipeline("a photo of a red star", num_inference_steps=1).images[0].size == (64, 64)
    (picture,) = bas.sample(bas.load(tmp_path / "mini"), "a photo of a red star", num_inference_steps=1)
    assert picture.size == (64, 64)


def test_the_gpu_preset_is_ten_minutes_of_budget():
    preset = PRESETS["gpu"]
    recipes = [getattr(preset, f"{stage}_recipe") for stage in STAGES]
    assert sum(recipe.minutes for recipe in recipes) == 10
    assert preset.unet_recipe.minutes == max(recipe.minutes for recipe in recipes)
