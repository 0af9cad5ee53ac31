"""Data compression by maximum mean discrepancy: which particle to split, or where to put a new one.

    python examples/herding.py             # 20 data sets, less than a minute
    python examples/herding.py --fast      # a few seconds, for a test

The setting of S2D (Liu, Wu, Wang 2019), appendix C.1: 1000 points from
0.2 N(-2, 0.5) + 0.3 N(1, 0.5) + 0.5 N(3, 0.5) are to be replaced by a few weighted particles, so that the MMD
between both is least. One particle starts in [-5, -3]; every 1000 steps of AdaGrad (rate 0.01) one more
comes, by a split or as a new point. Particle weights are constants: a split halves its parent's, new points
make all weights equal.

The loss Σ w_i w_j k(θ_i, θ_j) − 2 Σ w_i E[k(θ_i, θ*)] + const is a network with one hidden layer in disguise
(S2D, equation 17), and the splitting matrix of a particle is the second derivative of its potential. All
methods and data sets run as one batch; means over the points are taken by their Gauss rule of 64 nodes, to
rounding the same. The paper does not say the kernel's width (here 1), how many particles (here up to 10), nor
where new points are drawn (here in [-5, 5]). At the paper's rate a particle moves by 0.6 at most in a stage
and never reaches most of the data; therefore the table has a second part with the rate 0.1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from toy.quadrature import gauss_rule
from toy.report import COLOURS, Claim, canvas, print_claims, quartiles, save, table

MEANS, SHARES, VARIANCE = (-2.0, 1.0, 3.0), (0.2, 0.3, 0.5), 0.5


@dataclass(frozen=True)
class Points:
    """B sets of points with masses that sum to 1, and their own mean kernel."""

    place: Tensor  # (B, Q)
    mass: Tensor  # (B, Q)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of values (B, M, Q) over the points, (B, M)."""
        return torch.einsum("bmq,bq->bm", values, self.mass)

    @property
    def energy(self) -> Tensor:
        return (self.mean(kernel(self.place, self.place)) * self.mass).sum(1)

    def repeat(self, times: int) -> Points:
        return Points(self.place.repeat(times, 1), self.mass.repeat(times, 1))


@dataclass(frozen=True)
class Particles:
    """B sets of K particles."""

    place: Tensor  # (B, K)
    weight: Tensor  # (B, K), sums to 1
    free: Tensor  # (B, K), bool: moves


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """The Gaussian kernel of width 1: (..., K) and (..., N) to (..., K, N)."""
    return (-((a[..., :, None] - b[..., None, :]) ** 2) / 2).exp()


def mmd(p: Particles, data: Points, energy: Tensor) -> Tensor:
    """Squared maximum mean discrepancy to the points, whose energy is the constant term, (B,)."""
    own = torch.einsum("bi,bij,bj->b", p.weight, kernel(p.place, p.place), p.weight)
    return own - 2 * (p.weight * data.mean(kernel(p.place, data.place))).sum(1) + energy


def potential(p: Particles, data: Points, at: Tensor, order: int = 0) -> Tensor:
    """Half the loss's derivative by mass at ``at`` (B, M), or that function's first or second derivative."""

    def derivative(others: Tensor) -> Tensor:
        gap = at[:, :, None] - others[:, None, :]
        return kernel(at, others) * (1.0, -gap, gap * gap - 1)[order]

    return torch.einsum("bmk,bk->bm", derivative(p.place), p.weight) - data.mean(derivative(data.place))


def descend(
    p: Particles, data: Points, energy: Tensor, steps: int, rate: float, every: int
) -> tuple[Particles, Tensor, Tensor]:
    """AdaGrad, started afresh; also the losses and the places before each ``every`` steps."""
    place, squares = p.place, torch.zeros_like(p.place)
    losses, places = [], []
    for step in range(steps):
        now = Particles(place, p.weight, p.free)
        if step % every == 0:
            losses.append(mmd(now, data, energy))
            places.append(place)
        slope = 2 * p.weight * potential(now, data, place, order=1) * p.free
        squares = squares + slope * slope
        place = place - rate * slope / (squares.sqrt() + 1e-10)
    return Particles(place, p.weight, p.free), torch.stack(losses, 1), torch.stack(places, 1)


def split(p: Particles, which: Tensor, step: float) -> Particles:
    """Two particles of half the weight, ``step`` to the left and right of their parent."""
    here = torch.arange(len(which))
    place, weight = p.place.clone(), p.weight.clone()
    place[here, which] += step
    weight[here, which] /= 2
    return Particles(
        torch.cat([place, (p.place[here, which] - step)[:, None]], 1),
        torch.cat([weight, weight[here, which, None]], 1),
        torch.cat([p.free, p.free[:, :1]], 1),
    )


