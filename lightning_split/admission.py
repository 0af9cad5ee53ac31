"""What is refused before anything grows: arguments, set-ups, and networks on their first batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_split._compat import MisconfigurationException, twins
from lightning_split.context import GrowthContext
from lightning_split.growers import Grower
from lightning_split.growth import NothingToSplitError, select_groups
from lightning_split.optim import TrainerRanks, interfaces, refuse_strategy
from lightning_split.probing import quiet, refuse_unprobeable
from lightning_split.tracing import trace_step

__all__ = ["check_choice", "check_least", "check_patterns", "first_look", "refuse_setup"]

_PRUNING = twins("callbacks.ModelPruning")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError unless an argument is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_least(name: str, value: float | None, least: float) -> None:
    """Raise a ValueError if an argument is given and too small, or not a number."""
    if value is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_patterns(name: str, patterns: Sequence[str] | None) -> None:
    """Raise a ValueError if a list of patterns is a string, whose letters would be taken for patterns."""
    if isinstance(patterns, str):
        raise ValueError(f"{name} is a list of patterns; write {name}=[{patterns!r}].")


def refuse_setup(trainer: pl.Trainer, pl_module: pl.LightningModule, *, own_loss: bool) -> None:
    """Refuse a Trainer or a module under which growing cannot work; changes nothing.

    Args:
        trainer: In the setup of a fit.
        pl_module: Its module.
        own_loss: Whether the user gave a ``loss_fn``.

    Raises:
        MisconfigurationException: With one sentence that says what to do.
    """
    if any(isinstance(c, _PRUNING) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "SplittingCallback cannot grow layers that ModelPruning masks; use one of the two callbacks."
        )
    refuse_strategy(trainer)
    if not own_loss:
        refuse_unprobeable(pl_module)


def first_look(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    grower: Grower,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    barred: Mapping[str, str],
    seed: int,
) -> tuple[dict[str, int], dict[str, str], str]:
    """Refuse a network that cannot grow on its first batch, not when the first growth is due.

    Args:
        trainer: A Trainer inside ``fit``.
        pl_module: Its module; left as it was.
        batch: A training batch.
        loss_fn: What growths will measure.
        grower: Whose own conditions are checked, too.
        include: Patterns of groups that may grow.
        exclude: Patterns of groups that may not.
        barred: Groups known to be left alone, with reasons.
        seed: Of the passes.

    Returns:
        Widths of the groups that may grow (none if all are frozen, because a finetuning callback may thaw
        them later), groups between two optimizers with the reason to leave them alone, and a note of what
        could not be looked at.

    Raises:
        MisconfigurationException: With one sentence that says what to do.
    """
    with quiet(trainer, pl_module, seed=seed):
        arch = trace_step(pl_module, batch, loss_fn)
    between = interfaces(trainer, pl_module, arch)
    try:
        groups = select_groups(arch.without({**barred, **between}), include, exclude)
        with quiet(trainer, pl_module, seed=seed):
            ranks = TrainerRanks(trainer)
            grower.check(GrowthContext(pl_module, groups, loss_fn, [batch], seed=seed, ranks=ranks))
    except ValueError as error:
        if not (isinstance(error, NothingToSplitError) and error.frozen):
            raise MisconfigurationException(str(error)) from None
        later = f"{error} It is looked at again whenever a growth is due."
        return {}, between, f"{arch.note} {later}".strip()
    return groups.widths, between, arch.note
