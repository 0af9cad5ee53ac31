"""Parameters and buffers that no rule covers: they grow with the neurons that they belong to, or refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_split import fit_to_state_dict, grow, split_neurons, trace
from lightning_split.curvature import SplittingOperator
from lightning_split.optim import carry_state
from lightning_split.surgery import Split
from lightning_split.tracing import trace_step
from torch import Tensor, nn

from exactness import splits
from networks import loss_of
from test_situations import assert_grows, assert_refused, batch, chain, lin, net

pytestmark = pytest.mark.usefixtures("double")


def vector(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


# forms that grow -----------------------------------------------------------------------------------

FORMS: dict[str, tuple[dict[str, Any], Callable[[nn.Module, Tensor], Tensor]]] = {
    "scale": ({"w": vector(6)}, lambda m, h: h * m.w),
    "list": (
        {"w": nn.ParameterList([vector(6), vector(6)])},
        lambda m, h: torch.addcmul(m.w[0], h, m.w[1]),
    ),
    "dict": ({"w": nn.ParameterDict({"s": vector(6)})}, lambda m, h: h * m.w["s"]),
    "logarithm": ({"w": vector(6)}, lambda m, h: h * torch.exp(m.w) + F.softplus(m.w)),
    "difference": ({"v": vector(1, 6), "w": vector(6)}, lambda m, h: torch.sin((m.v - m.w) * h) + m.w * h),
    "mask": ({"w": torch.rand(6) > 0.5}, lambda m, h: torch.where(m.w, h, -h)),
    "saved mean": (
        {"mean": torch.randn(6), "var": torch.rand(6)},
        lambda m, h: (h - m.mean) / (m.var + 1).sqrt(),
    ),
    "matrix per neuron": ({"w": vector(6, 3)}, lambda m, h: torch.tanh(h[..., None] * m.w).sum(-1)),
    "picked row": ({"w": vector(4, 6)}, lambda m, h: h * m.w[2] + m.w[torch.tensor([1, 1, 0, 3])]),
    "sum over samples": ({"w": vector(4, 6)}, lambda m, h: h * m.w.mean(0)),
    "split gates": ({"w": vector(12)}, lambda m, h: h * m.w.chunk(2)[0] + m.w.chunk(2)[1]),
    "blank rows": ({"w": vector(6)}, lambda m, h: torch.cat([h, m.w[None]]).sum(0, keepdim=True) + h),
}


@pytest.mark.parametrize("form", FORMS)
def test_vectors_of_any_form_grow_with_their_neurons(form: str) -> None:
    """The values of the offspring are the parent's, however the vector is computed with."""
    parts, between = FORMS[form]
    model = chain(**{name: copy.deepcopy(p) for name, p in parts.items() if isinstance(p, nn.Module)})
    for name, part in parts.items():
        if isinstance(part, nn.Parameter):
            setattr(model, name, nn.Parameter(part.detach().double()))
        elif isinstance(part, Tensor):
            model.register_buffer(name, part.double() if part.is_floating_point() else part)
    model.fwd = lambda m, x: m.d(torch.tanh(m.c(between(m, torch.tanh(m.b(torch.tanh(m.a(x))))))))
    arch = assert_grows(model, batch(), groups=["a", "b", "c"], rounds=1)
    assert arch.group("b").channelwise
    assert arch.group("b").dim == 6  # incoming weights are those of the layer; the vector is copied


def test_vectors_of_a_map_grow_in_every_layout() -> None:
    """Layer scale, a bias of shape (C, 1, 1), a frozen normalisation, before a flattened map."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        x = m.c1(x) + m.bias
        x = x + m.gamma[:, None, None] * torch.tanh(m.c2(x))
        x = (x - m.mean.view(1, -1, 1, 1)) * (m.scale.unsqueeze(-1).unsqueeze(-1) * 2).exp()
        return m.out(torch.tanh(x).flatten(1))

    model = net(
        fwd,
        c1=nn.Conv2d(1, 4, 3, bias=False),
        bias=vector(4, 1, 1),
        gamma=vector(4),
        c2=nn.Conv2d(4, 4, 1),
        mean=torch.randn(4),
        scale=0.1 * torch.randn(4),
        out=lin(4 * 9, 2),
    )
    assert_grows(model, torch.randn(3, 1, 5, 5), groups=["c1"])


def test_tokens_and_positions_grow_with_the_embedding() -> None:
    """Of a table of positions the axis that runs along the neurons grows, not the one over positions."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        x = torch.cat([m.token.expand(len(x), -1, -1), m.embed(x)], 1) + m.place[:, : x.shape[1] + 1]
        x = x + m.down(torch.tanh(m.up(x)))
        return m.out(torch.tanh(x.mean(1)))

    model = net(
        fwd,
        embed=nn.Embedding(7, 4),
        token=vector(1, 1, 4),
        place=vector(1, 9, 4),
        up=lin(4, 5),
        down=lin(5, 4),
        out=lin(4, 2),
    )
    arch = assert_grows(model, torch.randint(0, 7, (3, 5)), groups=["embed", "up"])
    assert arch.group("embed").params == 7 + 5 + 5 + 1 + 2 + 1 + 9


