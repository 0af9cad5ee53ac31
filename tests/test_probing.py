"""Rule 1: measuring leaves no trace, for the model, the Trainer and the data pipeline."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_split import SplittingCallback, Threshold, grow
from lightning_split.measuring import undisturbed
from lightning_split.probing import (
    BatchBuffer,
    quiet,
    refuse_unprobeable,
    step_loss,
    to_device,
    training_batches,
)
from lightning_split.triggers import Trigger
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from modules import Classifier, Nasty, NoisyData, assert_same, csv_logger, state_of, trainer


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


class Nastier(Nasty):
    """Also generators and containers of its own, a child that logs, and hooks on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Child()
        self.both = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)])
        self.torch_rng = torch.Generator().manual_seed(1)
        self.numpy_rng = np.random.default_rng(2)
        self.rngs = [random.Random(3), np.random.RandomState(4)]
        self.before = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.before += 1
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = super().on_after_batch_transfer(batch, dataloader_idx)
        x = x + 0.1 * torch.rand(x.shape, generator=self.torch_rng)
        factor = self.numpy_rng.random() + self.rngs[0].random() + self.rngs[1].rand()
        return x * (1 + 0.1 * factor), y

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        out = super().training_step(batch, batch_idx)
        self.both.update(out["extra"], batch[1])
        self.child.note(out["loss"])
        if self.trainer.current_epoch > 5:
            self.trainer.should_stop = True
        return out

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.both.compute())
        self.both.reset()


class Child(pl.LightningModule):
    """A nested LightningModule with a buffer and a graph on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.stored: dict[str, Any] = {}

    def note(self, loss: Tensor) -> None:
        self.total += loss.detach()
        self.total = self.total * 1.5
        self.stored["loss"] = loss


class Probe(pl.Callback):
    """All passes of a growth, with no candidate chosen, and one in training mode with a graph."""

    def __init__(self) -> None:
        self.probes, self.fallbacks = 0, 0

    def _probe(self, trainer: pl.Trainer, module: Any, batch: Any) -> None:
        with quiet(trainer, module, seed=self.probes):
            batches = training_batches(trainer, 3, seed=self.probes)
            if batches is not None:
                batches = [to_device(trainer, module, b) for b in batches]
            elif batch is not None:
                batches = [batch]
                self.fallbacks += 1
            else:
                return
            loss_fn = step_loss(trainer, module)
            with undisturbed(module, train=None, seed=None):
                assert all(p.grad is None for p in module.parameters())
                loss = loss_fn(module, batches[0])
                weights = [p for p in module.parameters() if p.requires_grad]
                torch.autograd.grad(loss, weights, allow_unused=True)
                module.log("probe", loss)
                module.child.log("child", loss)  # not even possible where it is not silenced
            nothing = Threshold(-1e30)
            report = grow(module, batches, loss_fn, strategy=nothing, confirm_batches=batches[:1])
        assert not report.splits
        self.probes += 1

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._probe(trainer, module, None)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            self._probe(trainer, module, batch)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        data = NoisyData()
        return (data[i] for i in range(len(data)))


class Inplace(Sampler[int]):
    """Shuffles its own list, with its own generator, and counts how often."""

    def __init__(self, n: int) -> None:
        self.order = list(range(n))
        self.rng = np.random.default_rng(5)
        self.times = 0

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        self.rng.shuffle(self.order)
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class Permuted(Sampler[int]):
    """Draws every epoch's order from NumPy, and keeps nothing else."""

    def __init__(self, n: int) -> None:
        self.n, self.rng = n, np.random.default_rng(5)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.permutation(self.n).tolist())

    def __len__(self) -> int:
        return self.n


