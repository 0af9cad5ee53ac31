"""Smooth derivatives for activations that have no second one.

A splitting matrix is made of second derivatives, and those of the ReLU family vanish almost everywhere.
Inside :class:`SmoothDerivatives` such functions keep their values, while their derivatives are those of
the same function built from softplus with slope β. S2D (Liu, Wu, Wang 2019, Appendix B) puts softplus in the
place of ReLU for the same purpose; β = 3 is the choice of the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["SmoothDerivatives"]

Derivative = Callable[[Tensor, float], Tensor]


class _Smoothed(torch.autograd.Function):
    """Value of one function, derivative of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, derivative: Derivative, beta: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.derivative, ctx.beta = derivative, beta
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return grad * ctx.derivative(x, ctx.beta), None, None, None


def _step(x: Tensor, beta: float, at: float = 0.0) -> Tensor:
    """Derivative of softplus(x - at): the smooth step from 0 to 1."""
    return torch.sigmoid(beta * (x - at))


def _leaky(slope: float | Tensor) -> Derivative:
    return lambda x, beta: slope + (1 - slope) * _step(x, beta)


def _between(low: float | None, high: float | None) -> Derivative:
    def derivative(x: Tensor, beta: float) -> Tensor:
        rise = torch.ones_like(x) if low is None else _step(x, beta, low)
        return rise if high is None else rise - _step(x, beta, high)

    return derivative


def _hardsigmoid(x: Tensor, beta: float) -> Tensor:
    return (_step(x, beta, -3.0) - _step(x, beta, 3.0)) / 6


def _hardswish(x: Tensor, beta: float) -> Tensor:
    gate = (F.softplus(x + 3, beta) - F.softplus(x - 3, beta)) / 6
    return gate + x * _hardsigmoid(x, beta)


def _relu(*args: Any, **kwargs: Any) -> Derivative:
    return _step


def _read_leaky(input: Tensor, negative_slope: float = 0.01, inplace: bool = False, **_: Any) -> Derivative:
    return _leaky(negative_slope)


def _read_prelu(input: Tensor, weight: Tensor, **_: Any) -> Derivative:
    slope = weight.detach()
    if slope.numel() > 1:
        slope = slope.view(1, -1, *[1] * (input.ndim - 2))
    return _leaky(slope)


def _read_hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False, **_: Any
) -> Derivative:
    return _between(min_val, max_val)


def _read_relu6(*args: Any, **kwargs: Any) -> Derivative:
    return _between(0.0, 6.0)


def _read_threshold(
    input: Tensor, threshold: float, value: float, inplace: bool = False, **_: Any
) -> Derivative:
    return _between(threshold, None)


def _read_clamp(input: Tensor, min: Any = None, max: Any = None, **_: Any) -> Derivative | None:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return None
    return _between(min, max)


def _read_clamp_min(input: Tensor, min: Any, **_: Any) -> Derivative | None:
    return _read_clamp(input, min)


def _read_clamp_max(input: Tensor, max: Any, **_: Any) -> Derivative | None:
    return _read_clamp(input, None, max)


def _read_rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
    **_: Any,
) -> Derivative | None:
    return None if training else _leaky((lower + upper) / 2)  # random slopes are not ours to repeat


def _read_softshrink(input: Tensor, lambd: float = 0.5, **_: Any) -> Derivative:
    return lambda x, beta: _step(x, beta, lambd) + _step(-x, beta, lambd)


def _read_abs(*args: Any, **kwargs: Any) -> Derivative:
    return lambda x, beta: 2 * _step(x, beta) - 1


# What the user may call -> how to read its arguments. The forms that write into their argument are listed
# apart; functions of torch.nn.functional with inplace=True are recognised by that argument.
_READERS: dict[Any, Callable[..., Derivative | None]] = {}
_WRITERS: set[Any] = set()


def _add(reader: Callable[..., Derivative | None], name: str) -> None:
    for home in (F, torch, Tensor, getattr(torch, "_VF", None), torch._C._nn):
        for suffix in ("", "_"):
            function = getattr(home, name + suffix, None)
            if function is not None:
                _READERS[function] = reader
                if suffix:
                    _WRITERS.add(function)


_NAMES: dict[str, Callable[..., Derivative | None]] = {
    "relu": _relu,
    "relu6": _read_relu6,
    "leaky_relu": _read_leaky,
    "prelu": _read_prelu,
    "rrelu": _read_rrelu,
    "hardtanh": _read_hardtanh,
    "threshold": _read_threshold,
    "clamp": _read_clamp,
    "clip": _read_clamp,
    "clamp_min": _read_clamp_min,
    "clamp_max": _read_clamp_max,
    "hardswish": lambda *a, **k: _hardswish,
    "hardsigmoid": lambda *a, **k: _hardsigmoid,
    "softshrink": _read_softshrink,
    "abs": _read_abs,
}
for _name, _reader in _NAMES.items():
    _add(_reader, _name)


class SmoothDerivatives(TorchFunctionMode):
    """While active, piecewise-linear activations have the derivatives of their softplus counterparts.

    Reaches the functional, the module and the in-place forms.

    Args:
        beta: Sharpness of the softplus; larger is closer to the true function and noisier.
    """

    def __init__(self, beta: float = 3.0) -> None:
        super().__init__()
        self.beta = beta

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        reader = _READERS.get(func)
        if reader is None or "out" in kwargs:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs.get("input", kwargs.get("self"))
        if not isinstance(x, Tensor) or not x.requires_grad:
            return func(*args, **kwargs)
        derivative = reader(*args, **kwargs)
        if derivative is None:
            return func(*args, **kwargs)
        writes = func in _WRITERS or _asks_in_place(func, args, kwargs)
        source = x.clone() if writes else x
        with torch.no_grad():
            value = func(*args, **kwargs)  # writes into x itself where it was asked to
        smooth = _Smoothed.apply(source, value.clone() if writes else value, derivative, self.beta)
        return x.copy_(smooth) if writes else smooth


def _asks_in_place(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if "inplace" in kwargs:
        return bool(kwargs["inplace"])
    # F.relu(x, True), F.hardtanh(x, -1, 1, True) …: the flag is the last positional argument
    names = getattr(getattr(func, "__code__", None), "co_varnames", ())
    return "inplace" in names and len(args) > names.index("inplace") and bool(args[names.index("inplace")])
