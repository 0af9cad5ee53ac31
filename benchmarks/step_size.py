"""Step sizes measured: does a line search ever raise the held-out loss, and which rule is the better default?

    python benchmarks/step_size.py --random 1000
    python benchmarks/step_size.py --seeds 10 --rules 0.01 0.1 relative:0.1 line_search

The first grows random smooth networks with one hidden layer, at random times of their training, by random
growers. The second trains a small network on scikit-learn's digits, grows it three times by each rule, and
compares the validation loss right after each growth, an epoch later, and at the end.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_split import GradMax, Mixed, NewNeurons, Relative, SteepestSplitting, TopK, grow
from lightning_split.growers import Grower, NotApplicableError
from lightning_split.optim import carry_state
from lightning_split.stepsize import StepSize

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


# random growths -----------------------------------------------------------------------------------


def random_growth(seed: int) -> tuple[str, float, float, float, float] | None:
    """One growth: (by what, held-out loss before and after, loss on independent samples before and after)."""
    torch.manual_seed(seed)

    def pick(values: list[Any]) -> Any:
        return values[int(torch.randint(len(values), ()))]

    inputs, width, outputs = pick([1, 2, 5, 10]), pick([1, 2, 4, 8]), pick([1, 3])
    name = pick(sorted(ACTIVATIONS))
    model = nn.Sequential(nn.Linear(inputs, width), ACTIVATIONS[name](), nn.Linear(width, outputs))
    teacher = nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, outputs))
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(3.0)
        for p in model.parameters():
            p.mul_(pick([0.3, 1.0, 3.0]))
    noise, size = pick([0.0, 0.1, 1.0]), pick([16, 64])

    def batch(n: int = size) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, inputs)
        with torch.no_grad():
            return x, teacher(x) + noise * torch.randn(n, outputs)

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(m(b[0]), b[1])

    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(pick([0, 30, 300])):
        optimizer.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()
    members: list[Grower] = [
        SteepestSplitting(max_offspring=pick([2, 3, 4]), c=pick([1.5, 3.0, 6.0])),
        SteepestSplitting(signed=False),
        NewNeurons(draws=2),
        GradMax(),
    ]
    grower: Grower = pick([*members, Mixed(members[:1] + members[2:])])
    independent = batch(8192)
    before = float(loss(model, independent).detach())
    try:
        report = grow(
            model,
            [batch() for _ in range(4)],
            loss,
            grower=grower,
            strategy=TopK(fraction=pick([0.3, 1.0])),
            step_size="line_search",
            confirm_batches=[batch() for _ in range(8)],
            significance=None,  # so that what is only noise comes before the search too
            seed=seed,
        )
    except NotApplicableError:
        return None  # GradMax where the activation does not map 0 to 0
    after = float(loss(model, independent).detach())
    what = type(grower).__name__ if report.splits else ""
    return what, report.loss_before, report.loss_after, before, after


def random_growths(count: int) -> None:
    """The table of random growths."""
    rows, skipped, seed = [], 0, 0
    while len(rows) < count:
        found = random_growth(seed)
        seed += 1
        if found is None:
            skipped += 1
        else:
            rows.append(found)
    grew = [row for row in rows if row[0]]
    raised = sum(after > before for _, before, after, _, _ in rows)
    fell = sum(after < before for *_, before, after in grew)
    print(f"{count} random growths by line search ({skipped} networks that GradMax refuses left out)")
    print(f"held-out loss raised: {raised} (target 0)")
    print(f"grew: {len(grew)}; on independent samples the loss fell in {fell} of them")
    for name in sorted({row[0] for row in grew}):
        mine = [row for row in grew if row[0] == name]
        fall = statistics.median(1 - after / before for _, before, after, _, _ in mine)
        true = statistics.median(1 - after / before for *_, before, after in mine)
        print(
            f"  {name}: {len(mine)} grew, median fall {fall:.2%} on the held-out batches, {true:.2%} on "
            f"independent samples, which rose in {sum(b > a for *_, a, b in mine)}"
        )


# rules ----------------------------------------------------------------------------------------------


def rule(text: str) -> float | str | StepSize:
    """A number, ``relative:<fraction>`` or ``line_search``."""
    head, _, tail = text.partition(":")
    return Relative(float(tail)) if head == "relative" else text if text == "line_search" else float(text)


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation part of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:1200]], y[order[:1200]]), (x[order[1200:]], y[order[1200:]])


def network() -> nn.Module:
    """Two convolutions with BatchNorm, 4 and 6 channels."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(6, 10)),
    )


