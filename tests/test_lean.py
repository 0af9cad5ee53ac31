"""Lean derivatives: equal to torch's, with less work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning_split.lean import LeanDerivatives, adding
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("double")


LAYERS = {
    "1d, stride and padding": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "2d, no bias": (nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 7)),
    "2d, groups and dilation": (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=2, groups=2), (2, 4, 8, 8)),
    "depthwise": (nn.Conv2d(3, 6, 3, padding=1, groups=3), (2, 3, 5, 5)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "same": (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 5, 5)),
    "3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 4, 4, 4)),
    "one sample": (nn.Conv2d(3, 4, 3), (3, 6, 6)),
    "linear": (nn.Linear(3, 4), (5, 3)),
    "linear, no bias": (nn.Linear(3, 4, bias=False), (2, 5, 6, 3)),
    "linear, one sample": (nn.Linear(3, 4), (3,)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), (2, 3)),
    "convolution with weight norm": (nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 2)), (2, 3, 5)),
}


def _derivatives(layers: nn.Module, weight: Tensor, x: Tensor, v: Tensor) -> list[Tensor]:
    """Value, gradient in the weight and Hessian-vector product of a smooth function of the output."""
    y = layers(x)
    (first,) = torch.autograd.grad(y.sin().square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first, weight, v)
    return [y.detach(), first.detach(), second]


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_are_those_of_torch(name: str) -> None:
    """Values and second derivatives in the weight, with BatchNorm in eval mode behind it."""
    layer, shape = LAYERS[name]
    layer = layer.double()
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(len(shape))
    layers = nn.Sequential(layer)
    if norm is not None and isinstance(layer, nn.modules.conv._ConvNd):
        layers.append(norm(layer.out_channels).double())
        layers(torch.randn(shape) * 3 + 1)
        nn.init.normal_(layers[1].weight)
    layers.eval()
    weight = next(p for p in layer.parameters() if p.ndim == layer.weight.ndim and p.numel() > 4)
    x, v = torch.randn(shape), torch.randn_like(weight)
    expected = _derivatives(layers, weight, x, v)
    with LeanDerivatives():
        found = _derivatives(layers, weight, x, v)
        (plain,) = torch.autograd.grad(layers(x).sin().square().sum(), weight)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])
    torch.testing.assert_close(plain, expected[1])


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        transposed = func is torch.ops.aten.convolution.default and args[6]
        self.seen.append("transposed convolution" if transposed else str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_a_product_convolves_twice_and_does_not_transpose() -> None:
    """One convolution with the direction, one weight gradient; torch alone adds a transposed convolution.

    The first derivatives, of which only the graph is wanted, take no weight gradient.
    """
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval()
    weight, x = layers[0].weight, torch.randn(2, 3, 6, 6)
    counts = []
    for lean in (True, False):
        with LeanDerivatives() if lean else torch.enable_grad(), _Names() as names:
            (first,) = torch.autograd.grad(layers(x).sin().sum(), weight, create_graph=True)
        assert names.seen.count("aten.convolution_backward") == (0 if lean else 1)
        with _Names() as names:
            torch.autograd.grad(first, weight, torch.ones_like(weight))
        count = names.seen.count
        counts.append([count(f"aten.{n}") for n in ("convolution", "convolution_backward")])
        assert count("transposed convolution") == (0 if lean else 1)
        assert any("batch_norm" in n for n in names.seen) != lean
    assert counts == [[1, 1], [1, 1]]


@pytest.mark.parametrize("name", [n for n, (layer, _) in LAYERS.items() if isinstance(layer, nn.Conv2d)])
def test_a_constant_weight_is_a_linear_map(name: str) -> None:
    """Behind another layer: no derivative in the weight, neither first nor second; torch forms both."""
    layer, shape = LAYERS[name]
    channel = len(shape) - 3
    first, x = (
        nn.Conv2d(2, shape[channel], 1).double(),
        torch.randn(*shape[:channel], 2, *shape[channel + 1 :]),
    )
    layers = nn.Sequential(first, nn.Tanh(), copy.deepcopy(layer).double().requires_grad_(False))
    v = torch.randn_like(first.weight)
    expected = _derivatives(layers, first.weight, x, v)
    with LeanDerivatives():
        found = _derivatives(layers, first.weight, x, v)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])


def test_a_product_through_depthwise_filters_takes_no_loop_over_them() -> None:
    """One convolution forth and one back for each layer, however many filters there are."""
    counts = []
    for width in (3, 12):
        layers = nn.Sequential(
            nn.Conv2d(2, width, 1), nn.Tanh(), nn.Conv2d(width, width, 3, groups=width).requires_grad_(False)
        ).double()
        weight, x = layers[0].weight, torch.randn(2, 2, 6, 6)
        with LeanDerivatives():
            (first,) = torch.autograd.grad(layers(x).sin().sum(), weight, create_graph=True)
        with _Names() as names:
            torch.autograd.grad(first, weight, torch.ones_like(weight))
        counts.append([names.seen.count(f"aten.{n}") for n in ("convolution", "convolution_backward")])
    assert counts == [[2, 2], [2, 2]]


@pytest.mark.parametrize("plain", [False, True])
def test_gradients_in_matrices_are_added_as_they_are_formed(plain: bool) -> None:
    """Once or twice; what comes by another way is returned beside it, and nothing is counted twice."""
    layer = nn.Linear(3, 4).double()
    x, v = torch.randn(2, 5, 3), torch.randn(4, 3)

    def second(total: Tensor | None) -> Tensor:
        with LeanDerivatives():
            y = layer(x).sin()
            y = y + layer(2 * x[:, :1]).cos() + (x @ layer.weight.T).sigmoid() if plain else y
            (first,) = torch.autograd.grad(y.square().sum(), layer.weight, create_graph=True)
        with adding({} if total is None else {layer.weight: total}) as added:
            (found,) = torch.autograd.grad(first, layer.weight, v)
            assert added(layer.weight, found) == (total is not None and not plain)
        return found

    total = torch.ones(4, 5)[:, :3]
    found = second(total)
    torch.testing.assert_close(total + found - 1, second(None))
    assert float((total - 1).abs().max()) > 0.1
    assert (float(found.abs().max()) > 0) == plain


def test_what_is_not_a_constant_is_left_to_torch() -> None:
    """An input that needs a gradient, and BatchNorm in training mode, are differentiated as ever."""
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    with LeanDerivatives():
        inner = layers[0](x)
        outer = layers[1](inner)
    assert "Convolution" in inner.grad_fn.name()
    assert "BatchNorm" in outer.grad_fn.name()
    (gradient,) = torch.autograd.grad(outer.square().sum(), layers[1].weight)
    assert float(gradient.abs().max()) > 0
