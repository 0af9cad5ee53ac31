"""One call of an operator on labelled tensors, as the handlers of operators see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_split.labels import LabelMode, tensors_of, written_by

__all__ = ["NOISE", "Action", "Operation", "along", "kept", "narrowed", "spread", "unified"]

NOISE = "random numbers are drawn for each neuron; copies would draw others"


class Operation:
    """One call: its arguments by name, the labels of its inputs, and what becomes of those of its outputs."""

    def __init__(
        self, mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
    ) -> None:
        self.mode, self.func, self.name = mode, func, name
        self.args, self.kwargs = args, kwargs
        self.inputs = inputs
        self.outputs = tensors_of(out)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name, with their defaults."""
        found = {}
        for i, a in enumerate(self.func._schema.arguments):
            default = a.default_value if a.has_default_value() else None
            found[a.name] = self.args[i] if i < len(self.args) else self.kwargs.get(a.name, default)
        return found

    def labels(self, argument: int | str = 0) -> Tensor | None:
        """The labels of an argument; ``None`` if it is none, or no tensor, or carries no neurons."""
        tensor = self.args[argument] if isinstance(argument, int) else self.arguments[argument]
        return self.mode.get(tensor) if isinstance(tensor, Tensor) else None

    @property
    def labelled(self) -> list[Tensor]:
        """The inputs that carry neurons."""
        return [t for t in self.inputs if self.mode.get(t) is not None]

    def dims(self, *names: str) -> list[int]:
        """The dimensions of the first argument that these arguments name; all if they name none."""
        ndim = self.args[0].ndim
        found: list[int] = []
        for name in names:
            value = self.arguments.get(name)
            found += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return [d % ndim for d in found] if found and ndim else list(range(ndim))

    def refuse(self, why: str | None = None, tensors: Iterable[Tensor] | None = None) -> None:
        """Leave the neurons of these tensors (of all inputs) alone; the outputs carry none."""
        self.mode.bar(
            self.inputs if tensors is None else tensors,
            why or f"{self.name} is an operator that splitting cannot see through",
        )
        for t in self.outputs:
            self.mode.set(t, None)

    def foreign(self, tensor: Tensor, vary: Sequence[bool], why: str | None = None) -> bool:
        """Whether a tensor without labels has different values along the neurons; if so, refuse."""
        if self.mode.get(tensor) is not None or not tensor.ndim or not tensor.numel():
            return False
        flat = self.mode.constants.flat(tensor)
        sizes = zip(reversed(vary), reversed(tensor.shape), reversed(flat), strict=False)
        drawn = self.mode.constants.drawn(tensor)
        # Of a single neuron nobody can tell along which axis there may be more.
        doubt = drawn and not any(vary) and not all(flat)
        if not doubt and not any(v and n > 1 and not f for v, n, f in sizes):
            return False
        if self.mode.constants.noise(tensor):
            self.refuse(NOISE)
        else:
            what = "a raw parameter" if isinstance(tensor, torch.nn.Parameter) else "values"
            self.refuse(f"{self.name} meets {what} that extend along the neurons but belong to none")
        return True

    def give(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Give an output its labels; if it is an input that is written into, that input and its other views.

        An operator that writes outlines into a real tensor returns an outline, not that tensor.
        """
        mode = self.mode
        written = written_by(self.func, self.args, self.kwargs)
        for target in written:
            if target.shape != tensor.shape:
                continue
            views = None
            if labels is not None and (mode.get(target) is None or mode.constants.uniform(target)):
                views = mode.constants.sharing(target)
            if views is not None and labels is not None:
                self._claim(target, views, labels)
            mode.set(target, labels)
        if not any(tensor is t for t in written):
            mode.set(tensor, labels)

    def _claim(self, tensor: Tensor, views: list[Tensor], labels: Tensor) -> None:
        """Memory that was blank until now belongs to the neurons that are written into a part of it."""
        mode = self.mode
        vary = mode.varying(labels)
        for view in views:
            if (
                view.ndim == tensor.ndim
                and view.stride() == tensor.stride()
                and all(n == m for n, m, v in zip(view.shape, tensor.shape, vary, strict=True) if v)
            ):
                mode.set(view, spread(labels, view.shape))
            else:
                why = f"{self.name} writes neurons into a tensor that is also used in another layout"
                mode.table.bar(mode.ids(labels), f"{why}{mode.where()}")
                mode.set(view, None)
        mode.claimed.append(tensor)


Action = Callable[[Operation], None]


def narrowed(labels: Tensor, dims: Iterable[int]) -> Tensor:
    """Labels that do not depend on some dimensions, at size one there."""
    for d in dims:
        labels = labels.narrow(d, 0, 1)
    return labels


def spread(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels that do not depend on the dimensions whose size changes, at another size."""
    changed = [d for d, (old, new) in enumerate(zip(labels.shape, shape, strict=True)) if old != new]
    return narrowed(labels, changed).expand(tuple(shape))


def kept(op: Operation) -> None:
    """The result is laid out as the first argument."""
    source = op.labels()
    for t in op.outputs:
        op.mode.set(t, source)


def along(op: Operation, dims: Sequence[int], why: str) -> None:
    """The result depends on all elements along some dimensions, whose size may change or go."""
    labels = op.labels()
    if labels is None or len(op.labelled) > 1:
        op.refuse()
        return
    if any(op.mode.varying(labels)[d] for d in dims):
        op.refuse(why)
        return
    for t in op.outputs:
        if t.ndim == labels.ndim:
            op.give(t, spread(labels, t.shape))
        else:
            rest = labels
            for d in sorted(dims, reverse=True):
                rest = rest.select(d, 0)
            op.give(t, rest)


def unified(op: Operation, parts: Sequence[Tensor], mixed: Sequence[int]) -> Tensor | None:
    """The common labels of tensors of one layout, whose elements along some dimensions are mixed.

    They have size one along those dimensions. ``None`` if the neurons had to be refused.
    """
    mode = op.mode
    if len({t.ndim for t in parts}) > 1:
        op.refuse()
        return None
    owned = [t for t in parts if mode.get(t) is not None]
    solid = [t for t in owned if not mode.constants.uniform(t)] or owned
    axes = {id(t): mode.varying(labels) for t in owned if (labels := mode.get(t)) is not None}
    vary = [any(v) for v in zip(*(axes[id(t)] for t in solid), strict=True)]
    # A constant as wide as some neurons (zeros_like) makes others as wide, if it lies along them.
    found = [mode.get(t) for t in owned if any(t is s for s in solid) or axes[id(t)] == vary]
    if not vary or any(vary[d] for d in mixed):
        op.refuse(f"{op.name} picks or reorders neurons" if vary else None)
        return None
    whole = parts[0].shape
    if any(v and t.shape[d] != whole[d] for d, v in enumerate(vary) for t in parts if t.numel()):
        op.refuse(f"{op.name} cuts the axis of the neurons")
        return None
    if any(op.foreign(t, vary) for t in parts):
        return None
    still = [
        d for d, v in enumerate(vary) if not v and (d in mixed or any(t.shape[d] != whole[d] for t in parts))
    ]
    labels = narrowed(found[0], still)  # type: ignore[arg-type]
    for other in found[1:]:
        labels = mode.unify(labels, narrowed(other, still), op.name)  # type: ignore[arg-type]
    return labels
