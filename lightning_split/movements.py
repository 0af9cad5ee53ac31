"""What operators that only move elements do to labels: views, slices, joins, shuffles, indices, padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_split.labels import LabelMode, stored_once
from lightning_split.neurons import FIXED
from lightning_split.operation import Action, Operation, along, kept, narrowed, spread, unified

__all__ = ["MOVEMENTS"]


# views ----------------------------------------------------------------------------------------------


def _move(op: Operation) -> None:
    """The same operator moves the labels."""
    labels = op.labels()
    if labels is None:
        op.refuse()
        return
    moved = op.func(labels, *op.args[1:], **op.kwargs)
    for t, m in zip(op.outputs, [moved] if isinstance(moved, Tensor) else moved, strict=True):
        op.mode.set(t, m)


def _move_in_place(op: Operation) -> None:
    """A tensor that is another view of its memory from now on."""
    labels = op.labels()
    assert labels is not None
    packet = getattr(torch.ops.aten, op.name.removesuffix("_"))
    moved = packet(labels, *op.args[1:])
    for t in (op.args[0], *op.outputs):
        op.mode.set(t, moved)
    op.mode.claimed.append(op.args[0])


def _reshape(op: Operation) -> None:
    """A reshape may merge the neuron axis with others, undo that, or cut it into equal groups.

    Groups (heads, the groups of a channel shuffle) stay as many as they are and grow alike: a neuron is then
    one channel of each of them. That the code means this, and not groups of fixed size, shows in the trial.
    If the number of groups is left open (``view(b, t, -1, head_dim)``) each group is one neuron, as a block.
    """
    labels = op.labels()
    assert labels is not None
    _cut_into_groups(op, labels, labels.reshape(op.outputs[0].shape))


def _cut_into_groups(op: Operation, labels: Tensor, moved: Tensor) -> None:
    cut = [d for d, v in enumerate(op.mode.varying(moved)) if v]
    before = sum(op.mode.varying(labels))
    if len(cut) > before:
        if before > 1:
            op.refuse(f"{op.name} cuts the axis of the neurons into several")
            return
        if op.mode.open_dim == cut[0] and len(cut) > 1:
            rows = narrowed(moved, [d for d in range(moved.ndim) if d not in cut])
            if not op.mode.table.join(rows.reshape(moved.shape[cut[0]], -1)):
                op.refuse(f"{op.name} makes blocks of channels that do not lie side by side")
                return
        else:
            for d in cut[:-1]:
                moved = op.mode.merge(moved, d, op.name)
    op.mode.set(op.outputs[0], moved)


def _view_as_real(op: Operation) -> None:
    """Real and imaginary part lie side by side on a new last axis."""
    labels = op.labels()
    assert labels is not None
    op.mode.set(op.outputs[0], labels.unsqueeze(-1).expand(op.outputs[0].shape))


def _view_as_complex(op: Operation) -> None:
    """The last axis, of size two, becomes one number."""
    along(op, [op.args[0].ndim - 1], "view_as_complex joins neurons in pairs")


# pieces and joins -------------------------------------------------------------------------------------


def _cut(*names: str) -> Action:
    """Slices and the like: fine unless they cut the axis of the neurons."""

    def handle(op: Operation) -> None:
        labels = op.labels()
        if labels is None:
            op.refuse()
            return
        vary, dims, name = op.mode.varying(labels), op.dims(*names), op.name
        if op.mode.chunks and name == "split" and [d for d, v in enumerate(vary) if v] == dims:
            _chunk(op.mode, labels, dims[0], op.outputs, name)
            return
        unchanged = name == "slice" and op.outputs[0].shape == op.args[0].shape
        if any(vary[d] for d in dims) and not unchanged:
            op.refuse(f"{name} cuts or reorders the axis of the neurons")
            return
        _move(op)

    return handle


def _chunk(mode: LabelMode, labels: Tensor, dim: int, pieces: list[Tensor], name: str) -> None:
    """Equal pieces of the neuron axis, as many as there are now: they grow alike."""
    parts = labels.split([p.shape[dim] for p in pieces], dim)
    if len({p.shape[dim] for p in parts}) > 1:
        mode.table.bar(mode.ids(labels), f"{name} cuts the neurons into unequal pieces{mode.where()}")
    else:
        for part in parts[1:]:
            mode.unify(parts[0], part, name, both=True)
    for piece, part in zip(pieces, parts, strict=True):
        mode.set(piece, part)


def _reorder(*names: str) -> Action:
    """Flips and the like: fine unless they reorder the axis of the neurons."""
    return lambda op: along(op, op.dims(*names), f"{op.name} cuts or reorders the axis of the neurons")


def _cat(op: Operation) -> None:
    dim = op.arguments["dim"]
    out, inputs = op.outputs[0], op.inputs
    dim %= out.ndim
    if op.name == "stack":
        parts = [None if (m := op.mode.get(t)) is None else m.unsqueeze(dim) for t in inputs]
        shapes = [(*t.shape[:dim], 1, *t.shape[dim:]) for t in inputs]
    else:
        inputs = [t for t in inputs if t.numel()]  # legacy: empty tensors are skipped
        if not inputs:
            return
        parts = [op.mode.get(t) for t in inputs]
        shapes = [t.shape for t in inputs]
    varying = [op.mode.varying(p) for p in parts if p is not None]
    vary = [any(v) for v in zip(*varying, strict=True)]
    across = [v and d != dim for d, v in enumerate(vary)]
    if not any(across):
        _join_neurons(op, inputs, parts, shapes, dim)
        return
    if op.name == "stack":
        del across[dim]
    flat = [
        not any(a and not f for a, f in zip(across, op.mode.constants.flat(t), strict=True)) for t in inputs
    ]
    if vary[dim] or any(p is None and not f for p, f in zip(parts, flat, strict=True)):
        op.refuse(f"{op.name} joins neurons with values along another axis")
        return
    labels, *others = [narrowed(p, [dim]) for p in parts if p is not None]
    for other in others:
        labels = op.mode.unify(labels, other, op.name)
    op.mode.set(out, labels.expand(out.shape))


def _join_neurons(
    op: Operation,
    inputs: list[Tensor],
    parts: list[Tensor | None],
    shapes: Sequence[Sequence[int]],
    dim: int,
) -> None:
    """Neurons side by side, or values of no neuron beside them."""
    joined = [
        _of_nobody(op, t, shape, dim) if part is None else part
        for t, part, shape in zip(inputs, parts, shapes, strict=True)
    ]
    for a, b in itertools.pairwise(joined):
        if _touch(op.mode, a.select(dim, -1), b.select(dim, 0)):
            op.mode.bar(op.inputs, f"{op.name} puts a neuron next to itself")
    op.mode.set(op.outputs[0], torch.cat(joined, dim))


def _of_nobody(op: Operation, tensor: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Labels of values that belong to no neuron; a zero state is as wide as the neurons whose state it is."""
    if op.name != "cat" or not op.mode.constants.uniform(tensor):
        return torch.full(tuple(shape), FIXED)
    form = [1] * len(shape)
    form[dim] = -1
    return op.mode.phantoms(shape[dim]).view(form).expand(tuple(shape))


