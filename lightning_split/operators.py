"""What each operator does to labels.

Data movement is applied to the labels themselves; pointwise operators unify the labels they bring together;
reductions keep a label that is constant over what they reduce. Everything else is a *barrier*: its neurons
are left alone, with the reason. Nothing is guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_split.labels import FIXED, Handler, LabelMode, stored_once, tensors_of

__all__ = ["handler_of"]


def handler_of(func: Any) -> Handler:
    """The handler of an operator; a barrier if there is none."""
    handler = _HANDLERS.get(func.overloadpacket.__name__)
    if handler is not None:
        return handler
    return _pointwise if torch.Tag.pointwise in func.tags else _barrier


def _barrier(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    mode.bar(inputs, _BARRIER_REASONS.get(name, f"{name} is an operator that splitting cannot see through"))
    for t in tensors_of(out):
        mode.set(t, None)


def _look(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    """What is asked of a tensor but its values."""


def _pointwise(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    outputs = list(tensors_of(out))
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
    for o, m in zip(tensors_of(out), tensors_of(moved), strict=True):
        mode.set(o, m)


def _same(
    mode: LabelMode, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], out: Any
) -> None:
    """Copies and ``*_like`` factories: the result is laid out as the first argument."""
    source = mode.get(args[0])
    for o in tensors_of(out):
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
            _chunk(mode, labels, dims[0] % len(vary), tensors_of(out), name)
            return
        unchanged = all(o.shape == args[0].shape for o in tensors_of(out)) and name == "slice"
        if any(vary[d % len(vary)] for d in dims) and not unchanged:
            mode.bar([args[0]], f"{name} cuts or reorders the axis of the neurons")
            for o in tensors_of(out):
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
    for o in tensors_of(out):
        mode.set(o, None)
    values = mode.get(args[2])
    if values is not None:
        if mode.varying(values)[-2]:
            mode.bar(args[2:3], "attention mixes the positions along which these neurons lie")
        else:
            mode.set(tensors_of(out)[0], values.narrow(-2, 0, 1).expand(tensors_of(out)[0].shape))


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
        ends = mode.table.runs(stored_once(a.select(dim, -1))), mode.table.runs(stored_once(b.select(dim, 0)))
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
            for o in tensors_of(out):
                mode.set(o, None)
            return
        for o in tensors_of(out):
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
        for o in tensors_of(out):
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


_HANDLERS: dict[str, Handler] = {}


def _register(handler: Handler, *names: str) -> None:
    for name in names:
        _HANDLERS[name] = handler


_register(
    _look,
    "device",
    "layout",
    "dim",
    "is_contiguous",
    "is_strides_like_format",
    "is_non_overlapping_and_dense",
)
_register(
    _look, *(f"{_sym}{_n}" for _sym in ("", "sym_") for _n in ("size", "stride", "numel", "storage_offset"))
)
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
