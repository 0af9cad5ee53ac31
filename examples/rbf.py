"""One-dimensional RBF regression: every way to grow from 1 to 8 neurons, on 20 random targets.

    python examples/rbf.py                 # minutes on two cores
    python examples/rbf.py --fast          # a few seconds, for a test
    python examples/rbf.py --settle        # no step that raises the loss

The setting of S2D (Liu, Wu, Wang 2019), appendix B.1, and S3D (Wu et al. 2020), appendix D.1: the target is a
network of 15 neurons with weights from N(0, 3), seen at 1000 points in [-5, 5] without noise. One neuron is
trained by gradient descent with rate 0.1; every 20,000 iterations (50,000 in S2D) the network grows, up to 8
neurons.

All methods and all targets train together, as one batch. The means over the 1000 points are taken by their
Gauss rule of 128 nodes, which agrees with them to rounding as long as no neuron is narrower than the nodes
are apart; the table's losses are over the 1000 points, and the run says by how much the rule differs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from toy import rbf_claims, rbf_figures
from toy.networks import (
    Data,
    Descent,
    Networks,
    choose,
    concatenate,
    descend,
    loss,
    new_neurons,
    predict,
    split,
    split_at,
    splitting_matrices,
)
from toy.quadrature import gauss_rule
from toy.report import print_claims, quartiles, save, table

from lightning_split.growers import schemes

SPREAD = 3**0.5  # N(0, 3) has variance 3
RATE = 0.1
WIDTH = 8
BOUND = 0.05  # share of the target's variance over which a network does not fit it
STEPS = (0.05, 0.2, 0.5, 1.0)  # step sizes among which line searches and Mixed look


@dataclass(frozen=True)
class Setting:
    seeds: int
    iterations: int
    step: float
    candidates: int
    trial: int
    first: int = 0
    settle: bool = False

    def draw(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * SPREAD

    def train(self, networks: Networks, data: Data, steps: int, every: int = 0) -> Descent:
        return descend(networks, data, steps, RATE, every, self.settle)


@dataclass(frozen=True)
class Run:
    """One method on all targets."""

    stages: list[Networks]  # as trained at the end of each stage
    losses: Tensor  # (S, stages) at the end of each stage, over the 1000 points
    history: Tensor  # (S, records)
    lowest: Tensor  # (S,) the lowest loss of the last stage, and of the settled descent after it
    stable: Tensor  # (S,) bool: ended because no split helped

    @property
    def final(self) -> Tensor:
        return self.losses[:, -1]

    def stuck(self, power: Tensor) -> Tensor:
        """(S,) bool: caught over the bound, also with steps short enough; power (S,) are variances."""
        return ~(torch.fmin(self.lowest, self.final) <= BOUND * power)

    def unsettled(self, power: Tensor) -> Tensor:
        """(S,) bool: over the bound at the last iteration, and not caught there."""
        return ~(self.final <= BOUND * power) & ~self.stuck(power)


Move = Callable[[Networks, Data, torch.Generator], Networks]


def targets(setting: Setting) -> tuple[Data, Data]:
    """The 1000 points of every target, and their Gauss rules."""
    points, rules = [], []
    for seed in range(setting.first, setting.first + setting.seeds):
        generator = torch.Generator().manual_seed(seed)
        true = Networks.of(setting.draw(generator, 1, 15, 2), setting.draw(generator, 1, 15))
        x = torch.rand(1, 1000, generator=generator, dtype=torch.float64) * 10 - 5
        nodes, mass = gauss_rule(x[0], 128)
        points.append((x, predict(true, x), torch.full_like(x, 1 / 1000)))
        rules.append((nodes[None], predict(true, nodes[None]), mass[None]))
    return tuple(Data(*(torch.cat(t) for t in zip(*parts, strict=True))) for parts in (points, rules))


def variances(points: Data) -> Tensor:
    """(S,), of the targets."""
    return ((points.y - points.y.mean(1, keepdim=True)) ** 2).mean(1)


def methods(setting: Setting) -> dict[str, Move]:
    """How each method takes its next neuron (S3D with m = 3 and 4: its next two or three)."""

    def lowest(offers: list[Networks], data: Data, trial: int = 0) -> Networks:
        """Of several networks of each target the one of the lowest loss, after a trial."""
        repeated = data.repeat(len(offers))
        tried = setting.train(concatenate(offers), repeated, trial).networks
        losses = loss(tried, repeated).view(len(offers), -1).nan_to_num(torch.inf)
        return choose(offers, losses.argmin(0))

    def splitting(m: int, c: float, signed: bool = True, steps: tuple[float, ...] = (setting.step,)) -> Move:
        offered = schemes(m, c, signed=signed)
        return lambda n, data, g: lowest([split(n, data, offered, s, WIDTH)[0] for s in steps], data)

    def random_split(n: Networks, data: Data, g: torch.Generator) -> Networks:
        direction = setting.draw(g, len(n.w), 2)
        neuron = torch.randint(n.w.shape[1], (len(n.w),), generator=g)
        return split_at(n, neuron, direction / direction.norm(dim=1, keepdim=True), setting.step)

    def new(n: Networks, data: Data, g: torch.Generator) -> Networks:
        return n.with_neuron(setting.draw(g, len(n.w), 2), setting.draw(g, len(n.w)))

    def new_silent(n: Networks, data: Data, g: torch.Generator) -> Networks:
        return n.with_neuron(setting.draw(g, len(n.w), 2), torch.zeros(len(n.w), dtype=torch.float64))

    def best_new(n: Networks, data: Data, g: torch.Generator, count: int = 1) -> list[Networks]:
        theta = setting.draw(g, len(n.w), setting.candidates, 2)
        w, gain = new_neurons(n, data, theta, bound=10.0)
        here = torch.arange(len(n.w))
        return [n.with_neuron(theta[here, k], w[here, k]) for k in gain.topk(count, 1).indices.T]

    def boosting(n: Networks, data: Data, g: torch.Generator) -> Networks:
        return best_new(replace(n, free=torch.zeros_like(n.free)), data, g)[0]

    def mixed(trial: int, splits: bool = True) -> Move:
        def move(n: Networks, data: Data, g: torch.Generator) -> Networks:
            offers = best_new(n, data, g, count=3)
            if splits:
                offers += [split(n, data, schemes(2, 3.0), step, WIDTH)[0] for step in STEPS]
            width = max(o.w.shape[1] for o in offers)
            offers = [o for o in offers if o.w.shape[1] == width]
            return lowest(offers, data, trial)

        return move

    return {
        "S2D": splitting(2, 1.0, signed=False),
        "S3D m=2 c=3": splitting(2, 3.0),
        "S3D m=3 c=3": splitting(3, 3.0),
        "S3D m=4 c=3": splitting(4, 3.0),
        **{f"S3D m=2 c={c:g}": splitting(2, c) for c in (1.5, 2.0, 5.0)},
        "S2D line search": splitting(2, 1.0, signed=False, steps=STEPS),
        "S3D line search": splitting(2, 3.0, steps=STEPS),
        "random split": random_split,
        "new initialisation": new,
        "new, zero outgoing": new_silent,
        "gradient boosting": boosting,
        "from scratch": lambda n, data, g: n,
        "best of 100 new": lambda n, data, g: best_new(n, data, g)[0],
        "best new, trial": mixed(setting.trial, splits=False),
        "Mixed": mixed(0),
        "Mixed, trial": mixed(setting.trial),
    }


def grow(moves: dict[str, Move], setting: Setting, points: Data, rule: Data) -> dict[str, Run]:
    """All methods, stage by stage; methods of the same width train as one batch."""
    start = torch.Generator().manual_seed(1)
    one = Networks.of(setting.draw(start, setting.seeds, 1, 2), setting.draw(start, setting.seeds, 1))
    full = Networks.of(
        setting.draw(start, setting.seeds, WIDTH, 2), setting.draw(start, setting.seeds, WIDTH)
    )
    now = {name: full if name == "from scratch" else one for name in moves}
    generators = {name: torch.Generator().manual_seed(2) for name in moves}
    stages: dict[str, list[Networks]] = {name: [] for name in moves}
    histories: dict[str, list[Tensor]] = {name: [] for name in moves}
    lowest: dict[str, Tensor] = {}
    for stage in range(WIDTH):
        if stage:
            now = {name: move(now[name], rule, generators[name]) for name, move in moves.items()}
        for width in sorted({n.w.shape[1] for n in now.values()}):
            names = [name for name, n in now.items() if n.w.shape[1] == width]
            together = concatenate([now[name] for name in names])
            every = max(setting.iterations // 100, 1)
            trained = setting.train(together, rule.repeat(len(names)), setting.iterations, every)
            for i, name in enumerate(names):
                part = slice(i * setting.seeds, (i + 1) * setting.seeds)
                now[name] = trained.networks.at(part)
                stages[name].append(now[name])
                histories[name].append(trained.history[part])
                lowest[name] = trained.lowest[part]
    bound = BOUND * variances(points)
    for name, n in now.items():
        high = (~(loss(n, points) <= bound)).nonzero().flatten()
        if len(high):
            more = descend(n.at(high), rule.at(high), setting.iterations, RATE, settle=True)
            lowest[name][high] = torch.fmin(lowest[name][high], more.lowest)
    return {
        name: Run(
            stages[name],
            torch.stack([loss(n, points) for n in stages[name]], 1),
            torch.cat(histories[name], 1),
            lowest[name],
            now[name].width < WIDTH,
        )
        for name in moves
    }


@dataclass(frozen=True)
class Probe:
    """Splits of the networks (n of them) that S2D grew to seven neurons and that it would split again."""

    eigenvalues: Tensor  # (n, 7): −λ_min
    at_once: Tensor  # (n, 7): measured decrease of the loss, in units of ε²/2 for a small ε
    trained: Tensor  # (n, 7): decrease after training, against the unsplit network trained as long
    angles: Tensor  # (A,) degrees from the splitting gradient; the neuron of the lowest eigenvalue
    turned: Tensor  # (n, A): decrease at once
    turned_trained: Tensor  # (n, A): decrease after training


def probe(networks: Networks, rule: Data, setting: Setting) -> Probe:
    """Split every neuron along its splitting gradient, and the best one in all directions."""
    lowest = torch.linalg.eigvalsh(splitting_matrices(networks, rule))[..., 0].amin(1)
    splits = (networks.width == 7) & (lowest < -1e-3)  # the bound at which the paper stops
    splits = splits.nonzero().flatten() if bool(splits.any()) else torch.arange(len(lowest))
    networks, rule = networks.at(splits), rule.at(splits)
    iterations = setting.iterations // 10
    before, unsplit = loss(networks, rule), loss(setting.train(networks, rule, iterations).networks, rule)
    values, vectors = torch.linalg.eigh(splitting_matrices(networks, rule))
    count, width = networks.w.shape

    def decreases(neurons: list[Tensor], directions: list[Tensor], trained: bool) -> Tensor:
        length = setting.step if trained else 1e-3
        pairs = zip(neurons, directions, strict=True)
        tried = concatenate([split_at(networks, k, d, length) for k, d in pairs])
        data = rule.repeat(len(neurons))
        if trained:
            tried = setting.train(tried, data, iterations).networks
            return (unsplit - loss(tried, data).view(-1, count)).T
        return (before - loss(tried, data).view(-1, count)).T / (length**2 / 2)

    each = [torch.full((count,), k) for k in range(width)]
    along = [vectors[:, k, :, 0] for k in range(width)]
    here, top = torch.arange(count), values[..., 0].argmin(1)
    angles = torch.linspace(0, 180, 25, dtype=torch.float64)
    ends = vectors[here, top]  # (n, 2, 2), the splitting gradient first
    turned = [ends[..., 0] * a.cos() + ends[..., 1] * a.sin() for a in angles.deg2rad()]
    same = [top] * len(turned)
    return Probe(
        -values[..., 0],
        decreases(each, along, trained=False),
        decreases(each, along, trained=True),
        angles,
        decreases(same, turned, trained=False),
        decreases(same, turned, trained=True),
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the experiment; returns the median final loss of each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="number of random targets")
    parser.add_argument("--first", type=int, default=0, help="seed of the first target")
    parser.add_argument("--iterations", type=int, default=20_000, help="of gradient descent between growths")
    parser.add_argument("--step", type=float, default=0.05, help="step size of the splits")
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", help="only these: table, no claims, no figures"
    )
    parser.add_argument(
        "--settle", action="store_true", help="make no step that raises the loss, halve the rate instead"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/rbf"), help="folder for the figures")
    parser.add_argument("--fast", action="store_true", help="3 targets, 300 iterations: for a test")
    args = parser.parse_args(argv)
    if args.fast:
        args.seeds, args.iterations, args.threads = 3, 300, 1
    torch.set_num_threads(args.threads)
    setting = Setting(
        args.seeds, args.iterations, args.step, 100, args.iterations // 100, args.first, args.settle
    )
    began = time.perf_counter(), time.process_time()
    points, rule = targets(setting)
    moves = methods(setting)
    runs = grow({n: m for n, m in moves.items() if n in (args.only or moves)}, setting, points, rule)
    power = variances(points)
    tried = None if args.only else probe(runs["S2D"].stages[6], rule, setting)

    rows = []
    for name, run in runs.items():
        low, median, high = quartiles(run.final)
        counts = [int(t.sum()) for t in (run.stuck(power), run.unsettled(power), run.stable)]
        finals = [f"{median:.2e}", f"{low:.1e}", f"{high:.1e}", f"{float(run.final.max()):.1e}"]
        rows.append([name, *finals, *map(str, counts)])
    print(f"{WIDTH} neurons, {args.seeds} targets, {args.iterations:,} iterations between growths", end="")
    print(", no step that raises the loss" if args.settle else "")
    judged = ["stuck", "unsettled", "stable"]
    print(table(["final loss", "median", "quartile", "quartile", "worst", *judged], rows))
    print(
        f"stuck: over {100 * BOUND:.0f} % of the target's variance at every iteration of the last stage, and "
        "of a further one\nthat makes no step that raises the loss; unsettled: over it at the end, and not "
        "stuck; stable: no split helped,\nso it stopped growing"
    )
    gap = torch.cat([(loss(r.stages[-1], rule) / r.final - 1).abs() for r in runs.values()])
    close, most = int((gap < 0.01).sum()), float(gap.max())
    print(
        f"The Gauss rule's loss is within 1 % of that over the 1000 points in {close} of {len(gap)} final "
        f"networks (median difference {float(gap.median()):.0e}, largest {most:.0e})."
    )
    if tried is not None:
        print_claims(rbf_claims.claims(runs, power, tried))
        save(lambda: rbf_figures.draw(runs, points, tried, args.iterations), args.out)
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    print(f"{wall:.0f} s with {args.threads} threads, {cpu:.0f} s of processor time")
    return {name: quartiles(run.final)[1] for name, run in runs.items()}


if __name__ == "__main__":
    main()
