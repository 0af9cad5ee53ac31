"""How tensors become wider: pure functions of index arrays, which know nothing of networks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_split.architecture import Index, PortMap
from lightning_split.layers import Block

__all__ = [
    "AxisGrowth",
    "AxisMap",
    "Offspring",
    "Replacement",
    "as_parameter",
    "grown_axis",
    "grown_port",
    "same_format",
    "widened",
]

_PIECE = 2**18  # elements that are copied twice at a time, where several axes grow
_FEW_RUNS = 64  # stretches of a tensor that are copied one by one


@dataclass(frozen=True, eq=False)
class AxisMap:
    """How one axis of a tensor grew."""

    index: Tensor  # (new size,) int64: the old position that each new position copies
    scale: Tensor  # (new size,) float64: gradient of the new entry over that of the old one; 0: starts anew


class Replacement(NamedTuple):
    """The parameter that stands where another stood, and how its axes grew."""

    new: nn.Parameter
    maps: dict[int, AxisMap]
    anew: bool = False  # its values have nothing to do with those before, nor has an optimizer's state


@dataclass(frozen=True, eq=False)
class Offspring:
    """All offspring of all splits, one after the other; the last entries stand for what was not split."""

    number: Index  # (ids + 1,) number of the split of each neuron id, -1 for none; [-1] is "no neuron"
    weights: Index  # offspring weights
    count: Index  # (splits + 1,) how many each split has
    first: Index  # (splits + 1,) where the offspring of each split begin


@dataclass(frozen=True, eq=False)
class AxisGrowth:
    """The new layout of one port, or of one axis of a tensor."""

    index: Tensor  # (new,) old position
    weight: Tensor  # (new,) offspring weight w_i, 1 where nothing was split
    split: Tensor  # (new,) number of the split that made the entry, -1 where nothing was split
    ordinal: Tensor  # (new,) which of its offspring
    reads: Tensor  # (new,) whether it is an outgoing weight, which is multiplied by w_i
    lift: Tensor  # (new,) what outgoing weights are multiplied by besides, 1 elsewhere

    @property
    def factor(self) -> Tensor:
        """``(new,)``, what the entries are multiplied by."""
        return torch.where(self.reads, self.weight, 1.0) * self.lift

    def as_map(self) -> AxisMap:
        """Index and scale; on the side that reads, gradients are those of the parent, unless it has none."""
        fresh = (self.split >= 0) & (self.weight == 0)
        reading = torch.where(fresh, 0.0, 1 / self.lift)
        return AxisMap(self.index, torch.where(self.reads, reading, self.weight))

    @property
    def originals(self) -> Tensor:
        """For each old position the first new one."""
        return (self.ordinal == 0).nonzero().flatten()[self.index[self.ordinal == 0].argsort()]


def grown_port(port: PortMap, offspring: Offspring, *, reads: bool = False) -> AxisGrowth:
    """New layout of one port: each run of a split neuron is repeated as a block per offspring.

    Args:
        port: What lies on it.
        offspring: What becomes of it.
        reads: Whether all its entries are outgoing weights.
    """
    neuron, run = port.neuron, port.run
    starts = np.flatnonzero(np.r_[True, (neuron[1:] != neuron[:-1]) | (run[1:] != run[:-1])])
    lengths = np.diff(np.r_[starts, len(neuron)])
    number = offspring.number[neuron[starts]]
    counts = offspring.count[number]
    # One entry per block, then one per position: run, and position in it, counted from its first.
    block = np.repeat(np.arange(len(starts)), counts)
    ordinal = _count(counts)
    length = lengths[block]
    index = np.repeat(starts[block], length) + _count(length)
    split = number[block]
    weights = np.where(split >= 0, offspring.weights[offspring.first[split] + ordinal], 1.0)
    parts = (np.repeat(part, length) for part in (weights, split, ordinal))
    outgoing, lift = np.full(len(index), reads), np.ones(len(index))
    if port.reads is not None:
        outgoing = port.reads[index]
        lift[outgoing] = (outgoing.sum() / port.reads.sum()) ** (port.power or 0.0)
    return AxisGrowth(torch.from_numpy(index), *map(torch.from_numpy, (*parts, outgoing, lift)))


def grown_axis(growth: Mapping[str, AxisGrowth], blocks: Sequence[Block]) -> AxisGrowth:
    """New layout of one axis of a tensor: its blocks, each as its port grows."""
    parts = [_stretched(growth.get(block.port), block) for block in blocks]
    if len(parts) == 1:
        return parts[0]
    return AxisGrowth(
        *(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(AxisGrowth))
    )


def _stretched(growth: AxisGrowth | None, block: Block) -> AxisGrowth:
    """The growth of a port, entry by entry of the block of a tensor's axis that belongs to it."""
    if growth is None:
        index, ones = torch.arange(block.size), torch.ones(block.size, dtype=torch.float64)
        growth = AxisGrowth(index, ones, torch.full_like(index, -1), index * 0, ones == 0, ones)
    m = block.multiple
    if m == 1 and block.start == 0:
        return growth
    index = block.start + (growth.index[:, None] * m + torch.arange(m)).flatten()
    rest = (getattr(growth, f.name).repeat_interleave(m) for f in dataclasses.fields(AxisGrowth)[1:])
    return AxisGrowth(index, *rest)


