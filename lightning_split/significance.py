r"""Which gains are more than noise, and how many fresh batches it takes to tell.

A candidate's gain is a mean over fresh batches with a standard error, so :math:`t = \text{gain}/\text{se}`
has Student's distribution if the true gain is zero. Candidates pass by the rule of Benjamini and Hochberg:
the expected share of those without a true gain, among all that pass, is at most the level. Fresh batches are
drawn in *looks*, each as long as all before it, until the strategy would not choose more candidates if it
believed every positive gain. The level is split over the looks, because who looks often finds something more
often, in proportion to the batches that they have seen: most of it is left for the last.

A gain that was measured further away than the growth's own step, where there is more to see (kinks), has to
show close by as well: there, by itself, its :math:`t` has to reach the level ``NEARBY``. Of splits that pass
far away but gain nothing at the step, this lets that share pass.

What a growth is to lower is the training loss. Where the fresh batches are a good part of all that an epoch
has, little of it is left unseen, and the standard error of the mean over the epoch is smaller than that of an
endless stream by :math:`\sqrt{1 - n/N}` (sampling without replacement). With all batches seen, the gain is
known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import t as student

from lightning_split.candidates import Candidate
from lightning_split.ranks import Ranks

__all__ = [
    "FEWEST",
    "FIRST_LOOK",
    "NEARBY",
    "NUM_LOOKS",
    "DrawnBatches",
    "FreshBatches",
    "GainTest",
    "passing",
]

FEWEST = 8  # with fewer batches there is no standard error to rely on, and nothing is tested
FIRST_LOOK = 16  # below some 16 batches hardly anything passes (benchmarks/splitting_phase.py --splits)
NEARBY = 0.05  # chosen together with the distances (docs, choosing settings)
NUM_LOOKS = 3  # of an iterable of unknown length: 16, 32 and 64 batches


class DrawnBatches:
    """Batches of which the first are at hand, and the others are drawn when somebody asks for them.

    Args:
        first: Those at hand.
        draw: ``draw(n)`` returns some more, leaving out the first ``n`` that it has; none at the end.
        most: Number of batches at most.
        population: How many such batches an epoch has; ``inf`` if that is not known.
    """

    def __init__(
        self,
        first: Sequence[Any],
        draw: Callable[[int], Sequence[Any]],
        most: int,
        population: float = math.inf,
    ) -> None:
        self._first, self._draw, self._most = first, draw, most
        self.population: float = max(population, len(first))

    def __len__(self) -> int:
        """The largest number of batches that there can be."""
        return self._most

    def __iter__(self) -> Iterator[Any]:
        """The batches, in order."""
        yield from self._first
        drawn = 0
        while drawn < self._most - len(self._first):
            found = self._draw(drawn)
            if not found:
                self.population = min(self.population, len(self._first) + drawn)  # that was all of them
                return
            drawn += len(found)
            yield from found


class FreshBatches:
    """Batches that have not shaped any direction, drawn only as far as they are needed.

    Args:
        batches: Where they come from. If its length is known, all of it may be drawn; else
            ``FIRST_LOOK * 2**(NUM_LOOKS - 1)`` batches.
        ranks: All processes draw equally many.

    Raises:
        ValueError: In :meth:`looks`, if there is no batch.
    """

    def __init__(self, batches: Iterable[Any], ranks: Ranks | None = None) -> None:
        most = len(batches) if isinstance(batches, Sized) else FIRST_LOOK * 2 ** (NUM_LOOKS - 1)
        self._batches = batches
        self._source = islice(iter(batches), most)
        self._total = 0  # in the looks
        self._looks, self._ended = 0, False
        self._ranks = ranks or Ranks()
        self._drawn: list[Any] = []  # ahead of the looks
        self.num_looks = 1
        while FIRST_LOOK * 2 ** (self.num_looks - 1) < most:
            self.num_looks += 1

    def first(self, count: int) -> list[Any]:
        """The first batches, at most so many; the looks begin with them again."""
        self._drawn += islice(self._source, max(0, count - len(self._drawn)))
        return self._drawn[:count]

    def looks(self) -> Iterator[list[Any]]:
        """Batches to go on with: 16, then as many again as were drawn before, until there are no more."""
        size = FIRST_LOOK
        total = number = 0
        while True:
            batches = self.first(size)
            self._drawn = self._drawn[size:]
            counts = self._ranks.gather_of({"drawn": torch.tensor([len(batches)])})["drawn"]
            batches = batches[: int(counts.min())]
            if not batches:
                if not total:
                    raise ValueError("There is no fresh batch; pass confirm_batches=None to do without.")
                return
            total += len(batches)
            self._total = max(self._total, total)
            number += 1
            self._looks = number
            self._ended = len(batches) < size
            yield batches
            if len(batches) < size:
                return
            size = total

    @property
    def share(self) -> float:
        """Which share of the level the look so far has: 1, 2, 4 ... parts, and the last one what is left."""
        parts = 2**self.num_looks - 1
        seen = 2 ** max(0, self._looks - 1)
        return float(parts - seen + 1 if self._ended else seen) / float(parts)

    @property
    def unseen(self) -> float:
        """What share of the batches of an epoch no look has shown yet; 1 if an epoch has no known end."""
        population = getattr(self._batches, "population", math.inf)
        return max(0.0, 1.0 - self._total / population)


def passing(
    gains: npt.NDArray[np.float64],
    errors: npt.NDArray[np.float64],
    num_batches: int,
    level: float,
    alternatives: int = 1,
) -> npt.NDArray[np.bool_]:
    """Which gains are significantly above zero.

    Args:
        gains: Means over the batches, ``(N,)``.
        errors: Their standard errors, ``(N,)``.
        num_batches: Number of batches that they were measured on.
        level: Bound on the expected share of those that pass without a true gain.
        alternatives: Each gain is the largest of so many that were measured on the same batches.

    Returns:
        ``(N,)``.

    References:
        Benjamini and Hochberg (1995), the rule; Bonferroni's bound for the alternatives.
    """
    positive = gains > 0
    if not len(gains):
        return positive
    p = np.minimum(1.0, alternatives * _chances(gains, errors, num_batches))
    ranked = np.sort(p)
    below = np.flatnonzero(ranked <= level * np.arange(1, len(p) + 1) / len(p))
    return positive & (p <= ranked[below[-1]]) if len(below) else np.zeros(len(p), dtype=bool)


def _chances(
    gains: npt.NDArray[np.float64], errors: npt.NDArray[np.float64], num_batches: int
) -> npt.NDArray[np.float64]:
    """How likely noise alone would show so large a gain; an error of zero leaves no doubt."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(gains > 0, gains / errors, -np.inf)
    return np.asarray(student.sf(ratio, num_batches - 1), dtype=np.float64)


