"""Raw matrices that a forward pass multiplies with are layers: they read neurons and make neurons."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_split import TopK, fit_to_state_dict, grow, split_neurons, trace
from lightning_split.architecture import Architecture
from lightning_split.curvature import SplittingOperator
from lightning_split.growers import GradMax
from lightning_split.surgery import Split
from torch import Tensor, nn

from exactness import assert_splits_exactly, splits
from networks import loss_of
from test_situations import assert_grows, assert_refused, batch, chain, lin, net

pytestmark = pytest.mark.usefixtures("double")


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def two_layers(call: Callable[[nn.Module, Tensor], Tensor], **parts: Any) -> nn.Module:
    """A layer of 5 neurons, a raw matrix to 6, and a layer that reads those."""
    return net(lambda m, x: m.c(torch.tanh(call(m, torch.tanh(m.a(x))))), a=lin(3, 5), c=lin(6, 2), **parts)


CALLS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (lambda m, h: F.linear(h, m.w, m.b), (6, 5)),
    "linear, transposed": (lambda m, h: F.linear(h, m.w.t()) + m.b, (5, 6)),
    "matmul": (lambda m, h: h @ m.w + m.b, (5, 6)),
    "matmul, transposed": (lambda m, h: torch.matmul(h, m.w.T) * m.b, (6, 5)),
    "from the left": (lambda m, h: (m.w @ h[..., None]).squeeze(-1) + m.b, (6, 5)),
    "from the left, transposed": (lambda m, h: torch.mm(m.w.T, h.T).T + m.b, (5, 6)),
    "one by one, from the left": (lambda m, h: torch.stack([m.w @ x for x in h]) + m.b, (6, 5)),
    "experts from the left": (lambda m, h: torch.bmm(m.w, h.T.expand(2, -1, -1)).sum(0).T, (2, 6, 5)),
    "einsum": (lambda m, h: torch.einsum("oi,bi->bo", m.w, h), (6, 5)),
    "einsum of several": (lambda m, h: torch.einsum("bi,eio->beo", h, m.w).sum(1), (2, 5, 6)),
    "matmul, permuted": (lambda m, h: h @ m.w.permute(1, 0) + m.b, (6, 5)),
    "tensordot": (lambda m, h: torch.tensordot(h, m.w, dims=1) + m.b, (5, 6)),
    "tensordot over named axes": (lambda m, h: torch.tensordot(m.w, h, dims=([-1], [1])).T + m.b, (6, 5)),
    "einsum of more axes": (lambda m, h: torch.einsum("...i, oi -> ...o", h[None], m.w)[0] + m.b, (6, 5)),
    "einsum of experts": (
        lambda m, h: torch.einsum("...ni,...io->...no", [h.expand(2, -1, -1), m.w]).sum(0),
        (2, 5, 6),
    ),
    "experts": (lambda m, h: torch.bmm(h.expand(2, -1, -1), m.w).sum(0), (2, 5, 6)),
    "experts, transposed": (lambda m, h: torch.bmm(h.expand(2, -1, -1), m.w.mT).sum(0), (2, 6, 5)),
    "experts one by one": (lambda m, h: h @ m.w[0] + F.linear(torch.sin(h), m.w[1].T), (2, 5, 6)),
    "unbound": (lambda m, h: sum(torch.einsum("bi,oi->bo", h, w) for w in m.w.unbind()), (2, 6, 5)),
    "sum and product": (lambda m, h: torch.addmm(m.b, h, m.w), (5, 6)),
    "factors by name": (lambda m, h: m.b.addmm(mat1=h, mat2=m.w), (5, 6)),
    "convolution": (lambda m, h: F.conv1d(h[..., None], m.w, m.b).squeeze(-1), (6, 5, 1)),
    "transposed convolution": (
        lambda m, h: F.conv_transpose1d(h[..., None], m.w, m.b).squeeze(-1),
        (5, 6, 1),
    ),
    "convolutions one by one": (
        lambda m, h: sum(F.conv1d(h[..., None], m.w[e]).squeeze(-1) for e in (0, 1)),
        (2, 6, 5, 1),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_raw_matrices_grow_on_both_sides(name: str) -> None:
    """The neurons that enter them, and those that they make; the bias is copied."""
    call, shape = CALLS[name]
    arch = assert_grows(
        two_layers(call, w=matrix(*shape), b=matrix(6)), batch(), groups=["a", "(root)"], rounds=1
    )
    added = name not in (
        "matmul, transposed",
        "einsum",
        "einsum of several",
        "einsum of experts",
        "experts",
        "experts from the left",
        "experts, transposed",
        "experts one by one",
        "unbound",
        "convolutions one by one",
    )
    assert arch.group("(root)").dim == 5 * (2 if shape[0] == 2 else 1) + added
    assert "" in arch.group("a").consumers


def test_a_graph_convolution_grows() -> None:
    """Raw weights in a module of their own, called twice, and a product with the graph between."""

    class Graph(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.weight, self.bias = matrix(i, o), matrix(o)

        def forward(self, x: Tensor, graph: Tensor) -> Tensor:
            return graph @ torch.mm(x, self.weight) + self.bias

    model = net(
        lambda m, x, g: m.c(torch.tanh(m.b(torch.tanh(m.b(torch.tanh(m.a(x, g)), g)), g)), g),
        a=Graph(3, 5),
        b=Graph(5, 5),
        c=Graph(5, 2),
    )
    arch = assert_grows(model, batch(6), torch.rand(6, 6), groups=["a"])
    assert arch.group("a").producers == ("a", "b")


def test_a_vector_that_weighs_neurons_reads_them() -> None:
    """Attention over steps: the scores are products with a raw vector."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        return m.c((h * (h @ m.v).softmax(1)[..., None]).sum(1))

    model = net(fwd, a=lin(3, 5), v=matrix(5), c=lin(5, 2))
    assert assert_grows(model, torch.randn(4, 6, 3), groups=["a"]).group("a").consumers == ("", "c")
    model.fwd = lambda m, x: m.c(((h := torch.tanh(m.a(x))) * (m.v @ h.mT).softmax(1)[..., None]).sum(1))
    assert assert_grows(model, torch.randn(4, 6, 3), groups=["a"]).group("a").consumers == ("", "c")