def test_an_initial_state_of_constants_is_as_wide_as_its_readers() -> None:
    """Zeros joined to the first input are nobody's until the next step shows whose they are."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), m.out.in_features)
        for t in range(x.shape[1]):
            joined = torch.cat([x[:, t], h], 1)
            z, new = torch.sigmoid(m.gate(joined)), torch.tanh(m.new(joined))
            h = z * h + (1 - z) * new
        return m.out(h)

    assert_grows(
        net(fwd, gate=lin(7, 5), new=lin(7, 5), out=lin(5, 2)), torch.randn(4, 3, 2), groups=["gate"]
    )


def test_a_subclass_with_vectors_of_its_own_grows() -> None:
    """What the layer's rule does not cover, the operators show."""

    class Scaled(nn.Linear):
        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o)
            self.before, self.after = vector(i), vector(o)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x * self.before, self.weight, self.bias) * self.after

    assert_grows(chain(b=Scaled(5, 6), c=Scaled(6, 4)), batch(), groups=["a", "b", "c"])


def test_predictions_hold_where_vectors_scale_neurons() -> None:
    """The splitting matrices do not mind: half the second difference is what the loss falls by."""
    model = chain(lambda h: h)
    model.w = vector(6)
    model.fwd = lambda m, x: m.d(torch.tanh(m.c(m.w * torch.tanh(m.b(torch.tanh(m.a(x)))))))
    x, loss = batch(16), loss_of(torch.randn(16, 2))
    arch = trace(model, x)
    direction = torch.randn(6)
    direction /= direction.norm()
    vectors = torch.zeros(6, 6)
    vectors[2] = direction
    quotient = float(SplittingOperator(model, arch, [x], loss).matvec({"b": vectors})["b"][2] @ direction)
    errors = []
    for eps in (0.1, 0.05):
        wide = copy.deepcopy(model)
        moves = torch.stack([eps * direction, -eps * direction])
        split_neurons(wide, [Split("b", 2, (0.5, 0.5), moves)], arch=arch)
        with torch.no_grad():
            errors.append(float(loss(wide, x) - loss(model, x)) - eps**2 / 2 * quotient)
    assert 16 / 1.35 < errors[0] / errors[1] < 16 * 1.35


# what else must follow -----------------------------------------------------------------------------


def scaled() -> nn.Module:
    model = chain()
    model.w = vector(6)
    model.register_buffer("shift", torch.randn(6))
    model.fwd = lambda m, x: m.d(torch.tanh(m.c(m.w * torch.tanh(m.b(torch.tanh(m.a(x)))) + m.shift)))
    return model


def test_grown_vectors_load_into_a_seed_sized_module_and_into_one_built_wide() -> None:
    """The state dict says how wide everything is."""
    torch.manual_seed(1)
    seed = scaled()
    model, x = copy.deepcopy(seed), batch()
    rng = np.random.default_rng(0)
    for _ in range(3):
        arch = trace(model, x)
        split_neurons(model, splits(arch, rng, "ghosts"), arch=arch)
    assert len(model.w) > 8
    fit_to_state_dict(seed, model.state_dict())
    seed.load_state_dict(model.state_dict())
    torch.testing.assert_close(seed(x), model(x), rtol=0, atol=0)
    small = scaled()
    fit_to_state_dict(seed, small.state_dict())  # and back
    seed.load_state_dict(small.state_dict())
    assert seed.w.shape == (6,)


def test_a_checkpoint_of_the_same_widths_resizes_no_vector() -> None:
    """A table of another length beside layers that fit is a mistake that loading must report."""
    model, other = scaled(), scaled().state_dict()
    other["w"] = torch.randn(9)
    assert fit_to_state_dict(model, other) == []
    with pytest.raises(RuntimeError, match="size mismatch for w"):
        model.load_state_dict(other)


