"""Splits: a neuron, the offspring that it becomes, and where their weights go."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture, ChannelGroup, ThetaBlock

__all__ = ["Part", "Split", "blocks_of", "check_splits", "weights_of"]

Part = Literal["incoming", "through", "outgoing"]
PARTS: tuple[Part, ...] = ("incoming", "through", "outgoing")


@dataclass(frozen=True)
class Split:
    """One neuron and the offspring that it becomes.

    The neuron θ is replaced by ``m`` offspring θ + δ_i whose outgoing weights are those of the neuron times
    w_i (S2D, Eq. 2). With Σ w_i = 1 and δ_i = 0 the network computes what it computed.

    An offspring of weight zero is a *new neuron*: it takes nothing over from its parent, which only says
    where it stands. It has no ancestors in the lineage, and its optimizer state starts at zero.

    Args:
        group: Name of the channel group.
        neuron: Index of the neuron within the group.
        weights: w, ``(m,)``, sums to 1.
        displacements: δ, ``(m, dim)``, step size included, laid out as ``ChannelGroup.theta``.
        through: The same for what channelwise layers keep of the neuron (BatchNorm's scale and statistics),
            laid out as ``ChannelGroup.through``; ``None`` for zeros.
        outgoing: What is added to the outgoing weights after they were multiplied by w_i, laid out as
            ``ChannelGroup.outgoing``; ``None`` for zeros.
    """

    group: str
    neuron: int
    weights: tuple[float, ...]
    displacements: Tensor
    through: Tensor | None = None
    outgoing: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.group, ChannelGroup):
            object.__setattr__(self, "group", self.group.name)

    @property
    def num_new(self) -> int:
        """How many of the offspring are new neurons."""
        return sum(w == 0 for w in self.weights)

    def is_like(self, other: Split) -> bool:
        """Whether it is the same split of another neuron, made of the very same objects."""
        return (
            self.displacements is other.displacements
            and self.weights is other.weights
            and self.through is other.through
            and self.outgoing is other.outgoing
        )

    def part(self, part: Part) -> Tensor | None:
        """The displacement of one part of the offspring's weights."""
        return {"incoming": self.displacements, "through": self.through, "outgoing": self.outgoing}[part]


def blocks_of(group: ChannelGroup, part: Part) -> tuple[ThetaBlock, ...]:
    """Where the neurons' weights of one part are, in order."""
    return {"incoming": group.theta, "through": group.through, "outgoing": group.outgoing}[part]


def weights_of(model: nn.Module, group: ChannelGroup, part: Part) -> Tensor:
    """The neurons' weights of one part, ``(N, length of the part)``, detached."""
    parts = []
    for block in blocks_of(group, part):
        rows = torch.from_numpy(block.rows.reshape(-1))
        tensor = tensor_at(model, block).detach()
        found = tensor.movedim(block.axis, 0)[rows.to(tensor.device)]
        parts.append(found.reshape(group.width, block.size))
    return torch.cat(parts, dim=1) if parts else torch.zeros(group.width, 0)


def tensor_at(model: nn.Module, block: ThetaBlock) -> Tensor:
    """The tensor that a block lies in."""
    layer = model.get_submodule(block.module)
    tensor: Tensor | None = layer._parameters.get(block.tensor)
    tensor = layer._buffers.get(block.tensor) if tensor is None else tensor
    assert tensor is not None
    return tensor


def check_splits(arch: Architecture, splits: Sequence[Split], *, values: bool) -> None:
    """Refuse splits that do not fit the architecture, with a sentence.

    Raises:
        ValueError: If one does not fit.
    """
    of_group: dict[str, list[Split]] = defaultdict(list)
    for split in splits:
        of_group[split.group].append(split)
    for name, mine in of_group.items():
        group: ChannelGroup = _known_group(arch, name)
        lengths = {part: sum(block.size for block in blocks_of(group, part)) for part in PARTS}
        seen: set[int] = set()
        last: Split | None = None
        for split in mine:
            if not 0 <= split.neuron < group.width:
                raise ValueError(f"{_told(split)} is out of range: the group has {group.width} neurons.")
            if split.neuron in seen:
                raise ValueError(f"{_told(split)} occurs twice; give one split with all its offspring.")
            seen.add(split.neuron)
            if last is None or not split.is_like(last):
                _check_offspring(split, lengths, values=values)
            last = split


def _check_offspring(split: Split, lengths: Mapping[Part, int], *, values: bool) -> None:
    m, shape, dim = len(split.weights), tuple(split.displacements.shape), lengths["incoming"]
    if m < 2 or shape != (m, dim):
        raise ValueError(
            f"{_told(split)} has {m} offspring weights and displacements of shape {shape}; it "
            f"needs at least two weights and displacements of shape (number of weights, {dim})."
        )
    for part in PARTS[1:]:
        moved, length = split.part(part), lengths[part]
        if moved is not None and tuple(moved.shape) != (m, length):
            raise ValueError(
                f"{_told(split)} has {part} displacements of shape {tuple(moved.shape)}; they need "
                f"shape ({m}, {length})."
            )
    total = math.fsum(split.weights)
    if not math.isfinite(total) or abs(total - 1) > 1e-6:
        raise ValueError(
            f"{_told(split)} has offspring weights that sum to {total}; they must sum to 1, or the network's "
            "function would jump."
        )
    if values and not _finite(split.part(part) for part in PARTS):
        raise ValueError(f"{_told(split)} has displacements that are not finite.")


def _told(split: Split) -> str:
    return f"The split of neuron {split.neuron} of '{split.group}'"


def _finite(tensors: Iterable[Tensor | None]) -> bool:
    return all(t is None or bool(torch.isfinite(t).all()) for t in tensors)


def _known_group(arch: Architecture, name: str) -> ChannelGroup:
    try:
        return arch.group(name)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