def test_low_rank_updates_of_a_subclass_grow() -> None:
    """A linear layer with two raw matrices beside its own weight."""

    class LowRank(nn.Linear):
        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o)
            self.down, self.up = matrix(2, i), matrix(o, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias) + (x @ self.down.T) @ self.up.T

    arch = assert_grows(chain(b=LowRank(5, 6)), batch(), groups=["a", "b", "b#2", "c"])
    assert arch.group("b#2").width in (2, 6)


BIASED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "matmul": (lambda m, h: h @ m.w + m.b, {"b": (6,), "w": (5, 6)}),
    "linear": (lambda m, h: F.linear(h, m.w, m.b), {"w": (6, 5), "b": (6,)}),
    "addmm": (lambda m, h: torch.addmm(m.b, h, m.w), {"w": (5, 6), "b": (6,)}),
    "conv": (lambda m, h: F.conv1d(h[..., None], m.w, m.b).squeeze(-1), {"w": (6, 5, 1), "b": (6,)}),
    "view": (lambda m, h: (h @ m.w)[:, None].add(m.b.view(1, -1)).squeeze(1), {"w": (5, 6), "b": (6, 1)}),
    "no bias": (lambda m, h: h @ m.w * m.b, {"w": (5, 6), "b": (6,)}),
}


@pytest.mark.parametrize("name", BIASED)
def test_predictions_for_raw_matrices_hold(name: str) -> None:
    """The rows are the incoming weights, with the bias that is added: second differences of real splits.

    What multiplies a neuron is copied, as the scale of a BatchNorm is.
    """
    call, shapes = BIASED[name]
    model = two_layers(call, **{tensor: matrix(*shape) for tensor, shape in shapes.items()})
    x, loss = batch(16), loss_of(torch.randn(16, 2))
    arch = trace(model, x)
    group = arch.group("(root)")
    assert [block.tensor for block in group.theta] == (["w"] if name == "no bias" else ["w", "b"])
    assert group.dim == (5 if name == "no bias" else 6)
    wide, moved = assert_fourth_order(model, arch, "(root)", x, loss)
    weight = wide.w.movedim(0 if name in ("linear", "conv") else 1, 0).flatten(1)
    torch.testing.assert_close(weight[3] - weight[4], moved[0, :5] - moved[1, :5])


