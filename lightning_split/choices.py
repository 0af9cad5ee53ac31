r"""The multiple-choice knapsack: of each block at most one option, within one budget or several.

Maximise the sum of the gains of the chosen options, subject to the sum of their costs being at most the
budget in every resource. Knows no neurons. The way to the optimum is

1. the Lagrangian dual :math:`\min_{\lambda\ge0} \lambda B + \sum_b \max(0, \max_o g_o - \lambda c_o)`, which
   for this problem is as tight as the linear relaxation, and whose inner maximum is a pass over arrays;
2. a feasible choice: the inner maximum at the optimal multipliers, filled up;
3. an option that is so poor at the optimal multipliers that the bound with it is below that choice is
dropped;
4. the few that are left go to HiGHS (branch and cut).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

__all__ = ["Choices", "solve_choices"]

Index = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

# Up to so many options the optimum is proved to 1e-9 of the gain. Beyond, a choice is taken that is within
# 1e-6 of its bound, far below the sampling error of the gains. Limits are counts, not times, so that the
# same options give the same choice on every machine.
_NUM_EXACT = 2000
_TOLERANCES = (1e-9, 1e-6)
_NUM_NODES = 2000
_NUM_CUTS = 10
_NUM_MULTIPLIERS = 100
_NUM_FILLED = 50


@dataclass(frozen=True)
class Choices:
    """Options sorted by block, within a block by cost.

    Args:
        block: ``(n,)`` ascending block numbers from 0.
        gain: ``(n,)`` positive gains.
        cost: ``(n, resources)`` costs of at least 0, none above the budget.
        budget: ``(resources,)``, at least 0.
        cluster: ``(blocks,)`` numbers of the clusters that blocks belong to.
        cap: ``(clusters,)`` of how many blocks of a cluster something may be chosen at most.
    """

    block: Index
    gain: Values
    cost: Values
    budget: Values
    cluster: Index | None = None
    cap: Index | None = None

    @property
    def starts(self) -> Index:
        """First option of every block."""
        return np.flatnonzero(np.r_[True, self.block[1:] != self.block[:-1]])


class _Inner(NamedTuple):
    """The inner maximum of the dual at some multipliers."""

    multipliers: Values  # (resources,)
    chosen: Index  # options
    gain: float
    used: Values  # (resources,)
    value: float  # of the dual


def solve_choices(
    choices: Choices,
    admissible: Callable[[Index], bool],
    *,
    exact: bool = True,
    hint: Index | None = None,
    rows: tuple[csr_array, Values] | None = None,
) -> Index:
    """The chosen options, in ascending order.

    Args:
        choices: The options.
        admissible: Whether a choice meets the limits to the last digit; a solver works to a tolerance.
        exact: Prove the optimum with HiGHS; otherwise take the filled-up choice of the relaxation.
        hint: An admissible choice that is known.
        rows: Further rows ``matrix @ chosen <= limits`` that ``admissible`` knows too. The relaxation does
        not
            see them, so they make ``hint`` the only choice to start from.
    """
    best = np.zeros(0, np.int64) if hint is None else hint
    if not len(choices.gain):
        return best
    dual = _Dual(choices)
    if rows is None:
        for inner in dual.feasible():
            filled = _admitted(choices, _filled(choices, inner, dual.inner.multipliers), admissible)
            if _gain(choices, filled) > _gain(choices, best):
                best = filled
    tolerance = _TOLERANCES[len(choices.gain) > _NUM_EXACT]
    least = _gain(choices, best) * (1.0 + tolerance)
    if exact and dual.inner.value > least:
        core, forced = dual.core(least)
        found = _branch_and_cut(choices, core, forced, admissible, tolerance, rows)
        if found is not None and _gain(choices, found) > _gain(choices, best):
            best = found
    return np.sort(best)


def _gain(choices: Choices, chosen: Index) -> float:
    return math.fsum(choices.gain[chosen])


def _admitted(choices: Choices, chosen: Index, admissible: Callable[[Index], bool]) -> Index:
    """Without the last few options that a rounding error let in."""
    while len(chosen) and not admissible(chosen):
        chosen = np.delete(chosen, int(np.argmin(choices.gain[chosen])))
    return chosen


class _Dual:
    """The Lagrangian dual and what was seen on the way to its minimum, which bounds every choice."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.starts = choices.starts
        self.sizes = np.diff(np.r_[self.starts, len(choices.block)])
        self.seen: list[_Inner] = []
        self.inner = self.at(np.zeros(len(choices.budget)))
        if (self.inner.used > choices.budget).any():
            if len(choices.budget) == 1:
                self._bracket(self.inner)
            else:
                self._kelley()

    def at(self, multipliers: Values) -> _Inner:
        """The inner maximum."""
        c = self.choices
        reduced, best = self._reduced(multipliers)
        hits = np.flatnonzero(reduced == np.repeat(best, self.sizes))
        first = hits[np.r_[True, c.block[hits][1:] != c.block[hits][:-1]]]  # the cheapest of the best
        taken = best > 0.0
        if c.cluster is not None and c.cap is not None:
            taken &= self._places(best)[0]
        chosen = first[taken]
        value = float(best[taken].sum() + c.budget @ multipliers)
        inner = _Inner(multipliers, chosen, float(c.gain[chosen].sum()), c.cost[chosen].sum(0), value)
        self.seen.append(inner)
        return inner

    def _reduced(self, multipliers: Values) -> tuple[Values, Values]:
        """Gain minus the price of the cost, of every option, and the largest of every block."""
        reduced = self.choices.gain - self.choices.cost @ multipliers
        return reduced, np.maximum.reduceat(reduced, self.starts)

    def _places(self, best: Values) -> tuple[npt.NDArray[np.bool_], Values, Values]:
        """Which blocks get a place in their cluster, what the others must beat, and who moves up."""
        c = self.choices
        if c.cluster is None or c.cap is None:
            return np.ones(len(best), bool), np.zeros(len(best)), np.zeros(len(best))
        order = np.lexsort((-best, c.cluster))
        ranked = c.cluster[order]
        first = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        rank = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
        cap = c.cap[ranked]
        placed = np.zeros(len(best), bool)
        placed[order] = rank < cap
        last, after = np.zeros(len(c.cap)), np.zeros(len(c.cap))
        edge = rank == cap - 1
        last[ranked[edge]] = np.maximum(best[order[edge]], 0.0)
        edge = rank == cap
        after[ranked[edge]] = np.maximum(best[order[edge]], 0.0)
        return placed, np.where(placed, 0.0, last[c.cluster]), after[c.cluster]

    def _bracket(self, low: _Inner) -> None:
        """One resource: the dual is convex and piecewise linear, so tangents meet at its minimum.

        Tangents alone may creep up from one side, so every other step halves the bracket.
        """
        budget = float(self.choices.budget[0])
        high = self.at(self._ceiling())
        self.inner = min(low, high, key=lambda i: i.value)
        for number in range(_NUM_MULTIPLIERS):
            over, under = float(low.used[0]) - budget, budget - float(high.used[0])
            step = (low.gain - high.gain) / (over + under)
            line = high.gain + step * under
            if number % 2:
                a, b = float(low.multipliers[0]), float(high.multipliers[0])
                step = math.sqrt(a * b) if a > 0.0 else b / 16
            inner = self.at(np.array([step]))
            self.inner = min(self.inner, inner, key=lambda i: i.value)
            if self.inner.value <= line * (1.0 + 1e-12):
                return
            if inner.used[0] > budget:
                low = inner
            else:
                high = inner

    def _ceiling(self) -> Values:
        """Multipliers at each of which alone nothing is bought that costs something."""
        c = self.choices
        with np.errstate(divide="ignore"):
            density = np.where(c.cost > 0, c.gain[:, None] / c.cost, 0.0)
        return np.asarray(2.0 * density.max(0))

    def _kelley(self) -> None:
        """Several resources: minimise the largest tangent, add the tangent there, and so on."""
        budget = self.choices.budget
        unit = 1.0 / np.where(budget > 0, budget, 1.0)  # the master's variables are in units of the gain
        ceiling = self._ceiling()
        for r in range(len(ceiling)):
            self.at(np.eye(len(ceiling))[r] * ceiling)
        largest = max(i.gain for i in self.seen)
        self.inner = min(self.seen, key=lambda i: i.value)
        for _ in range(_NUM_MULTIPLIERS):
            slopes = np.array([(budget - i.used) * unit for i in self.seen])
            master = linprog(
                np.r_[np.zeros(len(ceiling)), 1.0],
                A_ub=np.c_[slopes, -np.ones(len(slopes))],
                b_ub=[-i.gain / largest for i in self.seen],
                bounds=[*((0.0, top) for top in ceiling / unit / largest), (None, None)],
            )
            if master.x is None:
                return
            inner = self.at(np.maximum(master.x[:-1], 0.0) * unit * largest)
            self.inner = min(self.inner, inner, key=lambda i: i.value)
            if self.inner.value <= master.fun * largest * (1.0 + 1e-9):
                return

    def feasible(self) -> list[_Inner]:
        """The choices within budget, the best last few of them."""
        budget = self.choices.budget * (1.0 + 1e-12)
        fit = [i for i in self.seen if (i.used <= budget).all()]
        return sorted(fit, key=lambda i: i.gain)[-3:]

    def core(self, least: float) -> tuple[Index, Index]:
        """Options that a choice worth ``least`` may contain, and blocks that it must choose from."""
        value, block = self.inner.value, self.choices.block
        reduced, best = self._reduced(self.inner.multipliers)
        _, entry, ousted = self._places(best)
        own = np.maximum(np.maximum(best, 0.0), entry)
        taken = (best > 0.0) & (entry == 0.0)
        without = value - np.where(taken, best - ousted, 0.0)
        least -= 1e-9 * value
        return np.flatnonzero(value - own[block] + reduced >= least), np.flatnonzero(without < least)