def _count(lengths: Index) -> Index:
    """``0 … n - 1`` for each of the lengths, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def widened(tensor: Tensor, axes: Mapping[int, AxisGrowth]) -> Tensor:
    """The tensor with entries repeated along several axes, and multiplied by w_i where they are outgoing."""
    new = _selected(tensor, {axis: g.index for axis, g in axes.items()})
    for axis, growth in axes.items():
        if bool(growth.reads.any()):
            scale_(new, growth.factor, axis)
    return same_format(new, tensor)


def _selected(tensor: Tensor, picks: Mapping[int, Tensor]) -> Tensor:
    """Entries picked along several axes, without a copy in between that is as large as the result."""
    shape = [len(picks[d]) if d in picks else size for d, size in enumerate(tensor.shape)]
    runs = [(axis, _runs(index)) for axis, index in picks.items()]
    if math.prod(len(found) for _, found in runs) <= _FEW_RUNS:  # as where few neurons are split
        new = tensor.new_empty(shape)
        _copy_runs(new, tensor, runs)
        return new
    (axis, index), *rest = ((a, i.to(tensor.device)) for a, i in picks.items())
    if not rest:
        return tensor.index_select(axis, index)
    new, start = tensor.new_empty(shape), 0
    for part in index.chunk(1 + new.numel() // _PIECE):
        piece = tensor.index_select(axis, part)
        for other, where in rest:
            piece = piece.index_select(other, where)
        new.narrow(axis, start, len(part)).copy_(piece)
        start += len(part)
    return new


def _runs(index: Tensor) -> list[tuple[int, int]]:
    """The stretches along which an index goes up by one: where each begins, and its length."""
    cuts = [0, *((index.diff() != 1).nonzero().flatten() + 1).tolist(), len(index)]
    return [(int(index[start]), end - start) for start, end in itertools.pairwise(cuts) if end > start]


def _copy_runs(new: Tensor, old: Tensor, runs: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> None:
    """Copy stretch by stretch, which is several times faster than to look up each entry."""
    if not runs:
        new.copy_(old)
        return
    (axis, found), *rest = runs
    start = 0
    for first, length in found:
        _copy_runs(new.narrow(axis, start, length), old.narrow(axis, first, length), rest)
        start += length


def scale_(tensor: Tensor, factor: Tensor, axis: int) -> Tensor:
    """Multiply in place along one axis."""
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return tensor.mul_(factor.to(tensor).view(shape))  # cast first: float64 factors would promote bf16


def same_format(new: Tensor, old: Tensor) -> Tensor:
    """The tensor with its channels last if another one has them there, and contiguous."""
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        fits = old.ndim == (4 if memory_format is torch.channels_last else 5)
        if fits and old.is_contiguous(memory_format=memory_format) and not old.is_contiguous():
            return new.contiguous(memory_format=memory_format)
    return new.contiguous()


def as_parameter(new: Tensor, old: nn.Parameter) -> nn.Parameter:
    """A parameter that takes the place of another: same flags, attributes and hooks."""
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    vars(parameter).update(vars(old))
    for hook in (old._backward_hooks or {}).values():
        parameter.register_hook(hook)
    for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
        parameter.register_post_accumulate_grad_hook(hook)
    return parameter
