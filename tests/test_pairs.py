"""Queries and keys, and other sums of products over neurons: which grow, and what finds their gain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_split import (
    GradMax,
    Mixed,
    NewNeurons,
    SteepestSplitting,
    TopK,
    grow,
    split_neurons,
    trace,
    verification,
)
from lightning_split.context import GrowthContext
from lightning_split.curvature import SplittingOperator
from lightning_split.growers import NotApplicableError
from lightning_split.surgery import Split
from torch import Tensor, nn

import exactness

L = nn.Linear


class Made(nn.Module):
    """A forward pass written as a function of the module."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention, written out."""
    return (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1) @ v


def heads(t: Tensor) -> Tensor:
    """Two heads."""
    return t.unflatten(-1, (2, -1)).transpose(1, 2)


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by einsum."""
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def qkv(**more: Any) -> dict[str, Any]:
    """Layers of an attention of width 4."""
    return {"q": L(3, 4), "k": L(3, 4), "v": L(3, 4), "o": L(4, 2), **more}


def joined(s: Any, by: Callable[..., Tensor], *qkv: Tensor) -> Tensor:
    """Attention with two heads, and what reads its values."""
    out: Tensor = s.o(by(*map(heads, qkv)).transpose(1, 2).flatten(2))
    return out


@dataclass
class Case:
    """A network, and the widths of its groups; those of paired groups are named."""

    model: Callable[[], Made]
    widths: dict[str, int]
    paired: tuple[str, ...] = ("q",)
    shape: tuple[int, ...] = (2, 5, 3)


def fused(**more: Any) -> dict[str, Any]:
    """One layer for queries, keys and values."""
    return {"a": L(3, 12), "o": L(4, 2), **more}


GROWING = {
    "one head": Case(
        lambda: Made(lambda s, x: s.o(attend(s.q(x), s.k(x), s.v(x))), **qkv()), {"q": 4, "v": 4}
    ),
    "fixed scale": Case(
        lambda: Made(lambda s, x: s.o(attend(s.q(x), s.k(x), s.v(x), 0.5)), **qkv()), {"q": 4, "v": 4}
    ),
    "divided by the width": Case(
        lambda: Made(lambda s, x: s.o(attend(s.q(x), s.k(x), s.v(x), 1 / s.q.out_features)), **qkv()),
        {"q": 4, "v": 4},
    ),
    "heads": Case(
        lambda: Made(lambda s, x: joined(s, attend, s.q(x), s.k(x), s.v(x)), **qkv()), {"q": 2, "v": 2}
    ),
    "einsum": Case(
        lambda: Made(lambda s, x: joined(s, summed, s.q(x), s.k(x), s.v(x)), **qkv()), {"q": 2, "v": 2}
    ),
    "fused kernel": Case(
        lambda: Made(lambda s, x: joined(s, F.scaled_dot_product_attention, s.q(x), s.k(x), s.v(x)), **qkv()),
        {"q": 2, "v": 2},
    ),
    "fused kernel with a scale": Case(
        lambda: Made(
            lambda s, x: s.o(F.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x), scale=0.3)), **qkv()
        ),
        {"q": 4, "v": 4},
    ),
    "one layer for all": Case(
        lambda: Made(lambda s, x: joined(s, attend, *s.a(x).chunk(3, -1)), **fused()), {"a": 2}, ("a",)
    ),
    "shared keys": Case(
        lambda: Made(
            lambda s, x: joined(
                s,
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                s.q(x),
                *(f(x).unflatten(-1, (1, -1)).flatten(2) for f in (s.k, s.v)),
            ),
            **qkv(),
        ),
        {"q": 2, "v": 2},
    ),
    "keys are values": Case(
        lambda: Made(lambda s, x: s.o(attend(s.q(x), (k := s.k(x)), k)), **qkv()), {"k": 4}, ("k",)
    ),
    "keys are read elsewhere": Case(
        lambda: Made(lambda s, x: s.o(attend(s.q(x), (k := s.k(x)), s.v(x))) + s.r(k), **qkv(r=L(4, 2))),
        {"k": 4, "v": 4},
        ("k",),
    ),
    "sums of keys": Case(
        lambda: Made(lambda s, x: s.o(attend(s.q(x), s.k(x) + s.k2(x), s.v(x))), **qkv(k2=L(3, 4))),
        {"q": 4, "v": 4},
    ),
    "queries and their places": Case(
        lambda: Made(
            lambda s, x: s.o(attend(s.q(x) + s.p, s.k(x), s.v(x))), **qkv(p=nn.Parameter(torch.randn(5, 4)))
        ),
        {"q": 4, "v": 4},
    ),
    "two readers of one key": Case(
        lambda: Made(
            lambda s, x: s.o(attend(s.q(x), (k := s.k(x)), s.v(x))) + s.o2(attend(s.q2(x), k, s.v(x))),
            **qkv(q2=L(3, 4), o2=L(4, 2)),
        ),
        {"q": 4, "v": 4},
    ),
    "maps": Case(
        lambda: Made(
            lambda s, x: s.o(
                s.v(x).flatten(2) @ (s.q(x).flatten(2).mT @ s.k(x).flatten(2)).softmax(-1).mT
            ).mean(-1),
            q=nn.Conv2d(3, 4, 1),
            k=nn.Conv2d(3, 4, 1),
            v=nn.Conv2d(3, 5, 1),
            o=nn.Conv1d(5, 2, 1),
        ),
        {"q": 4, "v": 5},
        shape=(2, 3, 3, 3),
    ),
    "raw matrices": Case(
        lambda: Made(
            lambda s, x: s.o(attend(x @ s.q, x @ s.k, s.v(x))),
            **qkv(q=nn.Parameter(torch.randn(3, 4)), k=nn.Parameter(torch.randn(3, 4))),
        ),
        {"(root)": 4, "v": 4},
        ("(root)",),
    ),
    "two towers": Case(
        lambda: Made(lambda s, x: s.q(x) @ s.k(x).T, q=L(3, 4), k=L(3, 4)), {"q": 4}, shape=(5, 3)
    ),
    "one by one": Case(
        lambda: Made(lambda s, x: (s.q(x) * s.k(x.sin())).sum(-1), q=L(3, 4), k=L(3, 4)),
        {"q": 4},
        shape=(5, 3),
    ),
    "means, and keys are read elsewhere": Case(
        lambda: Made(
            lambda s, x: ((k := s.k(x)) * s.q(x.sin())).mean(-1, keepdim=True) + s.r(k.tanh()),
            **{"q": L(3, 4), "k": L(3, 4), "r": L(4, 2)},
        ),
        {"k": 4},
        ("k",),
    ),
    "queries are read elsewhere": Case(
        lambda: Made(
            lambda s, x: (s.k(x) * (q := s.q(x.sin()))).sum(-1, keepdim=True) / 4**0.5 + s.r(q.tanh()),
            **{"q": L(3, 4), "k": L(3, 4), "r": L(4, 2)},
        ),
        {"q": 4},
    ),
    "one query for each place": Case(
        lambda: Made(
            lambda s, x: s.o(
                ((s.q(x[:, :1]) * s.k(x)).sum(2, keepdim=True) * s.k.out_features**-0.5).softmax(1) * s.v(x)
            ),
            **qkv(),
        ),
        {"q": 4, "v": 4},
    ),
    "factors of a table": Case(  # matrix factorisation
        lambda: Made(
            lambda s, x: (s.q(n := x[:, 0].abs().long()) * s.k(6 - n)).sum(1) + s.b(n).sum(1),
            **{"q": nn.Embedding(7, 4), "k": nn.Embedding(7, 4), "b": nn.Embedding(7, 1)},
        ),
        {"q": 4},
        shape=(9, 3),
    ),
}


def problem(name: str) -> tuple[Made, Tensor]:
    """The network with random weights, and a batch."""
    torch.set_default_dtype(torch.float64)
    case = GROWING[name]
    model, x = case.model(), torch.randn(case.shape)
    exactness.randomise(model, x)
    return model, x


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that is not stationary."""
    return (model(x) - 1).square().mean()


