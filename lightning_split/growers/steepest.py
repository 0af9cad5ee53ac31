"""Steepest splitting: S2D and S3D."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_split.context import GrowthContext
from lightning_split.curvature import SplittingOperator
from lightning_split.eigen import Eigenpairs, EigenSolver, Lanczos
from lightning_split.growers.base import Grower, Proposal
from lightning_split.growers.schemes import Scheme, schemes
from lightning_split.ranks import Ranks
from lightning_split.selection import Candidate
from lightning_split.splits import weights_of
from lightning_split.stepsize import StepSize, as_step_size

__all__ = ["SteepestSplitting", "rayleigh_quotients"]


@dataclass(frozen=True)
class SteepestSplitting(Grower):
    """Split each neuron along its splitting gradient: the steepest descent of the loss by splitting.

    ``signed=False`` is S2D: two offspring of weight ½ along the eigenvector of the smallest eigenvalue of the
    splitting matrix. ``signed=True`` is S3D: negative offspring weights also use the largest eigenvalue, so
    that there is no splitting-stable dead end.

    Args:
        max_offspring: At most so many offspring per neuron: 2, 3 or 4.
        signed: Allow negative offspring weights.
        c: Bound on the sum of the absolute offspring weights; 1 allows no negative ones.
        solver: Finds the extreme eigenpairs.

    Raises:
        ValueError: If ``max_offspring`` is not 2, 3 or 4, or ``c`` is below 1.
    """

    max_offspring: int = 2
    signed: bool = True
    c: float = 3.0
    solver: EigenSolver = field(default_factory=lambda: Lanczos(16))

    def __post_init__(self) -> None:
        if self.max_offspring not in (2, 3, 4):
            raise ValueError(f"max_offspring must be 2, 3 or 4, got {self.max_offspring}.")
        if not 1 <= self.c < float("inf"):
            raise ValueError(f"c bounds the sum of absolute offspring weights: at least 1, got {self.c}.")

    def propose(self, context: GrowthContext, *, step_size: float | str | StepSize) -> Proposal:
        """One candidate per neuron, or per neuron and scheme; see :meth:`Grower.propose`.

        Cost: the solver's products on the estimation batches and two on each fresh one that is drawn.
        """
        ranks, step = context.ranks, as_step_size(step_size)
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
        offered = schemes(self.max_offspring, self.c, signed=self.signed)
        if context.fresh is None:
            return Proposal(*_offers(context, pairs, None, offered, step))
        alternatives = 1 if context.all_schemes else len(offered)
        quotients: dict[str, Tensor] = {}
        count = 0
        for look in context.fresh.looks():
            found = rayleigh_quotients(context.operator(look), pairs, ranks)
            quotients = {n: torch.cat([quotients[n], q]) if count else q for n, q in found.items()}
            count = len(next(iter(quotients.values())))
            candidates, _, estimated = _offers(context, pairs, quotients, offered, step)
            if context.settled(candidates, count, alternatives):
                break
        pairs = {n: replace(p, values=quotients[n].mean(0).to(p.values)) for n, p in pairs.items()}
        return Proposal(candidates, pairs, estimated, count, alternatives)


def _offers(
    context: GrowthContext,
    pairs: Mapping[str, Eigenpairs],
    quotients: Mapping[str, Tensor] | None,
    offered: list[Scheme],
    step: StepSize,
) -> tuple[tuple[Candidate, ...], Mapping[str, Eigenpairs], dict[tuple[str, int, str], float]]:
    """Candidates of all groups, the eigenpairs behind them, and the gains before the confirmation."""
    candidates: list[Candidate] = []
    estimated: dict[tuple[str, int, str], float] = {}
    for group in context.arch.groups:
        if group.name not in pairs:
            continue
        found = pairs[group.name]
        samples = found.values[None] if quotients is None else quotients[group.name]
        lengths = step.lengths(weights_of(context.model, group, "incoming"))
        offers = _candidates(group.name, found, samples, offered, lengths, every=context.all_schemes)
        for candidate, before in offers:
            candidates.append(candidate)
            estimated[candidate.group, candidate.neuron, candidate.scheme] = before
    return tuple(candidates), pairs, estimated


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
    best = mean.argmin(1)
    for neuron, length in enumerate(lengths.tolist()):
        scale = length**2 / 2
        for k in range(len(offered)) if every else [int(best[neuron])]:
            scheme = offered[k]
            value = float(mean[neuron, k])
            candidate = Candidate(
                group=name,
                neuron=neuron,
                gain=-scale * value,
                splitting_index=value,
                standard_error=scale * float(error[neuron, k]),
                scheme=scheme.name,
                weights=scheme.weights,
                displacements=length * torch.tensor(scheme.along, dtype=vectors.dtype) @ vectors[neuron],
            )
            yield candidate, -scale * float(before[neuron, k])


def rayleigh_quotients(
    operator: SplittingOperator, pairs: Mapping[str, Eigenpairs], ranks: Ranks
) -> dict[str, Tensor]:
    """Rayleigh quotients of both extreme vectors of every neuron, batch by batch: ``(batches, N, 2)``.

    Costs one preparation and two products per batch.
    """
    vectors = {name: p.vectors for name, p in pairs.items()}
    samples: dict[str, list[Tensor]] = {name: [] for name in vectors}
    for forms in operator.quadratic_forms(vectors):
        for name, values in forms.items():
            samples[name].append(values)
    both = {name: torch.stack(values) for name, values in samples.items()}
    return ranks.gather_of(both)