def test_optimizer_and_growth_carry_vectors_along() -> None:
    """``grow`` names the vector among the replaced parameters, and Adam's moments follow it."""
    model, x = scaled(), batch(16)
    loss, optimizer = loss_of(torch.randn(16, 2)), torch.optim.Adam(model.parameters())
    loss(model, x).backward()
    optimizer.step()
    report = grow(model, [x], loss, include=["b"])
    carry_state(optimizer, report.replaced)
    width = model.b.out_features
    assert width > 6
    assert model.w.shape == model.shift.shape == (width,)
    assert any(p is model.w for g in optimizer.param_groups for p in g["params"])
    assert optimizer.state[model.w]["exp_avg"].shape == (width,)


# what is refused, and what costs nothing -------------------------------------------------------------


def test_a_vector_that_is_used_otherwise_too_bars_its_neurons() -> None:
    """The other use would change with its length."""

    def other(use: Callable[[nn.Module, Tensor], Tensor], pattern: str) -> None:
        model = chain()
        model.w = vector(6)
        model.fwd = lambda m, x: m.d(torch.tanh(m.c(m.w * torch.tanh(m.b(torch.tanh(m.a(x)))))) + use(m, x))
        assert_refused(assert_grows(model, batch(), groups=["a", "c"]), "b", pattern)

    other(lambda m, x: m.w.mean().expand(4, 1), "the tensor 'w' is")
    other(lambda m, x: m.w.cumsum(0)[-1:], "cumsum mixes the neurons.*seen on the tensor 'w'")
    other(lambda m, x: (torch.randn(4, 6) @ m.w)[:, None], "'w' is multiplied with other values too")
    other(lambda m, x: m.w[:4].mean(), "slice cuts")


def test_a_vector_that_is_returned_bars_its_neurons() -> None:
    """Its length is part of the output."""
    model = scaled()
    inner = model.fwd
    model.fwd = lambda m, x: (inner(m, x), m.w * 2)
    assert_refused(assert_grows(model, batch(), groups=["a", "c"]), "b", "part of the model's output")


def test_a_penalty_on_vectors_does_not_stop_them() -> None:
    """A term of the loss that is a sum over a raw vector is like weight decay by hand."""
    model, x = scaled(), batch()
    arch = trace_step(
        model, x, lambda m, b: m(b).square().mean() + 1e-3 * sum(p.square().sum() for p in m.parameters())
    )
    assert "b" in arch.widths


def test_buffers_that_are_not_saved_stay_as_they_are() -> None:
    """A checkpoint would not say how wide they are."""
    model = chain()
    model.register_buffer("shift", torch.randn(6), persistent=False)
    model.fwd = lambda m, x: m.d(torch.tanh(m.c(torch.tanh(m.b(torch.tanh(m.a(x)))) + m.shift)))
    assert_refused(assert_grows(model, batch(), groups=["a", "c"]), "b", "extend along the neurons")


def test_weights_of_positions_cost_no_neuron() -> None:
    """A vector along another axis than the neurons' is the same for all of them."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.conv(x)) * m.position + m.map
        return m.out(torch.einsum("bct,t->bc", h, m.pool))

    model = net(
        fwd, conv=nn.Conv1d(2, 4, 3), position=vector(6), map=vector(1, 1, 6), pool=vector(6), out=lin(4, 2)
    )
    assert_grows(model, torch.randn(3, 2, 8), groups=["conv"])


def test_one_vector_on_two_layers_ties_them() -> None:
    """Neurons that share a scale are one neuron from then on."""
    model = net(
        lambda m, x: m.out(torch.tanh(m.w * m.a(x))) + m.two(torch.sin(m.w * m.b(x))),
        a=lin(3, 5),
        b=lin(3, 5),
        w=vector(5),
        out=lin(5, 2),
        two=lin(5, 2),
    )
    arch = assert_grows(model, batch(), groups=["a"])
    assert arch.group("a").producers == ("a", "b")


def test_a_statistic_that_the_pass_writes_grows_along() -> None:
    """A running mean of hidden values, kept in a buffer."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.b(torch.tanh(m.a(x))))
        if m.training:
            m.mean.lerp_(h.detach().mean(0), 0.1)
        return m.c(h - m.mean)

    assert_grows(
        net(fwd, a=lin(3, 5), b=lin(5, 6), c=lin(6, 2), mean=torch.zeros(6)), batch(), groups=["a", "b"]
    )