@pytest.mark.parametrize("name", GROWING)
def test_sums_of_products_over_neurons_split_exactly(name: str) -> None:
    """With unequal weights, ghosts, in both modes, and three times over."""
    case, (model, x) = GROWING[name], problem(name)
    arch = trace(model, x)
    assert arch.widths == case.widths
    assert tuple(g.name for g in arch.groups if g.paired) == case.paired
    assert exactness.deviation(model, x, 0) < 1e-12
    before, rng = model(x), np.random.default_rng(0)
    for _ in range(3):
        arch = trace(model, x)
        split_neurons(model, exactness.splits(arch, rng, "copies"), arch=arch)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-12)


REFUSED = {
    "a layer twice": Made(lambda s, x: s.o(s.q(x) @ s.q(2 * x).mT @ s.v(x)), **qkv()),
    "with itself": Made(lambda s, x: s.o((q := s.q(x)) @ q.mT @ s.v(x)), **qkv()),
    "both read elsewhere": Made(
        lambda s, x: s.o(attend((q := s.q(x)), (k := s.k(x)), s.v(x))) + s.r(q) + s.r2(k),
        **qkv(r=L(4, 2), r2=L(4, 2)),
    ),
    "bent queries": Made(lambda s, x: s.o(attend(s.q(x).relu(), s.k(x), s.v(x))), **qkv()),
    "bent keys": Made(lambda s, x: s.o(attend(s.q(x), s.k(x).relu(), s.v(x))), **qkv()),
    "recurrent queries": Made(
        lambda s, x: s.o(attend(s.q(x)[0], s.k(x), s.v(x))), **qkv(q=nn.LSTM(3, 4, batch_first=True))
    ),
    "normalised keys": Made(
        lambda s, x: s.o(attend(s.q(x), s.n(s.k(x).mT).mT, s.v(x))), **qkv(n=nn.BatchNorm1d(4))
    ),
}