class OwnRandom(NoisyData):
    """Augments with a generator of its own, too."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(6)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(i)
        return x + self.rng.random(), y


class Fetching(NoisyData):
    """Reads a whole batch at once."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return [self[i] for i in indices]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def wrapped_for_ranks() -> DataLoader[Any]:
    """What Lightning makes of a custom sampler under DDP; here on one rank."""
    sampler = RandomSampler(range(32), generator=seeded())
    wrapper = DistributedSamplerWrapper(sampler, num_replicas=1, rank=0)
    return DataLoader(NoisyData(), 8, sampler=wrapper)


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(NoisyData(), 8),
    "shuffled": lambda: DataLoader(NoisyData(), 8, shuffle=True),
    "generator": lambda: DataLoader(NoisyData(), 8, shuffle=True, generator=seeded()),
    "weighted": lambda: DataLoader(
        NoisyData(), 8, sampler=WeightedRandomSampler([1.0] * 32, 32, generator=seeded())
    ),
    "subset": lambda: DataLoader(NoisyData(), 8, sampler=SubsetRandomSampler(range(32))),
    "batch_sampler": lambda: DataLoader(
        NoisyData(), batch_sampler=BatchSampler(RandomSampler(range(32)), 8, drop_last=True)
    ),
    "index lists": lambda: DataLoader(
        NoisyData(), batch_sampler=[list(range(i, i + 8)) for i in (0, 8, 16, 24)]
    ),
    "in-place sampler": lambda: DataLoader(NoisyData(), 8, sampler=Inplace(32)),
    "distributed": wrapped_for_ranks,
    "own generator": lambda: DataLoader(OwnRandom(), 8, shuffle=True),
    "getitems": lambda: DataLoader(Fetching(), 8, shuffle=True),
    "iterable": lambda: DataLoader(Stream(), 8),
    "two workers": lambda: DataLoader(NoisyData(), 8, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(NoisyData(), 8, shuffle=True, num_workers=1, persistent_workers=True),
}


def trained(path: Path, make: Callable[[], Any], probe: Probe | None, **options: Any) -> Any:
    """Everything that is left of a run of the nasty module."""
    pl.seed_everything(1, verbose=False)
    module = Nastier()
    callbacks = [] if probe is None else [probe]
    run = trainer(path, *callbacks, max_epochs=2, logger=csv_logger(path), **options)
    run.fit(module, make())
    run.logger.save()
    state = state_of(run, module)
    state["file"] = (path / "csv" / "v" / "metrics.csv").read_text()
    state["attributes"] = [module.steps, module.by_class, module.seen, module.last, module.before]
    state["child"] = [module.child.total, module.child.stored["loss"].detach()]
    state["modes"] = [m.training for m in module.modules()]
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    state["metrics"] = [[m.metric_state, m._update_count, m._computed] for m in metrics]
    state["generators"] = [
        module.torch_rng.get_state(),
        str(module.numpy_rng.bit_generator.state),
        module.rngs[0].getstate(),
        str(module.rngs[1].get_state()),
    ]
    state["patched"] = [name for name in ("log", "log_dict") if name in vars(module)]
    state["stop"] = run.should_stop
    return state


@pytest.mark.parametrize("name", LOADERS)
def test_training_with_probes_is_bit_identical_to_training_without(name: str, tmp_path: Path) -> None:
    """Parameters, buffers, logs, metrics, attributes and random states do not see the probes."""
    probe = Probe()
    without = trained(tmp_path / "without", LOADERS[name], None)
    assert_same(without, trained(tmp_path / "with", LOADERS[name], probe))
    assert (probe.probes, probe.fallbacks) == ((2, 2) if name == "iterable" else (4, 0))
    assert "direct" in without["file"]
    assert "probe" not in without["file"]


def test_a_probe_amid_accumulation_keeps_the_gradients(tmp_path: Path) -> None:
    """The gradient that has been accumulated so far is the same object with the same values."""
    make, probe = LOADERS["shuffled"], Probe()
    without = trained(tmp_path / "without", make, None, accumulate_grad_batches=2)
    with_probes = trained(tmp_path / "with", make, probe, accumulate_grad_batches=2)
    assert_same(without, with_probes)
    assert probe.probes == 4


