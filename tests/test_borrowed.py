"""Weights of layers that the code around them uses itself: calls of the layer, copies, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_split import GradMax, MeasuredLatency, fit_to_state_dict, grow, trace
from lightning_split.context import GrowthContext
from lightning_split.curvature import SplittingOperator
from lightning_split.growers import Folding, NotApplicableError
from lightning_split.tracing import trace_step
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from networks import loss_of
from test_functional import assert_fourth_order, matrix
from test_situations import assert_grows, assert_refused, batch, lin, net

pytestmark = pytest.mark.usefixtures("double")

Call = Callable[[nn.Module, Tensor], Tensor]


def around(call: Call, b: nn.Module | None = None, **parts: Any) -> nn.Module:
    """A layer of 6 neurons, what the code makes of them by a layer ``b``, and a layer that reads it."""
    parts = {"a": lin(3, 6), "b": b or lin(6, 4), "c": lin(4, 2)} | parts
    return net(lambda m, x: m.c(torch.tanh(call(m, torch.tanh(m.a(x))))), **parts)


def on_maps(call: Call, b: nn.Module, **parts: Any) -> nn.Module:
    """The same with maps, whose places are averaged at last."""
    parts = {"a": nn.Conv1d(3, 6, 3), "b": b, "c": lin(4, 2)} | parts
    return net(lambda m, x: m.c(torch.tanh(call(m, torch.tanh(m.a(x)))).mean(-1)), **parts)


LINEAR: dict[str, Call] = {
    "linear": lambda m, h: F.linear(h, m.b.weight, m.b.bias),
    "bias by name": lambda m, h: F.linear(h, m.b.weight, bias=m.b.bias),
    "bias later": lambda m, h: F.linear(h, m.b.weight) + m.b.bias,
    "without its bias": lambda m, h: F.linear(h, m.b.weight),
    "bias of another layer": lambda m, h: F.linear(h, m.b.weight, m.c2.bias),
    "matmul": lambda m, h: h @ m.b.weight.T + m.b.bias,
    "from the left": lambda m, h: (m.b.weight @ h.T + m.b.bias[:, None]).T,
    "einsum": lambda m, h: torch.einsum("oi,bi->bo", m.b.weight, h) + m.b.bias,
    "addmm": lambda m, h: torch.addmm(m.b.bias, h, m.b.weight.t()),
    "permuted": lambda m, h: h @ m.b.weight.permute(1, 0) * m.b.bias,
    "cast": lambda m, h: F.linear(h, m.b.weight.to(h.dtype, copy=True), m.b.bias.to(h.dtype, copy=True)),
    "a stack of one": lambda m, h: torch.bmm(h[None], m.b.weight.t()[None])[0],
    "twice": lambda m, h: F.linear(h, m.b.weight, m.b.bias) * F.linear(torch.sin(h), m.b.weight),
    "called and used": lambda m, h: m.b(h) + torch.sin(h) @ m.b.weight.T,
    "used and called": lambda m, h: torch.sin(F.linear(h, m.b.weight)) * m.b(torch.sin(h)),
    "a bias as a gate": lambda m, h: m.b(h) * torch.sigmoid(m.b.bias),
    "one row at a time": lambda m, h: torch.stack([m.b.weight @ row for row in h]),
    "in a step that records nothing": lambda m, h: m.b(h) + _unrecorded(lambda: h @ m.b.weight.T),
}


def _unrecorded(call: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return call()


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_layers_weight_grows_where_the_code_uses_it(name: str) -> None:
    """On both sides, as if the layer had been called."""
    model = around(LINEAR[name], c2=lin(1, 4))
    arch = assert_grows(model, batch(), groups=["a", "b"])
    assert arch.group("a").consumers == ("b",)
    assert arch.group("b").dim == 7 + 2 * (name == "bias of another layer")
    assert model.b.out_features == len(model.b.weight) > 4


MAPS: dict[str, tuple[Call, Callable[[], nn.Module]]] = {
    "convolution": (lambda m, h: F.conv1d(h, m.b.weight, m.b.bias, padding=1), lambda: nn.Conv1d(6, 4, 3)),
    "of another stride": (lambda m, h: F.conv1d(h, m.b.weight, stride=2), lambda: nn.Conv1d(6, 4, 3)),
    "in groups": (
        lambda m, h: F.conv1d(h, m.b.weight, m.b.bias, groups=2),
        lambda: nn.Conv1d(6, 4, 3, groups=2),
    ),
    "transposed": (
        lambda m, h: F.conv_transpose1d(h, m.b.weight, m.b.bias, 2),
        lambda: nn.ConvTranspose1d(6, 4, 3),
    ),
    "transposed, in groups": (
        lambda m, h: F.conv_transpose1d(h, m.b.weight, m.b.bias, 2, groups=2),
        lambda: nn.ConvTranspose1d(6, 4, 3, groups=2),
    ),
    "a filter of one as a matrix": (
        lambda m, h: m.b.weight.squeeze(-1) @ h + m.b.bias.view(-1, 1),
        lambda: nn.Conv1d(6, 4, 1),
    ),
    "flattened": (
        lambda m, h: F.linear(h.mT, m.b.weight.flatten(1), m.b.bias).mT,
        lambda: nn.Conv1d(6, 4, 1),
    ),
    "one tap": (lambda m, h: m.b.weight[..., 1] @ h, lambda: nn.Conv1d(6, 4, 3)),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_convolutions_filters_grow_where_the_code_uses_them(name: str) -> None:
    """Also with another stride or padding than the layer's, which its neurons do not know of."""
    call, layer = MAPS[name]
    model = on_maps(call, layer())
    arch = assert_grows(model, torch.randn(3, 3, 9), groups=["a", "b"])
    assert arch.group("a").consumers == ("b",)


