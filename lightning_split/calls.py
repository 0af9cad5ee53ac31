"""What the user's code asks of torch, where the operators below no longer tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_split.labels import LabelMode

__all__ = ["CallMode"]

_READ_OUTSIDE = {"numpy", "tolist", "__array__", "__dlpack__"}
_OUTSIDE = "their values are read outside of torch, where splitting cannot follow"


class CallMode(TorchFunctionMode):
    """Tells a :class:`LabelMode` what the operators below cannot.

    That a split comes from ``chunk``, and that values are read as NumPy arrays or Python lists.
    """

    def __init__(self, labels: LabelMode) -> None:
        super().__init__()
        self._labels = labels

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _READ_OUTSIDE and args:
            self._labels.bar([t for t in args if isinstance(t, Tensor)], _OUTSIDE)
        asked = func in (torch.chunk, Tensor.chunk, torch.tensor_split, Tensor.tensor_split)
        outer, self._labels.open_dim = self._labels.open_dim, _open_dim(func, args, kwargs or {})
        self._labels.chunks += asked
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._labels.chunks -= asked
            self._labels.open_dim = outer


def _open_dim(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The dimension of the result that a reshape leaves open (-1), if it does."""
    if getattr(func, "__name__", "") not in ("view", "reshape", "unflatten") or not args:
        return None
    values = [*args[1:], *kwargs.values()]
    lists = [v for v in values if isinstance(v, (tuple, list))]
    sizes = list(lists[0]) if lists else [v for v in values if isinstance(v, int)]
    if -1 not in sizes:
        return None
    if func.__name__ == "unflatten":
        first: int = next((v for v in values if isinstance(v, int)), 0)
        return first % int(args[0].ndim) + sizes.index(-1)
    return sizes.index(-1)