def assert_fourth_order(
    model: nn.Module, arch: Architecture, name: str, x: Tensor, loss: Any
) -> tuple[nn.Module, Tensor]:
    """Really split in two, the loss changes as the splitting matrix says; the rest falls as ε⁴.

    Returns:
        The network after the smaller of two splits of neuron 3, and the displacements.
    """
    group = arch.group(name)
    vectors = torch.zeros(group.width, group.dim)
    direction = torch.randn(group.dim)
    vectors[3] = direction / direction.norm()
    product = SplittingOperator(model, arch, [x], loss).matvec({name: vectors})[name]
    errors = []
    for eps in (0.1, 0.05):
        wide = copy.deepcopy(model)
        moves = torch.stack([eps * vectors[3], -eps * vectors[3]])
        split_neurons(wide, [Split(name, 3, (0.5, 0.5), moves)], arch=arch)
        with torch.no_grad():
            change = float(loss(wide, x) - loss(model, x))
        errors.append(change - eps**2 / 2 * float(product[3] @ vectors[3]))
    assert 16 / 1.35 < errors[0] / errors[1] < 16 * 1.35
    return wide, moves


def test_a_recurrent_network_of_raw_matrices_grows() -> None:
    """A hand-written LSTM: four gates of each neuron in both matrices and in the bias, read by itself."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), m.u.shape[0])
        for step in x.unbind(1):
            i, f, g, o = (step @ m.w + h @ m.u + m.b).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return m.out(h)

    model = net(fwd, w=matrix(3, 20), u=matrix(5, 20), b=matrix(20), out=lin(5, 2))
    x = torch.randn(8, 4, 3)
    arch = assert_grows(copy.deepcopy(model), x, groups=["(root)"])
    assert arch.group("(root)").dim == 4 * (3 + 5 + 1)
    assert_fourth_order(model, arch, "(root)", x, loss_of(torch.randn(8, 2)))


def test_a_raw_layer_has_the_splitting_matrices_of_a_linear_one() -> None:
    """The same network in two spellings."""
    plain = net(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))), a=lin(3, 5), b=lin(5, 6), c=lin(6, 2))
    raw = two_layers(lambda m, h: h @ m.w + m.b, w=matrix(5, 6), b=matrix(6))
    raw.a, raw.c = plain.a, plain.c
    with torch.no_grad():
        raw.w.copy_(plain.b.weight.T)
        raw.b.copy_(plain.b.bias)
    x, loss = batch(16), loss_of(torch.randn(16, 2))
    torch.testing.assert_close(raw(x), plain(x))
    found = [
        SplittingOperator(m, trace(m, x), [x], loss).dense(g) for m, g in ((plain, "b"), (raw, "(root)"))
    ]
    torch.testing.assert_close(*found)


def test_a_frozen_raw_bias_is_copied() -> None:
    """It is no incoming weight that could move, and no reason to leave the neurons alone."""
    model = two_layers(lambda m, h: h @ m.w + m.b, w=matrix(5, 6), b=matrix(6).requires_grad_(False))
    assert assert_grows(model, batch(), groups=["a", "(root)"], rounds=1).group("(root)").dim == 5


@pytest.mark.parametrize("grower", [None, GradMax()], ids=["splitting", "gradmax"])
def test_a_network_of_raw_matrices_grows_and_loads(grower: Any) -> None:
    """Every grower, and a seed-sized module that loads the grown state."""
    model = net(
        lambda m, x: torch.tanh(torch.tanh(m.a(x)) @ m.w1) @ m.w2,
        a=lin(3, 4),
        w1=matrix(4, 5),
        w2=matrix(5, 2),
    )
    seed, x = copy.deepcopy(model), batch(32)
    targets = torch.randn(32, 2)
    for _ in range(2):
        grow(model, [x], loss_of(targets), grower=grower, significance=None)
    assert model.w2.shape[0] > 5
    fit_to_state_dict(seed, model.state_dict())
    seed.load_state_dict(model.state_dict())
    torch.testing.assert_close(seed(x), model(x), rtol=0, atol=0)


def test_the_limit_on_parameters_counts_raw_ones() -> None:
    """Vectors and matrices without a rule are part of what a neuron costs."""
    model = two_layers(lambda m, h: h @ m.w * m.b, w=matrix(5, 6), b=matrix(6))
    x, before = batch(32), sum(p.numel() for p in model.parameters())
    arch = trace(model, x)
    assert arch.group("(root)").params == 5 + 1 + 2
    assert arch.group("a").params == 4 + 6
    limit, loss = before + 25, loss_of(torch.randn(32, 2))
    grow(model, [x], loss, strategy=TopK(1.0), max_params=limit, significance=None)
    after = sum(p.numel() for p in model.parameters())
    assert before < after <= limit


def test_ten_growths_of_raw_matrices_stay_exact() -> None:
    """Against what the network computed at first."""
    model, x = two_layers(lambda m, h: F.linear(h, m.w, m.b), w=matrix(6, 5), b=matrix(6)), batch()
    expected, rng = model(x).detach(), np.random.default_rng(0)
    for _ in range(10):
        arch = trace(model, x)
        split_neurons(model, splits(arch, rng, "ghosts"), arch=arch)
    torch.testing.assert_close(model(x), expected)


def test_attention_of_raw_matrices_grows_in_its_values_and_queries() -> None:
    """Weights of several heads in one tensor, read over heads and channels at once."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hdk->bhtk", x, w) for w in (m.wq, m.wk, m.wv))
        y = torch.einsum("bhij,bhjk->bhik", torch.einsum("bhik,bhjk->bhij", q, k).softmax(-1), v)
        return m.out(torch.tanh(torch.einsum("bhtk,hkd->btd", y, m.wo)))

    parts = {name: nn.Parameter(torch.randn(2, 3, 4)) for name in ("wq", "wk", "wv")}
    model = net(fwd, **parts, wo=nn.Parameter(torch.randn(2, 4, 5)), out=lin(5, 2))
    x, loss = torch.randn(3, 6, 3), loss_of(torch.zeros(3, 6, 2))
    arch = trace(model, x)
    assert sorted(arch.widths.values()) == [4, 4, 5]
    (queries,) = (g for g in arch.groups if g.paired)
    assert ({b.tensor for b in queries.theta}, {b.tensor for b in queries.outgoing}) == ({"wq"}, {"wk"})
    (values,) = (g for g in arch.groups if g.width == 4 and not g.paired)
    assert (values.dim, {block.tensor for block in values.outgoing}) == (2 * 3, {"wo"})
    # linear in the values up to the next reader: the cut is where the values are read
    assert not SplittingOperator(model, arch, [x], loss).dense(values).any()
    assert_grows(model, x, groups=list(arch.widths))


