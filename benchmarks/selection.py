"""How fast and how good the knapsack is: 100,000 candidates in 500 groups, against a bound.

    python benchmarks/selection.py            # all cases
    python benchmarks/selection.py --groups 50 --width 40

The bound is that of the Lagrangian relaxation, which knows nothing of rounding. Where groups make each other
dearer it includes that: the groups form a chain, so the relaxation is solved by a dynamic programme along it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_split import KnapsackEnergy
from lightning_split.candidates import Candidate
from lightning_split.pricing import Axis, NetworkPrices, Prices, Product

WEIGHTS = {1: (0.5, 0.5), 2: (1.0, 1.0, -1.0), 3: (1.0, 1.0, -0.5, -0.5)}
SCHEMES = {1: "binary", 2: "triplet", 3: "quartet"}


@dataclass
class Problem:
    """Candidates, what they cost, and how to bound the gain that a budget can pay for."""

    candidates: list[Candidate]
    network: NetworkPrices
    bound: Callable[[float], float]  # of an absolute budget
    round_to: int = 1


def names(count: int) -> list[str]:
    return [f"g{k:04d}" for k in range(count)]


def gains(rng: np.random.Generator, groups: int, width: int) -> np.ndarray:
    """Log-normal within a group, and between the groups."""
    return rng.lognormal(0, 1, (groups, width)) * rng.lognormal(0, 1, (groups, 1))


def separate(groups: int, width: int, *, schemes: int = 1, own: bool = False, round_to: int = 1) -> Problem:
    """Groups that do not change each other's cost; candidates cost the same within a group, or not."""
    rng = np.random.default_rng(0)
    cost = rng.integers(50, 5000, groups).astype(float)
    neurons = width // schemes
    gain = gains(rng, groups, neurons)
    factor = np.cumprod(
        np.c_[np.ones((groups * neurons, 1)), rng.uniform(1.05, 1.9, (groups * neurons, 2))], 1
    )
    candidates = []
    for k, name in enumerate(names(groups)):
        for i in range(neurons):
            for new in range(1, schemes + 1):
                each = float(rng.integers(50, 5000)) if own else cost[k]
                worth = float(gain[k, i] * factor[k * neurons + i, new - 1])
                candidates.append(
                    Candidate(name, i, worth, new * each, scheme=SCHEMES[new], weights=WEIGHTS[new])
                )
    prices = Prices(math.fsum(cost) * neurons, dict(zip(names(groups), map(float, cost), strict=True)))
    if own:
        prices = Prices(math.fsum(c.cost for c in candidates))
    block = np.unique([f"{c.group}{c.neuron:06d}" for c in candidates], return_inverse=True)[1]
    worth, costs = np.array([c.gain for c in candidates]), np.array([c.cost for c in candidates])
    starts = np.flatnonzero(np.r_[True, block[1:] != block[:-1]])

    def bound(budget: float) -> float:
        """The relaxation: every neuron takes what is best at a common price, at the lowest such total."""

        def at(price: float) -> float:
            best = np.maximum.reduceat(worth - price * costs, starts)
            return float(np.maximum(best, 0.0).sum() + price * budget)

        return lowest(at)

    widths = {} if own else dict.fromkeys(names(groups), neurons)
    return Problem(candidates, NetworkPrices(prices, widths), bound, round_to)


def chain(groups: int, width: int) -> Problem:
    """Each group reads the one before: a weight between them has as many entries as the product of both."""
    rng = np.random.default_rng(0)
    axes = [Axis(3.0), *(Axis(float(width), ((name, 1.0),)) for name in names(groups)), Axis(10.0)]
    factors = rng.integers(1, 50, groups + 1).astype(float)
    prices = Prices.of([Product(f, pair) for f, pair in zip(factors, itertools.pairwise(axes), strict=True)])
    gain = gains(rng, groups, width)
    candidates = [
        Candidate(name, i, float(gain[k, i]), prices.alone(name), weights=WEIGHTS[1])
        for k, name in enumerate(names(groups))
        for i in range(width)
    ]
    worth = np.c_[np.zeros(groups), np.cumsum(-np.sort(-gain, 1), 1)]
    sizes = width + np.arange(width + 1.0)

    def bound(budget: float) -> float:
        def at(price: float) -> float:
            best = worth[0] - price * factors[0] * 3.0 * sizes
            for k in range(1, groups):
                best = (best[:, None] - price * factors[k] * np.outer(sizes, sizes)).max(0) + worth[k]
            return float((best - price * factors[-1] * sizes * 10.0).max() + price * (prices.total + budget))

        return lowest(at, 40)

    return Problem(candidates, NetworkPrices(prices, dict.fromkeys(names(groups), width)), bound)


def lowest(at: Callable[[float], float], steps: int = 80) -> float:
    """Minimum of a convex function of a price, by golden section over its logarithm."""
    low, high, ratio = math.log(1e-8), math.log(1e3), (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    values = at(math.exp(a)), at(math.exp(b))
    for _ in range(steps):
        if values[0] <= values[1]:
            high, b = b, a
            a = high - ratio * (high - low)
            values = at(math.exp(a)), values[0]
        else:
            low, a = a, b
            b = low + ratio * (high - low)
            values = values[1], at(math.exp(b))
    return min(values)


def cost_of(chosen: Sequence[Candidate], prices: Prices) -> float:
    counts: dict[str, int] = {}
    for c in chosen:
        counts[c.group] = counts.get(c.group, 0) + c.num_new
    return prices.added(counts) if prices.linear or prices.terms else math.fsum(c.cost for c in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=500)
    parser.add_argument("--width", type=int, default=200, help="candidates in each group")
    args = parser.parse_args()
    size = args.groups, args.width
    cases: dict[str, Callable[[], Problem]] = {
        "one cost per group": lambda: separate(*size),
        "one cost per candidate": lambda: separate(*size, own=True),
        "two schemes": lambda: separate(*size, schemes=2),
        "three schemes": lambda: separate(*size, schemes=3),
        "widths in multiples of 8": lambda: separate(*size, round_to=8),
        "groups that multiply": lambda: chain(*size),
    }
    print(f"{args.groups * args.width:,} candidates in {args.groups} groups")
    head = ("case", "budget", "solver", "wall s", "CPU s", "chosen", "below the bound")
    print("{:<25} {:>6} {:>7} {:>7} {:>7} {:>7} {:>16}".format(*head))
    for name, make in cases.items():
        problem = make()
        for budget in (0.05, 0.3):
            absolute = budget * problem.network.prices.total
            bound = problem.bound(absolute)
            for solver in ("milp", "lp", "greedy"):
                options = {"solver": solver, "round_to": problem.round_to, "max_factor": None}
                strategy = KnapsackEnergy(budget, **options).bind(problem.network)
                start, cpu = time.perf_counter(), time.process_time()
                chosen = strategy.select(problem.candidates)
                wall, cpu = time.perf_counter() - start, time.process_time() - cpu
                assert cost_of(chosen, problem.network.prices) <= absolute
                below = 1 - math.fsum(c.gain for c in chosen) / bound
                row = (name, budget, solver, wall, cpu, len(chosen), below)
                print("{:<25} {:>6} {:>7} {:>7.2f} {:>7.2f} {:>7} {:>15.4%}".format(*row), flush=True)


if __name__ == "__main__":
    main()
