"""Measures what a run learnt of its scene, and what the attention loss did for it.

Trains the demo scene twice, with the attention loss and without, and prints three tables: how well each handle's
attention covers its mask, which object each handle's images show, and which place the prompts lead to.

    python -m tools.checks.demo --output_dir /tmp/check_demo
"""

import argparse
import json
from pathlib import Path

import numpy as np

from bas.cli.commands.demo import SCENE
from bas.config import SampleConfig, TrainConfig
from bas.data.scene import subset_prompt
from bas.data.scene_folder import load_scene
from bas.evaluation.metrics import attention_iou
from bas.evaluation.object_similarity import ObjectSimilarity
from bas.io.figures import grid
from bas.io.images import to_image
from bas.pretrained.folder import load
from bas.pretrained.hub import find, train_config
from bas.sampling.sampler import sample
from bas.training.preview import scene_attention
from tools.checks.mini import recognise_images, train_recogniser
from tools.checks.runs import train_once
from tools.command_line import run as run_tool
from tools.mini_world.places import PLACES

VARIANTS = {"with attention loss": {}, "without": {"lambda_attention": 0.0}}


def measure(run: Path, config: TrainConfig, recogniser, images_per_prompt: int) -> dict:
    """Attention IoU per handle, similarity of each handle's images to each object, share of right places."""
    models, scene = load(run), load_scene(config)
    image, masks = scene.tensors(models.resolution, models.size_multiple)
    iou = attention_iou(scene_attention(models, scene.handles, image, config), masks)
    settings = SampleConfig(num_images=images_per_prompt, batch_size=16, seed=1000)
    alone = sample(models, [subset_prompt([handle]) for handle in scene.handles], settings)
    photo, identity = to_image(image), ObjectSimilarity()
    found = [identity.identity_similarity(alone, photo, mask) for mask in masks.numpy()]
    alike = np.array(found).T.reshape(len(masks), images_per_prompt, len(masks))  # drawn by i, image, like object j
    places = [place for place in PLACES if place != "wall"]
    prompts = [f"{subset_prompt([handle])} {PLACES[place][0]}" for handle in scene.handles for place in places]
    elsewhere = sample(models, prompts, SampleConfig(batch_size=16, seed=2000))
    seen = [reading.place for reading in recognise_images(recogniser, elsewhere)]
    rows = [elsewhere[i : i + len(places)] for i in range(0, len(elsewhere), len(places))]
    grid(rows, [[f"{h} {PLACES[p][0]}" for p in places] for h in scene.handles], 128).save(run / "contexts.png")
    shown = [alone[i : i + images_per_prompt] for i in range(0, len(alone), images_per_prompt)]
    grid(shown, [[h] * images_per_prompt for h in scene.handles], 128).save(run / "alone.png")
    return {
        "handles": list(scene.handles),
        "iou": iou,
        "similarity": alike.mean(axis=1).tolist(),
        "own_object_nearest": (alike.argmax(axis=2) == np.arange(len(masks))[:, None]).mean(axis=1).tolist(),
        "right_place": float(np.mean([s == p for s, p in zip(seen, places * len(masks), strict=True)])),
    }


def main() -> None:
    """Train, measure, print, and leave scores.json."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.checks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--scene", default=SCENE, help="scene folder inside the shipped model's (default: %(default)s)")
    parser.add_argument("--images", type=int, default=8, help="images of each handle alone")
    args = parser.parse_args()
    recogniser = train_recogniser(args.output_dir / "recogniser.pt", scenes=24_000, epochs=5)
    scores = {}
    for name, changed in VARIANTS.items():
        run = args.output_dir / name.replace(" ", "_")
        config = train_config(find(None) / args.scene, output_dir=str(run), img_log_steps=0, **changed)
        train_once(config, run.with_suffix(".json"))
        scores[name] = measure(run, config, recogniser, args.images)
    (args.output_dir / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    for name, score in scores.items():
        handles = score["handles"]
        print(f"\n{name}: right place {100 * score['right_place']:.0f} %")
        print("| images of | attention IoU | own object nearest | " + " | ".join(f"to {h}'s object" for h in handles))
        print("|---" * (3 + len(handles)) + "|")
        for i, handle in enumerate(handles):
            row = [f"{score['iou'][i]:.2f}", f"{100 * score['own_object_nearest'][i]:.0f} %"]
            print("| " + " | ".join([handle, *row, *(f"{d:.3f}" for d in score["similarity"][i])]) + " |")


if __name__ == "__main__":
    run_tool(main)