FILTERS: dict[str, Call] = {
    "squeezed": lambda m, h: h * m.b.weight.squeeze(1).sum(-1) + m.b.bias,
    "taps": lambda m, h: (torch.stack([h, h**2, torch.sin(h)], -1) * m.b.weight.squeeze(1)).sum(-1),
    "viewed": lambda m, h: (h[..., None] * m.b.weight.view(len(m.b.weight), -1)).sum(-1) + m.b.bias,
    "first tap": lambda m, h: h * m.b.weight[:, 0, 0],
    "convolution": lambda m, h: F.conv1d(
        h[..., None].expand(-1, -1, 5), m.b.weight, m.b.bias, groups=h.shape[1]
    ).sum(-1),
    "of the layer's groups": lambda m, h: F.conv1d(
        torch.stack([h, h**2, h**3], -1), m.b.weight, groups=m.b.groups
    ).sum(-1),
    "squeezed and back": lambda m, h: F.conv1d(
        torch.stack([h, h**2, h**3], -1), 2 * m.b.weight.squeeze(1).unsqueeze(1), groups=len(m.b.weight)
    ).sum(-1),
    "called and used": lambda m, h: m.b(torch.stack([h, h**2, h**3], -1)).sum(-1) + h * m.b.weight[:, 0, 1],
}


@pytest.mark.parametrize("name", FILTERS)
def test_depthwise_filters_are_copied_where_the_code_uses_them(name: str) -> None:
    """Element by element, or in a convolution of the code's own."""
    model = around(FILTERS[name], nn.Conv1d(6, 6, 3, groups=6), c=lin(6, 2))
    arch = assert_grows(model, batch(), groups=["a"])
    assert arch.group("a").channelwise == ("b",)
    assert model.b.in_channels == model.b.groups == model.a.out_features > 6


def test_several_filters_for_each_channel() -> None:
    """Two, side by side; they move as one neuron."""
    model = around(
        lambda m, h: F.conv1d(h[..., None].expand(-1, -1, 3), m.b.weight, m.b.bias, groups=h.shape[1]).sum(
            -1
        ),
        nn.Conv1d(6, 12, 3, groups=6),
        c=lin(12, 2),
    )
    arch = assert_grows(model, batch(), groups=["a"])
    assert arch.group("a").consumers == ("c",)