def test_quiet_cleans_up_after_an_error(tmp_path: Path) -> None:
    """A probe that fails leaves loggers, log methods, hook name and random state behind intact."""
    checked: list[bool] = []

    class Failing(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            loggers, fx, rng = trainer.loggers, module._current_fx_name, torch.get_rng_state()

            def fail() -> None:
                with quiet(trainer, module):
                    assert trainer.loggers is not loggers
                    torch.rand(3)
                    module.log("never", 1.0)
                    module.log_dict(None)  # type: ignore[arg-type]  # not even looked at
                    trainer.should_stop = True
                    module._current_fx_name = "training_step"
                    raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                fail()
            assert trainer.loggers is loggers
            assert module._current_fx_name == fx == "on_train_epoch_start"
            assert not trainer.should_stop
            assert "log" not in vars(module)
            assert "log_dict" not in vars(module)
            assert_same(torch.get_rng_state(), rng)
            checked.append(True)

    run = trainer(tmp_path, Failing(), max_epochs=1, logger=csv_logger(tmp_path))
    run.fit(Nastier(), LOADERS["plain"]())
    assert checked == [True]
    assert "never" not in run.callback_metrics


def test_quiet_repeats_its_draws(tmp_path: Path) -> None:
    """Transfer hooks draw the same numbers for the same seed, whatever was drawn before."""
    drawn: list[Any] = []

    class Draw(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            batch = [torch.zeros(2, 1, 6, 6), torch.zeros(2)]
            for seed in (0, 0, 1):
                torch.rand(1)
                with quiet(trainer, module, seed=seed):
                    drawn.append([to_device(trainer, module, batch) for _ in range(2)])

    trainer(tmp_path, Draw(), max_epochs=1, logger=csv_logger(tmp_path)).fit(Nastier(), LOADERS["plain"]())
    assert_same(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][0][0], drawn[0][1][0])
    assert not torch.equal(drawn[0][0][0], drawn[2][0][0])


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


def fitting(loaders: Any, mode: Any = "max_size_cycle", limits: Any = None) -> Any:
    """As much of a Trainer as a replay reads, with its iterator running."""
    combined = CombinedLoader(loaders, mode)
    combined.limits = limits
    iter(combined)
    return SimpleNamespace(fit_loop=SimpleNamespace(_combined_loader=combined))


def numbers(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch]


def test_a_sequential_loader_gives_fresh_batches() -> None:
    """Without shuffling the choice among index lists is what the seed decides."""
    run = fitting(DataLoader(range(400), 4))
    first, other = (training_batches(run, 5, seed=seed) for seed in (0, 1))
    assert first is not None
    assert other is not None
    assert len(set(numbers(first))) == len(set(numbers(other))) == 20
    assert set(numbers(first)) != set(numbers(other))
    starts = [int(b[0]) for b in first]
    assert starts != sorted(starts)  # curvature and confirmation batches come from all over


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"shuffle": True, "generator": torch.Generator()},
        {"sampler": Permuted(40)},
        {"batch_sampler": BatchSampler(RandomSampler(range(40)), 4, False), "batch_size": 1},
    ],
    ids=["global", "generator", "numpy generator", "batch sampler"],
)
def test_a_replay_depends_on_its_seed_alone(options: dict[str, Any]) -> None:
    """Random states that came before, in the process or in the loader, make no difference."""
    loader: DataLoader[Any] = DataLoader(range(40), **({"batch_size": 4} | options))  # type: ignore[arg-type]
    run = fitting(loader)
    torch.manual_seed(1)
    first = training_batches(run, 3, seed=7)
    torch.manual_seed(2)
    numbers(iter(loader))  # moves the generators of its own on
    again, other = training_batches(run, 3, seed=7), training_batches(run, 3, seed=8)
    assert_same(first, again)
    assert numbers(first) != numbers(other)


def test_a_replay_does_not_disturb_a_running_iterator() -> None:
    """Samplers whose iterators read lists that a second iteration rewrites give the same order."""
    for sampler in (
        lambda: DistributedSamplerWrapper(RandomSampler(range(24)), num_replicas=2, rank=1),
        lambda: Inplace(24),
    ):
        orders = []
        for replay in (False, True):
            torch.manual_seed(0)
            loader: DataLoader[Any] = DataLoader(range(24), 2, sampler=sampler())
            run, running = fitting(loader), iter(loader)
            order = numbers([next(running)])
            if replay:
                assert training_batches(run, 4, seed=1) is not None
            order += numbers(running)
            orders.append(order + numbers(loader))
        assert orders[0] == orders[1]


