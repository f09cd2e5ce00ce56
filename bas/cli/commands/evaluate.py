"""Repeat the paper's comparison: train each method on each scene, generate each subset in each context, and score."""

import argparse
import logging
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

from bas.cli.flags import Parser, add_config, add_fields, given
from bas.cli.inspection import as_text
from bas.config import STEERING, SampleConfig, TrainConfig, beside_flags, setting_rows
from bas.errors import InputError
from bas.evaluation.baselines import PAPER, VARIANTS
from bas.evaluation.libraries import optional_library
from bas.evaluation.metrics import CLIP, DINO, MINI_CLIP, Metrics
from bas.evaluation.protocol import Trial, agree_on, check_finished, plan_trials
from bas.evaluation.runner import (
    EvaluationContext,
    Outcome,
    counted_seconds,
    evaluate_each,
    measured_seconds,
    write_results,
)
from bas.evaluation.scores import Scorer, Segments, read_rows
from bas.evaluation.segments import MASKFORMER, Segmenter
from bas.io.settings_file import read_config
from bas.pretrained.additions import Additions
from bas.pretrained.hashes import base_hash
from bas.pretrained.hub import find, find_spec, is_known_elsewhere, is_sdxl, training_row
from bas.runtime.distributed import Ranks, announce
from bas.runtime.progress import clock
from bas.sampling.gallery import CONTEXTS
from bas.sampling.sampler import guidance_scale
from bas.training.multi_scene import find_scenes
from bas.training.setup import check_machine

log = logging.getLogger(__name__)

EXAMPLES = (
    "bas evaluate my_scenes --dry_run",
    "bas evaluate my_scenes --methods bas db-m ti-m --seeds 0 1 2 --output_dir evaluation",
)
PER_TRIAL = {
    *("instance_data_dir", "output_dir", "seed", "method", "resume_from_checkpoint", "img_log_steps"),
    "checkpointing_steps",
}
TRAINING = (  # the flags of training that stand beside those below; --config takes all
    *("pretrained_model_name_or_path", "prediction_type", "phase1_train_steps", "phase2_train_steps", "resolution"),
    *("initial_learning_rate", "learning_rate", "train_batch_size", "num_class_images", "class_data_dir"),
    *("mixed_precision", "device", "preset", "gradient_checkpointing", "compile"),
)
SAMPLING = {f.name for f in fields(SampleConfig)} - {"num_images", "seed", *STEERING}


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("scenes", metavar="SCENE", nargs="+", help="scene folders, or folders of scene folders")
    parser.add_argument("--output_dir", default="evaluation", help="folder of the evaluation (default: %(default)s)")
    add_config(parser)
    rows = ", ".join(f"{name} ({row.help})" for name, row in VARIANTS.items())
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        default=PAPER,
        help=f"methods to compare (default: all of the paper): {rows}",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="seeds of the runs and their images (default: 0)"
    )
    parser.add_argument("--first_scenes", type=int, metavar="INT", help="use only the first INT scenes")
    parser.add_argument(
        "--prompts",
        type=int,
        default=len(CONTEXTS),
        metavar="INT",
        help="how many of the paper's ten contexts to use (default: all)",
    )
    parser.add_argument(
        "--metrics",
        choices=("auto", "photographs", "miniature"),
        default="auto",
        help="photographs: CLIP and DINO; miniature: the miniature's own metrics; auto: those for the base model",
    )
    parser.add_argument("--clip", default=CLIP, help="folder or hub id of the CLIP model (default: %(default)s)")
    parser.add_argument("--dino", default=DINO, help="folder or hub id of the DINO model (default: %(default)s)")
    parser.add_argument(
        "--segmenter",
        default=MASKFORMER,
        help="folder or hub id of the model that segments images (default: %(default)s)",
    )
    parser.add_argument(
        "--segments",
        choices=("auto", "model", "attention", "none"),
        default="auto",
        help="part of an image on which identity is measured: the --segmenter's segment, the handle's attention, "
        "or the whole image (default: model for photographs, none for the miniature)",
    )
    parser.add_argument("--dry_run", action="store_true", help="count and estimate; write nothing")
    add_fields(parser, TrainConfig, TRAINING)
    add_fields(parser, SampleConfig, SAMPLING)


