"""At the size of Stable Diffusion 2.1-base, with random weights: what a person with real weights will run.

Everything here is slow and wants about 15 GB of memory and 6 GB of disk.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bas.models.bundle import Models
from bas.models.config import VAEConfig
from bas.models.text import build_text_encoder
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.pretrained.folder import save_model
from bas.pretrained.single_file import clip_tokenizer
from bas.schedulers import NoiseSchedule
from tools.bench.material import SD21_TEXT, SD21_UNET

pytestmark = pytest.mark.slow

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


def test_two_steps_of_phase1_at_full_size(sd21_folder, tmp_path):
    """`bas train` reads 866 M + 340 M + 84 M weights, takes two steps on a real image, and writes the model."""
    run = tmp_path / "run"
    flags = (
        "--phase1_train_steps 2 --phase2_train_steps 0 --img_log_steps 0 --checkpointing_steps 0 --save_precision fp16"
    )
    command = [
        sys.executable,
        "-c",
        MEASURED,
        "train",
        str(SCENE),
        "--weights",
        str(sd21_folder),
        "--output_dir",
        str(run),
    ]
    done = subprocess.run(
        [*command, *flags.split(), "--save_precision", "fp16", "--initializer_tokens", "creature", "bowl", "stone"],
        env={**os.environ, "BAS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"\npeak resident memory: {result['peak_gb']:.1f} GB")
    assert result["code"] == 0
    assert result["peak_gb"] < 14
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["loss"] < 10 and line["grad_norm"] > 0 for line in lines)
    assert (run / "concepts.safetensors").exists()
