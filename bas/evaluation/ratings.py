"""The answers of a user study: means, Kruskal-Wallis and Tukey's test, as the paper reports them (appendix).

scipy of the `evaluation` extra computes the statistics.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bas.errors import InputError
from bas.evaluation.libraries import optional_library
from bas.evaluation.study import KEY
from bas.io.json_files import read_record

KEY_SHAPE = {"study": str, "questions": {...: {"method": str}}}
QUESTIONS = {"identity": "the same concept", "prompt": "what the text says"}
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rating:
    """One participant's ratings of one image, 1 to 5."""

    rater: str
    method: str
    identity: int
    prompt: int


@dataclass(frozen=True)
class Mean:
    """A method's mean rating; low and high bound it with 95 % confidence (Student's t)."""

    method: str
    count: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """Tukey's honestly significant difference of two methods: first minus second, with its 95 % interval."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """One question: whether the methods differ at all (Kruskal and Wallis 1952), and which do (Tukey 1949)."""

    means: tuple[Mean, ...]
    h: float
    p: float
    pairs: tuple[Pair, ...]


def read_ratings(study: Path, answers: list[Path]) -> list[Rating]:
    """Read the files that the pages saved, with the methods that the study's key names.

    Raises InputError for a file of another kind, for answers to another study, for ratings other than 1 to 5, and for a
    page that was given twice.
    """
    if not (study / KEY).is_file():
        raise InputError(f"{study} is not a study of bas: it has no {KEY}")
    key = read_record(study / KEY, KEY_SHAPE, "restore it from a copy: without it no answer can be told apart")
    questions = key["questions"]
    ratings, seen = [], {}
    for path in answers:
        content = read_record(path, {}, "give the file that a page of the study saved")
        if content.get("study") != key["study"]:
            raise InputError(f"{path} does not answer this study")
        given = content.get("answers")
        if not isinstance(given, dict) or not given:
            raise InputError(f"{path} holds no answers")
        who = str(content.get("rater")), str(content.get("page"))
        if who in seen:
            raise InputError(f"{path} and {seen[who]} are the same participant's answers to one page: keep one")
        seen[who] = path
        for name, marks in given.items():
            if name not in questions:
                raise InputError(f"{path} answers {name}, which this study does not ask")
            values = [marks.get(question) if isinstance(marks, dict) else None for question in QUESTIONS]
            if any(type(value) is not int or not 1 <= value <= 5 for value in values):
                raise InputError(f"{path}: the ratings of {name} are {values}, not two of 1 to 5")
            ratings.append(Rating(who[0], questions[name]["method"], marks["identity"], marks["prompt"]))
    return ratings


def compare(ratings: list[Rating]) -> dict[str, Comparison]:
    """Run both tests for each question. Raises InputError for fewer than two methods, or two ratings of a method."""
    methods = sorted({rating.method for rating in ratings})
    groups = [[rating for rating in ratings if rating.method == method] for method in methods]
    if len(methods) < 2 or min(map(len, groups)) < 2:
        raise InputError("the tests need two methods or more, with two ratings or more each")
    return {
        question: compare_marks({m: [getattr(r, question) for r in g] for m, g in zip(methods, groups, strict=True)})
        for question in QUESTIONS
    }


def compare_marks(marks: dict[str, list[int]]) -> Comparison:
    """Run both tests on one question's ratings, by method. If all ratings are equal, H = 0 and p = 1.

    Without variance within the methods Tukey's test is undefined, and there are no pairs.
    """
    stats = optional_library("scipy.stats")
    methods, groups = list(marks), [np.array(values, dtype=float) for values in marks.values()]
    alike = np.ptp(np.concatenate(groups)) == 0
    h, p = (0.0, 1.0) if alike else map(float, stats.kruskal(*groups))
    varies = any(np.ptp(group) for group in groups)  # within a method: what Tukey's test measures differences by
    pairs = tukey_pairs(stats, methods, groups) if varies else []
    means = []
    for method, group in zip(methods, groups, strict=True):
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(group) - 1) * group.std(ddof=1) / len(group) ** 0.5)
        mean = float(group.mean())
        means.append(Mean(method, len(group), mean, mean - reach, mean + reach))
    return Comparison(tuple(means), h, p, tuple(pairs))


def tukey_pairs(stats, methods: list[str], groups: list[np.ndarray]) -> list[Pair]:
    """Return Tukey's test of every two methods. stats: scipy.stats"""
    tukey = stats.tukey_hsd(*groups)
    interval = tukey.confidence_interval(CONFIDENCE)
    columns = tukey.statistic, interval.low, interval.high, tukey.pvalue
    return [
        Pair(methods[i], methods[j], *(float(column[i, j]) for column in columns))
        for i in range(len(methods))
        for j in range(i + 1, len(methods))
    ]


def tables(comparisons: dict[str, Comparison]) -> str:
    """Return both questions as Markdown."""
    parts = []
    for question, comparison in comparisons.items():
        groups = len(comparison.means)
        parts.append(f"{question} ({QUESTIONS[question]})\n\n| method | ratings | mean | 95 % |\n|---|---|---|---|")
        parts[-1] += "".join(
            f"\n| {m.method} | {m.count} | {m.mean:.2f} | {m.low:.2f} to {m.high:.2f} |" for m in comparison.means
        )
        parts.append(f"Kruskal-Wallis: H({groups - 1}) = {comparison.h:.2f}, {p_value(comparison.p)}")
        parts.append("| Tukey's HSD | difference | 95 % | p |\n|---|---|---|---|")
        parts[-1] += "".join(
            f"\n| {pair.first} − {pair.second} | {pair.difference:+.2f} | {pair.low:+.2f} to {pair.high:+.2f} | "
            f"{p_value(pair.p)} |"
            for pair in comparison.pairs
        )
    return "\n\n".join(parts)


def p_value(p: float) -> str:
    """Return a p value as papers report it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def as_json(comparisons: dict[str, Comparison]) -> dict:
    """Return all numbers of both questions."""
    return {question: asdict(comparison) for question, comparison in comparisons.items()}
