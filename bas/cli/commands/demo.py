"""Show the whole method in minutes: train on a scene of the miniature, and generate its concepts in new places."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

from bas.cli.flags import Parser
from bas.cli.inspection import as_text
from bas.config import SampleConfig
from bas.data.scene import subset_prompt
from bas.data.scene_folder import load_scene
from bas.errors import InputError
from bas.evaluation.metrics import attention_iou
from bas.io.figures import grid, overlay_attention, tint_masks
from bas.io.images import save_image, to_image
from bas.io.run_files import CONCEPTS, METRICS, read_settings
from bas.pretrained.hub import find, load, train_config
from bas.runtime.progress import ImageProgress
from bas.runtime.signals import continued_by
from bas.runtime.threads import use_idle_cores
from bas.sampling.sampler import sample_each
from bas.training.loop import train
from bas.training.preview import scene_attention
from bas.web.report import SHEET, write_report

log = logging.getLogger(__name__)

EXAMPLES = ("bas demo --output_dir demo",)
SCENE = "scenes/playroom"  # inside the shipped model's folder
CONTEXTS = ("at the beach", "in the snow", "in the jungle")  # one per handle
TOGETHER = ("at the beach", "in the snow", "on top of a pink fabric")  # all of them
SHORTER = {  # fewer steps than the miniature's own, at twice its learning rates: enough for this scene
    "phase1_train_steps": 60,
    "phase2_train_steps": 200,
    "initial_learning_rate": 4e-3,
    "learning_rate": 2e-3,
}
CELL = 160  # pixels of an image on the sheet


@dataclass(frozen=True)
class Result:
    """What the demo made: its sheet of images, and how well each handle's attention map covers its mask (IoU)."""

    sheet: Path
    attention_iou: dict[str, float]


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("--output_dir", default="demo", help="run folder to write (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")


def run(args: argparse.Namespace) -> None:
    """Run the demo; print its figures and where its sheet and page are."""
    use_idle_cores()
    result = demo(Path(args.output_dir), args.device)
    print(as_text({f"attention IoU of {handle}": f"{value:.2f}" for handle, value in result.attention_iou.items()}))
    print(result.sheet)
    print(write_report(Path(args.output_dir)))


def demo(output_dir: Path, device: str | None = None) -> Result:
    """Train on the shipped scene, or resume the folder's run, and write RUN/demo.png.

    Raises InputError for a folder that holds something else, RunError where training fails.
    """
    resume = "latest" if (output_dir / METRICS).exists() else None
    own = {"output_dir": str(output_dir), "device": device, "resume_from_checkpoint": resume}
    config = train_config(find(None) / SCENE, **own, **SHORTER)
    if (output_dir / CONCEPTS).exists():
        recorded = read_settings(output_dir)["config"]
        same_scene = Path(recorded["instance_data_dir"]).name == Path(SCENE).name
        if not same_scene or any(recorded[name] != getattr(config, name) for name in SHORTER):
            raise InputError(f"--output_dir {output_dir} holds another run than the demo's: name a new folder")
        log.info("%s holds a finished run: only the images are generated", output_dir)
    else:
        with continued_by("the same command continues"):
            train(config)
    models = load(output_dir, device)
    scene = load_scene(config)
    image, masks = scene.tensors(models.resolution, models.size_multiple, config.center_crop)
    shown, layers, handles = to_image(image), dict(enumerate(masks.numpy())), scene.handles
    attention = scene_attention(models, handles, image, config)
    overlays = [overlay_attention(values, shown, i) for i, values in enumerate(attention.numpy())]

    alone, together = [subset_prompt([handle]) for handle in handles], subset_prompt(handles)
    elsewhere = [f"{prompt} {context}" for prompt, context in zip(alone, CONTEXTS, strict=True)]
    reunited = [f"{together} {context}" for context in TOGETHER]
    prompts = [[*alone, together, reunited[0]], [*elsewhere, *reunited[1:]]]
    sampling, count = SampleConfig(seed=config.seed), sum(map(len, prompts))
    progress = ImageProgress(count, sampling.num_inference_steps)
    images = sample_each(models, [prompt for row in prompts for prompt in row], sampling, progress)
    rows = [[scene.image, tint_masks(shown, layers), *overlays], *([next(images) for _ in row] for row in prompts)]
    labels = [["the scene", "and its masks", *(f"attention of {handle}" for handle in handles)], *prompts]
    sheet = grid(rows, labels, CELL, title="one image in, one handle per concept out")
    save_image(sheet, output_dir / SHEET)
    return Result(output_dir / SHEET, dict(zip(handles, attention_iou(attention, masks), strict=True)))
