"""What stands in for a rule on a layer that is not quite one of its type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from lightning_split.layers.rule import AxisPorts, LayerRule, Marks, own_tensor

__all__ = ["Followed", "Refused", "unless_refused"]


class Refused(LayerRule):
    """Stands in for a rule on a layer that cannot be grown, and says why."""

    role = "mixer"

    def __init__(self, reason: str, rule: LayerRule | None = None) -> None:
        self._reason = reason
        self._rule = rule  # what would hold if the layer could be grown

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        """See :meth:`LayerRule.axes`."""
        return {}

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        """See :meth:`LayerRule.neuron_axis`."""
        return 1 if self._rule is None else self._rule.neuron_axis(layer, activation)

    def refusal(self, layer: nn.Module) -> str | None:
        """See :meth:`LayerRule.refusal`."""
        return self._reason


def unless_refused(rule: LayerRule, layer: nn.Module) -> LayerRule:
    """The rule itself, or its refusal if the layer's tensors are not plain parameters and buffers."""
    if isinstance(rule, Refused):
        return rule
    if parametrize.is_parametrized(layer):
        return Refused(_parametrized(layer), rule)
    for name in rule.axes(layer):
        if name not in layer._parameters and name not in layer._buffers:
            return Refused(f"its tensor '{name}' is computed from others ({_computed(layer, name)})", rule)
        tensor = own_tensor(layer, name)
        if tensor is not None and tensor.is_complex():
            return Refused("its weights are complex, and splitting matrices are those of real weights", rule)
    return rule


def _parametrized(layer: nn.Module) -> str:
    parametrizations: Any = layer.parametrizations
    kinds = ", ".join(type(p).__name__.lstrip("_") for each in parametrizations.values() for p in each)
    plain = "torch.nn.utils.parametrize.remove_parametrizations before training makes them plain"
    return f"its weights are parametrized ({kinds}); {plain}"


def _computed(layer: nn.Module, name: str) -> str:
    """By what a tensor is computed that is neither a parameter nor a buffer, and how it becomes one."""
    for other, how in (
        (f"{name}_g", "weight norm; torch.nn.utils.remove_weight_norm before training makes it plain"),
        (f"{name}_mask", "pruning; torch.nn.utils.prune.remove makes it plain"),
        (f"{name}_u", "spectral norm; torch.nn.utils.remove_spectral_norm makes it plain"),
    ):
        if other in layer._parameters or other in layer._buffers:
            return how
    return "pruning, weight norm or the like"


class Followed(LayerRule):
    """Stands in for a rule on a subclass that overrides ``forward``.

    Its forward pass is traced like that of any module; where it calls the operator of the layer
    (``F.linear``, ``F.conv2d``, ``F.batch_norm`` …) on the layer's own weights, neurons are read and made.
    """

    role = "mixer"  # or what the rule says
    trusted = False

    def __init__(self, rule: LayerRule) -> None:
        self._rule = rule
        vars(self)["role"] = rule.role
        vars(self)["normalises"] = rule.normalises
        vars(self)["attends"] = rule.attends
        for name in (
            *("resize", "port_size", "tiles", "block", "neuron_axis", "refusal", "positions"),
            *("fresh", "statistics"),
        ):
            setattr(self, name, getattr(rule, name))

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        """See :meth:`LayerRule.axes`."""
        return self._rule.axes(layer)

    def forward(self, layer: nn.Module, marks: Marks, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`LayerRule.forward`."""
        with _OwnOperator(self._rule, layer, marks):
            return type(layer).forward(layer, *args, **kwargs)


class _OwnOperator(TorchFunctionMode):
    """Marks the calls of a layer's operator on the layer's own weights."""

    _NAMES = frozenset(
        {
            *(
                "linear",
                "conv1d",
                "conv2d",
                "conv3d",
                "conv_transpose1d",
                "conv_transpose2d",
                "conv_transpose3d",
            ),
            *("batch_norm", "instance_norm", "group_norm", "prelu", "embedding", "embedding_bag"),
        }
    )

    def __init__(self, rule: LayerRule, layer: nn.Module, marks: Marks) -> None:
        super().__init__()
        self._rule, self._layer, self._marks = rule, layer, marks
        self._own = {id(t) for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in self._NAMES:
            return func(*args, **kwargs)
        values = [*args, *kwargs.values()]
        x, *rest = [v for v in values if isinstance(v, Tensor)]
        name = next((k for k, v in kwargs.items() if v is x), None)
        if not rest or any(id(t) not in self._own for t in rest) or (name is None and args[0] is not x):
            return func(*args, **kwargs)
        reads, makes = ("in", "out") if self._rule.role == "mixer" else ("through", "through")
        read = self._marks.read(reads, x, self._rule.neuron_axis(self._layer, x))
        if name is None:
            args = (read, *args[1:])
        else:
            kwargs[name] = read
        output = self._marks.sealed(lambda: func(*args, **kwargs))
        return self._marks.made(makes, output, self._rule.neuron_axis(self._layer, output))