def test_experts_in_one_tensor_grow() -> None:
    """As in Hugging Face's mixtures: each expert's slice multiplies the samples that are sent to it."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        x = F.layer_norm(m.a(x), (5,))
        shares, y = m.router(x).softmax(-1), torch.zeros_like(x)
        for e in range(3):
            rows = torch.where(shares.argmax(-1) == e)[0]
            gate, up = F.linear(x[rows], m.gate_up[e]).chunk(2, dim=-1)
            part = F.linear(F.silu(gate) * up, m.down[e])
            y = y.index_add(0, rows, part * shares[rows, e, None])
        return m.c(torch.tanh(x + y))

    parts = {"gate_up": matrix(3, 12, 5), "down": matrix(3, 5, 6), "router": lin(5, 3)}
    model = net(fwd, a=lin(3, 5), c=lin(5, 2), **parts)
    x = batch(16)
    arch = assert_grows(copy.deepcopy(model), x, groups=["(root)"])
    assert arch.group("(root)").dim == 3 * 2 * 5
    assert_fourth_order(model, arch, "(root)", x, loss_of(torch.randn(16, 2)))


def test_values_of_linear_attention_grow() -> None:
    """Keys times values, summed over positions: of the two the values stay linear; keys and queries stay."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = torch.sigmoid(m.q(x)), torch.sigmoid(m.k(x)), m.v(x)
        sums = torch.einsum("btd,bte->bde", k, v)
        shares = torch.einsum("btd,bd->bt", q, k.sum(1))
        return m.out(torch.tanh(torch.einsum("btd,bde->bte", q, sums) / shares[..., None]))

    model = net(fwd, q=lin(3, 4), k=lin(3, 4), v=lin(3, 5), out=lin(5, 2))
    arch = assert_grows(model, torch.randn(2, 6, 3), groups=["v"])
    assert_refused(arch, "q", "contracts the neurons")
    assert_refused(arch, "k", "pairs the neurons with others")


