"""Measures every kind of training (`--train`) on scenes that the miniature never saw, alone and merged.

Each kind is trained on the first scene, whose subsets are generated and measured as in tools.checks.combine:

    rate        the learning rate of phase 2
    size        of the files that the kind keeps: the whole model, or the trained weights
    memory      of the larger phase, counted as by `bas train --dry_run`
    time        of both phases
    likeness    the mean likeness of the named concepts; 0.7 or more is right
    prompts     the share of images that show the named place
    right       the share of images that show every named concept, by the size of the subset

The kinds of MERGED are trained on two further scenes too, or as many as `--scenes` says. Then the runs of two and of
three scenes are merged:

    before, after    the mean likeness of each concept alone, in its own run and in the merged one
    drift            the mean relative change of the attention's output, as `bas merge` prints it
    pairs            images of one concept of each of two scenes, both right

    python -m tools.checks.adapters --output_dir /tmp/adapters --record
    python -m tools.checks.adapters --output_dir /tmp/adapters --scenes 1 --kinds lora-16 token --set learning_rate=5e-4

A second call continues: what is trained, merged and measured stays. DIR holds table.md and, for each kind, its runs and
scores.json. `--record` puts the tables into docs/adapters.md.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bas.cli.flags import add_fields, given
from bas.config import SampleConfig, TrainConfig
from bas.data.scene import subset_prompt
from bas.io.files import human_size, write_text
from bas.io.json_files import read_json, write_json
from bas.io.run_files import CONCEPTS, TUNED, read_concepts, read_sessions
from bas.models.bundle import Models
from bas.pretrained.folder import load
from bas.pretrained.hashes import weights_hash
from bas.pretrained.hub import find
from bas.pretrained.merging import merge_runs, read_sources
from bas.runtime.progress import clock
from bas.sampling.sampler import sample
from bas.training.dry_run import plan_run
from bas.training.setup import check_input
from tools.checks.combine import (
    FIRST_NOISE,
    RIGHT,
    SAMPLING,
    SIZES,
    Truth,
    by_size,
    learn,
    likenesses,
    measure,
    places_of,
    read_setting,
    read_shown,
    read_truth,
    summarise,
    unseen_scenes,
)
from tools.checks.mini import Recogniser, open_recogniser
from tools.command_line import run as run_tool
from tools.mini_world.layouts import Layout
from tools.mini_world.places import PLACES


@dataclass(frozen=True)
class Row:
    """One kind of training as it is measured."""

    settings: dict[str, Any]
    rate: float | None  # of phase 2 on the miniature; None: the miniature's own
    reason: str  # for the rate


OWN = "the miniature's own, which was chosen for all weights"
SEARCHED = "ten times the miniature's own; at a tenth likeness is lower (docs/adapters.md)"
OF_RANK = "ten times the miniature's own at rank 4; a third and a tenth of it at 16 and 64, which diverge at that of 4"
KINDS = {
    "full": Row({"train": "full"}, None, OWN),
    "cross_attention": Row({"train": "cross_attention"}, None, OWN),
    "kv": Row({"train": "kv"}, 1e-2, SEARCHED),
    "v": Row({"train": "v"}, 1e-2, "that of kv: the same weights, but for the keys"),
    "lora-4": Row({"train": "lora", "rank": 4}, 1e-2, OF_RANK),
    "lora-16": Row({"train": "lora", "rank": 16}, 3e-3, OF_RANK),
    "lora-64": Row({"train": "lora", "rank": 64}, 1e-3, OF_RANK),
    "token": Row({"train": "token", "rank": 16}, 1e-2, "that of lora-4; no other was tried"),
}
MERGED = ("kv", "v", "lora-16", "token")
SCENES = 3  # of two, three and four concepts
PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
MARKS = "<!-- measured -->\n", "<!-- end of measured -->"  # around the tables in the page


# --- One kind -----------------------------------------------------------------------------------------------------


def costs(trained: TrainConfig) -> dict[str, float]:
    """The bytes that a run keeps of its networks, the memory that its largest phase takes, and the seconds of both."""
    run = Path(trained.output_dir)
    weights = [run / TUNED] if (run / TUNED).exists() else run.glob("*/*.safetensors")
    stages = [stage for session in read_sessions(run) for stage in session["stages"]]
    scene, base, device, precision = check_input(trained)
    return {
        "bytes": sum(path.stat().st_size for path in weights),
        "memory": plan_run(trained, scene, base, precision, device, count_operations=False).peak,
        "seconds": sum(stage["seconds"] for stage in stages if stage["stage"].startswith("phase")),
    }


def alone(
    models: Models, handles: list[str], truth: Truth, places: tuple[str, ...], config: SampleConfig
) -> list[float]:
    """The mean likeness of each concept of a scene, generated alone in each place."""
    found = []
    for i, handle in enumerate(handles):
        prompts = [f"{subset_prompt([handle])} {PLACES[place][0]}" for place in places]
        found.append(float(likenesses(truth, sample(models, prompts, config))[:, i].mean()))
    return found


def pairs_right(
    models: Models, handles: list[list[str]], truths: list[Truth], places: tuple[str, ...], config: SampleConfig
) -> list[bool]:
    """For each image of one concept of each of two scenes, whether both are right."""
    right: list[bool] = []
    for a, b in combinations(range(len(handles)), 2):
        for i, first in enumerate(handles[a]):
            for j, second in enumerate(handles[b]):
                prompts = [f"{subset_prompt([first, second])} {PLACES[place][0]}" for place in places]
                images = sample(models, prompts, config)
                values = (likenesses(truths[a], images)[:, i], likenesses(truths[b], images)[:, j])
                right += [bool(both) for both in np.minimum(*values) >= RIGHT]
    return right


def measure_merged(
    folder: Path, runs: list[Path], layouts: list[Layout], places: int, config: SampleConfig
) -> dict[str, Any]:
    """Merge runs, and compare each concept with its own run's; then generate pairs of concepts of two scenes."""
    names = [
        f"{run}:{handle}=<s{i}-{handle[1:-1]}>"
        for i, run in enumerate(runs)
        for handle in read_concepts(run)[1]["handles"]
    ]
    sources = read_sources(runs, [1.0] * len(runs), names)
    if not (folder / CONCEPTS).exists():
        merge_runs(sources, folder, None, torch.float32)
    drift = read_concepts(folder)[1]["merged"]["drift"]
    merged, handles = load(folder), [list(source.handles) for source in sources]
    seen, truths, before, after = [places_of(layout, places) for layout in layouts], [], [], []
    for source, layout, shown in zip(sources, layouts, seen, strict=True):
        truths.append(read_truth(layout, shown, config.num_images))
        own = list(source.metadata["handles"])
        before += alone(load(source.run), own, truths[-1], shown, config)
        after += alone(merged, list(source.handles), truths[-1], shown, config)
    pairs = pairs_right(merged, handles, truths, seen[0], config)
    return {"before": before, "after": after, "drift": list(drift.values()), "pairs": pairs}


