"""Every optimizer of torch in a real fit: what grew is trained on, and the state has its shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning_split import Every
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from modules import loader, trainer, two_splits

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "ASGD": lambda p: optim.ASGD(p, 0.01),
    "Adadelta": optim.Adadelta,
    "Adafactor": lambda p: optim.Adafactor(p, 0.01),
    "Adagrad": lambda p: optim.Adagrad(p, 0.01),
    "Adagrad fused": lambda p: optim.Adagrad(p, 0.01, fused=True),
    "Adam amsgrad": lambda p: optim.Adam(p, 0.01, amsgrad=True),
    "Adam foreach": lambda p: optim.Adam(p, 0.01, foreach=True),
    "Adam fused": lambda p: optim.Adam(p, 0.01, fused=True, amsgrad=True),
    "Adam maximize": lambda p: optim.Adam(p, 0.01, maximize=True),
    "AdamW foreach": lambda p: optim.AdamW(p, 0.01, foreach=True, amsgrad=True),
    "AdamW fused": lambda p: optim.AdamW(p, 0.01, fused=True),
    "AdamW tensor rate": lambda p: optim.AdamW(p, torch.tensor(0.01), fused=True),
    "Adamax": lambda p: optim.Adamax(p, 0.01, foreach=True),
    "LBFGS": lambda p: optim.LBFGS(p, 0.1, max_iter=3, line_search_fn="strong_wolfe"),
    "Muon": lambda p: optim.Muon(p, 0.01),
    "NAdam": lambda p: optim.NAdam(p, 0.01),
    "RAdam": lambda p: optim.RAdam(p, 0.01, foreach=True),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p, 0.01),
    "SGD fused": lambda p: optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "SGD nesterov": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True),
    "SGD plain": lambda p: optim.SGD(p, 0.05),
}


class Net(pl.LightningModule):
    """Two matrices, because Muon takes nothing else."""

    def __init__(self, make: Callable[[Any], optim.Optimizer]) -> None:
        super().__init__()
        self.make = make
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Watch(pl.Callback):
    """Every batch moves every parameter, and every state fits its parameter."""

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.before = [p.detach().clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        for old, p in zip(self.before, module.parameters(), strict=True):
            assert not torch.equal(old, p)
        (optimizer,) = trainer.optimizers
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in module.parameters()}
        assert all(any(p is q for q in held) for p in optimizer.state)
        for p, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.ndim == p.ndim:
                    assert all(a in (b, 1) for a, b in zip(value.shape, p.shape, strict=True))


def _fit(path: Path, module: pl.LightningModule, *others: pl.Callback, **options: Any) -> Any:
    callback = two_splits(num_batches=1, confirm_batches=0, **options)
    t = trainer(path, callback, *others, max_epochs=3)
    t.fit(module, loader(32))
    assert [e["num_splits"] for e in callback.history] == [2, 2]
    return t


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_trains_what_grew(tmp_path: Path, name: str) -> None:
    """Twice in a run, with nothing but a Trainer around it."""
    module = Net(OPTIMIZERS[name])
    _fit(tmp_path, module, Watch())
    assert module.net[1].out_features == 8


@pytest.mark.parametrize("name", ["Adam fused", "Adafactor", "SGD nesterov", "LBFGS"])
def test_a_state_that_is_reset_starts_anew(tmp_path: Path, name: str) -> None:
    """Also while others keep theirs."""
    _fit(tmp_path, Net(OPTIMIZERS[name]), Watch(), optimizer_state="reset", lr_schedule="restart")


class Words(pl.LightningModule):
    """An embedding with sparse gradients, trained by SparseAdam beside another optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.embedding = nn.EmbeddingBag(10, 4, sparse=True)
        self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.embedding(batch[0])), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return optim.SparseAdam(list(self.embedding.parameters()), 0.01), optim.Adam(
            self.head.parameters(), 0.01
        )


def test_sparse_adam(tmp_path: Path) -> None:
    """The embedding stays as it is; what a dense optimizer trains grows."""
    module = Words()
    callback = two_splits(loss_fn=lambda m, b: m.loss(b), trigger=Every(1), num_batches=1, confirm_batches=0)
    data = TensorDataset(torch.randint(0, 10, (16, 3)), torch.arange(16) % 2)
    t = trainer(tmp_path, callback, max_epochs=3)
    t.fit(module, DataLoader(data, 8))
    assert [e["num_splits"] for e in callback.history] == [2, 2]
    sparse, dense = t.optimizers
    assert {id(p) for p in sparse.param_groups[0]["params"]} == {id(module.embedding.weight)}
    assert sparse.state[module.embedding.weight]["exp_avg"].shape == (10, 4)
    assert {id(p) for p in dense.param_groups[0]["params"]} == {id(p) for p in module.head.parameters()}