def test_batches_outside_of_training_are_not_used() -> None:
    """What limit_train_batches cuts off is not seen, nor is a smaller last batch."""
    run = fitting(DataLoader(range(40), 4), limits=[3])
    assert sorted(numbers(training_batches(run, 99, seed=0))) == list(range(12))
    ragged = fitting(DataLoader(range(10), 4), limits=[float("inf")])
    assert sorted(numbers(training_batches(ragged, 99, seed=0))) == list(range(8))
    only = fitting(DataLoader(range(3), 4))
    assert numbers(training_batches(only, 99, seed=0)) == [0, 1, 2]
    single = fitting(DataLoader(range(5), batch_size=None))
    assert sorted(training_batches(single, 99, seed=0) or []) == list(range(5))


def test_each_rank_replays_its_own_shard() -> None:
    """With a distributed sampler the ranks' batches are disjoint and equally many."""
    shards = []
    for rank in range(2):
        sampler = DistributedSampler(range(16), num_replicas=2, rank=rank, shuffle=True)  # type: ignore[arg-type]
        run = fitting(DataLoader(range(16), 2, sampler=sampler))
        shards.append(numbers(training_batches(run, 99, seed=0)))
    assert sorted(shards[0] + shards[1]) == list(range(16))
    assert len(shards[0]) == len(shards[1]) == 8


def test_an_endless_sampler_ends() -> None:
    """Only the first index lists are looked at."""

    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return (i % 5 for i in count())

    run = fitting(DataLoader(range(5), 2, sampler=Endless()))
    assert len(training_batches(run, 3, seed=0) or []) == 3


def test_several_loaders_stay_side_by_side() -> None:
    """Equal loaders give batches of equal places; shorter ones are cycled, or end the batch list."""
    pair = {"a": DataLoader(range(40), 4), "b": DataLoader(range(100, 140), 4)}
    for batch in training_batches(fitting(pair), 4, seed=0) or [pytest.fail("no batches")]:
        assert_same(batch["a"] + 100, batch["b"])
    uneven = [DataLoader(range(8), 4), DataLoader(range(40), 4)]
    assert len(training_batches(fitting(uneven), 6, seed=0) or []) == 6
    assert len(training_batches(fitting(uneven, "min_size"), 6, seed=0) or []) == 2


class Stateful(DataLoader[Any]):
    def state_dict(self) -> dict[str, Any]:
        return {}


NOT_REPLAYABLE: dict[str, Callable[[], Any]] = {
    "iterable": lambda: fitting(DataLoader(Stream(), 8)),
    "stateful": lambda: fitting(Stateful(range(8), 4)),  # type: ignore[arg-type]
    "own iterable": lambda: fitting([[1, 2], [3, 4]]),
    "one of two": lambda: fitting([DataLoader(range(8), 4), DataLoader(Stream(), 8)]),
    "sequential": lambda: fitting([DataLoader(range(8), 4)], "sequential"),
    "one-time sampler": lambda: fitting(DataLoader(range(8), 4, sampler=iter(range(8)))),  # type: ignore[arg-type]
    "own workers": lambda: SimpleNamespace(
        fit_loop=SimpleNamespace(
            _combined_loader=CombinedLoader(DataLoader(range(8), 4, num_workers=1, worker_init_fn=print))
        )
    ),
    "before fit": lambda: SimpleNamespace(fit_loop=SimpleNamespace(_combined_loader=None)),
}


@pytest.mark.parametrize("name", NOT_REPLAYABLE)
def test_loaders_that_cannot_be_replayed_are_known(name: str) -> None:
    """Where drawing again would disturb training or miss its data, there are no batches."""
    assert training_batches(NOT_REPLAYABLE[name](), 2, seed=0) is None


def test_lightnings_own_worker_seeding_is_no_obstacle() -> None:
    """seed_everything(workers=True) sets a worker_init_fn, which touches random state only."""
    loader = DataLoader(range(8), 4, num_workers=1, worker_init_fn=partial(pl_worker_init_function, rank=0))
    run: Any = SimpleNamespace(fit_loop=SimpleNamespace(_combined_loader=CombinedLoader(loader)))
    assert sorted(numbers(training_batches(run, 2, seed=0))) == list(range(8))


