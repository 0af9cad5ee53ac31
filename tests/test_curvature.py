"""Splitting matrices: against closed forms, and against second differences of really split networks."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from lightning_split import (
    LayerRule,
    NewNeurons,
    SteepestSplitting,
    register_layer_rule,
    split_neurons,
    trace,
)
from lightning_split.context import GrowthContext
from lightning_split.curvature import SplittingOperator
from lightning_split.segments import in_words
from lightning_split.surgery import Split
from lightning_split.surrogates import SmoothDerivatives
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from networks import CASES, loss_of, randomised, relu_mlp

pytestmark = pytest.mark.usefixtures("double")


class Rbf(nn.Module):
    """exp(-(x - centre)² / 2) of one-dimensional inputs, as in S2D B.1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-(x - self.centres.T).square() / 2)


@register_layer_rule(Rbf)
class RbfRule(LayerRule):
    role = "mixer"

    def axes(self, layer: nn.Module) -> dict[str, dict[int, str]]:
        return {"centres": {0: "out"}}


def test_closed_form_of_an_rbf_network() -> None:
    """S_i = E[Φ'(f) w_i σ''(θ_i)] for a sum of radial basis functions (S2D, Definition 2.1)."""
    model = nn.Sequential(Rbf(5), nn.Linear(5, 1))
    x, y = torch.randn(200, 1), torch.randn(200, 1)
    arch = trace(model, x)
    operator = SplittingOperator(model, arch, [x], loss_of(y))
    with torch.no_grad():
        d = x - model[0].centres.T
        slope = 2 * (model(x) - y) * model[1].weight
        expected = (slope * (d.square() - 1) * torch.exp(-d.square() / 2)).mean(0)
    torch.testing.assert_close(operator.dense("0").flatten(), expected, rtol=1e-12, atol=1e-14)


