"""Layers whose double backward does no more than the splitting matrices need.

Of the gradient in a weight only the graph is needed, and between cuts the inputs of layers and the parameters
of channelwise layers are constants. torch's own second derivatives do not know that: the double backward of a
convolution transposes it to differentiate in its input, and that of BatchNorm in eval mode, an affine map,
takes two dozen passes over the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["LeanDerivatives", "adding", "transformed", "without_autocast"]


class _Weighting(torch.autograd.Function):
    """A constant, multiplied with a weight: linear in the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, kind: _Kind) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.shape = kind, weight.shape
        return kind.multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        kind = ctx.kind
        if not torch.is_grad_enabled() and kind.add(grad, x):
            return grad.new_zeros(1).expand(ctx.shape), None, None
        # Where this gradient is going to be differentiated, it needs a graph, and of a parameter no value.
        valued = kind.valued or not torch.is_grad_enabled()
        return _WeightGradient.apply(grad, x, kind, ctx.shape, valued), None, None


class _WeightGradient(torch.autograd.Function):
    """Its gradient in the weight, linear in the gradient of its output."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, kind: _Kind, shape: torch.Size, valued: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return kind.gradient(grad, x, shape) if valued else grad.new_zeros(1).expand(shape)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        return _Weighting.apply(weight, x, ctx.kind), None, None, None, None


@dataclass(frozen=True)
class _Kind:
    """How a weight is multiplied with what it reads, and the gradient in the weight."""

    multiply: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, torch.Size], Tensor]
    valued: bool  # whether more than second derivatives depends on the value of that gradient
    matrix: int = 0  # identifies a weight that is a matrix and a parameter

    def add(self, grad: Tensor, x: Tensor) -> bool:
        """Add the gradient to where it is wanted, without forming it first; ``False`` if that cannot be."""
        total = _TOTALS.get(self.matrix)
        if total is None or total.dtype != grad.dtype:
            return False
        total.addmm_(grad.reshape(-1, total.shape[0]).T, x.reshape(-1, total.shape[1]))
        _ADDED.add(self.matrix)
        return True


_TOTALS: dict[int, Tensor] = {}  # by the weight; autograd gives its functions no other way to reach it
_ADDED: set[int] = set()


@contextmanager
def adding(totals: Mapping[nn.Parameter, Tensor]) -> Iterator[Callable[[nn.Parameter, Tensor], bool]]:
    """Inside, gradients in weights of linear layers are added to these matrices as they are formed.

    Yields:
        Tells of a weight and the gradient that was returned for it whether nothing is left to add.
    """
    outer = dict(_TOTALS), set(_ADDED)
    _TOTALS.update((id(p), total) for p, total in totals.items())
    _ADDED.difference_update(map(id, totals))
    try:
        # Anything beside what was added would not be one number repeated.
        yield lambda p, gradient: id(p) in _ADDED and not any(gradient.stride())
    finally:
        _TOTALS.clear()
        _TOTALS.update(outer[0])
        _ADDED.clear()
        _ADDED.update(outer[1])


class _Constant(torch.autograd.Function):
    """A convolution with a weight that is a constant: linear in what it reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: _Map) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.kind, ctx.shape = kind, x.shape
        return kind.multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        return _Transposed.apply(grad, weight, ctx.kind, ctx.shape), None, None


