"""Whoever else in a Trainer holds the network: other processes, averages of its weights, compilers."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lightning_split._compat import twins
from lightning_split.optim import carry_all
from lightning_split.report import GrowthReport
from lightning_split.surgery import split_neurons

__all__ = ["averaging_done", "follow", "grow_shadow", "rewrap", "shadow_models", "share_buffers"]

_DDP = twins("strategies.DDPStrategy")
_SWA = twins("callbacks.StochasticWeightAveraging")


def follow(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    report: GrowthReport,
    optimizer_state: Literal["transfer", "reset"],
    lr_schedule: Literal["keep", "restart"],
) -> None:
    """Let all of them follow a growth, and the optimizers; to be called on every process.

    Args:
        trainer: A Trainer inside ``fit``.
        pl_module: Its module, which has grown.
        report: What has grown.
        optimizer_state: See :func:`~lightning_split.optim.carry_all`.
        lr_schedule: See :func:`~lightning_split.optim.carry_all`.
    """
    for shadow in shadow_models(trainer):
        grow_shadow(shadow, report)
    rewrap(trainer, pl_module)
    carry_all(trainer, report.replaced, optimizer_state, lr_schedule)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # each growth is one recompilation; without this, eight are the limit


def grow_shadow(shadow: nn.Module, report: GrowthReport) -> None:
    """Split the neurons of an average of the weights as those of the model were split.

    Where a parametrization cannot compute averaged weights so far from where they were (an exponential,
    below zero), the offspring stay with their parents; the average follows the model from there.
    """
    try:
        split_neurons(shadow, report.splits, arch=report.architecture)
    except ValueError:
        still = [
            replace(s, displacements=torch.zeros_like(s.displacements), through=None, outgoing=None)
            for s in report.splits
        ]
        split_neurons(shadow, still, arch=report.architecture)


def share_buffers(trainer: pl.Trainer) -> None:
    """Give every process the first one's buffers now, as DDP does before its next forward pass.

    Until then each process has BatchNorm statistics of its own data, while a checkpoint has those of
    the first: measured with its own, a resumed run would grow differently.
    """
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and model._check_sync_bufs_pre_fwd():
        model._sync_buffers()


def rewrap(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Wrap a grown module for DDP anew; nothing to do on one device.

    The old wrapper's reducer knows the old parameters: left in place it fails, or with
    ``find_unused_parameters`` lets the ranks drift apart silently. The user's DDP arguments and
    hooks stay.
    """
    strategy: Any = trainer.strategy
    if strategy.model is pl_module or not isinstance(strategy, _DDP):
        return
    strategy.model = pl_module
    strategy.configure_ddp()
    # Else manual optimization with static_graph never delays the first all-reduce again, and ranks
    # drift.
    strategy._pl_static_graph_delay_done = False


def shadow_models(trainer: pl.Trainer) -> list[nn.Module]:
    """The copies of the module that averaging callbacks (EMA, SWA) hold; they must grow with it."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        shadow = getattr(callback, "_average_model", None)
        if isinstance(shadow, nn.Module):
            found.append(shadow.module if isinstance(shadow, AveragedModel) else shadow)
    return found


def averaging_done(trainer: pl.Trainer) -> bool:
    """Whether SWA has put its average in the module, for an extra epoch that only updates BatchNorm.

    What grew in there would be measured without BatchNorm's statistics, and never be trained.
    """
    averaging = [c for c in trainer.callbacks if isinstance(c, _SWA)]  # type: ignore[attr-defined]
    return any(trainer.current_epoch > c.swa_end for c in averaging)