SUMS = {
    "squares": lambda s, x: (s.q(x).square()).sum(-1),
    "with itself": lambda s, x: ((q := s.q(x)) * q).sum(-1),
    "with a sum of itself": lambda s, x: ((q := s.q(x)) * (s.k(x) + q)).sum(-1),
    "bent": lambda s, x: (s.q(x).tanh() * s.k(x).tanh()).sum(-1),
    "of three": lambda s, x: (s.q(x) * s.k(x) * s.v(x)).sum(-1),
    "with more in place": lambda s, x: (s.q(x) * s.k(x)).add_(1).sum(-1),
    "with more": lambda s, x: (s.q(x) * s.k(x) + s.v(x)).sum(-1),
    "read elsewhere, later": lambda s, x: (p := s.q(x) * s.k(x)).sum(-1, keepdim=True) + s.o(p),
    "read elsewhere, before": lambda s, x: s.o(p := s.q(x) * s.k(x)) + p.sum(-1, keepdim=True),
    "their largest": lambda s, x: (s.q(x) * s.k(x)).amax(-1),
}


@pytest.mark.parametrize("name", SUMS)
def test_other_sums_over_neurons_are_refused(name: str) -> None:
    """Neither factor is the other's weights, or more than the product is summed, or not it alone."""
    torch.set_default_dtype(torch.float64)
    arch = trace(Made(SUMS[name], **qkv()), torch.randn(2, 5, 3))
    assert not arch.groups
    assert {u.name for u in arch.unsplittable} - {"o"} <= {*"qkv"}


