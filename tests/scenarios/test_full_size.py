"""At the size of Stable Diffusion 2.1-base and of SDXL, with random weights: what a person with real weights will run.

Everything here is slow and wants about 15 GB of memory and 7 GB of disk.
"""

import json
import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bas.models.bundle import Models
from bas.models.config import VAEConfig
from bas.models.text import build_text_encoder
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.pretrained.folder import build_networks, save_model
from bas.pretrained.hub import find_spec
from bas.pretrained.single_file import clip_tokenizer
from bas.runtime.device import cpu_multiplies_bf16
from bas.schedulers import NoiseSchedule
from tools.bench.material import SD21_TEXT, SD21_UNET

pytestmark = pytest.mark.slow
in_bf16 = pytest.mark.skipif(not cpu_multiplies_bf16(), reason="this processor emulates bf16: a step takes hours")

SCENE = Path(__file__).parents[1] / "reference" / "official" / "scene"

# Runs the command and prints the peak of its resident memory: a child's own peak cannot be read from outside.
MEASURED = """
import json, sys
from bas.cli.entry import main
from bas.runtime.memory import peak_bytes
code = main(sys.argv[1:])
print(json.dumps({"code": code, "peak_gb": peak_bytes() / 2**30}))
"""


@pytest.fixture(scope="module")
def sd21_folder(tmp_path_factory) -> Path:
    """A whole SD 2.1-base of random weights in half precision, on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd21")
    networks = UNet(SD21_UNET), VAE(VAEConfig()), build_text_encoder(SD21_TEXT)
    save_model(
        Models(*networks, clip_tokenizer(pad_with_exclamation_mark=True), NoiseSchedule(steps_offset=1)),
        folder,
        torch.float16,
    )
    return folder


def measured_training(model: Path, run: Path, flags: str) -> dict:
    """`bas train` on the official scene, in a process of its own. -> exit code, and the peak of its memory in GB"""
    paths = ["train", str(SCENE), "--weights", str(model), "--output_dir", str(run)]
    words = ["--initializer_tokens", "creature", "bowl", "stone", "--img_log_steps", "0", "--checkpointing_steps", "0"]
    return measured(run.parent, [*paths, *words, *flags.split()])


def measured(folder: Path, words: list[str]) -> dict:
    """A command in a process of its own. -> exit code, and the peak of its memory in GB"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words],
        env={**os.environ, "BAS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"\nbas {words[0]}: peak resident memory {result['peak_gb']:.1f} GB, {time.monotonic() - began:.0f} s")
    return result


def steps_of(run: Path) -> list[int]:
    """The steps that a run took, each with a sound loss and gradient."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 10 and line["grad_norm"] > 0 for line in lines)
    return [line["step"] for line in lines]


def test_two_steps_of_phase1_at_full_size(sd21_folder, tmp_path):
    """`bas train` reads 866 M + 340 M + 84 M weights, takes two steps on a real image, and writes the model."""
    run = tmp_path / "run"
    result = measured_training(sd21_folder, run, "--phase1_train_steps 2 --phase2_train_steps 0 --save_precision fp16")
    assert result["code"] == 0
    assert result["peak_gb"] < 14
    assert steps_of(run) == [1, 2]
    assert (run / "concepts.safetensors").exists()


@in_bf16
def test_two_steps_of_a_lora_at_full_size(sd21_folder, tmp_path):
    """Rank 16 for UNet and text encoder: two steps of phase 2 on a CPU within 6 GB, and a run of 40 MB at most."""
    run = tmp_path / "run"
    flags = "--train lora --phase1_train_steps 0 --phase2_train_steps 2 --no_prior_preservation"
    result = measured_training(sd21_folder, run, f"{flags} --mixed_precision bf16 --gradient_checkpointing")
    assert result["code"] == 0
    assert result["peak_gb"] < 6
    assert steps_of(run) == [1, 2]
    tuned = load_file(run / "tuned.safetensors")
    assert sum(tensor.numel() for tensor in tuned.values()) == pytest.approx(13.70e6, rel=1e-3)
    kept = [path for path in run.iterdir() if path.is_file()]  # the scene has a folder of its own
    assert sum(path.stat().st_size for path in kept) < 40e6


def write_sdxl(folder: Path) -> None:
    """A whole SDXL of random weights in half precision: every matrix repeats the same million drawn numbers."""
    models, drawn = build_networks(find_spec("sdxl")), torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for network in models.networks.values():
        for name, p in list(network.named_parameters()):
            values = torch.full(p.shape, float(name.endswith("weight")))  # of norms and biases
            if p.ndim > 1:
                scale = 0.02 if "embedding" in name else (p.numel() // len(p)) ** -0.5
                values = scale * drawn.repeat(-(-p.numel() // len(drawn)))[: p.numel()].view(p.shape)
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, torch.nn.Parameter(values.half()))
    save_model(models, folder, torch.float16)


@in_bf16
def test_sdxl_at_full_size_trains_and_samples_in_bf16(tmp_path):
    """2.6 + 0.8 billion random weights: one step of phase 1 at 512x512, a small run, and one step of sampling from it,
    each within 10 GB of the host's memory."""
    model, run = tmp_path / "sdxl", tmp_path / "run"
    written = get_context("spawn").Process(target=write_sdxl, args=(model,))  # with it ends the memory of the networks
    written.start()
    written.join()
    assert written.exitcode == 0
    flags = "--train lora --phase1_train_steps 1 --phase2_train_steps 0 --no_prior_preservation --resolution 512"
    trained = measured_training(model, run, f"{flags} --mixed_precision bf16 --gradient_checkpointing")
    assert steps_of(run) == [1]
    rows = load_file(run / "concepts.safetensors")
    assert (rows["handles"].shape, rows["handles_2"].shape) == ((3, 768), (3, 1280))
    words = ["sample", str(run), "--prompt", "a photo of <asset0>", "--output_path", str(tmp_path / "image.png")]
    size = ["--height", "512", "--width", "512", "--num_inference_steps", "1", "--precision", "bf16"]
    sampled = measured(tmp_path, [*words, *size])
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (512, 512)
    assert max(trained["peak_gb"], sampled["peak_gb"]) < 10
