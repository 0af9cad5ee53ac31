"""SplittingCallback inside real Trainers: when it grows, what it keeps, what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_split import (
    Every,
    KnapsackEnergy,
    Plateau,
    SplittingCallback,
    Threshold,
    TopK,
    load_grown,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from modules import Classifier, Validated, assert_same, images, loader, trainer, two_splits, widths


def _fit(tmp_path: Path, callback: pl.Callback, *others: pl.Callback, **options: Any) -> Classifier:
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    trainer(tmp_path, callback, *others, **options).fit(module, loader())
    return module


def test_the_network_grows_and_goes_on_training(tmp_path: Path) -> None:
    """Every epoch after the first: two neurons more, all in the optimizer, and all of them move."""
    moved: list[bool] = []

    class Watch(pl.Callback):
        before: dict[str, Tensor]

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.before = {n: p.detach().clone() for n, p in module.named_parameters()}

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            moved.extend(not torch.equal(p, self.before[n]) for n, p in module.named_parameters())

    callback = two_splits()
    module = _fit(tmp_path, callback, Watch())
    assert sum(widths(module)) == 3 + 8 + 3 * 2
    assert [e["epoch"] for e in callback.history] == [1, 2, 3]
    assert [e["step"] for e in callback.history] == [3, 6, 9]
    assert len(moved) == 12 * 8
    assert sum(moved) >= 0.9 * len(moved)  # a dead ReLU may rest for a step


def test_growth_starts_when_the_loss_stops_falling(tmp_path: Path) -> None:
    """The default trigger: after `patience` epochs without improvement by min_delta, not before."""

    class Scripted(Classifier):
        values = (1.0, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.8)

        def on_train_epoch_end(self) -> None:
            self.log("plan", self.values[self.current_epoch])

    callback = SplittingCallback(
        monitor="plan", patience=2, min_delta=0.05, num_batches=1, confirm_batches=1, verbose=False
    )
    module = Scripted()
    trainer(tmp_path, callback, max_epochs=8).fit(module, loader())
    assert callback.history[0]["epoch"] == 4  # after the values of epochs 2 and 3
    assert isinstance(callback.trigger, Plateau)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_triggers_grow_between_optimizer_steps_only(tmp_path: Path, accumulate: int) -> None:
    """A growth in mid-epoch waits for the boundary at which Lightning zeroes the gradients."""
    callback = two_splits(trigger=Every(2, "step"), max_growths=2)
    starts: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if len(callback.history) > len(starts):
                starts.append(batch_idx)

    _fit(tmp_path, callback, Watch(), max_epochs=3, accumulate_grad_batches=accumulate)
    assert len(callback.history) == 2
    assert all(b % accumulate == 0 for b in starts)


def test_optimizer_moments_and_schedule_survive_a_growth(tmp_path: Path) -> None:
    """Adam's moments of untouched rows and the cosine schedule run on as if nothing had happened."""
    seen: dict[str, Any] = {}

    class Watch(pl.Callback):
        def _note(self, trainer: Any, module: Any, when: str) -> None:
            optimizer = trainer.optimizers[0]
            state = optimizer.state[module.net[7].bias]
            seen[when] = (state["exp_avg"].clone(), float(state["step"]), optimizer.param_groups[0]["lr"])
            seen[when + " rows"] = optimizer.state[module.net[7].weight]["exp_avg"].clone()

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                self._note(trainer, module, self.when)

        def __init__(self, when: str) -> None:
            self.when = when

    callback = two_splits(include=["net.5"], strategy=TopK(count=1))
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    callbacks = (Watch("before"), callback, Watch("after"))
    trainer(tmp_path, *callbacks, max_epochs=2).fit(module, loader())
    assert_same(seen["before"], seen["after"])
    (split,) = callback.history[0]["splits"]
    parent = split[1]
    index = [*range(parent + 1), *range(parent, 8)]
    assert_same(seen["after rows"], seen["before rows"][:, index])


