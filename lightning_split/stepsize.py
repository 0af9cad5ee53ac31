"""Step sizes: how far offspring are moved apart, one rule for a whole growth."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Absolute", "LineSearch", "Relative", "StepSize", "as_step_size"]

LossAt = Callable[[float], float]


class StepSize(ABC):
    """How far offspring are moved apart; the seam for a rule of your own."""

    @abstractmethod
    def lengths(self, weights: Tensor) -> Tensor:
        """The length ε of the displacement of each neuron.

        Args:
            weights: ``(N, D)``, what is displaced: the incoming (or outgoing) weights of a group's neurons.

        Returns:
            ``(N,)``, none negative.
        """

    def ratio(self, loss_at: LossAt, loss_before: float) -> tuple[float, float]:
        """By how much all lengths are multiplied in the end; 0 means that nothing is to grow.

        Args:
            loss_at: The loss on held-out batches if the growth is carried out with all lengths multiplied by
                the argument; infinite if it is no number. Costs one forward pass per held-out batch.
            loss_before: The same without growth.

        Returns:
            The ratio, and the loss there.
        """
        return 1.0, loss_at(1.0)


@dataclass(frozen=True)
class Absolute(StepSize):
    """The same ε for every neuron, in units of the weights, as in the papers.

    Args:
        length: ε; 0 makes offspring that equal their parents.

    Raises:
        ValueError: If the length is negative or not finite.
    """

    length: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 <= self.length < math.inf:
            raise ValueError(
                f"step_size must be at least 0, got {self.length}: it is the length of a displacement."
            )

    def lengths(self, weights: Tensor) -> Tensor:
        """ε for all."""
        return torch.full((len(weights),), float(self.length), dtype=torch.float64)


@dataclass(frozen=True)
class Relative(StepSize):
    """A fraction of the norm of the neuron's weights, so that it means the same in all layers.

    Args:
        fraction: ε over that norm. A neuron whose weights are zero takes the mean norm of its group.

    Raises:
        ValueError: If the fraction is negative or not finite.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < math.inf:
            raise ValueError(
                f"Relative needs the fraction of a norm, which is at least 0, got {self.fraction}."
            )

    def lengths(self, weights: Tensor) -> Tensor:
        """The fraction of each norm."""
        norms = weights.detach().double().norm(dim=1).cpu()
        return self.fraction * torch.where(norms > 0, norms, norms.mean())


@dataclass(frozen=True)
class LineSearch(StepSize):
    """Search ε for the whole growth by the loss on held-out batches; never worse than no growth.

    All lengths of ``start`` are multiplied by one number. From 1 it grows or shrinks by ``factor`` as long as
    the loss falls, in at most ``max_passes`` passes over the held-out batches (the confirmation's). If none
    of the growths tried has a lower loss than the network as it is, nothing grows, and the report says so.

    Args:
        start: The lengths that are tried first; a float is absolute. Neurons are chosen by their gains at
            these, so they should be short enough for the prediction to hold.
        factor: Ratio of one length to the next.
        max_passes: At most so many lengths are tried.

    Raises:
        ValueError: If an argument is out of range.
    """

    start: StepSize | float = 1e-2
    factor: float = 3.0
    max_passes: int = 8

    def __post_init__(self) -> None:
        if not 1 < self.factor < math.inf:
            raise ValueError(f"LineSearch needs a factor above 1, got {self.factor}.")
        if self.max_passes < 1:
            raise ValueError(f"LineSearch needs at least one pass, got max_passes={self.max_passes}.")
        if isinstance(self.start, LineSearch):
            raise ValueError("LineSearch starts from lengths of its own: give it a number or Relative(...).")
        as_step_size(self.start)

    def lengths(self, weights: Tensor) -> Tensor:
        """Those of ``start``."""
        return as_step_size(self.start).lengths(weights)

    def ratio(self, loss_at: LossAt, loss_before: float) -> tuple[float, float]:
        """The best of the ratios tried; see :meth:`StepSize.ratio`."""
        best, lowest, passes = 0.0, loss_before, 0

        def better(ratio: float) -> bool:
            nonlocal best, lowest, passes
            passes += 1
            loss = loss_at(ratio)
            if not loss < lowest:  # also where it is no number
                return False
            best, lowest = ratio, loss
            return True

        ratio = 1.0
        if better(ratio):
            while passes < self.max_passes and better(ratio * self.factor):
                ratio *= self.factor
            if ratio > 1:
                return best, lowest
        # Too long, or the first length was the best so far: the optimum may be shorter.
        ratio = 1.0
        while passes < self.max_passes:
            ratio /= self.factor
            found = better(ratio)
            if not found and best > 0:
                break
        return best, lowest


def as_step_size(step_size: float | str | StepSize) -> StepSize:
    """The rule that a number or a name stands for.

    Raises:
        ValueError: If it stands for none.
    """
    if isinstance(step_size, StepSize):
        return step_size
    if isinstance(step_size, str):
        if step_size == "line_search":
            return LineSearch()
        try:
            step_size = float(step_size)
        except ValueError:
            raise ValueError(
                f'step_size is a number, "line_search" or a StepSize, got {step_size!r}.'
            ) from None
    return Absolute(step_size)
