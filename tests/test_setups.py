"""Set-ups as users have them: identical until the first growth, grown, and identical after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning_split import Every, Plateau
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from modules import Classifier, Validated, assert_same, images, loader, state_of, trainer, two_splits, widths


class InPlace(Classifier):
    """Compiled without a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager")


class OwnStep(Validated):
    """A warm-up in optimizer_step, gradients that are zeroed in place, clipping of its own, plateau rates."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:  # type: ignore[override]
        if self.global_step < 4:
            for group in optimizer.param_groups:
                group["lr"] = 0.0025 * (self.global_step + 1)
        optimizer.step(closure=closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, 0.3, "norm")

    def configure_optimizers(self) -> Any:
        weights = [p for n, p in self.named_parameters() if n.endswith("weight")]
        biases = [p for n, p in self.named_parameters() if n.endswith("bias")]
        groups = [{"params": weights, "name": "weights"}, {"params": biases, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, 0.01)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class ByHand(Classifier):
    """Two optimizers, the steps taken by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = _loss(self, batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net[:5].parameters()), torch.optim.SGD(self.net[5:].parameters(), 0.1)


def _loss(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


def _scaled() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}


SETUPS: dict[str, tuple[type[Classifier], Callable[[], dict[str, Any]]]] = {
    "plain": (Validated, dict),
    "own step": (OwnStep, lambda: {"num_sanity_val_steps": -1}),
    "by hand": (ByHand, dict),
    "scaled": (Classifier, lambda: _scaled() | {"gradient_clip_val": 0.1}),
    "bf16-true": (Classifier, lambda: {"precision": "bf16-true", "accumulate_grad_batches": 2}),
    "compiled": (InPlace, lambda: {"precision": "bf16-mixed"}),
    "average": (Validated, lambda: {"callbacks": [EMAWeightAveraging(decay=0.9)]}),
}


def _run(
    name: str, folder: Path, callback: pl.Callback | None, resume: Path | None = None
) -> tuple[Classifier, pl.Trainer]:
    pl.seed_everything(0 if resume is None else 9, verbose=False)
    make, options = SETUPS[name]
    module, given = make(), options()
    save = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    callbacks = [*given.pop("callbacks", []), *([callback] if callback else []), save]
    t = trainer(folder, *callbacks, enable_checkpointing=True, **given)
    t.fit(module, loader(), *([loader(16)] if isinstance(module, Validated) else []), ckpt_path=resume)
    return module, t


@pytest.mark.filterwarnings("ignore:Module is in eval mode")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "compiled")) for n in SETUPS]
)
def test_nothing_changes_until_it_grows_and_resumes_are_equal(tmp_path: Path, name: str) -> None:
    """Bit for bit: parameters, buffers, metrics, random state, and all states of the optimizers."""
    manual = {"loss_fn": _loss} if name == "by hand" else {}
    bare, t = _run(name, tmp_path / "bare", None)
    expected = state_of(t, bare)
    idle, t = _run(name, tmp_path / "idle", two_splits(trigger=Every(1000), **manual))
    assert_same(state_of(t, idle), expected)

    callback = two_splits(trigger=Every(2, "epoch"), **manual)
    grown, t = _run(name, tmp_path / "whole", callback)
    assert [(e["epoch"], e["num_splits"]) for e in callback.history] == [(2, 2)]
    for epoch in (1, 2):
        again = two_splits(trigger=Every(2, "epoch"), **manual)
        other, t2 = _run(name, tmp_path / f"from{epoch}", again, tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_same(again.history, callback.history)
        assert_same(dict(other.state_dict()), dict(grown.state_dict()))
        for mine, theirs in zip(t2.optimizers, t.optimizers, strict=True):
            assert_same(mine.state_dict(), theirs.state_dict())


def test_batch_size_scaler(tmp_path: Path) -> None:
    """The Tuner's trials do not grow the network; the run after them does."""

    class Sized(Classifier):
        batch_size = 4

        def train_dataloader(self) -> Any:
            return loader(48, self.batch_size)

    module, callback = Sized(), two_splits(trigger=Every(2, "step"), max_growths=1)
    t = trainer(tmp_path, callback, max_epochs=2)
    Tuner(t).scale_batch_size(module, mode="power", steps_per_trial=3, max_trials=2, init_val=4)
    assert module.batch_size == 8
    assert widths(module) == (3, 8)
    t.fit(module)
    assert [e["step"] for e in callback.history] == [2]


class Endless(IterableDataset[Any]):
    """A stream without end, as for max_steps alone."""

    def __iter__(self) -> Any:
        data = images()
        while True:
            yield from (data[i] for i in range(len(data)))


def test_a_run_of_one_endless_epoch(tmp_path: Path) -> None:
    """The plateau of the steps' loss is all there is to go by."""

    class Stepwise(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = _loss(self, batch)
            self.log("train_loss", loss, on_step=True)
            return loss

    trigger = Plateau("train_loss", interval="step", patience=4, min_delta=9.0, smoothing=0.5)
    callback, module = two_splits(trigger=trigger), Stepwise()
    t = trainer(tmp_path, callback, max_epochs=-1, max_steps=12)
    t.fit(module, DataLoader(Endless(), 16))
    # the first value is the best; so the fifth step is the fourth in a row without improvement
    assert [e["step"] for e in callback.history] == [5, 10]
    splits = [e["num_splits"] for e in callback.history]  # as many of two as gain something
    assert sum(widths(module)) == 11 + sum(splits) > 12


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    """An error in the middle of an epoch leaves a network that its Trainer fits further."""

    class Fragile(Classifier):
        broken = False

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 5 and not self.broken:
                self.broken = True
                raise ConnectionError("the file server is away")

    callback, module = two_splits(), Fragile()
    t = trainer(tmp_path, callback)
    with pytest.raises(ConnectionError):
        t.fit(module, loader())
    assert sum(widths(module)) == 13
    t.fit(module, loader())
    assert sum(widths(module)) == 11 + 2 * len(callback.history)
    assert [e["epoch"] for e in callback.history] == [1, 2, 3]