def _touch(mode: LabelMode, left: Tensor, right: Tensor) -> bool:
    a, b = mode.table.runs(stored_once(left)), mode.table.runs(stored_once(right))
    return bool(((a == b) & (a >= 0)).any())


def _repeat(op: Operation) -> None:
    """Copies of the whole axis of the neurons keep apart; copies of a single neuron would not."""
    labels = op.labels()
    assert labels is not None
    times = op.args[1] if op.outputs[0].numel() else [1] * op.outputs[0].ndim
    new = len(times) - labels.ndim
    vary = [False] * new + op.mode.varying(labels)
    repeated = [d - new for d, (v, n) in enumerate(zip(vary, times, strict=True)) if v and n > 1]
    if any(_touch(op.mode, labels.select(d, -1), labels.select(d, 0)) for d in repeated):
        op.refuse("repeat puts a neuron next to itself")
        return
    shape = op.outputs[0].shape
    still = [d for d in range(labels.ndim) if d not in repeated and times[new + d] > 1]
    labels = narrowed(labels, still).repeat([n if d - new in repeated else 1 for d, n in enumerate(times)])
    op.mode.set(op.outputs[0], labels.expand(shape))


def _pad(op: Operation) -> None:
    """Constant padding in space is a value of the neuron; along the neuron axis it belongs to none."""
    labels = op.labels()
    assert labels is not None
    pad = op.args[1]
    vary = op.mode.varying(labels)
    if any(vary[labels.ndim - 1 - i // 2] for i, p in enumerate(pad) if p):
        op.mode.set(op.outputs[0], torch.nn.functional.pad(labels, list(pad), value=FIXED))
    else:
        op.mode.set(op.outputs[0], spread(labels, op.outputs[0].shape))


def _copy(op: Operation) -> None:
    """A write into memory: what is written and what is there are one neuron."""
    target, source, mode = op.args[0], op.args[1], op.mode
    own, labels = mode.get(target), mode.get(source)
    if labels is None or mode.constants.uniform(source):
        if own is not None:
            op.foreign(source, mode.varying(own))
        return
    labels = labels.expand(target.shape)
    if own is not None and not mode.constants.uniform(target):
        labels = mode.unify(own, labels, op.name)
    op.give(target, labels)


def _fill(op: Operation) -> None:
    """The same value everywhere, unless it is a neuron's."""
    if any(op.mode.get(t) is not None for t in op.inputs[1:]):
        op.refuse()
    else:
        kept(op)


# channels that become space, and the reverse -------------------------------------------------------------


def _blocks(op: Operation, axis: int, size: int) -> Tensor | None:
    """Make every few neighbouring channels one neuron, which moves as a block; its label, ``(blocks,)``."""
    labels = op.labels()
    assert labels is not None
    axis %= labels.ndim
    if any(v for d, v in enumerate(op.mode.varying(labels)) if d != axis):
        op.refuse(f"{op.name} mixes the axis of the neurons with others")
        return None
    table = op.mode.table
    rows = table.runs(narrowed(labels, [d for d in range(labels.ndim) if d != axis]).reshape(-1, size))
    if not table.join(rows):
        op.refuse(f"{op.name} makes one channel of several that do not lie side by side")
        return None
    return rows[:, 0]


def _channels_to_space(op: Operation, axis: int, size: int) -> None:
    """Pixel shuffle and fold: a block of channels becomes one channel in more places."""
    blocks = _blocks(op, axis, size)
    if blocks is not None:
        out = op.outputs[0]
        shape = [1] * out.ndim
        shape[out.ndim - 3] = -1
        op.mode.set(out, blocks.view(shape).expand(out.shape))


def _space_to_channels(op: Operation, size: int, *, flattened: bool) -> None:
    """Pixel unshuffle and unfold: a channel becomes a run of channels."""
    labels = op.labels()
    assert labels is not None
    if any(op.mode.varying(labels)[-2:]):
        op.refuse(f"{op.name} mixes the axis of the neurons with others")
        return
    labels = narrowed(labels, [-1, -2]).repeat_interleave(size, -3)
    op.mode.set(op.outputs[0], (labels[..., 0] if flattened else labels).expand(op.outputs[0].shape))


def _channel_shuffle(op: Operation) -> None:
    """Groups of channels are read across each other; they stay as many and grow alike."""
    labels = op.labels()
    assert labels is not None
    vary = op.mode.varying(labels)
    if not vary[1] or sum(vary) > 1:
        op.refuse(f"{op.name} mixes the axis of the neurons with others")
        return
    core = narrowed(labels, [d for d in range(labels.ndim) if d != 1]).flatten()
    rows = op.mode.merge(core.view(op.args[1], -1), 0, op.name)
    shape = [1] * labels.ndim
    shape[1] = -1
    op.mode.set(op.outputs[0], rows.T.reshape(shape).expand(labels.shape))


# indices ----------------------------------------------------------------------------------------------


def _index(op: Operation) -> None:
    """Picking samples or positions moves labels too; picking neurons, or by neurons' values, does not."""
    labels, indices = op.labels(), op.args[1]
    axes = _indexed(indices)
    if labels is None or len(op.labelled) > 1 or any(op.mode.varying(labels)[d] for d in axes):
        op.refuse("indexing picks elements in a way that splitting cannot follow")
        return
    op.mode.set(op.outputs[0], _picked(labels, indices).expand(op.outputs[0].shape))


def _indexed(indices: Sequence[Tensor | None]) -> list[int]:
    """The axes that indices stand for; a mask stands for as many as it has."""
    axes: list[int] = []
    axis = 0
    for index in indices:
        width = index.ndim if index is not None and _is_mask(index) else 1
        axes += [] if index is None else range(axis, axis + width)
        axis += width
    return axes


def _picked(labels: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Labels that do not depend on the indexed axes, picked by indices of the same form, of size one."""
    form: list[Any] = []
    for index in indices:
        if index is None:
            form.append(slice(None))
        elif _is_mask(index):
            form += [torch.zeros(1, dtype=torch.long)] * index.ndim
        else:
            form.append(torch.zeros((1,) * index.ndim, dtype=torch.long))
    return narrowed(labels, _indexed(indices))[tuple(form)]


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _index_put(op: Operation) -> None:
    """A write at some samples or positions."""
    mode, (target, indices, values) = op.mode, op.args[:3]
    axes, out = _indexed(indices), op.outputs[0]
    own, labels = mode.get(target), mode.get(values)
    if any(mode.get(t) is not None for t in indices if t is not None) or (labels is None and own is None):
        op.refuse("indexing writes elements in a way that splitting cannot follow")
        return
    if own is None or mode.constants.uniform(target):
        rest = target.ndim - len(axes)
        first = axes == list(range(len(axes)))
        if labels is None:
            kept(op)
        elif not first or labels.ndim < rest or any(mode.varying(labels)[: labels.ndim - rest]):
            op.refuse("indexing writes elements in a way that splitting cannot follow")
        else:
            for _ in range(labels.ndim - rest):
                labels = labels[0]
            labels = labels.expand(target.shape)
            if not op.foreign(target, mode.varying(labels)):
                op.give(out, labels)
        return
    if any(mode.varying(own)[d] for d in axes):
        op.refuse(f"{op.name} cuts or reorders the axis of the neurons")
        return
    region = _picked(own, indices)
    if not op.foreign(values, mode.varying(region)):
        if labels is not None and not mode.constants.uniform(values):
            mode.unify(region, labels, op.name)
        mode.set(out, own)


def _gather(op: Operation) -> None:
    """Picking along an axis, by one index for all neurons or by one for each."""
    labels = unified(op, [op.args[0], op.arguments["index"]], op.dims("dim"))
    if labels is not None:
        op.give(op.outputs[0], labels.expand(op.outputs[0].shape))


def _scatter(op: Operation) -> None:
    """Writing or adding along an axis, at one index for all neurons or at one for each."""
    parts = [op.args[0], op.arguments["index"], op.arguments.get("src")]
    labels = unified(op, [t for t in parts if isinstance(t, Tensor)], op.dims("dim"))
    if labels is not None:
        op.give(op.outputs[0], labels.expand(op.outputs[0].shape))


def _index_add(op: Operation) -> None:
    """Writing or adding whole samples or positions, none of which a neuron chooses."""
    chosen = [op.arguments["index"], op.arguments.get("value")]
    if any(isinstance(t, Tensor) and op.mode.get(t) is not None for t in chosen):
        op.refuse()
        return
    parts = [op.args[0], op.arguments.get("source")]
    labels = unified(op, [t for t in parts if isinstance(t, Tensor)], op.dims("dim"))
    if labels is not None:
        op.give(op.outputs[0], labels.expand(op.outputs[0].shape))


# sequences of several lengths --------------------------------------------------------------------------


def _pack(op: Operation) -> None:
    """Samples and steps become one axis."""
    labels = op.labels()
    if labels is None or any(op.mode.varying(labels)[:2]):
        op.refuse(f"{op.name} mixes the axis of the neurons with samples and steps")
        return
    op.mode.set(op.outputs[0], labels[0, 0].expand(op.outputs[0].shape))


def _unpack(op: Operation) -> None:
    """And two again, with padding that is the same for all neurons."""
    labels = op.labels()
    if labels is None or op.mode.varying(labels)[0]:
        op.refuse(f"{op.name} mixes the axis of the neurons with samples and steps")
        return
    op.mode.set(op.outputs[0], labels[0].expand(op.outputs[0].shape))


# what is registered -----------------------------------------------------------------------------------


def _area(value: int | Sequence[int]) -> int:
    return value**2 if isinstance(value, int) else math.prod(value)


def _both(*names: str) -> list[str]:
    return [n for name in names for n in (name, f"{name}_")]


MOVEMENTS: dict[str, Action] = {
    **dict.fromkeys(["permute", "transpose", "t", "expand", "squeeze", "unsqueeze", "alias"], _move),
    **dict.fromkeys(["movedim"], _move),
    **dict.fromkeys(["transpose_", "t_", "squeeze_", "unsqueeze_"], _move_in_place),
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "_reshape_alias"], _reshape),
    "view_as_real": _view_as_real,
    "view_as_complex": _view_as_complex,
    **dict.fromkeys(["slice", "select", "unbind", "split", "split_with_sizes"], _cut("dim")),
    **dict.fromkeys(["unsafe_split", "unsafe_split_with_sizes"], _cut("dim")),
    "unfold": _cut("dimension"),
    "diagonal": _cut("dim1", "dim2"),
    "index_select": _reorder("dim"),
    **dict.fromkeys(["flip", "roll", "rot90"], _reorder("dims")),
    **dict.fromkeys(_both("tril", "triu"), lambda op: along(op, [-1, -2], f"{op.name} cuts the neurons")),
    **dict.fromkeys(["cat", "stack"], _cat),
    "repeat": _repeat,
    "constant_pad_nd": _pad,
    "copy_": _copy,
    **dict.fromkeys(["fill_", "zero_"], _fill),
    "pixel_shuffle": lambda op: _channels_to_space(op, -3, op.args[1] ** 2),
    "pixel_unshuffle": lambda op: _space_to_channels(op, op.args[1] ** 2, flattened=False),
    "col2im": lambda op: _channels_to_space(op, -2, _area(op.arguments["kernel_size"])),
    "im2col": lambda op: _space_to_channels(op, _area(op.arguments["kernel_size"]), flattened=True),
    **dict.fromkeys(["channel_shuffle", "native_channel_shuffle"], _channel_shuffle),
    **dict.fromkeys(["index", "_unsafe_index"], _index),
    **dict.fromkeys([*_both("index_put"), "_unsafe_index_put", "_index_put_impl_"], _index_put),
    "gather": _gather,
    "_pack_padded_sequence": _pack,
    "_pad_packed_sequence": _unpack,
    **dict.fromkeys(_both("scatter", "scatter_add", "scatter_reduce"), _scatter),
    **dict.fromkeys(_both("index_add", "index_copy", "index_reduce", "index_fill"), _index_add),
}
