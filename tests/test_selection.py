"""Selection strategies against brute force, on plain records."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_split.selection import (
    Candidate,
    KnapsackEnergy,
    SelectionStrategy,
    Threshold,
    TopK,
    best_per_neuron,
)


@st.composite
def candidate_lists(draw: st.DrawFn) -> list[Candidate]:
    """Up to 12 candidates of 3 groups, often several schemes per neuron, often with ties."""
    numbers = st.one_of(st.integers(-3, 6).map(float), st.floats(-2.0, 5.0))
    costs = st.one_of(st.integers(1, 9).map(float), st.floats(0.01, 50.0))
    keys = draw(
        st.lists(
            st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.sampled_from(["x", "y", "z"])),
            max_size=12,
            unique=True,
        )
    )
    return [
        Candidate(group, neuron, gain=draw(numbers), cost=draw(costs), scheme=scheme)
        for group, neuron, scheme in keys
    ]


def keys(chosen: Sequence[Candidate]) -> list[tuple[str, int]]:
    return [(c.group, c.neuron) for c in chosen]


def total_gain(chosen: Sequence[Candidate]) -> float:
    return math.fsum(c.gain for c in chosen)


def total_cost(chosen: Sequence[Candidate]) -> float:
    return math.fsum(c.cost for c in chosen)


def best_by_force(candidates: Sequence[Candidate], budget: float, per_group_max: int | None) -> float:
    """Largest total gain over all admissible subsets."""
    neurons: dict[tuple[str, int], list[Candidate | None]] = {}
    for c in candidates:
        neurons.setdefault((c.group, c.neuron), [None]).append(c)
    best = 0.0
    for choice in itertools.product(*neurons.values()):
        chosen = [c for c in choice if c is not None]
        crowd = max(Counter(c.group for c in chosen).values(), default=0)
        if total_cost(chosen) <= budget and crowd <= (per_group_max or 12):
            best = max(best, total_gain(chosen))
    return best


def check_admissible(
    chosen: Sequence[Candidate],
    candidates: Sequence[Candidate],
    budget: float,
    per_group_max: int | None,
) -> None:
    assert all(c in candidates and c.gain > 0 for c in chosen)
    assert keys(chosen) == sorted(set(keys(chosen)))
    assert total_cost(chosen) <= budget
    assert max(Counter(c.group for c in chosen).values(), default=0) <= (per_group_max or 12)


budgets = st.one_of(st.integers(0, 40), st.floats(0.0, 1.0), st.floats(1.5, 80.0))
caps = st.sampled_from([None, 1, 2])


def absolute(budget: float, candidates: Sequence[Candidate]) -> float:
    fractional = isinstance(budget, float) and budget <= 1.0
    return budget * total_cost(candidates) if fractional else budget


@settings(deadline=None, max_examples=150)
@given(candidates=candidate_lists(), budget=budgets, cap=caps)
def test_the_exact_knapsack_equals_brute_force(
    candidates: list[Candidate], budget: float, cap: int | None
) -> None:
    """The optimum over all subsets, within budget, with schemes and caps."""
    chosen = KnapsackEnergy(budget, per_group_max=cap).select(candidates)
    limit = absolute(budget, candidates)
    check_admissible(chosen, candidates, limit, cap)
    best = best_by_force(candidates, limit, cap)
    assert total_gain(chosen) == pytest.approx(best, rel=1e-7, abs=1e-300)


@settings(deadline=None, max_examples=150)
@given(candidates=candidate_lists(), budget=budgets, cap=caps, solver=st.sampled_from(["lp", "greedy"]))
def test_the_approximate_knapsacks_are_admissible_and_leave_nothing_affordable(
    candidates: list[Candidate], budget: float, cap: int | None, solver: str
) -> None:
    """Budget and caps hold, and nothing more could be added but for rounding of the budget."""
    chosen = KnapsackEnergy(budget, solver=solver, per_group_max=cap).select(candidates)
    limit = absolute(budget, candidates)
    check_admissible(chosen, candidates, limit, cap)
    groups = Counter(c.group for c in chosen)
    left = [
        c
        for c in candidates
        if c.gain > 0
        and (c.group, c.neuron) not in keys(chosen)
        and groups[c.group] < (cap or 12)
        and total_cost(chosen) + c.cost < limit * (1 - 1e-9)
    ]
    best_single = max((c.gain for c in candidates if c.cost <= limit), default=0.0)
    assert not left or (solver == "greedy" and total_gain(chosen) == best_single)
    assert total_gain(chosen) >= (best_single if solver == "greedy" else 0.0)


@settings(deadline=None, max_examples=60)
@given(candidates=candidate_lists(), shuffle=st.randoms(use_true_random=False))
def test_no_strategy_depends_on_the_order_of_the_candidates(
    candidates: list[Candidate], shuffle: random.Random
) -> None:
    """A permutation of the candidates gives the same list, ties included."""
    shuffled = list(candidates)
    shuffle.shuffle(shuffled)
    strategies: list[SelectionStrategy] = [
        TopK(fraction=0.5),
        TopK(count=3, per_group_max=1),
        Threshold(-1.0, max_count=2),
        KnapsackEnergy(10),
        KnapsackEnergy(0.4, solver="lp", per_group_max=2),
        KnapsackEnergy(0.4, solver="greedy"),
    ]
    for strategy in strategies:
        chosen = strategy.select(candidates)
        assert chosen == strategy.select(shuffled)
        assert keys(chosen) == sorted(set(keys(chosen)))
    assert best_per_neuron(candidates) == best_per_neuron(shuffled)


@settings(deadline=None, max_examples=100)
@given(candidates=candidate_lists(), fraction=st.floats(0.0, 1.0), cap=caps)
def test_top_k_equals_its_definition(candidates: list[Candidate], fraction: float, cap: int | None) -> None:
    """The k largest positive gains, best scheme of each neuron, ties by group and neuron."""
    chosen = TopK(fraction=fraction, per_group_max=cap).select(candidates)
    neurons = {key: max(c.gain for c in candidates if (c.group, c.neuron) == key)
               for key in keys(candidates)}  # fmt: skip
    limit = math.ceil(fraction * len(neurons) - 1e-9 * (fraction > 1e-9))
    expected: list[tuple[str, int]] = []
    for key in sorted(neurons, key=lambda key: (-neurons[key], key)):
        crowd = sum(group == key[0] for group, _ in expected)
        if len(expected) < limit and neurons[key] > 0 and crowd < (cap or 12):
            expected.append(key)
    assert keys(chosen) == sorted(expected)
    assert [c.gain for c in chosen] == [neurons[key] for key in keys(chosen)]


@pytest.mark.parametrize(
    ("fraction", "num_neurons", "expected"),
    [
        (0.3, 10, 3),
        (0.07, 100, 7),
        (0.1, 30, 3),
        (0.3, 11, 4),
        (1e-9, 5, 1),
        (0.0, 5, 0),
        (1, 5, 5),
    ],
)
def test_a_fraction_is_rounded_up_of_the_distinct_neurons(
    fraction: float, num_neurons: int, expected: int
) -> None:
    """Rounding errors do not add a neuron, several schemes do not count twice."""
    offered = [Candidate("g", i, 1.0, scheme=s) for i in range(num_neurons) for s in "ab"]
    assert keys(TopK(fraction).select(offered)) == [("g", i) for i in range(expected)]


def test_top_k_counts_only_positive_gains() -> None:
    """Neurons that would raise the loss are left out, but count for the fraction."""
    offered = [Candidate("g", i, gain) for i, gain in enumerate([-1.0, 0.0, 2.0, 1.0, 3.0])]
    assert keys(TopK(count=4).select(offered)) == [("g", 2), ("g", 3), ("g", 4)]
    assert keys(TopK(fraction=0.4).select(offered)) == [("g", 2), ("g", 4)]
    assert TopK(count=0).select(offered) == []


def test_top_k_defaults_to_the_fraction_of_the_paper() -> None:
    """TopK() is TopK(fraction=0.3), also in its repr."""
    assert TopK() == TopK(0.3) == TopK(fraction=0.3)
    assert repr(TopK()) == "TopK(fraction=0.3, count=None, per_group_max=None)"
    assert TopK(count=8).fraction is None


def test_the_threshold_is_the_one_of_the_papers() -> None:
    """The splitting index decides, the negative gain where there is none, equality included."""
    offered = [
        Candidate("g", 0, gain=9.0, splitting_index=-0.9e-3),
        Candidate("g", 1, gain=1e-8, splitting_index=-1e-3),
        Candidate("g", 2, gain=2e-3),
        Candidate("g", 3, gain=0.5e-3),
        Candidate("g", 4, gain=1.0, splitting_index=0.5, scheme="x"),
        Candidate("g", 4, gain=0.1, splitting_index=-5.0, scheme="y"),
    ]
    assert keys(Threshold(-1e-3).select(offered)) == [("g", 1), ("g", 2), ("g", 4)]
    assert Threshold(-1e-3).select(offered)[2].scheme == "y"
    assert keys(Threshold(-1e-3, max_count=2).select(offered)) == [("g", 2), ("g", 4)]
    assert Threshold(-10.0).select(offered) == []


def test_a_fractional_budget_refers_to_the_bound_network() -> None:
    """A float up to 1 is a share of the network, else of the candidates; the rest is absolute."""
    offered = [Candidate("g", i, gain=1.0, cost=10.0) for i in range(10)]
    assert len(KnapsackEnergy(0.5).select(offered)) == 5
    bound = KnapsackEnergy(0.5).bind(60.0)
    assert len(bound.select(offered)) == 3
    assert KnapsackEnergy(0.5).network_cost is None
    assert len(KnapsackEnergy(1.0).bind(40.0).select(offered)) == 4
    assert len(KnapsackEnergy(25).bind(60.0).select(offered)) == 2
    assert len(KnapsackEnergy(25.0).bind(60.0).select(offered)) == 2
    ones = [replace(c, cost=1.0) for c in offered]
    assert len(KnapsackEnergy(1).select(ones)) == 1
    assert len(KnapsackEnergy(1.0).select(ones)) == 10
    assert TopK().bind(60.0) == TopK()


@pytest.mark.parametrize("solver", ["milp", "lp", "greedy"])
def test_nothing_is_bought_for_nothing(solver: str) -> None:
    """No candidates, no gain, no budget or too small a budget: an empty list."""
    offered = [Candidate("g", 0, gain=1.0, cost=3.0), Candidate("g", 1, gain=2.0, cost=4.0)]
    losing = [Candidate("g", 0, gain=0.0), Candidate("g", 1, gain=-1.0)]
    for budget in (0, 0.0, 2.9):
        assert KnapsackEnergy(budget, solver=solver).select(offered) == []
    assert KnapsackEnergy(100, solver=solver).select(losing) == []
    assert KnapsackEnergy(100, solver=solver).select([]) == []
    assert keys(KnapsackEnergy(3, solver=solver).select(offered)) == [("g", 0)]


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_exact_beats_greedy_where_greedy_is_wrong(unit: float) -> None:
    """The textbook trap: the densest item blocks the best pair."""
    offered = [
        Candidate("g", 0, gain=6.1 * unit, cost=6.0),
        Candidate("g", 1, gain=5.0 * unit, cost=5.0),
        Candidate("g", 2, gain=5.0 * unit, cost=5.0),
    ]
    assert keys(KnapsackEnergy(10).select(offered)) == [("g", 1), ("g", 2)]
    assert keys(KnapsackEnergy(10, solver="greedy").select(offered)) == [("g", 0)]


@pytest.mark.parametrize("solver", ["milp", "lp", "greedy"])
@pytest.mark.parametrize("cap", [None, 7])
def test_with_equal_costs_the_knapsack_is_top_k(solver: str, cap: int | None) -> None:
    """Many schemes per neuron and many neurons per group, in a case that is solved by sorting."""
    generator = random.Random(0)
    offered = [
        Candidate(group, i, generator.uniform(-0.2, 1.0), cost=0.25, scheme=scheme)
        for group in "abcd"
        for i in range(20)
        for scheme in "wxyz"
    ]
    chosen = KnapsackEnergy(6, solver=solver, per_group_max=cap).select(offered)
    assert chosen == TopK(count=24, per_group_max=cap).select(offered)


@pytest.mark.parametrize("solver", ["milp", "lp"])
def test_the_limits_are_part_of_the_programme(solver: str) -> None:
    """Where one split per neuron or per-group caps bind, small dense splits do not crowd out."""
    schemes = [
        Candidate("g", i, gain, cost=cost, scheme=scheme)
        for i in range(30)
        for scheme, gain, cost in [("small", 1.0, 1.0), ("large", 1.9, 2.0)]
    ]
    chosen = KnapsackEnergy(60, solver=solver).select(schemes)
    assert [c.scheme for c in chosen] == ["large"] * 30
    crowd = [Candidate("g", i, gain=1.0, cost=1.0) for i in range(15)]
    crowd += [Candidate("g", i, gain=5.0, cost=10.0) for i in range(15, 30)]
    chosen = KnapsackEnergy(100, solver=solver, per_group_max=10).select(crowd)
    assert [c.gain for c in chosen] == [5.0] * 10


@pytest.mark.parametrize("solver", ["milp", "lp", "greedy"])
def test_a_tie_is_broken_the_same_way_in_any_order(solver: str) -> None:
    """Equal neurons, of which only some can be paid: the same ones for every permutation."""
    offered = [Candidate(group, i, 1.0, cost=2.0) for group in "ab" for i in range(4)]
    strategy = KnapsackEnergy(7, solver=solver)
    chosen = strategy.select(offered)
    assert len(chosen) == 3
    for seed in range(5):
        random.Random(seed).shuffle(offered)
        assert strategy.select(offered) == chosen


@pytest.mark.parametrize("solver", ["milp", "lp", "greedy"])
@pytest.mark.parametrize("cap", [None, 2])
def test_ties_go_to_the_first_group_and_neuron(solver: str, cap: int | None) -> None:
    """Across groups and within them, whatever the solver happened to take; caps hold all the same."""
    tied = [Candidate(group, i, 1.0, cost=2.0) for group in "dcba" for i in range(4)]
    others = [Candidate("a", 7, 5.0, cost=3.0), Candidate("e", 0, 4.0, cost=1.5)]
    chosen = KnapsackEnergy(4.5 + 10.0, solver=solver, per_group_max=cap).select(tied + others)
    first = [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0)] if cap is None else None
    found = keys(chosen)
    assert ("a", 7) in found
    assert ("e", 0) in found
    if first is not None:
        assert found == sorted([*first, ("a", 7), ("e", 0)])
    else:
        assert max(Counter(c.group for c in chosen).values()) <= 2
        assert len(found) == 7
    mixed = [Candidate("g", 5 - i, 1.0, cost=2.0) for i in range(6)] + [Candidate("g", 9, 3.0, cost=3.0)]
    assert keys(KnapsackEnergy(9, solver=solver).select(mixed)) == [("g", 0), ("g", 1), ("g", 2), ("g", 9)]


@pytest.mark.parametrize("solver", ["milp", "lp", "greedy"])
def test_rounding_of_the_running_sum_does_not_overrun_the_budget(solver: str) -> None:
    """Costs whose sum is within the budget only if it is rounded after every term."""
    costs = [3.1, 5.1, 4.2]
    budget = (costs[0] + costs[1]) + costs[2]
    assert math.fsum(costs) > budget
    offered = [Candidate("g", i, 3.0 - i / 2, cost=cost) for i, cost in enumerate(costs)]
    chosen = KnapsackEnergy(budget, solver=solver).select(offered)
    assert keys(chosen) == [("g", 0), ("g", 1)]


def test_greedy_takes_the_one_large_prize() -> None:
    """A tiny dense item does not displace the one worth more than all else."""
    offered = [Candidate("g", 0, gain=1.0, cost=0.5), Candidate("g", 1, gain=10.0, cost=10.0)]
    assert keys(KnapsackEnergy(10, solver="greedy").select(offered)) == [("g", 1)]


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("gain", [1e-12, 1.0, 1e9])
def test_the_budget_holds_to_the_last_unit(unit: float, gain: float) -> None:
    """Costs that overrun by one part in 1e8, far below the solver's tolerance, are not bought."""
    offered = [
        Candidate("g", 0, gain=3 * gain, cost=5e7 * unit),
        Candidate("g", 1, gain=3 * gain, cost=(5e7 + 1) * unit),
        Candidate("g", 2, gain=2 * gain, cost=5e7 * unit),
    ]
    chosen = KnapsackEnergy(1e8 * unit).select(offered)
    assert keys(chosen) == [("g", 0), ("g", 2)]


