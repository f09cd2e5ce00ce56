"""Figure 5 of the paper: identity against prompt similarity, a point for each method with its confidence intervals."""

import io

from PIL import Image

from bas.evaluation.baselines import VARIANTS
from bas.evaluation.libraries import optional_library
from bas.evaluation.tables import COLUMNS, Interval

X, Y = "prompt_similarity", "identity_similarity"
SIZE, DPI = (9.6, 5.4), 100  # inches, and pixels of an inch
MARKERS = {"method": "o", "ablation": "s", "option": "^"}  # of a variant's kind


def scatter(summary: dict[str, dict[str, Interval]]) -> Image.Image:
    """Draw the plot. summary: of `bas.evaluation.tables.summarise`. Raises InputError where matplotlib is missing."""
    sheet = optional_library("matplotlib.figure").Figure(SIZE, DPI, layout="constrained")
    axes = sheet.subplots()
    for method, columns in summary.items():
        x, y = columns[X], columns[Y]
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=reach(x),
            yerr=reach(y),
            fmt=MARKERS[VARIANTS[method].kind],
            markersize=8,
            elinewidth=1.2,
            label=method,
        )
    axes.set_xlabel(COLUMNS[X].heading)
    axes.set_ylabel(COLUMNS[Y].heading)
    sheet.legend(loc="outside right upper", frameon=False)
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png")
    with Image.open(buffer) as image:
        return image.convert("RGB")


def reach(value: Interval) -> float | None:
    """Return how far an interval reaches from its mean; None where it is unknown."""
    return None if value.high is None else value.high - value.mean
