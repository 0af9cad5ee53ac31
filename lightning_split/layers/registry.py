"""Which rule holds for which layer, and what it says about the layer's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, overload

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_split.layers.rule import AxisPorts, Block, LayerRule, Port, own_tensor
from lightning_split.layers.standins import Followed, Refused, unless_refused

__all__ = [
    "RuleSource",
    "for_class_named",
    "is_uninitialized",
    "known_type",
    "layer_tensors",
    "normalises",
    "port_sizes",
    "register_layer_rule",
    "rule_for",
]


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


def for_class_named(name: str) -> Callable[[R], R]:
    """Register a rule for a class by its full name, of a library that need not be installed."""

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
        rule = unless_refused(source if isinstance(source, LayerRule) else source(layer), layer)
        overridden = any(
            getattr(type(layer), name, None) is not getattr(cls, name, None)
            for name in ("forward", "_conv_forward")
        )
        if not overridden or isinstance(rule, Refused):
            return rule
        return Followed(rule) if type(rule).forward is LayerRule.forward else None
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
        tensor = own_tensor(layer, name)
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


def is_uninitialized(layer: nn.Module) -> bool:
    """Whether the layer is lazy and has not yet seen a batch."""
    return isinstance(layer, LazyModuleMixin) and any(
        t is not None and is_lazy(t) for t in (*layer._parameters.values(), *layer._buffers.values())
    )


def normalises(layer: nn.Module) -> bool:
    """Whether a neuron's scale makes no difference behind the layer."""
    rule = rule_for(layer)
    return rule is not None and rule.normalises
