"""New neurons beside the old ones: random incoming weights, outgoing weights down the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_split.architecture import ChannelGroup
from lightning_split.context import GrowthContext
from lightning_split.growers.base import Draft, PredictingGrower
from lightning_split.growers.ghosts import Ghosts, Vectors, averaged
from lightning_split.selection import Candidate
from lightning_split.splits import weights_of
from lightning_split.stepsize import StepSize

__all__ = ["NewNeurons", "Newcomers", "NewcomersDraft", "downhill"]


@dataclass(frozen=True)
class Newcomers:
    """New neurons of every group: the i-th stands beside neuron i."""

    incoming: Vectors  # (M, dim)
    through: Vectors  # what channelwise layers keep of them
    outgoing: Vectors  # the step of their outgoing weights from zero
    gain: Vectors  # (M,) by how much the loss falls by that step, to first order


@dataclass(frozen=True)
class NewNeurons(PredictingGrower):
    """Add new neurons with random incoming weights.

    The incoming weights are normal, as large as those of the layer's neurons. The outgoing weights start at
    zero, so that the network computes what it computed, and make their first step at once: of length ε, down
    the gradient g. The loss falls by ε‖g‖ + O(ε²), which is the predicted gain.

    Firefly trains the incoming weights of its candidates by gradient descent; here the best of some draws is
    taken.

    Args:
        draws: Of so many random neurons beside each neuron the one of largest gain is offered. A draw costs
            a training step of a network twice as wide per batch.
        std: Standard deviation of the incoming weights; default the root mean square of those that the layer
            has, for each of its tensors.
        first_step: ``False`` leaves the outgoing weights at zero; the gain is then only what the first step
            would bring.

    Raises:
        ValueError: If ``draws`` is below 1 or ``std`` not positive.
    """

    draws: int = 8
    std: float | None = None
    first_step: bool = True

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"NewNeurons needs at least one draw, got {self.draws}.")
        if self.std is not None and not 0 < self.std < float("inf"):
            raise ValueError(f"NewNeurons needs a positive standard deviation, got {self.std}.")

    def draft(self, context: GrowthContext, step: StepSize) -> Draft:
        """One new neuron beside every neuron; see :meth:`PredictingGrower.draft`."""
        generator = torch.Generator().manual_seed(context.seed)
        best: Newcomers | None = None
        for _ in range(self.draws):
            incoming = {
                group.name: _random_weights(context, group, self.std, generator)
                for group in context.arch.groups
                if group.outgoing
            }
            found = downhill(context, incoming, step)
            best = found if best is None else _better(best, found)
        assert best is not None
        still = {name: torch.zeros_like(u) for name, u in best.outgoing.items()}
        built = None if self.first_step else replace(best, outgoing=still)
        return NewcomersDraft(context, best, "new neuron", built=built)


def downhill(context: GrowthContext, incoming: Vectors, step: StepSize) -> Newcomers:
    """Give new neurons a step of their outgoing weights down the gradient.

    Args:
        context: The network and its batches.
        incoming: Their incoming weights, the same on all processes.
        step: How long the step is.
    """
    ghosts = Ghosts(context, incoming)
    with ghosts.present():
        ghosts.calibrate(context.batches)
        through = ghosts.through()
        gradient = averaged(context, list(ghosts.outgoing_gradients(context.batches)))
    outgoing, gain = {}, {}
    for name, g in gradient.items():
        reference = weights_of(context.model, context.arch.group(name), "outgoing")
        length = step.lengths(reference)[: len(g)].to(g)
        norm = g.norm(dim=1)
        outgoing[name] = -length[:, None] * g / norm.clamp_min(torch.finfo(g.dtype).tiny)[:, None]
        gain[name] = length * norm
    return Newcomers(incoming, through, outgoing, gain)


class NewcomersDraft(Draft):
    """New neurons, to be measured again on fresh batches.

    Args:
        context: The network and its batches.
        found: The new neurons.
        scheme: What to call them.
        built: What is offered, if it is not what is judged: neurons that have not made their first step.
        growing: The part of the incoming weights that goes with the step size, for the groups where there is
            one; there the gain goes with the square of the step size.
        notes: Sentences for the report.
    """

    def __init__(
        self,
        context: GrowthContext,
        found: Newcomers,
        scheme: str,
        *,
        built: Newcomers | None = None,
        growing: Vectors | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.notes = notes
        self._context, self._found, self._scheme = context, found, scheme
        self._built, self._growing = built, growing or {}

    def measure(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """The gain of each on each batch; see :meth:`Draft.measure`."""
        found = self._found
        ghosts = Ghosts(self._context, found.incoming, found.through)
        with ghosts.present():
            gains = [
                {name: -(g * found.outgoing[name]).sum(1) for name, g in gradient.items()}
                for gradient in ghosts.outgoing_gradients(batches)
            ]
        stacked = {name: torch.stack([gain[name] for gain in gains]) for name in found.gain}
        return self._context.ranks.gather_of(stacked)

    def offers(self, samples: Mapping[str, Tensor] | None) -> list[tuple[Candidate, float]]:
        """All of them; see :meth:`Draft.offers`."""
        gains = self._found.gain
        if samples is None:
            samples = {name: gain[None] for name, gain in gains.items()}
        return [
            (candidate, float(gains[name][i]))
            for name, values in samples.items()
            for i, candidate in enumerate(self._candidates(name, values))
        ]

    def _candidates(self, name: str, values: Tensor) -> Iterator[Candidate]:
        """The new neurons of one group, judged by ``values`` (batches, M)."""
        group, made = self._context.arch.group(name), self._built or self._found
        theta, through = (weights_of(self._context.model, group, part) for part in ("incoming", "through"))
        mean, count = values.double().mean(0), len(values)
        error = values.double().std(0) / count**0.5 if count > 1 else torch.zeros_like(mean)
        for i, gain in enumerate(mean.tolist()):
            moved = _beside(made.incoming[name][i], theta[i])
            grows = name in self._growing
            yield Candidate(
                group=name,
                neuron=i,
                gain=gain,
                standard_error=float(error[i]),
                scheme=self._scheme,
                weights=(1.0, 0.0),
                displacements=moved,
                through=_beside(made.through[name][i], through[i]),
                outgoing=_beside(made.outgoing[name][i]),
                fixed=moved - _beside(self._growing[name][i]) if grows else moved,
                order=2 if grows else 1,
                prediction=None if self._built is None else 0.0,
            )


def _beside(new: Tensor, parent: Tensor | None = None) -> Tensor:
    """Displacements of the parent, which stays, and of the new neuron."""
    new = new.detach().cpu()
    row = new if parent is None else new - parent.to(new)
    return torch.stack([torch.zeros_like(row), row])


def _random_weights(
    context: GrowthContext, group: ChannelGroup, std: float | None, generator: torch.Generator
) -> Tensor:
    weights = weights_of(context.model, group, "incoming")
    parts, offset = [], 0
    for block in group.theta:
        part = weights[:, offset : offset + block.size].double()
        offset += block.size
        size = float(part.square().mean().sqrt()) if std is None else std
        parts.append(size * torch.randn(part.shape, generator=generator, dtype=torch.float64))
    new = torch.cat(parts, dim=1)
    if not bool(new.any()):
        new = torch.randn(new.shape, generator=generator, dtype=torch.float64) / group.dim**0.5
    return new.to(weights)


def _better(one: Newcomers, two: Newcomers) -> Newcomers:
    """Of two new neurons in the same place the one of larger gain."""
    parts = {}
    for part in ("incoming", "through", "outgoing", "gain"):
        first, second = getattr(one, part), getattr(two, part)
        parts[part] = {
            name: torch.where(
                (two.gain[name] > one.gain[name]).view(-1, *[1] * (first[name].ndim - 1)),
                second[name],
                first[name],
            )
            for name in first
        }
    return replace(one, **parts)
