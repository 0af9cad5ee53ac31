"""Layer rules: what the library must know about a type of layer.

This file and ``composites.py`` (layers with several ports: attention, recurrence) are the only ones that
name layer classes. A rule answers four questions about a layer: along which axis of its activations the
neurons lie, which axes of its tensors run along the neurons that it reads (port ``"in"``), makes (``"out"``)
or passes on (``"through"``), how its attributes follow when those axes grow, and why it cannot be grown, if
it cannot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

__all__ = ["LayerRule", "Marks", "Port", "port_kind", "register_layer_rule", "rule_for"]

Port = str  # "in", "out" or "through"; a layer with several of a kind names them: "in:hidden"
AxisPorts = Port | tuple[Port, ...]  # several: the axis holds their neurons one after the other


def port_kind(port: Port) -> str:
    """``"in"``, ``"out"`` or ``"through"``."""
    return port.partition(":")[0]


class Block(NamedTuple):
    """The stretch of a tensor's axis that belongs to one port."""

    port: Port
    start: int  # first entry
    size: int  # number of neurons on the port
    multiple: int  # neighbouring entries per neuron


class Marks(Protocol):
    """Through which :meth:`LayerRule.forward` says where in a layer neurons are read and made."""

    def read(self, port: Port, x: Tensor, axis: int) -> Tensor:
        """Here the layer reads the neurons that lie along ``axis`` of ``x``; go on with the result."""
        ...

    def made(self, port: Port, x: Tensor, axis: int) -> Tensor:
        """Here the neurons of a port have been computed, along ``axis`` of ``x``; go on with the result."""
        ...

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own ``forward``."""
        ...

    def sealed(self, call: Callable[[], Any]) -> Any:
        """Run a part of the computation that is the rule's business, unseen."""
        ...


