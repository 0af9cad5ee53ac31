"""LightningCLI: the callback and its parts from YAML, from the command line, and its help."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_split import Every, KnapsackEnergy, SplittingCallback, SteepestSplitting, TopK
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = [  # Lightning's calls of jsonargparse
    pytest.mark.filterwarnings(r"ignore:\s*By default only one Jsonargparse:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*.*was deprecated in v4:DeprecationWarning"),
]


class Deeper(BoringModel):
    """BoringModel with a hidden layer; named so that a command line can find it."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 2))


def _quiet(folder: Path) -> list[str]:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return [
        *(f"--trainer.{name}=false" for name in quiet),
        "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=0",
        f"--trainer.default_root_dir={folder}",
    ]


NESTED = [
    "--trainer.callbacks+=lightning_split.SplittingCallback",
    "--trainer.callbacks.strategy=TopK",
    "--trainer.callbacks.strategy.count=3",
    "--trainer.callbacks.grower=SteepestSplitting",
    "--trainer.callbacks.grower.solver=Lanczos",
    "--trainer.callbacks.grower.solver.num_products=4",
    "--trainer.callbacks.trigger=Every",
    "--trainer.callbacks.trigger.n=1",
    "--trainer.callbacks.num_batches=1",
    "--trainer.callbacks.confirm_batches=1",
    "--trainer.callbacks.verbose=false",
]

AS_YAML = """
class_path: lightning_split.SplittingCallback
init_args:
  strategy: {class_path: lightning_split.TopK, init_args: {count: 3}}
  grower:
    class_path: lightning_split.SteepestSplitting
    init_args:
      solver: {class_path: lightning_split.Lanczos, init_args: {num_products: 4}}
  trigger: {class_path: lightning_split.Every, init_args: {n: 1}}
  num_batches: 1
  confirm_batches: 1
  verbose: false
"""


@pytest.mark.parametrize("form", ["arguments", "yaml", "dict"])
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Strategy, grower, solver and trigger can be named by class, nested, as LightningCLI does it."""
    yaml = pytest.importorskip("yaml")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": 3,
        "limit_train_batches": 4,
        "limit_val_batches": 1,
        "default_root_dir": str(tmp_path),
    }
    args: Any
    if form == "arguments":
        args = [
            "fit",
            "--seed_everything=0",
            *(f"--trainer.{k}={str(v).lower() if v is False else v}" for k, v in quiet.items()),
        ]
        args += NESTED
    else:
        config = {"seed_everything": 0, "trainer": quiet | {"callbacks": [yaml.safe_load(AS_YAML)]}}
        args = {"subcommand": "fit", "fit": config}
        if form == "yaml":
            path = tmp_path / "config.yaml"
            path.write_text(yaml.safe_dump(config))
            args = ["fit", f"--config={path}"]
    cli = LightningCLI(Deeper, args=args, save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, SplittingCallback)]
    assert callback.strategy == TopK(count=3)
    assert isinstance(callback.grower, SteepestSplitting)
    splits = [e["num_splits"] for e in callback.history]  # as many of three as gain something
    assert len(splits) == 2
    assert set(splits) <= {1, 2, 3}
    assert cli.model.layer[0].out_features == 4 + sum(splits)


def test_the_other_namespaces_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch_lightning's CLI checks the type of what it puts into its Trainer."""
    other = pytest.importorskip("pytorch_lightning")
    importlib.import_module("pytorch_lightning.cli")
    boring = importlib.import_module("pytorch_lightning.demos.boring_classes").BoringModel

    class Deep(boring):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 2))

    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = ["fit", *_quiet(tmp_path), "--trainer.max_epochs=2", "--trainer.limit_train_batches=2", *NESTED]
    cli = other.cli.LightningCLI(Deep, args=args, save_config_callback=None)
    assert 4 < cli.model.layer[0].out_features <= 7


def _example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    return importlib.import_module("cli")


def test_the_example_runs_and_its_file_can_be_overridden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values and whole objects from the command line take the place of those in examples/config.yaml."""
    monkeypatch.chdir(tmp_path)
    config = ["fit", f"--config={EXAMPLES / 'config.yaml'}", "--trainer.max_epochs=2"]
    overrides = ["trigger=Every", "trigger.n=1", "strategy.budget=0.9", "significance=null"]
    cli = _example(monkeypatch).main(config + [f"--trainer.callbacks.{o}" for o in overrides])
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, SplittingCallback)]
    assert isinstance(callback.trigger, Every)
    assert isinstance(callback.strategy, KnapsackEnergy)
    assert callback.strategy.budget == 0.9
    assert callback.grower.solver.num_products == 8
    assert [e["epoch"] for e in callback.history] == [1]
    assert callback.history[0]["num_splits"] > 1
    assert isinstance(cli.trainer.logger, pl.loggers.CSVLogger)
    assert "Growth 1 at epoch 1" in capsys.readouterr().out
    assert (tmp_path / "runs" / "cli" / "version_0" / "config.yaml").exists()


def test_help_says_what_the_docstrings_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each argument of the callback, and of a part of it, is explained."""
    cli = _example(monkeypatch)
    with pytest.raises(SystemExit):
        cli.main(["fit", "--trainer.callbacks.help=lightning_split.SplittingCallback"])
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "Grow the network by splitting neurons whenever training stops making progress",
        "--trainer.callbacks.patience PATIENCE Epochs without improvement before a growth.",
        "lightning_split.Plateau",
        "lightning_split.Every",
        "lets moments follow their neurons",
    ):
        assert text in printed
    with pytest.raises(SystemExit):
        cli.main(["fit", "--trainer.callbacks=SplittingCallback", "--trainer.callbacks.trigger.help=Plateau"])
    assert "Grow after so many values in a row without improvement" in " ".join(
        capsys.readouterr().out.split()
    )