def add(p: Particles, place: Tensor, hold: bool = False) -> Particles:
    """One more particle at ``place`` (B,); all weights become equal."""
    k = p.place.shape[1] + 1
    free = torch.ones(len(place), k, dtype=torch.bool)
    free[:, :-1] = not hold
    return Particles(
        torch.cat([p.place, place[:, None]], 1), torch.full(free.shape, 1 / k, dtype=place.dtype), free
    )


Move = Callable[[Particles, Points, torch.Generator], Particles]


def methods(step: float) -> dict[str, Move]:
    """How each method takes its next particle."""
    grid = torch.linspace(-6, 6, 601, dtype=torch.float64)

    def optimal(p: Particles, data: Points, g: torch.Generator) -> Particles:
        index = p.weight * potential(p, data, p.place, order=2)  # the splitting matrices, 1 x 1
        return split(p, index.argmin(1), step)

    def anyone(p: Particles, data: Points, g: torch.Generator) -> Particles:
        return split(p, torch.randint(p.place.shape[1], (len(p.place),), generator=g), step)

    def new(p: Particles, data: Points, g: torch.Generator) -> Particles:
        return add(p, torch.rand(len(p.place), generator=g, dtype=torch.float64) * 10 - 5)

    def herd(p: Particles, data: Points, g: torch.Generator) -> Particles:
        best = potential(p, data, grid.expand(len(p.place), -1)).argmin(1)
        return add(p, grid[best], hold=True)

    return {"optimal split": optimal, "random split": anyone, "new initialisation": new, "herding": herd}


@dataclass(frozen=True)
class Run:
    """One method on all data sets at one rate."""

    losses: Tensor  # (S, records)
    places: list[Tensor]  # per stage (S, records, K)
    weights: list[Tensor]  # per stage (S, K)
    final: Tensor  # (S,)


def compress(data: Points, args: argparse.Namespace, rate: float) -> dict[str, Run]:
    """All methods as one batch from the same first particles."""
    seeds = len(data.place)
    start = torch.Generator().manual_seed(1)
    place = torch.rand(seeds, 1, generator=start, dtype=torch.float64) * 2 - 5
    moves = methods(args.step)
    generators = {name: torch.Generator().manual_seed(2) for name in moves}
    one = Particles(place, torch.ones_like(place), torch.ones_like(place, dtype=torch.bool))
    now = dict.fromkeys(moves, one)
    energy = data.energy
    every = max(args.iterations // 50, 1)
    kept: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in moves}
    together, energies = data.repeat(len(moves)), energy.repeat(len(moves))
    for stage in range(args.particles):
        if stage:
            now = {name: move(now[name], data, generators[name]) for name, move in moves.items()}
        batch = Particles(
            *(torch.cat([getattr(p, f) for p in now.values()]) for f in ("place", "weight", "free"))
        )
        batch, losses, places = descend(batch, together, energies, args.iterations, rate, every)
        for i, name in enumerate(moves):
            rows = slice(i * seeds, (i + 1) * seeds)
            now[name] = Particles(batch.place[rows], batch.weight[rows], batch.free[rows])
            kept[name].append((losses[rows], places[rows], batch.weight[rows]))
    return {
        name: Run(
            torch.cat([k[0] for k in kept[name]], 1),
            [k[1] for k in kept[name]],
            [k[2] for k in kept[name]],
            mmd(now[name], data, energy),
        )
        for name in moves
    }


