"""How good are the directions, and what do they cost? Quotients on held-out data over the exact eigenvalue.

    python benchmarks/rayleigh_quality.py                    # a small trained MLP on Fashion-MNIST
    python benchmarks/rayleigh_quality.py convolutions --width 8 --official-epochs 1

For each solver and number of batches: the median over the neurons of the Rayleigh quotient on 20 000 held-out
samples divided by the smallest eigenvalue on all data, the 10 % quantile, and the CPU time in training steps.
Only neurons count whose smallest eigenvalue on all data is at least 5 % of the median in absolute value. The
eigenvalues on all data come from Lanczos with --exact products; the largest relative residual is printed.

Two kinds of rows show what the data allows. "exact, of the sample" are the eigenvectors of the very matrices
that the batches of the row estimate, to which every solver goes that is given time. "exact, of all data" has
seen the held-out samples too; the curvature there is still not that of all data, so its quotient is not 1.
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


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the comparison; returns the rows of the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", nargs="?", choices=sorted(SMALL), default="mlp")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1.0, help="of training before the measurement")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128, 312])
    parser.add_argument("--products", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument(
        "--official-epochs", type=float, default=10.0, help="0 leaves the official recipe out"
    )
    parser.add_argument("--exact", type=int, default=100)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = fashion_mnist(args.data_dir)
    data = (x[: args.samples], y[: args.samples])
    net = trained(SMALL[args.network](args.width), data, epochs=args.epochs, batch=args.batch)
    batches = batches_of(data, args.batch, 1)
    num_held = len(batches) // 3
    held, known = batches[:num_held], batches[num_held:]
    arch = trace_step(net, batches[0], cross_entropy)

    def operator(of: list[Any], cache_bytes: int = 2**31) -> SplittingOperator:
        return SplittingOperator(net, arch, of, cross_entropy, cache_bytes=cache_bytes)

    step = seconds(training_step(net, batches[0]), 5)
    net.eval()
    exact, _ = solved(operator(batches), Lanczos(args.exact, basis_size=20))
    lowest = smallest(exact)
    counts = lowest < 0.05 * lowest.median()
    worst = max(float((p.residuals[:, 0] / p.values[:, 0].abs()).nan_to_num(0).max()) for p in exact.values())
    print(
        f"{int(counts.sum())} of {len(lowest)} neurons; largest relative residual of the exact pairs "
        f"{worst:.1e}; a training step takes {1e3 * step:.2f} ms, half an epoch {len(batches) // 2} steps"
    )
    rows: list[dict[str, Any]] = []

    def record(solver: str, samples: int, pairs: dict[str, Eigenpairs], spent: float) -> None:
        ratio = (quotients(operator(held, 0), pairs) / lowest)[counts]
        rows.append(
            {
                "solver": solver,
                "batches": samples,
                "held-out / exact": float(ratio.median()),
                "10 % quantile": float(ratio.quantile(0.1)),
                "in vain": float((ratio <= 0).float().mean()),
                "steps": spent / step,
            }
        )

    for count in (c for c in args.batches if c <= len(known)):
        for products in args.products:
            pairs, spent = solved(operator(known[:count]), Lanczos(products))
            record(f"Lanczos({products})", count, pairs, spent)
        pairs, _ = solved(operator(known[:count]), Lanczos(args.exact, basis_size=20))
        record("exact, of the sample", count, pairs, float("nan"))
    if args.official_epochs:
        steps = max(2, round(args.official_epochs * len(known)))
        each = cycle([operator([b]) for b in known])
        pairs, spent = solved(operator(known), RayleighDescent(num_steps=steps), stochastic(each))
        record("official, one end", len(known), pairs, spent / 2)  # it has run for both ends
    pairs, _ = solved(operator(known), Lanczos(args.exact, basis_size=20))
    record("exact, of the sample", len(known), pairs, float("nan"))
    record("exact, of all data", len(batches), exact, float("nan"))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
