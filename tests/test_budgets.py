"""Budgets and limits over whole runs: in the callback, after a resume, from a command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning_split import (
    Every,
    KnapsackEnergy,
    MeasuredLatency,
    SelectionStrategy,
    SplittingCallback,
    Target,
    Threshold,
    TopK,
    Transformed,
)
from lightning_split.architecture import ChannelGroup

from modules import Classifier, assert_same, loader, trainer, two_splits, widths


def _fit(path: Path, callback: SplittingCallback, resume: str | None = None, **options: Any) -> Classifier:
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    save = ModelCheckpoint(path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    t = trainer(path, callback, save, **{"max_epochs": 6, "enable_checkpointing": True, **options})
    t.fit(module, loader(), ckpt_path=resume)
    return module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "strategy",
    [
        lambda: KnapsackEnergy(Target(3, factor=2.0), cost="params"),
        lambda: KnapsackEnergy(Target(2, total=1500, spread="equal"), cost="activations", max_factor=None),
    ],
)
def test_a_target_survives_a_resume(tmp_path: Path, strategy: Any) -> None:
    """The resumed run knows what the first network cost, and what was measured."""
    whole = two_splits(strategy=strategy())
    module = _fit(tmp_path, whole)
    seed_cost = whole.history[0]["cost_before"]
    assert len([e for e in whole.history if e["num_splits"]]) >= 2
    for epoch in (2,):
        again = two_splits(strategy=strategy())
        resumed = _fit(tmp_path / str(epoch), again, str(tmp_path / f"epoch={epoch}.ckpt"))
        assert_same(again.history, whole.history)
        assert_same(dict(resumed.state_dict()), dict(module.state_dict()))
    target = whole.strategy.budget
    total = target.total or target.factor * seed_cost
    last = whole.history[-1]
    assert seed_cost < last["cost_before"] + last["spent"] <= total * (1 + 1e-9)


def test_measured_latencies_are_kept_in_checkpoints(tmp_path: Path) -> None:
    """A resumed run does not time again what was timed before."""

    def strategy() -> KnapsackEnergy:
        return KnapsackEnergy(Target(3, factor=2.0), cost=MeasuredLatency(factors=(1, 2), repeats=1))

    whole, again = two_splits(strategy=strategy(), max_growths=1), two_splits(strategy=strategy())
    _fit(tmp_path, whole, max_epochs=3)
    measured = whole.strategy.state_dict()["latency"]
    assert measured
    _fit(tmp_path / "resumed", again, str(tmp_path / "epoch=1.ckpt"), max_epochs=3)
    kept = again.strategy.state_dict()["latency"]
    assert {key: kept[key] for key in measured} == measured
    assert again.history[0] == whole.history[0]


@pytest.mark.parametrize(
    ("options", "stopped", "why"),
    [
        ({"max_growths": 2}, 3, "max_growths=2 is reached"),
        ({"strategy": Threshold(-1e9)}, 1, "no split is worth its cost"),
        ({"max_params": 330}, None, "no split is worth its cost and within the limits"),
        ({"max_growths": 2, "stop_when_done": False}, None, None),
    ],
)
def test_training_stops_when_growth_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], stopped: int | None, why: str
) -> None:
    """At the moment when the trigger asks for more; the last growth still gets its epoch."""
    epochs: list[int] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            epochs.append(trainer.current_epoch)

    callback = two_splits(**{"stop_when_done": True, "verbose": True, **options})
    module = Classifier()
    t = trainer(tmp_path, callback, Watch(), max_epochs=12)
    t.fit(module, loader())
    printed = capsys.readouterr().out
    assert ("Growth is done" in printed) == (why is not None)
    if why is None:
        assert t.current_epoch == 12
        return
    assert why in printed
    assert printed.count("Growth is done") == 1
    assert t.current_epoch < 12
    if stopped is not None:
        assert t.current_epoch <= stopped + 1
    if "max_params" in options:
        assert 280 < sum(p.numel() for p in module.parameters()) <= 330
        assert "The limit max_params=330 is reached" in printed
    last = max((e["epoch"] for e in callback.history if e["num_splits"]), default=-1)
    assert last < 0 or last in epochs


@dataclass(frozen=True)
class Alternating(SelectionStrategy):
    """Every other neuron; named so that a command line can find it.

    Args:
        every: One of so many.
    """

    every: int = 2

    def select(self, candidates: Any) -> list[Any]:
        """Some of the candidates."""
        return [c for c in candidates if c.neuron % self.every == 0 and c.gain > 0]


def fan_in(group: ChannelGroup) -> float:
    """A cost that a command line can find."""
    return float(group.dim)


def _from_yaml(path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    config = path / "config.yaml"
    config.write_text(
        f"""
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {path}
  callbacks:
    - class_path: lightning_split.SplittingCallback
      init_args:
        trigger: {{class_path: lightning_split.Every, init_args: {{n: 1}}}}
        num_batches: 1
        confirm_batches: 1
        verbose: false
        strategy:
{strategy}
"""
    )
    monkeypatch.setattr("sys.argv", ["fit.py"])  # it warns if there are arguments of another program
    cli = LightningCLI(Classifier, run=False, save_config_callback=None, args=["--config", str(config)])
    cli.trainer.fit(cli.model, loader())
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, SplittingCallback)]
    assert len(callback.history) == 1
    return callback.strategy


@pytest.mark.filterwarnings(r"ignore:\s*By default only one Jsonargparse:DeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:\s*.*was deprecated in v4:DeprecationWarning")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{class_path: test_budgets.Alternating, init_args: {every: 3}}", Alternating(3)),
        ("{class_path: lightning_split.TopK, init_args: {fraction: 0.5, per_group_max: 2}}",
         TopK(0.5, per_group_max=2)),
        ("{class_path: lightning_split.KnapsackEnergy, init_args: {budget: 1, cost: params}}",
         KnapsackEnergy(1, cost="params")),
        ("{class_path: lightning_split.KnapsackEnergy, init_args: {budget: 1.0, round_to: 2}}",
         KnapsackEnergy(1.0, round_to=2)),
        ("{class_path: lightning_split.KnapsackEnergy, init_args: {max_factor: null, "
         "budget: {class_path: lightning_split.Target, init_args: {growths: 3, factor: 2.0}}, "
         "cost: {class_path: lightning_split.MeasuredLatency, init_args: {factors: [1, 2], repeats: 1}}}}",
         KnapsackEnergy(Target(3, factor=2.0), cost=MeasuredLatency((1.0, 2.0), 1), max_factor=None)),
        ("{class_path: lightning_split.KnapsackEnergy, init_args: {budget: 0.4, solver: greedy, "
         "cost: {class_path: lightning_split.Transformed, init_args: {cost: macs, function: log}}}}",
         KnapsackEnergy(0.4, cost=Transformed("macs", "log"), solver="greedy")),
        ("{class_path: lightning_split.KnapsackEnergy, init_args: {budget: 40, "
         "cost: {class_path: lightning_split.PerNeuron, init_args: {function: test_budgets.fan_in}}}}",
         None),
    ],
)  # fmt: skip
def test_strategies_costs_and_targets_come_from_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: Any
) -> None:
    """By class path, with typed options; whole numbers stay whole, because 1 and 1.0 differ."""
    found = _from_yaml(tmp_path, "          " + text, monkeypatch)
    if expected is None:
        assert found.cost.unit == "fan_in"
        return
    assert found == expected
    assert type(getattr(found, "budget", None)) is type(getattr(expected, "budget", None))


def test_the_default_trigger_of_a_callback_is_untouched() -> None:
    """stop_when_done is off unless it is asked for."""
    assert SplittingCallback().stop_when_done is False
    assert isinstance(two_splits().trigger, Every)
    assert widths(Classifier()) == (3, 8)
