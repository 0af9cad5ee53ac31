"""SplittingCallback in the company it keeps: DDP, other callbacks, loaders, loggers, the command line."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_split import Every, Lanczos, Plateau, SplittingCallback, SteepestSplitting, TopK
from torch import Tensor, nn
from torch.utils.data import DataLoader

from modules import (
    Classifier,
    Validated,
    assert_same,
    csv_logger,
    images,
    loader,
    trainer,
    two_splits,
    widths,
)


def _assert_all_trained(t: pl.Trainer, module: nn.Module) -> None:
    held = {id(p) for o in t.optimizers for group in o.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}


# other callbacks ----------------------------------------------------------------------------------


def _fit(path: Path, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    t = trainer(path, *callbacks, **options)
    t.fit(module, loader())
    _assert_all_trained(t, module)
    return t


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging(tmp_path: Path, first: bool) -> None:
    """The average grows with the network, in either order, and ends up in it; nothing grows after that."""
    taken: list[list[Tensor]] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 5:  # the extra epoch, for the statistics of BatchNorm alone
                taken.append([p.detach().clone() for p in module.parameters()])

    callback, module = two_splits(), Classifier(optimizer="sgd")
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    order = (swa, callback) if first else (callback, swa)
    _fit(tmp_path, module, *order, Watch(), max_epochs=5)
    assert [e["epoch"] for e in callback.history] == [1, 2, 3, 4]
    assert sum(widths(module)) == 11 + 2 * 4
    assert swa._average_model is not None
    for mine, average in zip(taken[0], swa._average_model.parameters(), strict=True):
        torch.testing.assert_close(mine, average.detach(), rtol=0, atol=0)


def test_stopping_monitoring_and_accumulating_callbacks(tmp_path: Path) -> None:
    """EarlyStopping, LearningRateMonitor and GradientAccumulationScheduler do their work; nothing else."""
    callback, module = two_splits(), Classifier()
    stop = EarlyStopping("train_loss", patience=1, min_delta=10.0)
    schedule = GradientAccumulationScheduler({0: 1, 1: 2})
    logger = csv_logger(tmp_path)
    t = _fit(
        tmp_path,
        module,
        stop,
        callback,
        LearningRateMonitor("step"),
        schedule,
        logger=logger,
        gradient_clip_val=0.5,
        max_epochs=6,
    )
    assert t.current_epoch == 2
    assert t.global_step == 3 + 2  # 3 batches: one step each, then every two and at the end
    assert [(e["epoch"], e["step"]) for e in callback.history] == [(1, 3)]
    with (tmp_path / "csv" / "v" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(r["lr-Adam"]) for r in rows if r["lr-Adam"]]
    assert len(rates) == 6
    assert sorted(rates, reverse=True) == rates  # the cosine schedule goes on falling
    assert [int(r["step"]) for r in rows if r["split/num_splits"]] == [3]


class Tuned(Classifier):
    """A backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:5], self.net[5:]
        del self.net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_backbone_finetuning(tmp_path: Path) -> None:
    """Frozen layers wait until they thaw, then they grow; the group added later stays; resuming is exact."""

    frozen: list[bool] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            frozen.append(not module.backbone[0].weight.requires_grad)

    def run(folder: Path, resume: str | None = None) -> tuple[Tuned, SplittingCallback, pl.Trainer]:
        pl.seed_everything(0 if resume is None else 9, verbose=False)
        module, callback = Tuned(), two_splits(strategy=TopK(fraction=0.4))
        tune = BackboneFinetuning(2, train_bn=False, verbose=False)
        save = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        t = trainer(folder, tune, callback, save, Watch(), enable_checkpointing=True)
        t.fit(module, loader(), ckpt_path=resume)
        return module, callback, t

    module, callback, t = run(tmp_path)
    assert frozen == [True, True, False, False]
    # BatchNorm was trained from the start, the convolution joined later
    assert [len(g["params"]) for g in t.optimizers[0].param_groups] == [6, 2]
    _assert_all_trained(t, module)
    assert [list(e["widths_before"]) for e in callback.history] == [
        ["head.5"],
        *2 * [["backbone.0", "head.5"]],
    ]
    assert module.backbone[0].out_channels > 3
    for epoch in (0, 1):  # resumed later than it thawed, Lightning itself leaves the backbone frozen
        again, other, _ = run(tmp_path / f"from{epoch}", str(tmp_path / f"epoch={epoch}.ckpt"))
        assert_same(other.history, callback.history)
        assert_same(dict(again.state_dict()), dict(module.state_dict()), f"from {epoch}")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("first", [True, False])
