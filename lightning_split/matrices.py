"""Which tensors are raw matrices: parameters that the code multiplies activations with by itself.

They belong to a module without a rule, or to a layer that lends them (:mod:`lightning_split.borrowed`). Where
the code transposes one, picks an entry of it or copies it, the result is followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_split.borrowed import Lending, Lent, lending
from lightning_split.layers import Port, port_kind
from lightning_split.loose import loose_port, loose_tensors

__all__ = ["Matrix", "Owner", "Sites", "Weights", "turns"]

Owner = tuple[str, str]  # path of a module, name of its parameter


class Matrix(NamedTuple):
    """A raw matrix as it stands in a call."""

    owner: Owner
    axes: tuple[int | None, ...]  # the parameter's along each dimension; None along one that was added


class Sites(NamedTuple):
    """The ports on which a product reads and makes neurons."""

    reads: list[tuple[int, tuple[str, Port]]]  # each with the axis of what is read
    made: tuple[str, Port] | None


class Weights:
    """The parameters of a model that may be multiplied with.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, Owner] = {}
        self._lent: dict[str, Lending] = {}
        self._views: WeakIdKeyDictionary = WeakIdKeyDictionary()  # transposed, picked and copied matrices
        for path, module in model.named_modules():
            self._lent[path] = lending(module)
            mine = [*loose_tensors(module), *self._lent[path]]
            for name, t in module._parameters.items():
                if name in mine and t is not None and t.is_floating_point():
                    self._owners[id(t)] = (path, name)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._owners)

    def whose(self, tensor: Any) -> Matrix | None:
        """Which matrix this is."""
        if not isinstance(tensor, Tensor):
            return None
        owner = self._owners.get(id(tensor))
        if owner is not None:
            return Matrix(owner, tuple(range(tensor.ndim)))
        found: Matrix | None = self._views.get(tensor)
        return found

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Take note of what such a function (:func:`turns`) has made of a matrix."""
        found = self.whose(args[0]) if args else None
        if found is None:
            return
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if func.__name__ in _KEEPS:
                dims = _same_order(args[0].shape, part.shape)
            else:
                dims = _moved(func, args, kwargs, part.shape)
            if dims is not None:
                axes = tuple(None if d is None else found.axes[d] for d in dims)
                self._views[part] = Matrix(found.owner, axes)

    def lent(self, owner: Owner, axis: int | None, kind: str) -> Lent | None:
        """What lies along the axis of a layer's tensor, if it is of that kind."""
        found = self._lent[owner[0]].get(owner[1], {}).get(-1 if axis is None else axis)
        return found if found is not None and port_kind(found.port) == kind else None

    def has_bias(self, owner: Owner, bias: Tensor | None) -> bool:
        """Whether this is the bias that the layer itself would add."""
        found = None if bias is None or bias.ndim != 1 else self._owners.get(id(bias))
        return found is not None and found[0] == owner[0] and self.lent(found, 0, "out") is not None

    def sites(
        self, owner: Owner, reads: Sequence[tuple[int, int]], make: int | None, groups: int
    ) -> Sites | None:
        """Where a product reads and makes neurons; ``None`` if the layer, whose matrix it is, would not.

        Args:
            owner: Whose matrix it is.
            reads: Axes of what is read, each with the parameter's over which it is summed.
            make: The parameter's axis along which neurons are made.
            groups: Into which the channels are cut.
        """
        path, name = owner
        if name not in self._lent[path]:  # a parameter that no rule speaks of
            made = None if make is None else (path, loose_port(name, make, "out"))
            return Sites([(axis, (path, loose_port(name, row, "in"))) for axis, row in reads], made)
        makes = self.lent(owner, make, "out")
        found = [self.lent(owner, row, "in") for _, row in reads]
        known = [one for one in (*found, makes) if one is not None and one.multiple == 1]
        if makes is None or len(known) <= len(found) or max(one.tiles for one in known) != groups:
            return None
        ports = [(axis, (path, one.port)) for (axis, _), one in zip(reads, known, strict=False)]
        return Sites(ports, (path, makes.port))


def turns(func: Any) -> bool:
    """Whether a function transposes, picks or copies, so that a matrix is still one."""
    name = getattr(func, "__name__", "")
    return name in _MOVES or name in _KEEPS or func in _TURNING


def _same_order(old: Sequence[int], new: Sequence[int]) -> list[int | None] | None:
    """For each new dimension the old one, if nothing but dimensions of size one comes and goes."""
    if tuple(old) == tuple(new):
        return list(range(len(old)))
    left = [d for d, n in enumerate(old) if n != 1]
    if [old[d] for d in left] != [n for n in new if n != 1]:
        return None
    order = iter(left)
    return [None if n == 1 else next(order) for n in new]


def _moved(func: Any, args: Any, kwargs: Any, shape: Sequence[int]) -> list[int | None] | None:
    """The same where they change places, or entries along them are picked."""
    old: Sequence[int] = args[0].shape
    base = 2 + max(old, default=0)
    sizes = [1 if n == 1 and func.__name__ == "squeeze" else base + d for d, n in enumerate(old)]
    try:
        with torch._C._DisableTorchDispatch():  # the same with sizes that tell the dimensions apart
            coded = func(torch.empty(sizes, device="meta"), *args[1:], **kwargs)
    except Exception:
        return None  # picked by another tensor, say
    coded = coded if isinstance(coded, Tensor) else coded[0]
    dims = [None if n == 1 else n - base for n in coded.shape]
    if any(d is not None and not 0 <= d < len(old) for d in dims):  # a slice
        return None
    same = [1 if d is None else old[d] for d in dims] == list(shape)
    return dims if same else None


# What moves the dimensions of a matrix or picks along them, and what leaves them in their order.
_MOVES = {"t", "transpose", "swapaxes", "swapdims", "adjoint", "permute", "movedim", "moveaxis"}
_MOVES |= {"squeeze", "unsqueeze", "__getitem__", "select", "unbind"}
_TURNING = (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
_KEEPS = {"view", "reshape", "flatten", "contiguous", "clone", "to", "type_as"}
_KEEPS |= {"float", "double", "half", "bfloat16"}
