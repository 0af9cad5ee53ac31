"""Rules for convolutions: plain, grouped, depthwise, transposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_split.layers.registry import register_layer_rule
from lightning_split.layers.rule import AxisPorts, LayerRule, Port

__all__: list[str] = []


class _Conv(LayerRule):
    role = "mixer"
    linear = True

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return {"weight": {0: "out", 1: "in"}, "bias": {0: "out"}}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        assert isinstance(layer, _ConvNd)
        layer.in_channels, layer.out_channels = sizes["in"], sizes["out"]

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        assert isinstance(layer, _ConvNd)
        return -1 - len(layer.kernel_size)

    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        return _convolved(layer, shape)


def _convolved(layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
    """The shape that a convolution, not a transposed one, gives to a batch padded with zeros."""
    assert isinstance(layer, _ConvNd)
    kernel = tuple(layer.weight.shape[2:])
    settings: list[Any] = [layer.stride, layer.padding, layer.dilation]
    plain = layer.padding_mode == "zeros" and all(
        isinstance(v, tuple) and len(v) == len(kernel) for v in settings
    )
    if not plain or len(shape) != 2 + len(kernel) or shape[1] != layer.weight.shape[1] * layer.groups:
        return None
    strides, paddings, dilations = settings
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(shape[2:], kernel, strides, paddings, dilations, strict=True)
    ]
    return [shape[0], len(layer.weight), *sizes] if min(sizes) > 0 else None


class _GroupedConv(_Conv):
    """Groups must stay equal: a neuron is one channel of every group, on both sides."""

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        out = ("out",) * self.tiles(layer)
        return {"weight": {0: out, 1: "in"}, "bias": {0: out}}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        assert isinstance(layer, _ConvNd)
        layer.in_channels, layer.out_channels = layer.groups * sizes["in"], layer.groups * sizes["out"]

    def tiles(self, layer: nn.Module) -> int:
        assert isinstance(layer, _ConvNd)
        return layer.groups


class _ConvTranspose(_Conv):
    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        return None

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return {"weight": {0: "in", 1: "out"}, "bias": {0: "out"}}

    def positions(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> int:
        return inputs.numel() // inputs.shape[self.neuron_axis(layer, inputs)]


class _GroupedConvTranspose(_GroupedConv):
    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        return None

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        groups = self.tiles(layer)
        return {"weight": {0: ("in",) * groups, 1: "out"}, "bias": {0: ("out",) * groups}}

    def positions(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> int:
        return inputs.numel() // inputs.shape[self.neuron_axis(layer, inputs)]


class _DepthwiseConv(LayerRule):
    """One filter (or several) per channel; channel multipliers are runs of neighbouring filters."""

    role = "channelwise"

    def port_size(self, layer: nn.Module, port: Port) -> int | None:
        assert isinstance(layer, _ConvNd)
        return layer.groups if port == "through" else None

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return {"weight": {0: "through"}, "bias": {0: "through"}}

    def fresh(self, layer: nn.Module) -> Mapping[str, float]:
        return {"bias": 0.0}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        assert isinstance(layer, _ConvNd)
        layer.in_channels = layer.groups = sizes["through"]
        multiplier = layer.weight.shape[0] // sizes["through"]
        layer.out_channels = multiplier * sizes["through"]

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        assert isinstance(layer, _ConvNd)
        return -1 - len(layer.kernel_size)

    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        return None if isinstance(layer, _ConvTransposeNd) else _convolved(layer, shape)


def _convolution(layer: nn.Module) -> LayerRule:
    assert isinstance(layer, _ConvNd)
    transposed = isinstance(layer, _ConvTransposeNd)
    if layer.groups == 1:
        return _ConvTranspose() if transposed else _Conv()
    if layer.groups == layer.in_channels and not (transposed and layer.out_channels != layer.in_channels):
        return _DepthwiseConv()
    return _GroupedConvTranspose() if transposed else _GroupedConv()


for _conv in (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
):
    register_layer_rule(_conv, _convolution)
