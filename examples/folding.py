"""Growing by folding: do networks that grow find the solution more often than networks that start wide?

    python examples/folding.py             # 1000 networks; minutes on two cores
    python examples/folding.py --fast      # a few seconds, for a test

The experiment "utilization of approximability" of Kang (2024, slides): of 1000 random 2-3-2 networks 65
reach the solution, of 1000 networks that grow from 2-2-2 to 2-3-2 by folding 360 do. The new ReLU unit's fold
passes through the point of the decision boundary that is closest to a typical mis-predicted instance. The
slides do not give the data, the training, or what counts as the solution. Here the data are points above and
below three half waves of a sine, and two clouds that overlap along a parabola; all networks take the same
number of steps of Adam; and a network reaches the solution if its accuracy is within 2 % of the best that any
of the networks reaches.

How the fold's direction is chosen is the question: towards the instance (direction="instance" of
lightning_split's Folding), or by the slides' maximisations over the incoming weights W_A, which we read as
GradMax (the default of Folding) and a cosine (`best_directions`).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy.folding_figures import draw
from toy.relu_networks import (
    Networks,
    accuracy,
    best_directions,
    gradient_sizes,
    train,
    typical_folds,
)
from toy.report import Claim, print_claims, save, table

from lightning_split import Folding, TopK, grow

RATE = 0.01
SLIDES = {"random 2-3-2": 65, "grown": 360}
FOLDS = (
    "folding, towards the instance",
    "folding, W_A by GradMax",
    "folding, W_A by GradMax and cosine",
)


def sine(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points above and below three half waves, at least 0.15 away."""
    x = (torch.rand(count, generator=generator) * 2 - 1) * 1.5 * math.pi
    above = torch.randint(2, (count,), generator=generator)
    gap = 0.15 + 0.85 * torch.rand(count, generator=generator)
    return torch.stack([x, x.sin() + (2 * above - 1) * gap], 1), above


