"""Where to grow: which of the offered splits are worth their cost.

Pure functions of the candidates: no modules, no Lightning. A strategy is a frozen dataclass, so its
``repr`` is the log line. Results are ordered by group and neuron and do not depend on the order of
the candidates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array
from torch import Tensor

COSTS = ("params", "macs")
SOLVERS = ("milp", "lp", "greedy")


@dataclass(frozen=True)
class Candidate:
    """One way to split one neuron, with what it promises and what it costs.

    A neuron may have several candidates (schemes); a strategy chooses at most one of them.

    Args:
        group: Name of the channel group.
        neuron: Index of the neuron within the group.
        gain: Predicted decrease of the loss; positive is good.
        cost: What the split adds, in the unit that the strategy asks for.
        splitting_index: The eigenvalue, or the value of the scheme, behind the gain.
        standard_error: Of the gain.
        scheme: Name of the scheme.
        weights: Offspring weights, which sum to 1.
        displacements: ``(m, dim)``, one row per offspring, step size included.
    """

    group: str
    neuron: int
    gain: float
    cost: float = 1.0
    splitting_index: float | None = None
    standard_error: float = 0.0
    scheme: str = "binary"
    weights: tuple[float, ...] = ()
    displacements: Tensor | None = field(default=None, compare=False, repr=False)


class SelectionStrategy(ABC):
    """Chooses among candidates; the seam for a strategy of your own.

    Set :attr:`cost` to ``"params"`` or ``"macs"``: it is what ``candidate.cost`` will hold.

    Example:
        >>> class FirstLayerOnly(SelectionStrategy):
        ...     def select(self, candidates):
        ...         return [c for c in best_per_neuron(candidates) if c.group == "0"]
        >>> FirstLayerOnly().select([Candidate("0", 3, gain=0.1), Candidate("2", 0, gain=0.5)])
        [Candidate(group='0', neuron=3, gain=0.1, ...)]
    """

    cost: str = "params"

    @abstractmethod
    def select(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates to carry out, at most one per neuron.

        Args:
            candidates: What the grower offers, in any order.

        Returns:
            Some of the given candidates.
        """

    def bind(self, network_cost: float) -> SelectionStrategy:
        """This strategy for a network of the given total cost, in the unit of :attr:`cost`."""
        return self