@pytest.mark.parametrize("name", REFUSED)
def test_products_that_no_weights_can_share_are_refused(name: str) -> None:
    """Neither side is linear in weights of its own that nobody else reads."""
    torch.set_default_dtype(torch.float64)
    model, x = REFUSED[name].double(), torch.randn(2, 5, 3)
    arch = trace(model, x)
    assert arch.widths == {"v": 4}
    assert all("contracts the neurons" in u.reason for u in arch.unsplittable if u.name[:1] in "qk")


def test_places_that_are_added_to_keys_are_found_out_by_the_trial() -> None:
    """A learned table beside the keys would have to be multiplied too."""
    torch.set_default_dtype(torch.float64)
    table = nn.Parameter(torch.randn(5, 4))
    model = Made(lambda s, x: s.o(attend(s.q(x), s.k(x) + s.p, s.v(x))), **qkv(p=table))
    arch = trace(model, torch.randn(2, 5, 3))
    assert arch.widths == {"v": 4}
    assert "no longer read the same values" in {u.name: u.reason for u in arch.unsplittable}["q"]


def test_without_values_nobody_knows_how_products_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks too large for a trial with values keep the queries of keys that something is added to."""
    monkeypatch.setattr(verification, "_MAX_MACS", 0)
    torch.set_default_dtype(torch.float64)
    model = Made(lambda s, x: s.o(attend(s.q(x), s.k(x) + 1.0, s.v(x))), **qkv())
    arch = trace(model, torch.randn(2, 5, 3))
    assert arch.widths == {"v": 4}
    assert "shows in values only" in {u.name: u.reason for u in arch.unsplittable}["q"]
    layer = nn.TransformerEncoderLayer(8, 2, 6, 0.0, batch_first=True).double()  # whose rule knows
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    arch = exactness.assert_splits_exactly(layer, x)
    assert "compared sizes only" in arch.note
    paired = [g for g in arch.groups if g.paired]
    assert [g.producers for g in paired] == [("self_attn",)]


@pytest.mark.parametrize("name", ["one head", "fixed scale", "one layer for all", "keys are values"])
def test_gradients_after_a_growth_are_what_the_maps_say(name: str) -> None:
    """What carries an optimizer's state: the gradient of each new entry over that of the one it copies."""
    model, x = problem(name)
    arch = trace(model, x)
    gradients = torch.autograd.grad(loss_of(model, x), [*model.parameters()], allow_unused=True)
    old = dict(zip(model.parameters(), gradients, strict=True))
    splits = [Split(g.name, 1, (0.75, 0.5, -0.25), torch.zeros(3, g.dim)) for g in arch.groups]
    for parameter, found in split_neurons(model, splits, arch=arch).items():
        expected = old[parameter]
        for axis, grown in found.maps.items():
            shape = [1] * expected.ndim
            shape[axis] = -1
            expected = expected.index_select(axis, grown.index) * grown.scale.view(shape)
        torch.testing.assert_close(torch.autograd.grad(loss_of(model, x), found.new)[0], expected)


def bypass(model: Made, x: Tensor) -> Tensor:
    """Gradient of the loss in a matrix A by which all scores grow by ``[x, 1] A [x, 1]ᵀ``."""
    ones = torch.cat([x, torch.ones(*x.shape[:-1], 1)], -1)
    a = torch.zeros(ones.shape[-1], ones.shape[-1], requires_grad=True)
    q, k, v = model.q(x), model.k(x), model.v(x)
    scores = (q @ k.mT + ones @ a @ ones.mT) * q.shape[-1] ** -0.5
    loss = (model.o(scores.softmax(-1) @ v) - 1).square().mean()
    return torch.autograd.grad(loss, a)[0]


