"""What a network costs and what one more neuron adds: parameters and multiply-accumulates (MACs)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lightning_split.architecture import Architecture, ChannelGroup
from lightning_split.layers import layer_tensors
from lightning_split.surgery import Surgery

__all__ = ["COSTS", "NetworkCost", "network_cost", "neuron_cost"]

COSTS = ("params", "macs")


class NetworkCost(NamedTuple):
    """Size of a whole network."""

    params: int  # trainable and frozen parameters
    macs: float  # multiply-accumulates per sample in the traced layers


def network_cost(model: nn.Module, arch: Architecture, surgery: Surgery | None = None) -> NetworkCost:
    """Parameters and MACs of a network, now or as it will be after a prepared surgery.

    MACs are those of the layers that have a rule, at the spatial sizes of the traced batch, per sample;
    what other operators multiply is not counted.
    """
    after: Mapping[Tensor, Tensor] = {}
    if surgery is not None:
        after = {old: found.new for old, found in surgery.replaced.items()}
    params = sum(after.get(p, p).numel() for p in model.parameters())
    macs = 0.0
    for path, uses in arch.uses.items():
        for tensor, axes in layer_tensors(model.get_submodule(path)).values():
            if axes and tensor.ndim > 1:
                macs += after.get(tensor, tensor).numel() * uses
    return NetworkCost(params, macs)


def neuron_cost(group: ChannelGroup, cost: str) -> float:
    """What one more neuron of a group adds, with everything else as it is.

    Incoming, channelwise and outgoing weights count, at the true spatial sizes. Two neurons that grow on
    both sides of one weight add a little more than the sum; :func:`network_cost` with a prepared surgery
    has the exact figure.

    Raises:
        ValueError: If the cost has another name than ``"params"`` or ``"macs"``.
    """
    if cost == "params":
        return float(group.params)
    if cost == "macs":
        return float(group.macs)
    raise ValueError(f"There is no cost named {cost!r}; choose one of {', '.join(map(repr, COSTS))}.")