def test_resuming_weight_averaging(tmp_path: Path, first: bool) -> None:
    """With SWA in either order, a run resumed from any epoch is bit-equal to the uninterrupted one."""

    def run(folder: Path, resume: str | None = None) -> tuple[Classifier, SplittingCallback]:
        pl.seed_everything(0 if resume is None else 9, verbose=False)
        module, callback = Classifier(optimizer="sgd"), two_splits()
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
        save = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        order = (swa, callback) if first else (callback, swa)
        t = trainer(folder, *order, save, enable_checkpointing=True)
        t.fit(module, loader(), ckpt_path=resume)
        return module, callback

    module, callback = run(tmp_path)
    for epoch in (0, 2):
        again, other = run(tmp_path / f"from{epoch}", str(tmp_path / f"epoch={epoch}.ckpt"))
        assert_same(other.history, callback.history)
        assert_same(dict(again.state_dict()), dict(module.state_dict()), f"from {epoch}")


def test_learning_rate_finder(tmp_path: Path) -> None:
    """Trial runs do not grow the network; the run after them does."""

    class Tunable(Classifier):
        lr = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), self.lr)

    module, callback = Tunable(), two_splits(trigger=Every(4, "step"))
    t = trainer(tmp_path, callback)
    Tuner(t).lr_find(module, loader(), num_training=8)
    assert widths(module) == (3, 8)
    t.fit(module, loader())
    assert [e["step"] for e in callback.history] == [4, 8]
    assert sum(widths(module)) == 11 + 4


# modules of all sorts -----------------------------------------------------------------------------


class Adversaries(pl.LightningModule):
    """Two networks, two optimizers, steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one = nn.Sequential(nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3))
        self.two = nn.Sequential(nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3))

    def loss(self, net: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0].flatten(1)), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for net, optimizer in zip((self.one, self.two), self.held, strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.loss(net, batch))
            optimizer.step()

    def on_fit_start(self) -> None:
        self.held = self.optimizers()  # kept over all growths

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.one.parameters(), 0.01), torch.optim.SGD(self.two.parameters(), 0.1)


def test_two_optimizers_stepped_by_hand(tmp_path: Path) -> None:
    """loss_fn says which network grows; the optimizers that the module keeps go on training it."""
    module = Adversaries()
    callback = two_splits(loss_fn=lambda m, batch: m.loss(m.one, batch))
    before: dict[str, Tensor] = {}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            before.update({n: p.detach().clone() for n, p in module.named_parameters()})

    t = _fit(tmp_path, module, callback, Watch())
    assert (module.one[0].out_features, module.two[0].out_features) == (10, 4)
    assert [e["step"] for e in callback.history] == [3, 6, 9]
    assert t.global_step == 2 * 12
    for name, p in module.named_parameters():  # the last batch moved everything
        assert not torch.equal(p, before[name]), name


def _dicts(batch: Any) -> dict[str, Tensor]:
    return {"image": torch.stack([x for x, _ in batch]), "label": torch.stack([y for _, y in batch])}


class OtherIndexName(Classifier):
    def training_step(self, batch: Any, i: int) -> Tensor:  # type: ignore[override]
        assert isinstance(i, int)
        return super().training_step(batch, i)


class NoIndex(Classifier):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


class DictReturn(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:  # type: ignore[override]
        return {"loss": super().training_step(batch, batch_idx), "extra": [1, "a"]}


class DictBatches(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["image"], batch["label"]), batch_idx)


class PairedBatches(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(self.net(x), y) for x, y in filter(None, batch.values()))


class Popping(Classifier):
    """Takes its batch apart, as Hugging Face examples do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        label = batch.pop("label")
        return F.cross_entropy(self.net(batch.pop("image")), label)


