"""Candidates: what a grower offers, and the canonical order in which ties are broken."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

__all__ = ["Candidate", "best_per_neuron", "canonical", "check_finite", "in_order", "lowest_per_neuron"]


@dataclass(frozen=True)
class Candidate:
    """One way to split one neuron, with what it promises and what it costs.

    A neuron may have several candidates (schemes); a strategy chooses at most one of them.

    Args:
        group: Name of the channel group.
        neuron: Index of the neuron within the group.
        gain: Predicted decrease of the loss; positive is good.
        cost: What the split adds if it is the only one, in the unit that the strategy asks for.
        splitting_index: The eigenvalue, or the value of the scheme, behind the gain.
        standard_error: Of the gain.
        scheme: Name of the scheme.
        weights: Offspring weights, which sum to 1.
        displacements: ``(m, dim)``, one row per offspring, step size included.
        through: The same for channelwise layers, see :class:`lightning_split.surgery.Split`.
        outgoing: The same for the outgoing weights.
        fixed: The part of ``displacements`` that does not grow with the step size; ``None`` for zero.
        order: The gain goes with this power of the step size.
        prediction: Predicted decrease of the loss, where ``gain`` is only a score to choose by; default
            the gain.
        nearby: The gain once more and its standard error, if ``gain`` was measured further away than the step
            and this closer to it.
    """

    group: str
    neuron: int
    gain: float
    cost: float = 1.0
    splitting_index: float | None = None
    standard_error: float = 0.0
    scheme: str = "binary"
    weights: tuple[float, ...] = ()
    displacements: Tensor | None = field(default=None, compare=False, repr=False)
    through: Tensor | None = field(default=None, compare=False, repr=False)
    outgoing: Tensor | None = field(default=None, compare=False, repr=False)
    fixed: Tensor | None = field(default=None, compare=False, repr=False)
    order: int = 2
    prediction: float | None = None
    nearby: tuple[float, float] | None = None

    @property
    def num_new(self) -> int:
        """By how many neurons the group grows."""
        return max(1, len(self.weights) - 1)

    @property
    def predicted(self) -> float:
        """Predicted decrease of the loss."""
        return self.gain if self.prediction is None else self.prediction

    def at(self, ratio: float) -> Candidate:
        """The same split with a step size that is ``ratio`` times as large."""
        if ratio == 1 or self.displacements is None:
            return self
        moved = self.displacements
        moved = ratio * moved if self.fixed is None else self.fixed + ratio * (moved - self.fixed)
        power = ratio**self.order
        return replace(
            self,
            gain=self.gain * power,
            standard_error=self.standard_error * power,
            nearby=None if self.nearby is None else (self.nearby[0] * power, self.nearby[1] * power),
            prediction=None if self.prediction is None else self.prediction * power,
            displacements=moved,
            outgoing=None if self.outgoing is None else ratio * self.outgoing,
        )


def canonical(c: Candidate) -> tuple[str, int, str, float, float, tuple[float, ...]]:
    """Sort key by group, neuron and scheme, so that no result depends on the order of the candidates."""
    return c.group, c.neuron, c.scheme, c.cost, -c.gain, c.weights


def best_per_neuron(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidate of largest gain of every neuron, ordered by group and neuron.

    Args:
        candidates: In any order; ties go to the lower cost, then to the lower scheme name.

    Raises:
        ValueError: If a gain is not finite.

    Example:
        >>> offered = [Candidate("fc", 0, 0.1), Candidate("fc", 0, 0.3, scheme="quartet")]
        >>> [c.scheme for c in best_per_neuron(offered)]
        ['quartet']
    """
    return lowest_per_neuron(candidates, lambda c: -c.gain)


def lowest_per_neuron(
    candidates: Iterable[Candidate], value: Callable[[Candidate], float]
) -> list[Candidate]:
    """The candidate of lowest value of every neuron, in canonical order."""
    best: dict[tuple[str, int], Candidate] = {}
    candidates = list(candidates)
    check_finite(candidates)
    for c in sorted(candidates, key=lambda c: (value(c), c.cost, canonical(c))):
        best.setdefault((c.group, c.neuron), c)
    return sorted(best.values(), key=canonical)


def check_finite(candidates: Iterable[Candidate]) -> None:
    """Refuse gains and splitting indexes that are not finite."""
    for c in candidates:
        index = 0.0 if c.splitting_index is None else c.splitting_index
        if not (math.isfinite(c.gain) and math.isfinite(index)):
            what, value = ("splitting index", index) if math.isfinite(c.gain) else ("gain", c.gain)
            raise ValueError(
                f"Neuron {c.neuron} of group '{c.group}' has {what} {value!r}; a strategy "
                "needs finite numbers, so check the loss for NaN."
            )


def in_order(
    chosen: Iterable[Candidate],
    offered: Iterable[Candidate],
    admissible: Callable[[Sequence[Candidate]], bool],
    *,
    across: bool,
) -> list[Candidate]:
    """The same choice, with ties broken by group and neuron.

    Of candidates that have the same gain, cost and number of new neurons, those that come first are chosen,
    as far as that is admissible. Only neurons with a single candidate take part.

    Args:
        chosen: What was chosen.
        offered: What it was chosen from.
        admissible: Whether another choice of equal gain and cost keeps the rules.
        across: Whether candidates of different groups are worth the same if they have the same numbers.
    """
    picked = sorted(chosen, key=canonical)
    alike: dict[tuple[object, ...], list[Candidate]] = {}
    offered = sorted(offered, key=canonical)
    schemes = Counter((c.group, c.neuron) for c in offered)
    for c in offered:
        if schemes[c.group, c.neuron] == 1:
            alike.setdefault((c.gain, c.cost, c.num_new, "" if across else c.group), []).append(c)
    held = {id(c) for c in picked}
    for tied in alike.values():
        mine = [c for c in tied if id(c) in held]
        first = tied[: len(mine)]
        if 0 < len(mine) < len(tied) and any(a is not b for a, b in zip(mine, first, strict=True)):
            out = {id(c) for c in mine}
            trial = sorted([*(c for c in picked if id(c) not in out), *first], key=canonical)
            if admissible(trial):
                picked, held = trial, (held - out) | {id(c) for c in first}
    return picked