def test_closed_form_of_a_tanh_network() -> None:
    """S_i = E[c_i σ''(z_i) x̃ x̃ᵀ] with x̃ = (x, 1) for one hidden layer, bias included."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(50, 3), torch.randn(50, 2)
    operator = SplittingOperator(model, trace(model, x), [x], loss_of(y))
    with torch.no_grad():
        t = torch.tanh(model[0](x))
        c = (model(x) - y) @ model[2].weight * 2 / y.numel()
        inputs = torch.cat([x, torch.ones(50, 1)], 1)
        expected = torch.einsum("ni,na,nb->iab", c * -2 * t * (1 - t**2), inputs, inputs)
    torch.testing.assert_close(operator.dense("0"), expected, rtol=1e-12, atol=1e-14)


def _change_of_loss(model: nn.Module, x: Tensor, y: Tensor, arch: object, splits: list[Split]) -> float:
    grown = copy.deepcopy(model)
    split_neurons(grown, splits, arch=arch)
    loss = loss_of(y)
    with torch.no_grad():
        return float(loss(grown, x) - loss(model, x))


@pytest.mark.parametrize("name", CASES)
def test_quadratic_form_is_the_second_difference_of_split_networks(name: str) -> None:
    """vᵀ S_i v = lim 2 ΔL / ε² over real (½, ½) splits along ±v, by Richardson extrapolation."""
    case = CASES[name]
    model, x = randomised(case.model()).eval(), case.inputs()
    if name in ("text", "volumes"):  # PReLU and max pooling: no kink may lie inside the difference
        for m in model.modules():
            if isinstance(m, nn.PReLU):
                nn.init.ones_(m.weight)
        if name == "volumes":
            model[3] = nn.AvgPool3d(2)
    y = torch.randn_like(model(x).detach())
    arch = trace(model, x)
    operator = SplittingOperator(model, arch, [x], loss_of(y), surrogate_beta=None)
    for group in arch.groups:
        v = torch.randn(group.width, group.dim)
        v /= v.norm(dim=1, keepdim=True)
        exact = (operator.matvec({group.name: v})[group.name] * v).sum(1)
        for neuron in (0, group.width - 1):
            differences = []
            for step in (2e-2, 1e-2):
                delta = torch.stack([v[neuron], -v[neuron]]) * step
                split = Split(group.name, neuron, (0.5, 0.5), delta)
                differences.append(2 * _change_of_loss(model, x, y, arch, [split]) / step**2)
            extrapolated = (4 * differences[1] - differences[0]) / 3
            torch.testing.assert_close(
                torch.tensor(extrapolated), exact[neuron], rtol=2e-4, atol=2e-7 * float(exact.abs().max() + 1)
            )


@pytest.mark.parametrize("name", ["mlp", "residual", "separable", "gated", "shared"])
@pytest.mark.parametrize(
    ("weights", "along", "order"),
    [((0.5, 0.5), ((1.0,), (-1.0,)), 16), ((-1.0, 2.0), ((1.0,), (0.5,)), 8)],
    ids=["symmetric", "asymmetric"],
)
def test_remainder_falls_with_the_order_that_theory_says(
    name: str, weights: tuple[float, float], along: tuple[tuple[float], ...], order: int
) -> None:
    """|ΔL - predicted| falls as ε⁴ for symmetric splits (odd terms cancel) and as ε³ for the others.

    All neurons of all groups are split at once: the effects add up without cross terms (S2D, Theorem 2.4).
    """
    case = CASES[name]
    model, x = randomised(case.model()).eval(), case.inputs()
    y = torch.randn_like(model(x).detach())
    arch = trace(model, x)
    operator = SplittingOperator(model, arch, [x], loss_of(y))
    vectors = {}
    for group in arch.groups:
        v = torch.randn(group.width, group.dim)
        vectors[group.name] = v / v.norm(dim=1, keepdim=True)
    products = operator.matvec(vectors)
    a = torch.tensor(along)
    curvature = sum(w * float(t) ** 2 for w, t in zip(weights, a, strict=True))
    predicted = curvature * sum(float((products[n] * v).sum()) for n, v in vectors.items())
    assert abs(predicted) > 1e-3
    remainders = []
    for step in (0.02, 0.01, 0.005):
        splits = [Split(n, i, weights, a * v[i] * step) for n, v in vectors.items() for i in range(len(v))]
        remainders.append(_change_of_loss(model, x, y, arch, splits) - step**2 / 2 * predicted)
    for coarse, fine in itertools.pairwise(remainders):
        assert order / 1.35 < coarse / fine < order * 1.35, (remainders, coarse / fine)


def test_training_mode_uses_the_statistics_of_the_batch() -> None:
    """With train=True the matrix is that of BatchNorm in training mode, again by second differences."""
    case = CASES["residual"]
    model, x = randomised(case.model()).train(), case.inputs()
    y = torch.randn(8, 3)
    arch = trace(model, x)
    group = arch.group("conv1")
    operator = SplittingOperator(model, arch, [x], loss_of(y), train=True)
    frozen = SplittingOperator(model, arch, [x], loss_of(y))
    v = torch.zeros(group.width, group.dim)
    v[1] = torch.randn(group.dim)
    v[1] /= v[1].norm()
    exact = operator.matvec({"conv1": v})["conv1"][1] @ v[1]
    differences = [
        2
        * _change_of_loss(model, x, y, arch, [Split("conv1", 1, (0.5, 0.5), torch.stack([v[1], -v[1]]) * e)])
        / e**2
        for e in (4e-3, 2e-3)
    ]
    extrapolated = torch.tensor((4 * differences[1] - differences[0]) / 3)
    torch.testing.assert_close(extrapolated, exact, rtol=1e-3, atol=1e-8)
    assert abs(float(frozen.matvec({"conv1": v})["conv1"][1] @ v[1] - exact)) > 1e-3 * float(exact.abs())


def test_products_of_all_groups_at_once_are_those_of_each_alone() -> None:
    """The operator is block-diagonal, symmetric, linear, and independent of how it is asked."""
    case = CASES["residual"]
    model, x = randomised(case.model()), case.inputs()
    arch = trace(model, x)
    operator = SplittingOperator(model, arch, [x, x * 2], loss_of(torch.randn(8, 3)))
    vectors = {n: torch.randn(shape) for n, shape in operator.shapes.items()}
    together = operator.matvec(vectors)
    for name, v in vectors.items():
        torch.testing.assert_close(operator.matvec({name: v})[name], together[name])
        dense = operator.dense(name)
        torch.testing.assert_close(dense, dense.mT)
        torch.testing.assert_close(torch.einsum("nij,nj->ni", dense, v), together[name])


def test_batches_are_averaged_and_kept_graphs_change_nothing() -> None:
    """S over several batches is the mean; doubling the batches or keeping all graphs is bit-neutral."""
    case = CASES["mlp"]
    model, loss = case.model(), loss_of(torch.randn(16, 3))
    a, b = case.inputs(), case.inputs()
    arch = trace(model, a)
    one, two, both, all_kept, twice = (
        SplittingOperator(model, arch, batches, loss, cache_bytes=keep)
        for batches, keep in (([a], 0), ([b], 0), ([a, b], 0), ([a, b], 2**30), ([a, b, a, b], 0))
    )
    v = {n: torch.randn(shape) for n, shape in one.shapes.items()}
    expected = {n: (one.matvec(v)[n] + two.matvec(v)[n]) / 2 for n in v}
    torch.testing.assert_close(both.matvec(v), expected)
    assert all(torch.equal(both.matvec(v)[n], all_kept.matvec(v)[n]) for n in v)
    torch.testing.assert_close(twice.matvec(v), expected)
    assert (len(both._kept), len(all_kept._kept)) == (0, 2)
    all_kept.release()
    assert not all_kept._kept
    assert all(torch.equal(both.matvec(v)[n], all_kept.matvec(v)[n]) for n in v)


def test_a_linear_neuron_has_no_splitting_matrix() -> None:
    """Without an activation σ'' = 0, so S = 0 exactly."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(8, 3)
    operator = SplittingOperator(model, trace(model, x), [x], loss_of(torch.randn(8, 2)))
    assert float(operator.dense("0").abs().max()) == 0.0


