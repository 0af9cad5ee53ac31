"""The knapsack of a network: how many new neurons each group gets.

The candidates of a group cost the same per new neuron, so that *how many* is the only question; what it costs
may depend on how many the other groups get. :mod:`lightning_split.items` is for candidates with costs of
their own.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_split.candidates import Candidate, canonical
from lightning_split.choices import Choices, solve_choices
from lightning_split.menus import Menu, Rules, menu_of
from lightning_split.pricing import Limit

__all__ = ["Solver", "solve_counts"]

Index = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
Solver = Literal["milp", "lp", "greedy"]
Counts = dict[str, int]
# All combinations of levels are tried up to so many; beyond, knapsacks with fixed products are iterated.
_NUM_COMBINATIONS = 2**16
_NUM_ROUNDS = 12
_NUM_CHUNKS = 32  # greedy takes a group's neurons in so many parts at first
_LOOKAHEAD = 8  # levels of a group among which the next step is chosen


def solve_counts(
    candidates: Mapping[str, Sequence[Candidate]],
    rules: Mapping[str, Rules],
    limits: Sequence[Limit],
    solver: Solver,
) -> list[Candidate]:
    """The most valuable choice where a group's cost depends on its number of new neurons.

    Args:
        candidates: Of each group, of positive gain.
        rules: For each group.
        limits: What may be added, of one cost or several.
        solver: How.

    Cost: one pass over arrays of all candidates per round, and HiGHS on what that leaves open.
    """
    menus = [menu_of(g, mine, rules[g]) for g, mine in sorted(candidates.items()) if mine]
    counts = _Levels([m for m in menus if len(m.levels)], limits).solve(solver)
    chosen = [c for m in menus if counts.get(m.group) for c in m.members(counts[m.group])]
    return sorted(chosen, key=canonical)


class _Levels:
    """How many new neurons each group gets."""

    def __init__(self, menus: Sequence[Menu], limits: Sequence[Limit]) -> None:
        self.limits = limits
        self._weights = np.array([1.0 / limit.allowance if limit.allowance > 0 else 1.0 for limit in limits])
        self.menus = [m for m in (self._affordable(menu) for menu in menus) if len(m.levels)]
        groups = {m.group for m in self.menus}
        self.coupled = any(
            len({g for axis in term.axes for g, _ in axis.growth} & groups) > 1
            for limit in limits
            for term in limit.prices.terms
        )

    def _affordable(self, menu: Menu) -> Menu:
        fits = np.ones(len(menu.levels), bool)
        for limit in self.limits:
            fits &= limit.prices.along({}, menu.group, menu.levels) <= limit.allowance
        return Menu(menu.group, menu.levels[fits], menu.gains[fits], menu.ranked, menu.picks, menu.options)

    def solve(self, solver: Solver) -> Counts:
        """New neurons of each group."""
        if not self.menus:
            return {}
        if solver == "greedy":
            chunk = max(1, max(len(m.levels) for m in self.menus) // _NUM_CHUNKS)
            return self._best([self._climbed({}, (chunk, 1)), self._single()])
        if not self.coupled:
            return self._separate({}, exact=solver == "milp")
        if solver == "milp" and math.prod(len(m.levels) + 1 for m in self.menus) <= _NUM_COMBINATIONS:
            return self._all_tried()
        return self._iterated()

    def fits(self, counts: Counts) -> bool:
        """Whether all limits hold exactly."""
        return all(limit.prices.added(counts) <= limit.allowance for limit in self.limits)

    def gain(self, counts: Counts) -> float:
        """The total gain."""
        return math.fsum(
            m.gains[int(np.searchsorted(m.levels, counts[m.group]))]
            for m in self.menus
            if counts.get(m.group)
        )

    def _best(self, found: Sequence[Counts]) -> Counts:
        return max(found, key=self.gain)

    def _single(self) -> Counts:
        """The one group that is worth most by itself."""
        best = max(self.menus, key=lambda m: float(m.gains[-1]))
        return {best.group: int(best.levels[-1])}

    def _separate(self, around: Counts, *, exact: bool) -> Counts:
        """The knapsack with what the groups add to each other held at ``around``."""
        costs, budget = [], []
        for limit in self.limits:
            fixed = limit.allowance - limit.prices.added(around)
            column = []
            for m in self.menus:
                levels = np.r_[0, m.levels, around.get(m.group, 0)]
                along = limit.prices.along(around, m.group, levels) - limit.prices.along(
                    around, m.group, levels[:1]
                )
                column.append(along[1:-1])
                fixed += float(along[-1])
            costs.append(np.concatenate(column))
            budget.append(fixed)
        cost, allowance = np.stack(costs, axis=1), np.array(budget)
        block = np.repeat(np.arange(len(self.menus)), [len(m.levels) for m in self.menus])
        levels = np.concatenate([m.levels for m in self.menus])
        gain = np.concatenate([m.gains for m in self.menus])
        kept = np.flatnonzero((cost <= allowance).all(1))
        if not len(kept):
            return {}
        _, inverse = np.unique(block[kept], return_inverse=True)
        choices = Choices(inverse.astype(np.int64), gain[kept], cost[kept], np.maximum(allowance, 0.0))

        def counts_of(options: Index) -> Counts:
            picked = kept[options]
            pairs = zip(block[picked].tolist(), levels[picked].tolist(), strict=True)
            return {self.menus[b].group: n for b, n in pairs}

        def admissible(options: Index) -> bool:
            if self.coupled:  # the costs are approximate, and the caller looks at the true ones
                return bool((cost[kept[options]].sum(0) <= allowance).all())
            return self.fits(counts_of(options))

        return counts_of(solve_choices(choices, admissible, exact=exact))

    def _all_tried(self) -> Counts:
        """Every combination of levels, at once."""
        levels = [np.r_[0, m.levels] for m in self.menus]
        grids = np.meshgrid(*(np.arange(len(x)) for x in levels), indexing="ij", sparse=True)
        counts = {m.group: x[i] for m, x, i in zip(self.menus, levels, grids, strict=True)}
        gain = np.asarray(sum(np.r_[0.0, m.gains][i] for m, i in zip(self.menus, grids, strict=True)))
        for limit in self.limits:
            gain = np.where(limit.prices.added_by(counts) <= limit.allowance, gain, -np.inf)
        where = np.unravel_index(int(np.argmax(gain)), gain.shape)
        return {m.group: int(x[i]) for m, x, i in zip(self.menus, levels, where, strict=True) if i}

    def _iterated(self) -> Counts:
        """Knapsacks with the products held at the best choice so far, until none finds a better one."""
        chunk = max(1, max(len(m.levels) for m in self.menus) // _NUM_CHUNKS)
        best = self._best([self._climbed({}, (chunk, 1)), self._single()])
        for _ in range(_NUM_ROUNDS):
            new = self._climbed(self._lowered(self._separate(best, exact=False)))
            if self.gain(new) <= self.gain(best) * (1.0 + 1e-7):
                break
            best = new
        return best

    def _lowered(self, counts: Counts) -> Counts:
        """Level after level less, the least gain per cost first, until the choice is within budget."""
        counts = dict(counts)
        over = np.array([limit.prices.added(counts) - limit.allowance for limit in self.limits])
        heap = [(self._loss(m, counts, over)[0], i) for i, m in enumerate(self.menus) if counts.get(m.group)]
        heapq.heapify(heap)
        while heap and not self.fits(counts):
            while heap and (over > 0).any():
                _, i = heapq.heappop(heap)
                menu = self.menus[i]
                density, level, saved = self._loss(menu, counts, over)
                if heap and density > heap[0][0]:  # the others have become smaller, so it saves less
                    heapq.heappush(heap, (density, i))
                    continue
                counts[menu.group] = level
                over = over - saved
                if level:
                    heapq.heappush(heap, (self._loss(menu, counts, over)[0], i))
            over = np.array([limit.prices.added(counts) - limit.allowance for limit in self.limits])
        return {g: n for g, n in counts.items() if n}

    def _loss(self, menu: Menu, counts: Counts, over: Values) -> tuple[float, int, Values]:
        """What one level less gives up per share of the budgets that are overrun, and what it saves."""
        at = int(np.searchsorted(menu.levels, counts[menu.group]))
        level = int(menu.levels[at - 1]) if at else 0
        gain = float(menu.gains[at] - (menu.gains[at - 1] if at else 0.0))
        saved = np.empty(len(self.limits))
        for r, limit in enumerate(self.limits):
            less, now = limit.prices.along(counts, menu.group, np.array([level, counts[menu.group]]))
            saved[r] = now - less
        return gain / max(float((saved * self._weights)[over > 0].sum()), 1e-300), level, saved

    def _climbed(self, counts: Counts, strides: Sequence[int] = (1,)) -> Counts:
        """Level after level, the best gain per cost first, until nothing more fits.

        Args:
            counts: Where to start.
            strides: How many levels to take at a time, first in large steps and then in small ones.
        """
        counts = dict(counts)
        steps: list[tuple[str, int]] = []
        for stride in strides:
            room = np.array([limit.allowance - limit.prices.added(counts) for limit in self.limits])
            heap = [
                (-offer[0], i)
                for i, m in enumerate(self.menus)
                if (offer := self._offer(m, counts, room, stride)) is not None
            ]
            heapq.heapify(heap)
            while heap:
                _, i = heapq.heappop(heap)
                menu = self.menus[i]
                # What the others have got since may have made it dearer.
                offer = self._offer(menu, counts, room, stride)
                if offer is None:
                    continue
                density, level, cost = offer
                if heap and density < -heap[0][0]:
                    heapq.heappush(heap, (-density, i))
                    continue
                steps.append((menu.group, counts.get(menu.group, 0)))
                counts[menu.group] = level
                room = room - cost
                offer = self._offer(menu, counts, room, stride)
                if offer is not None:
                    heapq.heappush(heap, (-offer[0], i))
        while steps and not self.fits(counts):  # the running sum was rounded
            group, level = steps.pop()
            counts[group] = level
        return counts

    def _offer(
        self, menu: Menu, counts: Counts, room: Values, stride: int
    ) -> tuple[float, int, Values] | None:
        """The next level of a group that fits: its gain per share of the budgets, and what it costs."""
        now = counts.get(menu.group, 0)
        first = int(np.searchsorted(menu.levels, now, side="right"))
        last = first + (_LOOKAHEAD if stride == 1 else stride)
        window = slice(first, last) if stride == 1 else slice(last - 1, last)
        levels = menu.levels[window]
        if not len(levels):
            return None
        ahead = np.r_[now, levels]
        cost = np.empty((len(levels), len(self.limits)))
        for r, limit in enumerate(self.limits):
            along = limit.prices.along(counts, menu.group, ahead)
            cost[:, r] = along[1:] - along[0]
        fits = (cost <= room).all(1)
        if not fits.any():
            return None
        gain = menu.gains[window] - (menu.gains[first - 1] if first else 0.0)
        share = cost @ self._weights
        density = np.where(fits, gain / np.maximum(share, 1e-300), -np.inf)
        k = int(np.argmax(density))
        return float(density[k]), int(levels[k]), cost[k]