class _Transposed(torch.autograd.Function):
    """Its gradient in what it reads."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, kind: _Map, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.kind = kind
        return kind.transposed(grad, weight, shape)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        return _Constant.apply(x, weight, ctx.kind), None, None, None


@dataclass(frozen=True)
class _Map:
    """How a constant weight is multiplied with what it is given, and the transpose of that."""

    multiply: Callable[[Tensor, Tensor], Tensor]
    transposed: Callable[[Tensor, Tensor, torch.Size], Tensor]


def _reads_constant(input: Tensor, weight: Tensor) -> bool:
    return not input.requires_grad and weight.requires_grad and _alike(input, weight)


def _is_constant(input: Tensor, weight: Tensor) -> bool:
    return input.requires_grad and not weight.requires_grad and _alike(input, weight)


def _alike(input: Tensor, weight: Tensor) -> bool:
    if input.dtype != weight.dtype or not input.is_floating_point() or not weight.numel():
        return False
    # the forward pass would cast, or be transformed by vmap, out of our sight
    return not (torch.is_autocast_enabled(input.device.type) or transformed())


def _convolution(
    dims: int,
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    if isinstance(padding, str) or input.ndim != dims + 2:
        return None
    constant = _is_constant(input, weight)
    if not (constant or _reads_constant(input, weight)):
        return None
    stride, padding, dilation = (_tuple(value, dims) for value in (stride, padding, dilation))

    def multiply(x: Tensor, w: Tensor) -> Tensor:
        return function(x, w, None, stride, padding, dilation, groups)

    def backward(grad: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        options = (stride, padding, dilation, False, [0] * dims, groups)
        found = torch.ops.aten.convolution_backward(grad, x, w, None, *options, mask)
        result: Tensor = found[which]
        return result

    def blank(like: Tensor, shape: torch.Size) -> Tensor:
        return like.new_empty(1).expand(shape)  # only its shape is looked at

    found: Tensor
    if constant:
        linear = _Map(multiply, lambda grad, w, shape: backward(grad, blank(grad, shape), w, 0))
        found = _Constant.apply(input, weight, linear)
    else:
        kind = _Kind(
            multiply, lambda grad, x, shape: backward(grad, x, blank(grad, shape), 1), not weight.is_leaf
        )
        found = _Weighting.apply(weight, input, kind)
    return found if bias is None else found + bias.view(-1, *[1] * dims)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not _reads_constant(input, weight) or not weight.is_leaf or weight.ndim != 2:
        return None  # with a weight that is computed nothing would be saved

    def gradient(grad: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        return grad.reshape(-1, shape[0]).T @ x.reshape(-1, shape[1])

    found: Tensor = _Weighting.apply(weight, input, _Kind(F.linear, gradient, False, id(weight)))
    return found if bias is None else found + bias


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None or not input.requires_grad:
        return None
    if input.dtype != running_var.dtype:
        return None
    with torch.no_grad():
        scale = torch.rsqrt(running_var + eps)
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale
        shift = shift if bias is None else shift + bias
        shape = (1, -1, *[1] * (input.ndim - 2))
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


_LEAN: dict[Any, Callable[..., Tensor | None]] = {F.batch_norm: _batch_norm, F.linear: _linear}
_CONVOLUTIONS = {1: (F.conv1d, torch.conv1d), 2: (F.conv2d, torch.conv2d), 3: (F.conv3d, torch.conv3d)}
for _dims, _functions in _CONVOLUTIONS.items():
    for _function in _functions:
        _LEAN[_function] = partial(_convolution, _dims, _function)


def transformed() -> bool:
    """Whether a function is running that vmap or grad transforms."""
    return torch._C._functorch.maybe_current_level() is not None


_hooks = torch._C._autograd._top_saved_tensors_default_hooks


@contextmanager
def without_autocast(device: str) -> Iterator[None]:
    """Inside, nothing is cast on this type of device, whatever the user's code has switched on."""
    with ExitStack() as stack:
        for kind in {device, "cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class LeanDerivatives(TorchFunctionMode):
    """While active, layers that read constants and BatchNorm in eval mode have cheap second derivatives.

    Values, second derivatives in the weights of convolutions and linear layers, and derivatives in what is
    normalised are those of torch up to rounding. Parameters of BatchNorm count as constants. First
    derivatives in weights that are parameters have a graph and no value.

    Attributes:
        recomputed: Whether some part ran under hooks that make anew what is saved, as gradient checkpointing
            does; its graph must not be used outside of the mode, where it would be made in another way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recomputed = False

    def recomputing(self) -> bool:
        """Whether some part so far is made anew in the backward pass."""
        self.recomputed = self.recomputed or _hooks(False) is not None
        return self.recomputed

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        self.recomputing()
        lean = _LEAN.get(func)
        found = None if lean is None else lean(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found