def run(step_size: float | str | StepSize, seed: int, grower: Grower, epochs: int) -> list[float]:
    """Validation loss relative to before: right after the growths, an epoch later; and at the end."""
    torch.manual_seed(seed)
    train, valid = digits()
    model = network()
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1])

    def batches() -> list[tuple[Tensor, Tensor]]:
        return [(train[0][i], train[1][i]) for i in torch.randperm(1200).split(64)[:18]]

    def validation() -> float:
        model.eval()
        with torch.no_grad():
            return float(loss(model, valid))

    def epoch() -> None:
        model.train()
        for b in batches():
            optimizer.zero_grad()
            loss(model, b).backward()
            optimizer.step()

    at_once, later = [], []
    for growth in range(3):
        for _ in range(epochs):
            epoch()
        before = validation()
        drawn = batches()
        report = grow(
            model, drawn[:8], loss, grower=grower, step_size=step_size, confirm_batches=drawn[8:], seed=growth
        )
        carry_state(optimizer, report.replaced)
        at_once.append(validation() / before - 1)
        epoch()
        later.append(validation() / before - 1)
    for _ in range(epochs):
        epoch()
    return [statistics.mean(at_once), statistics.mean(later), validation()]


def rules(texts: list[str], seeds: int, epochs: int, grower: Grower) -> None:
    """The table of rules, and the differences to the first of them, seed by seed."""
    heads = ("right after growth", "an epoch later", "loss at the end")
    print(f"{seeds} seeds, {type(grower).__name__}; median [quartiles]")
    print("rule".ljust(14), *(h.rjust(26) for h in heads), sep=" | ")
    found: dict[str, list[list[float]]] = {}
    for text in texts:
        found[text] = [run(rule(text), seed, copy.deepcopy(grower), epochs) for seed in range(seeds)]
        columns = list(zip(*found[text], strict=True))
        cells = [_quartiles(c, percent=i < 2) for i, c in enumerate(columns)]
        print(text.ljust(14), *(c.rjust(26) for c in cells), sep=" | ", flush=True)
    first = found[texts[0]]
    for text in texts[1:]:
        better = [
            sum(mine[i] < other[i] for mine, other in zip(found[text], first, strict=True)) for i in range(3)
        ]
        print(
            f"{text} below {texts[0]}: "
            + ", ".join(f"{h} {b}/{seeds}" for h, b in zip(heads, better, strict=True))
        )


def _quartiles(values: tuple[float, ...], *, percent: bool) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    form = (lambda v: f"{v:+.1%}") if percent else (lambda v: f"{v:.4f}")
    return f"{form(middle)} [{form(low)}, {form(high)}]"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--random", type=int, default=0, help="number of random growths")
    parser.add_argument("--rules", nargs="+", default=[], help="numbers, relative:<fraction>, line_search")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=6, help="between growths")
    parser.add_argument("--grower", choices=["splitting", "new", "mixed"], default="splitting")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    if options.random:
        random_growths(options.random)
    if options.rules:
        growers: dict[str, Grower] = {
            "splitting": SteepestSplitting(),
            "new": NewNeurons(),
            "mixed": Mixed([SteepestSplitting(), NewNeurons()]),
        }
        rules(options.rules, options.seeds, options.epochs, growers[options.grower])
    print(f"{time.process_time() - start:.0f} s of CPU time")


if __name__ == "__main__":
    main()
