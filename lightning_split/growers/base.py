"""What every grower is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_split.context import GrowthContext
from lightning_split.eigen import Eigenpairs
from lightning_split.selection import Candidate
from lightning_split.stepsize import StepSize, as_step_size

__all__ = ["Draft", "Grower", "NotApplicableError", "PredictingGrower", "Proposal", "confirmed"]


class NotApplicableError(ValueError):
    """A grower has nothing to offer for a network of this kind; the message says why."""


@dataclass(frozen=True)
class Proposal:
    """What a grower offers for selection, and what it measured on the way."""

    candidates: tuple[Candidate, ...]
    eigenpairs: Mapping[str, Eigenpairs] = field(default_factory=dict)
    # eigenpairs: by group; their values are Rayleigh quotients on fresh batches if those were measured
    estimated_gain: Mapping[tuple[str, int, str], float] = field(default_factory=dict)
    # estimated_gain: (group, neuron, scheme) -> gain before confirmation
    num_batches: int = 0  # fresh batches that the gains were measured on, of all processes together
    alternatives: int = 1  # each gain is the largest of so many measured on the same batches
    notes: tuple[str, ...] = ()  # sentences for the report: which groups were left out, and why


class Grower(ABC):
    """A way to propose new neurons; the seam for one of your own."""

    def check(self, context: GrowthContext) -> None:
        """Refuse a network for which the grower has nothing to offer, before training starts.

        Args:
            context: The network, with the first batch.

        Raises:
            NotApplicableError: If the grower does not apply to any group, saying why.
        """
        return None

    @abstractmethod
    def propose(self, context: GrowthContext, *, step_size: float | str | StepSize) -> Proposal:
        """Candidates for the neurons of every group.

        Args:
            context: The traced network, its batches, the seed of anything random, and the processes to
                average over.
            step_size: The lengths of the displacements; a float is ε for all of them.

        Raises:
            NotApplicableError: If the grower does not apply to any group, saying why.
        """


class Draft(ABC):
    """What a grower has in mind, before the gains are measured again on fresh batches."""

    eigenpairs: Mapping[str, Eigenpairs] = {}
    alternatives: int = 1  # each gain is the largest of so many measured on the same batches
    notes: tuple[str, ...] = ()

    @abstractmethod
    def measure(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """What the gains are made of, batch by batch, of all processes: ``{any name: (batches, ...)}``."""

    @abstractmethod
    def offers(self, samples: Mapping[str, Tensor] | None) -> list[tuple[Candidate, float]]:
        """Candidates, and the gain of each as estimated.

        Args:
            samples: What :meth:`measure` returned for all fresh batches so far, one after the other; ``None``
                without fresh batches, where gain and estimate are the same.
        """


class PredictingGrower(Grower):
    """A grower whose gains are predicted decreases of the loss, measured again on fresh batches."""

    @abstractmethod
    def draft(self, context: GrowthContext, step: StepSize) -> Draft:
        """What to propose, found on the estimation batches; see :meth:`Grower.propose`."""

    def propose(self, context: GrowthContext, *, step_size: float | str | StepSize) -> Proposal:
        """The candidates of the draft, confirmed; see :meth:`Grower.propose`."""
        return confirmed(context, self.draft(context, as_step_size(step_size)))


def confirmed(context: GrowthContext, draft: Draft) -> Proposal:
    """Measure the gains again on as many fresh batches as it takes to choose."""
    samples: dict[str, Tensor] | None = None
    offers, count = draft.offers(None), 0
    if context.fresh is not None and offers:
        for look in context.fresh.looks():
            found = draft.measure(look)
            samples = found if samples is None else {n: torch.cat([samples[n], s]) for n, s in found.items()}
            offers, count = draft.offers(samples), len(next(iter(samples.values())))
            if context.settled([c for c, _ in offers], count, draft.alternatives):
                break
    return Proposal(
        tuple(c for c, _ in offers),
        draft.eigenpairs,
        {(c.group, c.neuron, c.scheme): gain for c, gain in offers},
        count,
        draft.alternatives,
        draft.notes,
    )
