"""How splits are judged again on fresh batches: by Rayleigh quotients, or by displacing the neurons."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_split.context import GrowthContext
from lightning_split.curvature import SplittingOperator
from lightning_split.eigen import Eigenpairs
from lightning_split.growers.schemes import Scheme
from lightning_split.ranks import Ranks
from lightning_split.splits import weights_of
from lightning_split.stepsize import Relative

__all__ = ["Differences", "Measure", "Quotients", "rayleigh_quotients"]

Pairs = Mapping[str, Eigenpairs]
Vectors = dict[str, Tensor]

# At a small step only samples close to a kink count, and little passes; further away other kinks do. Chosen
# by the share that passes and the share of it that helps (docs, choosing settings).
_FAR = 0.2
_NEAR = 0.03


class Measure(ABC):
    """Measures what schemes are worth for every neuron, batch by batch.

    Attributes:
        offered: ``{group: (N, K)}``, numbers of the schemes that are judged.
        alternatives: The best of so many is offered.
    """

    offered: dict[str, Tensor]
    alternatives: int

    @abstractmethod
    def samples(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Of all processes, batch by batch: ``{group: (batches, N, any)}``.

        Raises:
            ValueError: If one is not finite, naming the group.
        """

    @abstractmethod
    def values(self, samples: Tensor) -> Tensor:
        """Values of the schemes, ``(batches, N, K)``: the loss changes by ε²/2 times these."""

    def nearby(self, samples: Tensor) -> Tensor | None:
        """What :meth:`values` would be closer to the step of the growth, if they are measured far from it."""
        return None

    def quotients(self, samples: Tensor) -> Tensor | None:
        """The Rayleigh quotients of both extreme vectors, ``(N, 2)``, if they were measured."""
        return None


class Quotients(Measure):
    """By the second derivatives: every scheme's value is a sum of two Rayleigh quotients."""

    def __init__(self, context: GrowthContext, pairs: Pairs, schemes: Sequence[Scheme]) -> None:
        self._context, self._pairs = context, pairs
        self._coefficients = torch.tensor([s.coefficients for s in schemes], dtype=torch.float64)
        every = torch.arange(len(schemes))
        self.offered = {name: every.expand(len(p.values), -1) for name, p in pairs.items()}
        self.alternatives = 1 if context.all_schemes else len(schemes)

    def samples(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Costs one preparation and two products per batch; see :meth:`Measure.samples`."""
        return rayleigh_quotients(self._context.operator(batches), self._pairs, self._context.ranks)

    def values(self, samples: Tensor) -> Tensor:
        """See :meth:`Measure.values`."""
        return samples.double().cpu() @ self._coefficients.T

    def quotients(self, samples: Tensor) -> Tensor | None:
        """See :meth:`Measure.quotients`."""
        return samples.mean(0)


class Differences(Measure):
    """By what the loss really changes by, which counts kinks for what they are.

    That has two terms (:mod:`lightning_split.differences`). The first is measured with the offspring further
    away than in the growth itself, if its steps are small: 0.2 of the norm of the neuron's weights. The
    second, the curvature of the rest of the network, goes with the cube of the step where there are kinks.
    It is measured at the growth's own, or at 0.03 of the norm if that is more; and so is the first once more,
    because what is a gain far away need not be one close by.

    Args:
        context: The network. Unless it wants all schemes, a neuron is judged by the one that promises most.
        pairs: The directions.
        schemes: What is judged.
        lengths: ``{group: (N,)}``, ε of every neuron in the growth.
    """

    alternatives = 1

    def __init__(
        self,
        context: GrowthContext,
        pairs: Pairs,
        schemes: Sequence[Scheme],
        lengths: Mapping[str, Tensor],
    ) -> None:
        self._context, self._pairs = context, pairs
        count = max(len(s.weights) for s in schemes)  # copies of weight zero make all schemes equally long
        weights = torch.tensor([[*s.weights, *[0.0] * (count - len(s.weights))] for s in schemes])
        along = torch.tensor([[*s.along, *[(0.0, 0.0)] * (count - len(s.along))] for s in schemes])
        coefficients = torch.tensor([s.coefficients for s in schemes], dtype=torch.float64)
        self.offered, self._scales = {}, {}
        self._splits: list[tuple[Vectors, Vectors]] = []  # weights, and along which vectors how far
        self._far: Vectors = {}
        lengths_near: Vectors = {}
        for name, p in pairs.items():
            best = (p.values.double().cpu() @ coefficients.T).argmin(1)[:, None]
            every = torch.arange(len(schemes)).expand(len(best), -1)
            self.offered[name] = every if context.all_schemes else best
            theta = weights_of(context.model, context.arch.group(name), "incoming")
            step = lengths[name]
            far, near = (torch.maximum(step, Relative(share).lengths(theta)) for share in (_FAR, _NEAR))
            near = torch.where(near > 0, near, _NEAR)
            far = torch.maximum(far, near)
            self._far[name] = far / near
            # Over ε²/2; below the shortest distance the second term goes on as the cube of it.
            square = 2 / near**2
            far_terms = torch.stack([2 / far**2, torch.zeros_like(near), square * (step / near)])
            self._scales[name] = torch.stack([far_terms, square * torch.tensor([[0.0], [1.0], [1.0]])], dim=2)
            lengths_near[name] = near.double().cpu()[:, None, None]
        for k in range(next(iter(self.offered.values())).shape[1]):
            chosen = {name: offered[:, k] for name, offered in self.offered.items()}
            self._splits.append(
                (
                    {name: weights[c].double() for name, c in chosen.items()},
                    {name: along[c].double() * lengths_near[name] for name, c in chosen.items()},
                )
            )

    def samples(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """Costs about three training steps per batch and scheme; see :meth:`Measure.samples`."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.offered}
        differences = self._context.differences(batches)
        for weights, along in self._splits:
            changes = list(differences.changes(weights, partial(self._offspring, along), self._far))
            for name, scale in self._scales.items():
                terms = [torch.einsum("nt,tnd->nd", change[name], scale) for change in changes]
                found[name].append(torch.stack(terms))
        values = {name: torch.stack(columns, dim=2) for name, columns in found.items()}
        both = self._context.ranks.gather_of(values)
        _check_finite(both, "changes of the loss by splits")
        return both

    def _offspring(self, along: Vectors, number: int) -> Vectors:
        """Displacements of one offspring of every neuron; all of them at once would fill the memory."""
        found = {}
        for name, p in self._pairs.items():
            low, high = along[name][:, number].to(p.vectors).unbind(1)
            found[name] = p.vectors[:, 0] * low[:, None]
            found[name].addcmul_(p.vectors[:, 1], high[:, None])
        return found

    def values(self, samples: Tensor) -> Tensor:
        """See :meth:`Measure.values`."""
        return samples[..., 0]

    def nearby(self, samples: Tensor) -> Tensor:
        """See :meth:`Measure.nearby`."""
        return samples[..., 1]


def rayleigh_quotients(operator: SplittingOperator, pairs: Pairs, ranks: Ranks) -> dict[str, Tensor]:
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
    _check_finite(both, "Rayleigh quotients")
    return both


def _check_finite(samples: Mapping[str, Tensor], what: str) -> None:
    for name, values in samples.items():
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"The {what} of group '{name}' on fresh batches are not finite; check the loss "
                "for NaN or infinity, or measure in a higher precision."
            )