@dataclass(frozen=True)
class TopK(SelectionStrategy):
    """The neurons with the largest gains, over all groups together.

    Only positive gains count, and of every neuron its best scheme. Ties go to the lower group name,
    then to the lower neuron. ``TopK()`` is ``TopK(fraction=0.3)``, the share of splitting steepest
    descent.

    Args:
        fraction: Share of the distinct neurons among the candidates, between 0 and 1, rounded up.
        count: Number of neurons, instead of ``fraction``.
        per_group_max: At most so many neurons of one group.

    Raises:
        ValueError: If both ``fraction`` and ``count`` are given or an argument is out of range;
            in ``select``, if a gain is not finite.

    References:
        Liu, Wu, Wang (2019), arXiv:1910.02366.

    Example:
        >>> gains = [0.1, 0.4, -0.2, 0.3]
        >>> offered = [Candidate("fc", i, gain) for i, gain in enumerate(gains)]
        >>> [c.neuron for c in TopK(fraction=0.5).select(offered)]
        [1, 3]
    """

    fraction: float | None = None
    count: int | None = None
    per_group_max: int | None = None

    def __post_init__(self) -> None:
        """Fill in the default and check the arguments."""
        if self.fraction is not None and self.count is not None:
            raise ValueError("TopK takes fraction or count, not both; leave one of them out.")
        if self.fraction is None and self.count is None:
            object.__setattr__(self, "fraction", 0.3)
        if self.fraction is not None and not 0.0 <= self.fraction <= 1.0:
            raise ValueError(
                f"TopK needs a fraction between 0 and 1, got {self.fraction!r}; "
                "for a number of neurons pass count."
            )
        _check_count("TopK", "count", self.count, 0)
        _check_count("TopK", "per_group_max", self.per_group_max, 1)

    def select(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The best neurons; see :meth:`SelectionStrategy.select`."""
        best = best_per_neuron(candidates)
        if self.count is not None:
            limit = self.count
        else:
            # The margin keeps 0.07 * 100 = 7.000000000000001 from becoming 8.
            limit = math.ceil((self.fraction or 0.0) * len(best) * (1.0 - 1e-12))
        ranked = sorted((c for c in best if c.gain > 0.0), key=lambda c: -c.gain)
        return _first(ranked, limit, self.per_group_max)


@dataclass(frozen=True)
class Threshold(SelectionStrategy):
    """Every neuron whose splitting index is at or below a threshold.

    The papers' rule. A candidate without a splitting index is judged by its negative gain; one that
    has an index is judged by it alone. Of every neuron the candidate of lowest index counts.

    Args:
        index: Largest splitting index to split at; usually negative.
        max_count: At most so many neurons, the most negative first.

    Raises:
        ValueError: If ``index`` is not finite or ``max_count`` is negative; in ``select``, if a gain
            or splitting index is not finite.

    References:
        Liu, Wu, Wang (2019), arXiv:1910.02366.

    Example:
        >>> offered = [Candidate("fc", 0, 0.2, splitting_index=-0.4), Candidate("fc", 1, 5e-4)]
        >>> [c.neuron for c in Threshold(-1e-3).select(offered)]
        [0]
    """

    index: float
    max_count: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not math.isfinite(self.index):
            raise ValueError(f"Threshold needs a finite splitting index, got {self.index!r}.")
        _check_count("Threshold", "max_count", self.max_count, 0)

    def select(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The neurons at or below the threshold; see :meth:`SelectionStrategy.select`."""
        best = _best(candidates, _index)
        ranked = sorted((c for c in best if _index(c) <= self.index), key=_index)
        return _first(ranked, self.max_count, None)


@dataclass(frozen=True)
class KnapsackEnergy(SelectionStrategy):
    """The largest total gain that a budget can pay for.

    Maximises the sum of the gains subject to the sum of the costs being at most the budget, with at
    most one candidate per neuron. Nothing is chosen if no gain is positive or the budget is below
    the cheapest split.

    Args:
        budget: A float up to 1 is a fraction of the total cost of the network that the strategy is
            bound to, and of the sum of the candidates' costs as long as it is not bound; anything
            else is absolute (the int ``1`` is one unit of cost).
        cost: ``"params"`` or ``"macs"``: what a split costs.
        solver: ``"milp"`` is exact (HiGHS, to its node limit), ``"lp"`` the relaxation of the paper,
            rounded down and filled up greedily, ``"greedy"`` takes the best gain per cost first.
        per_group_max: At most so many neurons of one group.
        network_cost: Total cost of the network; set by :meth:`bind`.

    Raises:
        ValueError: If an argument is out of range; in ``select``, if a gain is not finite or a cost
            is not positive.

    References:
        Wang et al. (2019), arXiv:1910.03103.

    Example:
        >>> offered = [
        ...     Candidate("a", 0, gain=6.0, cost=5.0),
        ...     Candidate("b", 0, gain=4.0, cost=3.0),
        ...     Candidate("b", 1, gain=4.0, cost=3.0),
        ... ]
        >>> [(c.group, c.neuron) for c in KnapsackEnergy(budget=6).select(offered)]
        [('b', 0), ('b', 1)]
        >>> KnapsackEnergy(budget=0.25, cost="params").bind(network_cost=20.0).select(offered)
        [Candidate(group='a', neuron=0, gain=6.0, cost=5.0, ...)]
    """

    budget: float
    cost: str = "macs"
    solver: str = "milp"
    per_group_max: int | None = None
    network_cost: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not 0.0 <= self.budget < math.inf:
            raise ValueError(
                f"KnapsackEnergy needs a finite budget of at least 0, got {self.budget!r}."
            )
        for option, known in (("cost", COSTS), ("solver", SOLVERS)):
            if getattr(self, option) not in known:
                raise ValueError(
                    f"KnapsackEnergy does not know {option} {getattr(self, option)!r}; "
                    f"use one of {', '.join(known)}."
                )
        _check_count("KnapsackEnergy", "per_group_max", self.per_group_max, 1)
        if self.network_cost is not None and not 0.0 <= self.network_cost < math.inf:
            raise ValueError(
                f"KnapsackEnergy needs a finite network_cost of at least 0, "
                f"got {self.network_cost!r}."
            )

    def bind(self, network_cost: float) -> KnapsackEnergy:
        """A copy whose fractional budget refers to the given total cost of the network."""
        return replace(self, network_cost=network_cost)

    def select(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The most valuable affordable candidates; see :meth:`SelectionStrategy.select`."""
        for c in candidates:
            if not 0.0 < c.cost < math.inf:
                raise ValueError(
                    f"Neuron {c.neuron} of group '{c.group}' has cost {c.cost!r}; KnapsackEnergy "
                    "needs positive finite costs."
                )
        _check_finite(candidates, "gain", lambda c: c.gain)
        budget = float(self.budget)
        if isinstance(self.budget, float) and self.budget <= 1.0:
            total = self.network_cost
            budget *= math.fsum(c.cost for c in candidates) if total is None else total
        items = sorted((c for c in candidates if c.gain > 0.0 and c.cost <= budget), key=_order)
        if not items:
            return []
        knapsack = _Knapsack(items, budget, self.per_group_max)
        solve = {"milp": knapsack.exact, "lp": knapsack.rounded, "greedy": knapsack.greedy}
        return sorted(solve[self.solver](), key=_order)


class _Knapsack:
    """Affordable items of positive gain, in canonical order, and what limits their choice."""

    def __init__(
        self, items: Sequence[Candidate], budget: float, per_group_max: int | None
    ) -> None:
        self.items, self.budget, self.per_group_max = items, budget, per_group_max
        self.gains = np.array([c.gain for c in items])
        costs = np.array([c.cost for c in items])
        self.rows, self.limits = [costs / budget], [1.0]
        neurons = _classes([(c.group, c.neuron) for c in items], len(items))
        self._limit((members for members in neurons if members.sum() > 1), 1.0)
        if per_group_max is not None:
            groups = _classes([c.group for c in items], len(items))
            self._limit((m for m in groups if m.sum() > per_group_max), float(per_group_max))

    def _limit(self, rows: Iterable[np.ndarray], limit: float) -> None:
        for row in rows:
            self.rows.append(row)
            self.limits.append(limit)
