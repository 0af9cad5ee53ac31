"""Where to grow: which of the offered splits are worth their cost.

Functions of the candidates. A strategy is a frozen dataclass, so its ``repr`` is the log line. Results are
ordered by group and neuron and do not depend on the order of the candidates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

from lightning_split.budgets import Target, allowance, check_budget
from lightning_split.candidates import (
    Candidate,
    best_per_neuron,
    canonical,
    check_finite,
    in_order,
    lowest_per_neuron,
)
from lightning_split.costs import CostLike, as_cost
from lightning_split.items import solve_items
from lightning_split.knapsack import Solver, solve_counts
from lightning_split.menus import Rules
from lightning_split.pricing import Limit, NetworkPrices, Prices

__all__ = [
    "Candidate",
    "KnapsackEnergy",
    "SelectionStrategy",
    "Threshold",
    "TopK",
    "best_per_neuron",
]

SOLVERS = get_args(Solver)


class SelectionStrategy(ABC):
    """Chooses among candidates; the seam for a strategy of your own.

    Set :attr:`cost` to the name of a cost, a :class:`~lightning_split.costs.Cost` or a function of a channel
    group: it is what ``candidate.cost`` will hold. With :attr:`all_schemes` every neuron comes with all its
    schemes, which differ in gain and cost; without, with the one of largest gain.

    Example:
        >>> class FirstLayerOnly(SelectionStrategy):
        ...     def select(self, candidates):
        ...         return [c for c in best_per_neuron(candidates) if c.group == "0"]
        >>> offered = [Candidate("0", 3, gain=0.1), Candidate("2", 0, gain=0.5)]
        >>> [(c.group, c.neuron) for c in FirstLayerOnly().select(offered)]
        [('0', 3)]
    """

    cost: CostLike = "params"
    all_schemes: ClassVar[bool] = False

    @abstractmethod
    def select(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates to carry out, at most one per neuron.

        Args:
            candidates: What the grower offers, in any order.

        Returns:
            Some of the given candidates.
        """

    def bind(self, network: NetworkPrices) -> SelectionStrategy:
        """This strategy for the network as it is now: its cost, its widths and what growth adds."""
        return self

    def budget_of(self, network: NetworkPrices) -> float | None:
        """What a growth of this network may add, in the unit of :attr:`cost`; ``None`` for no bound."""
        return None

    def why_left(self, candidate: Candidate, *, splits: int, new: int) -> str:
        """In a few words, for the report, why a candidate of positive gain was not chosen.

        Args:
            candidate: The best one of its neuron.
            splits: How many neurons of its group were chosen.
            new: By how many neurons its group grows.
        """
        return f"not chosen by {type(self).__name__}"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs in order to choose alike: plain numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved state."""
        return None


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

    def why_left(self, candidate: Candidate, *, splits: int, new: int) -> str:
        """See :meth:`SelectionStrategy.why_left`."""
        if self.per_group_max is not None and splits >= self.per_group_max:
            return f"beyond the {self.per_group_max} of their group"
        return f"beyond the best {self.count if self.count is not None else format(self.fraction, '.0%')}"


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
        best = lowest_per_neuron(candidates, _index)
        ranked = sorted((c for c in best if _index(c) <= self.index), key=_index)
        return _first(ranked, self.max_count, None)

    def why_left(self, candidate: Candidate, *, splits: int, new: int) -> str:
        """See :meth:`SelectionStrategy.why_left`."""
        above = _index(candidate) > self.index
        return f"above the threshold of {self.index:g}" if above else f"beyond the best {self.max_count}"


@dataclass(frozen=True)
class KnapsackEnergy(SelectionStrategy):
    """The largest total gain that a budget can pay for.

    Maximises the sum of the gains subject to the added cost being at most the budget, with at most one
    candidate per neuron. Within :func:`~lightning_split.grow` and the callback, the added cost is that of
    the grown network to the last unit: two groups that grow on both sides of one weight cost more than each
    by itself. Limits such as ``max_params`` are further constraints of the same programme. On bare
    candidates their costs are summed. Nothing is chosen if no gain is positive or the budget is below the
    cheapest split.

    Args:
        budget: A float up to 1 is a fraction of the cost of the network, and on bare candidates of the sum of
            their costs; a :class:`Target` is a budget for the whole run; anything else is absolute (the int
            ``1`` is one unit of cost).
        cost: What a split costs: ``"params"``, ``"macs"``, ``"activations"``, ``"energy"``, a
            :class:`~lightning_split.costs.Cost` such as :class:`MeasuredLatency`, or a function that maps a
            channel group to the cost of one more neuron.
        solver: ``"milp"`` takes the optimum (HiGHS; proved up to 2000 candidates, and within 1e-6 of the
        bound
            beyond; where groups make each other dearer, proved up to 65536 combinations of widths), ``"lp"``
            the relaxation of the paper, rounded down and filled up, ``"greedy"`` the best gain per cost
            first.
        per_group_max: At most so many neurons of one group are split.
        max_factor: No group grows to more than this multiple of its width; ``None`` sets no bound.
        round_to: A group grows to a width that is a multiple of this, or not at all. (On bare candidates the
            width is taken for a multiple.)

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
        >>> [(c.group, c.neuron) for c in KnapsackEnergy(budget=0.5).select(offered)]
        [('a', 0)]
    """

    all_schemes: ClassVar[bool] = True

    budget: int | float | Target
    cost: CostLike = "macs"
    solver: Literal["milp", "lp", "greedy"] = "milp"
    per_group_max: int | None = None
    max_factor: float | None = 2.0
    round_to: int = 1
    _network: NetworkPrices | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_budget("KnapsackEnergy", self.budget)
        as_cost(self.cost)
        if self.solver not in SOLVERS:
            raise ValueError(
                f"KnapsackEnergy does not know solver {self.solver!r}; use one of {', '.join(SOLVERS)}."
            )
        _check_count("KnapsackEnergy", "per_group_max", self.per_group_max, 1)
        _check_count("KnapsackEnergy", "round_to", self.round_to, 1)
        if self.max_factor is not None and not 1.0 <= self.max_factor < math.inf:
            raise ValueError(
                f"KnapsackEnergy needs a finite max_factor of at least 1, got {self.max_factor!r}."
            )

    def bind(self, network: NetworkPrices | float) -> KnapsackEnergy:
        """A copy that knows the network; a number stands for a network of that cost."""
        if not isinstance(network, NetworkPrices):
            if not 0.0 <= network < math.inf:
                raise ValueError(
                    f"KnapsackEnergy needs a finite network_cost of at least 0, got {network!r}."
                )
            network = NetworkPrices(Prices(float(network)))
        bound = replace(self)
        object.__setattr__(bound, "_network", network)
        return bound

    @property
    def network_cost(self) -> float | None:
        """Total cost of the network that the strategy is bound to."""
        return None if self._network is None else self._network.prices.total

    def budget_of(self, network: NetworkPrices) -> float:
        """See :meth:`SelectionStrategy.budget_of`."""
        return allowance(self.budget, network.prices.total, network.seed_cost)

    def select(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The most valuable affordable candidates; see :meth:`SelectionStrategy.select`."""
        bound = self._network is not None and self._network.prices.is_known
        for c in candidates:
            if not (0.0 < c.cost < math.inf or (bound and c.cost == 0.0)):
                raise ValueError(
                    f"Neuron {c.neuron} of group '{c.group}' has cost {c.cost!r}; KnapsackEnergy "
                    "needs positive finite costs; choose a cost that counts it, or exclude the group."
                )
        check_finite(candidates)
        network = self._network or NetworkPrices(Prices(math.fsum(c.cost for c in candidates)))
        budget = self.budget_of(network)
        useful = sorted((c for c in candidates if c.gain > 0.0 and c.cost <= budget), key=canonical)
        if not useful:
            return []
        rules = {g: self._rules(g, mine, network) for g, mine in _by_group(candidates).items()}
        groups = _by_group(useful)
        prices = network.prices if bound else _uniform_prices(groups)
        if prices is None:
            chosen = solve_items(useful, rules, budget, self.solver)
        else:
            limits = [Limit("budget", prices, budget), *network.limits]
            chosen = solve_counts(groups, rules, limits, self.solver)

        def admissible(trial: Sequence[Candidate]) -> bool:
            """Costs and gains are the same, so only the rules of the groups are to be looked at."""
            return all(rules[g].allow(mine) for g, mine in _by_group(trial).items())

        return in_order(chosen, useful, admissible, across=not bound)

    def _rules(self, group: str, candidates: Sequence[Candidate], network: NetworkPrices) -> Rules:
        width = network.widths.get(group)
        # On bare candidates the width is not known, but there are at least the neurons that are offered.
        least = max(c.neuron for c in candidates) + 1 if width is None else width
        most = None if self.max_factor is None else math.floor((self.max_factor - 1.0) * least + 1e-9)
        return Rules(self.per_group_max, most, width or 0, self.round_to)

    def why_left(self, candidate: Candidate, *, splits: int, new: int) -> str:
        """See :meth:`SelectionStrategy.why_left`."""
        if self.per_group_max is not None and splits >= self.per_group_max:
            return f"beyond the {self.per_group_max} of their group"
        width = self._network.widths.get(candidate.group) if self._network is not None else None
        most = math.inf if width is None or self.max_factor is None else (self.max_factor - 1.0) * width
        if new + candidate.num_new > most:
            return f"beyond {self.max_factor:g} times the width"
        return "too dear for the budget"

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`SelectionStrategy.state_dict`."""
        return as_cost(self.cost).state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`SelectionStrategy.load_state_dict`."""
        as_cost(self.cost).load_state_dict(state)


def _by_group(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = {}
    for c in candidates:
        groups.setdefault(c.group, []).append(c)
    return groups


def _uniform_prices(groups: Mapping[str, Sequence[Candidate]]) -> Prices | None:
    """What one more neuron of each group costs, if all candidates of a group agree on it."""
    each = {}
    for group, mine in groups.items():
        unit = mine[0].cost / mine[0].num_new
        if any(c.cost != unit * c.num_new for c in mine):
            return None
        each[group] = unit
    return Prices(0.0, each)


def _index(candidate: Candidate) -> float:
    """The splitting index, or the negative gain where there is none."""
    index = candidate.splitting_index
    return -candidate.gain if index is None else index


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
    return sorted(taken, key=canonical)


def _check_count(strategy: str, option: str, count: object, least: int) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < least):
        raise ValueError(f"{strategy} needs {option} to be an integer of at least {least}, got {count!r}.")
