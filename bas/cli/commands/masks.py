"""Check a scene's masks and show how the losses read them; or let a model propose masks with --auto."""

import argparse
import logging
import os
from dataclasses import fields
from pathlib import Path
from shlex import quote

import numpy as np
from PIL import Image

from bas.cli.flags import Parser, add_fields, given
from bas.cli.output_files import check_output_path, warn_of_replacement
from bas.config import ProposalConfig, TrainConfig
from bas.data.batches import check_scene
from bas.data.mask_formats import list_sources, read_scene_json
from bas.data.mask_proposals import METHODS, OF_SEARCH, propose
from bas.data.mask_report import sheet, table, view_scene, warnings
from bas.data.scene_folder import load_scene
from bas.data.scene_writer import open_draft, write_draft
from bas.errors import InputError, printable
from bas.io.images import save_image
from bas.pretrained.hub import find_spec, train_config
from bas.runtime.device import pick_device

log = logging.getLogger(__name__)

# The settings of training that decide what the model sees of a scene.
SETTINGS = (
    *("pretrained_model_name_or_path", "prediction_type", "handles", "placeholder_token", "initializer_tokens"),
    *("num_of_assets", "background_handle", "close_ups", "resolution", "center_crop", "attention_grid"),
)


EXAMPLES = (
    "bas masks my_scene --initializer_tokens creature bowl stone --output_path masks.png",
    "bas masks photo.jpg --auto sam --points 120,300 410,350",
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "scene", metavar="SCENE", help="folder with an image img.* and its masks; or an image, for --auto"
    )
    parser.add_argument("--output_path", metavar="FILE", help="image to write: the masks as the losses read them")
    add_fields(parser, TrainConfig, only=SETTINGS)
    parser.add_argument("--auto", choices=METHODS, help="write a new scene with masks that this kind of model proposes")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="scene to write with --auto (default: beside the image and named after it; of img.* its own folder)",
    )
    parser.add_argument("--device", help="for --auto: cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    add_fields(parser, ProposalConfig)


def run(args: argparse.Namespace) -> None:
    """Check the masks, or propose them."""
    flags = {name for name, value in vars(args).items() if value is not None}
    of_auto = {*(f.name for f in fields(ProposalConfig)), "output_dir", "device"}
    if args.auto and (wrong := flags & {*SETTINGS, "output_path"}):
        raise InputError(f"--{min(wrong)} cannot be combined with --auto")
    if not args.auto and (wrong := flags & of_auto):
        raise InputError(f"--{min(wrong)} needs --auto")
    (write_proposals if args.auto else check)(args)


def write_proposals(args: argparse.Namespace) -> None:
    """Write a scene with the masks that a model proposes. Raises InputError for a folder that has masks."""
    asked = given(args, ProposalConfig)
    config = ProposalConfig(**asked)
    if config.points or config.boxes or config.words:
        for name in OF_SEARCH & asked.keys():
            log.warning("--%s has no effect: every concept is named by a point, a box or a word", name)
    draft = open_draft(Path(args.scene), Path(args.output_dir) if args.output_dir else None)
    if draft.folder.is_dir() and list_sources(draft.folder):
        raise InputError(f"{draft.folder} has masks already: name another --output_dir")
    if os.path.lexists(names := draft.folder / "scene.json") and "concepts" in read_scene_json(names):
        raise InputError(f"{names} names concepts already: name another --output_dir, or move it away")
    found = propose(args.auto, draft.image, config, pick_device(args.device))
    masks = [Image.fromarray(proposal.mask.astype(np.uint8) * 255) for proposal in found]
    concepts = [{"handle": f"<asset{i}>", "word": proposal.word} for i, proposal in enumerate(found)]
    write_draft(draft, masks, concepts)
    for i, proposal in enumerate(found):
        print(f"mask{i}.png  <asset{i}>  {proposal.mask.mean():.1%}  {proposal.word or ''}".rstrip())
    folder = quote(str(draft.folder))
    print(f"\n{draft.folder} is ready. Look: bas masks {folder}, or change them: bas paint {folder}")


def check(args: argparse.Namespace) -> None:
    """Print the table, log the warnings, write the figure. Then raise InputError for what training would reject."""
    target = check_output_path(args.output_path, 1, *Path(args.scene).glob("*")) if args.output_path else None
    config = train_config(args.scene, **given(args, TrainConfig))
    spec = find_spec(config.pretrained_model_name_or_path, config.prediction_type)
    scene, model = load_scene(config), spec.source or Path()
    view, refusal = view_scene(scene, spec, config), None
    try:
        check_scene(spec, scene, config, warn=False)
    except InputError as error:
        refusal = error
    size, resized = ("x".join(map(str, image.size)) for image in (scene.image, view.image))
    concepts = "1 concept" if len(scene) == 1 else f"{len(scene)} concepts"
    print(f"{printable(args.scene)}: {concepts}; the image is {size} pixels, {resized} for {model.name}\n")
    print(table(view))
    for line in warnings(view):
        if line != str(refusal):
            log.warning("%s", line)
    if target:
        warn_of_replacement([target])
        target.parent.mkdir(parents=True, exist_ok=True)
        save_image(sheet(view), target)
        print(f"\n{target}")
    if refusal:
        raise refusal
