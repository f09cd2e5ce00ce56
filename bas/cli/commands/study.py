"""Write the pages of a user study from an evaluation's images; with --analyse, test the participants' answers."""

import argparse
from dataclasses import fields
from pathlib import Path

from bas.cli.flags import Parser, add_fields, given
from bas.config import StudyConfig
from bas.errors import InputError
from bas.evaluation.libraries import optional_library
from bas.evaluation.ratings import as_json, compare, read_ratings, tables
from bas.evaluation.study import read_items, write_study
from bas.io.files import filling, new_folder
from bas.io.json_files import write_json

EXAMPLES = (
    "bas study evaluation --output_dir study",
    "bas study study --analyse answers/*.json",
)
ANALYSIS = "analysis.json"  # in the study's folder


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "source", metavar="SOURCE", help="folder of `bas evaluate`, or a .jsonl list; for --analyse the study's folder"
    )
    parser.add_argument("--output_dir", help="new folder to write the pages to (default: study)")
    parser.add_argument("--analyse", nargs="+", metavar="ANSWERS", help="files that the pages saved")
    add_fields(parser, StudyConfig)


def run(args: argparse.Namespace) -> None:
    """Write the pages or the analysis, and print what to do next."""
    if args.analyse:
        for name in ["output_dir", *(f.name for f in fields(StudyConfig))]:
            if getattr(args, name, None) is not None:
                raise InputError(f"--{name} cannot be combined with --analyse")
        analyse(Path(args.source), [Path(name) for name in args.analyse])
        return
    config, items = StudyConfig(**given(args, StudyConfig)), read_items(Path(args.source))
    folder = new_folder(args.output_dir or "study")
    with filling(folder) as place:
        pages = write_study(items, place, config)
    for page in pages:
        print(folder / page.name)
    print(f"\nSend each page to participants; keep {folder / 'key.json'}. With their answers:")
    print(f"bas study {folder} --analyse ANSWERS...")


def analyse(study: Path, answers: list[Path]) -> None:
    """Print the tables, and write all numbers into the study's folder."""
    optional_library("scipy.stats")  # before the answers are read
    ratings = read_ratings(study, answers)
    comparisons = compare(ratings)
    write_json(study / ANALYSIS, {"ratings": len(ratings)} | as_json(comparisons))
    print(f"{len(ratings)} ratings of {len({rating.rater for rating in ratings})} participants\n")
    print(tables(comparisons))
