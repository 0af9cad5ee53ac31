"""Budgets: how much one growth may add, as a number, a share of the network, or a step of a whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Budget", "Target", "allowance", "check_budget"]


@dataclass(frozen=True)
class Target:
    """A budget for the whole run: what the network shall cost in the end, approached in several growths.

    The way from the first network to the target has ``growths`` milestones, and a growth may go to the next
    one. What a growth leaves unspent the next one may spend. Nothing but the cost of the first network is
    remembered, and the callback keeps that in its checkpoints.

    Args:
        growths: In how many growths the target is reached, if there is enough worth splitting.
        factor: The target as a multiple of the first network's cost.
        total: The target as a cost, instead of ``factor``.
        spread: ``"geometric"`` multiplies the cost alike in every growth, ``"equal"`` adds alike.

    Raises:
        ValueError: If not exactly one of ``factor`` and ``total`` is given, or an argument is out of range.

    Example:
        >>> [Target(3, factor=8.0).allowance(now, first=10.0) for now in (10.0, 19.0, 40.0, 80.0)]
        [10.0, 21.0, 40.0, 0.0]
    """

    growths: int
    factor: float | None = None
    total: float | None = None
    spread: Literal["geometric", "equal"] = "geometric"

    def __post_init__(self) -> None:
        """Check the arguments."""
        growths: object = self.growths
        if isinstance(growths, bool) or not isinstance(growths, int) or growths < 1:
            raise ValueError(f"Target needs growths to be an integer of at least 1, got {self.growths!r}.")
        if (self.factor is None) == (self.total is None):
            raise ValueError(
                "Target takes either factor (a multiple of the first network's cost) or total (a cost)."
            )
        if self.factor is not None and not 1.0 <= self.factor < math.inf:
            raise ValueError(f"Target needs a finite factor of at least 1, got {self.factor!r}.")
        if self.total is not None and not 0.0 <= self.total < math.inf:
            raise ValueError(f"Target needs a finite total of at least 0, got {self.total!r}.")
        if self.spread not in ("geometric", "equal"):
            raise ValueError(f"Target does not know spread {self.spread!r}; use 'geometric' or 'equal'.")

    def allowance(self, now: float, first: float | None = None) -> float:
        """What the next growth may add.

        Args:
            now: What the network costs.
            first: What it cost before its first growth; if that is not known, this is the first.
        """
        first = now if first is None else first
        total = first * self.factor if self.factor is not None else float(self.total or 0.0)
        if total <= now:
            return 0.0
        # A milestone counts as reached from half a step before it, for a knapsack leaves a little unspent.
        geometric = self.spread == "geometric" and first > 0
        if geometric:
            done = math.log(now / first) / math.log(total / first) * self.growths
        else:
            done = (now - first) / (total - first) * self.growths
        milestone = min(self.growths, max(0, math.floor(done + 0.5)) + 1)
        share = milestone / self.growths
        if milestone == self.growths:
            goal = total
        else:
            goal = first * (total / first) ** share if geometric else first + (total - first) * share
        # One unit in the last place is not worth a quarrel: 10 * 8 ** (1 / 3) is 20.
        return max(0.0, round(goal, 9) - now)


Budget = int | float | Target


def check_budget(strategy: str, budget: object) -> None:
    """Refuse what is no budget.

    Raises:
        ValueError: With one sentence.
    """
    if isinstance(budget, Target):
        return
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not number or not 0.0 <= float(budget) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{strategy} needs a finite budget of at least 0, got {budget!r}.")


def allowance(budget: Budget, network_cost: float, seed_cost: float | None) -> float:
    """What a budget allows one growth to add to a network of some cost."""
    if isinstance(budget, Target):
        return budget.allowance(network_cost, seed_cost)
    if isinstance(budget, float) and budget <= 1.0:
        return budget * network_cost
    return float(budget)
