"""Counting a network: its tensors, products and outputs, as functions of the widths of its groups."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from lightning_split.architecture import Architecture, Counted, PortMap
from lightning_split.context import GrowthContext
from lightning_split.effective import stored_sizes
from lightning_split.layers import Block, Port, layer_tensors, port_kind, rule_for
from lightning_split.loose import growing_tensors
from lightning_split.measuring import undisturbed
from lightning_split.pricing import Axis, Prices, Product
from lightning_split.surgery import Surgery

__all__ = [
    "LayerCall",
    "NetworkCost",
    "layer_calls",
    "macs",
    "network_cost",
    "outputs",
    "params",
    "passing",
    "port_axis",
    "priced",
    "raw_products",
    "weights",
]


class NetworkCost(NamedTuple):
    """Size of a whole network."""

    params: int  # trainable and frozen parameters
    macs: float  # multiply-accumulates per sample


def network_cost(model: nn.Module, arch: Architecture, surgery: Surgery | None = None) -> NetworkCost:
    """Parameters and MACs of a network, now or as it will be after a prepared surgery.

    MACs are those of matrix products and convolutions, with weights and of activations with each other, at
    the sizes of the traced batch, per sample.
    """
    after: Mapping[Tensor, Tensor] = {}
    more = Counter[str]()
    if surgery is not None:
        after = {old: found.new for old, found in surgery.replaced.items()}
        for split in surgery.splits:
            more[split.group] += len(split.weights) - 1
    numbers = sum(_stored(p, after.get(p, p).shape) for p in model.parameters())
    prices = macs(model, arch)
    return NetworkCost(numbers, prices.total + prices.added(more))


def priced(model: nn.Module, arch: Architecture) -> tuple[Architecture, float]:
    """The architecture with what one more neuron of each group adds, and the network's MACs per sample."""
    found = list(weights(model, arch))
    numbers, products = params(model, arch, found), macs(model, arch, found)
    groups = (
        dataclasses.replace(g, params=round(numbers.alone(g.name)), macs=products.alone(g.name))
        for g in arch.groups
    )
    return dataclasses.replace(arch, groups=tuple(groups)), products.total


def params(model: nn.Module, arch: Architecture, found: Iterable[WeightSize] | None = None) -> Prices:
    """Parameters, frozen ones included; a tensor that several layers share counts once.

    Args:
        model: The network.
        arch: What tracing found.
        found: Its :func:`weights`, if they are known.
    """
    counted = {id(p): _stored(p, p.shape) for p in model.parameters()}
    rest, terms = sum(counted.values()), list[Product]()
    for tensor, size, _ in weights(model, arch) if found is None else found:
        number = counted.pop(id(tensor), None)
        if number is not None:
            several = stored_sizes(tensor)
            if several is None:
                terms.append(size)
            else:
                terms += [Product(float(times), tuple(size.axes[a] for a in axes)) for times, axes in several]
            rest -= number
    return Prices.of(terms, float(rest), "params")


def _stored(parameter: Tensor, shape: Sequence[int]) -> int:
    """How many numbers the model stores for a parameter of this shape."""
    several = stored_sizes(parameter)
    if several is None:
        return math.prod(shape)
    return sum(rest * math.prod(shape[a] for a in axes) for rest, axes in several)


def macs(model: nn.Module, arch: Architecture, found: Iterable[WeightSize] | None = None) -> Prices:
    """Multiply-accumulates per sample; the arguments are those of :func:`params`."""
    groups = _Groups(arch)
    terms = [term for _, _, term in (weights(model, arch) if found is None else found) if term is not None]
    return Prices.of(terms + [groups.product(count) for count in arch.products], unit="macs")


class WeightSize(NamedTuple):
    """A tensor of a layer."""

    tensor: Tensor
    size: Product  # its number of elements
    macs: Product | None  # in which its entries take part, for one sample


def weights(model: nn.Module, arch: Architecture) -> Iterator[WeightSize]:
    """Every tensor with an axis along neurons, and how it grows; one that sits at two places comes twice."""
    groups = _Groups(arch)
    known: dict[str, set[Port]] = defaultdict(set)
    for owner, port in arch.ports:
        known[owner].add(port)
    for path in dict.fromkeys(
        path for path, _ in [*arch.ports, *arch.multiplied, *((p, "") for p in arch.uses)]
    ):
        layer = model.get_submodule(path)
        ruled = layer_tensors(layer)
        for name, (tensor, axes) in growing_tensors(layer, known[path]).items():
            if not axes and (path, name) not in arch.multiplied:
                continue
            sizes = []
            for axis, length in enumerate(tensor.shape):
                sizes.append(groups.along(arch, path, axes.get(axis, ()), length))
            macs = None
            if name not in ruled:
                macs = Product(arch.multiplied.get((path, name), 0.0), tuple(sizes))
            elif tensor.ndim > 1 and any((path, b.port) in arch.made for b in axes.get(0, ())):
                macs = Product(1.0, (groups.used(arch, path, axes[0]), *sizes[1:]))
            elif tensor.ndim > 1:
                uses = arch.uses.get(path, 0.0) + arch.multiplied.get((path, name), 0.0)
                macs = Product(uses, tuple(sizes))
            yield WeightSize(tensor, Product(1.0, tuple(sizes)), macs if macs and macs.factor else None)


