"""What the splitting phase costs, in training steps of the same process.

    python benchmarks/splitting_phase.py                       # time, four networks at CIFAR size
    python benchmarks/splitting_phase.py resnet18 --batch 16 --eigsh
    python benchmarks/splitting_phase.py --memory              # peak memory, a process for each figure
    python benchmarks/splitting_phase.py --scaling             # neurons, layers and batches times 16
    python benchmarks/splitting_phase.py --splits              # do accepted splits lower the loss elsewhere?

Times are CPU times of one thread, medians over --repeats; "official" is gradient descent on the Rayleigh
quotient with a new batch for every step, ten epochs of 50 000 samples, one end of the spectrum (Wang et al.
2019). --json writes the rows to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from subjects import LARGE, SMALL, Batch, batches_of, cross_entropy, fashion_mnist, images, table, trained

from lightning_split import Lanczos, RayleighDescent, SelectionStrategy, SteepestSplitting, TopK, grow
from lightning_split.curvature import SplittingOperator
from lightning_split.surgery import Split, split_neurons
from lightning_split.tracing import trace_step

FLOOR = 2 / 3  # training steps per product: two multiplications with the weights' size in place of three


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median CPU time of a call, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def training_step(net: nn.Module, batch: Batch) -> Callable[[], None]:
    """One step of SGD with momentum."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net.train(), batch).backward()
        optimizer.step()

    return step


class Nothing(SelectionStrategy):
    """Chooses no neuron, so that a phase can be repeated."""

    def select(self, candidates: Any) -> list[Any]:
        return []


def phase(net: nn.Module, batches: list[Batch], fresh: int, **options: Any) -> Callable[[], Any]:
    """The whole splitting phase but for the surgery; fresh batches are some of the same."""
    confirm = [batches[i % len(batches)] for i in range(fresh)] or None
    return lambda: grow(net, batches, cross_entropy, strategy=Nothing(), confirm_batches=confirm, **options)


def eigsh_per_neuron(operator: SplittingOperator) -> float:
    """CPU time of scipy's eigsh, one call for each neuron: timed on one neuron of each of three groups."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    total, counted = 0.0, 0
    shapes = operator.shapes
    for name in list(shapes)[:: max(1, len(shapes) // 3)][:3]:
        width, dim = shapes[name]

        def product(v: Any, name: str = name, width: int = width, dim: int = dim) -> Any:
            vectors = torch.zeros(width, dim)
            vectors[0] = torch.from_numpy(v).float().reshape(-1)
            return operator.matvec({name: vectors})[name][0].numpy().astype(float)

        start = time.process_time()
        matrix = LinearOperator((dim, dim), product, dtype=float)
        with contextlib.suppress(ArpackError):  # what it makes of a neuron without curvature
            eigsh(matrix, k=2, which="BE", tol=1e-2, ncv=min(dim, 16))
        total += time.process_time() - start
        counted += 1
    return total / counted * sum(width for width, _ in shapes.values())


def times(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: everything as a multiple of a training step."""
    torch.manual_seed(0)
    net, batch = LARGE[name](), images(args.batch)
    step = seconds(training_step(net, batch), args.repeats)
    arch = trace_step(net, batch, cross_entropy)
    operator = SplittingOperator(net, arch, [batch], cross_entropy, cache_bytes=2**40)
    vectors = {n: torch.randn(shape) for n, shape in operator.shapes.items()}
    product = seconds(lambda: operator.matvec(vectors), args.repeats)

    def anew() -> None:
        operator.release()
        operator.matvec(vectors)

    preparation = seconds(anew, args.repeats) - product
    batches = [images(args.batch)] * args.phase_batches
    whole = seconds(phase(net, batches, 2 * args.phase_batches), 1)
    descent = RayleighDescent(num_steps=2)
    official = seconds(
        lambda: descent.solve(
            lambda v: (operator.release(), operator.matvec(v))[1],
            operator.shapes,
            dtype=torch.float32,
            device="cpu",
        ),
        1,
    )
    official *= 10 * 50_000 / args.batch / 4  # two steps at each end were timed
    row: dict[str, Any] = {
        "network": name,
        "neurons": sum(arch.widths.values()),
        "step ms": 1e3 * step,
        "product": product / step,
        "floor": FLOOR,
        "preparation": preparation / step,
        f"phase of {args.phase_batches}+{2 * args.phase_batches} batches": whole / step,
        "official": official / step,
    }
    if args.eigsh:
        row["eigsh"] = eigsh_per_neuron(operator) / step
    return row


