"""What each operator does to labels.

Data movement is applied to the labels themselves (:mod:`lightning_split.movements`); pointwise operators
unify the labels they bring together; reductions keep a label that is constant over what they reduce.
Everything else is a *barrier*: its neurons are left alone, with the reason. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_split.barriers import BARRIERS, MIXED, READ, barrier
from lightning_split.constants import DRAWN, is_pointwise
from lightning_split.labels import Handler
from lightning_split.movements import MOVEMENTS
from lightning_split.neurons import FIXED
from lightning_split.operation import NOISE, Action, Operation, along, kept, narrowed, spread, unified
from lightning_split.pairs import Product
from lightning_split.products import attention, convolution, matmul, summed

__all__ = ["handler_of"]


def handler_of(func: Any) -> Handler:
    """The handler of an operator; a barrier if there is none."""
    name = func.overloadpacket.__name__
    action = _ACTIONS.get(name) or (_pointwise if is_pointwise(func) else barrier)
    return lambda *call: action(Operation(*call))


def _look(op: Operation) -> None:
    """What is asked of a tensor but its values; a new tensor of no neuron."""


# elementwise ------------------------------------------------------------------------------------------


def _pointwise(op: Operation) -> None:
    """What meets element by element is one neuron; what belongs to none must be constant along them."""
    mode = op.mode
    if not op.outputs:
        op.refuse(READ)
        return
    shape = op.outputs[0].shape
    solid = [t for t in op.labelled if not mode.constants.uniform(t)] or op.labelled
    vary = _varying(op, solid, shape)
    # A constant as wide as some neurons (zeros_like) makes others as wide, if it lies along them.
    labelled = [t for t in op.labelled if any(t is s for s in solid) or _varying(op, [t], shape) == vary]
    if any(op.foreign(t, vary) for t in op.inputs):
        return
    pairs: list[Tensor] = []
    spreading: list[Tensor] = []
    for t in labelled:
        sizes = [1] * (len(shape) - t.ndim) + list(t.shape)
        # A map of one channel that weighs all others (spatial attention) stays one channel.
        over = any(v and s == 1 < n for v, s, n in zip(vary, sizes, shape, strict=True))
        (spreading if over else pairs).append(t)
    mode.bar(spreading, f"{op.name} spreads them along other neurons, so that they cannot be more")
    found = [own for t in pairs if (own := mode.get(t)) is not None]
    labels, start = torch.full((), FIXED).expand(shape), mode.table.num_kept
    for i, own in enumerate(found):
        labels = mode.unify(labels, own, op.name) if i else own.expand(shape)
    if op.name == "mul" and len(pairs) == 2 and all(map(mode.lines.straight, pairs)):
        left, right = (own.expand(shape) for own in found)
        mode.lines.products[op.outputs[0]] = Product(left, right, slice(start, mode.table.num_kept))
    for t in op.outputs:
        op.give(t, labels if t.shape == shape else None)


def _varying(op: Operation, tensors: Sequence[Tensor], shape: Sequence[int]) -> list[bool]:
    """Along which dimensions of a broadcast result neurons lie."""
    vary = [False] * len(shape)
    for t in tensors:
        labels = op.mode.get(t)
        if labels is not None:
            own = op.mode.varying(labels)
            vary = [v or o for v, o in zip(vary, [False] * (len(shape) - len(own)) + own, strict=True)]
    return vary


def _loss(op: Operation) -> None:
    """A loss of hidden activations is a sum over neurons, unless it is kept element by element."""
    if op.arguments["reduction"] == 0:
        _pointwise(op)
    else:
        op.refuse(f"{op.name} sums over the neurons, so that copies would count twice")


def _lookup(op: Operation) -> None:
    """Bins with the same limits for all neurons."""
    values, limits = op.args if op.name == "bucketize" else reversed(op.args[:2])
    labels = op.mode.get(values) if isinstance(values, Tensor) else None
    if labels is None or len(op.labelled) > 1 or limits.ndim > 1:
        op.refuse()
    else:
        op.mode.set(op.outputs[0], labels)


def _embedding(op: Operation) -> None:
    """Rows of a table, along whose other axis neurons may lie."""
    labels = op.labels()
    if labels is None or len(op.labelled) > 1 or op.mode.varying(labels)[0]:
        barrier(op)
    else:
        op.mode.set(op.outputs[0], labels[0].expand(op.outputs[0].shape))


def _glu(op: Operation) -> None:
    """The first half of an axis, each element with its gate in the second half."""
    labels = op.labels()
    assert labels is not None
    dim = op.arguments["dim"] % labels.ndim
    if any(v for d, v in enumerate(op.mode.varying(labels)) if d != dim):
        along(op, [dim], BARRIERS.get(op.name, "glu pairs neurons"))
        return
    value, gate = labels.chunk(2, dim)
    op.mode.set(op.outputs[0], op.mode.unify(value, gate, op.name))


# random -----------------------------------------------------------------------------------------------


def _noise(op: Operation) -> None:
    """Random numbers for each neuron: its copies would draw others."""
    op.mode.bar(op.inputs, NOISE)
    source = op.labels()
    for t in op.outputs:
        op.mode.set(t, source if source is not None and source.shape == t.shape else None)


def _dropout(op: Operation) -> None:
    """Dropout is no noise of the neurons: each has a fate of its own, by design. Stochastic neurons are."""
    chances = op.arguments.get("p", op.args[0])
    if not isinstance(chances, Tensor) or op.mode.constants.uniform(chances):
        kept(op)
    else:
        _noise(op)


def _leaky(op: Operation) -> None:
    """Slopes are drawn in training only."""
    (_noise if op.arguments["training"] else _pointwise)(op)


# reductions -------------------------------------------------------------------------------------------


def _reduce(op: Operation) -> None:
    """What goes over one or all dimensions: reductions, scans, sorting, Fourier transforms."""
    if "other" in op.arguments:  # max(x, y), min(x, y)
        _pointwise(op)
        return
    if op.name in ("sum", "mean") and summed(op):
        return
    along(op, op.dims("dim"), MIXED.get(op.name, f"{op.name} mixes the neurons"))


def _spatial(num_dims: int) -> Action:
    """Pooling, padding and interpolation over the last ``num_dims`` dimensions."""

    def handle(op: Operation) -> None:
        labels = op.labels()
        if labels is None or len(op.labelled) > 1 or any(op.mode.varying(labels)[-num_dims:]):
            barrier(op)
            return
        for t in op.outputs:
            if t.ndim == labels.ndim:
                op.mode.set(t, spread(labels, t.shape))

    return handle


def _regions(op: Operation) -> None:
    """Pooling in boxes: every channel of a map by itself, in boxes that no neuron has a part in."""
    labels = op.mode.get(op.args[0])
    if labels is None or len(op.labelled) > 1 or _beyond(op.mode.varying(labels), 1):
        barrier(op)
        return
    core = narrowed(labels, [0, 2, 3])
    for t in op.outputs:
        op.mode.set(t, core.expand(t.shape))


def _unpool(num_dims: int) -> Action:
    """Values go to the places that indices name, one for each element."""

    def handle(op: Operation) -> None:
        ndim = op.args[0].ndim
        labels = unified(op, op.args[:2], range(ndim - num_dims, ndim))
        if labels is not None:
            op.mode.set(op.outputs[0], spread(labels, op.outputs[0].shape))

    return handle


def _layer_norm(op: Operation) -> None:
    """Mean and variance over the last dimensions, which may be space."""
    labels, ndim = op.labels(), op.args[0].ndim
    dims = range(ndim - len(op.args[1]), ndim)
    if labels is None or len(op.labelled) > 1 or any(op.mode.varying(labels)[d] for d in dims):
        barrier(op)
        return
    for t in op.outputs:
        op.mode.set(t, labels if t.shape == labels.shape else None)


def _batch_norm(op: Operation) -> None:
    """Mean and variance of each channel, in a function without weights of its own."""
    labels = op.labels()
    plain = all(all(op.mode.constants.flat(t)) for t in op.inputs[1:])
    if labels is None or len(op.labelled) > 1 or not plain or _beyond(op.mode.varying(labels), 1):
        barrier(op)
    else:
        op.mode.set(op.outputs[0], labels)


def _beyond(vary: Sequence[bool], axis: int) -> bool:
    """Whether neurons lie along another axis than this one."""
    return any(v for d, v in enumerate(vary) if d != axis)


# what is registered -----------------------------------------------------------------------------------


def _all(action: Action, *names: str) -> dict[str, Action]:
    return dict.fromkeys(names, action)


def _sizes() -> list[str]:
    return [f"{sym}{n}" for sym in ("", "sym_") for n in ("size", "stride", "numel", "storage_offset")]


def _over_space(k: int) -> dict[str, Action]:
    pools = [f"avg_pool{k}d", f"max_pool{k}d_with_indices", f"max_pool{k}d", f"_adaptive_avg_pool{k}d"]
    pools += [f"adaptive_avg_pool{k}d", f"adaptive_max_pool{k}d", f"upsample_nearest{k}d"]
    pools += [
        f"reflection_pad{k}d",
        f"replication_pad{k}d",
        f"_upsample_nearest_exact{k}d",
        f"grid_sampler_{k}d",
    ]
    pools += {1: ["upsample_linear1d"], 3: ["upsample_trilinear3d"]}.get(
        k, ["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
    )
    return {**_all(_spatial(k), *pools), f"max_unpool{k}d": _unpool(k)}


_LIKE = ["empty_like", "zeros_like", "ones_like", "full_like"]
_NEW = ["new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"]
_REDUCTIONS = [
    "mean",
    "sum",
    "nansum",
    "prod",
    "any",
    "all",
    "amax",
    "amin",
    "aminmax",
    "max",
    "min",
    "argmax",
]
_REDUCTIONS += ["argmin", "var", "std", "var_mean", "std_mean", "median", "nanmedian", "mode", "logsumexp"]
_REDUCTIONS += ["norm", "linalg_vector_norm", "count_nonzero"]
_SCANS = ["cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "cumsum_", "cumprod_"]
_SCANS += ["sort", "argsort", "topk", "kthvalue", "_softmax", "_safe_softmax", "_log_softmax"]
_UNTAGGED = [
    "hardswish",
    "hardswish_",
    "log_sigmoid_forward",
    "_prelu_kernel",
    "complex",
    "polar",
]  # but pointwise
_UNTAGGED += ["masked_fill", "masked_fill_", "hardtanh_", "rrelu"]
_LOSSES = ["mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy"]
_ATTENTION = [f"_scaled_dot_product_{k}_attention" for k in ("flash", "efficient", "cudnn")]
_ATTENTION += ["_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"]

_ACTIONS: dict[str, Action] = {
    **MOVEMENTS,
    **_all(_look, "device", "layout", "dim", "is_contiguous", "is_strides_like_format", *_sizes(), *_NEW),
    **_all(_look, "is_non_overlapping_and_dense"),
    **_all(kept, "detach", "detach_", "clone", "contiguous", "_to_copy", "lift_fresh", "view_as", *_LIKE),
    **_all(kept, "_conj", "resolve_conj", "_neg_view", "resolve_neg", "native_dropout", "_fused_dropout"),
    **_all(_pointwise, *_UNTAGGED),
    **_all(_loss, *_LOSSES, "binary_cross_entropy_with_logits"),
    **_all(_lookup, "bucketize", "searchsorted"),
    "embedding": _embedding,
    "glu": _glu,
    **_all(_noise, *DRAWN - {"multinomial"}),
    **_all(_dropout, "bernoulli", "bernoulli_"),
    **_all(_leaky, "rrelu_with_noise", "rrelu_with_noise_"),
    **_all(_reduce, *_REDUCTIONS, *_SCANS, "_fft_r2c", "_fft_c2r", "_fft_c2c"),
    **_over_space(1),
    **_over_space(2),
    **_over_space(3),
    **_all(_layer_norm, "native_layer_norm", "_fused_rms_norm"),
    **_all(_batch_norm, "native_batch_norm"),
    **_all(matmul, "mm", "bmm", "addmm", "baddbmm"),
    **_all(_regions, "roi_align", "roi_pool"),
    "convolution": convolution,
    **_all(attention, *_ATTENTION, "_scaled_dot_product_fused_attention_overrideable"),
}