def test_many_near_misses_do_not_overrun_the_budget() -> None:
    """Also where more subsets overrun by a hair than the solver is asked to exclude."""
    offered = [Candidate("g", i, gain=1.0 + 1e-3 * i, cost=1.0 + 1e-11) for i in range(12)]
    chosen = KnapsackEnergy(6.0).select(offered)
    assert total_cost(chosen) <= 6.0
    assert keys(chosen) == [("g", i) for i in range(7, 12)]


def test_thousands_of_neurons_are_solved_nearly_as_well_as_the_relaxation() -> None:
    """A network of realistic size: exact within 1e-6 of the bound that greedy density gives."""
    generator = random.Random(0)
    layer_costs = [9 * width * 2 + 1 for width in (16, 64, 128, 256, 512)]
    offered = [
        Candidate(f"layer{k}", i, gain=generator.lognormvariate(0, 1), cost=float(cost))
        for k, cost in enumerate(layer_costs)
        for i in range(400)
    ]
    exact = KnapsackEnergy(0.2).select(offered)
    greedy = KnapsackEnergy(0.2, solver="greedy").select(offered)
    lp = KnapsackEnergy(0.2, solver="lp").select(offered)
    budget = 0.2 * total_cost(offered)
    assert max(map(total_cost, (exact, greedy, lp))) <= budget
    assert total_gain(exact) >= max(total_gain(greedy), total_gain(lp))
    # Density order with a fractional last item is the optimum of the relaxation.
    bound, left = 0.0, budget
    for c in sorted(offered, key=lambda c: -c.gain / c.cost):
        share = min(1.0, left / c.cost)
        bound, left = bound + share * c.gain, left - share * c.cost
    assert bound * (1 - 1e-4) <= total_gain(exact) <= bound


