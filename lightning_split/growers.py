"""Growers: how new neurons are proposed. Steepest splitting (S2D and S3D) is the first of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_split.context import GrowthContext
from lightning_split.curvature import SplittingOperator
from lightning_split.eigen import Eigenpairs, EigenSolver, Lanczos
from lightning_split.ranks import Ranks
from lightning_split.selection import Candidate

__all__ = ["Grower", "Proposal", "Scheme", "SteepestSplitting", "schemes"]


@dataclass(frozen=True)
class Proposal:
    """What a grower offers for selection, and what it measured on the way."""

    candidates: tuple[Candidate, ...]
    eigenpairs: Mapping[str, Eigenpairs] = field(default_factory=dict)
    # eigenpairs: by group; after a confirmation their values are the Rayleigh quotients on fresh batches
    estimated_gain: Mapping[tuple[str, int, str], float] = field(default_factory=dict)
    # estimated_gain: (group, neuron, scheme) -> gain before confirmation


class Grower(ABC):
    """A way to propose new neurons."""

    @abstractmethod
    def propose(self, context: GrowthContext, *, step_size: float) -> Proposal:
        """Candidates for every neuron of every group.

        Args:
            context: The traced network, its batches, the seed of anything random, and the processes to
                average over.
            step_size: ε, the length of the displacements.
        """


@dataclass(frozen=True)
class Scheme:
    r"""Offspring weights :math:`w`, and displacements :math:`\delta_i = a_i v_- + b_i v_+`.

    The loss changes by :math:`\varepsilon^2/2\,(\alpha \lambda_- + \beta \lambda_+)` with
    :math:`\alpha = \sum w_i a_i^2` and :math:`\beta = \sum w_i b_i^2`.
    """

    name: str
    weights: tuple[float, ...]  # (m,)
    along: tuple[tuple[float, float], ...]  # (m, 2): a_i, b_i

    @property
    def coefficients(self) -> tuple[float, float]:
        """α and β: how the two extreme eigenvalues enter the change of the loss."""
        pairs = list(zip(self.weights, self.along, strict=True))
        return sum(w * a * a for w, (a, _) in pairs), sum(w * b * b for w, (_, b) in pairs)


def schemes(max_offspring: int, c: float, *, signed: bool = True) -> list[Scheme]:
    r"""The splitting schemes with at most ``max_offspring`` offspring and :math:`\sum|w_i| \le c`.

    All satisfy :math:`\sum w_i = 1`, :math:`\sum w_i\delta_i = 0` and :math:`\|\delta_i\| \le 1`. The mixed
    triplet beats both pure ones where :math:`\lambda_- < 0 < \lambda_+` are of like size (docs, theory).

    Source: S2D (Liu, Wu, Wang 2019), Theorem 2.3, for the positive binary scheme; S3D (Wu et al. 2020) for
    the signed ones.
    """
    found = [Scheme("positive binary", (0.5, 0.5), ((1.0, 0.0), (-1.0, 0.0)))]
    if not signed or c <= 1:
        return found
    ratio = (c - 1) / (c + 1)
    up, down = (c + 1) / 4, -(c - 1) / 4
    found.append(Scheme("negative binary", (2 * down, 2 * up), ((0.0, 1.0), (0.0, ratio))))
    if max_offspring >= 3:
        a = (1 - ratio**2) ** 0.5
        found += [
            Scheme("positive triplet", (up, up, 2 * down), ((1.0, 0.0), (-1.0, 0.0), (0.0, 0.0))),
            Scheme("negative triplet", (down, down, 2 * up), ((0.0, 1.0), (0.0, -1.0), (0.0, 0.0))),
            Scheme("mixed triplet", (up, up, 2 * down), ((a, ratio), (-a, ratio), (0.0, 1.0))),
        ]
    if max_offspring >= 4:
        along = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
        found.append(Scheme("quartet", (up, up, down, down), along))
    return found


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
        all_schemes: Offer every scheme of every neuron, not the best one alone.

    Raises:
        ValueError: If ``max_offspring`` is not 2, 3 or 4, or ``c`` is below 1.
    """

    max_offspring: int = 2
    signed: bool = True
    c: float = 3.0
    solver: EigenSolver = field(default_factory=lambda: Lanczos(16))
    all_schemes: bool = False

    def __post_init__(self) -> None:
        if self.max_offspring not in (2, 3, 4):
            raise ValueError(f"max_offspring must be 2, 3 or 4, got {self.max_offspring}.")
        if not 1 <= self.c < float("inf"):
            raise ValueError(f"c bounds the sum of absolute offspring weights: at least 1, got {self.c}.")

    def propose(self, context: GrowthContext, *, step_size: float) -> Proposal:
        """One candidate per neuron (or per neuron and scheme); see :meth:`Grower.propose`.

        Cost: the solver's products on the estimation batches and two on the fresh ones.
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
        offered = schemes(self.max_offspring, self.c, signed=self.signed)
        quotients = None
        if context.fresh is not None:
            quotients = rayleigh_quotients(context.operator(context.fresh), pairs, ranks)
        candidates: list[Candidate] = []
        estimated: dict[tuple[str, int, str], float] = {}
        for group in context.arch.groups:
            if group.name not in pairs:
                continue
            found = pairs[group.name]
            samples = found.values[None] if quotients is None else quotients[group.name]
            candidates += self._candidates(group.name, found, samples, offered, step_size, estimated)
        if quotients is not None:
            pairs = {n: replace(p, values=quotients[n].mean(0).to(p.values)) for n, p in pairs.items()}
        return Proposal(tuple(candidates), pairs, estimated)

    def _candidates(
        self,
        name: str,
        pairs: Eigenpairs,
        samples: Tensor,
        offered: list[Scheme],
        step_size: float,
        estimated: dict[tuple[str, int, str], float],
    ) -> list[Candidate]:
        """The best scheme of every neuron, judged by ``samples`` (batches, N, 2) of the quotients."""
        alphas = torch.tensor([s.coefficients for s in offered], dtype=torch.float64)  # (schemes, 2)
        values = samples.double().cpu() @ alphas.T  # (batches, N, schemes)
        mean = values.mean(0)
        count = len(values)
        error = values.std(0, unbiased=True) / count**0.5 if count > 1 else torch.zeros_like(mean)
        before = pairs.values.double().cpu() @ alphas.T
        vectors = pairs.vectors.cpu()
        scale = step_size**2 / 2
        best = mean.argmin(1)
        candidates = []
        for neuron in range(mean.shape[0]):
            chosen = range(len(offered)) if self.all_schemes else [int(best[neuron])]
            for k in chosen:
                scheme = offered[k]
                along = torch.tensor(scheme.along, dtype=vectors.dtype) * step_size
                value = float(mean[neuron, k])
                estimated[name, neuron, scheme.name] = -scale * float(before[neuron, k])
                candidates.append(
                    Candidate(
                        group=name,
                        neuron=neuron,
                        gain=-scale * value,
                        splitting_index=value,
                        standard_error=scale * float(error[neuron, k]),
                        scheme=scheme.name,
                        weights=scheme.weights,
                        displacements=along @ vectors[neuron],
                    )
                )
        return candidates


def rayleigh_quotients(
    operator: SplittingOperator, pairs: Mapping[str, Eigenpairs], ranks: Ranks
) -> dict[str, Tensor]:
    """Rayleigh quotients of both extreme vectors of every neuron, batch by batch: ``(batches, N, 2)``.

    Costs two products per batch.
    """
    columns = []
    for end in (0, 1):
        vectors = {name: p.vectors[:, end] for name, p in pairs.items()}
        samples: dict[str, list[Tensor]] = {name: [] for name in vectors}
        for product in operator.products(vectors):
            for name, v in vectors.items():
                samples[name].append((product[name] * v).sum(1))
        columns.append({name: torch.stack(found) for name, found in samples.items()})
    both = {name: torch.stack([c[name] for c in columns], dim=2) for name in pairs}
    return ranks.gather_of(both)
