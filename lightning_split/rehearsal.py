"""The widened network on the check batch before it is kept: does every layer read what it read?"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_split.architecture import Architecture
from lightning_split.curvature import LossFn
from lightning_split.deciding import as_split
from lightning_split.measuring import undisturbed
from lightning_split.readings import Readings, readings, what_broke
from lightning_split.selection import Candidate
from lightning_split.surgery import Surgery

__all__ = ["checked_readings", "culprit", "first_break"]


def checked_readings(
    model: nn.Module, arch: Architecture, batch: Any, loss_fn: LossFn, seed: int
) -> Readings:
    """What every layer reads on the check batch, in eval mode."""
    with undisturbed(model, train=False, seed=seed):
        return readings(model, lambda m: loss_fn(m, batch))


def first_break(
    model: nn.Module,
    arch: Architecture,
    surgery: Surgery,
    before: Readings,
    batch: Any,
    loss_fn: LossFn,
    seed: int,
) -> str | None:
    """What a trial of the widened network on the check batch breaks; the model is as before afterwards."""
    with undisturbed(model, train=False, seed=seed):
        surgery.apply()
        try:
            after = readings(model, lambda m: loss_fn(m, batch))
        except Exception as error:
            # The user's forward pass fails at the new width: its own words are the reason.
            first = str(error).strip().splitlines() or [type(error).__name__]
            return f"after growth the forward pass fails: {first[0]}"
        finally:
            surgery.revert()
    return what_broke(before, after, surgery, compare_outputs=False)


def culprit(
    model: nn.Module,
    arch: Architecture,
    chosen: list[Candidate],
    before: Readings,
    batch: Any,
    loss_fn: LossFn,
    seed: int,
) -> str:
    """The first group that breaks the network by itself (or the first of all, if only together)."""
    names = list(dict.fromkeys(c.group for c in chosen))
    for name in names:
        surgery = Surgery(model, [as_split(c) for c in chosen if c.group == name], arch)
        if first_break(model, arch, surgery, before, batch, loss_fn, seed) is not None:
            return name
    return names[0]