def test_the_best_scheme_of_a_neuron_is_kept() -> None:
    """Largest gain, then lower cost, then scheme name."""
    offered = [
        Candidate("g", 1, 1.0, cost=2.0, scheme="a"),
        Candidate("g", 1, 1.0, cost=1.0, scheme="b"),
        Candidate("g", 0, 1.0, scheme="d"),
        Candidate("g", 0, 1.0, scheme="c"),
        Candidate("f", 7, -1.0, cost=5.0),
        Candidate("f", 7, 3.0, cost=9.0),
    ]
    best = best_per_neuron(offered)
    assert [(c.group, c.neuron, c.gain, c.scheme) for c in best] == [
        ("f", 7, 3.0, "binary"),
        ("g", 0, 1.0, "c"),
        ("g", 1, 1.0, "b"),
    ]


def test_candidates_compare_without_their_tensors() -> None:
    """Records are hashable values; displacements take no part."""
    one = Candidate("g", 0, 1.0, displacements=torch.zeros(2, 3))
    other = Candidate("g", 0, 1.0, displacements=torch.ones(2, 3))
    assert one == other
    assert len({one, other}) == 1
    assert "tensor" not in repr(one)


def test_a_user_strategy_takes_five_lines() -> None:
    """One method is enough; cost and bind have defaults."""

    class Widest(SelectionStrategy):
        cost = "macs"

        def select(self, candidates: Sequence[Candidate]) -> list[Candidate]:
            return best_per_neuron(candidates)[:1]

    offered = [Candidate("g", 1, 1.0), Candidate("g", 0, 1.0)]
    strategy = Widest()
    assert keys(strategy.bind(10.0).select(offered)) == [("g", 0)]
    assert strategy.cost == "macs"
    assert TopK().cost == Threshold(-1.0).cost == SelectionStrategy.cost == "params"
    assert KnapsackEnergy(0.2).cost == "macs"
    assert KnapsackEnergy(0.2, cost="params").cost == "params"
    with pytest.raises(TypeError, match="abstract"):
        SelectionStrategy()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(fraction=0.3, count=2), "TopK takes fraction or count, not both"),
        (lambda: TopK(fraction=1.5), "between 0 and 1, got 1.5; for a number of neurons"),
        (lambda: TopK(fraction=-0.1), "between 0 and 1, got -0.1"),
        (lambda: TopK(fraction=math.nan), "between 0 and 1, got nan"),
        (lambda: TopK(count=-1), "TopK needs count to be an integer of at least 0, got -1"),
        (lambda: TopK(count=2.5), "TopK needs count to be an integer"),
        (lambda: TopK(per_group_max=0), "per_group_max to be an integer of at least 1, got 0"),
        (lambda: Threshold(math.nan), "Threshold needs a finite splitting index, got nan"),
        (lambda: Threshold(-1.0, max_count=-1), "Threshold needs max_count to be an integer"),
        (lambda: KnapsackEnergy(-0.1), "finite budget of at least 0, got -0.1"),
        (lambda: KnapsackEnergy(math.nan), "finite budget of at least 0, got nan"),
        (lambda: KnapsackEnergy(math.inf), "finite budget of at least 0, got inf"),
        (lambda: KnapsackEnergy(1, cost="flops"), "know cost 'flops'; use one of params, macs"),
        (lambda: KnapsackEnergy(1, solver="dp"), "solver 'dp'; use one of milp, lp, greedy"),
        (lambda: KnapsackEnergy(1, per_group_max=0), "KnapsackEnergy needs per_group_max"),
        (lambda: KnapsackEnergy(0.2).bind(math.nan), "finite network_cost of at least 0"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], SelectionStrategy], message: str) -> None:
    """Options out of range are refused when the strategy is made."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("strategy", [TopK(), Threshold(-1.0), KnapsackEnergy(10)], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(strategy: SelectionStrategy, bad: float) -> None:
    """The message names the neuron and what is wrong with it."""
    fine = Candidate("g", 0, 1.0)
    with pytest.raises(ValueError, match=r"Neuron 3 of group 'h' has gain .*check the loss"):
        strategy.select([fine, Candidate("h", 3, bad)])
    with pytest.raises(ValueError, match="has splitting index"):
        strategy.select([fine, Candidate("h", 3, 1.0, splitting_index=bad)])


@pytest.mark.parametrize("cost", [0.0, -1.0, math.nan, math.inf])
def test_costs_that_are_not_positive_are_refused(cost: float) -> None:
    """A knapsack of free items has no meaning; strategies that ignore cost do not mind."""
    offered = [Candidate("h", 3, 1.0, cost=cost)]
    with pytest.raises(ValueError, match=r"Neuron 3 of group 'h' has cost .* positive finite"):
        KnapsackEnergy(10).select(offered)
    assert TopK(count=1).select(offered) == offered