def _filled(choices: Choices, inner: _Inner, multipliers: Values) -> Index:
    """A choice within budget and whatever else still fits, best gain per cost first."""
    held = np.full(int(choices.block[-1]) + 1, -1)
    held[choices.block[inner.chosen]] = inner.chosen
    slack = choices.budget - inner.used
    weight = multipliers if multipliers.any() else np.ones_like(multipliers)
    room = None
    if choices.cluster is not None and choices.cap is not None:
        room = choices.cap - np.bincount(
            choices.cluster[choices.block[inner.chosen]], minlength=len(choices.cap)
        )
    for number in itertools.count():
        mine = held[choices.block]
        more = choices.gain - np.where(mine >= 0, choices.gain[mine], 0.0)
        dearer = choices.cost - np.where((mine >= 0)[:, None], choices.cost[mine], 0.0)
        fits = (more > 0.0) & (dearer <= slack).all(1)
        if room is not None and choices.cluster is not None:
            fits &= (mine >= 0) | (room[choices.cluster[choices.block]] > 0)
        options = np.flatnonzero(fits)
        if not len(options):
            break
        price = dearer[options] @ weight
        density = np.where(price > 0.0, more[options] / np.where(price > 0.0, price, 1.0), math.inf)
        # One at a time is best; where that would take long, one of every block at a time.
        take = np.argsort(-density, kind="stable") if number >= _NUM_FILLED else [int(np.argmax(density))]
        touched: set[int] = set()
        for o in options[take].tolist():
            b = int(choices.block[o])
            if b in touched or not (dearer[o] <= slack).all():
                continue
            if held[b] < 0 and room is not None and choices.cluster is not None:
                if room[choices.cluster[b]] < 1:
                    continue
                room[choices.cluster[b]] -= 1
            touched.add(b)
            held[b] = o
            slack = slack - dearer[o]
    return np.sort(held[held >= 0])


