"""Labels: beside every activation, a tensor that names the neuron each element belongs to.

While a :class:`LabelMode` is active, every operator that runs on labelled tensors also says what becomes
of the labels. Data movement is applied to the labels themselves; pointwise operators unify the labels
they bring together; reductions keep a label that is constant over what they reduce. Everything else is a
*barrier*: its neurons are left alone, with the reason. Nothing is guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["ChunkMode", "LabelMode", "NeuronTable"]

Ids = npt.NDArray[np.int64]
FIXED = -1  # label of an element that belongs to no neuron


class NeuronTable:
    """Ids of all channel positions that layers produce, and what was found out about them.

    An *id* is one position on the output of a producer. Ids that are *tied* are one neuron; ids that are
    *fused* are, in addition, neighbours that must stay together as one block.
    """

    def __init__(self) -> None:
        self.size = 0
        self._ties: list[tuple[int, int]] = []
        self._fusions: list[tuple[int, int]] = []
        self._runs = np.arange(0)
        self._lookup: Tensor | None = None
        self._reasons: dict[int, str] = {}

    def mint(self, count: int) -> Ids:
        """New ids for the outputs of a producer."""
        ids = np.arange(self.size, self.size + count, dtype=np.int64)
        self.size += count
        self._runs = np.concatenate([self._runs, ids])
        self._lookup = None
        return ids

    def tie(self, a: Ids, b: Ids) -> None:
        """Declare ``a[i]`` and ``b[i]`` the same neuron."""
        self._ties += zip(a.tolist(), b.tolist(), strict=True)

    def fuse(self, ids: Ids) -> bool:
        """Declare neighbouring ids one block; ``False`` if they are not neighbours."""
        ids = np.unique(ids)
        members = np.flatnonzero(np.isin(self._runs, ids))  # whole blocks fuse
        if len(members) != members[-1] - members[0] + 1:
            return False
        self._runs[members] = members[0]
        self._lookup = None
        return True

    def runs(self, labels: Tensor) -> Tensor:
        """Labels with every id replaced by its block's first id (``-1`` stays)."""
        if self._lookup is None:
            self._lookup = torch.from_numpy(np.append(self._runs, FIXED))
        return self._lookup[labels]  # index -1 is the appended FIXED

    def bar(self, ids: Iterable[int], reason: str) -> None:
        """Mark neurons as unsplittable; the first reason given is kept."""
        for i in ids:
            if i >= 0:
                self._reasons.setdefault(i, reason)

    def resolve(self) -> tuple[Ids, Ids, dict[int, str]]:
        """For each id its neuron (smallest tied id) and its block; and why barred neurons are barred."""
        parent = list(range(self.size))

        def find(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        blocks = zip(range(self.size), self._runs.tolist(), strict=True)
        for a, b in (*self._ties, *blocks):
            ra, rb = find(a), find(b)
            parent[max(ra, rb)] = min(ra, rb)
        neuron = np.array([find(i) for i in range(self.size)], dtype=np.int64)
        reasons: dict[int, str] = {}
        for i, reason in self._reasons.items():
            reasons.setdefault(int(neuron[i]), reason)
        return neuron, self._runs.copy(), reasons


class ChunkMode(TorchFunctionMode):
    """Tells a :class:`LabelMode` when a split comes from ``chunk``, which operators below cannot tell."""

    def __init__(self, labels: LabelMode) -> None:
        super().__init__()
        self._labels = labels

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asked = func in (torch.chunk, Tensor.chunk, torch.tensor_split, Tensor.tensor_split)
        self._labels.chunks += asked
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._labels.chunks -= asked


class LabelMode(TorchDispatchMode):
    """Carries labels beside the activations of one run of a model.

    Args:
        table: Receives ties, fusions and barriers.
        where: Says where in the model execution stands; used in the reasons.
    """

    def __init__(self, table: NeuronTable, where: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.table = table
        self.suspended = 0  # > 0 while a layer with a rule runs: its inside is the rule's business
        self.chunks = 0  # > 0 while the user's code asks for a number of pieces, not for pieces of a size
        self.leaked: dict[int, str] = {}  # id of a parameter -> the contraction that used it by itself
        self.where = where
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._weights: WeakIdKeyDictionary = WeakIdKeyDictionary()

    # labels of tensors ------------------------------------------------------------------------

    def get(self, tensor: Tensor) -> Tensor | None:
        """The labels of a tensor (same shape), or ``None`` if it carries no neuron."""
        found: Tensor | None = self._labels.get(tensor)
        return found

    def set(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Give a tensor its labels."""
        if labels is None or not bool((_core(labels) >= 0).any()):
            self._labels.pop(tensor, None)
        else:
            self._labels[tensor] = _compressed(labels, tensor.shape)

    def varying(self, labels: Tensor) -> list[bool]:
        """For each dimension, whether different neurons lie along it."""
        core = self.table.runs(_core(labels))
        return [core.shape[d] > 1 and bool((core != core.narrow(d, 0, 1)).any()) for d in range(core.ndim)]

    def ids(self, labels: Tensor) -> list[int]:
        """The distinct ids in a label tensor."""
        return [i for i in torch.unique(_core(labels)).tolist() if i >= 0]

    def bar(self, tensors: Iterable[Tensor], why: str) -> None:
        """Leave alone all neurons in these tensors."""
        for tensor in tensors:
            labels = self.get(tensor)
            if labels is not None:
                self.table.bar(self.ids(labels), f"{why}{self.where()}")

    def unify(self, a: Tensor, b: Tensor, why: str) -> Tensor:
        """Tie labels that meet element by element, and return the labels of the result."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = a.expand(shape), b.expand(shape)
        vary = [x or y for x, y in zip(self.varying(a), self.varying(b), strict=True)]
        for d in range(len(shape)):
            if not vary[d] and shape[d] > 1:
                a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        ra, rb = self.table.runs(a), self.table.runs(b)
        if not torch.equal(ra, rb):
            fa, fb = ra.flatten().numpy(), rb.flatten().numpy()
            alone = (fa >= 0) != (fb >= 0)
            self.table.bar(
                np.unique(np.maximum(fa, fb)[alone]).tolist(),
                f"{why} meets values that belong to no neuron{self.where()}",
            )
            both = (fa >= 0) & (fb >= 0) & (fa != fb)
            self._tie_pairs(np.unique(np.stack([fa[both], fb[both]]), axis=1), why)
        return torch.where(ra >= 0, ra, rb).expand(shape)

    def merge(self, labels: Tensor, dim: int, why: str) -> Tensor:
        """Tie what lies side by side along a dimension; the result no longer depends on it."""
        first = labels.narrow(dim, 0, 1)
        for i in range(1, labels.shape[dim]):
            self.unify(first, labels.narrow(dim, i, 1), why)
        return first.expand(labels.shape)

    def _tie_pairs(self, pairs: Ids, why: str) -> None:
        left, right = pairs
        if not left.size:
            return
        several = [
            [other[key == k] for k in np.unique(key)[np.unique(key, return_counts=True)[1] > 1]]
            for key, other in ((left, right), (right, left))
        ]
        # One id that meets several on both sides is an outer product: each element is two neurons at once.
        sound = not (several[0] and several[1])
        sound = sound and all(self.table.fuse(ids) for ids in (*several[0], *several[1]))
        if not sound:
            self.table.bar(
                np.unique(pairs).tolist(),
                f"{why} brings together neurons in a pattern that growth would break{self.where()}",
            )
        self.table.tie(left, right)

    # dispatch -----------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        mutated = [a for a in _mutated(func, args, kwargs) if not self.suspended]
        out = func(*args, **kwargs)
        if self.suspended:
            return out
        inputs = [t for t in tree_leaves((list(args), kwargs)) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        self._follow_weights(name, inputs, out)
        if not any(self.get(t) is not None for t in inputs):
            return out
        before = [(t, self.get(t)) for t in mutated]
        handler = _HANDLERS.get(name)
        if handler is None and torch.Tag.pointwise in func.tags:
            handler = _pointwise
        if handler is None:
            handler = _barrier
        handler(self, func, name, args, kwargs, inputs, out)
        for tensor, labels in before:
            self._check_write(name, tensor, labels)
        return out

    def _check_write(self, name: str, tensor: Tensor, before: Tensor | None) -> None:
        """An in-place write that changes what a tensor's elements belong to is not followed."""
        after = self.get(tensor)
        same = after is before or (
            after is not None
            and before is not None
            and torch.equal(self.table.runs(_core(after)), self.table.runs(_core(before)))
        )
        if not same:
            for labels in (before, after):
                if labels is not None:
                    self.table.bar(
                        self.ids(labels), f"{name} writes neurons into another tensor{self.where()}"
                    )
            self.set(tensor, None)

    def _follow_weights(self, name: str, inputs: list[Tensor], out: Any) -> None:
        """Notice parameters that are contracted with activations outside of their layer."""
        owners = [
            owner
            for t in inputs
            if (owner := id(t) if isinstance(t, torch.nn.Parameter) else self._weights.get(t))
        ]
        if not owners:
            return
        if name in _MOVES:
            for t in _tensors(out):
                self._weights[t] = owners[0]
        elif name in _CONTRACTIONS:
            for owner in owners:
                self.leaked.setdefault(owner, f"is used by {name}{self.where()}")


Handler = Callable[[LabelMode, Any, str, Sequence[Any], dict[str, Any], list[Tensor], Any], None]


def _core(labels: Tensor) -> Tensor:
    """The labels without the repetition along expanded dimensions (those shrink to size 1)."""
    for d, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if stride == 0 and size > 1:
            labels = labels.narrow(d, 0, 1)
    return labels


def _compressed(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """The labels stored once along every dimension on which they do not depend."""
    core = _core(labels)
    for d, size in enumerate(core.shape):
        if size > 1 and not bool((core != core.narrow(d, 0, 1)).any()):
            core = core.narrow(d, 0, 1)
    return core.contiguous().expand(tuple(shape))


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


def _mutated(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    if not func._schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


# handlers ----------------------------------------------------------------------------------------


def _barrier(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    mode.bar(inputs, _BARRIER_REASONS.get(name, f"{name} is an operator that splitting cannot see through"))
    for t in _tensors(out):
        mode.set(t, None)


def _pointwise(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    outputs = list(_tensors(out))
    if not outputs:
        return
    shape = outputs[0].shape
    labelled = [(t, lab) for t in inputs if (lab := mode.get(t)) is not None]
    vary = [False] * len(shape)
    for _, labels in labelled:
        own = mode.varying(labels)
        vary = [v or o for v, o in zip(vary, [False] * (len(shape) - len(own)) + own, strict=True)]
    for t in inputs:
        if mode.get(t) is None and t.ndim:
            sizes = [1] * (len(shape) - t.ndim) + list(t.shape)
            if any(v and s > 1 for v, s in zip(vary, sizes, strict=True)):
                what = "a raw parameter" if isinstance(t, torch.nn.Parameter) else "values"
                mode.bar(
                    (x for x, _ in labelled),
                    f"{name} meets {what} that extend along the neurons but belong to none",
                )
                for o in outputs:
                    mode.set(o, None)
                return
    spread = []  # a map of one channel that weighs all others (spatial attention): it stays one channel
    for t, lab in labelled:
        sizes = [1] * (len(shape) - t.ndim) + list(t.shape)
        if any(v and s == 1 < n for v, s, n in zip(vary, sizes, shape, strict=True)):
            spread.append((t, lab))
    mode.bar((t for t, _ in spread), f"{name} spreads them along other neurons, so that they cannot be more")
    labelled = [pair for pair in labelled if not any(pair[0] is t for t, _ in spread)]
    labels = labelled[0][1].expand(shape) if labelled else torch.full((), FIXED).expand(shape)
    for _, other in labelled[1:]:
        labels = mode.unify(labels, other, name)
    for o in outputs:
        mode.set(o, labels if o.shape == shape else None)


def _move(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    """Operators that only move elements: the same operator moves the labels."""
    labels = mode.get(args[0])
    if labels is None:
        _barrier(mode, func, name, args, kwargs, inputs, out)
        return
    rest = tree_map_only(Tensor, lambda t: t.to(labels.device), tuple(args[1:]))  # indices
    moved = func(labels, *rest, **kwargs)
    for o, m in zip(_tensors(out), _tensors(moved), strict=True):
        mode.set(o, m)


def _same(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    """Copies and ``*_like`` factories: the result is laid out as the first argument."""
    source = mode.get(args[0])
    for o in _tensors(out):
        mode.set(o, source)


def _copy(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    source = mode.get(args[1])
    mode.set(args[0], None if source is None else source.expand(args[0].shape))


def _reshape(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    """A reshape may merge the neuron axis with others, undo that, or cut it into equal groups.

    Groups (heads, the groups of a channel shuffle) stay as many as they are and grow alike: a neuron is then
    one channel of each of them. That the code means this, and not groups of fixed size, shows in the trial.
    """
    labels = mode.get(args[0])
    assert labels is not None
    moved = labels.reshape(out.shape)
    cut = [d for d, v in enumerate(mode.varying(moved)) if v]
    before = sum(mode.varying(labels))
    if len(cut) > before:
        if before > 1:
            mode.set(out, moved)
            mode.bar([out], f"{name} cuts the axis of the neurons into several")
            mode.set(out, None)
            return
        for d in cut[:-1]:
            moved = mode.merge(moved, d, name)
    mode.set(out, moved)


def _dims(args: Sequence[Any], kwargs: dict[str, Any], position: int, ndim: int) -> list[int]:
    value = args[position] if len(args) > position else kwargs.get("dim")
    if value is None or value == []:
        return list(range(ndim))
    return [d % ndim for d in (value if isinstance(value, (list, tuple)) else [value])] if ndim else []


def _cut(dim_position: int) -> Handler:
    """Slices, flips and the like: fine unless they cut or reorder the axis of the neurons."""

    def handle(
        mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
    ) -> None:
        labels = mode.get(args[0])
        if labels is None:
            _barrier(mode, func, name, args, kwargs, inputs, out)
            return
        vary = mode.varying(labels)
        default = args[dim_position] if len(args) > dim_position else kwargs.get("dim", 0)
        dims = default if isinstance(default, (list, tuple)) else [default]
        if mode.chunks and name == "split" and [d for d, v in enumerate(vary) if v] == [dims[0] % len(vary)]:
            _chunk(mode, labels, dims[0] % len(vary), _tensors(out), name)
            return
        unchanged = all(o.shape == args[0].shape for o in _tensors(out)) and name == "slice"
        if any(vary[d % len(vary)] for d in dims) and not unchanged:
            mode.bar([args[0]], f"{name} cuts or reorders the axis of the neurons")
            for o in _tensors(out):
                mode.set(o, None)
            return
        _move(mode, func, name, args, kwargs, inputs, out)

    return handle


def _chunk(mode: LabelMode, labels: Tensor, dim: int, pieces: list[Tensor], name: str) -> None:
    """Equal pieces of the neuron axis, as many as there are now: they grow alike."""
    parts = labels.split([p.shape[dim] for p in pieces], dim)
    if len({p.shape[dim] for p in parts}) > 1:
        mode.table.bar(mode.ids(labels), f"{name} cuts the neurons into unequal pieces{mode.where()}")
    else:
        for part in parts[1:]:
            mode.unify(parts[0], part, name)
    for piece, part in zip(pieces, parts, strict=True):
        mode.set(piece, part)


def _glu(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    labels = mode.get(args[0])
    assert labels is not None
    dim = (args[1] if len(args) > 1 else -1) % labels.ndim
    if any(v for d, v in enumerate(mode.varying(labels)) if d != dim):
        _barrier(mode, func, name, args, kwargs, inputs, out)
        return
    value, gate = labels.chunk(2, dim)
    mode.set(out, mode.unify(value, gate, name))


def _attention(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    """Softmax attention is linear in the values, channel by channel; queries and keys are contracted."""
    mode.bar(args[:2], "attention scores contract queries and keys over their channels")
    for o in _tensors(out):
        mode.set(o, None)
    values = mode.get(args[2])
    if values is not None:
        if mode.varying(values)[-2]:
            mode.bar(args[2:3], "attention mixes the positions along which these neurons lie")
        else:
            mode.set(_tensors(out)[0], values.narrow(-2, 0, 1).expand(_tensors(out)[0].shape))


def _index(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    """Picking samples or positions moves labels too; picking neurons, or by neurons' values, does not."""
    labels = mode.get(args[0])
    followed = labels is not None and all(mode.get(t) is None for t in inputs[1:])
    if labels is not None:
        vary, axis = mode.varying(labels), 0
        for picked in args[1]:
            mask = picked is not None and picked.dtype in (torch.bool, torch.uint8)
            width = picked.ndim if mask else 1  # a mask stands for as many axes as it has
            followed = followed and not (picked is not None and any(vary[axis : axis + width]))
            axis += width
    (_move if followed else _barrier)(mode, func, name, args, kwargs, inputs, out)


def _repeat(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    labels = mode.get(args[0])
    assert labels is not None
    times = args[1]
    vary = [False] * (len(times) - labels.ndim) + mode.varying(labels)
    if any(v and t != 1 for v, t in zip(vary, times, strict=True)):
        _barrier(mode, func, name, args, kwargs, inputs, out)
        return
    _move(mode, func, name, args, kwargs, inputs, out)


def _pad(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    labels = mode.get(args[0])
    assert labels is not None
    padded = torch.nn.functional.pad(labels, list(args[1]), value=FIXED)
    vary = mode.varying(labels)
    along = [labels.ndim - 1 - i // 2 for i, p in enumerate(args[1]) if p]
    # Constant padding in space is a value of the neuron; along the neuron axis it belongs to none.
    mode.set(out, padded if any(vary[d] for d in along) else _spread(labels, out.shape))


def _spread(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels that do not depend on the dimensions whose size changes, at another size."""
    for d, (old, new) in enumerate(zip(labels.shape, shape, strict=True)):
        if old != new:
            labels = labels.narrow(d, 0, 1)
    return labels.expand(tuple(shape))


def _cat(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if name == "stack":
        dim %= inputs[0].ndim + 1
        parts = [None if (m := mode.get(t)) is None else m.unsqueeze(dim) for t in inputs]
        shapes = [t.unsqueeze(dim).shape for t in inputs]
    else:
        dim %= out.ndim
        inputs = [t for t in inputs if t.numel()]  # legacy: empty tensors are skipped
        parts = [mode.get(t) for t in inputs]
        shapes = [t.shape for t in inputs]
    varying = [mode.varying(p) for p in parts if p is not None]
    along = any(v[dim] for v in varying)
    across = any(v for vs in varying for d, v in enumerate(vs) if d != dim)
    if across and not along and all(p is not None for p in parts):
        labels = parts[0].narrow(dim, 0, 1)  # type: ignore[union-attr]
        for part in parts[1:]:
            labels = mode.unify(labels, part.narrow(dim, 0, 1), name)  # type: ignore[union-attr]
        mode.set(out, labels.expand(out.shape))
        return
    if across:
        mode.bar(inputs, f"{name} joins neurons with values along another axis")
        mode.set(out, None)
        return
    joined = [torch.full(tuple(s), FIXED) if p is None else p for p, s in zip(parts, shapes, strict=True)]
    for a, b in itertools.pairwise(joined):
        ends = mode.table.runs(_core(a.select(dim, -1))), mode.table.runs(_core(b.select(dim, 0)))
        if bool(((ends[0] == ends[1]) & (ends[0] >= 0)).any()):
            mode.bar(inputs, f"{name} puts a neuron next to itself")
    mode.set(out, torch.cat(joined, dim))


def _reduce(dim_position: int) -> Handler:
    def handle(
        mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
    ) -> None:
        labels = mode.get(args[0])
        if len(args) > 1 and isinstance(args[1], Tensor):  # max(x, y), min(x, y)
            _pointwise(mode, func, name, args, kwargs, inputs, out)
            return
        if labels is None or len([t for t in inputs if mode.get(t) is not None]) > 1:
            _barrier(mode, func, name, args, kwargs, inputs, out)
            return
        dims = _dims(args, kwargs, dim_position, labels.ndim)
        vary = mode.varying(labels)
        if any(vary[d] for d in dims):
            mode.bar([args[0]], _BARRIER_REASONS.get(name, f"{name} mixes the neurons"))
            for o in _tensors(out):
                mode.set(o, None)
            return
        for o in _tensors(out):
            if o.shape == labels.shape:
                kept = labels
            else:
                kept = labels
                for d in sorted(dims, reverse=True):
                    kept = kept.narrow(d, 0, 1) if o.ndim == labels.ndim else kept.select(d, 0)
            mode.set(o, kept)

    return handle


def _spatial(num_dims: int) -> Handler:
    """Pooling, padding and interpolation over the last ``num_dims`` dimensions."""

    def handle(
        mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
    ) -> None:
        labels = mode.get(args[0])
        only = [t for t in inputs if mode.get(t) is not None]
        if labels is None or len(only) > 1 or any(mode.varying(labels)[-num_dims:]):
            _barrier(mode, func, name, args, kwargs, inputs, out)
            return
        for o in _tensors(out):
            if o.ndim == labels.ndim:
                mode.set(o, _spread(labels, o.shape))

    return handle


def _matmul(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    """A product with values that are no neurons, over an axis along which no neurons lie, keeps labels."""
    a, b = mode.get(args[0]), mode.get(args[1])
    if (a is None) == (b is None):
        _barrier(mode, func, name, args, kwargs, inputs, out)
    elif a is not None and not mode.varying(a)[-1] and args[0].shape[-1] != 1:
        mode.set(out, a.narrow(-1, 0, 1).expand(out.shape))
    elif b is not None and not mode.varying(b)[-2] and args[1].shape[-2] != 1:
        mode.set(out, b.narrow(-2, 0, 1).expand(out.shape))
    else:
        _barrier(mode, func, name, args, kwargs, inputs, out)


_BARRIER_REASONS = {
    "native_layer_norm": "layer normalisation takes mean and variance over the neurons",
    "native_group_norm": "group normalisation takes mean and variance over several neurons",
    "_softmax": "softmax normalises over the neurons",
    "_log_softmax": "log-softmax normalises over the neurons",
    "convolution": "a convolution outside of a layer with a rule reads the neurons",
    "mm": "a matrix product outside of a layer with a rule reads the neurons",
    "addmm": "a matrix product outside of a layer with a rule reads the neurons",
    "bmm": "a product of activations contracts the neurons",
    "baddbmm": "a product of activations contracts the neurons",
    "index": "indexing picks elements in a way that splitting cannot follow",
    "_local_scalar_dense": "a value of the neuron is read as a Python number",
}

_CONTRACTIONS = {
    *("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "convolution", "embedding", "_cdist_forward"),
    *("native_batch_norm", "native_layer_norm", "native_group_norm", "_embedding_bag"),
    *("_thnn_fused_lstm_cell", "lstm", "gru", "mkldnn_rnn_layer", "index_select", "index", "gather"),
}

_HANDLERS: dict[str, Handler] = {}


def _register(handler: Handler, *names: str) -> None:
    for name in names:
        _HANDLERS[name] = handler


_register(_move, "permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "alias", "movedim")
_register(_same, "detach", "clone", "contiguous", "_to_copy", "lift_fresh", "view_as", "alias")
_register(_same, "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
_register(_same, "bernoulli", "bernoulli_", "native_dropout", "uniform_", "normal_", "fill_", "zero_")
_register(_copy, "copy_")
_register(_reshape, "view", "_unsafe_view", "reshape", "_reshape_alias")
_register(_cut(1), "slice", "select", "unbind", "index_select", "flip", "unfold")
_register(_cut(2), "split", "split_with_sizes", "roll")
_register(_repeat, "repeat")
_register(_index, "index")
_register(_glu, "glu")
_register(
    _attention,
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    *("_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable"),
)
_register(_pad, "constant_pad_nd")
_register(_cat, "cat", "stack")
_register(_pointwise, "hardswish", "hardswish_", "log_sigmoid_forward", "_prelu_kernel", "rrelu_with_noise")
_register(
    _pointwise, "hardsigmoid", "hardsigmoid_", "where", "clamp", "clamp_", "masked_fill", "masked_fill_"
)
_register(_reduce(1), "mean", "sum", "amax", "amin", "var", "std", "logsumexp", "prod", "any", "all")
_register(_reduce(1), "var_mean", "std_mean", "max", "min", "argmax", "argmin", "median", "cumsum")
_register(_reduce(1), "_softmax", "_log_softmax", "cumprod")
_register(_reduce(2), "norm", "linalg_vector_norm")
_register(_matmul, "mm", "bmm")
for _n in (1, 2, 3):
    _register(_spatial(_n), f"avg_pool{_n}d", f"max_pool{_n}d_with_indices", f"max_pool{_n}d")
    _register(_spatial(_n), f"_adaptive_avg_pool{_n}d", f"adaptive_avg_pool{_n}d")
    _register(_spatial(_n), f"adaptive_max_pool{_n}d", f"upsample_nearest{_n}d")
    _register(_spatial(_n), f"reflection_pad{_n}d", f"replication_pad{_n}d")
    _register(_spatial(_n), f"_upsample_nearest_exact{_n}d", f"fractional_max_pool{_n}d")
_register(_spatial(1), "upsample_linear1d")
_register(
    _spatial(2), "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "grid_sampler_2d"
)
_register(_spatial(3), "upsample_trilinear3d", "grid_sampler_3d")

_MOVES = {
    *("permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "alias", "detach", "clone"),
    *("view", "_unsafe_view", "reshape", "contiguous", "_to_copy", "slice", "select", "cat", "stack"),
}
