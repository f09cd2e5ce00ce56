"""Check a scene's masks and show what the losses will see of them, without reading any weights."""

import argparse
import logging

from bas.checkpoint import outline
from bas.config import TrainConfig
from bas.flags import Parser, add_fields, given
from bas.hub import find, read_model_row
from bas.masks import sheet, table, view_scene, warnings
from bas.pictures import picture_path
from bas.scene import load_scene

log = logging.getLogger(__name__)

# The settings of training that decide what the model sees of a scene.
SETTINGS = (
    *("pretrained_model_name_or_path", "handles", "placeholder_token", "initializer_tokens", "num_of_assets"),
    *("background_handle", "resolution", "center_crop", "attention_grid"),
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("scene", metavar="SCENE", help="folder with a picture img.* and its masks")
    parser.add_argument("--output_path", help="picture to write of the masks as the losses see them")
    add_fields(parser, TrainConfig, only=SETTINGS)


def run(args: argparse.Namespace) -> None:
    """Print the table; warnings go to the log."""
    target = picture_path(args.output_path) if args.output_path else None
    explicit = given(args, TrainConfig) | {"instance_data_dir": args.scene}
    scene = load_scene(TrainConfig(**explicit))
    model = find(explicit.get("pretrained_model_name_or_path"))
    view = view_scene(scene, outline(model)[0], TrainConfig.resolve(explicit, read_model_row(model)))
    size, photo = "x".join(map(str, scene.picture.size)), "x".join(map(str, view.photo.size))
    print(f"{args.scene}: {len(scene)} concepts; the picture is {size} pixels, {photo} for {model.name}\n")
    print(table(view))
    for line in warnings(view):
        log.warning("%s", line)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet(view).save(target)
        print(f"\n{target}")