class Writing(Classifier):
    """Prepares its batch in place, a part of which is in an object."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch["image"].mul_(2.0).add_(1.0)
        assert batch["extra"].mask.sum() == 0  # as long as it is new
        batch["extra"].mask.add_(1.0)
        return super().training_step((batch["image"], batch["label"]), batch_idx)


@dataclasses.dataclass
class Extra:
    """A part of a batch."""

    mask: Tensor


def _with_extra(batch: Any) -> dict[str, Any]:
    return {**_dicts(batch), "extra": Extra(torch.zeros(len(batch)))}


class Once(DataLoader[Any]):
    """Cannot be replayed, so that the last batches are kept."""

    def state_dict(self) -> dict[str, Any]:
        return {}


class ChannelsLast(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.to(memory_format=torch.channels_last)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = batch[0].to(memory_format=torch.channels_last)
        return super().training_step((images, batch[1]), batch_idx)


class Compiled(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.compiled = torch.compile(self.net, backend="eager")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.compiled(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss


def _combined(mode: Any) -> CombinedLoader:
    return CombinedLoader({"a": loader(), "b": loader(32)}, mode)


@pytest.mark.parametrize(
    ("module", "data"),
    [
        (OtherIndexName, loader),
        (NoIndex, loader),
        (DictReturn, loader),
        (DictBatches, lambda: loader(collate_fn=_dicts)),
        (Popping, lambda: loader(collate_fn=_dicts)),
        (Writing, lambda: loader(collate_fn=_with_extra)),
        (Writing, lambda: Once(images(), 16, collate_fn=_with_extra)),
        (PairedBatches, lambda: {"a": loader(), "b": loader(32)}),
        (PairedBatches, lambda: _combined("min_size")),
        (PairedBatches, lambda: _combined("max_size_cycle")),
        (PairedBatches, lambda: _combined("max_size")),
        (ChannelsLast, loader),
        (Compiled, loader),
    ],
)
def test_modules_and_batches_of_all_sorts(tmp_path: Path, module: Any, data: Any) -> None:
    """Signatures, outputs, containers, memory formats and compiled parts that Lightning takes, grow."""
    net, callback = module(), two_splits()
    t = trainer(tmp_path, callback, max_epochs=3)
    t.fit(net, data())
    assert [e["num_splits"] for e in callback.history] == [2, 2]
    assert sum(widths(net)) == 11 + 4
    _assert_all_trained(t, net)
    assert all(r.measured_gain > -1e-3 for r in callback.reports)


def test_a_tuple_is_no_loss(tmp_path: Path) -> None:
    """What Lightning does not take as output of training_step is refused on the first batch, in words."""

    class Pair(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx), 1

    with pytest.raises(MisconfigurationException, match="training_step returned tuple as its loss.*loss_fn="):
        trainer(tmp_path, two_splits()).fit(Pair(), loader())


# kinds of runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, [1, 2, 3]),
        ({"limit_train_batches": 2}, [1, 2, 3]),
        ({"limit_train_batches": 1}, [1, 2, 3]),
        ({"overfit_batches": 1}, [1, 2, 3]),
        ({"limit_val_batches": 0}, [1, 2, 3]),
        ({"check_val_every_n_epoch": 2}, [1, 2, 3]),
        ({"val_check_interval": 1}, [1, 2, 3]),
        ({"fast_dev_run": True}, []),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, [1, 2, 3]),
        ({"deterministic": True}, [1, 2, 3]),
        ({"inference_mode": False}, [1, 2, 3]),
        ({"detect_anomaly": True}, [1, 2, 3]),
        ({"reload_dataloaders_every_n_epochs": 1}, [1, 2, 3]),
        ({"max_epochs": -1, "max_steps": 9}, [1, 2]),
    ],
)
@pytest.mark.filterwarnings("ignore:You have turned on `Trainer.detect_anomaly")
def test_options_of_the_trainer(tmp_path: Path, options: dict[str, Any], epochs: list[int]) -> None:
    """Runs cut short, repeated, clipped or checked grow all the same; with and without validation."""
    for module in (Classifier(), Validated()):
        callback = two_splits()
        t = trainer(tmp_path, callback, **options)
        t.fit(module, loader(), *([loader()] if isinstance(module, Validated) else []))
        assert [e["epoch"] for e in callback.history] == epochs
        assert all(e["num_splits"] in (1, 2) for e in callback.history)  # as many as gain something
        _assert_all_trained(t, module)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_in_mid_epoch_equals_the_uninterrupted_run(tmp_path: Path, accumulate: int) -> None:
    """From every_n_train_steps checkpoints, the one after an epoch's last batch included."""

    def run(folder: Path, resume: str | None = None) -> tuple[Classifier, SplittingCallback]:
        pl.seed_everything(0 if resume is None else 9, verbose=False)
        module, callback = Classifier(), two_splits(trigger=Every(3, "step"))
        save = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", every_n_train_steps=2)
        t = trainer(
            folder,
            callback,
            save,
            enable_checkpointing=True,
            accumulate_grad_batches=accumulate,
            max_epochs=3 * accumulate,
        )
        # four times the same batch, because Lightning restarts a loader on resume
        same = torch.utils.data.Subset(images(), list(range(16)) * 4)
        t.fit(module, DataLoader(same, 16), ckpt_path=resume)
        return module, callback

    module, callback = run(tmp_path)
    assert [e["step"] for e in callback.history] == [3, 6, 9]
    saved = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(saved) >= 3
    for path in saved:
        again, other = run(tmp_path / path.stem, str(path))
        assert_same(other.history, callback.history)
        assert_same(dict(again.state_dict()), dict(module.state_dict()), path.stem)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_patience_counts_validations_where_they_are_rare(tmp_path: Path) -> None:
    """An old value is no news: patience waits for the next validation, in a resumed run too."""

    class Constant(Validated):
        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", 1.0)

    def run(folder: Path, resume: str | None = None) -> SplittingCallback:
        callback = two_splits(trigger=Plateau("val_loss", patience=1))
        save = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        t = trainer(
            folder, callback, save, max_epochs=8, check_val_every_n_epoch=3, enable_checkpointing=True
        )
        t.fit(Constant(), loader(), loader(), ckpt_path=resume)
        return callback

    callback = run(tmp_path)
    assert [e["epoch"] for e in callback.history] == [6]  # values of epochs 2 and 5, the second no better
    saved = sorted(tmp_path.glob("epoch=*.ckpt"))
    assert len(saved) == 8
    for path in saved[:-1]:
        again = run(tmp_path / path.stem, str(path))
        assert [e["epoch"] for e in again.history] == [6], path.stem


