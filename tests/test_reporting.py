"""What loggers get for a growth: scalars everywhere, histograms and a figure where they exist."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_split import Every, SplittingCallback, TopK
from lightning_split.reporting import widths_figure

from modules import Classifier, csv_logger, loader, trainer


def _run(tmp_path: Path, logger: object) -> SplittingCallback:
    pl.seed_everything(0, verbose=False)
    callback = SplittingCallback(
        trigger=Every(1), strategy=TopK(count=2), num_batches=2, confirm_batches=1, verbose=False
    )
    trainer(tmp_path, callback, logger=logger, max_epochs=3).fit(Classifier(), loader())
    return callback


def test_tensorboard_gets_the_numbers_of_the_reports(tmp_path: Path) -> None:
    """Scalars equal the report's figures at the step of the growth; histograms hold every neuron."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = _run(tmp_path, TensorBoardLogger(tmp_path, name="tb", version="v"))
    events = EventAccumulator(str(tmp_path / "tb" / "v"), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    steps = [event["step"] for event in callback.history]
    assert steps == [3, 6]
    for tag, values in {
        "split/gain_confirmed": [r.predicted_gain for r in callback.reports],
        "split/gain_predicted": [r.estimated_gain for r in callback.reports],
        "split/gain_measured": [r.loss_before - r.loss_after for r in callback.reports],
        "split/loss_before": [r.loss_before for r in callback.reports],
        "split/loss_after": [r.loss_after for r in callback.reports],
        "split/params": [r.cost_after.params for r in callback.reports],
        "split/macs": [r.cost_after.macs for r in callback.reports],
        "split/width/net.0": [r.widths_after["net.0"] for r in callback.reports],
        "split/num_splits": [2, 2],
    }.items():
        found = events.Scalars(tag)
        assert [e.step for e in found] == steps
        assert [e.value for e in found] == pytest.approx(values, rel=1e-5, abs=1e-7)
    for number, report in enumerate(callback.reports):
        for name, width in report.widths_before.items():
            histogram = events.Histograms(f"split/index_min/{name}")[number].histogram_value
            assert histogram.num == width
            # TensorBoard keeps buckets, about a tenth wide
            smallest = float(report.eigenpairs[name].values[:, 0].min())
            assert histogram.min == pytest.approx(smallest, rel=0.15)
    assert len(events.Images("split/widths")) == 2


def test_csv_gets_the_scalars_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """A logger without figures gets the scalars, next to what training logs."""
    callback = _run(tmp_path, csv_logger(tmp_path))
    with (tmp_path / "csv" / "v" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split/params"]]
    assert [int(float(row["split/params"])) for row in rows] == [e["params"] for e in callback.history]
    assert [int(row["step"]) for row in rows] == [3, 6]


def test_the_figure_draws_each_group_as_stairs() -> None:
    """One line per group through the widths before and after each growth, growths marked."""
    history = [
        {"step": 10, "widths_before": {"a": 2, "b": 3}, "widths_after": {"a": 4, "b": 3}},
        {"step": 30, "widths_before": {"a": 4, "b": 3}, "widths_after": {"a": 4, "b": 5}},
    ]
    (axes,) = widths_figure(history, now=30).axes
    stairs = {line.get_label(): line.get_xydata().tolist() for line in axes.lines[:2]}
    assert stairs == {
        "a (4)": [[0, 2], [10, 4], [30, 4], [32, 4]],
        "b (5)": [[0, 3], [10, 3], [30, 5], [32, 5]],
    }
    assert [line.get_xdata()[0] for line in axes.lines[2:]] == [10, 30]