def quadratics(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two noisy parabolas, one above the other, that overlap."""
    x = torch.rand(count, generator=generator) * 4 - 2
    above = torch.randint(2, (count,), generator=generator)
    noise = torch.randn(count, generator=generator) * 0.5
    return torch.stack([x, x * x / 2 - 1 + (2 * above - 1) * 0.8 + noise], 1), above


def utilisation(x: Tensor, y: Tensor, args: argparse.Namespace) -> tuple[dict[str, Tensor], Networks]:
    """Accuracies of all ways to come to three units, (B,) each; and the networks of two that grow."""
    generator = torch.Generator().manual_seed(1)
    wide = Networks.draw(args.networks, 3, generator)
    narrow = train(Networks.draw(args.networks, 2, generator), x, y, args.steps, RATE)
    instance, fold = typical_folds(narrow, x, y, clusters=2)
    steepest, aligned = best_directions(narrow, x, y, instance, fold)
    anywhere = F.normalize(torch.randn(args.networks, 2, generator=generator), dim=1)
    fresh = Networks.draw(args.networks, 3, generator)
    fresh_fold = -fresh.A[:, 0] * (fresh.a[:, :1] / fresh.A[:, 0].square().sum(1, keepdim=True))
    grown = {
        FOLDS[0]: narrow.with_unit(F.normalize(instance - fold, dim=1), fold),
        FOLDS[1]: narrow.with_unit(steepest, fold),
        FOLDS[2]: narrow.with_unit(aligned, fold),
        "fold point, random direction": narrow.with_unit(anywhere, fold),
        "new random unit": narrow.with_unit(F.normalize(fresh.A[:, 0], dim=1), fresh_fold),
    }
    found = {"random 2-3-2": accuracy(train(wide, x, y, 2 * args.steps, RATE), x, y)}
    for name, networks in grown.items():
        found[name] = accuracy(train(networks, x, y, args.steps, RATE), x, y)
    return found, narrow


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, (x, y)).backward()
        optimizer.step()


def grow_with_the_library(
    model: nn.Module, x: Tensor, y: Tensor, growths: int, steps: int
) -> list[dict[str, Tensor]]:
    """Let lightning_split's Folding grow one network; its states before and after growths and training."""
    states = [{k: v.clone() for k, v in model.state_dict().items()}]
    for _ in range(growths):
        report = grow(model, [(x, y)], loss_fn, grower=Folding(clusters=2), strategy=TopK(count=1))
        print(report)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        fit(model, x, y, steps)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    return states


def same_units(narrow: Networks, x: Tensor, y: Tensor, count: int) -> tuple[int, int, int]:
    """In how many networks lightning_split proposes the units of our batched geometry, and of how many.

    Returns:
        Networks where the unit towards the instance is the same; where the gradient of the outgoing weights
        is at least 99 % of that of the best of our 72 directions; and networks that were tried.
    """
    some = Networks(*(t[:count] for t in vars(narrow).values()))
    instance, fold = typical_folds(some, x, y, clusters=2)
    steepest, _ = best_directions(some, x, y, instance, fold)
    agree = steep = tried = 0
    for i in range(len(some.a)):
        towards, turned = (_proposed(some.module(i), x, y, fold[i], way) for way in ("instance", "gradient"))
        if not len(towards):
            continue
        unit = F.normalize(instance[i] - fold[i], dim=0)
        tried += 1
        agree += bool((towards @ unit > 1 - 1e-4).any())
        sizes = gradient_sizes(some.at(i), x, y, fold[i], torch.cat([turned, steepest[i : i + 1]]))
        steep += bool((sizes[:-1] >= 0.99 * sizes[-1]).any())
    return agree, steep, tried


def _proposed(
    model: nn.Module, x: Tensor, y: Tensor, fold: Tensor, way: Literal["instance", "gradient"]
) -> Tensor:
    """Directions (M, 2) of the units that lightning_split adds and that fold at this point."""
    grower = Folding(clusters=2, direction=way)
    grow(model, [(x, y)], loss_fn, grower=grower, strategy=TopK(count=2), step_size=1e-3)
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    return F.normalize(weight[(weight @ fold + bias).abs() < 1e-3], dim=1)


def claims(counts: dict[str, dict[str, int]]) -> list[Claim]:
    """What the slides say, against these counts."""
    said = []
    for data, count in counts.items():
        random = count["random 2-3-2"]
        for way in FOLDS:
            says = f"grown networks reach the solution more often ({data}; {way})"
            said.append(Claim("slides", says, count[way] > random, f"{count[way]} against {random}"))
        ratio = max(count[way] for way in FOLDS) / max(random, 1)
        says = f"5.5 times as often, 360 against 65 of 1000 ({data})"
        said.append(Claim("slides", says, ratio >= 4, f"{ratio:.1f} times at best"))
        plain, new = count["fold point, random direction"], count["new random unit"]
        says = f"the fold point helps: random directions through it beat random units ({data})"
        said.append(Claim("ours", says, plain > new, f"{plain} against {new}"))
    return said


def main(argv: list[str] | None = None) -> dict[str, dict[str, int]]:
    """Run the experiment; returns for both data sets how many networks reach the solution."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000, help="of Adam before the growth, and after it")
    parser.add_argument("--check", type=int, default=10, help="networks that lightning_split grows too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/folding"), help="folder for the figures")
    parser.add_argument("--fast", action="store_true", help="16 networks on 60 points: for a test")
    args = parser.parse_args(argv)
    if args.fast:
        args.networks, args.points, args.steps, args.check, args.threads = 16, 60, 200, 2, 1
    torch.set_num_threads(args.threads)
    began = time.perf_counter(), time.process_time()
    found, counts, shown = {}, {}, {}
    for name, make in (("sine", sine), ("overlapping quadratics", quadratics)):
        x, y = make(args.points, torch.Generator().manual_seed(0))
        found[name], narrow = utilisation(x, y, args)
        best = max(float(a.max()) for a in found[name].values())
        counts[name] = {way: int((a >= best - 0.02 - 1e-9).sum()) for way, a in found[name].items()}
        print(f"{name}: networks of {args.networks} that come within 2 % of the best accuracy, {best:.1%}")
        rows = [[way, str(counts[name][way]), f"{float(a.median()):.1%}"] for way, a in found[name].items()]
        print(table(["2-3-2 by", "reach it", "median accuracy"], rows))
        agree, steep, tried = same_units(narrow, x, y, args.check)
        print(
            f"lightning_split's Folding proposes the same unit towards the instance in {agree} of {tried} "
            f"networks, and one with at least 99 % of the best gradient in {steep}.\n"
        )
        reached = (found[name][FOLDS[1]] >= best - 0.02).nonzero().flatten()
        model = narrow.module(int(reached[0]) if len(reached) else 0)
        shown[name] = x, y, grow_with_the_library(model, x, y, 2, args.steps)
    print_claims(claims(counts))
    save(lambda: draw(counts, shown, args.networks, SLIDES), args.out)
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    print(f"{wall:.0f} s with {args.threads} threads, {cpu:.0f} s of processor time")
    return counts


if __name__ == "__main__":
    main()