def test_reset_and_restart_start_anew(tmp_path: Path) -> None:
    """optimizer_state="reset" drops the moments of what grew; lr_schedule="restart" restarts the schedule."""
    rates: list[float] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            if trainer.current_epoch == 1:
                state = trainer.optimizers[0].state
                assert module.net[5].weight not in state or not state[module.net[5].weight]

    callback = two_splits(optimizer_state="reset", lr_schedule="restart", strategy=TopK(fraction=0.9))
    module = _fit(tmp_path, callback, Watch(), max_epochs=3)
    assert rates == [0.01, 0.01, 0.01]
    assert sum(widths(module)) > 11


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("average", [None, "before", "after"])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, average: str | None) -> None:
    """From every checkpoint, into a fresh seed-sized module: the same growths, bit-identical parameters."""

    def run(folder: Path, resume: str | None = None) -> tuple[Classifier, SplittingCallback]:
        pl.seed_everything(0 if resume is None else 99, verbose=False)
        module, splitting = Classifier(), two_splits(trigger=Plateau("train_loss", patience=1, min_delta=0.5))
        ema = [EMAWeightAveraging(decay=0.9, update_every_n_steps=1)] if average else []
        save = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        order = [*ema, splitting] if average == "before" else [splitting, *ema]
        t = trainer(folder, *order, save, max_epochs=5, enable_checkpointing=True)
        t.fit(module, loader(), ckpt_path=resume)
        return module, splitting

    whole, splitting = run(tmp_path)
    assert [e["epoch"] for e in splitting.history] == [2, 4]
    for epoch in range(4):
        module, again = run(tmp_path / f"from{epoch}", str(tmp_path / f"epoch={epoch}.ckpt"))
        assert_same(again.history, splitting.history)
        assert_same(again.lineage.to_dict(), splitting.lineage.to_dict())
        assert_same(dict(module.state_dict()), dict(whole.state_dict()), f"from epoch {epoch}")


def test_checkpoints_load_without_the_callback(tmp_path: Path) -> None:
    """load_grown, weights_only loading, and testing an earlier, smaller checkpoint."""
    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    callback = two_splits()
    pl.seed_everything(0, verbose=False)
    module = Validated()
    t = trainer(tmp_path, callback, save, enable_checkpointing=True)
    t.fit(module, loader(), loader())
    last = str(tmp_path / "epoch=3.ckpt")
    torch.load(last, weights_only=True)
    grown = load_grown(Validated, last)
    assert widths(grown) == widths(module)
    x = images().tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(grown.eval().net(x), module.eval().net(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Validated.load_from_checkpoint(last)
    t.validate(module, loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False)
    assert widths(module) == (3, 8)


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_best_checkpoint_brings_its_own_width(tmp_path: Path, weights_only: bool) -> None:
    """validate, test and predict with "best", written before the growths, and back to the last one."""

    class Everything(Validated):
        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", float(self.current_epoch))  # the first is the best

        def forward(self, batch: Any) -> Tensor:
            return self.net(batch[0])

        def test_step(self, batch: Any) -> None:
            self.log("neurons", float(sum(widths(self))))

    save = ModelCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}", save_weights_only=weights_only
    )
    module = Everything()
    t = trainer(tmp_path, two_splits(), save, enable_checkpointing=True)
    t.fit(module, loader(), loader(16))
    grown = widths(module)
    last = str(tmp_path / "epoch=3.ckpt")
    assert sum(grown) == 11 + 6
    (found,) = t.test(module, loader(16), ckpt_path="best", verbose=False)
    assert found["neurons"] == 11
    t.validate(module, loader(16), ckpt_path=last, verbose=False)
    assert widths(module) == grown
    outputs = torch.cat(t.predict(module, loader(16), ckpt_path="best"))
    assert widths(module) == (3, 8)
    small = load_grown(Everything, str(tmp_path / "epoch=0.ckpt")).eval()
    assert_same(small(images().tensors[:1])[:16], outputs[:16])
    assert widths(load_grown(Everything, last)) == grown


def test_growth_stops_at_its_limits(tmp_path: Path) -> None:
    """max_growths, max_params and max_macs hold for the whole run."""
    callback = two_splits(max_growths=2)
    _fit(tmp_path, callback)
    assert len(callback.history) == 2
    size = sum(p.numel() for p in Classifier().parameters())
    callback = two_splits(max_params=size + 60, strategy=TopK(fraction=0.9))
    module = _fit(tmp_path, callback, max_epochs=5)
    assert size < sum(p.numel() for p in module.parameters()) <= size + 60
    assert all(e["params"] <= size + 60 for e in callback.history)


@pytest.mark.parametrize("strategy", [TopK(fraction=0.5), Threshold(-1e-6, max_count=3), KnapsackEnergy(0.2)])
def test_strategies_plug_in(tmp_path: Path, strategy: Any) -> None:
    """Every built-in strategy grows a real run; the knapsack spends at most its share of the MACs."""
    callback = two_splits(strategy=strategy, max_growths=1)
    _fit(tmp_path, callback, max_epochs=2)
    (report,) = callback.reports
    assert report.splits
    if isinstance(strategy, KnapsackEnergy):
        assert sum(c.cost for c in report.chosen) <= 0.2 * report.cost_before.macs


