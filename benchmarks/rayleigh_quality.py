"""How good are the directions, and what do they cost? Quotients on held-out data over the exact eigenvalue.

    python benchmarks/rayleigh_quality.py                    # a small trained MLP on Fashion-MNIST
    python benchmarks/rayleigh_quality.py convolutions --width 8 --official-epochs 1

For each solver, number of batches and share of their samples (``SteepestSplitting(sample_share=...)``): the
median over the neurons of the Rayleigh quotient on held-out samples divided by the smallest eigenvalue on all
data, the 10 % quantile, and the CPU time in training steps. Every third of the data is held out once, and the
three quotients of a neuron are averaged: the curvature of one third is not that of all data, but the mean of
the thirds is. So the best that a direction can reach is 1.

Only neurons count whose smallest eigenvalue on all data is at least 5 % of the median in absolute value. The
eigenvalues on all data come from Lanczos with --exact products; the largest relative residual is printed.
"exact, of the sample" are the eigenvectors of the very matrices that the batches of the row estimate, to
which every solver goes that is given time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from splitting_phase import seconds, training_step
from subjects import SMALL, batches_of, cross_entropy, fashion_mnist, table, trained

from lightning_split import Lanczos, RayleighDescent
from lightning_split.curvature import SplittingOperator
from lightning_split.eigen import Eigenpairs, EigenSolver
from lightning_split.sampling import important_samples
from lightning_split.tracing import trace_step

Vectors = dict[str, Tensor]


def smallest(pairs: dict[str, Eigenpairs]) -> Tensor:
    """The smallest eigenvalues of all neurons, one group after the other."""
    return torch.cat([p.values[:, 0] for p in pairs.values()])


def quotients(operator: SplittingOperator, pairs: dict[str, Eigenpairs]) -> Tensor:
    """Rayleigh quotients of the vectors of the smallest eigenvalues, ``(N,)``."""
    vectors = {name: p.vectors[:, :1] for name, p in pairs.items()}
    total = [torch.cat([q[:, 0] for q in forms.values()]) for forms in operator.quadratic_forms(vectors)]
    return torch.stack(total).mean(0)


def solved(
    operator: SplittingOperator, solver: EigenSolver, matvec: Callable[[Vectors], Vectors] | None = None
) -> tuple[dict[str, Eigenpairs], float]:
    """Eigenpairs and the CPU time that they took."""
    start = time.process_time()
    pairs = solver.solve(matvec or operator.matvec, operator.shapes, dtype=operator.dtype, device="cpu")
    return pairs, time.process_time() - start


def stochastic(operators: Iterator[SplittingOperator]) -> Callable[[Vectors], Vectors]:
    """A product with the next batch at every call."""

    def matvec(vectors: Vectors) -> Vectors:
        operator = next(operators)
        operator.release()
        return operator.matvec(vectors)

    return matvec


def _share(text: str) -> float | str:
    return text if text == "auto" else float(text)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the comparison; returns the rows of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", nargs="?", choices=sorted(SMALL), default="mlp")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=40.0, help="of training before the measurement")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument(
        "--folds", type=int, default=3, help="how many thirds are held out, one after the other"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128, 312])
    parser.add_argument("--products", type=int, nargs="+", default=[6, 8])
    parser.add_argument(
        "--shares", type=_share, nargs="*", default=["auto", 0.1, 0.2], help="of the samples, or auto"
    )
    parser.add_argument(
        "--official-epochs", type=float, default=10.0, help="0 leaves the official recipe out"
    )
    parser.add_argument("--exact", type=int, default=60)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = fashion_mnist(args.data_dir)
    data = (x[: args.samples], y[: args.samples])
    net = trained(SMALL[args.network](args.width), data, epochs=args.epochs, batch=args.batch)
    batches = batches_of(data, args.batch, 1)
    third = len(batches) // 3
    batches = batches[: 3 * third]
    arch = trace_step(net, batches[0], cross_entropy)

    def operator(of: list[Any], cache_bytes: int = 2**31, weigh: Any = None) -> SplittingOperator:
        return SplittingOperator(net, arch, of, cross_entropy, cache_bytes=cache_bytes, weigh=weigh)

    step = seconds(training_step(net, batches[0]), 5)
    net.eval()
    with torch.no_grad():
        right = sum(int((net(images).argmax(1) == labels).sum()) for images, labels in batches)
    exact, _ = solved(operator(batches), Lanczos(args.exact, basis_size=20))
    lowest = smallest(exact)
    counts = lowest < 0.05 * lowest.median()
    worst = max(float((p.residuals[:, 0] / p.values[:, 0].abs()).nan_to_num(0).max()) for p in exact.values())
    print(
        f"{right / args.batch / len(batches):.1%} of the samples are classified rightly; "
        f"{int(counts.sum())} of {len(lowest)} neurons; largest relative residual of the exact pairs "
        f"{worst:.1e}; a training step takes {1e3 * step:.2f} ms, half an epoch {len(batches) // 2} steps"
    )
    rows: dict[tuple[str, int, float | str], list[tuple[Tensor, float]]] = {}
    for fold in range(args.folds):
        held = batches[fold * third : (fold + 1) * third]
        known = batches[: fold * third] + batches[(fold + 1) * third :]
        known = [known[i] for i in torch.randperm(len(known)).tolist()]
        judge = operator(held, 0)

        def record(
            solver: str,
            count: int,
            share: float | str,
            found: tuple[dict[str, Eigenpairs], float],
            judge: SplittingOperator = judge,
        ) -> None:
            pairs, spent = found
            rows.setdefault((solver, count, share), []).append((quotients(judge, pairs), spent))

        for count in (c for c in args.batches if c <= len(known)):
            for products in args.products:
                record(f"Lanczos({products})", count, 1.0, solved(operator(known[:count]), Lanczos(products)))
                for share in args.shares:
                    start = time.process_time()
                    part = None if isinstance(share, str) else share
                    kept = important_samples(net, arch, known[:count], cross_entropy, part, seed=fold)
                    chosen = time.process_time() - start
                    pairs, spent = solved(operator(kept.batches, weigh=kept.weigh), Lanczos(products))
                    record(f"Lanczos({products})", count, share, (pairs, chosen + spent))
            pairs, _ = solved(operator(known[:count]), Lanczos(args.exact, basis_size=20))
            record("exact, of the sample", count, 1.0, (pairs, float("nan")))
        if args.official_epochs:
            steps = max(2, round(args.official_epochs * len(known)))
            each = cycle([operator([b]) for b in known])
            pairs, spent = solved(operator(known), RayleighDescent(num_steps=steps), stochastic(each))
            record("official, one end", len(known), 1.0, (pairs, spent / 2))  # it has run for both ends
    found = []
    for (solver, count, share), measured in rows.items():
        ratio = (torch.stack([quotient for quotient, _ in measured]).mean(0) / lowest)[counts]
        found.append(
            {
                "solver": solver,
                "batches": count,
                "share": share,
                "held-out / exact": float(ratio.median()),
                "10 % quantile": float(ratio.quantile(0.1)),
                "in vain": float((ratio <= 0).float().mean()),
                "steps": sum(spent for _, spent in measured) / len(measured) / step,
            }
        )
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
