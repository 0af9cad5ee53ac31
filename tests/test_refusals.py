"""Strategies that shard parameters: refused by name, in one sentence, before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_split import SplittingCallback

from modules import Classifier, assert_same, loader, trainer, two_splits


@pytest.fixture
def _own_process_group() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _everything(module: pl.LightningModule, callback: SplittingCallback) -> Any:
    parts = [dict(vars(part), _trainer=None) for part in module.modules()]
    hooks = [{k: list(v) for k, v in part.items() if k.endswith("hooks")} for part in parts]
    tensors = [*module.parameters(), *module.buffers()]
    # the numbers of the objects tell a new parameter from an old one of the same value
    return [
        hooks,
        [sorted(part) for part in parts[1:]],  # the Trainer itself puts attributes on the root
        list(map(id, tensors)),
        [t.detach().clone() for t in tensors],
        callback.state_dict(),
    ]


def _assert_refuses(strategy: str, module: pl.LightningModule, fit: Callable[[pl.Callback], None]) -> None:
    callback = two_splits()
    before = deepcopy(_everything(module, callback))
    with pytest.raises(MisconfigurationException) as refusal:
        fit(callback)
    assert str(refusal.value) == (
        f"SplittingCallback cannot grow a network under {strategy}, which shards or rewrites its "
        "parameters; use one device or the 'ddp' strategy."
    )
    assert_same(_everything(module, callback), before)


@pytest.mark.usefixtures("_own_process_group")
def test_model_parallel_is_refused_by_name(tmp_path: Path) -> None:
    """In the setup of a real run, before ``configure_model`` shards anything; nothing has changed."""

    class Lazy(Classifier):
        def configure_model(self) -> None:
            raise AssertionError("comes after setup")

    module = Lazy()
    _assert_refuses(
        "ModelParallelStrategy",
        module,
        lambda callback: trainer(
            tmp_path, callback, strategy=ModelParallelStrategy(process_group_backend="gloo"), devices=1
        ).fit(module, loader()),
    )


def _deepspeed() -> DeepSpeedStrategy:
    return DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # whose __init__ wants the package


@pytest.mark.parametrize("make", [FSDPStrategy, _deepspeed])
def test_strategies_that_want_a_gpu_are_refused_by_name(tmp_path: Path, make: Callable[[], Any]) -> None:
    """Lightning does not start them on a CPU, so ``setup`` is called as it would be."""
    module, t, strategy = Classifier(), trainer(tmp_path), make()
    t._accelerator_connector.strategy = strategy
    name = type(strategy).__name__
    _assert_refuses(name, module, lambda callback: callback.setup(t, module, "fit"))
