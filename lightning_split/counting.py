"""Counting a network: its tensors and what its layers write, as functions of the widths of its groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture, PortMap
from lightning_split.context import GrowthContext
from lightning_split.layers import Port, layer_tensors, port_kind, rule_for
from lightning_split.loose import growing_tensors
from lightning_split.measuring import batch_size, tensors_in, undisturbed
from lightning_split.pricing import Axis, Product
from lightning_split.surgery import Surgery

__all__ = ["LayerCall", "NetworkCost", "layer_calls", "network_cost", "outputs", "port_axis", "weights"]


class NetworkCost(NamedTuple):
    """Size of a whole network."""

    params: int  # trainable and frozen parameters
    macs: float  # multiply-accumulates per sample in the traced layers and with raw matrices


def network_cost(model: nn.Module, arch: Architecture, surgery: Surgery | None = None) -> NetworkCost:
    """Parameters and MACs of a network, now or as it will be after a prepared surgery.

    MACs are those of the layers that have a rule and of raw matrices, at the spatial sizes of the traced
    batch, per sample; what activations are multiplied with each other is not counted.
    """
    after: Mapping[Tensor, Tensor] = {}
    more: dict[int, int] = {}  # offspring beyond the first, by the id of the neuron
    if surgery is not None:
        after = {old: found.new for old, found in surgery.replaced.items()}
        more = {
            arch.group(split.group).neurons[split.neuron]: len(split.weights) - 1 for split in surgery.splits
        }
    params = sum(after.get(p, p).numel() for p in model.parameters())
    macs = 0.0
    for path, now in arch.uses.items():
        uses = now + sum(more.get(i, 0) * each for i, each in arch.across.get(path, {}).items())
        for tensor, axes in layer_tensors(model.get_submodule(path)).values():
            if axes and tensor.ndim > 1:
                macs += after.get(tensor, tensor).numel() * uses
    for (path, name), uses in arch.multiplied.items():
        matrix = model.get_submodule(path).get_parameter(name)
        macs += after.get(matrix, matrix).numel() * uses
    return NetworkCost(params, macs)


class WeightSize(NamedTuple):
    """A tensor of a layer."""

    tensor: Tensor
    size: Product  # its number of elements
    uses: Axis  # how often each of its entries is multiplied for one sample


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
                growth: dict[str, float] = {}
                for block in axes.get(axis, ()):
                    for g, count in groups.on(arch.ports.get((path, block.port))).items():
                        growth[g] = growth.get(g, 0.0) + count * block.multiple
                sizes.append(Axis(float(length), tuple(growth.items())))
            if name not in ruled:
                uses = Axis(arch.multiplied.get((path, name), 0.0))
            else:
                uses = groups.uses(arch, path) if tensor.ndim > 1 else Axis(0.0)
            yield WeightSize(tensor, Product(1.0, tuple(sizes)), uses)


class _Groups:
    """Which group each neuron belongs to, of those that may grow."""

    def __init__(self, arch: Architecture) -> None:
        self._groups = arch.groups
        ids = [p.neuron.max(initial=-1) for p in arch.ports.values()]
        most = int(max([*ids, *(i for each in arch.across.values() for i in each)], default=-1))
        self._group = np.full(most + 2, -1)  # the last entry stands for "no neuron" (-1)
        for k, group in enumerate(arch.groups):
            self._group[list(group.neurons)] = k

    def on(self, port: PortMap | None) -> dict[str, float]:
        """Entries that one more neuron of each group adds to a port."""
        if port is None:
            return {}
        owners = self._group[port.neuron]
        counts = np.bincount(owners[owners >= 0], minlength=len(self._groups))
        return {self._groups[k].name: counts[k] / self._groups[k].width for k in np.flatnonzero(counts)}

    def uses(self, arch: Architecture, path: str) -> Axis:
        """How often a layer is used, and how much more for one more neuron if it mixes their positions."""
        growth: dict[str, float] = defaultdict(float)
        for i, each in arch.across.get(path, {}).items():
            k = int(self._group[i])
            if k >= 0:
                growth[self._groups[k].name] += each / self._groups[k].width
        return Axis(arch.uses.get(path, 0.0), tuple(growth.items()))


def port_axis(arch: Architecture, path: str, port: Port, size: int) -> Axis:
    """An axis of ``size`` entries along which the neurons of a port lie, each as often as any other."""
    neurons = arch.ports[path, port]
    multiple = size / len(neurons.neuron)
    growth = {g: count * multiple for g, count in _Groups(arch).on(neurons).items()}
    return Axis(float(size), tuple(growth.items()))


class LayerCall(NamedTuple):
    """One call of a layer on a batch."""

    path: str
    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def layer_calls(context: GrowthContext, also: Iterable[str] = ()) -> list[LayerCall]:
    """Every call of a traced layer while the first batch goes through the network, in eval mode.

    Args:
        context: The network and its batches.
        also: Paths of further layers to watch.
    """
    calls: list[LayerCall] = []

    def hook(path: str) -> Any:
        def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append(LayerCall(path, layer, _detached(args), _detached(kwargs), _detached(output)))

        return note

    handles = []
    with undisturbed(context.model, train=False, seed=context.seed):
        try:
            for path in dict.fromkeys([*(path for path, _ in context.arch.ports), *also]):
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


class OutputSize(NamedTuple):
    """What one call of a layer writes for one sample."""

    size: Product  # number of elements
    bytes_each: int


def outputs(context: GrowthContext) -> Iterator[OutputSize]:
    """What every call of a traced layer writes for one sample, and how it grows."""
    samples = batch_size(context.batches[0])
    groups = _Groups(context.arch)
    for call in layer_calls(context, also=context.arch.across):
        rule = rule_for(call.layer)
        tensor = next(iter(tensors_in(call.output)), None)
        if rule is None or tensor is None or not tensor.numel():
            continue
        axis = rule.neuron_axis(call.layer, tensor)
        length = tensor.shape[axis]
        ports = [
            port
            for path, port in context.arch.ports
            if path == call.path and port_kind(port) != "in"
            and length % max(1, len(context.arch.ports[path, port].neuron)) == 0
        ]  # fmt: skip
        size = port_axis(context.arch, call.path, ports[0], length) if ports else Axis(float(length))
        lines = Axis(tensor.numel() / length / samples)
        uses = groups.uses(context.arch, call.path)
        if uses.growth:  # of all its calls
            share = lines.size / uses.size
            lines = Axis(lines.size, tuple((g, each * share) for g, each in uses.growth))
        yield OutputSize(Product(1.0, (size, lines)), torch.empty((), dtype=tensor.dtype).element_size())