def _branch_and_cut(
    choices: Choices,
    core: Index,
    forced: Index,
    admissible: Callable[[Index], bool],
    tolerance: float,
    rows: tuple[csr_array, Values] | None,
) -> Index | None:
    """The optimum among the options of the core, or ``None`` if there is no admissible one."""
    if not len(core):
        return None
    block = choices.block[core]
    which, row = np.unique(block, return_inverse=True)
    ones = np.ones(len(core))
    columns = np.arange(len(core))
    one_each = csr_array((ones, (row, columns)), shape=(len(which), len(core)))
    least = np.isin(which, forced).astype(float)
    # Tolerances of HiGHS are 1e-6: in these units they are 1e-9 of the largest gain and of the budget.
    unit = 1e3 / np.where(choices.budget > 0, choices.budget, 1.0)
    gain = choices.gain[core] / max(float(choices.gain[core].max()) / 1e3, np.finfo(float).tiny)
    constraints = [
        LinearConstraint(one_each, least, 1.0),
        LinearConstraint(csr_array((choices.cost[core] * unit).T), -math.inf, choices.budget * unit),
    ]
    if choices.cluster is not None and choices.cap is not None:
        used, cluster = np.unique(choices.cluster[block], return_inverse=True)
        crowd = csr_array((ones, (cluster, columns)), shape=(len(used), len(core)))
        constraints.append(LinearConstraint(crowd, -math.inf, choices.cap[used]))
    extra = 0
    if rows is not None:
        matrix, limits = rows
        extra = matrix.shape[1] - len(choices.gain)  # auxiliary integers behind the options
        kept = np.r_[core, len(choices.gain) + np.arange(extra)]
        constraints = [LinearConstraint(_padded(c.A, extra), c.lb, c.ub) for c in constraints]
        constraints.append(LinearConstraint(matrix.tocsc()[:, kept], -math.inf, limits))
    upper = np.r_[ones, np.full(extra, math.inf)]
    for _ in range(_NUM_CUTS):
        result = milp(
            np.r_[-gain, np.zeros(extra)],
            integrality=1,
            bounds=Bounds(0, upper),
            constraints=constraints,
            options={"mip_rel_gap": tolerance, "node_limit": _NUM_NODES, "presolve": False},
        )
        if result.x is None:  # none found within the node limit, or none there is
            return None
        picked = np.flatnonzero(result.x[: len(core)] > 0.5)
        found = core[picked]
        if admissible(found):
            return found
        # Within the tolerances of HiGHS, but not exactly: these never go together, so say so.
        cut = np.zeros((1, len(core) + extra))
        cut[0, picked] = 1.0
        constraints.append(LinearConstraint(csr_array(cut), -math.inf, len(picked) - 1))
    return None


def _padded(matrix: csr_array | Values, columns: int) -> csr_array:
    matrix = csr_array(matrix)
    matrix.resize((matrix.shape[0], matrix.shape[1] + columns))
    return matrix
