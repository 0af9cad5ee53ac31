"""What every grower is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lightning_split.context import GrowthContext
from lightning_split.eigen import Eigenpairs
from lightning_split.selection import Candidate
from lightning_split.stepsize import StepSize

__all__ = ["Grower", "NotApplicableError", "Proposal"]


class NotApplicableError(ValueError):
    """A grower has nothing to offer for a network of this kind; the message says why."""


@dataclass(frozen=True)
class Proposal:
    """What a grower offers for selection, and what it measured on the way."""

    candidates: tuple[Candidate, ...]
    eigenpairs: Mapping[str, Eigenpairs] = field(default_factory=dict)
    # eigenpairs: by group; after a confirmation their values are the Rayleigh quotients on fresh batches
    estimated_gain: Mapping[tuple[str, int, str], float] = field(default_factory=dict)
    # estimated_gain: (group, neuron, scheme) -> gain before confirmation
    num_batches: int = 0  # fresh batches that the gains were measured on, of all processes together
    alternatives: int = 1  # each gain is the largest of so many measured on the same batches
    notes: tuple[str, ...] = ()  # sentences for the report: which groups were left out, and why


class Grower(ABC):
    """A way to propose new neurons; the seam for one of your own."""

    predicts: ClassVar[bool] = True  # whether gains are predicted decreases of the loss, or only scores

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
