"""What is refused before anything grows: arguments, set-ups, and networks on their first batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_split._compat import MisconfigurationException, twins
from lightning_split.context import GrowthContext
from lightning_split.curvature import LossFn
from lightning_split.effective import EffectiveWeights
from lightning_split.followers import find_followers, may_follow, untouched
from lightning_split.growers import Grower
from lightning_split.growth import NothingToSplitError, select_groups
from lightning_split.measuring import undisturbed
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


@dataclass(frozen=True)
class FirstLook:
    """What the first batch tells of a network."""

    widths: dict[str, int]  # of the groups that may grow; none if all are frozen: they may thaw later
    barred: dict[str, str]  # groups between two optimizers, with the reason to leave them alone
    followers: dict[str, str]  # copies of parts of it that nobody trains, and what they are copies of
    note: str  # what could not be looked at


def first_look(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    *,
    loss_fn: LossFn,
    grower: Grower,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    barred: Mapping[str, str],
    followers: Mapping[str, str],
    seed: int,
) -> FirstLook:
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
        followers: Copies that are known from before a resume.
        seed: Of the passes.

    Raises:
        MisconfigurationException: With one sentence that says what to do.
    """
    followers = {**_followers(trainer, pl_module, batch, loss_fn, seed), **followers}
    with quiet(trainer, pl_module, seed=seed):
        arch = trace_step(pl_module, batch, loss_fn, followers)
    between = interfaces(trainer, pl_module, arch)
    try:
        groups = select_groups(arch.without({**barred, **between}), include, exclude)
        with quiet(trainer, pl_module, seed=seed):
            ranks = TrainerRanks(trainer)
            with EffectiveWeights(pl_module):
                grower.check(GrowthContext(pl_module, groups, loss_fn, [batch], seed=seed, ranks=ranks))
    except ValueError as error:
        if not (isinstance(error, NothingToSplitError) and error.frozen):
            raise MisconfigurationException(str(error)) from None
        later = f"{error} It is looked at again whenever a growth is due."
        return FirstLook({}, between, followers, f"{arch.note} {later}".strip())
    return FirstLook(groups.widths, between, followers, arch.note)


def _followers(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, loss_fn: LossFn, seed: int
) -> dict[str, str]:
    held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}

    def held_by_optimizer(module: nn.Module) -> bool:
        return any(p.requires_grad and id(p) in held for p in module.parameters())

    def has_gradient(module: nn.Module) -> bool:
        return held_by_optimizer(module) and not untouched(loss, module)

    found = find_followers(pl_module, held_by_optimizer)
    if found or not pl_module.automatic_optimization or not may_follow(pl_module):
        return found
    # An optimizer may hold a copy that no loss reaches.
    with quiet(trainer, pl_module, seed=seed), undisturbed(pl_module, train=False):
        loss = loss_fn(pl_module, batch)
        return find_followers(pl_module, has_gradient)
