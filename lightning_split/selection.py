"""Where to grow: which of the offered splits are worth their cost.

Pure functions of the candidates: no modules, no Lightning. A strategy is a frozen dataclass, so its
``repr`` is the log line. Results are ordered by group and neuron and do not depend on the order of
the candidates.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array
from torch import Tensor

COSTS = ("params", "macs")
SOLVERS = ("milp", "lp", "greedy")
# Branch and cut is exact up to _NUM_EXACT candidates. Beyond, it stops at 1e-4 of the gain, far
# below the sampling error of the gains and minutes earlier. Limits are counts, not times, so that
# the same candidates give the same choice on every machine.
_NUM_EXACT = 500
_NUM_NODES = 2000
_NUM_CUTS = 10


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
        through: The same for channelwise layers, see :class:`lightning_split.surgery.Split`.
        outgoing: The same for the outgoing weights.
        fixed: The part of ``displacements`` that does not grow with the step size; ``None`` for zero.
        order: The gain goes with this power of the step size.
        prediction: Predicted decrease of the loss, where ``gain`` is only a score to choose by; default
            the gain.
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
    through: Tensor | None = field(default=None, compare=False, repr=False)
    outgoing: Tensor | None = field(default=None, compare=False, repr=False)
    fixed: Tensor | None = field(default=None, compare=False, repr=False)
    order: int = 2
    prediction: float | None = None

    @property
    def predicted(self) -> float:
        """Predicted decrease of the loss."""
        return self.gain if self.prediction is None else self.prediction

    def at(self, ratio: float) -> Candidate:
        """The same split with a step size that is ``ratio`` times as large."""
        if ratio == 1 or self.displacements is None:
            return self
        moved = self.displacements
        moved = ratio * moved if self.fixed is None else self.fixed + ratio * (moved - self.fixed)
        power = ratio**self.order
        return replace(
            self,
            gain=self.gain * power,
            standard_error=self.standard_error * power,
            prediction=None if self.prediction is None else self.prediction * power,
            displacements=moved,
            outgoing=None if self.outgoing is None else ratio * self.outgoing,
        )


class SelectionStrategy(ABC):
    """Chooses among candidates; the seam for a strategy of your own.

    Set :attr:`cost` to ``"params"`` or ``"macs"``: it is what ``candidate.cost`` will hold. With
    :attr:`all_schemes` every neuron comes with all its schemes, which differ in gain and cost; without, with
    the one of largest gain.

    Example:
        >>> class FirstLayerOnly(SelectionStrategy):
        ...     def select(self, candidates):
        ...         return [c for c in best_per_neuron(candidates) if c.group == "0"]
        >>> offered = [Candidate("0", 3, gain=0.1), Candidate("2", 0, gain=0.5)]
        >>> [(c.group, c.neuron) for c in FirstLayerOnly().select(offered)]
        [('0', 3)]
    """

    cost: str = "params"
    all_schemes: ClassVar[bool] = False

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
        ValueError: If ``index`` is not finite or ``max_count`` is negative; in ``select``, if a
            gain or splitting index is not finite.

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
        best = _lowest(candidates, _index)
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
        solver: ``"milp"`` is exact up to 500 candidates and to 1e-4 of the total gain beyond
            (HiGHS, unless 2000 nodes do not suffice), ``"lp"`` is the relaxation of the paper,
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
        >>> a_quarter = KnapsackEnergy(budget=0.25).bind(network_cost=20.0)
        >>> [(c.group, c.neuron) for c in a_quarter.select(offered)]
        [('a', 0)]
    """

    all_schemes: ClassVar[bool] = True

    budget: int | float
    cost: str = "macs"
    solver: str = "milp"
    per_group_max: int | None = None
    network_cost: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not 0.0 <= self.budget < math.inf:
            raise ValueError(f"KnapsackEnergy needs a finite budget of at least 0, got {self.budget!r}.")
        for option, known in (("cost", COSTS), ("solver", SOLVERS)):
            if getattr(self, option) not in known:
                raise ValueError(
                    f"KnapsackEnergy does not know {option} {getattr(self, option)!r}; "
                    f"use one of {', '.join(known)}."
                )
        _check_count("KnapsackEnergy", "per_group_max", self.per_group_max, 1)
        if self.network_cost is not None and not 0.0 <= self.network_cost < math.inf:
            raise ValueError(
                f"KnapsackEnergy needs a finite network_cost of at least 0, got {self.network_cost!r}."
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
        _check_finite(candidates)
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

    def __init__(self, items: Sequence[Candidate], budget: float, per_group_max: int | None) -> None:
        self.items, self.budget = items, budget
        self.cap = len(items) if per_group_max is None else per_group_max
        # Tolerances of HiGHS are absolute, 1e-6: in these units they are 1e-9 of the largest gain
        # and of the budget.
        largest = max(c.gain for c in items)
        self.unit = max(largest / 1e3, sys.float_info.min)
        self.objective = np.array([-c.gain / self.unit for c in items])
        self.rows = [{i: 1e3 * c.cost / budget for i, c in enumerate(items)}]
        self.limits = [1e3]
        self._limit_each([(c.group, c.neuron) for c in items], 1)
        self._limit_each([c.group for c in items], self.cap)

    def _limit_each(self, keys: Sequence[Hashable], limit: int) -> None:
        """At most ``limit`` of the items that share a key."""
        members: dict[Hashable, dict[int, float]] = {}
        for i, key in enumerate(keys):
            members.setdefault(key, {})[i] = 1.0
        for row in members.values():
            if len(row) > limit:
                self.rows.append(row)
                self.limits.append(limit)

    def _matrix(self) -> csr_array:
        entries = [(r, i, value) for r, row in enumerate(self.rows) for i, value in row.items()]
        rows, columns, values = zip(*entries, strict=True)
        return csr_array((values, (rows, columns)), shape=(len(self.rows), len(self.items)))

    def exact(self) -> list[Candidate]:
        """The optimum to a relative ``tolerance`` of the total gain, by branch and cut."""
        tolerance = 1e-9 if len(self.items) <= _NUM_EXACT else 1e-4
        best, bound = self._relaxed()
        for _ in range(_NUM_CUTS):
            if _total_gain(best) >= bound * (1.0 - tolerance):
                break
            result = milp(
                self.objective,
                integrality=1,
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(self._matrix(), -math.inf, self.limits),
                options={"mip_rel_gap": tolerance, "node_limit": _NUM_NODES},
            )
            if result.x is None:  # none found within the node limit
                break
            chosen = [i for i, x in enumerate(result.x) if x > 0.5]
            if self._is_admissible(chosen):
                return max(best, self._filled(chosen), key=_total_gain)
            # Within the tolerances of HiGHS, but not exactly: these never go together, so say so.
            self.rows.append(dict.fromkeys(chosen, 1.0))
            self.limits.append(len(chosen) - 1)
        return best

    def rounded(self) -> list[Candidate]:
        """The linear relaxation rounded down, the rest of the budget filled up greedily."""
        return self._relaxed()[0]

    def _relaxed(self) -> tuple[list[Candidate], float]:
        """The rounded relaxation, and the bound on the total gain that the relaxation gives."""
        result = linprog(self.objective, A_ub=self._matrix(), b_ub=self.limits, bounds=(0, 1), method="highs")
        if result.x is None:
            return self.greedy(), math.inf
        chosen = [i for i in self._by_density() if result.x[i] >= 1.0 - 1e-9]
        while not self._is_admissible(chosen):
            chosen.pop()
        return self._filled(chosen), -float(result.fun) * self.unit

    def greedy(self) -> list[Candidate]:
        """The best gain per cost first, or the one best candidate if that is worth more."""
        filled = self._filled([])
        best = max(self.items, key=lambda c: c.gain)
        return max(filled, [best], key=_total_gain)

    def _is_admissible(self, chosen: Sequence[int]) -> bool:
        """Whether the limits hold exactly."""
        items = [self.items[i] for i in chosen]
        crowd = max(Counter(c.group for c in items).values(), default=0)
        return (
            math.fsum(c.cost for c in items) <= self.budget
            and len({(c.group, c.neuron) for c in items}) == len(items)
            and crowd <= self.cap
        )

    def _by_density(self) -> list[int]:
        items = self.items
        return sorted(range(len(items)), key=lambda i: -items[i].gain / items[i].cost)

    def _filled(self, chosen: list[int]) -> list[Candidate]:
        """The chosen items and whatever else still fits, best gain per cost first."""
        spent = math.fsum(self.items[i].cost for i in chosen)
        neurons = {(self.items[i].group, self.items[i].neuron) for i in chosen}
        groups = Counter(self.items[i].group for i in chosen)
        added: list[int] = []
        for i in self._by_density():
            c = self.items[i]
            if (c.group, c.neuron) in neurons or groups[c.group] >= self.cap:
                continue
            if spent + c.cost <= self.budget:
                added.append(i)
                spent += c.cost
                neurons.add((c.group, c.neuron))
                groups[c.group] += 1
        while added and not self._is_admissible(chosen + added):  # rounding of the running sum
            added.pop()
        return [self.items[i] for i in chosen + added]


def best_per_neuron(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidate of largest gain of every neuron, ordered by group and neuron.

    Args:
        candidates: In any order; ties go to the lower cost, then to the lower scheme name.

    Raises:
        ValueError: If a gain is not finite.

    Example:
        >>> offered = [Candidate("fc", 0, 0.1), Candidate("fc", 0, 0.3, scheme="quartet")]
        >>> [c.scheme for c in best_per_neuron(offered)]
        ['quartet']
    """
    return _lowest(candidates, lambda c: -c.gain)


def _total_gain(candidates: Iterable[Candidate]) -> float:
    return math.fsum(c.gain for c in candidates)


def _index(candidate: Candidate) -> float:
    """The splitting index, or the negative gain where there is none."""
    index = candidate.splitting_index
    return -candidate.gain if index is None else index


def _order(c: Candidate) -> tuple[str, int, str, float, float, tuple[float, ...]]:
    """Canonical order, so that no result depends on the order of the candidates."""
    return c.group, c.neuron, c.scheme, c.cost, -c.gain, c.weights


def _lowest(candidates: Iterable[Candidate], value: Callable[[Candidate], float]) -> list[Candidate]:
    """The candidate of lowest value of every neuron, in canonical order."""
    best: dict[tuple[str, int], Candidate] = {}
    candidates = list(candidates)
    _check_finite(candidates)
    for c in sorted(candidates, key=lambda c: (value(c), c.cost, _order(c))):
        best.setdefault((c.group, c.neuron), c)
    return sorted(best.values(), key=_order)


def _first(ranked: Iterable[Candidate], limit: int | None, per_group_max: int | None) -> list[Candidate]:
    """The first candidates within the limits, in canonical order."""
    taken: list[Candidate] = []
    groups: Counter[str] = Counter()
    for c in ranked:
        if limit is not None and len(taken) >= limit:
            break
        if per_group_max is None or groups[c.group] < per_group_max:
            taken.append(c)
            groups[c.group] += 1
    return sorted(taken, key=_order)


def _check_finite(candidates: Iterable[Candidate]) -> None:
    for c in candidates:
        for what, value in (("gain", c.gain), ("splitting index", _index(c))):
            if not math.isfinite(value):
                raise ValueError(
                    f"Neuron {c.neuron} of group '{c.group}' has {what} {value!r}; a strategy "
                    "needs finite numbers, so check the loss for NaN."
                )


def _check_count(strategy: str, option: str, count: object, least: int) -> None:
    if count is not None and (not isinstance(count, int) or count < least):
        raise ValueError(f"{strategy} needs {option} to be an integer of at least {least}, got {count!r}.")
