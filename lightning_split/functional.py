"""Raw matrices: parameters of modules without a rule that a forward pass multiplies activations with.

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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_split.layers import Port
from lightning_split.loose import loose_port, loose_tensors

__all__ = ["RawMatrices", "Reading", "port_of", "raw_matrices"]

Owner = tuple[str, str]


class Matrix(NamedTuple):
    """A raw matrix as it stands in a call."""

    owner: Owner
    turned: bool = False  # whether its last two axes are exchanged
    picked: int = 0  # number of leading axes along which one entry was picked, that of an expert, say


class Reading(NamedTuple):
    """A call that multiplies neurons with a raw matrix."""

    owner: Owner
    x: Tensor
    reads: tuple[tuple[int, int], ...]  # an axis of x that is summed, and the matrix's: neurons lie on one
    make: int | None  # and makes some; None for a vector
    out: int  # axis of the result along which neurons are made
    fan: int  # number of the matrix's entries that go into one element of the result
    call: Callable[[Tensor], Tensor]  # with what was read
    bias: Tensor | None = None  # added to the result


def raw_matrices(model: nn.Module) -> dict[int, Owner]:
    """The loose parameters that may be multiplied with, by identity."""
    return {
        id(tensor): (path, name)
        for path, module in model.named_modules()
        for name, tensor in loose_tensors(module).items()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    }


class RawMatrices(TorchFunctionMode):
    """Tells when a raw matrix is multiplied with activations.

    Args:
        owners: :func:`raw_matrices` of the model.
        through: Runs such a call, with neurons read before it and made after it.
    """

    def __init__(self, owners: dict[int, Owner], through: Callable[[Reading], Tensor | None]) -> None:
        super().__init__()
        self._owners = owners
        self._through = through
        self._views: WeakIdKeyDictionary = WeakIdKeyDictionary()  # transposed and picked matrices

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _TURNS or func in _TURNING:
            out = func(*args, **kwargs)
            matrix: Any = args[0] if args else None
            found = self.whose(matrix)
            if found is not None and matrix.ndim > 1 and _turns(matrix, out):
                self._views[out] = found._replace(turned=not found.turned)
            return out
        if name in _PICKS:
            return self._picked(func(*args, **kwargs), args)
        reader = _READERS.get(name)
        reading = reader(self, func, *args, **kwargs) if reader is not None else None
        done = None if reading is None else self._through(reading)
        if done is None:
            return func(*args, **kwargs)
        return done if reading is None or reading.bias is None else done + reading.bias

    def whose(self, tensor: Any) -> Matrix | None:
        """Which matrix this is."""
        if not isinstance(tensor, Tensor):
            return None
        owner = self._owners.get(id(tensor))
        if owner is not None:
            return Matrix(owner)
        found: Matrix | None = self._views.get(tensor)
        return found

    def _picked(self, out: Any, args: Any) -> Any:
        """Take note of one entry along the first axis of a matrix, or of all of them one by one."""
        found = self.whose(args[0]) if args else None
        if found is not None and not found.turned:
            for part in out if isinstance(out, tuple) else (out,):
                if (
                    part.shape == args[0].shape[1:]
                    and part.ndim > 1
                    and part.stride() == args[0].stride()[1:]
                ):
                    self._views[part] = found._replace(picked=found.picked + 1)
        return out


def _turns(matrix: Tensor, view: Tensor) -> bool:
    """Whether a view has the last two axes exchanged, and no others."""
    sizes, strides = matrix.shape, matrix.stride()
    return (*view.shape, *view.stride()) == (
        *(*sizes[:-2], sizes[-1], sizes[-2]),
        *(*strides[:-2], strides[-1], strides[-2]),
    )


def port_of(kind: str, owner: Owner, axis: int) -> tuple[str, Port]:
    """The port on which a raw matrix reads or makes neurons."""
    path, name = owner
    return path, loose_port(name, axis, kind)


def _linear(mode: RawMatrices, func: Any, input: Any, weight: Any, bias: Any = None) -> Reading | None:
    found = mode.whose(weight)
    if found is None or weight.ndim != 2 or mode.whose(input) is not None:
        return None
    read, make = found.picked + 1 - found.turned, found.picked + found.turned
    fan = weight.shape[-1]
    return Reading(found.owner, input, ((-1, read),), make, -1, fan, lambda x: func(x, weight), bias)


def _matmul(mode: RawMatrices, func: Any, *args: Any, **kwargs: Any) -> Reading | None:
    if len(args) != 2 or kwargs or not all(isinstance(t, Tensor) for t in args):
        return None
    left, right = args
    first, second = map(mode.whose, args)
    if first is not None and second is None and left.ndim > 1 and right.ndim:
        return _from_the_left(first, left, right, lambda x: func(left, x))
    if second is None or first is not None or not left.ndim:
        return None
    return _product(second, left, right, lambda x: func(x, right))


def _from_the_left(found: Matrix, weight: Tensor, x: Tensor, call: Callable[[Tensor], Tensor]) -> Reading:
    """``weight @ x``: what is read lies along the last axis but one, as what is made does."""
    make, read = weight.ndim - 2, weight.ndim - 1
    if found.turned:
        read, make = make, read
    axis = -2 if x.ndim > 1 else -1
    reads = ((axis, read + found.picked),)
    return Reading(found.owner, x, reads, make + found.picked, axis, weight.shape[-1], call)


def _added(
    mode: RawMatrices, func: Any, input: Any, *factors: Any, beta: Any = 1, alpha: Any = 1, **named: Any
) -> Reading | None:
    factors += tuple(named[name] for name in ("mat1", "mat2", "batch1", "batch2") if name in named)
    if len(factors) != 2 or "out" in named or (beta, alpha) != (1, 1):
        return None
    x, weight = factors
    found = mode.whose(weight)
    if found is None or mode.whose(x) is not None:
        return None
    return _product(found, x, weight, lambda x: torch.matmul(x, weight), input)


def _product(
    found: Matrix,
    x: Tensor,
    weight: Tensor,
    call: Callable[[Tensor], Tensor],
    bias: Tensor | None = None,
) -> Reading:
    """A vector, a matrix, or one matrix for each entry of the batch (the experts of a mixture)."""
    read, make = max(0, weight.ndim - 2), weight.ndim - 1
    if found.turned:
        read, make = make, read
    fan = weight.shape[-2] if weight.ndim > 1 else len(weight)
    makes = None if weight.ndim == 1 else make + found.picked
    return Reading(found.owner, x, ((-1, read + found.picked),), makes, -1, fan, call, bias)


def _conv(
    mode: RawMatrices,
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Reading | None:
    found = mode.whose(weight)
    if found is None or found.turned or groups != 1 or mode.whose(input) is not None:
        return None
    axis = 1 - weight.ndim
    if bias is not None:
        bias = bias.view(-1, *[1] * (weight.ndim - 2))
    rest = stride, padding, dilation, groups
    fan = weight.numel() // len(weight)
    reads = ((axis, found.picked + 1),)
    return Reading(
        found.owner, input, reads, found.picked, axis, fan, lambda x: func(x, weight, None, *rest), bias
    )


def _einsum(mode: RawMatrices, func: Any, *args: Any, **kwargs: Any) -> Reading | None:
    if len(args) == 2 and isinstance(args[1], (list, tuple)):
        args = args[0], *args[1]
    if len(args) != 3 or not isinstance(args[0], str) or kwargs or "->" not in args[0]:
        return None
    terms, out = _spelled_out(args[0], args[1:]).split("->")
    for n in (0, 1):
        x, weight = args[2 - n], args[1 + n]
        found = mode.whose(weight)
        if found is None or found.turned or mode.whose(x) is not None:
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

        make = of_weight.index(new[-1]) + found.picked if new else None
        at = out.index(new[-1]) if new else 0
        reads = tuple((of_x.index(c), of_weight.index(c) + found.picked) for c in gone)
        fan = math.prod(weight.shape[of_weight.index(c)] for c in gone)
        return Reading(found.owner, x, reads, make, at, fan, call)
    return None


def _tensordot(
    mode: RawMatrices, func: Any, a: Any, b: Any, dims: Any = 2, out: Any = None
) -> Reading | None:
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
    return _einsum(mode, torch.einsum, f"{first},{second}->{left}", a, b)


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


_TURNS = {"t", "transpose", "swapaxes", "swapdims", "movedim", "permute", "adjoint"}
_PICKS = {"__getitem__", "select", "unbind"}
_TURNING = (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
_READERS: dict[str, Callable[..., Reading | None]] = {
    "linear": _linear,
    **dict.fromkeys(["matmul", "__matmul__", "mm", "mv", "bmm"], _matmul),
    **dict.fromkeys(["addmm", "baddbmm"], _added),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _conv),
    "einsum": _einsum,
    "tensordot": _tensordot,
}
