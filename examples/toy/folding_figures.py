"""The figures of the folding experiment."""

from __future__ import annotations

import torch
from torch import Tensor
from toy.report import COLOURS, canvas

State = dict[str, Tensor]


def draw(
    counts: dict[str, dict[str, int]],
    shown: dict[str, tuple[Tensor, Tensor, list[State]]],
    networks: int,
    slides: dict[str, int],
) -> dict[str, object]:
    """All figures by name."""
    return {"folding_counts": bars(counts, networks, slides), "folding_growth": boundaries(shown)}


def bars(counts: dict[str, dict[str, int]], networks: int, slides: dict[str, int]):
    """How many networks reach the solution, by way and data set; the slides' counts beside them."""
    figure, axes = canvas(9, 3.2, 1, 2, sharey=True)
    for ax, (data, count) in zip(axes[0], counts.items(), strict=True):
        names = list(count)
        shares = [1000 * count[name] / networks for name in names]
        colours = [
            "0.6" if n.startswith("random") else "#56B4E9" if n.startswith("folding") else "#009E73"
            for n in names
        ]
        drawn = ax.barh(names, shares, color=colours, height=0.65)
        ax.bar_label(drawn, fmt="%.0f", padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        for (name, share), style in zip(slides.items(), (":", "--"), strict=True):
            ax.axvline(share, color="black", linestyle=style, linewidth=1, label=f"slides, {name}: {share}")
        ax.set(title=data, xlabel="networks of 1000 that reach the solution", xlim=(0, 1000))
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def boundaries(shown: dict[str, tuple[Tensor, Tensor, list[State]]]):
    """A network that the library grows twice: its decision boundary and folds, before and after training."""
    titles = ("2-2-2, trained", "one unit more", "2-3-2, trained", "one unit more", "2-4-2, trained")
    figure, axes = canvas(9, 4.2, len(shown), len(titles))
    for row, (data, (x, y, states)) in zip(axes, shown.items(), strict=True):
        row[0].set_ylabel(data)
        low, high = x.min(0).values - 0.3, x.max(0).values + 0.3
        ticks = [torch.linspace(float(low[i]), float(high[i]), 160) for i in (0, 1)]
        grid = torch.stack(torch.meshgrid(*ticks, indexing="xy"), -1)
        plane = grid[..., 0], grid[..., 1]
        before = states[0]
        for ax, title, state in zip(row, titles, states, strict=False):
            margin = _margin(state, grid)
            ax.contourf(*plane, margin, levels=[-1e9, 0, 1e9], colors=["#D9E8F5", "#FBE3D0"])
            if bool((margin > 0).any()) and bool((margin < 0).any()):
                ax.contour(*plane, margin, levels=[0], colors="black", linewidths=1.4)
            for label, colour, mark in ((0, COLOURS["S2D"], "o"), (1, COLOURS["S3D m=2 c=3"], "^")):
                ax.scatter(*x[y == label].T, s=7, color=colour, marker=mark, linewidths=0, alpha=0.8)
            for w, b in zip(state["0.weight"], state["0.bias"], strict=True):
                known = bool(((before["0.weight"] - w).abs().sum(1) < 1e-6).any())
                new = title == "one unit more" and not known
                style = (
                    {"colors": "#009E73", "linewidths": 2.2} if new else {"colors": "0.55", "linewidths": 0.8}
                )
                ax.contour(*plane, grid @ w + b, levels=[0], linestyles="dashed", **style)
            accuracy = float(((_margin(state, x) > 0) == (y == 1)).float().mean())
            ax.set_title(f"{title}: {accuracy:.1%}")
            limits = {"xlim": (float(low[0]), float(high[0])), "ylim": (float(low[1]), float(high[1]))}
            ax.set(xticks=[], yticks=[], **limits)
            before = state
    return figure


def _margin(state: State, x: Tensor) -> Tensor:
    """Second logit less the first."""
    hidden = torch.relu(x @ state["0.weight"].T + state["0.bias"])
    logits = hidden @ state["2.weight"].T + state["2.bias"]
    return logits[..., 1] - logits[..., 0]
