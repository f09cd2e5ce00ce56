"""The results as one self-contained page, OUT/index.html: the plot, the tables, and the images behind each point."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from bas.data.scene_folder import load_scene
from bas.evaluation.baselines import VARIANTS
from bas.evaluation.protocol import Trial
from bas.evaluation.tables import checked_orderings, option_changes, shown_columns, summarise, verdict
from bas.io.figures import tint_masks
from bas.io.images import fit, fit_mask
from bas.web.elements import Figure, figure, render, spread

SIDE = 160  # pixels of an image on the page
MOST = 8  # images of a method and a scene on the page
PLOT_SIDE = 1200  # pixels of the plot at most


@dataclass(frozen=True)
class Strip:
    """Images of one method on one scene."""

    title: str
    figures: tuple[Figure, ...]


def page(rows: list[dict], trials: list[Trial], facts: dict[str, str], plot: Image.Image) -> str:
    """Return the page. rows: of results.jsonl; trials: those that are scored; plot: of `bas.evaluation.plot.scatter`"""
    summary = summarise(rows)
    return render(
        "evaluation.html",
        facts=facts,
        plot=figure(plot, "identity similarity against prompt similarity", PLOT_SIDE),
        columns=shown_columns(rows),
        variants=VARIANTS,
        methods=summary,
        orderings=[(*found, verdict(found[-1])) for found in checked_orderings(rows)],
        options=option_changes(rows),
        galleries={method: gallery(method, rows, trials) for method in summary},
    )


def gallery(method: str, rows: list[dict], trials: list[Trial]) -> list[Strip]:
    """Return the images of a method's first seed, scene by scene, each with its prompt and its two numbers."""
    first: dict[str, Trial] = {}
    for trial in trials:
        if trial.method == method:
            first.setdefault(trial.scene, trial)
    return [
        strip(trial, [row for row in rows if row["row"] == "picture" and is_of(row, trial)]) for trial in first.values()
    ]


def strip(trial: Trial, rows: list[dict]) -> Strip:
    """Return a scene with its masks, then at most MOST of a trial's images. rows: of its images"""
    scene = load_scene(trial.training)
    scale = min(1, SIDE / max(scene.image.size))  # tinted at the size that is shown: a large one would take gigabytes
    width, height = (max(1, round(scale * side)) for side in scene.image.size)
    masks = {i: np.asarray(fit_mask(mask, (width, height))) for i, mask in enumerate(scene.masks)}
    shown = fit(scene.image, (width, height), Image.Resampling.LANCZOS)
    figures = [figure(tint_masks(shown, masks), "the scene and its masks", SIDE)]
    for row in spread(rows, MOST):
        caption = f"{row['prompt']} (prompt {row['prompt_similarity']:.2f}, identity {row['identity_similarity']:.2f})"
        figures.append(figure(trial.folder / row["file"], caption, SIDE))
    count = f", {MOST} of {len(rows)} images" if len(rows) > MOST else ""
    return Strip(f"{trial.scene}, seed {trial.seed}{count}", tuple(figures))


def is_of(row: dict, trial: Trial) -> bool:
    """Return whether a row belongs to this trial."""
    return (row["scene"], row["method"], row["seed"]) == (trial.scene, trial.method, trial.seed)
