"""Steepest splitting: S2D and S3D."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_split.context import GrowthContext
from lightning_split.curvature import SplittingOperator
from lightning_split.eigen import Eigenpairs, EigenSolver, Lanczos
from lightning_split.growers.base import Draft, PredictingGrower
from lightning_split.growers.schemes import Scheme, schemes
from lightning_split.ranks import Ranks
from lightning_split.selection import Candidate
from lightning_split.splits import weights_of
from lightning_split.stepsize import StepSize

__all__ = ["SteepestSplitting", "rayleigh_quotients"]


@dataclass(frozen=True)
class SteepestSplitting(PredictingGrower):
    """Split each neuron along its splitting gradient: the steepest descent of the loss by splitting.

    ``signed=False`` is S2D: two offspring of weight ½ along the eigenvector of the smallest eigenvalue of the
    splitting matrix. ``signed=True`` is S3D: negative offspring weights also use the largest eigenvalue, so
    that there is no splitting-stable dead end.

    Args:
        max_offspring: At most so many offspring per neuron: 2, 3 or 4.
        signed: Allow negative offspring weights.
        c: Bound on the sum of the absolute offspring weights; 1 allows no negative ones.
        solver: Finds the extreme eigenpairs. Eight products with twice the batches find better
            directions than sixteen (benchmarks/rayleigh_quality.py).

    Raises:
        ValueError: If ``max_offspring`` is not 2, 3 or 4, or ``c`` is below 1.
    """

    max_offspring: int = 2
    signed: bool = True
    c: float = 3.0
    solver: EigenSolver = field(default_factory=lambda: Lanczos(8, exact_dim=16))

    def __post_init__(self) -> None:
        if self.max_offspring not in (2, 3, 4):
            raise ValueError(f"max_offspring must be 2, 3 or 4, got {self.max_offspring}.")
        if not 1 <= self.c < float("inf"):
            raise ValueError(f"c bounds the sum of absolute offspring weights: at least 1, got {self.c}.")

    def draft(self, context: GrowthContext, step: StepSize) -> Draft:
        """One candidate per neuron, or per neuron and scheme; see :meth:`PredictingGrower.draft`.

        Cost: the solver's products on the estimation batches and two on each fresh one that is drawn.
        """
        ranks = context.ranks
        operator = context.operator(context.batches)
        double = operator.dtype == torch.float64
        pairs = self.solver.solve(
            lambda v: ranks.mean_of(operator.matvec(v)),
            operator.shapes,
            dtype=torch.float64 if double else torch.float32,
            device=operator.device,
            seed=context.seed,
            dense=lambda name: ranks.mean_of({name: operator.dense(name)})[name],
        )
        operator.release()
        lengths = {
            group.name: step.lengths(weights_of(context.model, group, "incoming"))
            for group in context.arch.groups
        }
        return _Splits(context, pairs, schemes(self.max_offspring, self.c, signed=self.signed), lengths)


class _Splits(Draft):
    """Eigenpairs, and what can be done with them."""

    def __init__(
        self,
        context: GrowthContext,
        pairs: Mapping[str, Eigenpairs],
        schemes: list[Scheme],
        lengths: Mapping[str, Tensor],
    ) -> None:
        self.eigenpairs = self._estimated = pairs
        self.alternatives = 1 if context.all_schemes else len(schemes)
        self._context, self._schemes, self._lengths = context, schemes, lengths

    def measure(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        return rayleigh_quotients(self._context.operator(batches), self._estimated, self._context.ranks)

    def offers(self, samples: Mapping[str, Tensor] | None) -> list[tuple[Candidate, float]]:
        pairs = self._estimated
        if samples is not None:
            self.eigenpairs = {
                n: replace(p, values=samples[n].mean(0).to(p.values)) for n, p in pairs.items()
            }
        return [
            offer
            for group in self._context.arch.groups
            if (found := pairs.get(group.name)) is not None
            for offer in _candidates(
                group.name,
                found,
                found.values[None] if samples is None else samples[group.name],
                self._schemes,
                self._lengths[group.name],
                every=self._context.all_schemes,
            )
        ]


def _candidates(
    name: str,
    pairs: Eigenpairs,
    samples: Tensor,
    offered: list[Scheme],
    lengths: Tensor,
    *,
    every: bool,
) -> Iterator[tuple[Candidate, float]]:
    """The best scheme of every neuron (or every scheme), and its gain before confirmation.

    Args:
        name: Name of the group.
        pairs: Its eigenpairs, as estimated.
        samples: ``(batches, N, 2)``, what the quotients are judged by.
        offered: The schemes.
        lengths: ``(N,)``, ε of every neuron.
        every: Whether to offer every scheme.
    """
    alphas = torch.tensor([s.coefficients for s in offered], dtype=torch.float64)  # (schemes, 2)
    values = samples.double().cpu() @ alphas.T  # (batches, N, schemes)
    mean = values.mean(0)
    count = len(values)
    error = values.std(0, unbiased=True) / count**0.5 if count > 1 else torch.zeros_like(mean)
    before = pairs.values.double().cpu() @ alphas.T
    vectors = pairs.vectors.cpu()
    best, means, errors, estimates = (t.tolist() for t in (mean.argmin(1), mean, error, before))
    for neuron, length in enumerate(lengths.tolist()):
        scale = length**2 / 2
        for k in range(len(offered)) if every else [best[neuron]]:
            scheme = offered[k]
            value = means[neuron][k]
            candidate = Candidate(
                group=name,
                neuron=neuron,
                gain=-scale * value,
                splitting_index=value,
                standard_error=scale * errors[neuron][k],
                scheme=scheme.name,
                weights=scheme.weights,
                displacements=length * torch.tensor(scheme.along, dtype=vectors.dtype) @ vectors[neuron],
            )
            yield candidate, -scale * estimates[neuron][k]


def rayleigh_quotients(
    operator: SplittingOperator, pairs: Mapping[str, Eigenpairs], ranks: Ranks
) -> dict[str, Tensor]:
    """Rayleigh quotients of both extreme vectors of every neuron, batch by batch: ``(batches, N, 2)``.

    Costs one preparation and two products per batch.

    Raises:
        ValueError: If one is not finite, naming the group.
    """
    vectors = {name: p.vectors for name, p in pairs.items()}
    samples: dict[str, list[Tensor]] = {name: [] for name in vectors}
    for forms in operator.quadratic_forms(vectors):
        for name, values in forms.items():
            samples[name].append(values)
    both = ranks.gather_of({name: torch.stack(values) for name, values in samples.items()})
    for name, values in both.items():
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"The Rayleigh quotients of group '{name}' on fresh batches are not finite; check the loss "
                "for NaN or infinity, or measure in a higher precision."
            )
    return both