class _Groups:
    """Which group each neuron belongs to, of those that may grow."""

    def __init__(self, arch: Architecture) -> None:
        self._groups = arch.groups
        self._group = arch.owners

    def on(self, port: PortMap | None) -> dict[str, float]:
        """Entries that one more neuron of each group adds to a port."""
        if port is None:
            return {}
        owners = self._group[port.neuron]
        counts = np.bincount(owners[owners >= 0], minlength=len(self._groups))
        return {self._groups[k].name: counts[k] / self._groups[k].width for k in np.flatnonzero(counts)}

    def along(self, arch: Architecture, path: str, blocks: Iterable[Block], length: int) -> Axis:
        """An axis of a tensor."""
        growth: dict[str, float] = defaultdict(float)
        for block in blocks:
            for g, count in self.on(arch.ports.get((path, block.port))).items():
                growth[g] += count * block.multiple
        return Axis(float(length), tuple(growth.items()))

    def used(self, arch: Architecture, path: str, blocks: Iterable[Block]) -> Axis:
        """Rows of a tensor, each as often as it is used."""
        size, growth = 0.0, defaultdict[str, float](float)
        for block in blocks:
            times = arch.made.get((path, block.port), 0.0)
            size += times * block.size * block.multiple
            for g, count in self.on(arch.ports.get((path, block.port))).items():
                growth[g] += times * count * block.multiple
        return Axis(size, tuple(growth.items()))

    def product(self, count: Counted) -> Product:
        """A number that grows with neurons, in terms of their groups."""
        axes = []
        for size, entries in count.axes:
            growth: dict[str, float] = defaultdict(float)
            for i, number in entries:
                k = int(self._group[i]) if i < len(self._group) else -1
                if k >= 0:
                    growth[self._groups[k].name] += number
            each = {g.name: g.width for g in self._groups if g.name in growth}
            axes.append(Axis(float(size), tuple((g, n / each[g]) for g, n in growth.items())))
        return Product(count.factor, tuple(axes))


def port_axis(arch: Architecture, path: str, port: Port, size: int) -> Axis:
    """An axis of ``size`` entries along which the neurons of a port lie, each as often as any other."""
    neurons = arch.ports[path, port]
    multiple = size / len(neurons.neuron)
    growth = {g: count * multiple for g, count in _Groups(arch).on(neurons).items()}
    return Axis(float(size), tuple(growth.items()))


class RawProduct(NamedTuple):
    """All products with one raw matrix."""

    tensor: Tensor
    sizes: tuple[Axis, ...]  # of the tensor
    made: int | None  # the axis along which it makes neurons
    uses: float  # how often each entry is multiplied for one sample


def raw_products(model: nn.Module, arch: Architecture) -> Iterator[RawProduct]:
    """Every raw matrix that reads or makes neurons."""
    groups = _Groups(arch)
    for (path, name), uses in arch.multiplied.items():
        layer = model.get_submodule(path)
        tensor, axes = growing_tensors(layer, [port for p, port in arch.ports if p == path])[name]
        sizes = [groups.along(arch, path, axes.get(a, ()), n) for a, n in enumerate(tensor.shape)]
        made = [a for a, blocks in axes.items() if any(port_kind(b.port) == "out" for b in blocks)]
        yield RawProduct(tensor, tuple(sizes), made[-1] if made else None, uses)


class LayerCall(NamedTuple):
    """One call of a layer on a batch."""

    path: str
    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def layer_calls(context: GrowthContext) -> list[LayerCall]:
    """Every call of a layer with a rule while the first batch goes through the network, in eval mode.

    Of those that hold neurons, or through which neurons of others pass.
    """
    arch, calls = context.arch, list[LayerCall]()

    def hook(path: str) -> Any:
        def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append(LayerCall(path, layer, _detached(args), _detached(kwargs), _detached(output)))

        return note

    handles = []
    with undisturbed(context.model, train=False, seed=context.seed):
        try:
            crossed = [path for path in arch.written if passing(arch, path, 0)[1].growth]
            for path in dict.fromkeys([*(path for path, _ in arch.ports), *crossed]):
                layer = context.model.get_submodule(path)
                if rule_for(layer) is not None:
                    handles.append(layer.register_forward_hook(hook(path), with_kwargs=True))
            context.loss_fn(context.model, context.batches[0])
        finally:
            for handle in handles:
                handle.remove()
    return calls


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(map(_detached, value))
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value


def passing(arch: Architecture, path: str, number: int) -> tuple[int | None, Axis]:
    """How much more of it a layer writes the more neurons pass through it, whosever they are.

    Args:
        arch: What tracing found.
        path: The layer.
        number: Of its call.

    Returns:
        Along which axis of what it writes these neurons lie, from the end (``None``: nobody can tell, of a
        single neuron); and the size of the whole, which is 1 now.
    """
    calls = arch.written.get(path, ())
    if not calls:
        return None, Axis(1.0)
    call = calls[min(number, len(calls) - 1)]
    axes = _Groups(arch).product(call.values).axes
    return call.axis, Axis(1.0, tuple((g, each / axis.size) for axis in axes for g, each in axis.growth))


class OutputSize(NamedTuple):
    """What one call of a layer writes for one sample."""

    size: Product  # number of elements
    bytes_each: int


def outputs(arch: Architecture) -> Iterator[OutputSize]:
    """What every call of a layer, and every product with a raw matrix, writes for one sample."""
    groups = _Groups(arch)
    for calls in arch.written.values():
        for values, bytes_each, _ in calls:
            yield OutputSize(groups.product(values), bytes_each)