def test_raw_depthwise_filters_are_copied() -> None:
    """Parameters of a module without a rule; one filter or two for each channel."""
    for width in (6, 12):
        model = around(
            lambda m, h: F.conv1d(h[..., None].expand(-1, -1, 3), m.w, m.v, groups=h.shape[1]).sum(-1),
            c=lin(width, 2),
            w=matrix(width, 1, 3),
            v=matrix(width),
        )
        assert_grows(model, batch(), groups=["a"])


TABLES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "looked up": lambda m, h, ids: h + F.embedding(ids, m.b.weight),
    "indexed": lambda m, h, ids: h + m.b.weight[ids],
    "the first places": lambda m, h, ids: h + m.b.weight[: len(h)],
    "all of them": lambda m, h, ids: h * m.b.weight.mean(0),
    "called and used": lambda m, h, ids: h + m.b(ids) + m.b.weight[0],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_grows_where_the_code_uses_it(name: str) -> None:
    """The code takes rows of an embedding, whose columns are weights of the neurons that they meet."""
    model = net(
        lambda m, x: m.c(torch.tanh(TABLES[name](m, torch.tanh(m.a(x)), torch.arange(4) % 3))),
        **{"a": lin(3, 6), "b": nn.Embedding(7, 6), "c": lin(6, 2)},
    )
    arch = assert_grows(model, batch(), groups=["a"])
    assert arch.group("a").producers == ("a", "b")
    assert arch.group("a").dim == 4 + 7


def test_a_raw_table_is_looked_up() -> None:
    """And grows with the neurons that it meets."""
    model = net(
        lambda m, x: m.c(torch.tanh(m.a(x) + F.embedding(torch.arange(4) % 3, m.t))),
        **{"a": lin(3, 6), "t": matrix(7, 6), "c": lin(6, 2)},
    )
    assert_grows(model, batch(), groups=["a"])


def test_the_linear_layer_of_gpt2() -> None:
    """Its weight lies the other way round."""
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)
    model = around(lambda m, h: h @ m.b.weight + m.b.bias, layer)
    assert assert_grows(model, batch(), groups=["a", "b"]).group("b").dim == 7
    assert model.b.nf == model.b.weight.shape[1]