def run(args: argparse.Namespace) -> None:
    """Plan, run and score this process's trials; the first process then writes the results."""
    ranks, folder = Ranks.from_environment(), Path(args.output_dir)
    read = read_config(args.config, setting_rows(TrainConfig)), given(args, TrainConfig)
    file, flags = ({name: value for name, value in each.items() if name not in PER_TRIAL} for each in read)
    if dropped := sorted(read[0].keys() & PER_TRIAL):
        log.warning("%s: each trial has its own %s, so the file's is not read", args.config, ", ".join(dropped))
    name, card = ((file | flags).get(each) for each in ("pretrained_model_name_or_path", "card"))
    if card and is_sdxl(name):
        raise InputError("--card sets nothing in an evaluation of SDXL: give the flags that it stands for")
    base = None if args.dry_run and is_known_elsewhere(name) else find(name)  # its shapes are known without a download
    row, sampling = training_row(name), SampleConfig(**given(args, SampleConfig))
    explicit = beside_flags(file, flags, row) | flags
    sampling = replace(sampling, guidance_scale=guidance_scale(find_spec(name), sampling))
    contexts = CONTEXTS[: in_range("--prompts", args.prompts, len(CONTEXTS))]
    scenes = find_scenes(args.scenes)
    if args.first_scenes is not None:
        scenes = scenes[: in_range("--first_scenes", args.first_scenes, len(scenes))]
    explicit["device"] = ranks.device(explicit.get("device"))
    methods, seeds = tuple(dict.fromkeys(args.methods)), tuple(dict.fromkeys(args.seeds))
    trials = plan_trials(folder, scenes, methods, seeds, contexts, explicit, row)
    _, device, precision = check_machine(trials[0].training, weights=not args.dry_run)
    additions = Additions.of_base(vars(trials[0].training))
    measured = measures(args, base)
    print_plan(trials, sampling, scenes, ranks, args.dry_run)
    if args.dry_run or base is None:
        return

    for library in ("scipy.stats", "matplotlib.figure"):  # before anything is trained
        optional_library(library)
    plan = {
        "base": base_hash(base, additions),
        "contexts": list(contexts),
        "metrics": measured,
        "sampling": {name: value for name, value in asdict(sampling).items() if name not in STEERING},
        "training": {name: list(v) if isinstance(v, tuple) else v for name, v in explicit.items()},
    }
    agree_on(folder, plan)
    check_finished(trials)
    scorer = partial(make_scorer, measured, base, str(device))
    own = trials[0].training.prediction_type
    context = EvaluationContext(base, device, sampling, scorer, precision, own, additions)
    share, failed = ranks.part(trials), []
    with ranks.connected() as gather:
        for i, outcome in enumerate(evaluate_each(share, context), start=1):
            report(outcome, f"[{i}/{len(share)}]", share[i:])
            if outcome.error:
                failed.append([title(outcome.trial), outcome.error])
        failed = gather(failed)
    if ranks.first:
        shown = {"base": base.name, "scenes": str(len(scenes)), "seeds": " ".join(map(str, seeds))}
        shown |= {"metrics": measured["kind"], "segments": measured["segments"]}
        for path in write_results(folder, trials, shown):
            print(path)
    ranks.conclude(failed, len(trials), "trials")


def in_range(flag: str, value: int, most: int) -> int:
    """Return the value. Raises InputError unless it is from 1 to `most`."""
    if not 1 <= value <= most:
        raise InputError(f"{flag} is {value}: expected 1 to {most}")
    return value


def measures(args: argparse.Namespace, base: Path | None) -> dict[str, str]:
    """Return what all trials of a folder are measured with. base: None for a known model that was not downloaded."""
    own = base is not None and (base / MINI_CLIP).is_dir()
    kind = args.metrics if args.metrics != "auto" else ("miniature" if own else "photographs")
    segments = args.segments if args.segments != "auto" else ("none" if kind == "miniature" else "model")
    models = {"clip": args.clip, "dino": args.dino} if kind == "photographs" else {}
    if segments == "model":
        models["segmenter"] = args.segmenter
    return {"kind": kind, "segments": segments, **models}


def make_scorer(measured: dict[str, str], base: Path, device: str) -> tuple[Scorer, Segments]:
    """Load the metrics and the source of segments. measured: of `measures`"""
    if measured["kind"] == "miniature":
        scorer = Metrics.miniature(device, base if (base / MINI_CLIP).is_dir() else None)
    else:
        scorer = Metrics.photographs(device, measured["clip"], measured["dino"])
    if measured["segments"] == "model":
        return scorer, Segmenter(measured["segmenter"], device).segments
    return scorer, "files" if measured["segments"] == "attention" else None


def print_plan(trials: list[Trial], sampling: SampleConfig, scenes: list[Path], ranks: Ranks, dry: bool) -> None:
    """Print what there is to do, and how long it may take."""
    left = [trial for trial in trials if not read_rows(trial)]
    seconds = measured_seconds(trials)
    if seconds is not None:
        estimate = f"{clock(seconds * len(left) / ranks.world)}, as long as the finished trials took"
    elif dry:
        counted = counted_seconds(left, sampling) / ranks.world
        estimate = f"more than {clock(counted)}, counted operations at the speed of a matrix product on this machine"
    else:
        estimate = "unknown before the first trial is finished (--dry_run counts)"
    images = sum(len(trial.requests) for trial in trials)
    rows = {
        "scenes": str(len(scenes)),
        "methods": ", ".join(dict.fromkeys(trial.method for trial in trials)),
        "trials": f"{len(trials)} trainings, of which {len(trials) - len(left)} are finished",
        "images": f"{images}, of which {sum(len(trial.requests) for trial in left)} are left",
        "time left": estimate,
    }
    if ranks.first:
        print(as_text(rows), flush=True)


def report(outcome: Outcome, count: str, left: list[Trial]) -> None:
    """Log what became of a trial, and how long the rest may take."""
    if outcome.error:
        log.error("%s %s failed: %s", count, title(outcome.trial), outcome.error)
    elif not outcome.earlier and (seconds := measured_seconds([outcome.trial])) is not None:
        remaining = clock(seconds * sum(not trial.finished for trial in left))
        announce(f"{count} {title(outcome.trial)}: {clock(seconds)}, about {remaining} left")


def title(trial: Trial) -> str:
    """Return a trial's name in messages."""
    return f"{trial.scene} {trial.method} seed {trial.seed}"
