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
from lightning_split.growers.base import Draft, NotApplicableError, PredictingGrower
from lightning_split.growers.confirming import Differences, Measure, Quotients
from lightning_split.growers.schemes import Scheme, schemes
from lightning_split.sampling import NotSeparableError, check_separable
from lightning_split.selection import Candidate
from lightning_split.splits import weights_of
from lightning_split.stepsize import StepSize

__all__ = ["SteepestSplitting"]


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
        sample_share: Directions are found on this share of the samples of the estimation batches, those by
            which the loss pulls hardest more likely, each weighted so that the matrices stay unbiased
            (:mod:`lightning_split.sampling`). ``"auto"`` keeps as few as lose a fifth of the precision: a
            fifth to a third in a trained classifier, most of them in an untrained one. A batch then costs a
            forward pass, and only what is kept costs more: ask for more batches. Gains are confirmed on
            whole batches all the same. Needs a loss that is the mean over samples.

    Raises:
        ValueError: If ``max_offspring`` is not 2, 3 or 4, ``c`` is below 1, or ``sample_share`` is neither
            ``"auto"`` nor above 0 and at most 1.
    """

    max_offspring: int = 2
    signed: bool = True
    c: float = 3.0
    solver: EigenSolver = field(default_factory=lambda: Lanczos(8, exact_dim=16))
    sample_share: float | str = 1.0

    def __post_init__(self) -> None:
        if self.max_offspring not in (2, 3, 4):
            raise ValueError(f"max_offspring must be 2, 3 or 4, got {self.max_offspring}.")
        if not 1 <= self.c < float("inf"):
            raise ValueError(f"c bounds the sum of absolute offspring weights: at least 1, got {self.c}.")
        share = self.sample_share
        if share != "auto" and (isinstance(share, str) or not 0 < share <= 1):
            raise ValueError(f"sample_share must be above 0 and at most 1, or 'auto', got {share!r}.")

    def check(self, context: GrowthContext) -> None:
        """Refuse a network in which all splitting matrices are zero; see :meth:`Grower.check`.

        Raises:
            NotSeparableError: If samples are to be taken out of batches in which they depend on each other.
        """
        _check_curved(context)
        if self.sample_share != 1:
            check_separable(
                context.model,
                context.arch.curved,
                context.batches[0],
                context.loss_fn,
                train=context.train_mode,
                seed=context.seed,
            )

    def draft(self, context: GrowthContext, step: StepSize) -> Draft:
        """One candidate per neuron, or per neuron and scheme; see :meth:`PredictingGrower.draft`.

        Cost: the solver's products on the estimation batches (or on those of the samples that are kept, and a
        forward pass for each batch), and about three training steps on each fresh one that is drawn.
        """
        _check_curved(context)
        context = replace(context, arch=context.arch.curved)
        ranks = context.ranks
        operator, note = self._operator(context)
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
        found = schemes(self.max_offspring, self.c, signed=self.signed)
        # A surrogate's curvature is not what a split gains; in short formats differences would drown.
        kinked = ranks.agree(operator.has_surrogates and operator.dtype.itemsize >= 4)
        measure = Differences(context, pairs, found, lengths) if kinked else Quotients(context, pairs, found)
        return _Splits(context, pairs, found, lengths, measure, note)

    def _operator(self, context: GrowthContext) -> tuple[SplittingOperator, str]:
        """The splitting matrices of the samples that count, and a sentence if that is not as asked for."""
        share = self.sample_share
        if share != 1:
            try:
                kept = context.important(None if isinstance(share, str) else share)
            except NotSeparableError as error:  # not so in the batch that was tried before training
                return context.operator(context.batches), f"{error} This growth has used all samples."
            return context.operator(kept.batches, kept.weigh), ""
        return context.operator(context.batches), ""


def _check_curved(context: GrowthContext) -> None:
    if not context.arch.curved.groups:
        raise NotApplicableError(
            "All neurons that can be split meet others in sums of products (queries and keys, say). They "
            "are linear in their incoming weights, so their splitting matrices are zero; new neurons can "
            "still gain (GradMax, NewNeurons)."
        )


class _Splits(Draft):
    """Eigenpairs, and what can be done with them."""

    def __init__(
        self,
        context: GrowthContext,
        pairs: Mapping[str, Eigenpairs],
        schemes: list[Scheme],
        lengths: Mapping[str, Tensor],
        measure: Measure,
        note: str,
    ) -> None:
        self.eigenpairs = self._estimated = pairs
        self.notes = (note,) if note else ()
        self.alternatives = measure.alternatives
        self._context, self._schemes, self._lengths = context, schemes, lengths
        self._measure = measure

    def measure(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        return self._measure.samples(batches)

    def offers(self, samples: Mapping[str, Tensor] | None) -> list[tuple[Candidate, float]]:
        pairs = self._estimated
        coefficients = torch.tensor([s.coefficients for s in self._schemes], dtype=torch.float64)
        estimated = {
            n: (p.values.double().cpu() @ coefficients.T).gather(1, self._measure.offered[n])
            for n, p in pairs.items()
        }
        values = {n: estimate[None] for n, estimate in estimated.items()}
        nearby: dict[str, Tensor | None] = dict.fromkeys(pairs)
        if samples is not None:
            values = {n: self._measure.values(samples[n]) for n in pairs}
            nearby = {n: self._measure.nearby(samples[n]) for n in pairs}
            again = {n: self._measure.quotients(samples[n]) for n in pairs}
            self.eigenpairs = {
                n: p if (values_of := again[n]) is None else replace(p, values=values_of.to(p.values))
                for n, p in pairs.items()
            }
        return [
            offer
            for group in self._context.arch.groups
            if (found := pairs.get(group.name)) is not None
            for offer in _candidates(
                group.name,
                found.vectors.cpu(),
                values[group.name],
                nearby[group.name],
                estimated[group.name],
                [[self._schemes[k] for k in row] for row in self._measure.offered[group.name].tolist()],
                self._lengths[group.name],
                every=self._context.all_schemes,
            )
        ]


def _candidates(
    name: str,
    vectors: Tensor,
    values: Tensor,
    nearby: Tensor | None,
    before: Tensor,
    offered: list[list[Scheme]],
    lengths: Tensor,
    *,
    every: bool,
) -> Iterator[tuple[Candidate, float]]:
    """The best scheme of every neuron (or every scheme), and its gain before confirmation.

    Args:
        name: Name of the group.
        vectors: ``(N, 2, D)``, its directions.
        values: ``(batches, N, K)``, what the schemes are judged by.
        nearby: The same closer to the step, if ``values`` are measured far from it.
        before: ``(N, K)``, what they were estimated to be.
        offered: The K schemes of each neuron.
        lengths: ``(N,)``, ε of every neuron.
        every: Whether to offer every scheme.
    """
    mean, error = _mean(values)
    best, means, errors, estimates = (t.tolist() for t in (mean.argmin(1), mean, error, before))
    near = None if nearby is None else [t.tolist() for t in _mean(nearby)]
    for neuron, length in enumerate(lengths.tolist()):
        scale = length**2 / 2
        for k in range(len(offered[neuron])) if every else [best[neuron]]:
            scheme = offered[neuron][k]
            value = means[neuron][k]
            candidate = Candidate(
                group=name,
                neuron=neuron,
                gain=-scale * value,
                splitting_index=value,
                standard_error=scale * errors[neuron][k],
                nearby=None if near is None else (-scale * near[0][neuron][k], scale * near[1][neuron][k]),
                scheme=scheme.name,
                weights=scheme.weights,
                displacements=length * torch.tensor(scheme.along, dtype=vectors.dtype) @ vectors[neuron],
            )
            yield candidate, -scale * estimates[neuron][k]


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Over the batches, and its standard error."""
    mean, count = values.mean(0), len(values)
    return mean, values.std(0, unbiased=True) / count**0.5 if count > 1 else torch.zeros_like(mean)
