"""From rows to tables: means with confidence intervals for each method, and the paper's orderings one by one.

The scene is the unit: its images, concepts and seeds are averaged first, since they are not independent. Intervals are
Student's, over scenes (Gosset 1908). Orderings compare methods scene by scene.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bas.evaluation.baselines import VARIANTS
from bas.evaluation.libraries import optional_library

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Column:
    """A column of the tables."""

    kind: str  # of the rows of results.jsonl that have it
    heading: str
    more_is_better: bool

    @property
    def title(self) -> str:
        """The heading with an arrow to the better side."""
        return f"{self.heading} {'↑' if self.more_is_better else '↓'}"


COLUMNS = {
    "prompt_similarity": Column("picture", "prompt similarity", True),
    "identity_similarity": Column("picture", "identity similarity", True),
    "attention_iou": Column("cell", "attention IoU", True),
    "leakage": Column("cell", "leakage", False),
    "confused": Column("cell", "confused handles", False),
    "right": Column("picture", "right subsets", True),  # of measures that say when a concept is shown
}
MAIN_COLUMN = "prompt_similarity"  # every image has a value in it


@dataclass(frozen=True)
class Interval:
    """A mean over scenes with its 95 % confidence interval, which is unknown below two scenes."""

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


def shown_columns(rows: list[dict]) -> dict[str, Column]:
    """Return the columns that some row has a value in."""
    return {name: column for name, column in COLUMNS.items() if any(by_trial(rows, name).values())}


def value_of(row: dict, column: str) -> float | None:
    """Return a row's value in a column, averaged over handles where each has one."""
    value = row.get(column)
    return float(np.mean(list(value.values()))) if isinstance(value, dict) else value


def by_trial(rows: Iterable[dict], column: str) -> dict[str, dict[tuple[str, int], float]]:
    """Average a column for each method, scene and seed, leaving out those without a value."""
    kind = COLUMNS[column].kind
    found: dict[str, dict[tuple[str, int], list[float]]] = {}
    for row in rows:
        if row["row"] == kind and (value := value_of(row, column)) is not None:
            found.setdefault(row["method"], {}).setdefault((row["scene"], row["seed"]), []).append(value)
    return {
        method: {trial: float(np.mean(values)) for trial, values in trials.items()} for method, trials in found.items()
    }


def over_scenes(trials: dict[tuple[str, int], float]) -> Interval:
    """Return the interval over scenes of values by (scene, seed)."""
    scenes: dict[str, list[float]] = {}
    for (scene, _), value in trials.items():
        scenes.setdefault(scene, []).append(value)
    return interval([float(np.mean(values)) for values in scenes.values()])


def interval(values: list[float]) -> Interval:
    """Return the mean of one value per scene and its interval. Raises InputError where scipy is not installed."""
    data, count = np.array(values), len(values)
    mean = float(data.mean())
    if count < 2:
        return Interval(mean)
    quantile = optional_library("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, count - 1)
    half = float(quantile * data.std(ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def summarise(rows: list[dict]) -> dict[str, dict[str, Interval]]:
    """Return the interval of each column that a method has values of, for each method in the order of VARIANTS."""
    columns = {column: by_trial(rows, column) for column in COLUMNS}
    methods = [method for method in VARIANTS if method in columns[MAIN_COLUMN]]
    return {
        method: {column: over_scenes(trials[method]) for column, trials in columns.items() if method in trials}
        for method in methods
    }


def compare(rows: list[dict], more: str, less: str, column: str) -> Interval | None:
    """Return the difference of two methods over the scenes and seeds that both have; None where they share none."""
    trials = by_trial(rows, column)
    ours, theirs = trials.get(more, {}), trials.get(less, {})
    differences = {trial: value - theirs[trial] for trial, value in ours.items() if trial in theirs}
    return over_scenes(differences) if differences else None


def option_changes(rows: list[dict]) -> dict[str, list[Interval | None]]:
    """Return by how much each option that was tried changes each column of the method."""
    options = [name for name, row in VARIANTS.items() if row.kind == "option"]
    columns = shown_columns(rows)
    changes = {name: [compare(rows, name, "bas", column) for column in columns] for name in options}
    return {name: trials for name, trials in changes.items() if any(trials)}


def verdict(difference: Interval) -> str:
    """Say whether a claim holds. The interval of the difference has to leave 0 out."""
    if difference.low is None or difference.high is None:
        return "one scene"
    if difference.low > 0:
        return "holds"
    return "reversed" if difference.high < 0 else "not shown"


def markdown(rows: list[dict], facts: dict[str, str]) -> str:
    """Return the results as Markdown."""
    lines = ["# Evaluation", "", *(f"- {name}: {value}" for name, value in facts.items()), "", *method_table(rows)]
    lines += ["", "Means over scenes with 95 % confidence intervals over scenes, where there are two or more.", ""]
    if checked := ordering_table(rows):
        lines += ["## The paper's orderings", "", *checked, ""]
        lines += ["“holds” and “reversed”: the interval of the difference leaves 0 out.", ""]
    if tried := option_table(rows):
        lines += ["## The options", "", *tried, "", "Over the scenes and seeds that both rows have.", ""]
    return "\n".join(lines)


def method_table(rows: list[dict]) -> list[str]:
    """Return a line for each method with the mean and interval of each column, and how many scenes it lacks."""
    shown = shown_columns(rows)
    lines = head(["method", "", *(column.title for column in shown.values())])
    scenes = {method: len({scene for scene, _ in trials}) for method, trials in by_trial(rows, MAIN_COLUMN).items()}
    for method, columns in summarise(rows).items():
        part = f", {scenes[method]} of {max(scenes.values())} scenes" if scenes[method] < max(scenes.values()) else ""
        lines.append(line([method, VARIANTS[method].help + part, *(str(columns.get(column, "–")) for column in shown)]))
    return lines


def checked_orderings(rows: list[dict]) -> list[tuple[str, str, Interval]]:
    """Return (claim, what was measured, difference) for each of the paper's orderings that these rows can check."""
    return [
        (ordering.claim, f"{COLUMNS[ordering.column].heading}: {ordering.more} − {ordering.less}", difference)
        for ordering in ORDERINGS
        if (difference := compare(rows, ordering.more, ordering.less, ordering.column))
    ]


def ordering_table(rows: list[dict]) -> list[str]:
    """Return a line for each of the paper's orderings that these rows can check."""
    lines = [
        line([claim, measured, str(difference), verdict(difference)])
        for claim, measured, difference in checked_orderings(rows)
    ]
    return [*head(["claim", "measured", "difference", "verdict"]), *lines] if lines else []


def option_table(rows: list[dict]) -> list[str]:
    """Return a line for each option that was tried."""
    changes = option_changes(rows)
    lines = [line([name, VARIANTS[name].help, *(str(c or "–") for c in trials)]) for name, trials in changes.items()]
    headings = [column.title for column in shown_columns(rows).values()]
    return [*head(["option − bas", "", *headings]), *lines] if lines else []


def head(titles: list[str]) -> list[str]:
    """Return the first two lines of a table."""
    return [line(titles), line(["---"] * len(titles))]


def line(trials: list[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(trials)} |"
