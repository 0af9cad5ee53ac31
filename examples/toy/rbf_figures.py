"""The figures of the RBF experiment, after figures 1 and 5 of S2D and figure 2 of S3D."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from toy.networks import Data, predict
from toy.report import COLOURS, canvas, quartiles

if TYPE_CHECKING:
    from rbf import Probe, Run

SHOWN = (
    "S2D",
    "S3D m=2 c=3",
    "random split",
    "new initialisation",
    "gradient boosting",
    "from scratch",
    "Mixed",
)

WHEN = {"at once": "at once", "trained": "after training"}
YIELD = {
    "at once": r"decrease of the loss / $(\varepsilon^2/2)$",
    "trained": "decrease against the unsplit network",
}


def draw(runs: dict[str, Run], points: Data, tried: Probe, iterations: int) -> dict[str, object]:
    """All figures by name."""
    return {
        "rbf_fit": fits(runs, points),
        "rbf_loss": losses(runs, iterations),
        "rbf_split": splits(tried),
        "rbf_c": sweep(runs),
    }


def fits(runs: dict[str, Run], points: Data):
    """Targets and fits with 3 and 8 neurons, where S2D does about as well as in the median."""
    final = runs["S2D"].final
    seed = int((final - final.median()).abs().argmin())
    x = torch.linspace(-5, 5, 400, dtype=torch.float64)
    order = points.x[seed].argsort()
    figure, axes = canvas(9, 3.4, 1, 2, sharey=True)
    for ax, width in zip(axes[0], (3, 8), strict=True):
        ax.plot(points.x[seed, order], points.y[seed, order], color="0.75", linewidth=5, label="target")
        for name in ("S2D", "S3D m=2 c=3", "random split", "new initialisation", "Mixed"):
            networks = runs[name].stages[width - 1].at(slice(seed, seed + 1))
            style = {"linestyle": "--" if name == "random split" else "-"}
            ax.plot(x, predict(networks, x[None])[0], color=COLOURS[name], label=name, **style)
        ax.set(title=f"{width} neurons (target {seed})", xlabel="x")
    axes[0, 0].set_ylabel("f(x)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def losses(runs: dict[str, Run], iterations: int):
    """Median loss over the iterations; the growths are the vertical lines."""
    figure, axes = canvas(9, 4.2)
    ax = axes[0, 0]
    for name in SHOWN:
        history = runs[name].history
        steps = torch.arange(history.shape[1]) * max(iterations // 100, 1) / 1000
        bottom, middle, top = history.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=history.dtype), dim=0)
        ax.plot(
            steps, middle, color=COLOURS[name], label=name, linestyle="--" if name == "from scratch" else "-"
        )
        if name in ("S2D", "S3D m=2 c=3", "Mixed"):
            ax.fill_between(steps, bottom, top, color=COLOURS[name], alpha=0.12, linewidth=0)
    for growth in range(1, 8):
        ax.axvline(growth * iterations / 1000, color="0.88", zorder=0)
    ax.set(
        yscale="log", xlabel="thousands of iterations (vertical lines: one more neuron)",
        ylabel="mean square error", xlim=(0, 8 * iterations / 1000),
        title="Median over the targets; bands: quartiles of S2D, S3D and Mixed",
    )  # fmt: skip
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    return figure


def splits(tried: Probe):
    """Eigenvalue against decrease of the loss, and decrease against the angle to the eigenvector."""
    figure, axes = canvas(9, 6.4, 2, 2)
    for ax, found, when in ((axes[0, 0], tried.at_once, "at once"), (axes[0, 1], tried.trained, "trained")):
        ax.axhline(0, color="0.88", zorder=0)
        ax.scatter(tried.eigenvalues, found, s=14, alpha=0.7, linewidths=0, color=COLOURS["S2D"])
        ax.set_title(f"each of 7 neurons split: {WHEN[when]}")
        ax.set(xlabel=r"$-\lambda_{\min}$ of the neuron", ylabel=YIELD[when])
        ax.set_xscale("symlog", linthresh=1e-3)
        ax.set_yscale("symlog", linthresh=1e-3)
        ax.set_xticks([-0.1, -1e-3, 1e-3, 0.1, 10])
    ends = torch.stack([tried.eigenvalues.min(), tried.eigenvalues.max()])
    axes[0, 0].plot(ends, ends, color="0.6", linewidth=1, zorder=0, label="as predicted")
    axes[0, 0].legend(loc="upper left")
    for ax, found, when in (
        (axes[1, 0], tried.turned, "at once"),
        (axes[1, 1], tried.turned_trained, "trained"),
    ):
        falls = found[found.amax(1) > 0]
        share = falls / falls.amax(1, keepdim=True)
        for line in share:
            ax.plot(tried.angles, line, color=COLOURS["S2D"], alpha=0.3, linewidth=0.8)
        if len(share):
            ax.plot(tried.angles, share.median(0).values, color="black", label="median of the networks")
            ax.legend(loc="lower left")
        ax.set(xlabel="angle to the splitting gradient (degrees)", xticks=range(0, 181, 45))
        ax.set(ylabel="share of the best angle's decrease", ylim=(-1.5, 1.1))
        ax.set_title(f"the best neuron split in all directions: {WHEN[when]}")
    return figure


def sweep(runs: dict[str, Run]):
    """Final loss of binary splits against the bound c on the offspring weights."""
    named = {1.0: "S2D", **{float(n.split("c=")[1]): n for n in runs if n.startswith("S3D m=2")}}
    cs = sorted(named)
    figure, axes = canvas(5, 3.4)
    ax = axes[0, 0]
    low, middle, high = zip(*(quartiles(runs[named[c]].final) for c in cs), strict=True)
    for place, c in enumerate(cs):
        final = runs[named[c]].final
        ax.scatter([place] * len(final), final, s=10, color="0.7", linewidths=0, zorder=1)
    ax.errorbar(
        range(len(cs)), middle, [[m - b for m, b in zip(middle, low, strict=True)],
        [t - m for m, t in zip(middle, high, strict=True)]],
        color=COLOURS["S3D m=2 c=3"], marker="o", capsize=3, label="median and quartiles", zorder=2,
    )  # fmt: skip
    ax.set_xticks(range(len(cs)), ["1\n(S2D)", *(f"{c:g}" for c in cs[1:])])
    ax.set(yscale="log", xlabel="c: bound on the sum of |offspring weights|", ylabel="final loss, 8 neurons")
    ax.legend(loc="upper right")
    return figure
