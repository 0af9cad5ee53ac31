"""Baselines: copies of neurons, with and without a random displacement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_split.architecture import ChannelGroup
from lightning_split.context import GrowthContext
from lightning_split.growers.base import Grower, Proposal
from lightning_split.selection import Candidate
from lightning_split.splits import weights_of
from lightning_split.stepsize import StepSize, as_step_size

__all__ = ["Net2Net", "RandomSplit"]


@dataclass(frozen=True)
class RandomSplit(Grower):
    """Split neurons chosen at random in random directions: the baseline of splitting steepest descent.

    Two offspring of weight ½ go to θ ± ε·v with a random unit vector v. The gain that a strategy sees is a
    random number, so that it chooses neurons at random; the report's prediction is ε²/2 · (-vᵀSv).
    """

    def propose(self, context: GrowthContext, *, step_size: float | str | StepSize) -> Proposal:
        """One split per neuron; see :meth:`Grower.propose`. Costs one product with the splitting matrices."""
        drawn = list(_random_directions(context, step_size))
        vectors = {group.name: v for group, v, _, _ in drawn}
        product = context.ranks.mean_of(context.operator(context.batches).matvec(vectors))
        candidates = []
        for group, v, lengths, scores in drawn:
            index = (product[group.name] * v).sum(1).double().cpu()
            for neuron, (length, score) in enumerate(zip(lengths.tolist(), scores.tolist(), strict=True)):
                moved = length * v[neuron].cpu()
                candidates.append(
                    Candidate(
                        group=group.name,
                        neuron=neuron,
                        gain=score,
                        prediction=-float(index[neuron]) * length**2 / 2,
                        splitting_index=float(index[neuron]),
                        scheme="random",
                        weights=(0.5, 0.5),
                        displacements=torch.stack([moved, -moved]),
                    )
                )
        return Proposal(tuple(candidates))


@dataclass(frozen=True)
class Net2Net(Grower):
    """Copy neurons chosen at random, and divide their outgoing weights among the copies.

    The network computes what it computed, but for a little noise on the second copy, without which equal
    copies would stay equal.

    Args:
        noise: Length of the random displacement of the second copy, in step sizes; 0 for none.

    Raises:
        ValueError: If ``noise`` is negative or not finite.

    References:
        Chen, Goodfellow, Shlens (2016), Net2Net: Accelerating learning via knowledge transfer.
    """

    noise: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"Net2Net needs noise of at least 0, got {self.noise}.")

    def propose(self, context: GrowthContext, *, step_size: float | str | StepSize) -> Proposal:
        """Two copies of every neuron; see :meth:`Grower.propose`. Costs nothing."""
        candidates = []
        for group, v, lengths, scores in _random_directions(context, step_size):
            for neuron, (length, score) in enumerate(zip(lengths.tolist(), scores.tolist(), strict=True)):
                moved = self.noise * length * v[neuron].cpu()
                candidates.append(
                    Candidate(
                        group=group.name,
                        neuron=neuron,
                        gain=score,
                        prediction=0.0,
                        scheme="copy",
                        weights=(0.5, 0.5),
                        displacements=torch.stack([torch.zeros_like(moved), moved]),
                    )
                )
        return Proposal(tuple(candidates))


def _random_directions(
    context: GrowthContext, step_size: float | str | StepSize
) -> Iterator[tuple[ChannelGroup, Tensor, Tensor, Tensor]]:
    """For each group random unit vectors ``(N, dim)``, lengths and scores between 0 and 1, ``(N,)``."""
    generator = torch.Generator().manual_seed(context.seed)
    step = as_step_size(step_size)
    for group in context.arch.groups:
        theta = weights_of(context.model, group, "incoming")
        v = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        v = v / v.norm(dim=1, keepdim=True)
        scores = 1 - torch.rand(group.width, generator=generator, dtype=torch.float64)  # never 0
        yield group, v.to(theta if theta.dtype.itemsize >= 4 else theta.float()), step.lengths(theta), scores
