"""From rows to tables: means with confidence intervals for each method, and the paper's orderings one by one.

A scene is the unit: its pictures, concepts and seeds are averaged first, since they are not independent. Intervals are
Student's, over scenes (Gosset 1908): wide for a few scenes, as they should be. Orderings compare scene by scene.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bas.evaluation.baselines import VARIANTS

STUDENT = (  # 97.5 % quantiles of Student's t for 1, 2, 3, ... degrees of freedom
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
COLUMNS = {  # a column of the table: (which rows have it, its heading, whether more is better)
    "prompt_similarity": ("picture", "prompt similarity", True),
    "identity_similarity": ("picture", "identity similarity", True),
    "attention_iou": ("cell", "attention IoU", True),
    "leakage": ("cell", "leakage", False),
    "confused": ("cell", "confused handles", False),
}
HEADINGS = tuple(f"{heading} {'↑' if up else '↓'}" for _, heading, up in COLUMNS.values())


@dataclass(frozen=True)
class Interval:
    """A mean over scenes, and where it lies with 95 % confidence; unknown below two scenes."""

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Ordering:
    """A claim of the paper: one method has more of something than another."""

    more: str
    less: str
    column: str
    claim: str


ORDERINGS = (  # paper, section 4.1 and figure 5
    Ordering("db-m", "bas", "identity_similarity", "DB-m keeps identity best"),
    Ordering("bas", "db-m", "prompt_similarity", "DB-m follows prompts worse than the method"),
    Ordering("ti-m", "bas", "prompt_similarity", "TI-m follows prompts best"),
    Ordering("cd-m", "bas", "prompt_similarity", "CD-m follows prompts best"),
    Ordering("bas", "ti-m", "identity_similarity", "TI-m loses identity"),
    Ordering("bas", "cd-m", "identity_similarity", "CD-m loses identity"),
    Ordering("bas", "no-phase1", "prompt_similarity", "without phase 1 prompts suffer"),
    Ordering("bas", "no-mask", "prompt_similarity", "without the masked loss prompts suffer"),
    Ordering("bas", "no-attention", "identity_similarity", "without the attention loss identity suffers"),
    Ordering("bas", "single", "identity_similarity", "without union sampling identity suffers"),
)


def value_of(row: dict, column: str) -> float | None:
    """A row's number for a column; the mean where there is one for each handle."""
    value = row[column]
    return float(np.mean(list(value.values()))) if isinstance(value, dict) else value


def by_trial(rows: Iterable[dict], column: str) -> dict[str, dict[tuple[str, int], float]]:
    """The mean of a column for each method, and each scene and seed; those without a value are left out."""
    kind = COLUMNS[column][0]
    found: dict[str, dict[tuple[str, int], list[float]]] = {}
    for row in rows:
        if row["row"] == kind and (value := value_of(row, column)) is not None:
            found.setdefault(row["method"], {}).setdefault((row["scene"], row["seed"]), []).append(value)
    return {
        method: {trial: float(np.mean(values)) for trial, values in trials.items()} for method, trials in found.items()
    }


def over_scenes(trials: dict[tuple[str, int], float]) -> Interval:
    """The interval over scenes of values by scene and seed."""
    scenes: dict[str, list[float]] = {}
    for (scene, _), value in trials.items():
        scenes.setdefault(scene, []).append(value)
    return interval([float(np.mean(values)) for values in scenes.values()])


def interval(values: list[float]) -> Interval:
    """The mean of one value for each scene, and its 95 % confidence interval."""
    data, count = np.array(values), len(values)
    mean = float(data.mean())
    if count < 2:
        return Interval(mean)
    half = student(count - 1) * float(data.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table from the normal's, to three digits."""
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.95996 + 2.3723 / freedom + 2.82 / freedom**2


def summarise(rows: list[dict]) -> dict[str, dict[str, Interval]]:
    """For each method, in the order of VARIANTS, each column that it has values of."""
    columns = {column: by_trial(rows, column) for column in COLUMNS}
    methods = [method for method in VARIANTS if method in columns["prompt_similarity"]]
    return {
        method: {column: over_scenes(trials[method]) for column, trials in columns.items() if method in trials}
        for method in methods
    }


def compare(rows: list[dict], more: str, less: str, column: str) -> Interval | None:
    """By how much one method has more than the other, over the scenes and seeds that both have; None without any."""
    trials = by_trial(rows, column)
    ours, theirs = trials.get(more, {}), trials.get(less, {})
    differences = {trial: value - theirs[trial] for trial, value in ours.items() if trial in theirs}
    return over_scenes(differences) if differences else None


def option_changes(rows: list[dict]) -> dict[str, list[Interval | None]]:
    """For each option that was tried, by how much it changes each column of the method."""
    options = [name for name, row in VARIANTS.items() if row.kind == "option"]
    changes = {name: [compare(rows, name, "bas", column) for column in COLUMNS] for name in options}
    return {name: trials for name, trials in changes.items() if any(trials)}


def verdict(difference: Interval) -> str:
    """Whether a claim shows: only where the interval leaves 0 out."""
    if difference.low is None:
        return "one scene"
    if difference.low > 0:
        return "holds"
    return "reversed" if difference.high < 0 else "not shown"


def markdown(rows: list[dict], facts: dict[str, str]) -> str:
    """The results as a page of Markdown."""
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in facts.items()), "", *method_table(rows)]
    lines += ["", "Means over scenes with 95 % confidence intervals over scenes, where there are two or more.", ""]
    if checked := ordering_table(rows):
        lines += ["## The paper's orderings", "", *checked, ""]
        lines += ["“holds” and “reversed”: the interval of the difference leaves 0 out.", ""]
    if tried := option_table(rows):
        lines += ["## The options", "", *tried, "", "Over the scenes and seeds that both rows have.", ""]
    return "\n".join(lines)


def method_table(rows: list[dict]) -> list[str]:
    """A line for each method with the mean and interval of each column."""
    lines = head(["method", "", *HEADINGS])
    for method, columns in summarise(rows).items():
        lines.append(line([method, VARIANTS[method].help, *(str(columns.get(column, "–")) for column in COLUMNS)]))
    return lines


def checked_orderings(rows: list[dict]) -> list[tuple[str, str, Interval]]:
    """The claim, what was measured and the difference of each of the paper's orderings that these rows can check."""
    return [
        (ordering.claim, f"{COLUMNS[ordering.column][1]}: {ordering.more} − {ordering.less}", difference)
        for ordering in ORDERINGS
        if (difference := compare(rows, ordering.more, ordering.less, ordering.column))
    ]


def ordering_table(rows: list[dict]) -> list[str]:
    """A line for each of the paper's orderings that can be checked; nothing when none can."""
    lines = [
        line([claim, measured, str(difference), verdict(difference)])
        for claim, measured, difference in checked_orderings(rows)
    ]
    return [*head(["claim", "measured", "difference", "verdict"]), *lines] if lines else []


def option_table(rows: list[dict]) -> list[str]:
    """A line for each option that was tried; nothing when none was."""
    changes = option_changes(rows)
    lines = [line([name, VARIANTS[name].help, *(str(c or "–") for c in trials)]) for name, trials in changes.items()]
    return [*head(["option − bas", "", *HEADINGS]), *lines] if lines else []


def head(titles: list[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(titles), line(["---"] * len(titles))]


def line(trials: list[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(trials)} |"
