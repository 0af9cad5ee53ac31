"""LightningModules and Trainers for the tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning_split import Every, SplittingCallback, TopK
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy


class Classifier(pl.LightningModule):
    """Conv, BatchNorm, ReLU, flatten, linear on 6x6 images of three classes."""

    def __init__(self, width: int = 3, optimizer: str = "adam") -> None:
        super().__init__()
        self.optimizer_name = optimizer
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(9 * width, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Validated(Classifier):
    """The same with a validation step."""

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def images(n: int = 48, seed: int = 0) -> TensorDataset:
    """Random images whose class is a function of the image."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    y = (x[:, 0, :3].sum((1, 2)) > 0).long() + (x[:, 0, 3:].abs().sum((1, 2)) > 14).long()
    return TensorDataset(x, y)


def loader(n: int = 48, batch: int = 16, **options: Any) -> DataLoader[Any]:
    """Training batches in fixed order, so that a resume sees the same data."""
    return DataLoader(images(n), batch, **options)


class ResumableLoader:
    """Batches in order, that nobody can ask for once more; on resume it goes on where it was.

    It has a length, because of what has none Lightning fetches a batch ahead, and loses it in a crash.
    """

    def __init__(self, data: Any, make: Callable[[Any], Any] = lambda batch: batch) -> None:
        self._data, self._make, self._place = data, make, 0

    def __len__(self) -> int:
        return len(self._data) // 16

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(DataLoader(self._data, 16)):
            if number >= self._place:
                self._place = (number + 1) % len(self)
                yield self._make(batch)

    def state_dict(self) -> dict[str, int]:
        return {"place": self._place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._place = state["place"]


def trainer(path: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet CPU Trainer."""
    defaults: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": path,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


class NoisyData(Dataset[Any]):
    """Augments with all three global generators."""

    def __init__(self, n: int = 32) -> None:
        self.data = images(n)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[i]
        return x + 0.1 * torch.randn_like(x) + 0.1 * np.random.rand() + 0.1 * random.random(), y


class Nasty(Classifier):
    """Everything that a careless probe would disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.3))
        self.accuracy = MulticlassAccuracy(3)
        self.mean = MeanMetric()
        self.seen: list[Tensor] = []
        self.by_class: dict[str, int] = {}
        self.steps = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 0.05 * torch.randn_like(batch[0]), batch[1]

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.mean.update(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_acc", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"mean": self.mean}, on_epoch=True, on_step=False)
        self.logger.log_metrics({"direct": float(loss.detach())}, step=self.global_step)
        self.seen.append(loss.detach())
        self.by_class[str(len(self.seen))] = self.steps
        self.steps += 1
        self.last = logits.detach()
        return {"loss": loss, "extra": logits}


def two_splits(**options: Any) -> SplittingCallback:
    """A callback that splits two neurons at the start of every epoch but the first."""
    defaults: dict[str, Any] = {
        "trigger": Every(1),
        "strategy": TopK(count=2),
        "num_batches": 2,
        "confirm_batches": 1,
        "verbose": False,
    }
    return SplittingCallback(**(defaults | options))


def widths(module: Classifier) -> tuple[int, int]:
    """Neurons of the two hidden layers."""
    return module.net[0].out_channels, module.net[5].out_features


def csv_logger(path: Path) -> CSVLogger:
    """A CSV logger with a fixed place."""
    return CSVLogger(path, name="csv", version="v")


def state_of(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Everything of a finished run that a test compares bit by bit."""
    return {
        "parameters": {n: p.detach().clone() for n, p in module.named_parameters()},
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
        "metrics": {k: v.clone() for k, v in trainer.callback_metrics.items()},
        "rng": torch.get_rng_state(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
    }


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Bitwise equality of nested states."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert a.shape == b.shape, where
        assert torch.equal(a, b) or (a.isnan().all() and b.isnan().all()), where
    else:
        assert a == b, where