def test_iterable_data_sets_use_the_last_batches(tmp_path: Path) -> None:
    """Where samplers cannot be replayed, growth waits for batches to go by: here those of an epoch."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            data = images()
            return (data[i] for i in range(len(data)))

    callback = two_splits(num_batches=3, confirm_batches=2)
    module = Classifier()
    trainer(tmp_path, callback, max_epochs=3).fit(module, DataLoader(Stream(), 16))
    assert next(e["step"] for e in callback.history) == 3
    assert sum(widths(module)) > 11


def test_the_module_can_be_a_whole_zoo_of_precisions(tmp_path: Path) -> None:
    """bf16-mixed, bf16-true and 64-true runs grow and keep their dtype."""
    for precision, dtype in (
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ):
        callback = two_splits()
        module = _fit(tmp_path, callback, max_epochs=2, precision=precision)
        assert len(callback.history) == 1, precision
        assert callback.history[0]["num_splits"] == 2
        assert {p.dtype for p in module.parameters()} == {dtype}


def test_manual_optimization_grows_with_a_loss_function(tmp_path: Path) -> None:
    """With loss_fn the callback also grows modules that step their optimizers themselves."""

    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__(optimizer="sgd")
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    with pytest.raises(MisconfigurationException, match="manual optimization.*loss_fn="):
        trainer(tmp_path, two_splits()).fit(Manual(), loader())
    callback = two_splits(loss_fn=lambda m, b: nn.functional.cross_entropy(m.net(b[0]), b[1]))
    module = Manual()
    trainer(tmp_path, callback).fit(module, loader())
    assert len(callback.history) == 3


def test_a_hard_coded_width_is_left_alone_from_then_on(tmp_path: Path) -> None:
    """A group that breaks the forward pass is reported and skipped; the others grow."""

    class LeNet(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            h = self.net[:4](batch[0]).view(-1, 27)
            loss = nn.functional.cross_entropy(self.net[5:](h), batch[1])
            self.log("train_loss", loss)
            return loss

    callback, module = two_splits(), LeNet()
    trainer(tmp_path, callback).fit(module, loader())
    assert widths(module) == (3, 14)
    reasons = {u.name: u.reason for u in callback.reports[0].architecture.unsplittable}
    assert "after growth" in reasons["net.0"]


def _monitor(monitor: str) -> dict[str, Any]:
    return {"trigger": None, "monitor": monitor}


class NanLoss(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.current_epoch else 1.0)


class Unrelated(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return next(self.net.parameters()).sum() * 0


class Normed(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.LayerNorm(4), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Classifier, _monitor("val_los"), "monitors 'val_los', which was not logged.*'train_loss'"),
        (Classifier, {"include": ["nothing*"]}, r"include=\['nothing\*'\].*groups are: 'net.0', 'net.5'"),
        (NanLoss, {}, "loss of batch 0 is nan; splitting needs a finite loss"),
        (Unrelated, {}, "No neuron of this network can be split"),
        (Normed, {}, "No neuron of this network can be split.*layer normalisation"),
    ],
)
def test_misuse_gets_one_sentence(
    tmp_path: Path, module: type[Classifier], options: dict[str, Any], message: str
) -> None:
    """Unknown monitor, empty selection, non-finite or unrelated loss, nothing to split."""
    net = module()
    widths = [p.shape for p in net.parameters()]
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        trainer(tmp_path, two_splits(**options)).fit(net, loader())
    assert [p.shape for p in net.parameters()] == widths


def test_a_callback_belongs_to_one_module_and_a_trainer_to_one_callback(tmp_path: Path) -> None:
    """Using a callback twice, or two of them at once, is refused before anything happens."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SplittingCallback`"):
        trainer(tmp_path, two_splits(), two_splits())  # Lightning's own refusal
    callback = two_splits()
    _fit(tmp_path, callback, max_epochs=2)
    with pytest.raises(MisconfigurationException, match="already belongs to another module"):
        trainer(tmp_path, callback).fit(Classifier(), loader())
    with pytest.raises(MisconfigurationException, match="ModelPruning"):
        trainer(tmp_path, two_splits(), ModelPruning("l1_unstructured")).fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_state": "keep"}, "optimizer_state must be one of 'transfer', 'reset', got 'keep'"),
        ({"lr_schedule": "x"}, "lr_schedule must be one of"),
        ({"num_batches": 0}, "num_batches must be at least 1, got 0"),
        ({"step_size": -0.1}, "step_size must be at least 0"),
        ({"step_size": float("nan")}, "step_size must be at least 0"),
        ({"include": "conv"}, r"write include=\['conv'\]"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    """Constructor arguments are checked at once."""
    with pytest.raises(ValueError, match=message):
        SplittingCallback(**options)


def test_a_second_fit_goes_on_growing(tmp_path: Path) -> None:
    """The same Trainer, module and callback may fit again."""
    callback, module = two_splits(), Classifier()
    t = trainer(tmp_path, callback, max_epochs=2)
    t.fit(module, loader())
    t.fit_loop.max_epochs = 4
    t.fit(module, loader())
    assert [e["epoch"] for e in callback.history] == [1, 2, 3]


@pytest.mark.parametrize(
    "trigger",
    [lambda: Every(2), lambda: Every(6, "step"), lambda: Plateau("train_loss", patience=1, min_delta=9.0)],
)
def test_another_trainer_counts_anew(tmp_path: Path, trigger: Any) -> None:
    """A module that is fitted further, with the same callback, grows in the second run as in the first."""
    callback, module = two_splits(trigger=trigger()), Classifier()
    for _ in range(2):
        trainer(tmp_path, callback, max_epochs=5).fit(module, loader())
    assert [e["epoch"] for e in callback.history] == [2, 4, 2, 4]
    assert sum(widths(module)) == 11 + 8
    assert callback.lineage.widths == callback.history[-1]["widths_after"]


def test_a_frozen_network_waits_until_it_is_thawed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If all neurons are frozen nothing is refused, because a finetuning callback may thaw them later."""

    class Thaw(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            module.net[:6].requires_grad_(trainer.current_epoch >= 2)

    callback = two_splits(verbose=True)
    module = _fit(tmp_path, Thaw(), callback, max_epochs=4)
    assert [e["epoch"] for e in callback.history] == [2, 3]
    assert sum(widths(module)) > 11
    told = capsys.readouterr().out
    assert told.count("looked at again whenever a growth is due") == 1
    assert "is frozen" in told


def test_a_run_goes_on_where_nothing_can_be_split_any_more(tmp_path: Path) -> None:
    """A hidden state that a module keeps from batch to batch has a width, which the first has not."""

    class Keeping(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.GRU(36, 4, batch_first=True)
            self.head, self.hidden = nn.Linear(4, 3), None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            outputs, state = self.net(batch[0].flatten(1)[:, None], self.hidden)
            self.hidden = state.detach()
            return nn.functional.cross_entropy(self.head(outputs[:, -1]), batch[1])

    callback, module = two_splits(), Keeping()
    t = trainer(tmp_path, callback, max_epochs=2)
    with pytest.warns(UserWarning, match="due, and training goes on without it: No neuron.*'net'"):
        t.fit(module, loader())
    assert t.global_step == 6
    assert (module.net.hidden_size, callback.history) == (4, [])


def test_what_failed_the_check_once_is_left_alone_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that a growth reports as broken is barred in all later ones, also after a resume."""
    import lightning_split.callback as module_under_test

    grow, calls = module_under_test.grow, []

    def reporting_a_failure(*args: Any, **options: Any) -> Any:
        calls.append(dict(options["barred"]))
        report = grow(*args, **options)
        return dataclasses.replace(report, barred={"net.0": "it broke"}) if len(calls) == 1 else report

    monkeypatch.setattr(module_under_test, "grow", reporting_a_failure)
    callback = two_splits(strategy=TopK(fraction=0.9))
    _fit(tmp_path, callback, max_epochs=4)
    assert calls == [{}, {"net.0": "it broke"}, {"net.0": "it broke"}]
    assert [e["widths_after"].keys() for e in callback.history[1:]] == [{"net.5"}, {"net.5"}]
    again = two_splits()
    again.load_state_dict(callback.state_dict())
    assert again.barred == {"net.0": "it broke"}


class WithIdleExpert(Classifier):
    """A layer that no batch of this run reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = torch.nn.Linear(8, 3)


def test_layers_that_no_pass_calls_are_told_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Growing what feeds them would break them, so the user reads of it before anything grows."""
    trainer(tmp_path, SplittingCallback(), max_epochs=1).fit(WithIdleExpert(), loader())
    assert "no pass called do not grow with the others: 'expert'" in capsys.readouterr().out


def test_nothing_is_told_where_everything_was_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ordinary network has no note."""
    trainer(tmp_path, SplittingCallback(), max_epochs=1).fit(Classifier(), loader())
    assert "Growth:" not in capsys.readouterr().out
