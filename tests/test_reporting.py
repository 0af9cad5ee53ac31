"""What loggers get for a growth: scalars everywhere, histograms and a figure where they exist."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_split import Every, SplittingCallback, TopK
from lightning_split.reporting import widths_figure
from torch import Tensor, nn

from modules import Classifier, assert_same, csv_logger, loader, trainer, two_splits


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


class WithImages(CSVLogger):
    """A logger that takes images as W&B's does."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.taken: list[tuple[str, list[Any], int]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.taken.append((key, images, step))


def test_loggers_that_take_images_get_the_figure(tmp_path: Path) -> None:
    """As pixels, at the step of the growth."""
    logger = WithImages(tmp_path)
    _run(tmp_path, logger)
    assert [(key, step) for key, _, step in logger.taken] == [("split/widths", 3), ("split/widths", 6)]
    for _, (image,), _ in logger.taken:
        assert image.shape[2] == 3
        assert image.dtype == np.uint8
        assert 0 < (image < 128).mean() < 0.2  # dark lines and text on white


class Shown(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.5))
        self.example_input_array = torch.zeros(2, 1, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar])
def test_each_growth_is_shown_with_the_new_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bar: Any
) -> None:
    """Table and summary come whole through every progress bar, and leave no trace in the run."""
    if bar is RichProgressBar:
        pytest.importorskip("rich")

    def run(**options: Any) -> tuple[Shown, SplittingCallback]:
        pl.seed_everything(0, verbose=False)
        module = Shown()
        callback = two_splits(include=["net.0"], **options)
        bars = [] if bar is None else [bar()]
        options = {"enable_model_summary": True, "enable_progress_bar": bar is not None, "max_epochs": 2}
        trainer(tmp_path, callback, *bars, ModelSummary(max_depth=2), **options).fit(module, loader())
        return module, callback

    silent, _ = run(verbose=False)
    assert "Growth" not in capsys.readouterr().out
    module, callback = run(verbose=True)
    captured = capsys.readouterr()
    shown = captured.out.splitlines()
    assert "Growth 1 at epoch 1, step 3" in shown
    for line in str(callback.reports[0]).splitlines():
        assert any(line in found for found in shown)
    total = sum(p.numel() for p in module.parameters())
    width = module.net[0].out_channels
    assert width > 3
    assert any("net.0" in line and "Conv2d" in line and f"[2, {width}, 6, 6]" in line for line in shown)
    assert any(line.startswith(str(total)) and "Total params" in line for line in shown)
    assert_same(dict(module.state_dict()), dict(silent.state_dict()))
