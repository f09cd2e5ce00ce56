"""The bench's arithmetic and its tables: medians and quartiles, ratios, aligned text and Markdown from one JSON."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

COLUMNS = ("row", "bas in", "official", "compiled", "bas", "ratio", "goal (stretch)", "fidelity")
UNMEASURED = "not measured"


@dataclass(frozen=True)
class Stat:
    """Repeated measurements of one thing."""

    median: float
    q1: float  # a quarter of them lie below
    q3: float  # and a quarter above
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Stat":
        """Quartiles by linear interpolation between the measurements. Raises ValueError for none."""
        if not values:
            raise ValueError("nothing was measured")
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, q1, q3, len(values))


@dataclass(frozen=True)
class Line:
    """One line of the table: a row of goals.GOALS, on one model, with bas in one mode."""

    row: str
    setting: str  # model and device
    mode: str = ""  # of bas
    unit: str = "s"
    official: Stat | None = None
    compiled: Stat | None = None  # the official side's best compiled form
    bas: Stat | None = None
    ratio: float | None = None
    goal: str = ""
    fidelity: dict[str, float] | None = None
    note: str = ""  # how it was taken, or why it was not

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def speedup(theirs: Stat | None, ours: Stat | None) -> float | None:
    """How many times faster ours is."""
    return theirs.median / ours.median if theirs and ours else None


def share(theirs: Stat | None, ours: Stat | None) -> float | None:
    """Ours as a part of theirs."""
    return ours.median / theirs.median if theirs and ours else None


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show_stat(stat: dict | None, unit: str) -> str:
    """The median, and the quartiles in brackets when there is more than one measurement."""
    if not stat:
        return "-"
    spread = f" [{number(stat['q1'])}, {number(stat['q3'])}]" if stat["n"] > 1 else ""
    return f"{number(stat['median'])} {unit}{spread}"


def show_fidelity(fidelity: dict[str, float] | None) -> str:
    """Relative errors and cosines by name, as `loss 1e-07, handles 2e-06 (cos 1.00000)`."""
    if not fidelity:
        return "-"
    errors = [name for name in fidelity if not name.endswith(" cosine")]
    cosines = {name: f" (cos {fidelity[f'{name} cosine']:.5f})" for name in errors if f"{name} cosine" in fidelity}
    return ", ".join(f"{name} {fidelity[name]:.1e}{cosines.get(name, '')}" for name in errors)


def cells(line: dict) -> tuple[str, ...]:
    """The texts of one line's columns."""
    if not line["bas"] and not line["official"]:
        reason = f"{UNMEASURED}: {line['note']}" if line["note"] else UNMEASURED
        return line["row"], line["mode"] or "-", "-", "-", reason, "-", line["goal"] or "-", "-"
    unit = line["unit"]
    return (
        f"{line['row']} ({line['note']})" if line["note"] else line["row"],
        line["mode"] or "-",
        show_stat(line["official"], unit),
        show_stat(line["compiled"], unit),
        show_stat(line["bas"], unit),
        "-" if line["ratio"] is None else f"{line['ratio']:.2f}x",
        line["goal"] or "-",
        show_fidelity(line["fidelity"]),
    )


def head(result: dict) -> list[str]:
    """What the figures depend on: date, machine, versions, ceilings, how they were taken."""
    machine, versions = result["machine"], result["versions"]
    ceilings = ", ".join(f"{name} {number(value)} {unit}" for name, value, unit in result["ceilings"])
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"{result['date']}, {machine['name']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"{machine['memory_gb']:.0f} GB; {names}",
        f"ceilings measured in the same call: {ceilings}",
        f"load of the machine at the start and the end: {machine['load_before']:.1f}, {machine['load_after']:.1f} "
        "(busy processes; on an idle machine 0 at the start)",
    ]
    return lines + ([f"quick check: {result['quick']}"] if result["quick"] else [])


def by_setting(result: dict) -> dict[str, list[dict]]:
    """The lines of each setting, in the order of their first appearance."""
    groups: dict[str, list[dict]] = {}
    for line in result["lines"]:
        groups.setdefault(line["setting"], []).append(line)
    return groups


def text_table(result: dict) -> str:
    """The whole result as aligned columns for a terminal."""
    rows = [COLUMNS, *(cells(line) for line in result["lines"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    out = head(result)
    for setting, lines in by_setting(result).items():
        table = [COLUMNS, *(cells(line) for line in lines)]
        out += ["", setting]
        out += ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(out)


def markdown(result: dict) -> str:
    """The whole result as Markdown: what docs/speed.md holds. A setting with nothing measured is left out."""
    out = [f"- {line}" for line in head(result)]
    for setting, lines in by_setting(result).items():
        if all(line["bas"] is None for line in lines):
            continue
        out += ["", f"### {setting}", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        out += [f"| {' | '.join(cells(line))} |" for line in lines]
    return "\n".join(out) + "\n"
