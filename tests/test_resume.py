"""Crash and resume: from every checkpoint of a run the same growths and the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning_split import Every, Plateau, SplittingCallback, batches
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from modules import Classifier, ResumableLoader, assert_same, images, trainer, two_splits

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Noted(Classifier):
    """Logs by step and by epoch, and validates twice in an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("mean_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class SaveEverywhere(pl.Callback):
    """A checkpoint after each optimizer step, validation and epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, t: pl.Trainer, where: str) -> None:
        t.save_checkpoint(self.folder / f"{len(list(self.folder.glob('*.ckpt'))):02}-{where}.ckpt")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches or (
            trainer.accumulate_grad_batches == 1
        ):  # Lightning does not save the gradients of an accumulation
            self._save(trainer, "batch")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self._save(trainer, "epoch")


def _run(
    folder: Path, trigger: Any, *, resume: Path | None = None, order: str = "save grow", **options: Any
) -> tuple[Noted, SplittingCallback, pl.Trainer]:
    """One run; the order is that of the callbacks. A fresh one saves, a resumed one does not."""
    pl.seed_everything(0 if resume is None else 9, verbose=False)
    module, callback = Noted(), two_splits(trigger=trigger)
    make = {
        "save": lambda: SaveEverywhere(folder),
        "grow": lambda: callback,
        "ema": lambda: EMAWeightAveraging(decay=0.9),
    }
    callbacks = [make[name]() for name in order.split() if name != "save" or resume is None]
    t = trainer(folder, *callbacks, num_sanity_val_steps=0, **options)
    # the same batch always, because Lightning starts a loader anew on resume
    same = DataLoader(Subset(images(), list(range(16)) * 4), 16)
    t.fit(module, same, same, ckpt_path=resume)
    return module, callback, t


def _assert_resumes(
    folder: Path, trigger: str, which: slice = slice(None), epochs: int = 5, **options: Any
) -> list[dict[str, Any]]:
    """Resume from all or some checkpoints of a run, but for its last epoch; its history."""
    (folder / "whole").mkdir()
    options["max_epochs"] = epochs
    module, callback, t = _run(folder / "whole", TRIGGERS[trigger](), **options)
    saved = sorted((folder / "whole").glob("*.ckpt"))
    saved = saved[: len(saved) - len(saved) // epochs]
    if trigger == "validations":  # Lightning skips the validation that was due after a saved batch
        saved = [a for a, b in pairwise(saved) if "validation" not in b.stem]
    assert len(saved) >= 2 * (epochs - 1)
    for path in saved[which]:
        again, other, t2 = _run(folder / path.stem, TRIGGERS[trigger](), resume=path, **options)
        assert_same(other.history, callback.history, path.stem)
        assert_same(other.lineage.to_dict(), callback.lineage.to_dict())
        assert_same(other.trigger.state_dict(), callback.trigger.state_dict(), path.stem)
        assert_same(dict(again.state_dict()), dict(module.state_dict()), path.stem)
        assert_same(t2.optimizers[0].state_dict(), t.optimizers[0].state_dict(), path.stem)
    return callback.history


class Remembering(Plateau):
    """Keeps in its state all that it was shown."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._values: list[float | None] = []

    def observe(self, value: float | None, *, epoch: int, step: int) -> None:
        self._values = [*self._values, value, epoch, step]
        super().observe(value, epoch=epoch, step=step)


TRIGGERS: dict[str, Any] = {
    "epochs": lambda: Every(2),
    "steps": lambda: Every(3, "step"),
    "means": lambda: Remembering("mean_loss", patience=1, min_delta=9.0),
    "both": lambda: Remembering("train_loss", patience=1, min_delta=9.0),
    "by step": lambda: Remembering("train_loss", interval="step", patience=2, min_delta=0.1, smoothing=0.5),
    "validations": lambda: Remembering("val_loss", interval="step", patience=1, min_delta=9.0),
}


@pytest.mark.parametrize("trigger", ["means", "by step"])
def test_resuming_in_the_middle_of_an_epoch(tmp_path: Path, trigger: str) -> None:
    """From the batches of epoch 1: the trigger sees the mean of the whole epoch, to the last bit."""
    assert _assert_resumes(tmp_path, trigger, slice(5, 8), epochs=3, limit_train_batches=3)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "accumulate"), [("save grow", 1), ("grow save", 2)])