def claims(runs: dict[float, dict[str, Run]], args: argparse.Namespace) -> list[Claim]:
    """What the paper says, at its rate and at the other."""
    found = []
    for rate, run in runs.items():
        middle = {name: quartiles(r.final)[1] for name, r in run.items()}
        order = ", ".join(f"{name} {middle[name]:.2g}" for name in sorted(middle, key=middle.__getitem__))
        says = f"optimal splits end with the lowest loss (rate {rate:g})"
        found.append(
            Claim("S2D, figure 9", says, min(middle, key=middle.__getitem__) == "optimal split", order)
        )
        better = int((run["optimal split"].final <= run["random split"].final).sum())
        says = f"optimal splits beat random ones (rate {rate:g})"
        holds = middle["optimal split"] < middle["random split"]
        found.append(Claim("S2D, figure 9", says, holds, f"on {better} of {args.seeds} data sets"))
    rate = next(iter(runs))
    kicks = {}
    for name, run in runs[rate].items():
        ends = torch.arange(1, args.particles) * (run.losses.shape[1] // args.particles)
        kicks[name] = float((run.losses[:, ends] > run.losses[:, ends - 1]).double().mean())
    holds = max(kicks["optimal split"], kicks["random split"]) < min(
        kicks["new initialisation"], kicks["herding"]
    )
    said = ", ".join(f"{name} {kick:.0%}" for name, kick in kicks.items())
    found.append(Claim("S2D, figure 9", "new points kick the loss up where splits do not", holds,
                       f"share of growths after which it is higher: {said}"))  # fmt: skip
    return found


def draw(runs: dict[float, dict[str, Run]], data: Tensor, args: argparse.Namespace) -> dict[str, object]:
    """Loss over the steps, and the paths of the particles over the data (figures 9 and 8 of the paper)."""
    figure, axes = canvas(9, 3.6, 1, len(runs), sharey=True)
    for ax, (rate, run) in zip(axes[0], runs.items(), strict=True):
        for name, r in run.items():
            steps = torch.arange(r.losses.shape[1]) * max(args.iterations // 50, 1) / 1000
            bounds = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
            low, middle, high = r.losses.clamp_min(1e-12).quantile(bounds, dim=0)
            ax.plot(steps, middle, color=COLOURS[name], label=name)
            ax.fill_between(steps, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
        ax.set(
            yscale="log",
            xlabel="thousands of steps (vertical lines: one more particle)",
            title=f"AdaGrad, rate {rate:g}",
        )
        ax.set_xlim(0, args.particles * args.iterations / 1000)
        for growth in range(1, args.particles):
            ax.axvline(growth * args.iterations / 1000, color="0.9", zorder=0)
    axes[0, 0].set_ylabel("squared MMD")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

    rate = list(runs)[-1]
    paths, axes = canvas(
        9, 3.8, 1, len(runs[rate]) + 1, sharey=True, width_ratios=[0.5, *[1.0] * len(runs[rate])]
    )
    axes[0, 0].hist(data[0], bins=60, orientation="horizontal", color="0.75")
    axes[0, 0].set(xlabel="points", ylabel="place", title="data")
    for ax, (name, run) in zip(axes[0, 1:], runs[rate].items(), strict=True):
        for stage, (places, weight) in enumerate(zip(run.places, run.weights, strict=True)):
            steps = (
                stage * args.iterations + torch.arange(places.shape[1]) * max(args.iterations // 50, 1)
            ) / 1000
            for k in range(places.shape[2]):
                ax.plot(
                    steps,
                    places[0, :, k],
                    color=COLOURS[name],
                    linewidth=0.3 + 3 * float(weight[0, k]) ** 0.5,
                )
        ends = torch.full_like(run.places[-1][0, -1], args.particles * args.iterations / 1000)
        ax.scatter(
            ends, run.places[-1][0, -1], s=250 * run.weights[-1][0], color="black", zorder=3, clip_on=False
        )
        ax.set(title=name, xlabel="thousands of steps", xlim=(0, float(ends[0])), ylim=(-5.5, 5.5))
    return {"herding_loss": figure, "herding_paths": paths}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the experiment; returns the median final loss of each method at the last rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="number of data sets")
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=1000, help="of AdaGrad between growths")
    parser.add_argument("--step", type=float, default=0.05, help="step size of the splits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/herding"), help="folder for the figures")
    parser.add_argument("--fast", action="store_true", help="4 data sets of 100 points: for a test")
    args = parser.parse_args(argv)
    if args.fast:
        args.seeds, args.points, args.particles, args.iterations, args.threads = 4, 100, 5, 150, 1
    torch.set_num_threads(args.threads)
    began = time.perf_counter(), time.process_time()
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(
        torch.tensor(SHARES), args.seeds * args.points, replacement=True, generator=generator
    )
    noise = torch.randn(len(which), generator=generator, dtype=torch.float64) * VARIANCE**0.5
    data = (torch.tensor(MEANS, dtype=torch.float64)[which] + noise).view(args.seeds, args.points)

    rules = [gauss_rule(points, min(64, args.points)) for points in data]
    rule = Points(torch.stack([r[0] for r in rules]), torch.stack([r[1] for r in rules]))

    runs = {rate: compress(rule, args, rate) for rate in (0.01, 0.1)}
    print(f"{args.particles} particles for {args.points} points, {args.seeds} data sets")
    rows = [
        [f"{name}, rate {rate:g}", *(f"{v:.2e}" for v in (quartiles(r.final)[1], *quartiles(r.final)[::2]))]
        for rate, run in runs.items()
        for name, r in run.items()
    ]
    print(table(["squared MMD", "median", "quartile", "quartile"], rows))
    print_claims(claims(runs, args))
    save(lambda: draw(runs, data, args), args.out)
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    print(f"{wall:.0f} s with {args.threads} threads, {cpu:.0f} s of processor time")
    return {name: quartiles(r.final)[1] for name, r in runs[0.1].items()}


if __name__ == "__main__":
    main()
