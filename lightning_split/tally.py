"""What is multiplied outside of layers, and what layers write, in one pass over a network.

A product of activations (the scores of attention, what they weigh) has no weights: its multiply-accumulates
(MACs) are the sizes of its free and summed axes, multiplied, and each neuron on one of these axes has its
share of them. The same holds for weights over positions, which are used once for every neuron that passes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_split.architecture import Counted, Index, Written
from lightning_split.constants import storage_key
from lightning_split.labels import BookKeeping, LabelMode, stored_once

__all__ = ["Tally"]

Mask = npt.NDArray[np.bool_]


class _Share(NamedTuple):
    """An axis, or several taken together, along which neurons lie."""

    size: int
    ids: Index
    counts: Index  # entries of each id


class _Count(NamedTuple):
    """A number of things, as a product of axes with neurons and a rest."""

    total: int
    shares: tuple[_Share, ...]

    def of(self, neuron: Index, made: Mask, samples: int) -> Counted:
        """The same per sample, in terms of neurons."""
        rest, axes = self.total, list[tuple[int, tuple[tuple[int, int], ...]]]()
        for share in self.shares:
            owners = np.append(neuron, -1)[share.ids]
            known = (owners >= 0) & made[owners]
            if known.any():
                unique, place = np.unique(owners[known], return_inverse=True)
                counts = np.bincount(place, share.counts[known]).astype(np.int64)
                common = math.gcd(share.size, *counts.tolist())  # samples along the axis, say
                size = share.size // common
                rest //= size
                axes.append((size, tuple(zip(unique.tolist(), (counts // common).tolist(), strict=True))))
        return Counted(rest / samples, tuple(axes))


class Tally:
    """Counts along with a :class:`~lightning_split.labels.LabelMode`.

    Args:
        samples: How many there are in the batch; everything is counted per sample.
    """

    def __init__(self, samples: int) -> None:
        self.paused = 0  # > 0 where the weights of a layer are used, which are counted by themselves
        self.attending = 0  # > 0 in a layer that also multiplies activations with each other
        self._samples = samples
        self._products: list[_Count] = []
        self._written: dict[str, list[tuple[_Count, int, int | None]]] = defaultdict(list)

    def follow(self, mode: LabelMode, func: Any, args: Sequence[Any], out: Any) -> None:
        """Count an operator, after it has run and labels have moved."""
        factors = None if self.paused else _FACTORS.get(func.overloadpacket)
        if factors is None or torch._C._current_graph_task_id() >= 0:  # or in a backward pass
            return
        raw = isinstance(out, Tensor) and any(
            storage_key(t) in mode.parameters for t in (args[1:3] if factors is _added else args[:2])
        )
        if raw and self.attending:
            return
        with BookKeeping():
            for total, cores in factors(mode, args, out):
                self._products.append(_Count(total, tuple(map(_share, _apart(cores)))))
        if raw and not mode.inside:
            self.wrote("", mode, out)

    def wrote(self, path: str, mode: LabelMode, output: Tensor) -> None:
        """Count what a layer, or a module with a raw matrix, has written.

        Args:
            path: The module.
            mode: Knows the labels of the output.
            output: What it wrote.
        """
        labels = mode.get(output)
        if labels is None:
            self._written[path].append((_Count(output.numel(), ()), output.element_size(), None))
            return
        with BookKeeping():
            core = stored_once(labels)
            along = [d - core.ndim for d, size in enumerate(core.shape) if size > 1]
            count = _Count(output.numel(), (_share(core),))
        self._written[path].append((count, output.element_size(), along[-1] if along else None))

    def products(self, neuron: Index, made: Mask) -> tuple[Counted, ...]:
        """MACs of all products; those that grow alike are one.

        Args:
            neuron: The neuron of each id.
            made: Whether a layer makes this neuron.
        """
        factors: dict[Any, float] = defaultdict(float)
        for count in self._products:
            found = count.of(neuron, made, self._samples)
            factors[found.axes] += found.factor
        return tuple(Counted(factor, axes) for axes, factor in factors.items())

    def written(self, neuron: Index, made: Mask) -> dict[str, tuple[Written, ...]]:
        """Values that each module writes, call by call."""
        return {
            path: tuple(Written(count.of(neuron, made, self._samples), each, d) for count, each, d in calls)
            for path, calls in self._written.items()
        }


def _share(core: Tensor) -> _Share:
    ids, counts = torch.unique(core, return_counts=True)
    return _Share(core.numel(), ids.numpy(), counts.numpy())


def _apart(cores: Iterable[Tensor]) -> list[Tensor]:
    """Labels of the factors, all laid out along the axes of the product; those on one axis are one."""
    found: list[Tensor] = []
    for core in cores:
        for k, other in enumerate(found):
            pairs = zip(reversed(core.shape), reversed(other.shape), strict=False)
            if any(m > 1 and n > 1 for m, n in pairs) or core.numel() == other.numel() == 1:
                found[k] = torch.where(other >= 0, other, core)
                break
        else:
            found.append(core)
    return found


Factors = Iterator[tuple[int, list[Tensor]]]  # number of MACs, and the labels of the factors


def _pair(mode: LabelMode, left: Tensor, right: Tensor) -> list[Tensor]:
    """Labels of ``(…, i, k)`` and ``(…, k, j)`` along the axes ``(…, i, k, j)``."""
    found = []
    for tensor, axis in ((left, -1), (right, -3)):
        labels = mode.get(tensor)
        if labels is not None:
            core = stored_once(labels)
            core = core.unsqueeze(-1) if axis == -3 and core.ndim == 1 else core
            found.append(core.unsqueeze(axis) if core.ndim >= -axis - 1 else core)
    return found


def _matmul(mode: LabelMode, args: Sequence[Any], out: Tensor) -> Factors:
    left, right = args[:2]
    yield out.numel() * left.shape[-1], _pair(mode, left, right)


def _added(mode: LabelMode, args: Sequence[Any], out: Tensor) -> Factors:
    yield from _matmul(mode, args[1:], out)


def _convolution(mode: LabelMode, args: Sequence[Any], out: Tensor) -> Factors:
    x, weight, transposed = args[0], args[1], args[6]
    labels = mode.get(x)
    cores = [] if labels is None else [stored_once(labels)]
    yield (x if transposed else out).numel() * math.prod(weight.shape[1:]), cores


def _attention(mode: LabelMode, args: Sequence[Any], out: Any) -> Factors:
    q, k, v = args[:3]
    rows = math.prod(q.shape[:-1]) * k.shape[-2]
    for channels, tensors in ((q.shape[-1], (q, k)), (v.shape[-1], (v,))):
        cores = []
        for t in tensors:
            labels = mode.get(t)
            if labels is not None:
                core = stored_once(labels)
                heads = core.shape[-3] if core.ndim > 2 else 1
                if 1 < heads < q.shape[-3]:  # several queries share a head
                    core = core.repeat_interleave(q.shape[-3] // heads, -3)
                cores.append(core.unsqueeze(-1) if t is q else core.transpose(-1, -2).unsqueeze(-3))
        yield rows * channels, cores


_ATEN = torch.ops.aten
_FACTORS: dict[Any, Callable[[LabelMode, Sequence[Any], Any], Factors]] = {
    **dict.fromkeys([_ATEN.mm, _ATEN.bmm, _ATEN.mv, _ATEN.dot], _matmul),
    **dict.fromkeys([_ATEN.addmm, _ATEN.baddbmm, _ATEN.addmv], _added),
    _ATEN.convolution: _convolution,
    **{
        getattr(_ATEN, f"_scaled_dot_product_{kind}"): _attention
        for kind in (
            *("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"),
            "fused_attention_overrideable",
        )
        if hasattr(_ATEN, f"_scaled_dot_product_{kind}")
    },
}