def test_new_pairs_of_a_query_and_a_key_are_the_singular_vectors_of_the_gradient_in_the_scores() -> None:
    """GradMax, against the closed form: the loss falls by the singular value times both lengths."""
    model, x = problem("one head")
    left, values, right = torch.linalg.svd(bypass(model, x))
    context = GrowthContext(model, trace(model, x), loss_of, [x])
    offered = [c for c in GradMax().propose(context, step_size=1e-3).candidates if c.group == "q"]
    best = max(offered, key=lambda c: c.gain)
    parts = model.q.weight[best.neuron], model.q.bias[best.neuron : best.neuron + 1]
    query = best.displacements[1] + torch.cat(parts).detach()
    key = best.outgoing[1]
    for found, vector in ((query, left[:, 0]), (key, right[0])):
        assert abs(float(torch.nn.functional.cosine_similarity(found, vector, dim=0))) > 1 - 1e-6
    assert best.gain == pytest.approx(float(values[0] * query.norm() * key.norm()), rel=1e-4)
    wide = copy.deepcopy(model)
    split = Split("q", best.neuron, best.weights, best.displacements, outgoing=best.outgoing)
    split_neurons(wide, [split], arch=trace(wide, x))
    with torch.no_grad():
        fall = float(loss_of(model, x) - loss_of(wide, x))
    assert fall == pytest.approx(best.gain, rel=1e-2)


def test_a_fixed_and_a_following_scale_grow_into_the_same_function() -> None:
    """The step of a key is one of the score, however the scores are divided."""
    found = []
    for name in ("one head", "fixed scale"):  # 0.5 is the root of a quarter
        model, x = problem(name)
        torch.manual_seed(0)
        report = grow(
            *(model, [x], loss_of),
            grower=NewNeurons(),
            strategy=TopK(count=6),
            significance=None,
            confirm_batches=None,
        )
        assert report.widths_after["q"] > 4
        found.append((model, report.predicted_gain))
    (following, gain), (fixed, other) = found
    assert gain == pytest.approx(other, rel=1e-9)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(following(x), fixed(x), rtol=1e-9, atol=1e-9)


def test_splitting_matrices_of_queries_are_zero_and_cost_nothing() -> None:
    """They are linear; steepest splitting offers none of them, and says so where there is nothing else."""
    model, x = problem("one layer for all")
    arch = trace(model, x)
    operator = SplittingOperator(model, arch, [x], loss_of)
    assert operator.shapes == {"a": (2, 4 * 4)}
    assert operator.dense("a").count_nonzero() == 0
    context = GrowthContext(model, arch, loss_of, [x])
    with pytest.raises(NotApplicableError, match="splitting matrices are zero"):
        SteepestSplitting().propose(context, step_size=0.01)
    together = Mixed([SteepestSplitting(), GradMax()]).propose(context, step_size=0.01)
    assert {c.group for c in together.candidates} == {"a"}
    assert any("splitting matrices are zero" in note for note in together.notes)
    model, x = problem("one head")
    context = GrowthContext(model, trace(model, x), loss_of, [x])
    assert {c.group for c in SteepestSplitting().propose(context, step_size=0.01).candidates} == {"v"}


def test_a_size_of_heads_that_the_code_fixes_is_found_out_once_for_all_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight layers of one class: queries are refused in each, by a few trials and not by a search."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (L(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k = (f(x).view(*x.shape[:2], 2, 2).transpose(1, 2) for f in (self.q, self.k))
            return x + (q @ k.mT).softmax(-1).mean(1) @ self.v(x)

    passes = []
    monkeypatch.setattr(
        verification._Trial,
        "broken_by",
        lambda trial, surgery, run=verification._Trial.broken_by: passes.append(1) or run(trial, surgery),
    )
    arch = trace(nn.Sequential(*(Fixed() for _ in range(8)), L(4, 2)), torch.randn(2, 5, 4))
    refused = [u for u in arch.unsplittable if u.name.endswith(".q")]
    assert len(refused) == 8
    assert all("forward pass fails" in u.reason for u in refused)
    assert len(passes) < 12
