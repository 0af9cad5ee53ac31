"""Outlines: examples whose tensors have shapes but no values, so that passes over them cost hardly any."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import CellType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

__all__ = ["Outline", "collector_paused", "quiet", "shape_only"]


_NOTHING: Mapping[str, Any] = {}


class _OutlineMode(FakeTensorMode):
    """Asks once whether there is a GPU; torch asks for every operator, and looks for the driver each time.

    Some operators have their shapes told here: torch takes several times longer for those that are cheap, and
    a millisecond with the weights of layers, which have values.
    """

    @cached_property
    def avoid_device_init(self) -> bool:
        return super().avoid_device_init

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = _NOTHING
    ) -> Any:
        shape = _SHAPES.get(func)
        if shape is not None and _alike(args):
            out = shape(*args, **(kwargs or {}))
            if out is not None:
                return out
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def _alike(args: Sequence[Any]) -> bool:
    """Whether all tensors are of one kind, as ordinary layers have them; others may be an error."""
    first, *rest = [t for t in args if isinstance(t, Tensor)]
    return first.dtype in (torch.float32, torch.float64) and all(
        t.dtype == first.dtype and t.device == first.device for t in rest
    )


def _pointwise(*args: Any, **kwargs: Any) -> Tensor | None:
    """For dense tensors; of others the result has strides of its own."""
    tensors = [t for t in args if isinstance(t, Tensor)]
    if not all(t.is_contiguous() for t in tensors) or not _real(args, kwargs):
        return None
    first = tensors[0].shape
    same = all(t.shape == first for t in tensors[1:])
    return _like(tensors, first if same else torch.broadcast_shapes(*(t.shape for t in tensors)))


def _in_place(target: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    tensors = [t for t in args if isinstance(t, Tensor)]
    fits = shape_only(target) and all(t.shape == target.shape for t in tensors) and _real(args, kwargs)
    return target if fits else None


def _real(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether no number among the arguments makes the result complex."""
    return not any(isinstance(a, complex) for a in (*args, *kwargs.values()))


def _new_empty(x: Tensor, size: Sequence[int], **kwargs: Any) -> Tensor | None:
    if not shape_only(x) or any(kwargs.values()):
        return None
    return _like((x,), tuple(size))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor | None:
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and bias.shape == b.shape[1:]
    return _like((bias, a, b), (a.shape[0], b.shape[1])) if fits else None


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...] | None:
    shape = tuple(shape)
    if x.shape[x.ndim - len(shape) :] != shape or any(
        t is not None and t.shape != shape for t in (weight, bias)
    ):
        return None
    tensors = [t for t in (x, weight, bias) if t is not None]
    statistics = (*x.shape[: x.ndim - len(shape)], *[1] * len(shape))
    return _like(tensors, x.shape), _like(tensors, statistics), _like(tensors, statistics)


def _like(tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """An outline of this shape, made by one of the tensors that is one."""
    like: Any = next(t for t in tensors if shape_only(t))
    return FakeTensor(like.fake_mode, torch.empty(shape, dtype=like.dtype, device="meta"), like.device)


_aten = torch.ops.aten
_UNARY = (
    "silu",
    "relu",
    "sigmoid",
    "tanh",
    "gelu",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "elu",
    "leaky_relu",
)
_SHAPES: dict[Any, Callable[..., Any]] = {
    _aten.addmm.default: _addmm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.new_empty.default: _new_empty,
    **{getattr(_aten, name).default: _pointwise for name in _UNARY},
    **{getattr(_aten, f"{name}_").default: _in_place for name in _UNARY},
    **{getattr(_aten, name).Tensor: _pointwise for name in ("add", "sub", "mul", "div")},
    **{getattr(_aten, f"{name}_").Tensor: _in_place for name in ("add", "sub", "mul", "div")},
}


class Outline:
    """An example without values.

    A pass over it computes nothing and takes no memory; operators whose result depends on a value raise an
    error. What a pass makes without reading these tensors (a table of positions, kept for later) is real.

    Attributes:
        example: The same nested tuples, lists and dicts with tensors that have shapes but no values.
    """

    def __init__(self, example: Any) -> None:
        mode = _OutlineMode(allow_non_fake_inputs=True)

        def hollow(tensor: Tensor) -> Tensor:
            fake: Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
            return fake.requires_grad_(tensor.requires_grad)

        self.example = tree_map_only(Tensor, hollow, example)
        self._made: list[weakref.ref[Tensor]] = []

    def follow(self, output: Any) -> None:
        """Take note of what an operator made, so that nothing of it stays."""
        if type(output) is FakeTensor:
            self._made.append(weakref.ref(output))

    def forget(self) -> None:
        """Empty the caches (dicts, lists, ``lru_cache``) outside of the model that passes have filled."""
        if any(ref() is not None for ref in self._made):
            gc.collect()  # of cycles: the frames of an error
        for ref in self._made:
            tensor = ref()
            if tensor is not None:
                _clear_lru(tensor)
                for holder in gc.get_referrers(tensor):
                    _drop(holder, tensor)


@contextmanager
def collector_paused(pause: bool = True) -> Iterator[None]:
    """Pause Python's cyclic garbage collector, whose full collections take long beside a large model.

    For passes over outlines, which make many objects and hold no memory worth speaking of.
    """
    before = gc.isenabled()
    if pause:
        gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from printing the errors of passes over outlines, which are answers and no accidents."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def shape_only(tensor: Tensor) -> bool:
    """Whether a tensor has no values."""
    return isinstance(tensor, FakeTensor)


def _drop(holder: Any, tensor: Tensor) -> None:
    if isinstance(holder, MutableMapping):
        for key in [k for k, v in holder.items() if v is tensor]:
            if "__spec__" in holder:
                holder[key] = None  # a global variable
            else:
                del holder[key]
    elif isinstance(holder, (list, deque)):
        kept = [item for item in holder if item is not tensor]
        holder.clear()
        holder.extend(kept)
    elif isinstance(holder, CellType):
        holder.cell_contents = None


def _clear_lru(tensor: Tensor) -> None:
    held: list[Any] = [tensor]
    for _ in range(4):  # the result, its link in the list, the dict of links, the wrapped function
        held = [h for item in held for h in gc.get_referrers(item) if _part_of_lru(h)]
        for holder in held:
            if hasattr(holder, "cache_clear"):
                holder.cache_clear()
                return


def _part_of_lru(holder: Any) -> bool:
    return type(holder).__module__ == "functools" or type(holder) is dict
