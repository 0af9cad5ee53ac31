"""What a channel group offers: for every number of new neurons the most gain that they can bring.

Within a group the cost depends on the number of new neurons alone, so a hundred thousand yes-or-no questions
shrink to one question per group: how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_split.candidates import Candidate, canonical

__all__ = ["Menu", "Rules", "menu_of"]

Index = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


class Rules(NamedTuple):
    """What may be chosen of one group, apart from costs."""

    max_splits: int | None = None
    max_new: int | None = None
    width: int = 0  # neurons that the group has
    round_to: int = 1  # it grows to a multiple of this, or not at all

    def allows(self, num_new: Index) -> npt.NDArray[np.bool_]:
        """Whether so many new neurons are allowed."""
        fits: npt.NDArray[np.bool_] = (self.width + num_new) % self.round_to == 0
        return fits if self.max_new is None else fits & (num_new <= self.max_new)

    def allow(self, chosen: Sequence[Candidate]) -> bool:
        """Whether a choice within the group keeps the rules."""
        most = len(chosen) if self.max_splits is None else self.max_splits
        return len(chosen) <= most and bool(self.allows(np.array([sum(c.num_new for c in chosen)])).all())


@dataclass(frozen=True, eq=False)
class Menu:
    """The levels of one group: ascending numbers of new neurons, each with more gain than the last."""

    group: str
    levels: Index  # (n,)
    gains: Values  # (n,)
    ranked: Sequence[Candidate]  # in the order in which neurons are taken
    picks: npt.NDArray[np.int8] | None = None  # (neurons, splits or 1, new neurons): which option was taken
    options: Sequence[Sequence[Candidate]] = ()  # of each neuron

    def members(self, level: int) -> list[Candidate]:
        """The candidates behind a number of new neurons."""
        if self.picks is None:
            taken, new = [], 0
            for c in self.ranked:
                if new >= level:
                    break
                taken.append(c)
                new += c.num_new
            return taken
        chosen: list[Candidate] = []
        left, splits = level, self.picks.shape[1] - 1
        for neuron in range(len(self.options) - 1, -1, -1):
            pick = int(self.picks[neuron, splits, left])
            if pick:
                c = self.options[neuron][pick - 1]
                chosen.append(c)
                left -= c.num_new
                splits = max(0, splits - 1)
        return chosen


def menu_of(group: str, candidates: Sequence[Candidate], rules: Rules) -> Menu:
    """The menu of one group, made of candidates of positive gain that cost the same per new neuron.

    Cost: sorting, if all candidates add equally many neurons; otherwise a dynamic programme of (neurons x new
    neurons) steps on arrays, and times ``max_splits`` if that is given.
    """
    sizes = {c.num_new for c in candidates}
    if len(sizes) == 1:
        return _sorted_menu(group, candidates, rules, sizes.pop())
    options: dict[int, dict[int, Candidate]] = {}
    for c in sorted(candidates, key=lambda c: (-c.gain, canonical(c))):
        options.setdefault(c.neuron, {}).setdefault(c.num_new, c)
    return _planned_menu(group, [[*options[n].values()] for n in sorted(options)], rules)


def _sorted_menu(group: str, candidates: Sequence[Candidate], rules: Rules, size: int) -> Menu:
    """All candidates add equally many neurons: the best first."""
    best: dict[int, Candidate] = {}
    for c in sorted(candidates, key=lambda c: (-c.gain, canonical(c))):
        best.setdefault(c.neuron, c)
    ranked = list(best.values())[: rules.max_splits]
    levels = size * np.arange(1, len(ranked) + 1)
    allowed = rules.allows(levels)
    gains = np.cumsum([c.gain for c in ranked])
    for k in np.flatnonzero(np.diff(gains) <= 0.0):  # a gain that vanishes in the sum is still one
        gains[k + 1] = max(gains[k + 1], np.nextafter(gains[k], np.inf))
    return Menu(group, levels[allowed], gains[allowed], ranked)


def _planned_menu(group: str, options: Sequence[Sequence[Candidate]], rules: Rules) -> Menu:
    """The best choice of schemes for every number of new neurons, neuron after neuron."""
    most = sum(max(c.num_new for c in mine) for mine in options)
    most = most if rules.max_new is None else min(most, rules.max_new)
    # Splits are counted only where they are limited: a row for each number of splits so far at most.
    rows = 1 if rules.max_splits is None else min(rules.max_splits, len(options)) + 1
    gains = np.full((rows, most + 1), -np.inf)
    gains[:, 0] = 0.0
    picks = np.zeros((len(options), rows, most + 1), np.int8)
    for neuron, mine in enumerate(options):
        before = gains.copy()
        for number, c in enumerate(mine, start=1):
            n = c.num_new
            if n > most:
                continue
            source = before[:, :-n] if rows == 1 else before[:-1, :-n]
            target = gains[:, n:] if rows == 1 else gains[1:, n:]
            place = picks[neuron, :, n:] if rows == 1 else picks[neuron, 1:, n:]
            better = source + c.gain > target
            np.copyto(target, source + c.gain, where=better)
            np.copyto(place, np.int8(number), where=better)
    last = gains[-1]
    rising = np.r_[False, last[1:] > np.maximum.accumulate(last)[:-1]]
    levels = np.flatnonzero(rising)
    if rules.round_to > 1:  # a level may be worth less than a lower one that is not allowed
        levels = np.flatnonzero(np.isfinite(last) & (np.arange(most + 1) > 0))
        levels = levels[rules.allows(levels)]
        worth = last[levels]
        levels = levels[worth > np.r_[-np.inf, np.maximum.accumulate(worth)[:-1]]]
    return Menu(group, levels, last[levels], (), picks, options)
