"""Growth reports to the Trainer's loggers: scalars everywhere, histograms and a figure where they exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_summary import summarize

from lightning_split._compat import twins
from lightning_split.measuring import undisturbed
from lightning_split.probing import quiet
from lightning_split.report import GrowthReport

__all__ = ["announce", "log_growth", "model_summary", "scalars", "widths_figure"]

_SUMMARIES = twins("callbacks.ModelSummary")


def scalars(report: GrowthReport) -> dict[str, float]:
    """The figures of one growth under their tags, ``split/...``."""
    values: dict[str, float] = {
        "split/num_splits": float(len(report.splits)),
        "split/gain_predicted": report.estimated_gain,
        "split/gain_confirmed": report.predicted_gain,
        "split/gain_measured": report.measured_gain,
        "split/loss_before": report.loss_before,
        "split/loss_after": report.loss_after,
        "split/params": float(report.cost_after.params),
        "split/macs": float(report.cost_after.macs),
    }
    for name, width in report.widths_after.items():
        values[f"split/width/{name}"] = float(width)
    return values


@rank_zero_only
def log_growth(trainer: pl.Trainer, report: GrowthReport, history: Sequence[Mapping[str, Any]]) -> None:
    """Write one growth to every logger of the Trainer.

    Args:
        trainer: The Trainer; the x axis is the one that Lightning itself logs at.
        report: The growth.
        history: All growths so far, each with ``step``, ``widths_before`` and ``widths_after``.
    """
    # global_step counts every optimizer of a manual loop; this one counts batches, as Lightning's own logs.
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    values = scalars(report)
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_histogram"):
            for name, pairs in report.eigenpairs.items():
                smallest, largest = pairs.values.detach().float().cpu().unbind(1)
                experiment.add_histogram(f"split/index_min/{name}", smallest, global_step=step)
                experiment.add_histogram(f"split/index_max/{name}", largest, global_step=step)
        by_figure, by_image = hasattr(experiment, "add_figure"), hasattr(logger, "log_image")
        figure = widths_figure(history, now=step) if by_figure or by_image else None
        if figure is None:
            continue
        if by_figure:  # TensorBoard
            experiment.add_figure("split/widths", figure, global_step=step)
        else:  # Weights & Biases
            taking: Any = logger
            taking.log_image("split/widths", [_pixels(figure)], step=step)


def _pixels(figure: Any) -> np.ndarray:
    """A figure as an image of shape (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def model_summary(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
    """The Trainer's model summary of the network as it is now; ``None`` if the Trainer prints none.

    With an ``example_input_array`` it runs the module, without a trace.
    """
    depths = [c._max_depth for c in trainer.callbacks if isinstance(c, _SUMMARIES)]  # type: ignore[attr-defined]
    if not depths or not depths[0]:
        return None
    with quiet(trainer, pl_module), undisturbed(pl_module, train=None):
        return str(summarize(pl_module, max_depth=depths[0]))


def announce(trainer: pl.Trainer, pl_module: pl.LightningModule, report: GrowthReport, number: int) -> None:
    """Print a growth and the network as it is now through the progress bar; to be called on every process."""
    epoch, step = trainer.current_epoch, trainer.global_step
    summary = model_summary(trainer, pl_module) if report.splits else None
    shown = f"{report}\n\n{summary}" if summary else str(report)
    pl_module.print(f"\nGrowth {number} at epoch {epoch}, step {step}\n{shown}\n")


def widths_figure(history: Sequence[Mapping[str, Any]], now: int | None = None) -> Any | None:
    """Widths of all groups over time, as stairs; ``None`` without matplotlib.

    Args:
        history: Growths in order, each with ``step``, ``widths_before`` and ``widths_after``.
        now: Draw up to this step; default the last growth.

    Returns:
        A ``matplotlib.figure.Figure`` that no window or global state holds.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    steps = [int(event["step"]) for event in history]
    end = max([*(steps[-1:] or [0]), now or 0])
    end += max(1, round(0.06 * end))  # room to the right, so that the last stair can be seen
    names = list(dict.fromkeys(n for event in history for n in event["widths_after"]))
    lines = ("-", "--", ":", "-.")
    for number, name in enumerate(names):
        first = next(e["widths_before"].get(name, e["widths_after"].get(name)) for e in history)
        widths, previous = [first], first
        for event in history:
            previous = event["widths_after"].get(name, previous)
            widths.append(previous)
        xs, ys = [0, *steps, end], [*widths, widths[-1]]
        style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": lines[number // 10 % len(lines)]}
        axes.step(xs, ys, where="post", label=f"{name} ({widths[-1]})", linewidth=1.8, **style)
    for step in steps:
        axes.axvline(step, color="0.85", linewidth=1, zorder=0)
    axes.set(xlabel="training step", ylabel="neurons", xlim=(0, end), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Width of every channel group", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    if names:
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
            fontsize=8,
            ncols=1 + len(names) // 18,
        )
    return figure