def test_relu_has_the_derivatives_of_a_softplus() -> None:
    """S of a ReLU network is E[c β s(1-s) x̃ x̃ᵀ], with the cotangents of the true network."""
    model = relu_mlp()
    x, y = torch.randn(40, 5), torch.randn(40, 3)
    operator = SplittingOperator(model, trace(model, x), [x], loss_of(y))
    with torch.no_grad():
        z = model[0](x.clone())
        h = torch.relu(z)
        u = model[2](h)
        slope = torch.where(u > 0, 1.0, 0.1)
        c = ((2 / y.numel() * (model(x.clone()) - y)) @ model[4].weight * slope) @ model[2].weight
        s = torch.sigmoid(3 * z)
        inputs = torch.cat([x, torch.ones(40, 1)], 1)
        expected = torch.einsum("ni,na,nb->iab", c * 3 * s * (1 - s), inputs, inputs)
    torch.testing.assert_close(operator.dense("0"), expected)


KINKED = {
    "relu": (F.relu, F.softplus),
    "relu_": (lambda x: (x * 1).relu_(), F.softplus),
    "F.relu inplace": (lambda x: F.relu(x * 1, True), F.softplus),
    "nn.ReLU inplace": (lambda x: nn.ReLU(True)(x * 1), F.softplus),
    "clamp": (lambda x: x.clamp(min=0), F.softplus),
    "clamp_min": (lambda x: torch.clamp_min(x, 0), F.softplus),
    "leaky": (nn.LeakyReLU(0.2), lambda x, b: 0.2 * x + 0.8 * F.softplus(x, b)),
    "prelu": (nn.PReLU(1, 0.3), lambda x, b: 0.3 * x + 0.7 * F.softplus(x, b)),
    "rrelu": (nn.RReLU(0.1, 0.3).eval(), lambda x, b: 0.2 * x + 0.8 * F.softplus(x, b)),
    "relu6": (nn.ReLU6(), lambda x, b: F.softplus(x, b) - F.softplus(x - 6, b)),
    "hardtanh": (nn.Hardtanh(), lambda x, b: F.softplus(x + 1, b) - F.softplus(x - 1, b)),
    "threshold": (nn.Threshold(0.5, 0.5), lambda x, b: F.softplus(x - 0.5, b)),
    "hardsigmoid": (nn.Hardsigmoid(), lambda x, b: (F.softplus(x + 3, b) - F.softplus(x - 3, b)) / 6),
    "hardswish": (nn.Hardswish(), lambda x, b: x * (F.softplus(x + 3, b) - F.softplus(x - 3, b)) / 6),
    "softshrink": (nn.Softshrink(0.4), lambda x, b: F.softplus(x - 0.4, b) - F.softplus(-x - 0.4, b)),
    "abs": (torch.abs, lambda x, b: F.softplus(x, b) + F.softplus(-x, b)),
}


