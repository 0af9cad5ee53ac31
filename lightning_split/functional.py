"""Raw matrices: weights that a forward pass multiplies activations with by itself, and not through a layer.

``x @ self.weight``, ``self.weight @ x``, ``F.linear(x, self.weight)``, ``F.conv2d(x, self.weight)`` and
``torch.einsum`` with such a matrix read neurons along one of its axes and make neurons along another, like a
layer. Which axes those are shows in the call.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_split.matrices import Matrix, Owner, Weights, turns

__all__ = ["RawMatrices", "Reading"]


class Reading(NamedTuple):
    """A call that multiplies neurons with a raw matrix."""

    owner: Owner
    x: Tensor
    reads: tuple[tuple[int, int], ...]  # an axis of x that is summed, and the matrix's: neurons lie on one
    make: int | None  # and makes some; None for a vector
    out: int  # axis of the result along which neurons are made
    fan: int  # number of the matrix's entries that one element of the result is made of
    call: Callable[[Tensor], Tensor]  # with what was read
    bias: Tensor | None = None  # added to the result
    groups: int = 1  # into which the channels are cut
    spreads: bool = False  # it is the elements of x that meet so many entries each

    def count(self, output: Tensor) -> int:
        """Multiply-accumulates of the call."""
        return (self.x if self.spreads else output).numel() * self.fan


class RawMatrices(TorchFunctionMode):
    """Tells when a raw matrix is multiplied with activations.

    Args:
        weights: Those of the model.
        through: Runs such a call, with neurons read before it and made after it.
    """

    def __init__(self, weights: Weights, through: Callable[[Reading], Tensor | None]) -> None:
        super().__init__()
        self._weights = weights
        self._through = through

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if turns(func):
            out = func(*args, **kwargs)
            self._weights.follow(func, args, kwargs, out)
            return out
        reader = _READERS.get(name)
        reading = reader(self._weights, func, *args, **kwargs) if reader is not None else None
        done = None if reading is None else self._through(reading)
        if done is None:
            return func(*args, **kwargs)
        return done if reading is None or reading.bias is None else done + reading.bias


def _linear(weights: Weights, func: Any, input: Any, weight: Any, bias: Any = None) -> Reading | None:
    found = weights.whose(weight)
    if found is None or weight.ndim != 2 or weights.whose(input) is not None:
        return None
    make, read = found.axes
    own = bias if weights.has_bias(found.owner, bias) else None
    rest = None if own is not None else bias
    return _reading(
        found, input, ((-1, read),), make, -1, weight.shape[-1], lambda x: func(x, weight, own), rest
    )


def _reading(
    found: Matrix,
    x: Tensor,
    reads: Sequence[tuple[int, int | None]],
    make: int | None,
    out: int,
    fan: int,
    call: Callable[[Tensor], Tensor],
    bias: Tensor | None = None,
) -> Reading | None:
    """The reading, unless something is summed that is no axis of the parameter."""
    known = tuple((axis, row) for axis, row in reads if row is not None)
    if len(known) < len(reads):
        return None
    return Reading(found.owner, x, known, make, out, fan, call, bias)


def _matmul(weights: Weights, func: Any, *args: Any, **kwargs: Any) -> Reading | None:
    if len(args) != 2 or kwargs or not all(isinstance(t, Tensor) for t in args):
        return None
    left, right = args
    first, second = map(weights.whose, args)
    if first is not None and second is None and left.ndim and right.ndim:
        return _from_the_left(first, left, right, lambda x: func(left, x))
    if second is None or first is not None or not left.ndim:
        return None
    return _product(second, left, right, lambda x: func(x, right))


def _from_the_left(
    found: Matrix, weight: Tensor, x: Tensor, call: Callable[[Tensor], Tensor]
) -> Reading | None:
    """``weight @ x``: what is read lies along the last axis but one, as what is made does."""
    axis = -2 if x.ndim > 1 else -1
    make = found.axes[-2] if weight.ndim > 1 else None
    return _reading(found, x, ((axis, found.axes[-1]),), make, axis, weight.shape[-1], call)


def _added(
    weights: Weights, func: Any, input: Any, *factors: Any, beta: Any = 1, alpha: Any = 1, **named: Any
) -> Reading | None:
    factors += tuple(named[name] for name in ("mat1", "mat2", "batch1", "batch2") if name in named)
    if len(factors) != 2 or "out" in named or (beta, alpha) != (1, 1):
        return None
    x, weight = factors
    found = weights.whose(weight)
    if found is None or weights.whose(x) is not None:
        return None
    if weights.has_bias(found.owner, input):
        return _product(found, x, weight, lambda x: torch.matmul(x, weight) + input)
    return _product(found, x, weight, lambda x: torch.matmul(x, weight), input)


def _product(
    found: Matrix,
    x: Tensor,
    weight: Tensor,
    call: Callable[[Tensor], Tensor],
    bias: Tensor | None = None,
) -> Reading | None:
    """A vector, a matrix, or one matrix for each entry of the batch (the experts of a mixture)."""
    *_, read, make = (None, found.axes[0], None) if weight.ndim == 1 else found.axes
    fan = weight.shape[-2] if weight.ndim > 1 else len(weight)
    return _reading(found, x, ((-1, read),), make, -1, fan, call, bias)


def _conv(
    weights: Weights,
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Reading | None:
    rest = stride, padding, dilation, groups
    return _convolved(weights, func, input, weight, bias, rest, groups, transposed=False)


def _conv_transpose(
    weights: Weights,
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Reading | None:
    rest = stride, padding, output_padding, groups, dilation
    return _convolved(weights, func, input, weight, bias, rest, groups, transposed=True)


def _convolved(
    weights: Weights,
    func: Any,
    x: Any,
    weight: Any,
    bias: Any,
    rest: Any,
    groups: int,
    transposed: bool,
) -> Reading | None:
    found = weights.whose(weight)
    if found is None or weights.whose(x) is not None:
        return None
    make, read = found.axes[1::-1] if transposed else found.axes[:2]
    if groups != 1 and weights.lent(found.owner, make, "out") is None:
        return None
    axis, own = 1 - weight.ndim, None
    if weights.has_bias(found.owner, bias):
        own, bias = bias, None
    elif bias is not None:
        bias = bias.view(-1, *[1] * (weight.ndim - 2))
    fan = weight.numel() // len(weight)
    reading = _reading(
        found, x, ((axis, read),), make, axis, fan, lambda x: func(x, weight, own, *rest), bias
    )
    return None if reading is None else reading._replace(groups=groups, spreads=transposed)


def _einsum(weights: Weights, func: Any, *args: Any, **kwargs: Any) -> Reading | None:
    if len(args) == 2 and isinstance(args[1], (list, tuple)):
        args = args[0], *args[1]
    if len(args) != 3 or not isinstance(args[0], str) or kwargs or "->" not in args[0]:
        return None
    terms, out = _spelled_out(args[0], args[1:]).split("->")
    for n in (0, 1):
        x, weight = args[2 - n], args[1 + n]
        found = weights.whose(weight)
        if found is None or weights.whose(x) is not None:
            continue
        of_weight, of_x = terms.split(",")[n], terms.split(",")[1 - n]
        if "." in terms or len(set(of_weight)) < len(of_weight) or len(set(of_x)) < len(of_x):
            return None
        gone = [c for c in of_weight if c in of_x and c not in out]
        new = [c for c in of_weight if c not in of_x]
        if not gone or any(c not in out for c in new):
            return None

        def call(read: Tensor, first: int = n, weight: Tensor = weight) -> Tensor:
            result: Tensor = func(args[0], *((weight, read) if first == 0 else (read, weight)))
            return result

        make = found.axes[of_weight.index(new[-1])] if new else None
        at = out.index(new[-1]) if new else 0
        reads = tuple((of_x.index(c), found.axes[of_weight.index(c)]) for c in gone)
        fan = math.prod(weight.shape[of_weight.index(c)] for c in gone)
        return _reading(found, x, reads, make, at, fan, call)
    return None


def _tensordot(weights: Weights, func: Any, a: Any, b: Any, dims: Any = 2, out: Any = None) -> Reading | None:
    """As an einsum."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or isinstance(dims, Tensor) or out is not None:
        return None
    over = (range(a.ndim - dims, a.ndim), range(dims)) if isinstance(dims, int) else dims
    gone = dict(
        zip(*([d % t.ndim for d in ds] for t, ds in zip((b, a), over[::-1], strict=True)), strict=True)
    )
    first = string.ascii_letters[: a.ndim]
    rest = iter(string.ascii_letters[a.ndim :])
    second = "".join(first[gone[d]] if d in gone else next(rest) for d in range(b.ndim))
    left = "".join(c for c in first + second if (c in first) != (c in second))
    return _einsum(weights, torch.einsum, f"{first},{second}->{left}", a, b)


def _spelled_out(equation: str, operands: Sequence[Tensor]) -> str:
    """The equation with a letter for each axis that ``...`` stands for, which are counted from the last."""
    left, out = equation.replace(" ", "").split("->")
    terms = left.split(",")
    covers = [t.ndim - len(term.replace("...", "")) for t, term in zip(operands, terms, strict=False)]
    free = [c for c in string.ascii_letters if c not in equation]
    letters = "".join(free[: max(0, *covers)])
    spelled = ",".join(
        term.replace("...", letters[len(letters) - n :]) for n, term in zip(covers, terms, strict=False)
    )
    return f"{spelled}->{out.replace('...', letters)}"


_READERS: dict[str, Callable[..., Reading | None]] = {
    "linear": _linear,
    **dict.fromkeys(["matmul", "__matmul__", "mm", "mv", "bmm"], _matmul),
    **dict.fromkeys(["addmm", "baddbmm"], _added),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _conv),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _conv_transpose),
    "einsum": _einsum,
    "tensordot": _tensordot,
}
