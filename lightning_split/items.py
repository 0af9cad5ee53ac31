"""The knapsack over candidates that have costs of their own: which of them are chosen.

Bare candidates may cost anything; in a network those of one group cost the same
(:mod:`lightning_split.knapsack`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from lightning_split.candidates import Candidate, canonical
from lightning_split.choices import Choices, solve_choices
from lightning_split.knapsack import Solver
from lightning_split.menus import Rules

__all__ = ["solve_items"]

Index = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


def solve_items(
    candidates: Sequence[Candidate], rules: Mapping[str, Rules], budget: float, solver: Solver
) -> list[Candidate]:
    """The most valuable choice where every candidate has a cost of its own.

    Args:
        candidates: Of positive gain and affordable each.
        rules: For each group.
        budget: Of the sum of the costs.
        solver: How.
    """
    return _Items(
        sorted(candidates, key=lambda c: (c.group, c.neuron, c.cost, canonical(c))), rules, budget
    ).solve(solver)


class _Items:
    """Which of the candidates are chosen: items in blocks (neurons) in clusters (groups)."""

    def __init__(self, items: Sequence[Candidate], rules: Mapping[str, Rules], budget: float) -> None:
        self.items, self.budget = items, budget
        groups = sorted({c.group for c in items})
        self.rules = [rules[g] for g in groups]
        number = {g: i for i, g in enumerate(groups)}
        neurons = list(dict.fromkeys((c.group, c.neuron) for c in items))
        place = {key: i for i, key in enumerate(neurons)}
        self.block = np.array([place[c.group, c.neuron] for c in items])
        self.cluster = np.array([number[g] for g, _ in neurons])
        self.owner = self.cluster[self.block]
        self.gain = np.array([c.gain for c in items])
        self.cost = np.array([c.cost for c in items])
        self.new = np.array([c.num_new for c in items])
        crowd = np.bincount(self.cluster)
        self.cap = np.array(
            [n if r.max_splits is None else r.max_splits for n, r in zip(crowd, self.rules, strict=True)]
        )
        most = np.zeros(len(neurons), np.int64)
        np.maximum.at(most, self.block, self.new)
        offered = np.bincount(self.cluster, most)
        # Groups whose number of new neurons matters, and not the number of splits alone.
        self.counted = [
            g
            for g, r in enumerate(self.rules)
            if r.round_to > 1 or (r.max_new is not None and offered[g] > r.max_new)
        ]

    def solve(self, solver: Solver) -> list[Candidate]:
        """The chosen items."""
        capped = bool((np.bincount(self.cluster) > self.cap).any())
        cluster, cap = (self.cluster, self.cap) if capped else (None, None)
        choices = Choices(self.block, self.gain, self.cost[:, None], np.array([self.budget]), cluster, cap)
        if self.counted:
            hint = self._prefixes()
            if solver == "milp":
                hint = solve_choices(choices, self.admissible, hint=hint, rows=self._rows())
            return self._chosen(hint)
        if solver == "greedy":
            return self._chosen(self._greedy())
        return self._chosen(solve_choices(choices, self.admissible, exact=solver == "milp"))

    def _chosen(self, options: Sequence[int] | Index) -> list[Candidate]:
        return [self.items[int(i)] for i in options]

    def admissible(self, options: Sequence[int] | Index) -> bool:
        """Whether budget and rules hold exactly."""
        chosen = np.asarray(options, np.int64)
        if math.fsum(self.cost[chosen]) > self.budget or len(set(self.block[chosen])) < len(chosen):
            return False
        splits = np.bincount(self.owner[chosen], minlength=len(self.rules))
        new = np.bincount(self.owner[chosen], self.new[chosen], minlength=len(self.rules)).astype(np.int64)
        grown = splits > 0
        return bool((splits <= self.cap).all()) and all(
            rule.allows(new[[g]]).all() for g, rule in enumerate(self.rules) if grown[g]
        )

    def _greedy(self) -> list[int]:
        """The best gain per cost first, also for a better scheme of a neuron; or the one best item."""
        options: dict[int, list[int]] = {}
        for i, b in enumerate(self.block.tolist()):
            options.setdefault(b, []).append(i)
        held: dict[int, int] = {}
        room = self.cap.copy()
        left = self.budget

        def offer(block: int) -> tuple[float, int, int] | None:
            now = held.get(block)
            gain, cost = (0.0, 0.0) if now is None else (self.gain[now], self.cost[now])
            if now is None and not room[self.cluster[block]]:
                return None
            more = [
                (-(self.gain[i] - gain) / max(self.cost[i] - cost, 1e-300), block, i)
                for i in options[block]
                if self.gain[i] > gain and self.cost[i] - cost <= left
            ]
            return min(more) if more else None

        heap = [o for block in options if (o := offer(block)) is not None]
        heapq.heapify(heap)
        steps: list[tuple[int, int | None]] = []
        while heap:
            _, block, i = heapq.heappop(heap)
            now = held.get(block)
            dearer = self.cost[i] - (0.0 if now is None else self.cost[now])
            if dearer <= left and (now is not None or room[self.cluster[block]]):
                steps.append((block, now))
                room[self.cluster[block]] -= now is None
                held[block], left = i, left - dearer
            next_offer = offer(block)
            if next_offer is not None:
                heapq.heappush(heap, next_offer)
        while steps and not self.admissible([*held.values()]):  # the running sum was rounded
            block, before = steps.pop()
            if before is None:
                del held[block]
            else:
                held[block] = before
        best = int(np.argmax(self.gain))
        return sorted(held.values()) if math.fsum(self.gain[[*held.values()]]) >= self.gain[best] else [best]

    def _prefixes(self) -> Index:
        """A good choice where numbers count: of each group the first few, best gain per cost first."""
        density = self.gain / self.cost
        block, gain, cost, members = [], [], [], []
        for g, rule in enumerate(self.rules):
            mine = np.flatnonzero(self.owner == g)
            mine = mine[np.argsort(-density[mine], kind="stable")]
            _, first = np.unique(self.block[mine], return_index=True)
            mine = mine[np.sort(first)][: self.cap[g]]
            new = np.cumsum(self.new[mine])
            for k in np.flatnonzero(rule.allows(new)):
                prefix = np.sort(mine[: k + 1])
                if (spent := math.fsum(self.cost[prefix])) <= self.budget:
                    block.append(g)
                    gain.append(math.fsum(self.gain[prefix]))
                    cost.append([spent])
                    members.append(prefix)
        if not members:
            return np.zeros(0, np.int64)
        _, numbers = np.unique(block, return_inverse=True)
        choices = Choices(numbers, np.array(gain), np.array(cost), np.array([self.budget]))

        def items(options: Index) -> Index:
            return np.sort(np.concatenate([members[int(o)] for o in options]))

        def admissible(options: Index) -> bool:
            return not len(options) or self.admissible(items(options))

        found = solve_choices(choices, admissible, exact=False)
        return items(found) if len(found) else found

    def _rows(self) -> tuple[csr_array, Values]:
        """Limits on the numbers of new neurons, with one more integer per group: how many multiples."""
        rows, limits = [], []
        width = len(self.items) + len(self.counted)
        for place, g in enumerate(self.counted):
            rule = self.rules[g]
            row = np.zeros(width)
            row[: len(self.items)] = self.new * (self.owner == g)
            if rule.max_new is not None:
                rows.append(row)
                limits.append(float(rule.max_new))
            if rule.round_to > 1:
                multiple = row.copy()
                multiple[len(self.items) + place] = -rule.round_to
                rows += [multiple, -multiple]
                limits += [0.0, 0.0]
        return csr_array(np.array(rows)), np.array(limits)