@pytest.mark.parametrize("trigger", list(TRIGGERS))
def test_resuming_from_every_checkpoint(tmp_path: Path, trigger: str, order: str, accumulate: int) -> None:
    """After each step, validation and epoch: history, lineage, trigger, weights and moments are equal."""
    history = _assert_resumes(tmp_path, trigger, order=order, accumulate_grad_batches=accumulate)
    assert len(history) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("order", ["grow ema save", "ema grow save"])
@pytest.mark.parametrize("trigger", ["steps", "means"])
def test_resuming_with_an_average_from_every_checkpoint(tmp_path: Path, trigger: str, order: str) -> None:
    """The same with a moving average of the weights, before or after the callback."""
    assert len(_assert_resumes(tmp_path, trigger, order=order)) >= 2


# data that cannot be asked for once more ------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """The same images in every epoch; its length is not known."""

    def __iter__(self) -> Iterator[Any]:
        data = images(80)
        return (data[i] for i in range(len(data)))


def _stream(folder: Path, resume: Path | None = None, **options: Any) -> tuple[Classifier, SplittingCallback]:
    pl.seed_everything(0 if resume is None else 9, verbose=False)
    module = Classifier()
    given = {"trigger": Every(5, "step"), "num_batches": 2, "confirm_batches": 1, "max_growths": 3}
    callback = two_splits(**(given | options.pop("callback", {})))
    callbacks = [callback] if resume else [callback, SaveEverywhere(folder)]
    t = trainer(folder, *callbacks, max_epochs=4)
    t.fit(
        module,
        options["data"] if "data" in options else ResumableLoader(images(80), **options),
        ckpt_path=resume,
    )
    return module, callback


@pytest.mark.parametrize("which", [slice(3, 8), pytest.param(slice(None), marks=pytest.mark.slow)])
def test_the_last_batches_survive_a_crash(tmp_path: Path, which: slice) -> None:
    """A stream is measured by what went by; a resumed run measures on the same batches."""
    module, callback = _stream(tmp_path)
    assert [e["step"] for e in callback.history] == [5, 10, 15]
    saved = sorted(tmp_path.glob("*-batch.ckpt"))
    assert len(saved) == 20
    for path in saved[which]:
        state = torch.load(path, weights_only=True)["callbacks"][callback.state_key]["batches"]
        assert len(state["recent"][0]["batches"] if state["recent"] else []) <= 3
        again, other = _stream(tmp_path / path.stem, path)
        assert_same(other.history, callback.history, path.stem)
        assert_same(dict(again.state_dict()), dict(module.state_dict()), path.stem)
    assert state["recent"] is None or which != slice(None)  # after the last growth nothing is kept


class Pair(NamedTuple):
    """A batch of a class of one's own."""

    x: Tensor
    y: Tensor


def test_what_cannot_be_saved_is_told_at_the_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects and large batches are not put in a checkpoint; the run that misses them says so, once."""
    _, callback = _stream(tmp_path / "objects", make=lambda batch: Pair(*batch))
    path = next((tmp_path / "objects").glob("09-*.ckpt"))
    with pytest.warns(UserWarning, match="because they hold more than tensors.*until 3 batches have gone"):
        _, other = _stream(tmp_path / "objects" / "on", path, make=lambda batch: Pair(*batch))
    assert [e["step"] for e in callback.history[:2]] == [5, 10]
    assert [e["step"] for e in other.history[:2]] == [5, 12]  # only then three went by
    monkeypatch.setattr(batches, "MOST_BYTES", 3 * 16 * (36 * 4 + 8) - 1)
    _stream(tmp_path / "large")
    path = next((tmp_path / "large").glob("09-*.ckpt"))
    with pytest.warns(UserWarning, match="because they take 0 MiB, more than 0; a growth waits"):
        _stream(tmp_path / "large" / "on", path)


def test_a_short_epoch_is_enough_to_measure_with(tmp_path: Path) -> None:
    """Where an epoch of a stream has fewer batches than asked for, a growth waits for no more than it has."""
    options = {"trigger": Every(1), "num_batches": 8, "confirm_batches": 64}
    module, callback = _stream(tmp_path, callback=options, data=DataLoader(Stream(), 16))
    assert [(e["epoch"], e["num_splits"]) for e in callback.history] == [(1, 2), (2, 2), (3, 2)]
    path = tmp_path / "11-epoch.ckpt"
    again, other = _stream(tmp_path / "on", path, callback=options, data=DataLoader(Stream(), 16))
    assert_same(other.history, callback.history)
    assert_same(dict(again.state_dict()), dict(module.state_dict()))
