"""Copies that nobody trains (teachers, target networks) grow with what they are copies of."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning_split import trace
from lightning_split.followers import find_followers, led
from torch import Tensor, nn

from modules import Classifier, assert_same, loader, trainer, two_splits, widths


class Taught(Classifier):
    """A teacher that is the moving average of its student, brought up to date in one of two places."""

    def __init__(self, where: str = "hook") -> None:
        super().__init__()
        self.teacher = deepcopy(self.net).requires_grad_(False)
        self.where = where

    @torch.no_grad()
    def _follow(self) -> None:
        for mine, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            mine.mul_(0.9).add_(other, alpha=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.where == "step":
            self._follow()
        with torch.no_grad():
            wanted = self.teacher(batch[0]).softmax(1)
        outputs = self.net(batch[0])
        return F.cross_entropy(outputs, batch[1]) + F.cross_entropy(outputs, wanted)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.where == "hook":
            self._follow()


class Target(Classifier):
    """A target network that the optimizer holds too, replaced every few steps."""

    def __init__(self, own: bool = True) -> None:
        super().__init__()
        self.target, self.own = deepcopy(self.net), own

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step % 2 == 0:
            self.target.load_state_dict(self.net.state_dict())
        with torch.no_grad():
            best = self.target(batch[0]).max(1)[0]
        value = self.net(batch[0]).gather(1, batch[1][:, None])[:, 0]
        return F.smooth_l1_loss(value, batch[1] + 0.5 * best)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam((self.net if self.own else self).parameters(), 0.01)


class Bootstrap(Classifier):
    """Online encoder and predictor against a target encoder, whose outputs keep their number."""

    def __init__(self) -> None:
        super().__init__()
        self.target = deepcopy(self.net).requires_grad_(False)
        self.predictor = nn.Sequential(nn.ReLU(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.target(batch[0].flip(2))
        return F.mse_loss(self.predictor(self.net(batch[0])), wanted)

    def on_train_batch_end(self, *_: Any) -> None:
        for mine, other in zip(self.target.parameters(), self.net.parameters(), strict=True):
            mine.data.lerp_(other.data, 0.1)


MODULES = {
    "hook": lambda: Taught("hook"),
    "step": lambda: Taught("step"),
    "target": Target,
    "target in the optimizer": lambda: Target(own=False),
    "bootstrap": Bootstrap,
}


def _copy_of(module: Any) -> nn.Module:
    return module.teacher if isinstance(module, Taught) else module.target


@pytest.mark.parametrize("name", list(MODULES))
def test_copies_grow_with_their_originals(tmp_path: Path, name: str) -> None:
    """In any place that copies weights, in or outside of the optimizer; and a resume is exact."""

    def run(folder: Path, resume: Path | None = None) -> tuple[Any, Any]:
        pl.seed_everything(0 if resume is None else 9, verbose=False)
        module, callback = MODULES[name](), two_splits(num_batches=1)
        save = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        ema = EMAWeightAveraging(decay=0.9)
        t = trainer(folder, callback, ema, save, enable_checkpointing=True)
        t.fit(module, loader(), ckpt_path=resume)
        return module, callback

    module, callback = run(tmp_path)
    assert [e["num_splits"] for e in callback.history] == [2, 2, 2]
    shapes = [p.shape for p in module.net.parameters()]
    assert sum(widths(module)) > 11
    assert [p.shape for p in _copy_of(module).parameters()] == shapes
    assert not any(name.startswith(("teacher", "target")) for name in callback.history[-1]["widths_after"])
    again, other = run(tmp_path / "on", tmp_path / "epoch=1.ckpt")
    assert_same(other.history, callback.history)
    assert_same(dict(again.state_dict()), dict(module.state_dict()))


def test_a_copy_computes_what_it_computed(double: None) -> None:
    """It grows by offspring that equal their parents; a group that leaves the original is refused."""
    from lightning_split import split_neurons
    from lightning_split.surgery import Split

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
            self.teacher = deepcopy(self.net)
            self.after = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.net(x)) + self.after(self.teacher(x).detach())

    model, x = Pair(), torch.randn(6, 5)
    followers = find_followers(model, lambda m: m is not model.teacher)
    assert followers == {"teacher": "net"}
    arch = led(trace(model, x), followers)
    assert list(arch.widths) == ["net.0"]
    reasons = {u.name: u.reason for u in arch.unsplittable}
    assert "is not trained" in reasons["teacher.0"]
    before = model.teacher(x)
    moves = 0.3 * torch.randn(2, arch.group("net.0").dim)
    split_neurons(model, [Split("net.0", 1, (-0.5, 1.5), moves)], arch=arch)
    assert model.net[0].out_features == model.teacher[0].out_features == 5
    assert not torch.equal(model.net[0].weight, model.teacher[0].weight)
    torch.testing.assert_close(model.teacher(x), before, rtol=0, atol=1e-14)


def test_towers_that_are_trained_are_no_copies() -> None:
    """Nor are parts that differ in a single bit, nor what has no hidden neurons."""
    part = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model = nn.ModuleDict({"one": part, "two": deepcopy(part), "layer": part[0], "other": deepcopy(part[0])})
    assert find_followers(model, lambda m: True) == {}
    assert find_followers(model, lambda m: m is not model["two"]) == {"two": "one"}
    with torch.no_grad():
        model["two"][2].bias[0] += 1e-6
    assert find_followers(model, lambda m: m is not model["two"]) == {}