@pytest.mark.parametrize("name", KINKED)
def test_surrogates_keep_the_value_and_smooth_the_derivatives(name: str) -> None:
    """Value of the true function; first and second derivative of its softplus counterpart, in every form."""
    function, smooth = KINKED[name]
    function = function.double() if isinstance(function, nn.Module) else function
    x = torch.randn(64, requires_grad=True)
    value = function(x.detach().clone())
    derivatives = []
    for f in (function, lambda t: smooth(t, 3.0)):
        with SmoothDerivatives(3.0):
            y = f(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        derivatives.append((y.detach(), first.detach(), second))
    torch.testing.assert_close(derivatives[0][0], value, rtol=0, atol=0)
    torch.testing.assert_close(derivatives[0][1], derivatives[1][1])
    torch.testing.assert_close(derivatives[0][2], derivatives[1][2])
    assert float(derivatives[0][2].abs().max()) > 1e-2


def test_an_in_place_activation_whose_result_is_ignored_still_writes() -> None:
    """x.relu_() as a statement: what reads x afterwards sees the smooth derivatives too."""
    x = torch.randn(10, requires_grad=True)
    with SmoothDerivatives(3.0):
        y = x * 2
        y.relu_()
    (first,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y.detach(), (x * 2).relu().detach())
    torch.testing.assert_close(first, 2 * torch.sigmoid(6 * x).detach())


def test_measuring_leaves_no_trace() -> None:
    """Rule 1: parameters, gradients, buffers, modes, hooks and random state are bit-identical afterwards."""
    case = CASES["residual"]
    model, x = randomised(case.model()).train(), case.inputs()
    arch = trace(model, x)
    model.stem.weight.grad = torch.randn_like(model.stem.weight)
    grad = model.stem.weight.grad.clone()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    operator = SplittingOperator(model, arch, [x], loss_of(torch.zeros(8, 3)), train=True)
    operator.matvec({"conv1": torch.ones(5, 36)})
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(model.stem.weight.grad, grad)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["stem.weight"]
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_errors_are_sentences() -> None:
    """What is refused, where, and what to do."""
    case = CASES["mlp"]
    model, x = case.model(), case.inputs()
    arch = trace(model, x)
    good = loss_of(torch.zeros(16, 3))

    def product(loss: object, batches: list[Tensor], v: dict[str, Tensor]) -> None:
        SplittingOperator(model, arch, batches, loss).matvec(v)

    ones = {"0": torch.ones(7, 6)}
    for loss, batches, v, message in (
        (good, [], ones, "at least one batch"),
        (good, [x], {"9": ones["0"]}, "no channel group named '9'; the groups are: '0', '3'"),
        (good, [x], {"0": torch.ones(7, 5)}, r"group '0' have shape \(7, 5\), not \(7, 6\)"),
        (lambda m, b: m(b), [x], ones, r"one scalar tensor.*returned \(16, 3\)"),
        (lambda m, b: good(m, b) / 0, [x, x], ones, "loss of batch 0 is inf"),
        (
            lambda m, b: torch.ones((), requires_grad=True),
            [x],
            ones,
            "does not depend on any splittable neuron",
        ),
        (lambda m, b: torch.ones(()), [x], ones, "does not depend on the network's parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            product(loss, batches, v)


def test_values_overwritten_before_they_are_differentiated_are_refused_in_words() -> None:
    """A cache that a pass writes to twice (Hugging Face's RWKV in eval mode): torch itself fails."""

    class Cached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(2, 16, 2)
            state[0] = super().forward(x)
            y = torch.sin(state[0])
            state[1] = y.detach()
            return y

    model, x, loss = (
        Cached(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
        torch.randn(16, 3),
        loss_of(torch.zeros(16, 2)),
    )
    with pytest.raises(RuntimeError, match="inplace"):
        loss(model, x).backward()
    context = GrowthContext(model, trace(model, x), loss, [x])
    assert context.arch.widths == {"0": 5}
    for grower in (SteepestSplitting(), NewNeurons()):
        with pytest.raises(ValueError, match="writes in place to values that its gradient needs"):
            grower.propose(context, step_size=0.1)


class _Attending(nn.Module):
    """Fused attention between layers that are split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixed = nn.Linear(3, 5), nn.Linear(5, 6)
        self.values, self.out = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mixed(torch.tanh(self.first(x)))
        return self.out(torch.tanh(F.scaled_dot_product_attention(h, h, self.values(h))))


def test_fused_attention_has_second_derivatives() -> None:
    """The kernels of fused attention cannot be differentiated twice; its plain form can, and is equal."""
    torch.manual_seed(0)
    model, x = _Attending().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    arch = trace(model, x)
    assert {"first", "values"} <= arch.widths.keys()
    operator = SplittingOperator(model, arch, [x], lambda m, b: (m(b) - 1).square().mean())
    products = operator.matvec({g.name: torch.ones(g.width, g.dim).double() for g in arch.groups})
    assert float(products["values"].abs().max()) > 1e-8


class _Heads(nn.Module):
    """Attention heads, whose number is left open: one neuron owns several rows of three matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_products_of_whole_heads_are_second_differences() -> None:
    """Also where the products of matrices are added up in the heads' own vectors."""
    model, x = _Heads(), torch.randn(5, 4, 4)
    y, arch = torch.randn(5, 4, 2), trace(model, x)
    (group,) = arch.groups
    assert (group.width, group.dim) == (2, 3 * 15)
    v = torch.randn(2, 45)
    exact = SplittingOperator(model, arch, [x], loss_of(y)).matvec({group.name: v})[group.name][1] @ v[1]
    differences = []
    for step in (1e-2, 5e-3):
        split = Split(group.name, 1, (0.5, 0.5), torch.stack([v[1], -v[1]]) * step)
        differences.append(2 * _change_of_loss(model, x, y, arch, [split]) / step**2)
    assert (4 * differences[1] - differences[0]) / 3 == pytest.approx(float(exact), rel=1e-4)


def test_an_operator_without_second_derivative_is_named() -> None:
    """A sentence says which operator it is, and what to do, in place of PyTorch's error."""

    torch.manual_seed(0)
    h = torch.randn(1, 1, 4, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        mixed = F.scaled_dot_product_attention(h, h, h)
    (first,) = torch.autograd.grad(mixed.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError) as raised:
        torch.autograd.grad(first.sum(), h)
    error = in_words(raised.value)
    assert isinstance(error, ValueError)
    assert re.search(r"flash_attention.*exclude", str(error))
    other = RuntimeError("out of memory")
    assert in_words(other) is other
