"""Rules for layers that are one array of weights: linear and bilinear layers, embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_split.layers.registry import for_class_named, register_layer_rule
from lightning_split.layers.rule import AxisPorts, LayerRule, Marks, Port

__all__: list[str] = []


class _Linear(LayerRule):
    role = "mixer"
    linear = True

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return {"weight": {0: "out", 1: "in"}, "bias": {0: "out"}}

    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        assert isinstance(layer, nn.Linear)
        made, read = layer.weight.shape
        return [*shape[:-1], made] if shape and shape[-1] == read else None

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        assert isinstance(layer, nn.Linear)
        layer.in_features, layer.out_features = sizes["in"], sizes["out"]

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        return -1


@for_class_named("transformers.pytorch_utils.Conv1D")
class _TransposedLinear(LayerRule):
    """The linear layer of GPT-2: a weight of shape (inputs, outputs)."""

    role = "mixer"
    linear = True

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return {"weight": {0: "in", 1: "out"}, "bias": {0: "out"}}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        layer.nx, layer.nf = sizes["in"], sizes["out"]  # type: ignore[assignment]

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        return -1


class _Embedding(LayerRule):
    """Each embedding dimension is a neuron whose incoming weights are one entry per token."""

    role = "mixer"
    linear = True

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return {"weight": {1: "out"}}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        layer.embedding_dim = sizes["out"]  # type: ignore[assignment]

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        return -1

    def positions(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> int:
        return 0  # a look-up multiplies nothing

    def refusal(self, layer: nn.Module) -> str | None:
        assert isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
        if layer.max_norm is not None:
            return "an embedding with max_norm rescales its rows by their norm, which mixes the neurons"
        if layer.sparse:
            return "an embedding with sparse=True has sparse gradients, which double backward lacks"
        return None


class _Bilinear(LayerRule):
    """``nn.Bilinear``: linear in the neurons of each of its two inputs."""

    role = "mixer"
    linear = True

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return {"weight": {0: "out", 1: "in:first", 2: "in:second"}, "bias": {0: "out"}}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        assert isinstance(layer, nn.Bilinear)
        layer.in1_features, layer.in2_features = sizes["in:first"], sizes["in:second"]
        layer.out_features = sizes["out"]

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        return -1

    def forward(self, layer: nn.Module, marks: Marks, *args: Any, **kwargs: Any) -> Any:
        first, second = (*args, *(kwargs[name] for name in ("input1", "input2") if name in kwargs))
        read = marks.read("in:first", first, -1), marks.read("in:second", second, -1)
        return marks.made("out", marks.own(*read), -1)


register_layer_rule(nn.Linear, _Linear())
register_layer_rule(nn.Embedding, _Embedding())
register_layer_rule(nn.EmbeddingBag, _Embedding())
register_layer_rule(nn.Bilinear, _Bilinear())
