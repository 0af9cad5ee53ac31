"""Several growers under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_split.architecture import ChannelGroup
from lightning_split.context import GrowthContext
from lightning_split.growers.base import Draft, Grower, NotApplicableError, PredictingGrower
from lightning_split.selection import Candidate
from lightning_split.splits import weights_of
from lightning_split.stepsize import StepSize

__all__ = ["Mixed"]


@dataclass(frozen=True)
class Mixed(PredictingGrower):
    """Let several growers compete for the same budget, splits and new neurons, on one scale of gain.

    The scale is the predicted decrease of the loss at the growth's step sizes, measured again on the fresh
    batches for all members alike. A member that does not apply to the network is left out, and the report
    says so.

    A new neuron can stand beside any neuron of its group. The best ones stand beside those that gain the
    least from a split, so that they do not keep each other out.

    Args:
        growers: The members.

    Raises:
        ValueError: If there is none, or one whose gains are no predictions (:class:`RandomSplit`,
            :class:`Net2Net`).

    References:
        Wu, Liu, Stone, Liu (2020), Firefly neural architecture descent.
    """

    growers: Sequence[Grower]

    def __post_init__(self) -> None:
        object.__setattr__(self, "growers", tuple(self.growers))
        if not self.growers:
            raise ValueError("Mixed needs at least one grower.")
        for grower in self.growers:
            if not isinstance(grower, PredictingGrower):
                raise ValueError(
                    f"{type(grower).__name__} does not predict gains, so it cannot compete in Mixed; "
                    "use it alone."
                )

    def check(self, context: GrowthContext) -> None:
        """Refuse a network to which no member applies; see :meth:`Grower.check`."""
        reasons = [_refusal(grower, context) for grower in self.growers]
        if all(reasons):
            raise NotApplicableError(" ".join(filter(None, reasons)))

    def draft(self, context: GrowthContext, step: StepSize) -> Draft:
        """What all members have in mind; see :meth:`PredictingGrower.draft`. Costs what the members cost."""
        drafts, notes = [], []
        for grower in self.growers:
            assert isinstance(grower, PredictingGrower)
            try:
                drafts.append(grower.draft(context, step))
            except NotApplicableError as error:
                notes.append(str(error))
        if not drafts:
            raise NotApplicableError(" ".join(notes))
        return _Together(context, drafts, notes)


def _refusal(grower: Grower, context: GrowthContext) -> str | None:
    try:
        grower.check(context)
    except NotApplicableError as error:
        return str(error)
    return None


class _Together(Draft):
    """Several drafts, all measured on the same batches."""

    def __init__(self, context: GrowthContext, drafts: Sequence[Draft], notes: Sequence[str]) -> None:
        self.alternatives = max(draft.alternatives for draft in drafts)
        self.notes = (*notes, *(note for draft in drafts for note in draft.notes))
        self._context, self._drafts = context, drafts

    def measure(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        return {
            f"{number} {name}": values
            for number, draft in enumerate(self._drafts)
            for name, values in draft.measure(batches).items()
        }

    def offers(self, samples: Mapping[str, Tensor] | None) -> list[tuple[Candidate, float]]:
        found = []
        for number, draft in enumerate(self._drafts):
            head = f"{number} "
            mine = samples and {n.removeprefix(head): s for n, s in samples.items() if n.startswith(head)}
            found += draft.offers(mine)
        self.eigenpairs = {name: pairs for d in self._drafts for name, pairs in d.eigenpairs.items()}
        return [
            offer
            for group in self._context.arch.groups
            for offer in _placed(self._context, group, [o for o in found if o[0].group == group.name])
        ]


def _placed(
    context: GrowthContext, group: ChannelGroup, offers: Sequence[tuple[Candidate, float]]
) -> list[tuple[Candidate, float]]:
    """The candidates of one group, the new neurons beside neurons that gain little from a split."""
    splits = [(c, e) for c, e in offers if 0.0 not in c.weights]
    new = sorted(((c, e) for c, e in offers if 0.0 in c.weights), key=lambda offer: -offer[0].gain)
    if not new:
        return splits
    best = [0.0] * group.width
    for c, _ in splits:
        best[c.neuron] = max(best[c.neuron], c.gain)
    order = sorted(range(group.width), key=lambda i: (best[i], i))
    theta, through = (weights_of(context.model, group, part).cpu() for part in ("incoming", "through"))
    moved = [(_moved(c, order[rank % group.width], theta, through), e) for rank, (c, e) in enumerate(new)]
    return splits + moved


def _moved(candidate: Candidate, place: int, theta: Tensor, through: Tensor) -> Candidate:
    """The same new neurons beside another neuron."""
    new = [i for i, w in enumerate(candidate.weights) if w == 0]

    def rebased(displacements: Tensor | None, weights: Tensor) -> Tensor | None:
        if displacements is None:
            return None
        result = displacements.clone()
        result[new] += (weights[candidate.neuron] - weights[place]).to(result)
        return result

    return replace(
        candidate,
        neuron=place,
        displacements=rebased(candidate.displacements, theta),
        fixed=rebased(candidate.fixed, theta),
        through=rebased(candidate.through, through),
    )
