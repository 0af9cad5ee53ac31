"""Which of the proposed splits are carried out: priced, chosen by the strategy, and cut to the limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_split.candidates import Candidate, best_per_neuron, canonical
from lightning_split.context import GrowthContext
from lightning_split.costs import Macs, Params, as_cost
from lightning_split.pricing import Limit, NetworkPrices, Prices
from lightning_split.selection import SelectionStrategy
from lightning_split.splits import Split

__all__ = ["Chooser", "Spending", "as_split", "network_prices"]


@dataclass(frozen=True)
class Spending:
    """What a growth costs in the unit of the strategy, what was left, and why."""

    unit: str
    before: float  # what the network cost
    spent: float  # what the chosen splits add together, as predicted before the surgery
    budget: float | None = None  # what they were allowed to add; None: the strategy has no budget
    left: Mapping[str, int] = field(default_factory=dict)  # reason -> neurons that were not chosen
    price_taken: float | None = None  # least gain per unit of a chosen split
    price_left: float | None = None  # most gain per unit of a split that was left for want of budget
    limit: str = ""  # which limit of the whole run kept further splits out, as a sentence

    def __str__(self) -> str:
        lines = []
        if self.budget is not None:
            share = f" ({self.spent / self.before:.1%} of what the network cost)" if self.before else ""
            lines.append(f"spent {_number(self.spent)} of {_number(self.budget)} {self.unit}{share}")
            edge = []
            if self.price_taken is not None:
                edge.append(f"{self.price_taken:.2e} in the poorest split taken")
            if self.price_left is not None:
                edge.append(f"{self.price_left:.2e} in the best one left")
            if edge:
                lines.append(f"gain per unit of cost: {', '.join(edge)}")
        if self.left:
            lines.append("neurons left: " + ", ".join(f"{count} {why}" for why, count in self.left.items()))
        return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def network_prices(
    context: GrowthContext,
    strategy: SelectionStrategy,
    *,
    max_params: int | None = None,
    max_macs: float | None = None,
    seed_cost: float | None = None,
) -> NetworkPrices:
    """What a growth of the network adds, in the strategy's unit and in those of the limits.

    Processes may have batches of different sizes; the prices of the first one hold for all.
    """
    prices = as_cost(strategy.cost).price(context)
    limits = []
    for name, most, cost in (("max_params", max_params, Params()), ("max_macs", max_macs, Macs())):
        if most is not None:
            known = cost.price(context)
            limits.append(Limit(f"{name}={most:,.0f}", known, most - known.total))
    return context.ranks.agree(NetworkPrices(prices, context.arch.widths, tuple(limits), seed_cost))


class Chooser:
    """A strategy that is shown what candidates cost, and is held to the limits of the run exactly."""

    def __init__(self, strategy: SelectionStrategy, network: NetworkPrices) -> None:
        self.network = network
        self.strategy = strategy.bind(network)
        self._alone: dict[tuple[str, int], float] = {}

    def __call__(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """What the strategy chooses; of that, as many of the best as the limits allow.

        Raises:
            ValueError: If the strategy returns what it was not given.
        """
        priced = [self._priced(c) for c in candidates]
        name, answer = type(self.strategy).__name__, self.strategy.select(priced)
        if not isinstance(answer, Iterable):
            raise ValueError(f"{name}.select returned {answer!r}; return a list of candidates.")
        chosen = list(answer)
        given = {id(c) for c in priced}
        unknown = [c for c in chosen if id(c) not in given]
        if unknown:
            raise ValueError(
                f"{name}.select returned a candidate that it was not given (neuron "
                f"{unknown[0].neuron} of '{unknown[0].group}'); return a subset of the candidates."
            )
        return self._within_limits(best_per_neuron(chosen))

    def _priced(self, c: Candidate) -> Candidate:
        key = c.group, c.num_new
        if key not in self._alone:
            self._alone[key] = self.network.prices.alone(*key)
        return replace(c, cost=self._alone[key])

    def _within_limits(self, chosen: list[Candidate]) -> list[Candidate]:
        limits = self.network.limits

        def fits(counts: Mapping[str, int]) -> bool:
            return all(limit.prices.added(counts) <= limit.allowance for limit in limits)

        if fits(_counts(chosen)):
            return chosen
        ranked = sorted(chosen, key=lambda c: (-c.gain, canonical(c)))
        low, high = 0, len(ranked)  # the first low of them fit, the first high do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(_counts(ranked[:middle])) else (low, middle)
        kept, counts = ranked[:low], _counts(ranked[:low])
        closed: set[tuple[str, int]] = set()  # what does not fit now will not fit later
        for c in ranked[low:]:
            key = c.group, c.num_new
            grown = {**counts, c.group: counts.get(c.group, 0) + c.num_new}
            if key in closed or not fits(grown):
                closed.add(key)
            else:
                kept.append(c)
                counts = grown
        return sorted(kept, key=canonical)

    def spending(self, offered: Iterable[tuple[Candidate, bool]], chosen: Sequence[Candidate]) -> Spending:
        """What a choice costs, and why the other neurons were left.

        Args:
            offered: Every candidate, and whether its gain is more than noise.
            chosen: Those that were chosen.
        """
        network = self.network
        counts, splits = _counts(chosen), Counter(c.group for c in chosen)
        taken = {(c.group, c.neuron) for c in chosen}
        left: Counter[str] = Counter()
        dearer: dict[tuple[str, int], float] = {}
        full: dict[tuple[str, int], str] = {}
        price_left: float | None = None
        passed = {(c.group, c.neuron, c.scheme): ok for c, ok in offered}
        for c in best_per_neuron(self._priced(c) for c, _ in offered):
            if (c.group, c.neuron) in taken:
                continue
            if c.gain <= 0:
                left["without gain"] += 1
                continue
            if not passed[c.group, c.neuron, c.scheme]:
                left["with a gain that may be noise"] += 1
                continue
            key = c.group, c.num_new
            if key not in dearer:
                dearer[key] = _further(network.prices, counts, *key)
                full[key] = next((x.name for x in network.limits if self._over(x, counts, *key)), "")
            if full[key]:
                left[f"beyond {full[key]}"] += 1
                continue
            left[self.strategy.why_left(c, splits=splits[c.group], new=counts.get(c.group, 0))] += 1
            if dearer[key] > 0:
                price_left = max(price_left or 0.0, c.gain / dearer[key])
        return Spending(
            network.prices.unit,
            network.prices.total,
            network.prices.added(counts),
            self.strategy.budget_of(network),
            dict(left),
            min((c.gain / c.cost for c in chosen if c.cost > 0), default=None),
            price_left,
            self._limit(left, counts),
        )

    def _over(self, limit: Limit, counts: Mapping[str, int], group: str, num_new: int) -> bool:
        return limit.prices.added(counts) + _further(limit.prices, counts, group, num_new) > limit.allowance

    def _limit(self, left: Mapping[str, int], counts: Mapping[str, int]) -> str:
        for limit in self.network.limits:
            count = left.get(f"beyond {limit.name}", 0)
            if count:
                room = limit.allowance - limit.prices.added(counts)
                return (
                    f"The limit {limit.name} is reached: {count} neurons with a gain do not fit into the "
                    f"{max(room, 0.0):,.0f} {limit.prices.unit} that are left."
                )
        return ""


def as_split(candidate: Candidate) -> Split:
    """What surgery does for a candidate."""
    assert candidate.displacements is not None
    return Split(
        candidate.group,
        candidate.neuron,
        candidate.weights,
        candidate.displacements,
        candidate.through,
        candidate.outgoing,
    )


def _counts(chosen: Sequence[Candidate]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for c in chosen:
        counts[c.group] = counts.get(c.group, 0) + c.num_new
    return counts


def _further(prices: Prices, counts: Mapping[str, int], group: str, num_new: int) -> float:
    """What more neurons of a group add after a growth."""
    now = counts.get(group, 0)
    before, after = prices.along(counts, group, np.array([now, now + num_new]))
    return float(after - before)
