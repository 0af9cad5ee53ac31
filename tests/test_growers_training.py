"""Every grower and step size inside real Trainers: optimizer, checkpoints, resume, command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_split import (
    Every,
    Folding,
    GradMax,
    LineSearch,
    Mixed,
    Net2Net,
    NewNeurons,
    RandomSplit,
    Relative,
    SplittingCallback,
    SteepestSplitting,
    load_grown,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from modules import Classifier, assert_same, images, loader, trainer, two_splits, widths

GROWERS: dict[str, Any] = {
    "random": RandomSplit,
    "net2net": Net2Net,
    "new": lambda: NewNeurons(draws=2),
    "gradmax": GradMax,
    "folding": lambda: Folding(clusters=2, samples=16),
    "mixed": lambda: Mixed([SteepestSplitting(), NewNeurons(draws=1), GradMax(), Folding(2, 16)]),
}


def _fit(folder: Path, callback: SplittingCallback, *others: pl.Callback, **options: Any) -> Classifier:
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    trainer(folder, callback, *others, **options).fit(module, loader())
    return module


@pytest.mark.parametrize("name", GROWERS)
def test_every_grower_grows_a_training_network(tmp_path: Path, name: str) -> None:
    """Two growths; the new neurons are in the optimizer and train; the checkpoint loads into a seed."""
    saved = ModelCheckpoint(tmp_path, save_last=True)
    callback = two_splits(grower=GROWERS[name](), trigger=Every(1), max_growths=2, num_batches=3)
    module = _fit(tmp_path, callback, saved, max_epochs=4, enable_checkpointing=True)
    grown = sum(e["num_splits"] for e in callback.history)
    assert grown == sum(widths(module)) - 3 - 8 > 0
    assert callback.lineage.widths == dict(callback.history[-1]["widths_after"])
    optimizer: Any = module.trainer.optimizers[0]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(map(id, module.parameters()))
    again = load_grown(Classifier, tmp_path / "last.ckpt", map_location="cpu")
    assert_same(dict(again.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize(
    ("grower", "reason"),
    [
        (Folding(), "Folding left 'net.0' alone"),
        (GradMax(), "GradMax left 'net.0' alone: its neurons send something"),
        (Mixed([GradMax(), Folding()]), "Folding left 'net.1' alone|Folding left 'net.0' alone"),
    ],
)
def test_a_grower_that_does_not_apply_is_refused_on_the_first_batch(
    tmp_path: Path, grower: Any, reason: str
) -> None:
    """Not when the first growth is due; with a member that applies Mixed is let through."""

    class Sigmoid(Classifier):
        def __init__(self) -> None:
            super().__init__()
            parts = (nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
            self.net = nn.Sequential(*parts)

    module = Sigmoid()
    with pytest.raises(MisconfigurationException, match=reason):
        trainer(tmp_path, two_splits(grower=grower, trigger=Every(3))).fit(module, loader())
    assert module.trainer.global_step == 0
    willing = two_splits(grower=Mixed([grower, NewNeurons(draws=1)]), trigger=Every(3))
    t = trainer(tmp_path, willing, fast_dev_run=1)
    t.fit(Sigmoid(), loader())
    assert t.global_step == 1


def test_moments_of_new_neurons_start_at_zero_and_the_others_are_kept(tmp_path: Path) -> None:
    """Adam: rows and columns of the new neuron are zero, all others are what they were."""
    states: list[dict[str, Tensor]] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            optimizer = trainer.optimizers[0]
            states.append(
                {
                    f"{name} {key}": optimizer.state[p][key].clone()
                    for name, p in module.named_parameters()
                    for key in ("exp_avg", "exp_avg_sq")
                    if p in optimizer.state
                }
            )

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.on_train_batch_start(trainer, module, None, 0)

    callback = two_splits(grower=NewNeurons(draws=1), max_growths=1, include=["net.5"], trigger=Every(1))
    _fit(tmp_path, callback, Watch(), max_epochs=2)
    (growth,) = callback.history
    new = [i + 1 + k for k, (_, i, _) in enumerate(sorted(growth["splits"], key=lambda s: s[1]))]
    before, after = states[3], states[4]
    for name, old in before.items():
        grown = after[name]
        axis = 0 if "net.5" in name else 1 if "net.7.weight" in name else None
        if axis is None:
            assert torch.equal(grown, old)
            continue
        rows = grown.movedim(axis, 0)
        assert not rows[new].any()
        kept = [i for i in range(len(rows)) if i not in new]
        assert torch.equal(rows[kept], old.movedim(axis, 0))
    assert any(bool(state.any()) for state in before.values())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_resuming_with_new_neurons_is_bit_identical(tmp_path: Path) -> None:
    """From after the first growth: the same second growth and the same bits as the uninterrupted run."""

    def run(folder: str, resume: Path | None = None) -> tuple[Classifier, SplittingCallback, pl.Trainer]:
        pl.seed_everything(0 if resume is None else 9, verbose=False)
        grower = Mixed([SteepestSplitting(), NewNeurons(draws=1), GradMax()])
        module = Classifier()
        callback = two_splits(grower=grower, trigger=Every(2), step_size="line_search")
        saved = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        t = trainer(tmp_path, callback, saved, max_epochs=6, enable_checkpointing=True)
        t.fit(module, DataLoader(images(), 16), ckpt_path=resume)
        return module, callback, t

    module, callback, t = run("whole")
    assert [e["epoch"] for e in callback.history] == [2, 4]
    assert any(0.0 in weights for e in callback.history for _, _, weights in e["splits"])
    again, other, t2 = run("resumed", tmp_path / "whole" / "epoch=2.ckpt")
    assert_same(other.history, callback.history)
    assert_same(other.lineage.to_dict(), callback.lineage.to_dict())
    assert_same(dict(again.state_dict()), dict(module.state_dict()))
    assert_same(t2.optimizers[0].state_dict(), t.optimizers[0].state_dict())


@pytest.mark.parametrize("step_size", [0.0, Relative(0.1), "line_search"])
def test_every_step_size_grows_a_training_network(tmp_path: Path, step_size: Any) -> None:
    """Zero leaves the loss alone, a line search never raises it on its batches."""
    grower = Net2Net() if step_size == 0 else SteepestSplitting()  # for which there is nothing to gain at 0
    callback = two_splits(grower=grower, step_size=step_size, trigger=Every(1), max_growths=2)
    _fit(tmp_path, callback)
    for report in callback.reports:
        if step_size == 0:
            assert len(report.splits) == 2
            assert report.loss_after == pytest.approx(report.loss_before, rel=1e-6)
        if step_size == "line_search":
            assert report.loss_after < report.loss_before or not report.splits


@pytest.mark.filterwarnings(r"ignore:\s*By default only one Jsonargparse:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:\s*.*was deprecated in v4:DeprecationWarning")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.05", 0.05),
        ("line_search", LineSearch()),
        ("{class_path: lightning_split.Relative, init_args: {fraction: 0.2}}", Relative(0.2)),
        (
            "{class_path: lightning_split.LineSearch, init_args: {start: 0.5, max_passes: 3}}",
            LineSearch(start=0.5, max_passes=3),
        ),
    ],
)
def test_the_command_line_knows_step_sizes_and_growers(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: Any
) -> None:
    """A number, a name or a class; growers nest."""
    yaml = pytest.importorskip("yaml")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    members = [
        {"class_path": "lightning_split.SteepestSplitting", "init_args": {"max_offspring": 3}},
        {"class_path": "lightning_split.NewNeurons", "init_args": {"draws": 2}},
        {"class_path": "lightning_split.GradMax"},
    ]
    callback = {
        "class_path": "lightning_split.SplittingCallback",
        "init_args": {
            "step_size": yaml.safe_load(text),
            "grower": {"class_path": "lightning_split.Mixed", "init_args": {"growers": members}},
        },
    }
    options = {"logger": False, "accelerator": "cpu", "enable_checkpointing": False, "callbacks": [callback]}
    cli = LightningCLI(
        Classifier, args={"trainer": options}, run=False, save_config_callback=None, seed_everything_default=0
    )
    (made,) = [c for c in cli.trainer.callbacks if isinstance(c, SplittingCallback)]
    assert made.step_size == (expected if not isinstance(expected, float) else made.step_size)
    if isinstance(expected, float):
        assert made.step_size.length == expected
    assert made.grower.growers == (SteepestSplitting(3), NewNeurons(2), GradMax())
