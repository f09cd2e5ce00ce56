"""Hashes of what tiny models compute, recorded by processor: a change that should move no bit of them moves none.

python -m tests.helpers.recorded_bits    records those of this processor anew, in tests/reference/bits.json
"""

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import bas
from bas.config import SampleConfig
from bas.sampling.sampler import generate
from tests.helpers.families import tiny
from tests.helpers.tiny import UNET, WEIGHTS, Bench
from tools.reference import cases

RECORDED = cases.REFERENCE / "bits.json"
UNETS = ("unet-sd1", "unet-sd2", "unet-sd2-v")
SAMPLED = ("sd1", "sd2-v")
PROMPTS = ["a photo of (stone:1.4) and creature at the beach", "a bowl"]
ON_ALL_LEVELS = replace(  # a UNet with attention on every level
    UNET, down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3
)
CONFIGS = (*(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")), "scheduler/scheduler_config.json")


def processor() -> dict[str, str]:
    """What decides the bits of a sum beside the program: the kernels that PyTorch and its libraries choose."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("cpu family", "model\t"))]
    return {
        "processor": " ".join([platform.machine(), *models[:2]]),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """The sha256 of tensors and their names, in order."""
    sum_of = hashlib.sha256()
    for name, tensor in tensors.items():
        sum_of.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sum_of.update(tensor.detach().contiguous().numpy().tobytes())
    return sum_of.hexdigest()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread within the block: several cut sums into other parts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def network(name: str) -> dict[str, str]:
    """Output, maps, and gradients of inputs and all parameters, of a reference UNet."""
    return {name: digest(cases.ours(name))}


def sampled(family: str) -> dict[str, str]:
    """Latents of a guided sampling run from prompts with strengths."""
    config = SampleConfig(width=128, height=128, num_inference_steps=2, negative_prompt="a stone")
    return {f"sampled-{family}": digest({"latents": generate(PROMPTS, [0, 1], tiny(family), config)})}


def trained() -> dict[str, str]:
    """Every file of the model that a run of both phases saves, and its metrics."""
    with TemporaryDirectory() as folder:
        run = bas.train(Bench(Path(folder), ON_ALL_LEVELS).config(Path(folder) / "run"))
        names = (*WEIGHTS, *CONFIGS, "model_index.json", "metrics.jsonl")
        return {f"trained {name}": hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names}


def records() -> list[dict]:
    """What was recorded: the processor, and the sha256 by name."""
    return json.loads(RECORDED.read_text())


def main() -> None:
    """Record those of this processor; those of others stay."""
    with one_thread():
        parts = [*map(network, UNETS), *map(sampled, SAMPLED), trained()]
    hashes = {name: value for part in parts for name, value in part.items()}
    others = [record for record in records() if record["recorded with"] != processor()]
    content = [*others, {"recorded with": processor(), "sha256": hashes}]
    RECORDED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