class GainTest:
    """Tells whether the candidates' gains are known well enough, and which of them pass.

    Args:
        select: What the strategy chooses among candidates.
        level: See :func:`passing`; ``None`` lets every candidate pass and wants every batch.
        fresh: The batches that the gains are measured on, look by look.
    """

    def __init__(
        self,
        select: Callable[[Sequence[Candidate]], list[Candidate]],
        level: float | None,
        fresh: FreshBatches | None = None,
    ) -> None:
        self._select = select
        self._fresh = fresh
        self._level = level

    def passed(self, candidates: Sequence[Candidate], num_batches: int, alternatives: int = 1) -> list[bool]:
        """Of each candidate, whether its gain is significant; all pass that were not measured again."""
        if self._level is None or num_batches < FEWEST:
            return [True] * len(candidates)
        at_hand = np.array([(c.gain, c.standard_error) for c in candidates], dtype=np.float64)
        nearby = np.array([c.nearby or (math.inf, 0.0) for c in candidates], dtype=np.float64)
        (gains, errors), (near, near_errors) = at_hand.reshape(-1, 2).T, nearby.reshape(-1, 2).T
        unseen = 1.0 if self._fresh is None else math.sqrt(self._fresh.unseen)
        level = self._level * (1.0 if self._fresh is None else self._fresh.share)
        passed = passing(gains, unseen * errors, num_batches, level, alternatives)
        passed &= _chances(near, unseen * near_errors, num_batches) <= NEARBY
        return list(map(bool, passed))

    def choose(self, candidates: Sequence[Candidate], passed: Sequence[bool]) -> list[Candidate]:
        """What the strategy chooses of those that passed.

        It sees the others too, without gain, because a share of the neurons means a share of all of them.
        """
        shown = [
            c if ok else replace(c, gain=0.0, splitting_index=0.0)
            for c, ok in zip(candidates, passed, strict=True)
        ]
        dropped = {(c.group, c.neuron, c.scheme) for c, ok in zip(candidates, passed, strict=True) if not ok}
        return [c for c in self._select(shown) if (c.group, c.neuron, c.scheme) not in dropped]

    def settled(self, candidates: Sequence[Candidate], num_batches: int, alternatives: int = 1) -> bool:
        """Whether more fresh batches would give the strategy nothing more to choose."""
        if self._level is None or num_batches < FEWEST:
            return False
        passed = self.passed(candidates, num_batches, alternatives)
        return len(self.choose(candidates, passed)) >= len(self._select(candidates))
