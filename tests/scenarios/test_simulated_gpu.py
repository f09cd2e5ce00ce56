"""On a GPU that is simulated, nothing is left on the wrong device, and the numbers are those of the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shlex import split
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import backend_registration

from bas.cli.entry import main
from tests.helpers.kills import child
from tests.helpers.tiny import Bench

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch takes no device that is written in Python",
)
ROUNDING = 1e-5  # relative: attention takes another path where there is no fused kernel
MODEL = "--weights {model} --class_data_dir '{class_images}' --num_class_images 2 --mixed_precision no"
FROM_RUN = "{folder}/run --num_inference_steps 2 --precision fp32"
BOTH = '--prompt "a photo of (<asset0>:1.3) and <asset1>"'
COMMANDS = (
    f"train {{scene}} {MODEL} --output_dir {{folder}}/run --phase1_train_steps 2 --phase2_train_steps 2 "
    "--img_log_steps 4 --preview_inference_steps 2 --checkpointing_steps 2",
    *(f"sample {FROM_RUN} {BOTH} --sampler {s} --output_path {{folder}}/{s}.png" for s in ("ddim", "ddpm", "dpmpp_2m")),
    f"sample {FROM_RUN} {BOTH} --separate --layout {{layout}} --own_pixels --output_path {{folder}}/steered.png",
    f"vary {FROM_RUN} --num_images 2 --output_dir {{folder}}/vary",
    f"attend {FROM_RUN} {BOTH} --output_dir {{folder}}/attend",
    f"edit {FROM_RUN} {BOTH} --init_image {{scene}}/img.png --mask {{scene}}/mask0.png "
    "--output_path {folder}/edit.png",
    f"evaluate {{worded}} {MODEL} --output_dir {{folder}}/evaluation --methods bas cd-m --metrics miniature "
    "--prompts 1 --phase1_train_steps 1 --phase2_train_steps 1 --num_inference_steps 1",
)


def commands(bench: Bench, folder: Path, device: str) -> list[list[str]]:
    """A training, what can be done with its run, and an evaluation, all into one folder."""
    worded = folder / "worded"  # an evaluation needs a word for each concept; of two it draws three subsets
    if not worded.exists():
        copytree(bench.scene, worded, ignore=ignore_patterns("mask2.*"))
        concepts = [{"word": word} for word in ("creature", "bowl")]
        (worded / "scene.json").write_text(json.dumps({"concepts": concepts}))
    layout = folder / "layout.json"
    layout.write_text(json.dumps({"<asset0>": [0, 0, 0.5, 1], "<asset1>": [0.5, 0, 1, 1]}))
    places = {
        "folder": folder,
        "scene": bench.scene,
        "worded": worded,
        "model": bench.model,
        "layout": layout,
        "class_images": bench.class_images,
    }
    return [split(f"{command} --device {device}".format(**places)) for command in COMMANDS]


def execute(program: str, words: tuple[str, ...], folder: str) -> None:
    """Run a program in this process, and leave what it prints in files."""
    torch.set_num_threads(1)  # the tensors are tiny
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(f"{folder}/{stream.fileno()}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = ["-c", *words]
    exec(program, {"__name__": "__main__"})


def simulate(program: str, *words: str) -> subprocess.CompletedProcess:
    """What `python -c` gives with this program and these words, in a fork of a process that has imported PyTorch."""
    with TemporaryDirectory() as folder:
        code = child(execute, program, words, folder)
        printed, told = (Path(folder, number).read_text() for number in "12")
    return subprocess.CompletedProcess(words, code, printed, told)


COMMAND_LINES = "from tests.helpers.simulated_gpu import main; main()"


@pytest.fixture(scope="module")
def folders(bench, tmp_path_factory) -> tuple[Path, Path]:
    """What the commands wrote on the CPU, and on the simulated GPU."""
    cpu, gpu = (tmp_path_factory.mktemp(device) for device in ("cpu", "gpu"))
    assert [main(words) for words in commands(bench, cpu, "cpu")] == [0] * len(COMMANDS)
    done = simulate(COMMAND_LINES, json.dumps(commands(bench, gpu, "gpu")))
    assert done.returncode == 0, done.stderr
    return cpu, gpu


def numbers(value) -> list[float]:
    """The numbers of a structure of lists and dictionaries, in order; times left out."""
    if isinstance(value, dict):
        return [number for key in sorted(value) if key != "seconds" for number in numbers(value[key])]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize(("path", "count"), [("run/metrics.jsonl", 26), ("evaluation/results.jsonl", 30)])
def test_the_numbers_are_those_of_the_cpu(folders, path, count):
    """Losses and gradients of both phases, prior and all; the scores of images, attention and confusion."""
    cpu, gpu = ([numbers(json.loads(line)) for line in (f / path).read_text().splitlines()] for f in folders)
    assert sum(map(len, cpu)) >= count
    assert [number for row in gpu for number in row] == pytest.approx(
        [number for row in cpu for number in row], rel=ROUNDING, abs=1e-4 if "evaluation" in path else 0
    )


@pytest.mark.parametrize(
    "path",
    [
        *("ddim.png", "ddpm.png", "dpmpp_2m.png", "steered.png", "vary/0001.png", "attend/picture.png", "edit.png"),
        *("run/previews/step-000004.png", "attend/map0.png"),
    ],
)
def test_the_images_are_those_of_the_cpu(folders, path):
    """Up to one step of 255 in each pixel."""
    cpu, gpu = (np.asarray(Image.open(folder / path), dtype=int) for folder in folders)
    assert cpu.std() > 5
    assert np.abs(cpu - gpu).max() <= 1


def test_the_maps_are_those_of_the_cpu(folders):
    cpu, gpu = (np.load(folder / "attend/map1.npy") for folder in folders)
    assert gpu == pytest.approx(cpu, rel=ROUNDING)
    assert cpu.std() > 0


VARIANTS = (
    "--mixed_precision bf16 --gradient_checkpointing --gradient_accumulation_steps 2 --train_batch_size 2",
    "--mixed_precision bf16 --exact_phase1 --attention_loss cross_entropy --close_ups --normalize_masked_loss",
    "--mixed_precision fp16 --optimizer adam --train cross_attention --class_data_dir {made}",
    "--mixed_precision no --background_handle bg --save_precision fp16 --lr_scheduler cosine",
    "--mixed_precision bf16 --train token --rank 2",
)


FEW_STEPS = """
from functools import partial
from tests.helpers.simulated_gpu import main
from bas.training import class_images
class_images.SampleConfig = partial(class_images.SampleConfig, num_inference_steps=2)
main()
"""


def test_every_kind_of_training_stays_on_its_device(bench, tmp_path):
    """Each way in which a step can be computed, and class images that are drawn on the device first."""
    few = "--phase1_train_steps 1 --phase2_train_steps 2 --device gpu"
    lines = [
        [*bench.command(tmp_path / f"run{i}"), *split(f"{variant.format(made=tmp_path / 'made')} {few}")]
        for i, variant in enumerate(VARIANTS)
    ]
    done = simulate(FEW_STEPS, json.dumps(lines))
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"run{i}" / "concepts.safetensors").exists() for i in range(len(VARIANTS))] == [True] * 5
    assert len(list((tmp_path / "made").glob("*.png"))) == 2


RESUMED = """
import os, signal, sys
from pathlib import Path
import pytest, tests.helpers.simulated_gpu
from tests.helpers.faults import before_step, heard, resume
from tests.helpers.tiny import Bench, file_hashes
import bas
from bas.runtime.signals import Interrupted