class Mamba(nn.Module):
    """A selective state space as mamba_ssm writes it: no layer but the last two is called."""

    def __init__(self, d: int, inner: int, rank: int = 2, state: int = 3) -> None:
        super().__init__()
        self.rank, self.state = rank, state
        self.in_proj = lin(d, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj = lin(inner, rank + 2 * state, bias=False)
        self.dt_proj = lin(rank, inner)
        self.A_log, self.D = nn.Parameter(torch.rand(inner, state)), matrix(inner)
        self.out_proj = lin(inner, d)

    def convolved(self, x: Tensor) -> Tensor:
        weight = self.conv1d.weight.view(self.conv1d.weight.size(0), self.conv1d.weight.size(2))
        steps = F.pad(x, (2, 0)).unfold(-1, 3, 1)
        return (steps * weight[:, None]).sum(-1) + self.conv1d.bias[:, None]

    def forward(self, h: Tensor) -> Tensor:
        b, length, d = h.shape
        xz = (self.in_proj.weight @ h.reshape(-1, d).T).view(-1, b, length).transpose(0, 1)
        x, z = xz.chunk(2, dim=1)
        x = F.silu(self.convolved(x))
        parts = self.x_proj(x.transpose(1, 2).reshape(b * length, -1))
        dt, B, C = parts.split([self.rank, self.state, self.state], -1)
        dt = (self.dt_proj.weight @ dt.t()).view(-1, b, length).transpose(0, 1)
        dt = F.softplus(dt + self.dt_proj.bias.to(dt.dtype)[:, None])
        A, B, C = -torch.exp(self.A_log), B.view(b, length, -1), C.view(b, length, -1)
        s, ys = x.new_zeros(b, x.shape[1], self.state), []
        for t in range(length):
            s = torch.exp(dt[:, :, t, None] * A) * s + (dt[:, :, t] * x[:, :, t])[..., None] * B[:, None, t]
            ys.append((s * C[:, None, t]).sum(-1))
        y = torch.stack(ys, -1) + self.D[:, None] * x
        return self.out_proj((y * F.silu(z)).transpose(1, 2))


def test_a_selective_state_space_grows() -> None:
    """The inner channels, with both halves of the projection, the filters, the steps and the states."""
    x = torch.randn(2, 5, 4)
    model = net(lambda m, x: m.c(torch.tanh(m.mamba(x))), mamba=Mamba(4, 6), c=lin(4, 2))
    arch = trace(model, x)
    inner = next(g for g in arch.groups if g.width == 6)
    assert inner.producers == ("mamba.in_proj", "mamba.dt_proj")
    assert set(inner.channelwise) == {"mamba", "mamba.conv1d"}
    assert inner.dim == 2 * 4 + 2 + 1
    assert_fourth_order(model, arch, inner.name, x, loss_of(torch.randn(2, 5, 2)))
    assert_grows(model, x, groups=list(arch.widths), rounds=1)


@pytest.mark.filterwarnings("ignore")
def test_the_mamba_of_hugging_face_grows() -> None:
    """Whose reference code uses the weights of three layers; its residual stream is rounded to 32 bits."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "state_size": 3, "time_step_rank": 3, "vocab_size": 9}
    mamba = transformers.MambaModel(transformers.MambaConfig(**sizes)).double()
    model = net(lambda m, x: m.mamba(inputs_embeds=x, use_cache=False).last_hidden_state, mamba=mamba)
    arch = assert_grows(
        model,
        torch.randn(2, 5, 8),
        groups=[f"mamba.layers.{i}.mixer.in_proj" for i in (0, 1)],
        tolerance=1e-5,
        rounds=1,
    )
    inner = arch.groups[0]
    assert [path.rpartition(".")[2] for path in inner.producers] == ["in_proj", "dt_proj"]
    assert inner.width == 16
    assert inner.dim == 2 * 8 + 3 + 1


def test_computed_weights_grow_where_the_code_uses_them() -> None:
    """Weight norm: what is multiplied with is computed of two tensors."""
    model = around(lambda m, h: F.linear(h, m.b.weight, m.b.bias), parametrizations.weight_norm(lin(6, 4)))
    assert_grows(model, batch(), groups=["a", "b"], rounds=1)


# predictions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "from the left", "twice", "called and used", "a bias as a gate"])
def test_predictions_hold_where_the_code_uses_weights(name: str) -> None:
    """Second differences of real splits, of the neurons that the weight makes and of those that it reads."""
    model, x, loss = around(LINEAR[name]), batch(16), loss_of(torch.randn(16, 2))
    arch = trace(model, x)
    for group in ("a", "b"):
        assert_fourth_order(model, arch, group, x, loss)


def test_predictions_hold_under_filters_that_the_code_uses() -> None:
    """Which are copied."""
    model = around(FILTERS["taps"], nn.Conv1d(6, 6, 3, groups=6), c=lin(6, 2))
    x = batch(16)
    assert_fourth_order(model, trace(model, x), "a", x, loss_of(torch.randn(16, 2)))


def test_a_used_layer_is_as_good_as_a_called_one() -> None:
    """The same splitting matrices, prices and latency directions in two spellings."""
    used, called = (around(call) for call in (LINEAR["from the left"], lambda m, h: m.b(h)))
    called.load_state_dict(used.state_dict())
    x, loss = batch(16), loss_of(torch.randn(16, 2))
    archs = [trace(m, x) for m in (used, called)]
    for group in ("a", "b"):
        found = [
            SplittingOperator(m, arch, [x], loss).dense(group)
            for m, arch in zip((used, called), archs, strict=True)
        ]
        torch.testing.assert_close(*found)
        one, other = (arch.group(group) for arch in archs)
        assert (one.params, one.macs, one.dim) == (other.params, other.macs, other.dim)
    prices = MeasuredLatency(repeats=1).price(GrowthContext(used, archs[0], loss, [x]))
    assert {g for term in prices.terms for axis in term.axes for g, _ in axis.growth} == {"a", "b"}


@pytest.mark.parametrize(
    ("call", "layer"),
    [
        (lambda m, h: F.conv1d(h, m.b.weight, m.b.bias), lambda: nn.Conv1d(6, 4, 3)),
        (lambda m, h: F.conv1d(h, m.b.weight, m.b.bias, groups=2), lambda: nn.Conv1d(6, 4, 3, groups=2)),
        (lambda m, h: F.conv_transpose1d(h, m.b.weight, m.b.bias), lambda: nn.ConvTranspose1d(6, 4, 3)),
    ],
)
def test_filters_that_the_code_uses_cost_what_they_cost_in_a_call(call: Call, layer: Any) -> None:
    """Multiply-accumulates and parameters of one more neuron."""
    x, costs = torch.randn(3, 3, 9), []
    for way in (call, lambda m, h: m.b(h)):
        arch = trace(on_maps(way, layer()), x)
        costs.append([(g.name, g.params, g.macs) for g in arch.groups])
    assert costs[0] == costs[1]


def test_folding_leaves_layers_whose_bias_the_code_does_not_add() -> None:
    """The fold of a new unit would not be where it is meant to be."""
    for name, why in (("without its bias", "does not add its bias"), ("linear", None)):
        model = around(LINEAR[name])
        model.fwd = lambda m, x, name=name: m.c(torch.relu(LINEAR[name](m, m.a(x))))
        x, loss = batch(32), loss_of(torch.randn(32, 2))
        context = GrowthContext(model, trace(model, x), loss, [x])
        notes = " ".join(Folding().propose(context, step_size=0.01).notes) if why is None else ""
        if why is not None:
            with pytest.raises(NotApplicableError, match=why):
                Folding().propose(context, step_size=0.01)
        assert "'b' alone" not in notes


@pytest.mark.parametrize("grower", [None, GradMax()], ids=["splitting", "gradmax"])
def test_a_network_whose_layers_are_used_grows_and_loads(grower: Any) -> None:
    """Every grower, and a seed-sized module that loads the grown state."""
    model = around(LINEAR["from the left"])
    seed, x, targets = copy.deepcopy(model), batch(32), torch.randn(32, 2)
    for _ in range(2):
        grow(model, [x], loss_of(targets), grower=grower, significance=None)
    assert model.b.in_features > 6 or model.b.out_features > 4
    fit_to_state_dict(seed, model.state_dict())
    seed.load_state_dict(model.state_dict())
    torch.testing.assert_close(seed(x), model(x), rtol=0, atol=0)
    assert (seed.b.in_features, seed.b.out_features) == (model.b.in_features, model.b.out_features)


# what else becomes of the weights --------------------------------------------------------------------


def test_a_penalty_does_not_stop_them() -> None:
    """A term of the loss, on the weights of layers that are called and of those that are used."""

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).square().mean() + 0.1 * sum(p.norm(dim=-1).sum() for p in m.parameters())

    model = around(LINEAR["linear"])
    assert set(trace_step(model, batch(), loss).widths) == {"a", "b"}


def test_a_penalty_by_rows_keeps_what_is_used_beside_a_bias() -> None:
    """The bias alone is used otherwise than its layer would; only what becomes of it is looked at."""

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).square().mean() + 0.1 * m.b.weight.norm(dim=1).sum()

    assert set(trace_step(around(LINEAR["bias later"]), batch(), loss).widths) == {"a", "b"}


def test_frozen_weights_read_neurons_and_make_none_that_could_move() -> None:
    """As those of a layer that is called."""
    model = around(LINEAR["linear"])
    model.b.weight.requires_grad_(False)
    arch = assert_grows(model, batch(), groups=["a"])
    assert_refused(arch, "b", r"'b.weight' is frozen")


def _tied(m: nn.Module) -> nn.Module:
    m.d.weight = m.b.weight
    return m


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, str], list[str]]] = {
    "transposed only": (
        lambda: around(lambda m, h: h @ m.b.weight, lin(4, 6)),
        {"a": "matrix product outside"},
        [],
    ),
    "transposed too": (
        lambda: around(lambda m, h: F.linear(h, m.b.weight) @ m.b.weight, c=lin(6, 2)),
        {"a": "'b.weight', which the code uses itself, .* mm reads it", "b": "mm reads it"},
        [],
    ),
    "tied": (
        lambda: _tied(around(lambda m, h: F.linear(h, m.b.weight) + m.d(torch.sin(h)), d=lin(6, 4))),
        {"a": "shared by", "d": "shared by"},
        [],
    ),
    "computed": (
        lambda: around(lambda m, h: F.linear(h, m.b.weight.exp())),
        {"a": "matrix product outside"},
        [],
    ),
    "scaled by its norm": (
        lambda: around(lambda m, h: m.b(h) / m.b.weight.norm()),
        {"a": "'b.weight'.*(norm|used)", "b": "'b.weight'.*(norm|used)"},
        [],
    ),
    "a gate by columns": (
        lambda: around(lambda m, h: m.b(h * m.b.weight[0])),
        {"a": "element by element", "b": "select cuts"},
        [],
    ),
    "columns read and weighed": (
        lambda: around(lambda m, h: m.b(h * m.b.weight.mean(0))),
        {"a": "element by element", "b": "mean mixes"},
        [],
    ),
    "without its gradient": (
        lambda: around(lambda m, h: F.linear(h, m.b.weight.detach())),
        {"a": "matrix product outside"},
        [],
    ),
    "other groups": (
        lambda: on_maps(
            lambda m, h: torch.cat([m.b(h), F.conv1d(h[:, :3], m.b.weight)], 1),
            nn.Conv1d(6, 4, 3, groups=2),
            c=lin(8, 2),
        ),
        {"a": "cuts", "b": ""},
        [],
    ),
    "a called filter on data": (
        lambda: net(
            lambda m, x: m.c(torch.tanh(m.a(x)) * m.b.weight[:, 0, 0]) + m.b(torch.ones(4, 6, 1)).sum(),
            **{"a": lin(3, 6), "b": nn.Conv1d(6, 6, 1, groups=6), "c": lin(6, 2)},
        ),
        {"a": "also called, with other values"},
        [],
    ),
    "a subclass that computes otherwise": (
        lambda: around(lambda m, h: F.linear(h, m.b.weight, m.b.bias), Twice(6, 4)),
        {"a": "matrix product outside"},
        [],
    ),
}


class Twice(nn.Linear):
    """A layer whose rule cannot say what its weight is for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(super().forward(x)) * 2


@pytest.mark.parametrize("name", REFUSED)
def test_other_uses_are_refused_by_name(name: str) -> None:
    """The neurons on the axes that the code uses otherwise stay; a layer beside them grows by its bias."""
    build, reasons, grows = REFUSED[name]
    model, x = build(), torch.randn(3, 3, 9) if name == "other groups" else batch()
    whole, model.e, model.f = model.fwd, lin(3, 5), lin(5, 1)
    model.fwd = lambda m, x: whole(m, x) + _beside(m, x)
    arch = assert_grows(model, x, groups=[*grows, "e"])
    for group, why in reasons.items():
        assert_refused(arch, group, why)


def _beside(m: nn.Module, x: Tensor) -> Tensor:
    steps = x if x.ndim == 2 else x.mean(-1)
    return m.f(torch.tanh(steps @ m.e.weight.T + m.e.bias))
