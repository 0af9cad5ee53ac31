"""Prices: what a growth adds to the cost of a network, as a function of how many neurons each group gets.

Numbers only: no modules, no tensors. A price list is made once per growth (:mod:`lightning_split.costs`), can
be sent to other processes, and answers any number of questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Axis", "Limit", "NetworkPrices", "Prices", "Product", "Term"]

Counts = Mapping[str, "int | npt.NDArray[np.int64]"]  # new neurons of each group; absent means none
Values = npt.NDArray[np.float64]


class Axis(NamedTuple):
    """A size in the network that grows with the groups."""

    size: float
    growth: tuple[tuple[str, float], ...] = ()  # (group, entries that one more of its neurons adds)

    def at(self, counts: Counts) -> Values:
        """The size after a growth."""
        return np.asarray(self.size + sum(r * counts[g] for g, r in self.growth if g in counts))


class Term(Protocol):
    """One summand of the cost that is not linear in the new neurons."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The sizes that it depends on."""
        ...

    def at(self, counts: Counts) -> Values:
        """Its value after a growth."""
        ...


@dataclass(frozen=True)
class Product:
    """A weight that grows on several sides: a factor times the product of its sizes."""

    factor: float
    axes: tuple[Axis, ...]

    def at(self, counts: Counts) -> Values:
        """The value after a growth."""
        value = np.asarray(self.factor)
        for axis in self.axes:
            value = value * axis.at(counts)
        return value


@dataclass(frozen=True)
class Prices:
    """The cost of a network, now and after any growth.

    Args:
        total: What the network costs now.
        linear: What one more neuron of a group adds, apart from ``terms``.
        terms: Everything that depends on several sizes at once. Two groups that grow on both sides of one
            weight add more than the sum of both.
        unit: What is counted, for messages.

    Example:
        >>> weight = Product(1.0, (Axis(4, (("in", 1.0),)), Axis(3, (("out", 1.0),))))
        >>> prices = Prices(12.0, terms=(weight,))
        >>> prices.added({"in": 1}), prices.added({"out": 1}), prices.added({"in": 1, "out": 1})
        (3.0, 4.0, 8.0)
    """

    total: float
    linear: Mapping[str, float] = field(default_factory=dict)
    terms: tuple[Term, ...] = ()
    unit: str = ""

    @classmethod
    def of(cls, terms: list[Product], constant: float = 0.0, unit: str = "") -> Prices:
        """Prices of a sum of products; what grows along one axis only becomes linear."""
        total, linear, rest = constant, dict[str, float](), []
        for term in terms:
            total += float(term.at({}))
            growing = [axis for axis in term.axes if axis.growth]
            if len(growing) > 1:
                rest.append(term)
            elif growing:
                others = math.prod((a.size for a in term.axes if not a.growth), start=term.factor)
                for group, r in growing[0].growth:
                    linear[group] = linear.get(group, 0.0) + r * others
        return cls(total, linear, tuple(rest), unit)

    def times(self, factor: float) -> Prices:
        """The same where everything costs a multiple of what it did."""
        if not all(isinstance(term, Product) for term in self.terms):
            raise TypeError("only products have multiples")
        terms = tuple(replace(t, factor=t.factor * factor) for t in self.terms if isinstance(t, Product))
        linear = {group: factor * each for group, each in self.linear.items()}
        return Prices(factor * self.total, linear, terms, self.unit)

    def plus(self, other: Prices, unit: str) -> Prices:
        """The sum of two costs of one network."""
        groups = dict.fromkeys([*self.linear, *other.linear])
        linear = {g: self.linear.get(g, 0.0) + other.linear.get(g, 0.0) for g in groups}
        return Prices(self.total + other.total, linear, self.terms + other.terms, unit)

    @property
    def is_known(self) -> bool:
        """Whether it says what growth adds, and not the total alone."""
        return bool(self.linear or self.terms)

    @cached_property
    def touching(self) -> Mapping[str, tuple[Term, ...]]:
        """The terms that depend on each group."""
        found: dict[str, list[Term]] = {}
        for term in self.terms:
            for group in dict.fromkeys(g for axis in term.axes for g, _ in axis.growth):
                found.setdefault(group, []).append(term)
        return {group: tuple(terms) for group, terms in found.items()}

    def added(self, counts: Mapping[str, int]) -> float:
        """What a growth adds.

        Args:
            counts: New neurons of each group.
        """
        return float(self.added_by(counts))

    def added_by(self, counts: Counts) -> Values:
        """The same for many growths at once: the counts are arrays that broadcast."""
        value = np.asarray(sum((self.linear.get(g, 0.0) * n for g, n in counts.items()), start=0.0))
        touched = {id(t): t for g in counts for t in self.touching.get(g, ())}
        for term in touched.values():
            value = value + (term.at(counts) - term.at({}))
        return value

    def along(self, counts: Mapping[str, int], group: str, levels: npt.NDArray[np.int64]) -> Values:
        """What is added if one group gets ``levels`` new neurons instead of its count: ``(len(levels),)``.

        The sum over groups of what this adds to ``added(counts)`` is exact for a change of one group, and
        lacks products of changes otherwise.
        """
        others = {g: n for g, n in counts.items() if g != group}
        value: Values = self.linear.get(group, 0.0) * levels.astype(np.float64)
        for term in self.touching.get(group, ()):
            value = value + (term.at({**others, group: levels}) - term.at(others))
        return value

    def alone(self, group: str, count: int = 1) -> float:
        """What new neurons of one group add if nothing else grows."""
        return self.added({group: count})


class Limit(NamedTuple):
    """A further bound on what a growth may add."""

    name: str  # as the user wrote it
    prices: Prices
    allowance: float  # what may still be added


@dataclass(frozen=True)
class NetworkPrices:
    """What a strategy may know about the network that it chooses for."""

    prices: Prices  # in the unit that the strategy asks for
    widths: Mapping[str, int] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()  # that hold besides the strategy's own budget
    seed_cost: float | None = None  # what the network cost before its first growth; None: this is the first