bench = Bench(Path(sys.argv[1]))
settings = {"device": "gpu", "mixed_precision": "bf16", "phase1_train_steps": 1, "phase2_train_steps": 2}
whole, stopped = bench.folder / "whole", bench.folder / "stopped"
with pytest.MonkeyPatch.context() as patch:
    before_step(patch, 2, lambda models, _: print(models.vae.post_quant_conv.weight.device, models.device))
    bas.train(bench.config(whole, **settings))
with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), heard():
    before_step(patch, 3, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    bas.train(bench.config(stopped, **settings))
print(file_hashes(resume(bench, stopped, **settings)) == file_hashes(whole))
"""


def test_a_stopped_training_goes_on_on_its_device(tmp_path):
    """To the same bits, as on the CPU: weights, bf16's masters and the optimizer's state find their way back.

    While steps are taken, the VAE is in the host's memory.
    """
    done = simulate(RESUMED, str(tmp_path))
    assert done.stdout.splitlines() == ["cpu gpu:0", "True"], done.stderr


MINIATURE = """
import shutil, sys
from pathlib import Path
from tests.helpers.simulated_gpu import DEVICE
from tests.tools.test_train_mini import MINI, SMALLEST
from tools.train_mini import clip, codec, decoder, unet
from tools.train_mini.__main__ import STAGES

run = Path(sys.argv[1])
clip.HELD_OUT, decoder.VALIDATION, unet.VALIDATION = 32, 32, 96  # two batches each that is validated
decoder.measure_scaling = lambda: codec.measure_scaling(50)
shutil.copytree(MINI / "tokenizer", run / "tokenizer")
for stage in STAGES.values():
    stage(SMALLEST, run, DEVICE)
"""


def test_the_miniature_is_trained_on_its_device(tmp_path):
    """Two steps of every stage, and what is validated behind them."""
    done = simulate(MINIATURE, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "32 held-out scenes find their own caption" in done.stdout
    made = {path.stem for path in tmp_path.glob("*.safetensors")}
    assert made == {"clip", "text", "unet", "unet_best", "decoder", "decoder_best"}


FROZEN = """
import sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from tests.helpers.simulated_gpu import DEVICE
from tests.data.test_mask_proposals import settings, write_clipseg, write_mask2former, write_sam
from tests.evaluation.test_metrics import half_mask, write_clip, write_dino, write_segmenter
from bas.config import InputError
from bas.evaluation.metrics import IdentitySimilarity, PromptSimilarity
from bas.evaluation.object_similarity import ObjectSimilarity
from bas.evaluation.segments import Segmenter
from bas.data.mask_proposals import propose

folder = Path(sys.argv[1])
small = np.random.default_rng(1).integers(0, 255, (2, 4, 5, 3), dtype=np.uint8)
images = [Image.fromarray(array).resize((40, 30), Image.Resampling.BICUBIC) for array in small]
torch.manual_seed(0)
asked = {
    "sam": settings(write_sam(folder / "sam"), points=("20,10", "30,20"), threshold=0.5),
    "clipseg": settings(write_clipseg(folder / "clipseg"), words=("bowl", "stone"), threshold=0.4),
    "mask2former": settings(write_mask2former(folder / "mask2former"), threshold=0.01, min_coverage=0.01),
}
clip, dino = write_clip(folder / "clip"), write_dino(folder / "dino")
write_segmenter("maskformer", folder / "maskformer")
for device in (torch.device("cpu"), DEVICE):
    for method, config in asked.items():
        try:
            print(method, [(p.word, int(p.mask.sum())) for p in propose(method, images[0], config, device)])
        except InputError as error:  # the random Mask2Former finds nothing, on either device
            print(method, error)
    print(np.round(PromptSimilarity(str(clip), device).prompt_similarity(images, ["a bowl", "a stone"]), 5))
    for identity in (IdentitySimilarity(str(dino), device), ObjectSimilarity(device)):
        print(np.round(identity.identity_similarity(images, images[0], half_mask()), 5))
    print([mask.sum() for mask in Segmenter(str(folder / "maskformer"), device).segments(images, "dog")])
"""


def test_frozen_models_compute_on_their_device(tmp_path):
    """Those that propose masks, and those that score images: the same on both."""
    pytest.importorskip("scipy", reason="scipy, without which transformers builds no Mask2Former, is not installed")
    done = simulate(FROZEN, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 14
    assert lines[:7] == lines[7:]


# --- What is not where it must be ----------------------------------------------------------------------------------


MEETINGS = {
    "x + torch.ones(3)": "aten::add: tensors of gpu:0 and of the CPU, (3,), meet",
    "torch.stack([x, torch.ones(3)])": "aten::stack: tensors of gpu:0 and of the CPU, (3,), meet",
    "torch.ones(3)[torch.arange(2, device='gpu')]": "aten::index: tensors of gpu:0 and of the CPU, (3,), meet",
    "torch.randn(3, device='gpu', generator=torch.Generator())": "aten::normal_: the generator is of the CPU",
    "x.numpy()": ".numpy() is not supported",
    "x.resize_(4)": "aten::resize_ changes the size of a tensor",
    "x[torch.tensor([0, 2])].cpu()": "tensor([1., 1.])",
    "(x * torch.tensor(2.0)).to('cpu')": "tensor([2., 2., 2.])",
    "(x.data.zero_().tolist(), x.tolist())": "([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])",
}
EACH = """
import sys, tests.helpers.simulated_gpu, torch
for code in sys.argv[1:]:
    x = torch.ones(3, device="gpu")
    try:
        print(eval(code))
    except (RuntimeError, NotImplementedError) as error:
        print(error)
"""


def test_the_simulation_refuses_what_cuda_refuses():
    """And nothing else: single numbers and places may come from the CPU."""
    done = simulate(EACH, *MEETINGS)
    lines = done.stdout.splitlines()
    assert len(lines) == len(MEETINGS), done.stderr
    assert [line for line, wanted in zip(lines, MEETINGS.values(), strict=True) if not line.startswith(wanted)] == []


def test_a_batch_left_on_the_cpu_ends_the_training(bench, tmp_path):
    """So the tests above would see it."""
    words = [*bench.command(tmp_path / "run"), "--device", "gpu", "--mixed_precision", "no"]
    code = f"""
from tests.helpers import simulated_gpu
from bas.data.batches import Batch
from bas.cli.entry import main
Batch.to = lambda self, device: self
main({words})
"""
    done = simulate(code)
    assert done.returncode == 1
    assert "tensors of gpu:0 and of the CPU" in done.stderr
