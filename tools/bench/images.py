"""Rows of the bench about sampling: one image, and class images in batches, against diffusers' pipeline."""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import DDIMScheduler

from bas.config import SampleConfig
from bas.presets import GUIDANCE
from bas.pretrained.folder import load
from bas.sampling.sampler import latent_shape, sample, standard_normal
from tools.bench.clock import interleave
from tools.bench.goals import line
from tools.bench.official_loop import open_pipeline
from tools.bench.table import Line, Stat, speedup

PROMPT = "a photo of a creature at the beach"


def images(bench, setting, _lines) -> Iterator[Line]:
    """One image, and class images in batches: diffusers' pipeline, with its UNet compiled, and bas in turns."""
    cuda, folder = setting.device == "cuda", bench.model(setting.model)
    count = 2 if bench.quick else 50
    pipeline = open_pipeline(folder, setting.device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=False, clip_sample=False)
    plain = pipeline.unet
    compiled = torch.compile(plain) if bench.compile else None
    types = {"bf16": torch.bfloat16} if cuda else {"fp32": torch.float32, "bf16": torch.bfloat16}
    ours = {name: load(folder, device=setting.device, dtype=dtype) for name, dtype in types.items()}

    def theirs(unet, config: SampleConfig):
        shape = latent_shape(ours[next(iter(ours))].spec, config)
        noise = [torch.Generator().manual_seed(config.seed + i) for i in range(config.num_images)]
        pipeline.unet = unet
        return pipeline(
            [PROMPT] * config.num_images,
            height=config.height,
            width=config.width,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            latents=standard_normal(shape, noise).to(setting.device, plain.dtype),
        ).images

    for title, batch, many in [
        ("one image", 1, count),
        *(("class images", b, 50 if cuda else 2 if bench.quick else 5) for b in batches(bench, cuda)),
    ]:
        config = SampleConfig(
            num_inference_steps=many,
            guidance_scale=GUIDANCE,
            num_images=batch,
            batch_size=batch,
            height=bench.side,
            width=bench.side,
        )
        calls = {"official": lambda config=config: theirs(plain, config)}
        if compiled:
            calls["compiled"] = lambda config=config: theirs(compiled, config)
        calls |= {name: (lambda m=models, config=config: sample(m, PROMPT, config)) for name, models in ours.items()}
        seconds = interleave(calls, setting.device, bench.rounds, bench.budget)
        wanted = calls["official"]()
        for name, models in ours.items():
            stats = {
                side: Stat.of([x / batch for x in seconds[side]]) for side in ("official", "compiled") if side in calls
            }
            stats["bas"] = Stat.of([x / batch for x in seconds[name]])
            rival = stats.get("compiled", stats["official"]) if title == "class images" else stats["official"]
            row = f"{title}, {many} steps" + (f", {batch} at once" if title == "class images" else "")
            off = {"image levels of 255": image_error(sample(models, PROMPT, config), wanted)}
            note = "" if rival is stats["official"] else "ratio to compiled"
            ratio = speedup(rival, stats["bas"])
            yield line(setting, row, name, unit="s an image", note=note, ratio=ratio, fidelity=off, **stats)


def batches(bench, cuda: bool) -> tuple[int, ...]:
    """How many class images at once: the best one is the row's figure."""
    return (4, 16, 32) if cuda else (2,) if bench.quick else (1, 4)


def image_error(ours: list, theirs: list) -> float:
    """Mean absolute difference of 8-bit images, in levels."""
    pairs = [(np.asarray(a, dtype=float), np.asarray(b, dtype=float)) for a, b in zip(ours, theirs, strict=True)]
    return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))
