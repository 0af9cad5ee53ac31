"""Tensors without values: what shapes operators give them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning_split.outlines import Outline, shape_only
from torch import Tensor, nn


def _outline(x: Tensor) -> Tensor:
    hollow: Tensor = Outline(x).example
    assert shape_only(hollow)
    return hollow


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(4), nn.LayerNorm((3, 4)), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 6)],
)
def test_shapes_are_those_of_the_operators(layer: nn.Module) -> None:
    """For the operators whose shapes the library tells itself: outputs as on values."""
    for x in (torch.randn(2, 3, 4), torch.randn(5, 2, 3, 4)):
        with torch.no_grad():
            expected, found = layer(x), layer(_outline(x))
        assert shape_only(found)
        assert (found.shape, found.dtype, found.stride()) == (
            expected.shape,
            expected.dtype,
            expected.stride(),
        )


def test_statistics_of_a_normalisation() -> None:
    """They have size one along the axes that they are taken over."""
    x = torch.randn(2, 3, 4)
    expected = torch.native_layer_norm(x, (3, 4), None, None, 1e-5)
    found = torch.native_layer_norm(_outline(x), (3, 4), None, None, 1e-5)
    assert [t.shape for t in found] == [t.shape for t in expected]


def test_sizes_that_do_not_fit_are_errors() -> None:
    """Trial splits rely on the errors that operators raise."""
    x = _outline(torch.randn(2, 4))
    with pytest.raises(RuntimeError):
        F.layer_norm(x, (5,), torch.ones(5), torch.ones(5))
    with pytest.raises(RuntimeError):
        F.layer_norm(x, (4,), torch.ones(5), torch.ones(5))
    with pytest.raises(RuntimeError):
        F.linear(x, torch.ones(3, 5), torch.ones(3))
    with pytest.raises(RuntimeError):
        F.linear(x, torch.ones(3, 4), torch.ones(2))
