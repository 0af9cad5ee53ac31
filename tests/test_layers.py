"""Rules of single layers."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_split.layers import rule_for
from torch import nn

CONVOLUTIONS = {False: (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
CONVOLUTIONS[True] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def agrees(layer: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the rule knows the shape; if it does, it is that of the layer's output."""
    rule = rule_for(layer)
    assert rule is not None
    told = rule.output_shape(layer, shape)
    if told is not None:
        assert tuple(told) == tuple(layer(torch.zeros(shape)).shape)
    return told is not None


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.data(), st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from(["zeros", "circular"]))
def test_shapes_of_convolutions(
    data: Any, dims: int, transposed: bool, depthwise: bool, padding_mode: str
) -> None:
    """What tracing takes for a convolution's shape is what torch computes, or it asks torch."""
    kernel, stride, dilation = (
        data.draw(st.tuples(*[st.integers(1, n)] * dims)) for n in (3, 3, 1 if transposed else 2)
    )
    padding = data.draw(st.tuples(*[st.integers(0, 1)] * dims) | st.sampled_from(["same", "valid"]))
    if isinstance(padding, str) and (transposed or padding == "same"):
        padding, stride = 0, (1,) * dims
    channels = 4 if depthwise else data.draw(st.sampled_from([2, 4]))
    layer = CONVOLUTIONS[transposed][dims - 1](
        *(4, channels, kernel, stride, padding),
        dilation=dilation,
        groups=4 if depthwise else 2,
        padding_mode="zeros" if transposed else padding_mode,
    )
    known = agrees(layer, (2, 4, 7, 6, 5)[: 2 + dims])
    plain = not transposed and padding_mode == "zeros" and not isinstance(padding, str)
    assert known == plain


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 5), (2, 4, 3)),
        (nn.Linear(3, 5), (3,)),
        (nn.BatchNorm2d(3), (2, 3, 4, 4)),
        (nn.InstanceNorm1d(3, affine=True), (3, 4)),
        (nn.GroupNorm(2, 4), (2, 4, 3)),
        (nn.PReLU(3), (2, 3, 2)),
    ],
)
def test_shapes_of_other_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert agrees(layer, shape)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 5), (2, 4)),
        (nn.Conv2d(3, 5, 3), (3, 8, 8)),
        (nn.Conv2d(3, 5, 3), (2, 4, 8, 8)),
        (nn.Conv2d(3, 5, 3), (2, 3, 2, 2)),
        (nn.Embedding(3, 5), (2,)),
    ],
)
def test_what_a_rule_cannot_tell_is_asked_of_the_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert not agrees(layer, shape)
