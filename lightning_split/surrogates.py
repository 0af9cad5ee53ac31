"""Smooth derivatives for activations that have no second one.

A splitting matrix is made of second derivatives, and those of the ReLU family vanish almost everywhere.
Inside :class:`SmoothDerivatives` such functions keep their values, while their derivatives are those of
the same function built from softplus with slope β. S2D (Liu, Wu, Wang 2019, Appendix B) puts softplus in the
place of ReLU for the same purpose; β = 3 is the choice of the authors' code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

__all__ = ["SmoothDerivatives"]

Number = float | Tensor


class _Smoothed(torch.autograd.Function):
    """Value of one function, derivatives of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Slope, beta: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope, ctx.beta = slope, beta
        ctx.first = None
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            first = ctx.slope(x, ctx.beta)[0] if ctx.first is None else ctx.first
            return grad * first, None, None, None
        found, ctx.first = _SmoothedGradient.apply(grad, x, ctx.slope, ctx.beta)
        return found, None, None, None


class _SmoothedGradient(torch.autograd.Function):
    """Its backward pass; what the second derivative is made of is computed once, for all products."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, slope: Slope, beta: float) -> tuple[Tensor, Tensor]:
        first, second = slope(x, beta)
        ctx.save_for_backward(first, second.mul_(grad))
        ctx.mark_non_differentiable(first)
        return grad * first, first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        first, curved = ctx.saved_tensors
        return grad * first, grad * curved, None, None


class Slope(ABC):
    """The derivative of a smooth function."""

    @abstractmethod
    def __call__(self, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Its value, and its derivative, a new tensor."""


class _Kinks(Slope):
    """Of a piecewise-linear function, each kink of which has become a smooth step from one slope to the next.

    Args:
        left: The slope left of all kinks.
        kinks: By how much the slope rises, and where.
    """

    def __init__(self, left: Number, *kinks: tuple[Number, float]) -> None:
        self._left, self._kinks = left, kinks

    def __call__(self, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        # In place where it can be: what takes the time is memory that is used for the first time.
        first: Tensor | None = None
        second: Tensor | None = None
        for rise, at in self._kinks:
            step = ((x - at).mul_(beta) if at else x * beta).sigmoid_()
            if first is None or second is None:
                second = torch.addcmul(step, step, step, value=-1)  # of a step: β step (1 - step)
                if isinstance(rise, Tensor) or rise != 1.0:
                    second.mul_(rise)
                    step.mul_(rise)
                first = step
            else:
                assert not isinstance(rise, Tensor)
                first.add_(step, alpha=rise)
                second.add_(step.addcmul_(step, step, value=-1), alpha=rise)
        if first is None or second is None:
            return torch.zeros_like(x) + self._left, torch.zeros_like(x)
        if isinstance(self._left, Tensor) or self._left:
            first.add_(self._left)
        return first, second.mul_(beta)


class _Hardswish(Slope):
    """Of x times a hard sigmoid."""

    def __call__(self, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        gate = (F.softplus(x + 3, beta) - F.softplus(x - 3, beta)) / 6
        slope, curved = _HARD_SIGMOID(x, beta)
        return gate + x * slope, 2 * slope + x * curved


_STEP = _Kinks(0.0, (1.0, 0.0))
_HARD_SIGMOID = _Kinks(0.0, (1 / 6, -3.0), (-1 / 6, 3.0))


def _leaky(slope: Number) -> Slope:
    return _Kinks(slope, (1 - slope, 0.0))


def _between(low: float | None, high: float | None) -> Slope:
    kinks = [] if low is None else [(1.0, float(low))]
    kinks += [] if high is None else [(-1.0, float(high))]
    return _Kinks(0.0 if low is not None else 1.0, *kinks)


def _relu(*args: Any, **kwargs: Any) -> Slope:
    return _STEP


def _read_leaky(input: Tensor, negative_slope: float = 0.01, inplace: bool = False, **_: Any) -> Slope:
    return _leaky(negative_slope)


def _read_prelu(input: Tensor, weight: Tensor, **_: Any) -> Slope:
    slope = weight.detach()
    if slope.numel() > 1:
        slope = slope.view(1, -1, *[1] * (input.ndim - 2))
    return _leaky(slope)


def _read_hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False, **_: Any
) -> Slope:
    return _between(min_val, max_val)


def _read_relu6(*args: Any, **kwargs: Any) -> Slope:
    return _between(0.0, 6.0)


def _read_threshold(input: Tensor, threshold: float, value: float, inplace: bool = False, **_: Any) -> Slope:
    return _between(threshold, None)


def _read_clamp(input: Tensor, min: Any = None, max: Any = None, **_: Any) -> Slope | None:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return None
    return _between(min, max)


def _read_clamp_min(input: Tensor, min: Any, **_: Any) -> Slope | None:
    return _read_clamp(input, min)


def _read_clamp_max(input: Tensor, max: Any, **_: Any) -> Slope | None:
    return _read_clamp(input, None, max)


def _read_rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
    **_: Any,
) -> Slope | None:
    return None if training else _leaky((lower + upper) / 2)  # random slopes are not ours to repeat


def _read_softshrink(input: Tensor, lambd: float = 0.5, **_: Any) -> Slope:
    return _Kinks(1.0, (1.0, lambd), (-1.0, -lambd))


def _read_abs(*args: Any, **kwargs: Any) -> Slope:
    return _Kinks(-1.0, (2.0, 0.0))


# What the user may call -> how to read its arguments. The forms that write into their argument are listed
# apart; functions of torch.nn.functional with inplace=True are recognised by that argument.
_READERS: dict[Any, Callable[..., Slope | None]] = {}
_WRITERS: set[Any] = set()


def _add(reader: Callable[..., Slope | None], name: str) -> None:
    for home in (F, torch, Tensor, getattr(torch, "_VF", None), torch._C._nn):
        for suffix in ("", "_"):
            function = getattr(home, name + suffix, None)
            if function is not None:
                _READERS[function] = reader
                if suffix:
                    _WRITERS.add(function)


_NAMES: dict[str, Callable[..., Slope | None]] = {
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
    "hardswish": lambda *a, **k: _Hardswish(),
    "hardsigmoid": lambda *a, **k: _HARD_SIGMOID,
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

    Attributes:
        used: Whether there was such an activation.
    """

    def __init__(self, beta: float = 3.0) -> None:
        super().__init__()
        self.beta = beta
        self.used = False

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
        slope = reader(*args, **kwargs)
        if slope is None:
            return func(*args, **kwargs)
        self.used = True
        writes = func in _WRITERS or _asks_in_place(func, args, kwargs)
        source = x.clone() if writes else x
        with torch.no_grad():
            value = func(*args, **kwargs)  # writes into x itself where it was asked to
        smooth = _Smoothed.apply(source, value.clone() if writes else value, slope, self.beta)
        return x.copy_(smooth) if writes else smooth


def _asks_in_place(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if "inplace" in kwargs:
        return bool(kwargs["inplace"])
    # F.relu(x, True), F.hardtanh(x, -1, 1, True) …: the flag is the last positional argument
    names = getattr(getattr(func, "__code__", None), "co_varnames", ())
    return "inplace" in names and len(args) > names.index("inplace") and bool(args[names.index("inplace")])
