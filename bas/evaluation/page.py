"""The results as one self-contained page, OUT/index.html: the plot, the tables, and the pictures behind each point."""

import string
from pathlib import Path

from bas import __version__
from bas.data.scene import load_scene
from bas.evaluation.baselines import VARIANTS
from bas.evaluation.plot import scatter_svg
from bas.evaluation.protocol import Trial
from bas.evaluation.tables import COLUMNS, HEADINGS, Interval, checked_orderings, option_changes, summarise, verdict
from bas.io.figures import tint_masks
from bas.web.report import escape, picture, spread

TEMPLATE = Path(__file__).parents[1] / "web" / "templates" / "evaluation.html"
SIDE = 160  # pixels of a picture on the page
MOST = 8  # pictures of a method and a scene on the page; of more, these many at even distances


def page(rows: list[dict], trials: list[Trial], facts: dict[str, str]) -> str:
    """The whole page. rows: of results.jsonl; trials: those that are scored"""
    summary = summarise(rows)
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title="Evaluation",
        facts=" · ".join(f"{escape(name)}: {escape(value)}" for name, value in facts.items()),
        scatter=scatter_svg(summary),
        table=numbers(summary),
        comparisons=orderings(rows) + options(rows),
        galleries="".join(gallery(method, rows, trials) for method in summary),
        version=escape(__version__),
    )


def numbers(summary: dict[str, dict[str, Interval]]) -> str:
    """A line for each method."""
    titles = ["method", "", *HEADINGS]
    lines = []
    for method, columns in summary.items():
        trials = [f'<a href="#{method}">{method}</a>', escape(VARIANTS[method].help)]
        trials += [shown(columns[column]) if column in columns else "–" for column in COLUMNS]
        lines.append(trials)
    return table(titles, lines)


def shown(value: Interval) -> str:
    """A mean, its interval small behind it."""
    bounds = "" if value.low is None else f" <small>{value.low:.3f} – {value.high:.3f}</small>"
    return f"{value.mean:.3f}{bounds}"


def comparison(heading: str, titles: list[str], lines: list[list[str]]) -> str:
    """A section with a table; nothing without lines."""
    if not lines:
        return ""
    return f'<section><h2>{heading}</h2><div class="scroll">{table(titles, lines)}</div></section>'


def orderings(rows: list[dict]) -> str:
    """The paper's claims with what was measured; nothing when none can be checked."""
    lines = [
        [escape(claim), escape(measured), shown(difference), verdict(difference)]
        for claim, measured, difference in checked_orderings(rows)
    ]
    return comparison("The paper’s orderings", ["claim", "measured", "difference", "verdict"], lines)


def options(rows: list[dict]) -> str:
    """By how much each option changes each column of the method; nothing when none was tried."""
    lines = [
        [name, escape(VARIANTS[name].help), *(shown(change) if change else "–" for change in changes)]
        for name, changes in option_changes(rows).items()
    ]
    return comparison("The options", ["option − bas", "", *HEADINGS], lines)


def table(titles: list[str], lines: list[list[str]]) -> str:
    """A table of HTML trials."""
    top = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{trial}</td>' for trial in trials)}</tr>" for trials in lines)
    return f"<table><tr>{top}</tr>{body}</table>"


def gallery(method: str, rows: list[dict], trials: list[Trial]) -> str:
    """The pictures of one method, scene by scene, each with its prompt and its two numbers; of its first seed."""
    strips, shown_scenes = [], {}
    for trial in trials:
        if trial.method == method:
            shown_scenes.setdefault(trial.scene, trial)
    for trial in shown_scenes.values():
        scene = load_scene(trial.training)
        figures = [picture(tint_masks(scene.picture, dict(enumerate(scene.masks))), "photograph and masks", SIDE)]
        mine = [row for row in rows if row["row"] == "picture" and is_of(row, trial)]
        for row in spread(mine, MOST):
            caption = (
                f"{row['prompt']} (prompt {row['prompt_similarity']:.2f}, identity {row['identity_similarity']:.2f})"
            )
            figures.append(picture(trial.folder / row["file"], caption, SIDE))
        note = f"{trial.scene}, seed {trial.seed}" + (f", {MOST} of {len(mine)} pictures" if len(mine) > MOST else "")
        strips.append(f'<h3>{escape(note)}</h3><div class="strip">{"".join(figures)}</div>')
    help = escape(f"{method}: {VARIANTS[method].help}")
    return f'<details id="{method}" open><summary>{help}</summary>{"".join(strips)}</details>'


def is_of(row: dict, trial: Trial) -> bool:
    """Whether a row belongs to this trial."""
    return (row["scene"], row["method"], row["seed"]) == (trial.scene, trial.method, trial.seed)
