"""Measured latency as a cost: the layers are timed at a few widths on the user's device."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_split.architecture import Architecture
from lightning_split.checkpoint import fit_to_state_dict
from lightning_split.context import GrowthContext
from lightning_split.costs import Cost
from lightning_split.counting import LayerCall, RawProduct, layer_calls, passing, port_axis, raw_products
from lightning_split.interrupts import give_way
from lightning_split.layers import Port, layer_tensors, port_kind, port_sizes, rule_for
from lightning_split.measuring import batch_size
from lightning_split.pricing import Axis, Counts, Prices

__all__ = ["MeasuredLatency"]

Values = npt.NDArray[np.float64]
# Latency is a staircase in the width, and a stair is flat: one more neuron is never priced below this share
# of what it costs on average, so that no neuron is free.
_LEAST_SLOPE = 0.05
_ACROSS = "across"  # stands for the neurons of others that pass through a layer, such as one over positions


@dataclass(frozen=True)
class MeasuredLatency(Cost):
    """Milliseconds of a forward pass over a batch in layers and raw matrices, as measured on the device.

    Each layer that grows is timed by itself on inputs of the sizes that it really gets, at its present
    width and at some larger ones in every direction in which it can grow; between them the time is
    interpolated. A layer over positions is timed with more neurons passing. Layers of equal sizes are timed
    once. A layer that cannot be run by itself at another width is taken to cost in proportion to its weights.
    Pointwise functions and products outside of layers (raw matrices, the scores of attention) are not timed:
    what they take depends on how the backend fuses them. Only the first process measures; the others are
    told.

    What was measured is kept in this object and in the callback's checkpoints. Sizes that a resumed run is
    the first to meet are timed anew, and no two measurements agree: with this cost alone a resumed run may
    decide otherwise than the uninterrupted one.

    Args:
        factors: Widths at which layers are timed, in multiples of the present one; the first is 1.
        repeats: Runs of which the median counts, after a third as many to warm up.
        backward: Time the backward pass too, for the latency of training.

    Raises:
        ValueError: If an argument is out of range.

    Cost: for each kind of layer, ``len(factors)`` widths to the power of the directions in which it grows,
    times ``repeats`` runs of that layer.
    """

    factors: tuple[float, ...] = (1.0, 1.5, 2.0)
    repeats: int = 9
    backward: bool = False
    _table: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    unit = "ms"

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "factors", tuple(map(float, self.factors)))
        rising = all(a < b for a, b in itertools.pairwise(self.factors))
        if len(self.factors) < 2 or self.factors[0] != 1.0 or not rising:
            raise ValueError(
                "MeasuredLatency needs rising factors of which the first is 1, such as (1, 1.5, 2), got "
                f"{self.factors!r}."
            )
        if self.repeats < 1:
            raise ValueError(f"MeasuredLatency needs repeats of at least 1, got {self.repeats!r}.")

    def price(self, context: GrowthContext) -> Prices:
        """See :meth:`Cost.price`."""
        number, calls = Counter[str](), list[_Timed]()
        for call in layer_calls(context):  # on every process alike
            calls.append(_Call(context.arch, call, number[call.path], self))
            number[call.path] += 1
        samples = batch_size(context.batches[0])
        calls += [_Product(p, samples, self) for p in raw_products(context.model, context.arch)]
        found: tuple[Prices, dict[str, list[float]]] | None = None
        if context.ranks.is_first:
            missing = {call.key: call for call in reversed(calls) if call.key not in self._table}
            measured = {key: call.measured() for key, call in missing.items()}
            terms = [call.term((self._table | measured)[call.key]) for call in calls]
            total = sum(float(term.at({})) for term in terms)
            growing = tuple(term for term in terms if any(axis.growth for axis in term.axes))
            found = Prices(total, {}, growing, "ms"), measured
        agreed = context.ranks.agree(found)
        assert agreed is not None
        prices, measured = agreed
        self._table.update(measured)
        return prices

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Cost.state_dict`."""
        return {"latency": {key: list(times) for key, times in self._table.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Cost.load_state_dict`."""
        self._table.update({key: list(times) for key, times in state.get("latency", {}).items()})


@dataclass(frozen=True)
class _Lookup:
    """Time of a layer as a function of its sizes, interpolated in a grid of measurements."""

    axes: tuple[Axis, ...]
    grid: tuple[tuple[float, ...], ...]  # sizes along each axis
    times: Any  # (len(grid[0]), len(grid[1]), …)

    @cached_property
    def _interpolated(self) -> RegularGridInterpolator:
        return RegularGridInterpolator(self.grid, self.times)

    def at(self, counts: Counts) -> Values:
        """The time after a growth."""
        if not self.axes:
            return np.asarray(self.times)
        sizes = np.broadcast_arrays(*(axis.at(counts) for axis in self.axes))
        # Beyond the grid in proportion: planes through its last cells may fall again.
        inside = [np.minimum(size, points[-1]) for size, points in zip(sizes, self.grid, strict=True)]
        beyond = math.prod(size / clipped for size, clipped in zip(sizes, inside, strict=True))
        times = np.asarray(self._interpolated(np.stack(inside, axis=-1))).reshape(sizes[0].shape)
        return np.asarray(times * beyond)


class _Timed(ABC):
    """Something that is timed at several sizes, and the name under which the times are kept."""

    def __init__(self, cost: MeasuredLatency, axes: dict[Port, Axis], what: Sequence[Any]) -> None:
        self.cost = cost
        self.axes = axes  # along which it grows
        # What has one key takes equally long: device, kind, attributes, shapes, and how it is timed.
        self.key = "; ".join(map(str, (*what, [*axes], (cost.factors, cost.repeats, cost.backward))))

    @abstractmethod
    def _prepared(self, sizes: Mapping[Port, int]) -> tuple[Callable[..., Any], Any, Any]:
        """What runs at these sizes, and with which arguments."""

    @abstractmethod
    def _macs(self, sizes: Mapping[Port, int]) -> float:
        """What the time is in proportion to if it cannot be run, in any unit."""

    @property
    def grid(self) -> tuple[tuple[float, ...], ...]:
        """Sizes at which it is timed, along each axis on which it grows."""
        return tuple(
            tuple(
                float(max(axis.size + number, round(axis.size * factor)))
                for number, factor in enumerate(self.cost.factors)
            )
            for axis in self.axes.values()
        )

    def measured(self) -> list[float]:
        """Milliseconds at every point of the grid, the last axis running fastest."""
        points = [
            dict(zip(self.axes, map(int, point), strict=True)) for point in itertools.product(*self.grid)
        ]
        first = self._timed({})
        try:
            return [first, *map(self._timed, points[1:])]
        except Exception:  # the layer needs something that only its network gives it
            return [first * self._macs(p) / max(1.0, self._macs(points[0])) for p in points]

    def term(self, times: Sequence[float]) -> _Lookup:
        """The lookup, made to rise with every size."""
        grid = self.grid
        table = np.array(times, dtype=np.float64).reshape([len(g) for g in grid])
        for axis, sizes in enumerate(grid):
            start = np.take(table, [0], axis)
            table = np.maximum.accumulate(table, axis)
            shape = [-1 if d == axis else 1 for d in range(len(grid))]
            grown = np.array(sizes).reshape(shape) / sizes[0] - 1.0
            table = np.maximum(table, start * (1.0 + _LEAST_SLOPE * grown))
        return _Lookup(tuple(self.axes.values()), grid, table)

    def _timed(self, sizes: Mapping[Port, int]) -> float:
        """Median milliseconds at some sizes."""
        give_way()
        function, args, kwargs = self._prepared(sizes)
        times = []
        with torch.enable_grad() if self.cost.backward else torch.no_grad():
            for run in range(self.cost.repeats + (self.cost.repeats + 2) // 3):
                with _stopwatch(args) as elapsed:
                    output = function(*args, **kwargs)
                    if self.cost.backward:
                        heads = [t.sum() for t in _tensors(output) if t.requires_grad]
                        if heads:
                            torch.autograd.backward(heads)
                if run >= (self.cost.repeats + 2) // 3:
                    times.append(elapsed[0])
        return statistics.median(times)


class _Product(_Timed):
    """A raw matrix, timed as one matrix product of as many multiply-accumulates."""

    def __init__(self, found: RawProduct, samples: int, cost: MeasuredLatency) -> None:
        tensor, self.made = found.tensor, found.made
        self.tensor, self.rows = tensor, max(1, round(found.uses * samples))
        axes = {str(axis): size for axis, size in enumerate(found.sizes) if size.growth}
        what = _device_name(tensor), "raw", tuple(tensor.shape), tensor.dtype, self.rows, self.made
        super().__init__(cost, axes, what)

    def _sizes(self, sizes: Mapping[Port, int]) -> tuple[int, int]:
        """What is summed, and what is made."""
        shape = [sizes.get(str(axis), size) for axis, size in enumerate(self.tensor.shape)]
        made = 1 if self.made is None else shape.pop(self.made)
        return math.prod(shape), made

    def _prepared(self, sizes: Mapping[Port, int]) -> tuple[Callable[..., Any], Any, Any]:
        summed, made = self._sizes(sizes)
        shapes = (self.rows, summed), (summed, made)
        args = [self.tensor.new_full(s, 0.5).requires_grad_(self.cost.backward) for s in shapes]
        return torch.matmul, args, {}

    def _macs(self, sizes: Mapping[Port, int]) -> float:
        return float(math.prod(self._sizes(sizes)))


class _Call(_Timed):
    """One call of a layer."""

    def __init__(self, arch: Architecture, call: LayerCall, number: int, cost: MeasuredLatency) -> None:
        self.call, layer = call, call.layer
        self.sizes = port_sizes(layer)
        found = {
            port: port_axis(arch, call.path, port, size)
            for port, size in self.sizes.items()
            if (call.path, port) in arch.ports
        }
        axes: dict[Port, Axis] = {port: axis for port, axis in found.items() if axis.growth}
        self.along: int | None = None  # axis of its input that the neurons of others lengthen
        if not axes:
            axes = self._crossed(*passing(arch, call.path, number))
        given = _tensors((call.args, call.kwargs))
        what = (
            sorted({_device_name(t) for t in [*layer.parameters(), *given]}),
            (type(layer).__name__, layer.extra_repr()),
            [f"{n}{tuple(t.shape)}{t.dtype}" for n, (t, _) in layer_tensors(layer).items()],
            [f"{tuple(t.shape)}{t.dtype}" for t in given],
            self.along,
        )
        super().__init__(cost, axes, what)

    def _crossed(self, along: int | None, share: Axis) -> dict[Port, Axis]:
        """The neurons of others that pass are a direction in which the time of the layer grows."""
        x = next(iter(_tensors((self.call.args, self.call.kwargs))), None)
        if not share.growth or x is None or not x.ndim:
            return {}
        self.along = next((d for d in range(x.ndim) if x.shape[d] == 1), 0) if along is None else along
        size = x.shape[self.along]
        return {_ACROSS: Axis(float(size), tuple((g, each * size) for g, each in share.growth))}

    def _shapes(self, sizes: Mapping[Port, int]) -> dict[str, list[int]]:
        """Shapes of the layer's tensors at other sizes."""
        sizes = self.sizes | dict(sizes)
        shapes = {}
        for name, (tensor, axes) in layer_tensors(self.call.layer).items():
            shapes[name] = list(tensor.shape)
            for axis, blocks in axes.items():
                shapes[name][axis] = sum(sizes[b.port] * b.multiple for b in blocks)
        return shapes

    def _macs(self, sizes: Mapping[Port, int]) -> float:
        return float(sum(map(math.prod, self._shapes(sizes).values())) * sizes.get(_ACROSS, 1))

    def _resized(self, sizes: Mapping[Port, int]) -> nn.Module:
        """A copy of the layer at other sizes, with weights that are ordinary numbers."""
        layer = deepcopy(self.call.layer).eval()
        if sizes:
            shapes = self._shapes(sizes)
            fit_to_state_dict(layer, {n: torch.empty(shape, device="meta") for n, shape in shapes.items()})
            if self._shapes(sizes) != {n: list(t.shape) for n, (t, _) in layer_tensors(layer).items()}:
                raise ValueError("the layer has no such sizes")
            with torch.no_grad():
                for tensor, _ in layer_tensors(layer).values():
                    tensor.fill_(0.5)
        return layer

    def _prepared(self, sizes: Mapping[Port, int]) -> tuple[Callable[..., Any], Any, Any]:
        return self._resized(sizes), *self._inputs(sizes)

    def _inputs(self, sizes: Mapping[Port, int]) -> tuple[Any, Any]:
        """The inputs of the call; where the layer reads more neurons, they are repeated."""
        rule = rule_for(self.call.layer)
        reads = [port for port in self.sizes if port_kind(port) in ("in", "through")]
        old = sum(self.sizes[port] for port in reads)
        new = sum(sizes.get(port, self.sizes[port]) for port in reads)
        assert rule is not None

        def longer(x: Tensor, axis: int, length: int) -> Tensor:
            return x.index_select(axis, torch.arange(length, device=x.device) % x.shape[axis])

        def grown(x: Tensor) -> Tensor:
            if self.along is not None and x.ndim >= -self.along:
                x = longer(x, self.along, sizes.get(_ACROSS, x.shape[self.along]))
            axis = rule.neuron_axis(self.call.layer, x) if x.ndim > 1 and x.is_floating_point() else None
            if axis is not None and new != old and old and x.shape[axis] % old == 0:
                x = longer(x, axis, x.shape[axis] // old * new)
            return x.detach().requires_grad_(self.cost.backward and x.is_floating_point())

        args, kwargs = tree_map_only(Tensor, grown, (self.call.args, self.call.kwargs))
        return args, kwargs


@contextmanager
def _stopwatch(args: Any) -> Iterator[list[float]]:
    """Milliseconds of the block, put into the list; waits for the accelerator."""
    elapsed: list[float] = []
    devices = {t.device for t in _tensors(args) if t.device.type not in ("cpu", "meta")}

    def wait() -> None:
        for device in devices:
            torch.accelerator.synchronize(device)

    wait()
    start = time.perf_counter()
    yield elapsed
    wait()
    elapsed.append(1e3 * (time.perf_counter() - start))


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, value)
    return found


def _device_name(tensor: Tensor) -> str:
    device = tensor.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
