"""What the toy experiments share: tables, claims checked against the results, figures of one style."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# The colours of Okabe and Ito, which stay apart for the colour-blind; one method, one colour in every figure.
COLOURS = {
    "S2D": "#0072B2",
    "optimal split": "#0072B2",
    "S3D m=2 c=3": "#D55E00",
    "S3D m=3 c=3": "#CC79A7",
    "S3D m=4 c=3": "#8C564B",
    "random split": "#56B4E9",
    "new initialisation": "#009E73",
    "gradient boosting": "#B59F00",
    "herding": "#B59F00",
    "from scratch": "#777777",
    "Mixed": "#000000",
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Claim:
    """Something that a paper says (or that we want), and whether these results agree."""

    source: str
    says: str
    holds: bool
    found: str

    def __str__(self) -> str:
        return (
            f"{'agrees' if self.holds else 'DISAGREES':9s}  {self.source}: {self.says}. Here: {self.found}."
        )


def quartiles(values: Tensor) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = values.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return float(low), float(median), float(high)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry; the first is left-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            e.ljust(w) if i == 0 else e.rjust(w) for i, (e, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, ["-" * w for w in widths], *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def print_claims(claims: Sequence[Claim]) -> None:
    print()
    for claim in claims:
        print(claim)


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure that no window or global state holds, and its axes as an array of rows and columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figures: Callable[[], Mapping[str, object]], folder: Path) -> None:
    """Draw figures in the common style, write them as PNG and say where."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        drawn = figures()
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=110)
    print(f"\nFigures: {', '.join(str(folder / f'{name}.png') for name in drawn)}")
