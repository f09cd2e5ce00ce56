"""What the stages of the miniature's training write: weights, the scaling of the latents, the loss over time."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from bas.io.json_files import write_json
from bas.io.tensors import write_tensors
from tools.train_mini.codec import Scaling


def save_weights(module, path: Path, dtype=torch.float32) -> None:
    """The module's state dict as a safetensors file, floating-point tensors in `dtype`."""
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, state)


def write_scaling(run: Path, scaling: Scaling) -> None:
    """Write run/scaling.json: mean and factor of each latent channel."""
    write_json(run / "scaling.json", {"mean": scaling.mean.tolist(), "factor": scaling.factor.tolist()})


def read_scaling(run: Path) -> Scaling:
    """What `write_scaling` wrote. FileNotFoundError where the stage `decoder` has not begun."""
    numbers = json.loads((run / "scaling.json").read_text())
    return Scaling(torch.tensor(numbers["mean"]), torch.tensor(numbers["factor"]))


def plot_losses(log: Path) -> None:
    """The loss over time from a jsonl log, smoothed, on a logarithmic axis, as <log>.png."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = np.log10([max(line["loss"], 1e-8) for line in lines])
    window = max(1, len(losses) // 60)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    if len(smooth) < 2:
        return
    low, high, width, height = smooth.min(), smooth.max() + 1e-6, 480, 240
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    xs = np.linspace(40, width - 10, len(smooth))
    ys = height - 20 - (smooth - low) / (high - low) * (height - 40)
    canvas.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=(30, 90, 180), width=2)
    canvas.text((2, 14), f"{10**high:.3g}", fill="black")
    canvas.text((2, height - 26), f"{10**low:.3g}", fill="black")
    canvas.text((width // 2, height - 14), f"{log.stem}: {lines[-1]['samples']} samples", fill="black")
    image.save(log.with_suffix(".png"))
