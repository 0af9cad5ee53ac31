"""What stands in for a rule on a layer that is not quite one of its type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_split.layers.rule import AxisPorts, LayerRule, Marks, own_tensor

__all__ = ["Followed", "Refused", "is_refused", "refuse_layer", "unless_refused"]


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
    if layer in _REASONS:
        return Refused(_REASONS[layer], rule)
    for name in rule.axes(layer):
        if name not in layer._parameters and name not in layer._buffers:
            return Refused(f"its tensor '{name}' is computed from others", rule)
        tensor = own_tensor(layer, name)
        if tensor is not None and tensor.is_complex():
            return Refused("its weights are complex, and splitting matrices are those of real weights", rule)
    return rule


# Layers that cannot be grown for reasons that no rule knows of.
_REASONS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def refuse_layer(layer: nn.Module, reason: str) -> Callable[[], None]:
    """Refuse a layer whatever its rule says, until the function that is returned is called."""
    _REASONS[layer] = reason

    def allow() -> None:
        _REASONS.pop(layer, None)

    return allow


def is_refused(layer: nn.Module) -> bool:
    """Whether the layer is refused by :func:`refuse_layer`."""
    return layer in _REASONS


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
        vars(self)["linear"] = rule.linear
        vars(self)["attends"] = rule.attends
        for name in (
            *("resize", "port_size", "tiles", "block", "neuron_axis", "refusal", "positions"),
            *("fresh", "statistics", "told"),
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
        tensors = {
            name: t for name, t in (*layer._parameters.items(), *layer._buffers.items()) if t is not None
        }
        self._own = {id(t) for t in tensors.values()}
        self._weight, self._bias = tensors.get("weight"), tensors.get("bias")
        self._as_good: list[Tensor] = []  # the weight times a number
        self._turned: list[Tensor] = []  # the weight of a linear layer, transposed
        self._waiting: Tensor | None = None  # its product, to which the bias is yet to be added

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _SCALES or name in _TURNS or func in _TURNING:
            return self._changed(name, func(*args, **kwargs), args)
        if len(args) == 2 and not kwargs:
            if name in _PRODUCTS and self._is(args[1], self._turned) and isinstance(args[0], Tensor):
                read = self._marks.read("in", args[0], -1)
                return self._made(self._marks.sealed(lambda: func(read, args[1])))
            if name in _SUMS and self._waiting is not None and self._bias is not None:
                pair = {id(self._waiting), id(self._bias)}
                if {id(a) for a in args} == pair:
                    self._waiting = None
                    output = self._marks.sealed(lambda: func(*args))
                    return self._marks.made("out", output, -1)
        if name not in self._NAMES:
            return func(*args, **kwargs)
        values = [*args, *kwargs.values()]
        x, *rest = [v for v in values if isinstance(v, Tensor)]
        name = next((k for k, v in kwargs.items() if v is x), None)
        own = all(id(t) in self._own or self._is(t, self._as_good) for t in rest)
        if not rest or not own or (name is None and args[0] is not x):
            return func(*args, **kwargs)
        reads, makes = ("in", "out") if self._rule.role == "mixer" else ("through", "through")
        read = self._marks.read(reads, x, self._rule.neuron_axis(self._layer, x))
        if name is None:
            args = (read, *args[1:])
        else:
            kwargs[name] = read
        output = self._marks.sealed(lambda: func(*args, **kwargs))
        return self._marks.made(makes, output, self._rule.neuron_axis(self._layer, output))

    def _changed(self, name: str, out: Any, args: Sequence[Any]) -> Any:
        """Take note of a weight that is multiplied with one number, or transposed."""
        whole, *others = args
        if name in _SCALES:
            if self._rule.role == "mixer" and len(others) == 1:
                weight, factor = (whole, others[0]) if whole is self._weight else (others[0], whole)
                if weight is self._weight and self._is_number(factor) and (whole is weight or "mul" in name):
                    self._as_good.append(out)
        elif (
            isinstance(whole, Tensor)
            and whole is self._weight
            and self._rule.axes(self._layer).get("weight") == {0: "out", 1: "in"}
            and whole.ndim == 2
            and out.stride() == whole.stride()[::-1]
        ):
            self._turned.append(out)
        return out

    def _made(self, output: Tensor) -> Tensor:
        if self._bias is None:
            return self._marks.made("out", output, -1)
        self._waiting = output
        return output

    def _is_number(self, value: Any) -> bool:
        """Whether this is one number that growth leaves as it is."""
        if isinstance(value, Tensor):
            return value.numel() == 1 and value.ndim < 2 and id(value) in self._own
        return isinstance(value, (int, float))

    @staticmethod
    def _is(value: Any, tensors: Sequence[Tensor]) -> bool:
        return any(value is t for t in tensors)


_SCALES = {"mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__"}
_TURNS = {"t", "transpose", "swapaxes", "adjoint"}
_TURNING = (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
_PRODUCTS = {"matmul", "__matmul__", "mm"}
_SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
