"""What products of tensors do to labels: matrix products, convolutions and attention without a rule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_split.barriers import BARRIERS, NO_WEIGHTS, PRODUCT, barrier
from lightning_split.labels import LabelMode
from lightning_split.loose import filters_apart
from lightning_split.operation import Operation, narrowed

__all__ = ["attention", "convolution", "matmul", "summed"]


def matmul(op: Operation) -> None:
    """A product over an axis along which no neurons lie keeps the labels of the others.

    Of two factors with neurons those of the second are kept, as in the sums of keys times values of linear
    attention; the first one's are fixed then, like those that are summed over.
    """
    mode, out = op.mode, op.outputs[0]
    *added, left, right = op.args[: 3 if op.name in ("addmm", "baddbmm") else 2]
    if any(mode.get(t) is not None for t in added):
        barrier(op)
        return
    if _paired(op, left, right, power=0.0 if mode.inside else None):  # a layer's own scale stays what it is
        return
    why = PRODUCT if len(op.labelled) > 1 else BARRIERS[op.name]
    found, summed = [], False
    for t, axis in ((left, -1), (right, -2)):
        labels = mode.get(t)
        if labels is None:
            continue
        if mode.varying(labels)[axis] or t.shape[axis] == 1:
            mode.bar([t], why)
            summed = True
        else:
            found.append(narrowed(labels, [axis]).expand(out.shape))
    vary = [mode.varying(labels) for labels in found]
    if len(found) == 2 and vary[0] == vary[1] and any(vary[0][:-2]) and not any(vary[0][-2:]):
        found = [mode.unify(found[0], found[1], op.name)]
    elif len(found) == 2 or summed:
        if any(any(v[:-2]) or not any(v) for v in vary):
            barrier(op)
            return
        if len(found) == 2:
            same = not {*mode.ids(found[0])}.isdisjoint(mode.ids(found[1]))
            mode.bar([left], why if same else "a product of activations pairs the neurons with others")
        if not found:
            return
    elif _batched_otherwise(op, vary[0]):
        return
    if not any(op.foreign(t, mode.varying(found[-1])) for t in added):
        mode.set(out, found[-1])


def _paired(op: Operation, left: Tensor, right: Tensor, axis: int = -2, *, power: float | None) -> bool:
    """Whether neurons of both factors meet one by one, summed along the last axis of the left factor."""
    mode, labels = op.mode, []
    for t, d in ((left, -1), (right, axis)):
        own = mode.get(t)
        if own is None or [k - t.ndim for k, v in enumerate(mode.varying(own)) if v] != [d]:
            return False
        labels.append(narrowed(own, [k for k in range(t.ndim) if k - t.ndim != d]).flatten())
    return all(map(mode.lines.straight, (left, right))) and mode.multiply(labels, PRODUCT, power)


def summed(op: Operation) -> bool:
    """Whether a sum (or mean) is one of products of two factors, whose neurons meet one by one."""
    mode, product = op.mode, op.mode.lines.products.get(op.args[0])
    if product is None:
        return False
    labels = []
    for own in (product.left, product.right):
        axes = [d for d, v in enumerate(mode.varying(own)) if v]
        if len(axes) != 1 or axes[0] not in op.dims("dim"):
            return False
        labels.append(narrowed(own, [d for d in range(own.ndim) if d != axes[0]]).flatten())
    if len(labels[0]) != len(labels[1]) or not mode.multiply(labels, PRODUCT, None):
        return False
    mode.table.release(product.ties)
    mode.set(op.args[0], None)  # a sum is all that may be made of the product
    return True


def _batched_otherwise(op: Operation, vary: Sequence[bool]) -> bool:
    """Whether neurons lie along the batch, on which the other factor differs; if so, refuse."""
    if any(vary) and not any(vary[:-2]):  # no doubt, also where dropout has a part in the other factor
        return False
    return any(op.foreign(t, [*vary[:-2], False, False]) for t in op.inputs if t.ndim == len(vary))


def convolution(op: Operation) -> None:
    """One filter for all channels (blur pooling), or neurons along the batch, or along the space of points.

    A filter of size one treats every place by itself.
    """
    mode, (x, weight, bias) = op.mode, op.args[:3]
    labels = mode.get(x)
    if labels is not None and len(op.labelled) > 1 and filters_apart(op.args):
        _filtered(op, labels)
        return
    if labels is None or len(op.labelled) > 1:
        barrier(op)
        return
    vary, out = mode.varying(labels), op.outputs[0]
    same = mode.constants.flat(weight)[0] and (bias is None or all(mode.constants.flat(bias)))
    pointwise = weight.shape[2:].numel() == 1 and out.shape[2:] == x.shape[2:]
    if not vary[1] and (pointwise or not any(vary[2:])):
        narrow = [d for d in range(1, x.ndim) if not vary[d]]
        mode.set(out, narrowed(labels, narrow).expand(out.shape))
    elif vary[1] and sum(vary) == 1 and op.arguments["groups"] == x.shape[1] and same:
        core = narrowed(labels, [d for d in range(x.ndim) if d != 1])
        mode.set(out, core.repeat_interleave(out.shape[1] // x.shape[1], 1).expand(out.shape))
    else:
        barrier(op)


def _filtered(op: Operation, labels: Tensor) -> None:
    """Each channel has filters of its own, which are copied with it."""
    mode, out = op.mode, op.outputs[0]
    if [d for d, v in enumerate(mode.varying(labels)) if v] != [1]:
        barrier(op)
        return
    found = narrowed(labels, [d for d in range(labels.ndim) if d != 1]).flatten()
    found = found.repeat_interleave(out.shape[1] // len(found))
    for t in op.args[1:3]:
        own = None if t is None else mode.get(t)
        if own is not None:
            found = mode.unify(found, narrowed(own, range(1, own.ndim)).flatten(), op.name)
        elif t is not None and not mode.constants.flat(t)[0]:
            barrier(op)
            return
    mode.set(out, found.view(1, -1, *[1] * (out.ndim - 2)).expand(out.shape))


def attention(op: Operation) -> None:
    """Softmax attention is linear in the values, channel by channel; queries meet keys."""
    mode, out, values = op.mode, op.outputs[0], op.args[2]
    labels = mode.get(values)
    heads = [_of_heads(mode, t) for t in op.args[:3]]
    if labels is not None and all(h is not None for h in heads):  # each head is one neuron
        most = out.shape[-3]
        whole, *others = (_shared(h, most) for h in heads if h is not None)
        for other in others:
            whole = mode.unify(whole, other, op.name)
        mode.set(out, whole.expand(out.shape))
        return
    queries, keys = op.args[:2]
    masked = any(mode.get(t) is not None for t in op.inputs if not any(t is x for x in op.args[:3]))
    power = 0.5 if op.arguments.get("scale") is None else None
    if masked or not _paired(op, queries, keys, -1, power=power):
        op.refuse(
            f"attention scores contract queries and keys over their channels: {NO_WEIGHTS}",
            [t for t in op.inputs if t is not values or values is queries or values is keys],
        )
    if labels is None:
        return
    if mode.varying(labels)[-2]:
        mode.bar([values], "attention mixes the positions along which these neurons lie")
        return
    labels = narrowed(labels, [-2])
    labels = labels if labels.ndim < 3 else _shared(labels, out.shape[-3])
    mode.set(out, labels.expand(out.shape))


def _shared(labels: Tensor, heads: int) -> Tensor:
    """Labels of heads, each of which several queries share, query by query."""
    few = labels.shape[-3]
    return labels.repeat_interleave(heads // few, -3) if 1 < few < heads else labels


def _of_heads(mode: LabelMode, tensor: Tensor) -> Tensor | None:
    """Labels that name the head only, ``(..., heads, 1, 1)``; ``None`` if there is more or less to them."""
    labels = mode.get(tensor)
    if labels is None or labels.ndim < 3 or any(mode.varying(labels)[-2:]):
        return None
    return narrowed(labels, [-1, -2])
