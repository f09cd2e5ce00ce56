"""Build the paper's data set from COCO: scene folders of square crops with large objects of distinct classes."""

import argparse
from pathlib import Path

from bas.cli.flags import Parser, add_fields, given
from bas.config import CocoConfig
from bas.errors import InputError
from bas.evaluation.coco import choose_scenes, read_annotations, write_scenes
from bas.io.files import filling, new_folder

EXAMPLES = ("bas coco annotations/instances_val2017.json --images val2017 --output_dir coco_scenes",)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("annotations", metavar="ANNOTATIONS", help="COCO's instances_*.json")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the images that ANNOTATIONS names")
    parser.add_argument("--output_dir", default="coco_scenes", help="new folder to write (default: %(default)s)")
    add_fields(parser, CocoConfig)


def run(args: argparse.Namespace) -> None:
    """Choose the scenes, write them, and print the path of the manifest."""
    config, images = CocoConfig(**given(args, CocoConfig)), Path(args.images)
    if not images.is_dir():
        raise InputError(f"--images {images} is not a folder")
    folder = new_folder(args.output_dir)
    annotations = read_annotations(Path(args.annotations), config.dropped)
    chosen = choose_scenes(annotations, config)
    with filling(folder) as place:
        manifest = write_scenes(annotations, chosen, images, place, config)
    for choice in chosen:
        print(f"{choice.row['file_name']}  " + ", ".join(f"{t.word} {t.share:.0%}" for t in choice.segments))
    print(f"\n{folder / manifest.name}: {len(chosen)} scenes")
