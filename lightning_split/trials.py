"""Splits to try a network with: which neurons, into what, and how many at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture, ChannelGroup
from lightning_split.splits import Split, tensor_at

__all__ = ["all_haunted", "multiplied", "one_more", "one_of_each", "portions"]

_SAMPLE = 10_000  # of a tensor's entries, that tell their size
_LARGE_WEIGHTS, _FEW_USES, _PORTION = 1e7, 20, 0.9  # networks whose weights take most of the memory


def portions(model: nn.Module, arch: Architecture, macs: float) -> list[tuple[ChannelGroup, ...]]:
    """Groups that are tried together: all of them, but where a copy of all weights would be too much memory.

    That is so where activations take little of it. A pass is cheap there, and each portion needs one.
    """
    weights = sum(p.numel() for p in model.parameters())
    if weights < _LARGE_WEIGHTS or macs > _FEW_USES * weights:
        return [arch.groups]
    found: list[tuple[ChannelGroup, ...]] = []
    start, sizes = 0, dict[tuple[str, str], int]()
    for n, group in enumerate(arch.groups):
        blocks = (*group.theta, *group.through, *group.outgoing)
        mine = {(b.module, b.tensor): tensor_at(model, b).numel() for b in blocks}
        if start < n and sum((sizes | mine).values()) > _PORTION * weights:
            found.append(arch.groups[start:n])
            start, sizes = n, {}
        sizes |= mine
    return [*found, arch.groups[start:]]


def one_more(arch: Architecture) -> dict[str, list[Split]]:
    """A neuron in the middle of every group, into two; without values, for sizes alone.

    One more is the hardest test of them: the code may know that there are two, say, and still run with four.
    """
    still = torch.zeros(())
    return {
        group.name: [Split(group.name, (group.width - 1) // 2, (0.5, 0.5), still.expand(2, group.dim))]
        for group in arch.groups
    }


def one_of_each(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, list[Split]]:
    """A neuron in the middle of every group, into two copies and a ghost."""
    return {
        group.name: [
            Split(
                *(group.name, (group.width - 1) // 2, (2.0, -1.0, 0.0)),
                torch.cat([torch.zeros(2, group.dim), ghost]),
            )
        ]
        for group, ghost in _ghosts(model, groups, count=1)
    }


def all_haunted(model: nn.Module, arch: Architecture, part: int) -> dict[str, list[Split]]:
    """All neurons of every other group into themselves and a ghost that is far away."""
    return {
        group.name: [
            Split(group.name, i, (1.0, 0.0), torch.stack([torch.zeros(group.dim), 10 * ghost]))
            for i, ghost in enumerate(ghosts)
        ]
        for group, ghosts in _ghosts(model, arch.groups[part::2])
    }


def multiplied(arch: Architecture) -> dict[str, list[Split]]:
    """All neurons of every group, each group by another factor than the next few."""
    found = {}
    for number, group in enumerate(arch.groups):
        m = 2 + number % 5
        still = torch.zeros(()).expand(m, group.dim)
        weights = (1 / m,) * m
        found[group.name] = [Split(group.name, i, weights, still) for i in range(group.width)]
    return found


def _ghosts(
    model: nn.Module, groups: Sequence[ChannelGroup], count: int | None = None
) -> Iterator[tuple[ChannelGroup, Tensor]]:
    """Random displacements of the size of the weights, ``(count or width, dim)`` for each group."""
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        parts = []
        for block in group.theta:
            weight = model.get_submodule(block.module).get_parameter(block.tensor).detach()
            some = weight.reshape(-1)[:: 1 + weight.numel() // _SAMPLE]
            size = float(some.abs().mean())
            size = size + 1e-2 if math.isfinite(size) else 1.0
            parts.append(size * torch.randn(count or group.width, block.size, generator=generator))
        yield group, torch.cat(parts, dim=1)
