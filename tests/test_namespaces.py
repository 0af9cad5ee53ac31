"""``lightning.pytorch`` and ``pytorch_lightning``: one callback for both, which are different classes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning_split import Plateau, SplittingCallback
from lightning_split._compat import is_module, overrides
from lightning_utilities.core import rank_zero
from torch import nn

from modules import assert_same, loader, two_splits

other = pytest.importorskip("pytorch_lightning")
BOTH = [pl, other]


def _module(package: Any) -> Any:
    class Net(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3))

        def forward(self, batch: Any) -> Any:
            return self.net(batch[0])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01)

    return Net()


def _trainer(package: Any, path: Path, *callbacks: Any, **options: Any) -> Any:
    return package.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=path,
        callbacks=list(callbacks),
        **({"max_epochs": 1} | options),
    )


@pytest.mark.parametrize("package", BOTH, ids=["lightning", "pytorch_lightning"])
def test_either_trainer_grows_resumes_and_tests(tmp_path: Path, package: Any) -> None:
    """Two growths and an average that grows with them, an equal resume, a look at a smaller network."""

    def run(folder: Path, resume: str | None = None) -> tuple[Any, SplittingCallback, Any]:
        pl.seed_everything(0, verbose=False)
        module = _module(package)
        callback = two_splits(trigger=Plateau("train_loss", patience=1, min_delta=9.0))
        save = package.callbacks.ModelCheckpoint(
            folder, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True
        )
        ema = package.callbacks.EMAWeightAveraging(decay=0.9)
        t = _trainer(package, folder, callback, ema, save, max_epochs=5)
        t.fit(module, loader(), ckpt_path=resume)
        return module, callback, t

    module, callback, t = run(tmp_path)
    assert [e["epoch"] for e in callback.history] == [2, 4]
    assert module.net[1].out_features == 8
    again, second, _ = run(tmp_path / "again", str(tmp_path / "epoch=2.ckpt"))
    assert_same(second.history, callback.history)
    assert_same(dict(again.state_dict()), dict(module.state_dict()))
    t.predict(module, loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert module.net[1].out_features == 4


@pytest.mark.parametrize("package", BOTH, ids=["lightning", "pytorch_lightning"])
def test_either_package_is_told_apart(tmp_path: Path, package: Any) -> None:
    """Type checks accept the callback; refusals know the classes of both and raise what both catch."""
    callback = SplittingCallback()
    assert isinstance(callback, package.Callback)
    module = _module(package)
    assert is_module(module)
    assert overrides(module, "training_step")
    assert not overrides(module, "on_train_start")
    wrong = importlib.import_module(f"{package.__name__}.utilities.exceptions").MisconfigurationException
    pruned = _trainer(package, tmp_path, callback, package.callbacks.ModelPruning("l1_unstructured"))
    with pytest.raises(wrong, match="ModelPruning"):
        pruned.fit(module, loader())
    module.automatic_optimization = False
    with pytest.raises(wrong, match="manual optimization.*loss_fn="):
        _trainer(package, tmp_path, callback).fit(module, loader())
    strategy = package.strategies.ddp.DDPStrategy(start_method="spawn")
    t = _trainer(package, tmp_path, strategy=strategy, devices=2)
    t.strategy.connect(_module(package))
    with pytest.raises(wrong, match="enable_growth"):
        callback.setup(t, t.strategy.lightning_module, "fit")


def test_the_import_leaves_lightnings_messages_where_they_were() -> None:
    """Whichever package is imported last takes over the messages of both; our import must not."""
    assert rank_zero.log.name.startswith("lightning.")
