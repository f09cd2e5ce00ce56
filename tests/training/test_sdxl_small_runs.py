"""SDXL's small runs: each kind trains what it names, resumes to the same bits and reads as it was trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import bas
from bas.cli.entry import main
from bas.io.run_files import CONCEPTS, TUNED, read_concepts
from bas.models.text import encode_ids, tokenize
from bas.pretrained.folder import read_spec
from bas.training import loop as training
from bas.training.base_model import Base
from bas.training.loop import trained
from bas.training.phase_state import trained_weights
from tests.helpers.cases import some_fast
from tests.helpers.faults import before_step
from tests.helpers.sdxl import XLBench
from tests.helpers.tiny import refused, snapshot

KINDS = {  # what its names hold, and how it is trained
    "lora": (("lora_A", "lora_B"), {"rank": 2, "conv_rank": 1, "alpha": 3.0, "train_text_encoder": True}),
    "token": (("to_k.lora_", "to_v.lora_"), {"rank": 2}),
    "kv": (("attn2.to_k", "attn2.to_v"), {}),
    "v": (("attn2.to_v",), {}),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return XLBench(tmp_path_factory.mktemp("sdxl bench"))


SMALL = {"train": "lora", "rank": 2, "train_text_encoder": True, "mixed_precision": "bf16"}
SMALL |= {"phase1_train_steps": 1, "phase2_train_steps": 1}


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory):
    """A finished LoRA run in bf16, its text encoders trained too."""
    return bas.train(bench.config(tmp_path_factory.mktemp("sdxl run") / "run", **SMALL))


def prediction(models) -> torch.Tensor:
    """What the model predicts for one latent and a prompt with handles."""
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        context = encode_ids(models.text_encoders, tokenize(models.tokenizer, ["a photo of <asset0> and <asset1>"]))
        return models.unet(z, 500, context.states, pooled=context.pooled).sample


@pytest.mark.parametrize("kind", some_fast(KINDS, "lora"))
def test_a_small_run(bench, tmp_path, kind, monkeypatch):
    """Every weight of the base outside the kind keeps its bits, everything that it names moves; what was cut off in
    phase 2 resumes to the same bits; loaded from its folder and its base, the run predicts what was trained."""
    part, changes = KINDS[kind]
    settings = {"train": kind, "learning_rate": 1e-2, "phase1_train_steps": 1, "phase2_train_steps": 2} | changes
    config = bench.config(tmp_path / "whole", save_precision="fp32", **settings)
    before = {name: snapshot(network) for name, network in bas.load(bench.model, "cpu", torch.float32).networks.items()}
    with trained(config) as run:
        names = [name for name in trained_weights(run.models, config) if not name.startswith("handles")]
        assert all(any(piece in name for piece in part) for name in names)
        encoders = {name.partition(".")[0] for name in names}
        assert encoders == ({"unet", "text_encoder", "text_encoder_2"} if kind == "lora" else {"unet"})
        for component, network in run.models.networks.items():
            after = network.state_dict()
            for name, tensor in before[component].items():
                if "token_embedding" not in name:
                    assert torch.equal(tensor, after[name]) == (f"{component}.{name}" not in names), name
        for name, p in trained_weights(run.models, config).items():
            assert ".lora_B." not in name or p.any(), name
        expected = prediction(run.models)
        training.finish(run)
    tuned = {name.replace("text_model.", "") for name in load_file(tmp_path / "whole" / TUNED)}
    assert tuned == {name.replace("text_model.", "") for name in names}
    rows = read_concepts(tmp_path / "whole")[0]
    assert (rows["handles"].shape, rows["handles_2"].shape) == ((3, 64), (3, 128))
    models = bas.load(tmp_path / "whole", "cpu", torch.float32)
    assert models.handles == ("<asset0>", "<asset1>", "<asset2>")
    assert (prediction(models) - expected).abs().max() < 1e-5 * expected.abs().max()

    def dying(*_):
        raise KeyboardInterrupt

    cut = bench.config(tmp_path / "cut", save_precision="fp32", checkpointing_steps=1, **settings)
    with monkeypatch.context() as patch:
        before_step(patch, 3, dying)
        with pytest.raises(KeyboardInterrupt):
            bas.train(cut)
    bas.train(bench.config(tmp_path / "cut", resume_from_checkpoint="latest", save_precision="fp32", **settings))
    for file in (TUNED, CONCEPTS):
        whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "cut"))
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_a_second_scene_is_trained_as_if_it_were_alone(bench, run, tmp_path):
    """One base in memory, two runs one after the other, bf16 and both text encoders: the first leaves no trace."""
    base = Base.open(bench.model, torch.device("cpu"), keep=True)
    training.train(bench.config(tmp_path / "first", **SMALL | {"train_text_encoder": False, "seed": 5}), base)
    training.train(bench.config(tmp_path / "second", **SMALL), base)
    for file in (TUNED, CONCEPTS):
        alone, second = (load_file(folder / file) for folder in (run, tmp_path / "second"))
        assert alone.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in alone.items())


def test_every_command_takes_a_small_run(run, tmp_path, monkeypatch):
    """Sampling with a layout of the run's own pixels, all concepts together, attention, editing, report and info."""
    monkeypatch.chdir(tmp_path)
    Path("layout.json").write_text('{"<asset0>": [0, 0, 0.5, 1], "<asset1>": [0.5, 0, 1, 1]}')
    flags = ["--num_inference_steps", "2", "--device", "cpu"]
    prompt = ["--prompt", "a photo of (<asset0>:1.2) and <asset1>"]
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    mask.save("mask.png")
    for words in (
        ["sample", str(run), *prompt, *flags, "--output_path", "plain.png"],
        ["sample", str(run), *prompt, *flags, "--layout", "layout.json", "--own_pixels", "--output_path", "layout.png"],
        ["vary", str(run), *flags, "--num_images", "1", "--output_dir", "varied"],
        ["attend", str(run), *prompt, *flags, "--output_dir", "attention"],
        [
            "edit",
            str(run),
            "--init_image",
            "plain.png",
            "--mask",
            "mask.png",
            *prompt,
            *flags,
            "--output_path",
            "e.png",
        ],
        ["report", str(run)],
        ["info", str(run)],
    ):
        assert main(words) == 0, words[0]
    plain, layout, edited = (np.asarray(Image.open(f"{name}.png"), np.float32) for name in ("plain", "layout", "e"))
    assert plain.shape == (64, 64, 3)
    assert np.abs(plain - layout).max() > 0
    assert np.array_equal(plain[32:], edited[32:])
    assert np.abs(plain[:32] - edited[:32]).max() > 0
    assert [*Path("varied").glob("*.png")]
    assert [*Path("attention").rglob("*.npy")]


def test_a_base_that_is_not_here_is_named(bench, run, tmp_path):
    """The base is found by its name and hash, or by --base where it was moved."""
    away = bench.model.rename(tmp_path / "moved")
    try:
        with refused("keeps no base model"):
            read_spec(run)
        spec = read_spec(run, base=away)
    finally:
        away.rename(bench.model)
    assert (spec.family, spec.handles[0]) == ("Stable Diffusion XL", "<asset0>")
