"""What several processes must agree on; one process agrees with itself."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """Collectives of one process: nothing to do. :mod:`lightning_split.optim` has the Trainer's."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that the others follow in :meth:`agree`."""
        return True

    def mean_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor averaged over the processes."""
        return tensors

    def gather_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor concatenated over the processes along its first dimension, in rank order."""
        return tensors

    def agree(self, decision: T) -> T:
        """The decision of the first process."""
        return decision
