"""Raw matrices over positions: what they make can be neurons of their own, or positions of others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_split import trace
from lightning_split.curvature import SplittingOperator
from torch import Tensor, nn

from networks import loss_of
from test_functional import assert_fourth_order, matrix
from test_situations import assert_grows, assert_refused, lin, net

pytestmark = pytest.mark.usefixtures("double")

X = (2, 4, 3)  # samples, tokens, features


def mixer(mix: Callable[[nn.Module, Tensor], Tensor], **parts: Any) -> nn.Module:
    """A stream of 5 channels before a normalisation, 7 hidden units over 4 tokens, and 6 over channels."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        h = h + mix(m, torch.sin(h))  # channels that are normalised, but later
        h = h + m.down(torch.tanh(m.up(F.layer_norm(h, (5,)))))
        return m.c(h.mean(1))

    return net(fwd, a=lin(3, 5), up=lin(5, 6), down=lin(6, 5), c=lin(5, 2), **parts)


MIXES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "from the left": lambda m, h: m.w2 @ torch.tanh(m.w1 @ h),
    "with a bias": lambda m, h: m.w2 @ torch.tanh(m.w1 @ h + m.b1[:, None]) + m.b2[:, None],
    "einsum": lambda m, h: torch.einsum(
        "ij,bjc->bic", m.w2, torch.tanh(torch.einsum("ij,bjc->bic", m.w1, h))
    ),
    "linear": lambda m, h: F.linear(torch.tanh(F.linear(h.mT, m.w1, m.b1)), m.w2).mT,
    "of layers": lambda m, h: m.l2.weight @ torch.tanh(m.l1.weight @ h + m.l1.bias[:, None]),
    "a filter of one": lambda m, h: F.conv1d(torch.tanh(F.conv1d(h, m.w1[..., None], m.b1)), m.w2[..., None]),
}


def parts() -> dict[str, Any]:
    return {
        **{"w1": matrix(7, 4), "b1": matrix(7), "w2": matrix(4, 7), "b2": matrix(4)},
        **{"l1": lin(4, 7), "l2": lin(7, 4)},
    }


@pytest.mark.parametrize("name", MIXES)
def test_hidden_units_over_tokens_grow(name: str) -> None:
    """As those of a linear layer over a transposed axis do; the channels are normalised and stay."""
    model, hidden = mixer(MIXES[name], **parts()), "l1" if name == "of layers" else "(root)"
    x = torch.randn(X)
    arch = assert_grows(copy.deepcopy(model), x, groups=[hidden, "up"])
    assert arch.group(hidden).width == 7
    assert arch.group(hidden).dim == 4 + (name in ("with a bias", "linear", "of layers", "a filter of one"))
    assert_refused(arch, "a", "normalisation|another axis|not the one along which")
    assert_fourth_order(model, trace(model, x), hidden, x, loss_of(torch.randn(2, 2)))


def test_they_have_the_splitting_matrices_of_a_linear_layer() -> None:
    """The same network in two spellings."""
    raw = mixer(MIXES["with a bias"], **parts())
    plain = mixer(lambda m, h: m.l2(torch.tanh(m.l1(h.mT))).mT, **parts())
    plain.load_state_dict(raw.state_dict())
    with torch.no_grad():
        for layer, weight, bias in ((plain.l1, raw.w1, raw.b1), (plain.l2, raw.w2, raw.b2)):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    x, loss = torch.randn(X), loss_of(torch.randn(2, 2))
    torch.testing.assert_close(raw(x), plain(x))
    found = [
        SplittingOperator(m, trace(m, x), [x], loss).dense(g) for m, g in ((plain, "l1"), (raw, "(root)"))
    ]
    torch.testing.assert_close(*found)


def test_what_lets_more_neurons_grow_is_chosen() -> None:
    """Without the normalisation it is the channels or the hidden units, which are positions of theirs."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        return m.c((m.w2 @ torch.tanh(m.w1 @ torch.tanh(m.a(x)))).mean(1))

    for hidden, grows in ((4, "a"), (6, "(root)")):
        model = net(fwd, a=lin(3, 5), w1=matrix(hidden, 4), w2=matrix(4, hidden), c=lin(5, 2))
        arch = assert_grows(model, torch.randn(X), groups=[grows])
        if grows == "a":
            for name, width in (("w1", 4), ("w2", 4)):
                assert_refused(arch, name, "positions along which other neurons lie")
                assert {u.name: u.width for u in arch.unsplittable}[name] == width


def test_a_graph_stays_where_hidden_units_over_the_same_places_grow() -> None:
    """One matrix over places must be no neurons, so that the units behind it can be some."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.b(m.graph @ torch.tanh(m.a(x))))
        h = m.d(h)
        return m.c(F.layer_norm(m.w2 @ torch.tanh(m.w1 @ torch.sin(h)), (5,)).mean(1))

    model = net(
        fwd,
        **{"a": lin(3, 5), "b": lin(5, 6), "d": lin(6, 5), "c": lin(5, 2)},
        **{"graph": matrix(4, 4), "w1": matrix(7, 4), "w2": matrix(4, 7)},
    )
    arch = assert_grows(model, torch.randn(X), groups=["a", "b", "(root)"])
    assert arch.group("(root)").width == 7
    assert_refused(arch, "graph", "positions along which other neurons lie")


@pytest.mark.parametrize("first", ["normalised", "plain"])
def test_hidden_units_of_a_matrix_that_is_used_twice_grow(first: str) -> None:
    """Over tokens of channels that a normalisation has made nobody's, and of some that are somebody's."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        for turn in ("normalised", "plain"):
            u = F.layer_norm(h, (5,)) if turn == first else torch.sin(h)
            h = h + m.w2 @ torch.tanh(m.w1 @ u)
        return m.c(F.layer_norm(h, (5,)).mean(1))

    model = net(fwd, **parts() | {"a": lin(3, 5), "c": lin(5, 2)})
    assert_grows(model, torch.randn(X), groups=["(root)"])


def test_a_matrix_that_reads_both_ways_is_refused() -> None:
    """Over tokens of neurons, and over plain features: there is nothing that could be a column for each."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = F.layer_norm(m.a(x), (5,))
        return m.c((m.w2 @ torch.tanh(m.w1 @ h)).mean(1)) + m.e(torch.tanh(x[:, 0, :] @ m.w1[:, :3].T))

    model = net(fwd, **parts() | {"a": lin(3, 5), "c": lin(5, 2), "e": lin(7, 2)})
    assert_grows(model, torch.randn(X), groups=[])
