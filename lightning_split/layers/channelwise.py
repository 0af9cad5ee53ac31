"""Rules for layers that treat each channel by itself and own tensors: normalisation and PReLU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_split.layers.registry import register_layer_rule
from lightning_split.layers.rule import AxisPorts, LayerRule, Port

__all__ = ["keeps_batch_statistics"]


def keeps_batch_statistics(layer: nn.Module) -> bool:
    """Whether the layer normalises by statistics of the batch while it trains."""
    return isinstance(layer, _BatchNorm)


class _BatchNormRule(LayerRule):
    role = "channelwise"
    normalises = True

    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        return shape

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        names = ("weight", "bias", "running_mean", "running_var")
        return {name: {0: "through"} for name in names}

    def fresh(self, layer: nn.Module) -> Mapping[str, float]:
        return {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}

    def statistics(self, layer: nn.Module, x: Tensor, axis: int) -> Mapping[str, Tensor]:
        rows = x.detach().movedim(axis, 0).flatten(1)
        var, mean = torch.var_mean(rows.float() if rows.dtype.itemsize < 4 else rows, dim=1)
        return {"running_mean": mean, "running_var": var}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        # num_features of SyncBatchNorm is read again when Lightning converts it back.
        layer.num_features = sizes["through"]  # type: ignore[assignment]


class _InstanceNormRule(_BatchNormRule):
    def statistics(self, layer: nn.Module, x: Tensor, axis: int) -> Mapping[str, Tensor]:
        var, mean = torch.var_mean(x.detach().movedim(axis, -1).flatten(1, -2), dim=1)  # of each sample
        return {"running_mean": mean.mean(0), "running_var": var.mean(0)}

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        assert isinstance(layer, _InstanceNorm)
        return -int(layer._get_no_batch_dim())


class _GroupNormRule(LayerRule):
    """Mean and variance over each group of channels: a neuron is a whole group, and groups become more."""

    role = "channelwise"
    normalises = True

    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        return shape

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return {"weight": {0: "through"}, "bias": {0: "through"}}

    def fresh(self, layer: nn.Module) -> Mapping[str, float]:
        return {"weight": 1.0, "bias": 0.0}

    def port_size(self, layer: nn.Module, port: Port) -> int | None:
        assert isinstance(layer, nn.GroupNorm)
        return layer.num_channels if layer._parameters.get("weight") is None else len(layer.weight)

    def block(self, layer: nn.Module) -> int:
        assert isinstance(layer, nn.GroupNorm)
        return layer.num_channels // layer.num_groups

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        assert isinstance(layer, nn.GroupNorm)
        size = self.block(layer)
        layer.num_channels, layer.num_groups = sizes["through"], sizes["through"] // size

    def refusal(self, layer: nn.Module) -> str | None:
        if not list(layer.parameters(recurse=False)):
            return "a group normalisation without weights could not be fitted to a checkpoint again"
        return None


class _PReLU(LayerRule):
    role = "channelwise"

    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        return shape

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        assert isinstance(layer, nn.PReLU)
        return {"weight": {0: "through"}} if layer.num_parameters > 1 else {}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        layer.num_parameters = sizes["through"]  # type: ignore[assignment]


register_layer_rule(_BatchNorm, _BatchNormRule())
register_layer_rule(nn.SyncBatchNorm, _BatchNormRule())
register_layer_rule(_InstanceNorm, _InstanceNormRule())
register_layer_rule(nn.GroupNorm, _GroupNormRule())
register_layer_rule(nn.PReLU, _PReLU())
