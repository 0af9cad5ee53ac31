"""Taking samples out of batches of any make, and putting those of several batches together."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Picked", "UnlikeError", "joined", "picked"]


class UnlikeError(ValueError):
    """Samples of different batches do not fit into one."""


@dataclass(frozen=True)
class Picked:
    """Some samples of a batch."""

    batch: Any
    which: Tensor  # their numbers
    size: int  # samples in the batch


def joined(parts: Sequence[Picked], size: int) -> list[tuple[Any, list[int]]]:
    """Batches of at least so many samples, smaller ones only where samples do not fit together.

    Args:
        parts: What to put together, in order.
        size: A batch that has as many samples is full; what would be left alone behind it comes in, too.

    Returns:
        Batches, each with the numbers of its parts.
    """
    found: list[tuple[Any, list[int]]] = []
    pending: list[int] = []
    counts = [len(part.which) for part in parts]
    for number in range(len(parts)):
        pending.append(number)
        rest = sum(counts[number + 1 :])
        if rest and (rest < size or sum(counts[i] for i in pending) < size):
            continue
        try:
            found.append((picked([parts[i] for i in pending]), pending))
        except UnlikeError:
            found += [(picked([parts[i]]), [i]) for i in pending]
        pending = []
    return found


def picked(parts: Sequence[Picked]) -> Any:
    """The chosen samples of some batches as one batch.

    Tensors and arrays whose first axis is as long as the batch hold samples, and so do lists of that length
    that hold no such tensors. Everything else is passed on.

    Raises:
        UnlikeError: If the batches differ in more than their samples.
    """
    return _picked([p.batch for p in parts], [p.which for p in parts], [p.size for p in parts])


def _picked(values: list[Any], which: list[Tensor], sizes: list[int]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise UnlikeError("They hold values of other types.")
    if isinstance(first, (Tensor, np.ndarray)):
        if all(v.ndim and len(v) == n for v, n in zip(values, sizes, strict=True)):
            return _rows(values, which)
    elif isinstance(first, (list, tuple)):
        return _sequence(values, which, sizes)
    elif isinstance(first, MutableMapping):
        if any(value.keys() != first.keys() for value in values):
            raise UnlikeError("They hold other keys.")
        new: Any = copy(first)
        for key in list(first):
            new[key] = _picked([value[key] for value in values], which, sizes)
        return new
    elif getattr(first, "__dict__", None) and not callable(first) and not isinstance(first, nn.Module):
        new = copy(first)
        vars(new).update(_picked([dict(vars(value)) for value in values], which, sizes))
        return new
    if not all(_same(value, first) for value in values):
        raise UnlikeError("They hold other values.")
    return first


def _rows(values: list[Any], which: list[Tensor]) -> Any:
    if len({(tuple(v.shape[1:]), v.dtype) for v in values}) > 1:
        raise UnlikeError("They hold samples of other shapes.")
    if isinstance(values[0], np.ndarray):
        return np.concatenate([v[i.numpy()] for v, i in zip(values, which, strict=True)])
    return torch.cat([v[i.to(v.device)] for v, i in zip(values, which, strict=True)])


def _sequence(values: list[Any], which: list[Tensor], sizes: list[int]) -> Any:
    first = values[0]
    if all(len(v) == n and not _holds_samples(v, n) for v, n in zip(values, sizes, strict=True)):
        items = [v[i] for v, index in zip(values, which, strict=True) for i in index.tolist()]
        return type(first)(items)
    if len({len(v) for v in values}) > 1:
        raise UnlikeError("They are of other lengths.")
    parts = [_picked(list(column), which, sizes) for column in zip(*values, strict=True)]
    return first._make(parts) if hasattr(first, "_make") else type(first)(parts)


def _holds_samples(values: Sequence[Any], size: int) -> bool:
    """Whether a list is a structure of a batch, and not one entry for each sample."""
    return any(
        isinstance(v, (list, tuple, Mapping))
        or (isinstance(v, (Tensor, np.ndarray)) and v.ndim and len(v) == size)
        for v in values
    )


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    try:
        return bool(one == other)
    except Exception:
        return False
