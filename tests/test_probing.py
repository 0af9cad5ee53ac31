"""Rule 1: measuring leaves no trace, for the model, the Trainer and the data pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import Classifier, Nasty, NoisyData, assert_same, csv_logger, state_of, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, WeightedRandomSampler

from lightning_split import SplittingCallback, grow
from lightning_split.probing import (
    BatchBuffer,
    quiet,
    refuse_unprobeable,
    step_loss,
    to_device,
    training_batches,
)
from lightning_split.triggers import Trigger


class _Never(Trigger):
    """A trigger that only the test fires."""

    monitor = None

    def observe(self, value: float | None, *, epoch: int, step: int) -> None: ...
    def due(self, *, epoch: int, step: int) -> bool:
        return False

    def fired(self, *, epoch: int, step: int) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Probe(pl.Callback):
    """Grows at zero step size a copy-free nothing: all passes of a growth, with no candidate chosen."""

    def __init__(self, source: str) -> None:
        self.source, self.probes = source, 0

    def _probe(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        from lightning_split import Threshold

        with quiet(trainer, module):
            batches = training_batches(trainer, 3, seed=self.probes)
            assert (batches is None) == (self.source == "buffer")
            if batches is None:
                if batch is None:
                    return
                batches = [batch]
            else:
                batches = [to_device(trainer, module, b) for b in batches]
            loss = step_loss(trainer, module)
            report = grow(module, batches, loss, strategy=Threshold(-1e30), confirm_batches=batches[:1])
        assert not report.splits
        self.probes += 1

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._probe(trainer, module, None)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            self._probe(trainer, module, batch)


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        data = NoisyData()
        return (data[i] for i in range(len(data)))


LOADERS: dict[str, tuple[Callable[[], Any], str]] = {
    "plain": (lambda: DataLoader(NoisyData(), 8), "replay"),
    "shuffled": (lambda: DataLoader(NoisyData(), 8, shuffle=True), "replay"),
    "generator": (
        lambda: DataLoader(NoisyData(), 8, shuffle=True, generator=torch.Generator().manual_seed(3)),
        "replay",
    ),
    "weighted": (lambda: DataLoader(NoisyData(), 8, sampler=WeightedRandomSampler([1.0] * 32, 32)), "replay"),
    "subset": (lambda: DataLoader(NoisyData(), 8, sampler=SubsetRandomSampler(range(24))), "replay"),
    "iterable": (lambda: DataLoader(_Stream(), 8), "buffer"),
    "workers": (
        lambda: DataLoader(NoisyData(), 8, shuffle=True, num_workers=1, persistent_workers=True),
        "replay",
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_training_with_probes_is_bit_identical_to_training_without(name: str, tmp_path: Path) -> None:
    """Parameters, buffers, logged files, metrics, attributes and random states do not see the probes."""
    make, source = LOADERS[name]
    results = []
    for probes in (False, True):
        pl.seed_everything(1, verbose=False)
        module, folder, probe = Nasty(), tmp_path / str(probes), Probe(source)
        run = trainer(folder, *([probe] if probes else []), max_epochs=2, logger=csv_logger(folder))
        run.fit(module, make())
        assert probe.probes == (0 if not probes else 2 if source == "buffer" else 4)
        state = state_of(run, module)
        state["file"] = (folder / "csv" / "v" / "metrics.csv").read_text()
        state["attributes"] = [module.steps, module.by_class, module.seen, module.last]
        state["modes"] = [m.training for m in module.modules()]
        results.append(state)
    assert_same(*results)


def test_a_callback_that_never_grows_changes_nothing(tmp_path: Path) -> None:
    """A run with the callback that never triggers is bit-identical to a run without it."""
    results = []
    for callbacks in ([], [SplittingCallback(trigger=_Never())]):
        pl.seed_everything(1, verbose=False)
        module, folder = Nasty(), tmp_path / str(len(callbacks))
        run = trainer(folder, *callbacks, max_epochs=2, logger=csv_logger(folder))
        run.fit(module, DataLoader(NoisyData(), 8, shuffle=True))
        state = state_of(run, module)
        state["file"] = (folder / "csv" / "v" / "metrics.csv").read_text()
        results.append(state)
    assert_same(*results)


def test_replayed_batches_are_training_batches(tmp_path: Path) -> None:
    """Batches come from the data set in the Trainer's own nesting; seeds repeat and differ."""
    seen: list[Any] = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            seen.extend(training_batches(trainer, n, seed=s) for n, s in ((2, 0), (2, 0), (2, 1), (99, 2)))

    class Pairs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch["a"][0]).square().mean()

    data = NoisyData()
    loaders = {"a": DataLoader(data.data, 8, shuffle=True), "b": DataLoader(range(10), 5)}
    trainer(tmp_path, Look(), max_epochs=1).fit(Pairs(), loaders)
    first, again, other, all_of_them = seen
    assert_same(first, again)
    assert not torch.equal(first[0]["a"][0], other[0]["a"][0])
    assert len(first) == 2
    assert len(all_of_them) == 4
    everything = torch.cat([b["a"][0] for b in all_of_them])
    assert sorted(everything.sum((1, 2, 3)).tolist()) == sorted(data.data.tensors[0].sum((1, 2, 3)).tolist())
    assert {tuple(b["b"].tolist()) for b in all_of_them} == {(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)}


def test_the_buffer_keeps_the_last_batches_as_they_were() -> None:
    """Copies, oldest first, whatever is done to the originals later."""
    buffer = BatchBuffer(2)
    tensors = [torch.full((2,), float(i)) for i in range(3)]
    for t in tensors:
        buffer.add({"x": [t, "text"]})
        t.zero_()
    assert_same(buffer.batches(), [{"x": [torch.full((2,), float(i)), "text"]} for i in (1, 2)])


def test_modules_that_cannot_be_probed_are_asked_for_a_loss() -> None:
    """Manual optimization and dataloader_iter are refused with a sentence that names loss_fn."""

    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class Iterating(Classifier):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            raise NotImplementedError

    for module, why in ((Manual(), "manual optimization"), (Iterating(), "dataloader_iter")):
        with pytest.raises(MisconfigurationException, match=rf"{why}.*SplittingCallback\(loss_fn="):
            refuse_unprobeable(module)
    refuse_unprobeable(Classifier())
