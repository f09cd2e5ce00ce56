"""Learn the concepts of a scene in two phases. Write a run folder with the tuned model. Many scenes run in turn."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch

from bas.cli.flags import Parser, add_config, add_fields, given
from bas.cli.inspection import as_text
from bas.config import RUNS, TrainConfig, setting_rows
from bas.errors import InputError, RunError
from bas.io.run_files import REPORT, SETTINGS, read_concepts
from bas.io.settings_file import read_config
from bas.pretrained.hub import train_config, train_config_of
from bas.runtime.device import is_out_of_memory
from bas.runtime.distributed import Ranks, announce
from bas.runtime.signals import continued_by
from bas.training.disk_space import MAKE_ROOM
from bas.training.dry_run import TOO_LITTLE, dry_run, memory_advice
from bas.training.loop import train
from bas.training.multi_scene import Outcome, find_scenes, holds_scenes, run_name, settings_of, train_each
from bas.training.resume import is_finished
from bas.training.run_folder import clear_finished
from bas.training.setup import check_input, log_miniature
from bas.training.unused_settings import without_effect
from bas.web.report import write_report

log = logging.getLogger(__name__)

EXAMPLES = (
    "bas train my_scene --weights sd21-base --initializer_tokens creature bowl stone --output_dir runs/creature",
    "bas train my_scene --weights sd21-base --config runs/creature/config.toml --output_dir runs/again --dry_run",
    "bas train my_scenes --output_dir runs",
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "scenes",
        metavar="SCENE",
        nargs="*",
        help="folder with img.* and mask0.png, mask1.png, ...; several, or a folder of such folders, are trained one "
        "by one into folders of --output_dir, and torchrun shares them among processes",
    )
    add_config(parser)
    parser.add_argument(
        "--dry_run", action="store_true", help="count steps, time, memory and disk space; write nothing"
    )
    add_fields(parser, TrainConfig)


def run(args: argparse.Namespace) -> None:
    """Train, and print how to sample from the result."""
    flags = given(args, TrainConfig)
    file = read_config(args.config, setting_rows(TrainConfig))
    named = (file | flags).get("instance_data_dir")
    if args.scenes and "instance_data_dir" in flags and [named] != args.scenes:
        raise InputError(f"two scenes: {args.scenes[0]} and --instance_data_dir {named}")
    names = args.scenes or ([named] if named else [])
    if not names or "" in names:
        raise InputError("name a scene folder: bas train SCENE, with img.jpg and mask0.png, mask1.png, ...")
    ranks = Ranks.from_environment()
    several = len(names) > 1 or ranks.world > 1 or holds_scenes(Path(names[0]))
    config = train_config_of(names[0], flags, ({"output_dir": RUNS} if several else {}) | file)
    if ranks.first:
        usual = train_config(names[0], pretrained_model_name_or_path=config.pretrained_model_name_or_path)
        for line in without_effect(config, usual, file | flags):
            log.warning("%s", line)
    if several:
        scenes = find_scenes(names)
        if (Path(config.output_dir) / SETTINGS).exists():
            raise InputError(f"--output_dir {config.output_dir} holds a run: name a folder for the runs of all scenes")
        if ranks.first:
            log_miniature(config)
        many_scenes(config, scenes, ranks, args.dry_run)
    else:
        one_scene(config, args.dry_run)


def one_scene(config: TrainConfig, dry: bool) -> None:
    """Train one scene into --output_dir itself."""
    if dry:
        details = dry_run(config)
        print(as_text(details))
        check_disk_space(details, config)
        return
    folder = Path(config.output_dir)
    try:
        if config.resume_from_checkpoint and not (folder / REPORT).exists() and is_finished(config):
            clear_finished(folder)  # killed after its last write: what is left to do follows
        else:
            with continued_by("--resume_from_checkpoint latest continues"):
                train(config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        raise RunError(memory_advice(config, used)) from error
    _, metadata = read_concepts(folder)
    if page := try_report(folder):
        print(f"{page} shows how it went")
    command = f'bas sample {quote(str(folder))} --prompt "a photo of {metadata["handles"][0]} at the beach"'
    print(f"{folder} is ready. Try: {command}")


def many_scenes(config: TrainConfig, scenes: list[Path], ranks: Ranks, dry: bool) -> None:
    """Train this process's share of the scenes; the first process lists those that failed. RunError if any did."""
    if dry:
        left, failed = to_train(config, scenes)
        finished = len(scenes) - len(left) - len(failed)
        below = f"; below is {left[0].instance_data_dir} alone, except disk, which is for all" if len(left) > 1 else ""
        details = {"scenes": f"{len(scenes)}, of which {finished} are finished{below}", "rejected": failed}
        details |= dry_run(left[0], len(left)) if left else {}
        print(as_text(details))
        if failed:
            raise InputError(f"{len(failed)} of {len(scenes)} scenes cannot be trained, as listed under rejected")
        check_disk_space(details, config)
        return
    if ranks.first:
        names = ", ".join(map(run_name, scenes))
        log.info("%d scenes, each into its folder of %s: %s", len(scenes), config.output_dir, names)
    config = replace(config, device=ranks.device(config.device))
    share, failed = ranks.part(scenes), []
    with ranks.connected() as gather:
        for i, outcome in enumerate(train_each(config, share), start=1):
            print_outcome(outcome, f"[{i}/{len(share)}]")
            if outcome.error:
                failed.append([outcome.scene, outcome.error])
        failed = gather(failed)
    ranks.conclude(failed, len(scenes), "scenes")


def check_disk_space(details: dict, config: TrainConfig) -> None:
    """InputError if the dry run found too little disk space for all scenes."""
    if details.get("disk", "").startswith(TOO_LITTLE):
        raise InputError(f"--output_dir {config.output_dir} has too little space, as listed under disk: {MAKE_ROOM}")


def to_train(config: TrainConfig, scenes: list[Path]) -> tuple[list[TrainConfig], dict[str, str]]:
    """Sort the scenes. -> the settings of those that are left to train, and the errors of the others by scene"""
    left, failed = [], {}
    for scene in scenes:
        settings = settings_of(scene, config)
        try:
            if not is_finished(settings):
                check_input(settings, weights=False)
                left.append(settings)
        except InputError as error:
            failed[str(scene)] = str(error)
    return left, failed


def print_outcome(outcome: Outcome, count: str) -> None:
    """Print one line about a scene, and write the report of its run."""
    if outcome.error:
        log.error("%s %s failed: %s", count, outcome.scene, outcome.error)
    elif outcome.earlier:
        if not (Path(outcome.folder) / REPORT).exists():
            try_report(Path(outcome.folder))
        announce(f"{count} {outcome.folder} was finished before")
    else:
        try_report(Path(outcome.folder))
        announce(f"{count} {outcome.folder} is ready")


def try_report(run: Path) -> Path | None:
    """Write the report of a finished run. If that fails, log why, as the run itself is complete."""
    try:
        return write_report(run)
    except (InputError, OSError) as error:
        log.warning("%s has no report: %s; write it with bas report", run, error)
        return None