def test_a_network_without_hidden_neurons_is_refused_in_words(tmp_path: Path) -> None:
    """Lightning's BoringModel is one linear layer: its neurons are the output."""
    with pytest.raises(MisconfigurationException, match="No neuron of this network can be split.*'layer'"):
        trainer(tmp_path, two_splits()).fit(BoringModel(), DataLoader(RandomDataset(32, 64)))


class Deeper(BoringModel):
    """BoringModel with a hidden layer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 2))


def test_boring_model_with_a_hidden_layer(tmp_path: Path) -> None:
    """Its own loaders, dict outputs, StepLR and validation are all it takes."""
    module, callback = Deeper(), two_splits()
    trainer(tmp_path, callback, max_epochs=3).fit(module)
    splits = [e["num_splits"] for e in callback.history]  # as many of two as gain something
    assert module.layer[0].out_features == 4 + sum(splits) >= 6
    assert [e["step"] for e in callback.history] == [64, 128]


def test_resnet(tmp_path: Path) -> None:
    """A torchvision ResNet-18 on 32x32 images: residual streams grow as one, everything stays trained."""
    from torchvision.models import resnet18

    class ResNet(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = resnet18(num_classes=3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)

    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    grower = SteepestSplitting(solver=Lanczos(2))
    callback = two_splits(strategy=TopK(count=6), grower=grower, num_batches=1, confirm_batches=0)
    module = ResNet()
    t = trainer(tmp_path, callback, max_epochs=2)
    t.fit(module, DataLoader(data, 4))
    (report,) = callback.reports
    assert len(report.splits) == 6
    _assert_all_trained(t, module)
