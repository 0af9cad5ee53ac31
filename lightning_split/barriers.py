"""Operators that splitting cannot see through, and why."""

from __future__ import annotations

from lightning_split.operation import NOISE, Operation

__all__ = ["BARRIERS", "MIXED", "NO_WEIGHTS", "PRODUCT", "READ", "barrier"]


def barrier(op: Operation) -> None:
    """Leave the neurons alone, with the operator's own reason if it has one."""
    op.refuse(BARRIERS.get(op.name))


READ = "a value of the neurons is read as a Python number"
NO_WEIGHTS = "no weights read them that offspring could share"
PRODUCT = f"a product of activations contracts the neurons: {NO_WEIGHTS}"
_MATRIX = "a matrix product outside of a layer with a rule reads the neurons"
_DISTANCE = "distances (cdist, dist) are taken over the neurons"
_RMS = "RMS normalisation takes the mean square over the neurons"

BARRIERS = {
    "native_layer_norm": "layer normalisation takes mean and variance over the neurons",
    "native_group_norm": "group normalisation takes mean and variance over several neurons",
    "_fused_rms_norm": _RMS,
    "convolution": "a convolution outside of a layer with a rule reads the neurons",
    **dict.fromkeys(["mm", "addmm", "mv", "addmv"], _MATRIX),
    **dict.fromkeys(["bmm", "baddbmm", "dot", "vdot"], PRODUCT),
    "_trilinear": "a bilinear form outside of a layer with a rule reads the neurons",
    **dict.fromkeys(["_cdist_forward", "_euclidean_dist", "_pdist_forward", "dist"], _DISTANCE),
    "affine_grid_generator": "affine_grid makes coordinates of the neurons",
    "masked_select": "masked_select picks elements in a way that splitting cannot follow",
    "multinomial": "multinomial samples one of the neurons",
    **dict.fromkeys(["_local_scalar_dense", "equal", "is_nonzero", "_is_all_true", "_is_any_true"], READ),
    "fractional_max_pool2d": NOISE,
    "fractional_max_pool3d": NOISE,
}
MIXED = {
    "_softmax": "softmax normalises over the neurons",
    "_safe_softmax": "softmax normalises over the neurons",
    "_log_softmax": "log-softmax normalises over the neurons",
    **{
        n: f"{n} is an operator that compares the neurons with each other"
        for n in ("sort", "topk", "kthvalue")
    },
    **dict.fromkeys(["_fft_r2c", "_fft_c2r", "_fft_c2c"], "a Fourier transform goes over the neurons"),
}