# memory -------------------------------------------------------------------------------------------


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _measure_memory(what: str, name: str, batch: int, count: int) -> None:
    """In a process of its own: print the peak over what was there before the network."""
    tiny, few = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2), nn.Tanh(), nn.Linear(2, 10)), [images(1)]
    training_step(tiny, few[0])()
    phase(tiny, few, 1)()  # what is loaded and compiled once, for a step too
    del tiny, few
    before = _resident("VmRSS")
    net, batches = LARGE[name](), [images(batch) for _ in range(count)]
    if what == "step":
        step = training_step(net, batches[0])
        step(), step()
    else:
        grower = SteepestSplitting(solver=Lanczos(8))  # restarts once, as with more products
        phase(net, batches, count, grower=grower, cache_bytes=int(what))()
    print(_resident("VmHWM") - before)


def memory(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: peak memory of the phase over that of a training step, for few and many batches.

    Without kept graphs, and with as many as the default lets be kept (256 MiB).
    """

    def peak(what: str, count: int) -> int:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
        command = [sys.executable, __file__, "--measure", what, name, str(args.batch), str(count)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    step = peak("step", 1)
    row: dict[str, Any] = {"network": name, "batch": args.batch, "step MB": step / 2**20}
    data = images(args.batch)[0].nbytes
    for count in (1, args.phase_batches):
        row[f"phase of {count}+{count}"] = (peak("0", count) - (count - 1) * data) / step
    row["with kept graphs"] = (peak(str(2**28), count) - (count - 1) * data) / step
    return row


# scaling ------------------------------------------------------------------------------------------


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Exponents of the phase's time over a factor of 16 in neurons, layers and batches."""

    def mlp(width: int, layers: int) -> nn.Module:
        parts: list[nn.Module] = [nn.Flatten(), nn.Linear(3072, 32)]
        for _ in range(layers):  # every layer reads 32 numbers, however many neurons there are
            parts += [nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 32)]
        return nn.Sequential(*parts, nn.Linear(32, 10))

    rows = []
    for what, sizes in (
        ("neurons", [(64 * k, 2, 2) for k in (1, 16)]),
        ("layers", [(64, 2 * k, 2) for k in (1, 16)]),
        ("batches", [(64, 2, 2 * k) for k in (1, 16)]),
    ):
        spent = []
        for width, layers, count in sizes:
            batches = [images(args.batch)] * count
            spent.append(seconds(phase(mlp(width, layers), batches, count), args.repeats))
        exponent = torch.tensor(spent[1] / spent[0]).log2() / 4
        rows.append({"times 16": what, "from s": spent[0], "to s": spent[1], "exponent": float(exponent)})
    return rows


# splits -------------------------------------------------------------------------------------------


def _losses(net: nn.Module, batches: list[Batch]) -> Tensor:
    """Of every sample, in float64."""
    with torch.no_grad():
        return torch.cat([F.cross_entropy(net(x.double()), y, reduction="none") for x, y in batches])


def _interval(hits: int, count: int) -> str:
    """Wilson's 95 % interval of a share."""
    if not count:
        return ""
    z, share = 1.96, hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return f"{middle - half:.1%} to {min(1.0, middle + half):.1%}"


