"""The rows of the bench by name, their goals, and the lines of what was not measured."""

from tools.bench.table import Line

# Goals and, in brackets, stretch goals: (row, device, a word of the mode or "") -> text. The first match counts.
GOALS = {
    ("phase-1 step", "cuda", "exact"): "5x (7x)",
    ("phase-1 step", "cuda", "bf16"): "8x (11x)",
    ("phase-1 step", "cpu", "exact"): "",
    ("phase-1 step", "cpu", ""): "3x (3.5x)",
    ("phase-2 step", "cuda", "bf16"): "4.5x (6x)",
    ("phase-2 step", "cpu", "fp32"): "1.3x (1.5x)",
    ("phase-2 step", "cpu", "bf16"): "2.3x (3x)",
    ("400 + 400 steps", "cuda", "bf16"): "5x (7.5x), 15 s on an H200",
    ("start-up", "cuda", ""): "3 s (1 s)",
    ("peak memory, phase 1", "cuda", ""): "0.30x (0.21x)",
    ("peak memory, phase 2", "cuda", ""): "0.62x (0.53x)",
    ("class images", "cuda", ""): "1.1x (1.3x) of compiled",
    ("one image", "cuda", ""): "0.40 s (0.30 s)",
    ("8 concepts against 1", "cuda", ""): "1.03x (1.01x)",
    ("LoRA step against", "", ""): "1x",
    ("command", "cuda", "cold"): "2.7x (5x)",
    ("command", "cuda", "warm"): "4.5x (6.5x)",
    ("import", "", ""): "2.3x (torch + 0.2 s)",
    ("load to bf16, time", "", ""): "2x (3x)",
    ("load to bf16, memory", "", ""): "0.40x (0.36x)",
    ("load a base and a LoRA", "", ""): "1.05x",
}


def goal(row: str, device: str, mode: str) -> str:
    """The goal of a row, or an empty text."""
    found = (
        text
        for (name, where, word), text in GOALS.items()
        if row.startswith(name) and where in ("", device) and word in f"{mode} {row}"
    )
    return next(found, "")


def line(setting, row: str, mode: str = "", **values) -> Line:
    """A line of the table with its goal."""
    return Line(row, setting.name, mode, goal=goal(row, setting.device, mode), **values)


# What stands in the table for a group that was not measured.
NAMES = {
    "imports": ("import",),
    "steps": ("phase-1 step", "phase-1 step, exact", "phase-2 step"),
    "memory": ("peak memory, phase 1", "peak memory, phase 2", "start-up"),
    "job": ("400 + 400 steps",),
    "images": ("one image, 50 steps", "class images"),
    "scaling": ("8 concepts against 1", "resolution"),
    "adapters": ("LoRA step against a full one without its optimizer",),
    "loading": ("load to bf16, time", "load to bf16, memory", "load a base and a LoRA, memory"),
    "commands": ("command to concepts and one image, cold", "command to concepts and one image, warm"),
    "scenes": ("scenes per hour",),
}


def failure(error: Exception) -> str:
    """Why something was not measured, in one line: memory, a compiler, a program."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"failed: {reason[:100]}"


def unmeasured(setting, group: str, reason: str) -> list[Line]:
    """The lines of a group that this run leaves out, and why."""
    mode = "bf16" if setting.device == "cuda" else ""
    return [line(setting, row, mode if "step" in row else "", note=reason) for row in NAMES[group]]