def test_products_over_positions_cost_no_neuron() -> None:
    """A raw matrix that mixes positions is the same for every neuron."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.conv(x)) @ m.mix + m.bias
        return m.c(torch.tanh(h).sum(2))

    model = net(fwd, conv=nn.Conv1d(2, 4, 3), mix=matrix(6, 5), bias=matrix(5), c=lin(4, 2))
    assert_grows(model, torch.randn(3, 2, 8), groups=["conv"], rounds=1)


@pytest.mark.parametrize("over", [lambda g, x: g @ x, lambda g, x: (x.mT @ g).mT])
def test_a_learned_graph_is_the_same_for_all_neurons(over: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A matrix over the nodes, before the first layer, where it might make neurons, and after it."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(over(m.graph, x)))
        h = torch.tanh(m.b(over(m.graph, h)))
        return m.c(h.mean(1))

    model = net(fwd, graph=matrix(7, 7), a=lin(3, 5), b=lin(5, 4), c=lin(4, 2))
    assert_grows(model, torch.randn(3, 7, 3), groups=["a", "b"], rounds=1)


# what is refused -----------------------------------------------------------------------------------


def test_one_axis_with_two_meanings_is_refused() -> None:
    """What is read and made along one axis cannot be scaled and copied at once."""
    model = net(
        lambda m, x: F.linear(torch.tanh(F.linear(torch.tanh(m.a(x)), m.w)), m.w.t()),
        a=lin(3, 5),
        w=matrix(6, 5),
    )
    assert_refused(assert_grows(model, batch(), groups=[]), "(root)", "two ways")
    model = two_layers(lambda m, h: (h * m.w.mean(1)) @ m.w, w=matrix(5, 6))
    arch = trace(model, batch())
    assert "a" not in arch.widths


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda m, h: h @ m.w + 0 * m.w.sum(0), {"a": "sum mixes the neurons, seen on the tensor 'w'"}),
        (
            lambda m, h: h @ m.w + (torch.ones(4, 3) @ m.w[:3]),
            {"a": "slice cuts .* seen on the tensor 'w'", "(root)": "the tensor 'w', .* mm reads it"},
        ),
        (
            lambda m, h: torch.cdist(h, m.w.t()) + h @ m.w,
            dict.fromkeys(["a", "(root)"], "the tensor 'w', .* belongs to them, and _cdist_forward reads it"),
        ),
    ],
)
def test_a_matrix_that_is_used_otherwise_too_is_refused(call: Any, why: dict[str, str]) -> None:
    """The neurons on the other use's axes stay, for that reason; the others grow."""
    model = two_layers(call, w=matrix(5, 6))
    arch = assert_grows(model, batch(), groups=[g for g in ("a", "(root)") if g not in why], rounds=1)
    for name, pattern in why.items():
        assert_refused(arch, name, pattern)


def test_products_that_are_scaled_and_named_are_no_layers() -> None:
    """Bloom adds its scores to a position bias by ``baddbmm(batch1=…, batch2=…, beta=…)``."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        scores = m.bias.baddbmm(batch1=h, batch2=h.transpose(1, 2), beta=0.5, alpha=0.3)
        return m.c(torch.tanh(m.v(scores.softmax(-1) @ x)))

    model = net(fwd, a=lin(3, 5), v=lin(3, 6), c=lin(6, 2), bias=matrix(1, 6, 6))
    arch = assert_grows(model, torch.randn(4, 6, 3), groups=["v"])
    assert_refused(arch, "a", "a product of activations contracts the neurons")


class Scaled(nn.Linear):
    """The equalised learning rate of StyleGAN."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.7, self.bias)


class LearnedScale(nn.Linear):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.scale = matrix(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scale * self.weight, self.bias)


class Turned(nn.Linear):
    """Falcon's linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("layer", [Scaled, LearnedScale, Turned, lambda i, o: Turned(i, o, bias=False)])
def test_subclasses_that_scale_or_turn_their_weight_grow(layer: Any) -> None:
    """On both sides, and the prediction for their neurons is that of real splits."""
    torch.manual_seed(1)
    model, x = chain(b=layer(5, 6)), batch(16)
    arch = trace(model, x)
    assert arch.group("a").consumers == ("b",)
    assert arch.group("b").dim == (5 if model.b.bias is None else 6)
    assert_fourth_order(model, arch, "b", x, loss_of(torch.randn(16, 2)))
    assert_grows(model, x, groups=["a", "b", "c"], rounds=1)


class NormScaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class RowScaled(nn.Linear):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.scale = matrix(o, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class ThereAndBack(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T + self.bias) @ self.weight


class BiasLater(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T) + self.bias


@pytest.mark.parametrize("kind", [NormScaled, RowScaled, ThereAndBack, BiasLater])
def test_subclasses_that_do_more_with_their_weight_do_not_grow(kind: type[nn.Linear]) -> None:
    """A scale that growth would change, or one for each row; a weight used in both directions."""
    arch = assert_splits_exactly(chain(b=kind(5, 5), c=lin(5, 4)), batch())
    assert "b" not in arch.widths, str(arch)