def splits(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """How many accepted splits lower the loss on data that the phase has not used, one by one.

    In float64, sample by sample before and after, on all the training data that is left unless --held-out
    says less. Of ReLU networks few samples lie near a kink, so the true gain of a small step is known less
    well than its prediction: a gain is surely positive, or negative, beyond two standard errors.
    """
    data = fashion_mnist(args.data_dir)
    counts: dict[tuple[int, float | None], Counter[str]] = {}
    untested: list[tuple[int, float | None]] = [] if args.tested else [(8, None)]
    for seed in range(args.first, args.first + args.nets):
        torch.manual_seed(seed)
        net = trained(SMALL[name](args.width), data, epochs=args.epochs, batch=64)
        double = copy.deepcopy(net).double()
        arch = trace_step(net, batches_of(data, 64, 0)[0], cross_entropy)
        for repeat in range(args.repeats):
            batches = batches_of(data, 64, 100 + repeat)
            known = args.estimate + max(args.batches)
            left = batches[known:] if args.held_out is None else batches[known : known + args.held_out]
            held_out = [
                tuple(map(torch.cat, zip(*left[i : i + 16], strict=True))) for i in range(0, len(left), 16)
            ]
            before = _losses(double, held_out)
            for most, level in [*untested, *((count, 0.01) for count in args.batches)]:
                count = counts.setdefault((most, level), Counter())
                report = grow(
                    copy.deepcopy(net),
                    batches[: args.estimate],
                    cross_entropy,
                    strategy=TopK(fraction=args.fraction),
                    step_size=args.step,
                    confirm_batches=batches[args.estimate : args.estimate + most],
                    significance=level,
                )
                count += Counter(drawn=report.num_fresh, passed=report.num_passed)
                count["candidates"] += sum(arch.widths.values())
                for split in report.splits:
                    grown = copy.deepcopy(double)
                    displacements = split.displacements.double()
                    wide = Split(split.group, split.neuron, split.weights, displacements)
                    split_neurons(grown, [wide], arch=arch)
                    gains = before - _losses(grown, held_out)
                    ratio = float(gains.mean() / (gains.std() / len(gains) ** 0.5))
                    count += Counter(accepted=1, lower=ratio > 0, sure=ratio > 2, raised=ratio < -2)
                counts[most, level] = count
    return [
        {
            "network": name,
            "significance": str(level),
            "fresh, at most": most,
            "drawn": count["drawn"] / (args.nets * args.repeats),
            "of candidates": count["candidates"],
            "passed": count["passed"],
            "accepted": count["accepted"],
            "lower the loss": count["lower"],
            "share": _interval(count["lower"], count["accepted"]),
            "surely": count["sure"],
            "surely raise it": count["raised"],
        }
        for (most, level), count in counts.items()
    ]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what was asked for; returns the rows of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", help=f"some of {', '.join(LARGE)}; {', '.join(SMALL)}")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--phase-batches", type=int, default=2)
    parser.add_argument("--eigsh", action="store_true", help="one scipy eigsh for each neuron, extrapolated")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--splits", action="store_true")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[8, 16, 64], help="fresh ones, for --splits"
    )
    parser.add_argument("--width", type=int, default=8, help="of the seeds, for --splits")
    parser.add_argument("--epochs", type=float, default=1.0, help="of training, for --splits")
    parser.add_argument("--nets", type=int, default=1, help="trained from other seeds, for --splits")
    parser.add_argument("--estimate", type=int, default=16, help="batches for the directions, for --splits")
    parser.add_argument("--step", type=float, default=1e-2, help="step size, for --splits")
    parser.add_argument("--fraction", type=float, default=0.3, help="of TopK, for --splits")
    parser.add_argument("--tested", action="store_true", help="no row without a test, for --splits")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one, for --splits")
    parser.add_argument(
        "--held-out", type=int, help="batches of 64 to judge by, for --splits; default all that are left"
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.measure:
        what, name, batch, count = args.measure
        _measure_memory(what, name, int(batch), int(count))
        return []
    if args.scaling:
        rows = scaling(args)
    elif args.splits:
        rows = [row for name in args.networks or SMALL for row in splits(name, args)]
    else:
        rows = [(memory if args.memory else times)(name, args) for name in args.networks or LARGE]
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
