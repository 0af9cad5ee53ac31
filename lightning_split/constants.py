"""Tensors made from nothing: which are the same everywhere, which are random, who else sees their memory.

Zeros that a recurrent network starts from, a mask of ones, a filter repeated for every channel: along an
axis on which such a tensor is constant it does not matter how many neurons there are. What counts is how a
tensor was made, never its values.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

__all__ = ["DRAWN", "Constants", "is_pointwise", "storage_key"]

_FILLED = {"zeros", "ones", "full", "scalar_tensor", "new_zeros", "new_ones", "new_full"}
_FILLED |= {"zeros_like", "ones_like", "full_like"}
_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
# Operators that draw random numbers, but for dropout.
DRAWN = {"rand", "randn", "randint", "normal", "poisson", "_standard_gamma", "rand_like", "randn_like"}
DRAWN |= {"randint_like", "multinomial", "binomial"}
DRAWN |= {
    f"{n}_" for n in ("normal", "uniform", "exponential", "cauchy", "log_normal", "geometric", "random")
}
_COPIED = {"clone", "_to_copy", "contiguous"}


@dataclass
class _Memory:
    """What is known of memory that an operator allocated."""

    storage: StorageWeakRef
    owner: weakref.ref[Tensor]
    same: bool = False  # all elements are equal
    along: Sequence[bool] = ()  # along which dimensions of the owner elements are equal
    drawn: bool = False  # random numbers have a part in it; if they are also the same, those of dropout
    mixed: bool = False  # and so have other values
    blank: bool = False  # nothing was written into it since it was made, or always the same everywhere
    views: list[weakref.ref[Tensor]] = field(default_factory=list)


class Constants:
    """Follows tensors that no neuron and no sample has a part in, from the operator that made them."""

    def __init__(self) -> None:
        self._memories: dict[int, _Memory] = {}

    def flat(self, tensor: Tensor) -> list[bool]:
        """For each dimension, whether the elements along it are equal by construction."""
        memory = self._find(tensor)
        if memory is not None and memory.same:
            return [True] * tensor.ndim
        dims = [stride == 0 for stride in _strides(tensor)]
        if memory is not None and memory.along and memory.owner() is tensor:
            dims = [a or b for a, b in zip(dims, memory.along, strict=True)]
        return dims

    def uniform(self, tensor: Tensor) -> bool:
        """Whether all elements are equal, however many there are."""
        memory = self._find(tensor)
        return memory is not None and memory.same and not memory.drawn

    def drawn(self, tensor: Tensor) -> bool:
        """Whether random numbers have a part in the elements."""
        memory = self._find(tensor)
        return memory is not None and memory.drawn

    def noise(self, tensor: Tensor) -> bool:
        """Whether the elements are random numbers, or made of those alone."""
        memory = self._find(tensor)
        return memory is not None and memory.drawn and not memory.mixed

    def sharing(self, tensor: Tensor) -> list[Tensor] | None:
        """All tensors in memory that nothing was written into yet; ``None`` if there may be others."""
        memory = self._find(tensor)
        if memory is None or not memory.blank:
            return None
        if memory.owner() is None and not _covers(tensor):
            return None
        return [t for ref in (memory.owner, *memory.views) if (t := ref()) is not None]

    def forget(self, tensor: Tensor) -> None:
        """Nothing is known of these values: a layer made them."""
        key = storage_key(tensor)
        if key is not None:
            self._memories.pop(key, None)

    def follow(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Take note of what an operator made or changed."""
        inputs = [t for t in tree_leaves((list(args), kwargs)) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        if func._schema.is_mutable:
            if torch.Tag.inplace_view not in func.tags:
                self._note_write(func, name, args, inputs)
            return
        for t in tree_leaves(out):
            if not isinstance(t, Tensor) or (key := storage_key(t)) is None:
                continue
            memory = self._find(t)
            if memory is not None:
                memory.views.append(weakref.ref(t))
                continue
            along = self._constant_along(func, name, args, inputs, t)
            drawn = name in DRAWN or (bool(inputs) and any(map(self.drawn, inputs)) and is_pointwise(func))
            if name in _EMPTY or name in _FILLED or drawn or any(along):
                # A single value may be a neuron's: what is computed of it is constant only along axes.
                same = name in _FILLED or (bool(all(along)) and bool(inputs) and all(map(self._same, inputs)))
                self._memories[key] = _Memory(
                    StorageWeakRef(t.untyped_storage()),
                    weakref.ref(t),
                    same=same,
                    along=along,
                    drawn=drawn,
                    mixed=name not in DRAWN and not all(map(self._made_up, inputs)),
                    blank=name in _EMPTY or (same and not drawn),
                )
        if len(self._memories) > 1000:
            self._memories = {k: m for k, m in self._memories.items() if not m.storage.expired()}

    def _constant_along(
        self, func: Any, name: str, args: Sequence[Any], inputs: list[Tensor], out: Tensor
    ) -> list[bool]:
        """The dimensions along which an operator's result in new memory is constant."""
        if name in _FILLED:
            return [True] * out.ndim
        if name in DRAWN or not inputs:
            return [False] * out.ndim
        if name == "repeat":
            new = out.ndim - inputs[0].ndim
            once = [n == 1 < m for n, m in zip(inputs[0].shape, out.shape[new:], strict=True)]
            return [True] * new + [a or b for a, b in zip(once, self.flat(inputs[0]), strict=True)]
        if name in {"cat", "stack"} and len(inputs) > 1 and all(t is inputs[0] for t in inputs):
            dim = (args[1] if len(args) > 1 else 0) % out.ndim
            dims = self.flat(inputs[0])
            if name == "stack":
                dims.insert(dim, True)
            else:
                dims[dim] = dims[dim] or inputs[0].shape[dim] == 1
            return dims
        if name not in _COPIED and not is_pointwise(func):
            return [False] * out.ndim
        dims = [True] * out.ndim
        for t in inputs:
            if t.ndim > out.ndim:
                return [False] * out.ndim
            new = out.ndim - t.ndim
            for d, (n, flat) in enumerate(zip(t.shape, self.flat(t), strict=True), new):
                dims[d] = dims[d] and (flat or n == 1 < out.shape[d])
        return dims

    def _note_write(self, func: Any, name: str, args: Sequence[Any], inputs: list[Tensor]) -> None:
        written = {
            id(args[i])
            for i, a in enumerate(func._schema.arguments[: len(args)])
            if a.alias_info is not None and a.alias_info.is_write
        }
        for t in inputs:
            memory = self._find(t) if id(t) in written or not written else None
            if memory is None:
                continue
            others = [o for o in inputs if o is not t]
            constant = all(map(self._same, others))
            mixed = not all(map(self._made_up, others))
            if name == "bernoulli_":
                same, drawn, mixed = (
                    not others,
                    True,
                    False,
                )  # dropout: each neuron has a fate of its own, by design
            elif name in DRAWN:
                same, drawn, mixed = False, True, False
            elif name in {"fill_", "zero_", "copy_"}:
                same, drawn = constant, any(map(self.drawn, others))
            else:
                same = memory.same and constant and is_pointwise(func)
                drawn = memory.drawn or any(map(self.drawn, others))
                mixed = memory.mixed or mixed
            memory.mixed = mixed
            memory.same, memory.drawn, memory.along = same and _covers(t), drawn, ()
            memory.blank = memory.same and not drawn

    def _made_up(self, tensor: Tensor) -> bool:
        """Whether nothing but constants and random numbers has a part in it."""
        return self._same(tensor) or self.noise(tensor)

    def _same(self, tensor: Tensor) -> bool:
        memory = self._find(tensor)
        return memory is not None and memory.same

    def _find(self, tensor: Tensor) -> _Memory | None:
        key = storage_key(tensor) if self._memories else None
        memory = None if key is None else self._memories.get(key)
        return memory if memory is None or not memory.storage.expired() else None


def is_pointwise(func: Any) -> bool:
    """Whether an operator works element by element (also if only another overload is tagged so)."""
    if torch.Tag.pointwise in func.tags:
        return True
    name = func.overloadpacket.__name__
    if not name.endswith("_") or name.startswith("_"):
        return False
    packet = getattr(torch.ops.aten, name[:-1], None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads() if "out" not in o
    )


def storage_key(tensor: Tensor) -> int | None:
    """The identity of a tensor's memory, if it has any of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors, and those of torch.func
        return None


def _strides(tensor: Tensor) -> Sequence[int]:
    try:
        return tensor.stride()
    except (NotImplementedError, RuntimeError):
        return [1] * tensor.ndim


def _covers(tensor: Tensor) -> bool:
    return bool(tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes())