# --- The tables ---------------------------------------------------------------------------------------------------


def kinds_table(scores: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each kind."""
    names = ("rate", "size", "memory", "time", "likeness", "prompts", *(f"{size} right" for size in SIZES.values()))
    lines = [f"| `--train` | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kind, row in scores.items():
        sizes = by_size({kind: row["scene"]}, "images")
        cross = np.array(row["scene"]["cross"])
        whole = [summarise([image], cross) for image in read_shown(row["scene"]["images"])]
        cells = [f"{row['rate']:g}", *(human_size(int(row["costs"][name])) for name in ("bytes", "memory"))]
        cells += [clock(row["costs"]["seconds"])]
        cells += [f"{np.mean([image['likeness'] for image in whole]):.2f}"]
        cells += [f"{100 * np.mean([image['place'] for image in whole]):.0f} %"]
        cells += [f"{100 * sizes[size]['right']:.0f} %" if size in sizes else "–" for size in SIZES.values()]
        lines.append(f"| {' | '.join([kind, *cells])} |")
    return lines


def merged_table(scores: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each kind and number of scenes."""
    lines = ["| merged | scenes | likeness before | after | drift | pairs across scenes right |", "|---" * 6 + "|"]
    for kind, row in scores.items():
        for count, found in row.get("merged", {}).items():
            cells = [f"{np.mean(found[name]):.2f}" for name in ("before", "after")]
            cells += [f"{np.mean(found['drift']):.1%}", f"{100 * np.mean(found['pairs']):.0f} %"]
            lines.append(f"| {' | '.join([kind, count, *cells])} |")
    return lines


def tables(scores: dict[str, dict[str, Any]], about: str) -> str:
    """What was measured, as it stands in the page: the kinds, then what was merged."""
    merged = merged_table(scores) if any(row["merged"] for row in scores.values()) else []
    return "\n".join([about, "", *kinds_table(scores), *([""] if merged else []), *merged, ""])


def put_into_page(page: str, measured: str) -> str:
    """The page with other tables between its marks."""
    head, rest = page.split(MARKS[0])
    return f"{head}{MARKS[0]}{measured}{MARKS[1]}{rest.split(MARKS[1])[1]}"


def measure_kind(
    folder: Path,
    base: Path,
    layouts: dict[str, Layout],
    settings: dict[str, Any],
    recogniser: Recogniser,
    places: int,
    config: SampleConfig,
) -> dict[str, Any]:
    """Train a kind on these scenes, measure the first run, then merge the runs of the first two, three, ... scenes."""
    trained = {name: learn(folder / name, base, layout, settings) for name, layout in layouts.items()}
    (first, layout), runs = next(iter(layouts.items())), [folder / name / "run" for name in layouts]
    scene = measure(folder / first, trained[first], layout, recogniser, places, None, config)
    merged = {
        str(n): measure_merged(folder / f"merged-{n}", runs[:n], [*layouts.values()][:n], places, config)
        for n in range(2, len(layouts) + 1)
    }
    rate = trained[first].learning_rate
    return {"scene": scene, "costs": costs(trained[first]), "rate": rate, "merged": merged}


def parse_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.checks.adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of runs and results, to continue")
    parser.add_argument("--weights", help="a miniature's folder (default: the shipped one)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="rows to measure (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    parser.add_argument(
        "--scenes",
        type=int,
        default=SCENES,
        choices=range(1, SCENES + 1),
        help="1: merge nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of training", dest="changes"
    )
    parser.add_argument("--places", type=int, default=6, choices=range(1, 10), help="of the ten (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="images of a subset in a place (default: %(default)s)")
    parser.add_argument("--recogniser", type=Path, help="file of the recogniser of places (default: in --output_dir)")
    parser.add_argument("--record", action="store_true", help=f"put the tables into docs/{PAGE.name}")
    add_fields(parser, SampleConfig, SAMPLING)
    args = parser.parse_args()
    if args.record and set(args.kinds) != set(KINDS):
        parser.error("--record takes all kinds: the page's table has a row for each")
    return args


def main() -> None:
    """Train and measure every kind, print the tables."""
    args = parse_flags()
    base, out, changes = find(args.weights), args.output_dir, dict(map(read_setting, args.changes))
    config = SampleConfig(
        **{"batch_size": 16, **given(args, SampleConfig), "num_images": args.seeds, "seed": FIRST_NOISE}
    )
    recogniser = open_recogniser(args.recogniser, out, scenes=8_000, epochs=4)
    layouts, scores = unseen_scenes(args.scenes, args.seed), {}
    for kind in args.kinds:
        row, chosen = KINDS[kind], dict(list(layouts.items())[: args.scenes if kind in MERGED else 1])
        rate = {} if row.rate is None else {"learning_rate": row.rate}
        settings = row.settings | {"class_data_dir": str(out / "class_images")} | rate | changes
        stated = {"sampling": asdict(config), "places": args.places, "scenes": [*chosen], "settings": settings}
        stated |= {"base": weights_hash(base)}
        noted, stated = out / kind / "scores.json", json.loads(json.dumps(stated))
        if not noted.exists() or {name: read_json(noted).get(name) for name in stated} != stated:
            measured = measure_kind(out / kind, base, chosen, settings, recogniser, args.places, config)
            write_json(noted, stated | measured)
        scores[kind] = read_json(noted)
        print(f"{kind} is measured", flush=True)
    concepts = len(next(iter(layouts.values())).objects)
    about = (
        f"Scene {next(iter(layouts))} of {concepts} concepts, {args.places} places, {args.seeds} seeds, "
        f"{config.num_inference_steps} steps of sampling, torch {metadata.version('torch')}, base "
        f"{weights_hash(base)[:12]}{', ' + ' '.join(args.changes) if args.changes else ''}."
    )
    write_text(out / "table.md", tables(scores, about))
    print(tables(scores, about))
    if args.record:
        write_text(PAGE, put_into_page(PAGE.read_text(encoding="utf-8"), tables(scores, about)))


if __name__ == "__main__":
    run_tool(main)
