r"""Important samples: the few by which the loss pulls hardest, weighted so that means stay what they are.

The splitting matrices are means over samples, and in a trained network most samples are fitted and add next
to nothing. Which ones matter shows in a forward pass: the gradient of the loss at the last read is cheap.
Sample i is kept with a probability :math:`q_i` in proportion to its norm, and counts :math:`1/q_i` times, so
that the mean is unbiased whatever the scores are (Katharopoulos and Fleuret, 2018, "Not All Samples Are
Created Equal: Deep Learning with Importance Sampling", Sec. 3.2, for training steps). Samples are told apart
by an axis of what consumers read; that the loss is a mean over them is not believed but tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture
from lightning_split.cuts import CutNetwork, FirstPass, LossFn, Place
from lightning_split.measuring import batch_size
from lightning_split.picking import Picked, UnlikeError, joined, picked

__all__ = ["ImportantSamples", "NotSeparableError", "Weigh", "check_separable", "important_samples"]

Weigh = Callable[[Place, Tensor], Tensor]  # what the gradient of the loss at a read becomes

_FLOOR = 0.05  # of the mean score is added to every score: one of zero may be wrong
_MOST_VARIANCE = 1.25  # of a mean over drawn samples, against that over all, where the draw sets its own size


class NotSeparableError(ValueError):
    """The loss is no mean over samples that stand side by side in the batches."""


@dataclass(frozen=True)
class ImportantSamples:
    """What was kept of some batches, in batches of about their size.

    Attributes:
        batches: What ``loss_fn`` takes.
        weigh: For each of them, how its samples count.
    """

    batches: list[Any]
    weigh: list[Weigh]


def check_separable(
    model: nn.Module, arch: Architecture, batch: Any, loss_fn: LossFn, *, train: bool = False, seed: int = 0
) -> None:
    """Refuse losses and batches out of which single samples cannot be taken.

    Costs two training steps.

    Raises:
        NotSeparableError: Naming the layer whose gradients depend on the other samples.
    """
    _samples_axes(CutNetwork(model, arch, loss_fn, train=train, seed=seed), batch)


def important_samples(
    model: nn.Module,
    arch: Architecture,
    batches: Sequence[Any],
    loss_fn: LossFn,
    share: float | None,
    *,
    train: bool = False,
    seed: int = 0,
) -> ImportantSamples:
    """Keep a share of the samples, the important ones more likely.

    Costs a forward pass for each batch, and two training steps.

    Args:
        model: The network; left as it was.
        arch: Its architecture.
        batches: What ``loss_fn`` takes; each counts the same.
        loss_fn: The mean loss of a batch, over its samples.
        share: Of the samples of all batches, above 0 and below 1; ``None`` keeps as few as lose a fifth of
            the precision.
        train: Run in training mode instead of eval mode.
        seed: Of the draw.

    Raises:
        NotSeparableError: See :func:`check_separable`.
        ValueError: See :meth:`~lightning_split.cuts.CutNetwork.first_pass`.
    """
    cut = CutNetwork(model, arch, loss_fn, train=train, seed=seed)
    axes, last = _samples_axes(cut, batches[0])
    sizes = [batch_size(batch) for batch in batches]
    scores = [
        _scores(cut, batch, number, last, axes, size)
        for number, (batch, size) in enumerate(zip(batches, sizes, strict=True))
    ]
    kept, odds = drawn(torch.cat(scores), share, seed)
    parts: list[Picked] = []
    shares: list[Tensor] = []  # of what is kept, in the mean over all batches
    start = 0
    for batch, size in zip(batches, sizes, strict=True):
        here = (kept >= start) & (kept < start + size)
        if bool(here.any()):
            parts.append(Picked(batch, kept[here] - start, size))
            shares.append(1 / (odds[here] * size * len(batches)))
        start += size
    made = joined(parts, max(sizes))
    weigh: list[Weigh] = []
    for _, numbers in made:
        share_of = torch.cat([shares[number] for number in numbers])
        # The operator takes the mean over the new batches of the mean over their samples.
        weigh.append(_Weights(axes, len(made) * len(share_of) * share_of))
    return ImportantSamples([batch for batch, _ in made], weigh)


def drawn(scores: Tensor, share: float | None, seed: int) -> tuple[Tensor, Tensor]:
    """Which samples to keep: their numbers, in order, and the probability that each of them had.

    Systematic sampling: exactly the share is drawn, no sample twice.

    Args:
        scores: ``(n,)``, not negative; a constant is added to them.
        share: Of the samples, above 0 and at most 1; ``None`` keeps as few as lose a fifth of the precision.
        seed: Of the draw.
    """
    scores = scores.double().cpu()
    chances = _fewest(scores) if share is None else _odds(scores, max(1, round(share * len(scores))))
    offset = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    marks = (chances.cumsum(0) + offset + 1e-9).floor()
    kept = marks.diff(prepend=marks.new_zeros(1)).nonzero()[:, 0]
    return kept, chances[kept]


def _odds(scores: Tensor, count: int) -> Tensor:
    """In proportion to the scores, at most one, and of sum ``count``."""
    floor = _FLOOR * float(scores.mean())
    scores = scores + (floor if floor > 0 else 1.0)
    odds = torch.ones_like(scores)
    free = torch.ones_like(scores, dtype=torch.bool)
    while bool(
        free.any()
    ):  # those whose odds would be above one are certain, and the rest share what is left
        left = count - int((~free).sum())
        odds[free] = scores[free] * (left / scores[free].sum())
        above = free & (odds >= 1)
        odds[above] = 1.0
        free &= ~above
        if not bool(above.any()):
            break
    return odds


def _fewest(scores: Tensor) -> Tensor:
    """The odds of the smallest sample whose mean has little more variance than that of all samples.

    If what a sample adds is in proportion to its score g, with a random sign, the sum over all samples has
    the variance Σ g², and drawing makes it Σ g² / q.
    """
    squares = scores.square()
    low, high = 1, len(scores)
    while low < high:
        count = (low + high) // 2
        if float((squares / _odds(scores, count)).sum()) <= _MOST_VARIANCE * float(squares.sum()):
            high = count
        else:
            low = count + 1
    return _odds(scores, high)


# where samples lie --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Along which axis of what is read samples lie, and whether what belongs to one lies side by side."""

    axis: int
    together: bool

    def rows(self, which: Tensor, count: int, size: int) -> Tensor:
        """The places of some samples, sample after sample or in the order of the axis; of ``size`` places."""
        each = torch.arange(size // count)
        if self.together:
            return (which[:, None] * (size // count) + each).flatten()
        return (each[:, None] * count + which).flatten()

    def spread(self, values: Tensor, size: int) -> Tensor:
        """One value for each sample becomes one for each place."""
        each = size // len(values)
        return values.repeat_interleave(each) if self.together else values.repeat(each)


_Axes = Mapping[Place, _Axis]


def _samples_axes(cut: CutNetwork, batch: Any) -> tuple[_Axes, int]:
    """Where samples lie in what consumers read, and the number of the last read that reaches the loss.

    Half the batch runs alone. The axis that became shorter is that of the samples, and their gradients must
    be those of the whole batch, but for the mean over fewer.
    """
    size = batch_size(batch)
    if size < 2:
        raise NotSeparableError(_NOT_SEPARABLE.format("the batches hold one sample each"))
    which = torch.arange(size)[: size // 2] * 2 + torch.arange(size // 2) % 2  # some even, some odd
    # Any error here says that half a batch is not a batch.
    try:
        half = picked([Picked(batch, which, size)])
        whole, part = cut.first_pass(batch, 0), cut.first_pass(half, 0)
    except (RuntimeError, TypeError, IndexError, KeyError, UnlikeError) as error:
        raise NotSeparableError(_NOT_SEPARABLE.format(f"half a batch does not run ({error})")) from error
    if whole.places != part.places or set(whole.cotangents) != set(part.cotangents):
        raise NotSeparableError(
            _NOT_SEPARABLE.format("half a batch is read by other layers than a whole one")
        )
    axes: dict[Place, _Axis] = {}
    for number in whole.cotangents:
        place = whole.places[number]
        found = _axis(whole, part, number, which, size)
        if found is None or axes.setdefault(place, found) != found:
            raise NotSeparableError(
                _NOT_SEPARABLE.format(
                    f"at the input of '{place.path}' the gradients of half a batch are not those of the whole"
                )
            )
    return axes, max(whole.cotangents)


_NOT_SEPARABLE = (
    "sample_share needs batches whose samples can be taken out, and a loss that is the mean over them, but "
    "{}; leave sample_share at 1."
)


def _axis(whole: FirstPass, part: FirstPass, number: int, which: Tensor, size: int) -> _Axis | None:
    full, half = whole.cotangents[number], part.cotangents[number]
    if full.ndim != half.ndim:
        return None
    shorter = [i for i, (a, b) in enumerate(zip(full.shape, half.shape, strict=True)) if a != b]
    if len(shorter) != 1:
        return None
    (axis,) = shorter
    count, left = full.shape[axis], half.shape[axis]
    if count % size or left * size != count * len(which):
        return None
    expected = half * (len(which) / size)
    # Batches of another size take kernels that round otherwise, with autocast in 16 bits.
    close = 1e-6 if full.dtype.itemsize > 4 else 3e-2
    for together in (True, False):
        found = _Axis(axis, together)
        rows = found.rows(which, size, count).to(full.device)
        off = (full.index_select(axis, rows) - expected).norm()
        if bool(off <= close * expected.norm()):
            return found
    return None


@dataclass(frozen=True)
class _Weights:
    """Multiplies the gradients of every sample with its weight."""

    axes: _Axes
    weights: Tensor  # (n,)

    def __call__(self, place: Place, cotangent: Tensor) -> Tensor:
        found = self.axes.get(place)
        size = 0 if found is None else cotangent.shape[found.axis]
        if found is None or not size or size % len(self.weights):
            raise NotSeparableError(
                _NOT_SEPARABLE.format(f"'{place.path}' reads otherwise than in the first batch")
            )
        shape = [1] * cotangent.ndim
        shape[found.axis] = size
        return cotangent * found.spread(self.weights, size).to(cotangent).view(shape)


def _scores(cut: CutNetwork, batch: Any, number: int, last: int, axes: _Axes, size: int) -> Tensor:
    """How hard the loss pulls at each sample where it is read last, ``(size,)``; alike where nobody knows."""
    found = cut.late_gradient(batch, number, last)
    axis = None if found is None else axes.get(found[0])
    if found is None or axis is None or found[1].shape[axis.axis] % size:
        return torch.ones(size)
    places: Tensor = torch.linalg.vector_norm(found[1].movedim(axis.axis, 0).flatten(1), dim=1)
    places = places.view(size, -1) if axis.together else places.view(-1, size).T
    scores: Tensor = torch.linalg.vector_norm(places, dim=1)
    return scores.cpu()
