"""The knapsack against brute force: caps, schemes, rounding, several budgets, products of groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_split.candidates import Candidate
from lightning_split.choices import Choices, solve_choices
from lightning_split.menus import Rules, menu_of
from lightning_split.pricing import Axis, Limit, NetworkPrices, Prices, Product
from lightning_split.selection import KnapsackEnergy

SCHEMES = {1: (0.5, 0.5), 2: (1.0, 1.0, -1.0), 3: (1.0, 1.0, -0.5, -0.5)}
NAMES = {1: "binary", 2: "triplet", 3: "quartet"}


def candidate(group: str, neuron: int, gain: float, num_new: int = 1, cost: float = 1.0) -> Candidate:
    """A candidate that adds so many neurons."""
    return Candidate(group, neuron, gain, cost, scheme=NAMES[num_new], weights=SCHEMES[num_new])


def counts_of(chosen: Sequence[Candidate]) -> dict[str, int]:
    """New neurons of each group."""
    counts: dict[str, int] = {}
    for c in chosen:
        counts[c.group] = counts.get(c.group, 0) + c.num_new
    return counts


def every_choice(candidates: Sequence[Candidate]) -> itertools.product[tuple[Candidate | None, ...]]:
    """All ways to take at most one candidate of each neuron."""
    neurons: dict[tuple[str, int], list[Candidate | None]] = {}
    for c in candidates:
        neurons.setdefault((c.group, c.neuron), [None]).append(c)
    return itertools.product(*neurons.values())


def allowed(chosen: Sequence[Candidate], network: NetworkPrices, budget: float, **rules: float) -> bool:
    """Whether a choice keeps to the budget, the limits and the rules."""
    counts = counts_of(chosen)
    splits = {g: sum(c.group == g for c in chosen) for g in counts}
    return (
        network.prices.added(counts) <= budget
        and all(limit.prices.added(counts) <= limit.allowance for limit in network.limits)
        and all(n <= rules.get("per_group_max", math.inf) for n in splits.values())
        and all((network.widths[g] + n) % rules.get("round_to", 1) == 0 for g, n in counts.items())
        and all(n <= (rules.get("max_factor", 2.0) - 1) * network.widths[g] for g, n in counts.items())
    )


@st.composite
def networks(draw: st.DrawFn) -> tuple[NetworkPrices, list[Candidate]]:
    """A chain of up to four groups whose weights have sizes, and up to 14 candidates."""
    names = "abcd"[: draw(st.integers(1, 4))]
    widths = {g: draw(st.integers(2, 5)) for g in names}

    def prices(unit: str) -> Prices:
        ends = [Axis(3.0), *(Axis(float(widths[g]), ((g, 1.0),)) for g in names), Axis(2.0)]
        terms = [
            Product(float(draw(st.integers(1, 9))), (left, right)) for left, right in itertools.pairwise(ends)
        ]
        terms += [
            Product(1.0, (ends[i], ends[i])) for i in draw(st.sets(st.integers(1, len(names)), max_size=1))
        ]
        return Prices.of(terms, 7.0, unit)

    keys = draw(
        st.lists(
            st.tuples(st.sampled_from(names), st.integers(0, 4), st.sampled_from([1, 1, 2, 3])),
            max_size=14,
            unique=True,
        )
    )
    gains = st.one_of(st.integers(-1, 6).map(float), st.floats(0.01, 5.0))
    offered = [candidate(g, i % widths[g], draw(gains), n) for g, i, n in keys]
    offered = list({(c.group, c.neuron, c.scheme): c for c in offered}.values())
    limits = [
        Limit(f"max_{i}", p, draw(st.floats(0.0, 0.8)) * p.total)
        for i, p in enumerate([prices("params")] * draw(st.integers(0, 1)))
    ]
    network = NetworkPrices(prices("macs"), widths, tuple(limits))
    return network, offered


@settings(deadline=None, max_examples=150)
@given(
    problem=networks(),
    budget=st.one_of(st.floats(0.0, 1.0), st.integers(0, 200)),
    per_group_max=st.sampled_from([None, 1, 2]),
    max_factor=st.sampled_from([None, 1.5, 2.0]),
    round_to=st.sampled_from([1, 1, 2, 4]),
)
def test_the_optimum_of_a_network_equals_brute_force(
    problem: tuple[NetworkPrices, list[Candidate]],
    budget: float,
    per_group_max: int | None,
    max_factor: float | None,
    round_to: int,
) -> None:
    """Products of groups, schemes, caps, doubling, rounding and a second limit, all at once."""
    network, offered = problem
    priced = [
        Candidate(
            c.group,
            c.neuron,
            c.gain,
            network.prices.alone(c.group, c.num_new),
            scheme=c.scheme,
            weights=c.weights,
        )
        for c in offered
    ]
    strategy = KnapsackEnergy(budget, per_group_max=per_group_max, max_factor=max_factor, round_to=round_to)
    rules = {
        "per_group_max": per_group_max or math.inf,
        "max_factor": max_factor or math.inf,
        "round_to": round_to,
    }
    absolute = budget * network.prices.total if isinstance(budget, float) and budget <= 1 else budget
    best = 0.0
    for choice in every_choice([c for c in priced if c.gain > 0]):
        chosen = [c for c in choice if c is not None]
        gain = math.fsum(c.gain for c in chosen)
        if gain > best and allowed(chosen, network, absolute, **rules):
            best = gain
    for solver in ("milp", "lp", "greedy"):
        chosen = (
            KnapsackEnergy(
                budget, solver=solver, per_group_max=per_group_max, max_factor=max_factor, round_to=round_to
            )
            .bind(network)
            .select(priced)
        )
        assert allowed(chosen, network, absolute, **rules)
        assert len({(c.group, c.neuron) for c in chosen}) == len(chosen)
        gain = math.fsum(c.gain for c in chosen)
        assert gain <= best * (1 + 1e-12)
        if solver == "milp":
            assert gain == pytest.approx(best, rel=1e-9)
    assert strategy.bind(network).select(priced[::-1]) == strategy.bind(network).select(priced)


@settings(deadline=None, max_examples=60)
@given(
    costs=st.lists(st.floats(0.1, 9.0), min_size=1, max_size=12),
    seed=st.integers(0, 99),
    budget=st.floats(1.5, 30.0),
    round_to=st.sampled_from([2, 3]),
)
def test_rounding_of_bare_candidates_equals_brute_force(
    costs: list[float], seed: int, budget: float, round_to: int
) -> None:
    """Candidates with costs of their own, of which a multiple of a number is chosen in each group."""
    rng = np.random.default_rng(seed)
    offered = [
        candidate("ab"[i % 2], i // 2 if i < 8 else (i - 8) // 2, float(rng.uniform(0.1, 2)), 1 + (i >= 8), c)
        for i, c in enumerate(costs)
    ]
    best = 0.0
    for choice in every_choice(offered):
        chosen = [c for c in choice if c is not None]
        fits = math.fsum(c.cost for c in chosen) <= budget
        if fits and all(n % round_to == 0 for n in counts_of(chosen).values()):
            best = max(best, math.fsum(c.gain for c in chosen))
    for solver in ("milp", "lp", "greedy"):
        chosen = KnapsackEnergy(budget, solver=solver, round_to=round_to, max_factor=None).select(offered)
        assert math.fsum(c.cost for c in chosen) <= budget
        assert all(n % round_to == 0 for n in counts_of(chosen).values())
        gain = math.fsum(c.gain for c in chosen)
        assert gain <= best * (1 + 1e-12)
        if solver == "milp":
            assert gain == pytest.approx(best, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    gains=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 3), st.floats(0.01, 3.0)), min_size=1, max_size=10
    ),
    max_splits=st.sampled_from([None, 1, 2, 3]),
    max_new=st.sampled_from([None, 3, 5]),
    round_to=st.sampled_from([1, 2, 3]),
    width=st.integers(2, 5),
)
def test_a_menu_lists_the_best_choice_of_every_size(
    gains: list[tuple[int, int, float]],
    max_splits: int | None,
    max_new: int | None,
    round_to: int,
    width: int,
) -> None:
    """Its levels are those that are worth more than all lower ones; its members are such a choice."""
    offered = [candidate("g", i, gain, n) for i, n, gain in gains]
    rules = Rules(max_splits, max_new, width, round_to)
    best: dict[int, float] = {}
    for choice in every_choice(offered):
        chosen = [c for c in choice if c is not None]
        new = sum(c.num_new for c in chosen)
        if chosen and len(chosen) <= (max_splits or 99) and rules.allows(np.array([new]))[0]:
            best[new] = max(best.get(new, 0.0), math.fsum(c.gain for c in chosen))
    rising = {n: g for n, g in best.items() if all(g > best[k] * (1 + 1e-12) for k in best if k < n)}
    menu = menu_of("g", offered, rules)
    found = dict(zip(menu.levels.tolist(), menu.gains.tolist(), strict=True))
    assert found.keys() >= rising.keys()
    for level, gain in found.items():
        members = menu.members(level)
        assert math.fsum(c.gain for c in members) == pytest.approx(gain)
        assert gain == pytest.approx(best[level])
        assert sum(c.num_new for c in members) == level
        assert len({c.neuron for c in members}) == len(members) <= (max_splits or 99)


def _chain(num_groups: int, width: int, seed: int) -> tuple[NetworkPrices, list[Candidate]]:
    rng = np.random.default_rng(seed)
    names = [f"g{i:03d}" for i in range(num_groups)]
    axes = [Axis(3.0), *(Axis(float(width), ((g, 1.0),)) for g in names), Axis(10.0)]
    terms = [Product(float(rng.integers(1, 9)), pair) for pair in itertools.pairwise(axes)]
    prices = Prices.of(terms)
    offered = [
        candidate(g, i, float(gain)) for g in names for i, gain in enumerate(rng.lognormal(0, 1, width))
    ]
    return NetworkPrices(prices, dict.fromkeys(names, width)), offered


@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_products_of_many_groups_come_close_to_the_bound(budget: float) -> None:
    """A chain of groups: the Lagrangian bound, by dynamic programming along it, is nearly reached."""
    network, offered = _chain(20, 32, seed=1)
    chosen = KnapsackEnergy(budget).bind(network).select(offered)
    allowance = budget * network.prices.total
    assert network.prices.added(counts_of(chosen)) <= allowance
    gain = math.fsum(c.gain for c in chosen)
    levels = np.arange(33)
    gains = [
        np.r_[0.0, np.cumsum(sorted((c.gain for c in offered if c.group == g), reverse=True))]
        for g in network.widths
    ]
    sizes = [np.array([3.0]), *(32.0 + levels for _ in gains), np.array([10.0])]
    rng = np.random.default_rng(1)
    factors = [float(rng.integers(1, 9)) for _ in range(21)]

    def bound(price: float) -> float:
        worth = -price * factors[0] * sizes[0][:, None] * sizes[1][None, :]
        best = worth[0] + gains[0]
        for k in range(1, 20):
            step = best[:, None] - price * factors[k] * sizes[k][:, None] * sizes[k + 1][None, :]
            best = step.max(0) + gains[k]
        value = (best - price * factors[20] * sizes[20] * 10.0).max()
        return float(value + price * (network.prices.total + allowance))

    assert network.prices.total == sum(
        f * float(a[0]) * float(b[0]) for f, (a, b) in zip(factors, itertools.pairwise(sizes), strict=True)
    )
    least = min(bound(price) for price in np.geomspace(1e-5, 1.0, 400))
    assert least * (1 - 1e-3) <= gain <= least
    greedy = KnapsackEnergy(budget, solver="greedy").bind(network).select(offered)
    assert math.fsum(c.gain for c in greedy) >= 0.98 * least


def test_several_budgets_reach_the_linear_relaxation() -> None:
    """Two resources and caps at once, against scipy's own relaxation."""
    from scipy.optimize import linprog

    rng = np.random.default_rng(0)
    n, blocks = 300, 100
    block = np.repeat(np.arange(blocks), 3)
    gain, cost = rng.uniform(0.1, 1, n), rng.uniform(0.1, 1, (n, 2))
    cluster, cap, budget = np.arange(blocks) // 10, np.full(10, 4), np.array([12.0, 9.0])
    choices = Choices(block, gain, cost, budget, cluster, cap)

    def admissible(chosen: np.ndarray) -> bool:
        crowd = np.bincount(cluster[block[chosen]], minlength=10)
        return bool((cost[chosen].sum(0) <= budget).all() and (crowd <= cap).all())

    found = solve_choices(choices, admissible)
    assert admissible(found)
    assert len(set(block[found])) == len(found)
    rows = [(block == b).astype(float) for b in range(blocks)]
    rows += [(cluster[block] == k).astype(float) for k in range(10)] + [*cost.T]
    limits = [1.0] * blocks + [4.0] * 10 + [*budget]
    relaxed = -linprog(-gain, A_ub=np.array(rows), b_ub=limits, bounds=(0, 1)).fun
    assert relaxed * 0.98 <= gain[found].sum() <= relaxed * (1 + 1e-9)
    rounded = solve_choices(choices, admissible, exact=False)
    assert admissible(rounded)
    assert relaxed * 0.95 <= gain[rounded].sum() <= gain[found].sum() * (1 + 1e-9)


@pytest.mark.parametrize("seed", [0, 4, 11])
def test_small_networks_are_solved_exactly_where_iterating_is_not_enough(seed: int) -> None:
    """Knapsacks with fixed products end below the optimum here, so every combination must be tried."""
    rng = np.random.default_rng(seed)
    axes = [Axis(3.0), *(Axis(3.0, ((g, 1.0),)) for g in "abc"), Axis(2.0)]
    prices = Prices.of([Product(float(rng.integers(1, 9)), pair) for pair in itertools.pairwise(axes)])
    offered = [candidate(g, i, float(rng.integers(1, 9))) for g in "abc" for i in range(3)]
    network = NetworkPrices(prices, dict.fromkeys("abc", 3))
    best = max(
        math.fsum(c.gain for c in choice if c is not None)
        for choice in every_choice(offered)
        if prices.added(counts_of([c for c in choice if c is not None])) <= 0.5 * prices.total
    )

    def gain(solver: Any) -> float:
        chosen = KnapsackEnergy(0.5, solver=solver).bind(network).select(offered)
        return math.fsum(c.gain for c in chosen)

    assert gain("lp") < gain("milp") == best