def test_the_buffer_keeps_the_last_batches_as_they_were() -> None:
    """Copies, oldest first, whatever is done to the originals later."""
    buffer = BatchBuffer(2)
    tensors = [torch.full((2,), float(i)) for i in range(3)]
    for t in tensors:
        buffer.add({"x": [t, "text"], "y": Batch(t, {"z": (t.requires_grad_(),)})})
        t.detach().zero_()
    kept = buffer.batches()
    assert len(kept) == 2
    for i, batch in enumerate(kept, start=1):
        copies = [batch["x"][0], batch["y"].tensor, batch["y"].rest["z"][0]]
        assert_same(copies, [torch.full((2,), float(i))] * 3)
        assert batch["x"][1] == "text"
        assert all(t.is_leaf for t in copies)  # they may ask for gradients, but keep no graph


class Batch(NamedTuple):
    tensor: Tensor
    rest: dict[str, Any]


class Graph:
    """A batch of a foreign library, which can clone itself."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def clone(self) -> Graph:
        return Graph(self.x.clone())


def test_the_buffer_clones_foreign_batches() -> None:
    """Objects with a clone method are copied by it, on their own and inside of containers."""
    buffer, graph = BatchBuffer(2), Graph(torch.ones(2))
    buffer.add(graph)
    buffer.add([graph])
    graph.x.zero_()
    whole, (nested,) = buffer.batches()
    assert_same([whole.x, nested.x], [torch.ones(2)] * 2)


def test_modules_that_cannot_be_probed_are_asked_for_a_loss() -> None:
    """Manual optimization and dataloader_iter are refused with a sentence that names loss_fn."""

    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class Iterating(Classifier):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            raise NotImplementedError

    class Stepless(pl.LightningModule):
        """Has only a forward pass."""

    for module, why in (
        (Manual(), "^Manual uses manual optimization"),
        (Iterating(), "^Iterating takes a dataloader_iter"),
        (Stepless(), "^Stepless has no training_step"),
    ):
        with pytest.raises(MisconfigurationException, match=rf"{why}.*SplittingCallback\(loss_fn="):
            refuse_unprobeable(module)
    refuse_unprobeable(Classifier())


def _returning(output: Callable[[Tensor], Any]) -> pl.LightningModule:
    class Returning(Classifier):
        def training_step(self, batch: Any, number: int) -> Any:  # type: ignore[override]
            assert number == 0
            return output(self.net(batch[0]).square().mean())

    return Returning()


class NoIndex(Classifier):
    """A training_step without a batch index."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.net(batch[0]).square().mean()


def test_step_loss_is_the_modules_own_loss(tmp_path: Path) -> None:
    """Tensor or dict, with an index of any name or without one: the value is that of the step."""
    x = torch.randn(4, 1, 6, 6)
    run = trainer(tmp_path)
    modules = [_returning(lambda v: v), _returning(lambda v: {"loss": v.view(1)}), NoIndex()]
    for module in modules:
        loss = step_loss(run, module)(module, [x])
        assert loss.shape == ()
        torch.testing.assert_close(loss, module.net(x).square().mean())  # type: ignore[operator]
        assert loss.requires_grad


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (lambda v: None, "NoneType as its loss"),
        (lambda v: {"other": v}, "a dict without 'loss'"),
        (lambda v: v.detach().item(), "float as its loss"),
        (lambda v: v.expand(3), r"a loss of shape \(3,\) instead of a scalar"),
        (lambda v: v.detach(), "a loss without gradient"),
    ],
    ids=["none", "dict", "float", "vector", "detached"],
)
def test_a_step_without_a_loss_is_told_so(output: Callable[[Tensor], Any], what: str, tmp_path: Path) -> None:
    """One sentence says what came instead and what to pass."""
    module = _returning(output)
    sentence = rf"^Returning\.training_step returned {what}, .*SplittingCallback\(loss_fn="
    loss_fn = step_loss(trainer(tmp_path), module)
    with pytest.raises(MisconfigurationException, match=sentence):
        loss_fn(module, [torch.randn(4, 1, 6, 6)])


def test_step_loss_runs_under_the_trainers_precision(tmp_path: Path) -> None:
    """Mixed precision holds inside the step, and only there."""
    seen: list[bool] = []

    class Asking(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return self.net(batch[0]).float().square().mean()

    module = Asking()
    step_loss(trainer(tmp_path, precision="bf16-mixed"), module)(module, [torch.randn(2, 1, 6, 6)])
    step_loss(trainer(tmp_path), module)(module, [torch.randn(2, 1, 6, 6)])
    assert seen == [True, False]
    assert not torch.is_autocast_enabled("cpu")