class LayerRule(ABC):
    """What the tracer and the surgery must know about one type of layer.

    A **mixer** computes new neurons from those that it reads: its tensors have an ``"out"`` port and,
    if the output is linear in each input neuron, an ``"in"`` port. A mixer without ``"in"`` port reads
    its inputs in some other way, and the neurons that enter it are not splittable. A **channelwise**
    layer treats each neuron by itself and has one ``"through"`` port; the tensors on it are copied when
    a neuron is split.

    The parameters on the ``"out"`` port of a mixer are the incoming weights θ of its neurons. The
    output of a neuron may depend on its own θ and on the layer's input only.

    Subclass it, set :attr:`role`, implement :meth:`axes`, and register it with
    :func:`register_layer_rule`.
    """

    role: ClassVar[Literal["mixer", "channelwise"]]
    trusted: ClassVar[bool] = True  # whether the layer uses its own tensors only as the rule says
    normalises: ClassVar[bool] = False  # whether a neuron's scale makes no difference behind the layer
    rigid: ClassVar[frozenset[Port]] = frozenset()  # ports whose neurons are always as many

    @abstractmethod
    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        """For each parameter or buffer of the layer that has a neuron axis: ``{axis: port}``.

        An axis may be a whole multiple of its port: then each neuron owns that many neighbouring
        entries (a depthwise convolution with a channel multiplier). A tuple of ports says that their neurons
        follow each other along the axis; a port may occur several times (the gates of an LSTM).
        """

    def forward(self, layer: nn.Module, marks: Marks, *args: Any, **kwargs: Any) -> Any:
        """The layer's computation, with marks where neurons are read and made.

        The default reads the first tensor and makes the output. A layer with several ports, or one that
        reads its own neurons (recurrence), computes here what its ``forward`` computes, with operators that
        can be differentiated twice, and marks each place.
        """
        reads, makes = ("in", "out") if self.role == "mixer" else ("through", "through")

        def read(x: Tensor) -> Tensor:
            return marks.read(reads, x, self.neuron_axis(layer, x))

        if args:
            args = (read(args[0]), *args[1:])
        else:
            name = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
            kwargs = {**kwargs, name: read(kwargs[name])}
        output = marks.own(*args, **kwargs)
        return marks.made(makes, output, self.neuron_axis(layer, output))

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        """Set the attributes that state the layer's sizes (``out_features`` …) after its tensors grew.

        Args:
            layer: The layer, already holding its new tensors.
            sizes: The new number of neurons on each port that the layer's tensors have.
        """
        return None

    def port_size(self, layer: nn.Module, port: Port) -> int | None:
        """Number of neurons on a port, read from the tensors; ``None`` if no tensor lies on it."""
        for name, axes in self.axes(layer).items():
            tensor = _tensor(layer, name)
            for axis, ports in axes.items():
                if tensor is not None and {port} == {*_several(ports)}:
                    return int(tensor.shape[axis]) // len(_several(ports))
        return None

    def tiles(self, layer: nn.Module) -> int:
        """Number of equal groups into which a mixer cuts its channels; a neuron is one channel of each.

        Its ports have the size of one group.
        """
        return 1

    def block(self, layer: nn.Module) -> int:
        """Number of neighbouring channels that a channelwise layer treats together: they are one neuron."""
        return 1

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        """Axis of the layer's input and output along which neurons lie (negative counts from the end)."""
        return 1

    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        """The output's shape for an input of this shape; ``None`` if that is for the layer to tell.

        Tracing asks this instead of running the layer on a tensor without values, which takes torch longer.
        """
        return None

    def refusal(self, layer: nn.Module) -> str | None:
        """Why this very layer cannot take part in growth, or ``None`` if it can."""
        return None

    def fresh(self, layer: nn.Module) -> Mapping[str, float]:
        """What a channelwise layer's tensors hold for a new neuron; those left out copy a neighbour.

        A neuron that sends zero should still send zero behind the layer.
        """
        return {}

    def statistics(self, layer: nn.Module, x: Tensor, axis: int) -> Mapping[str, Tensor]:
        """What the layer's tensors that describe the data should hold for the channels of ``x``."""
        return {}

    def positions(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> int:
        """How often each weight is used in one call; ``weights x positions`` are the call's MACs."""
        return output.numel() // output.shape[self.neuron_axis(layer, output)]


RuleSource = LayerRule | Callable[[nn.Module], LayerRule]
_RULES: dict[type[nn.Module], RuleSource] = {}
_NAMED_RULES: dict[str, LayerRule] = {}  # of classes in libraries that need not be installed
R = TypeVar("R", bound=type[LayerRule])


@overload
def register_layer_rule(layer_type: type[nn.Module]) -> Callable[[R], R]: ...
@overload
def register_layer_rule(layer_type: type[nn.Module], rule: RuleSource) -> None: ...
def register_layer_rule(
    layer_type: type[nn.Module], rule: RuleSource | None = None
) -> Callable[[R], R] | None:
    """Register the rule for a type of layer; the last registration of a type wins.

    The rule also holds for subclasses that inherit ``forward`` unchanged.

    Args:
        layer_type: The layer's class.
        rule: A :class:`LayerRule`, or a function that picks one for a given layer. Without it, the call
            is a class decorator for a rule whose constructor takes no argument.

    Raises:
        TypeError: If ``layer_type`` is not a subclass of ``nn.Module`` or ``rule`` is not a rule.
    """
    given: object = layer_type
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise TypeError(
            f"register_layer_rule needs a subclass of nn.Module, got {layer_type!r}; "
            "pass the class of the layer, not an instance."
        )
    if rule is None:

        def decorate(cls: R) -> R:
            _RULES[layer_type] = cls()
            return cls

        return decorate
    if isinstance(rule, type) or not (isinstance(rule, LayerRule) or callable(rule)):
        raise TypeError(
            f"The rule for {layer_type.__name__} must be an instance of LayerRule or a function that "
            f"returns one, got {rule!r}."
        )
    _RULES[layer_type] = rule
    return None


def _for_class_named(name: str) -> Callable[[R], R]:
    def decorate(cls: R) -> R:
        _NAMED_RULES[name] = cls()
        return cls

    return decorate


def rule_for(layer: nn.Module) -> LayerRule | None:
    """The rule that holds for a layer, or ``None`` if there is none.

    A subclass that overrides ``forward`` (or a convolution's ``_conv_forward``) inherits the rule as far as
    it calls the operator of the layer on the layer's own weights; a weight-standardising subclass of
    ``Conv2d`` does not, and is refused when it runs.
    """
    for cls in type(layer).__mro__:
        source = _RULES.get(cls) or _NAMED_RULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if source is None:
            continue
        if "forward" in layer.__dict__:
            return None
        rule = _refused(source if isinstance(source, LayerRule) else source(layer), layer)
        overridden = any(
            getattr(type(layer), name, None) is not getattr(cls, name, None)
            for name in ("forward", "_conv_forward")
        )
        if not overridden or isinstance(rule, _Refused):
            return rule
        return _Followed(rule) if type(rule).forward is LayerRule.forward else None
    return None


def known_type(layer: nn.Module) -> bool:
    """Whether there is a rule for the layer's class or one that it is derived from."""
    return any(
        cls in _RULES or f"{cls.__module__}.{cls.__qualname__}" in _NAMED_RULES for cls in type(layer).__mro__
    )


def layer_tensors(layer: nn.Module) -> dict[str, tuple[Tensor, dict[int, tuple[Block, ...]]]]:
    """The tensors of a layer that have a neuron axis, by name, with their axes; empty without a rule."""
    rule = rule_for(layer)
    if rule is None:
        return {}
    found = {}
    for name, axes in rule.axes(layer).items():
        tensor = _tensor(layer, name)
        if tensor is not None:
            blocks = {a: _blocks(rule, layer, tensor.shape[a], ports) for a, ports in axes.items()}
            found[name] = (tensor, blocks)
    return found


def port_sizes(layer: nn.Module) -> dict[Port, int]:
    """Number of neurons on every port on which the layer has tensors."""
    return {
        block.port: block.size
        for _, axes in layer_tensors(layer).values()
        for blocks in axes.values()
        for block in blocks
    }


def _blocks(rule: LayerRule, layer: nn.Module, length: int, ports: AxisPorts) -> tuple[Block, ...]:
    if isinstance(ports, str):
        size = rule.port_size(layer, ports) or length
        return (Block(ports, 0, size, length // size if size else 1),)
    blocks, start = [], 0
    for port in ports:
        size = rule.port_size(layer, port) or 0
        blocks.append(Block(port, start, size, 1))
        start += size
    return tuple(blocks)


def _several(ports: AxisPorts) -> tuple[Port, ...]:
    return (ports,) if isinstance(ports, str) else ports


def _tensor(layer: nn.Module, name: str) -> Tensor | None:
    if name in layer._parameters:
        return layer._parameters[name]
    return layer._buffers.get(name)


def is_uninitialized(layer: nn.Module) -> bool:
    """Whether the layer is lazy and has not yet seen a batch."""
    return isinstance(layer, LazyModuleMixin) and any(
        t is not None and is_lazy(t) for t in (*layer._parameters.values(), *layer._buffers.values())
    )


def keeps_batch_statistics(layer: nn.Module) -> bool:
    """Whether the layer normalises by statistics of the batch while it trains."""
    return isinstance(layer, _BatchNorm)


def normalises(layer: nn.Module) -> bool:
    """Whether a neuron's scale makes no difference behind the layer."""
    rule = rule_for(layer)
    return rule is not None and rule.normalises


class _Refused(LayerRule):
    """Stands in for a rule on a layer that cannot be grown, and says why."""

    role = "mixer"

    def __init__(self, reason: str, rule: LayerRule | None = None) -> None:
        self._reason = reason
        self._rule = rule  # what would hold if the layer could be grown

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return {}

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        return 1 if self._rule is None else self._rule.neuron_axis(layer, activation)

    def refusal(self, layer: nn.Module) -> str | None:
        return self._reason


class _Followed(LayerRule):
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
        for name in (
            *("resize", "port_size", "tiles", "block", "neuron_axis", "refusal", "positions"),
            *("fresh", "statistics"),
        ):
            setattr(self, name, getattr(rule, name))

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return self._rule.axes(layer)

    def forward(self, layer: nn.Module, marks: Marks, *args: Any, **kwargs: Any) -> Any:
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


def _refused(rule: LayerRule, layer: nn.Module) -> LayerRule:
    """The rule itself, or its refusal if the layer's tensors are not plain parameters and buffers."""
    if isinstance(rule, _Refused):
        return rule
    if parametrize.is_parametrized(layer):
        return _Refused("its weights are parametrized (torch.nn.utils.parametrize)", rule)
    for name in rule.axes(layer):
        if name not in layer._parameters and name not in layer._buffers:
            return _Refused(
                f"its tensor '{name}' is computed from others (pruning, weight norm or spectral norm)", rule
            )
        tensor = _tensor(layer, name)
        if tensor is not None and tensor.is_complex():
            return _Refused("its weights are complex, and splitting matrices are those of real weights", rule)
    return rule


class _Mixer(LayerRule):
    role = "mixer"


class _Channelwise(LayerRule):
    role = "channelwise"


class _Linear(_Mixer):
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


class _Conv(_Mixer):
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


class _DepthwiseConv(_Channelwise):
    """One filter (or several) per channel; channel multipliers are runs of neighbouring filters."""

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


class _BatchNormRule(_Channelwise):
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


class _GroupNormRule(_Channelwise):
    """Mean and variance over each group of channels: a neuron is a whole group, and groups become more."""

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


class _InstanceNormRule(_BatchNormRule):
    def statistics(self, layer: nn.Module, x: Tensor, axis: int) -> Mapping[str, Tensor]:
        var, mean = torch.var_mean(x.detach().movedim(axis, -1).flatten(1, -2), dim=1)  # of each sample
        return {"running_mean": mean.mean(0), "running_var": var.mean(0)}

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        assert isinstance(layer, _InstanceNorm)
        return -int(layer._get_no_batch_dim())


class _PReLU(_Channelwise):
    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        return shape

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        assert isinstance(layer, nn.PReLU)
        return {"weight": {0: "through"}} if layer.num_parameters > 1 else {}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        layer.num_parameters = sizes["through"]  # type: ignore[assignment]


class _Embedding(_Mixer):
    """Each embedding dimension is a neuron whose incoming weights are one entry per token."""

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


def _convolution(layer: nn.Module) -> LayerRule:
    assert isinstance(layer, _ConvNd)
    transposed = isinstance(layer, _ConvTransposeNd)
    if layer.groups == 1:
        return _ConvTranspose() if transposed else _Conv()
    if layer.groups == layer.in_channels and not (transposed and layer.out_channels != layer.in_channels):
        return _DepthwiseConv()
    return _GroupedConvTranspose() if transposed else _GroupedConv()


def _register_builtin_rules() -> None:
    register_layer_rule(nn.Linear, _Linear())
    for conv in (
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    ):
        register_layer_rule(conv, _convolution)
    register_layer_rule(_BatchNorm, _BatchNormRule())
    register_layer_rule(nn.SyncBatchNorm, _BatchNormRule())
    register_layer_rule(_InstanceNorm, _InstanceNormRule())
    register_layer_rule(nn.GroupNorm, _GroupNormRule())
    register_layer_rule(nn.PReLU, _PReLU())
    register_layer_rule(nn.Embedding, _Embedding())
    register_layer_rule(nn.EmbeddingBag, _Embedding())


_register_builtin_rules()


@_for_class_named("transformers.pytorch_utils.Conv1D")
class _TransposedLinear(_Mixer):
    """The linear layer of GPT-2: a weight of shape (inputs, outputs)."""

    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        return {"weight": {0: "in", 1: "out"}, "bias": {0: "out"}}

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        layer.nx, layer.nf = sizes["in"], sizes["out"]  # type: ignore[assignment]

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        return -1
