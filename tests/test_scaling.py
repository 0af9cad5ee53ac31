"""Networks too large for a trial with values: numbers in the code tell how queries and keys are scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_split import trace, tracing, verification
from lightning_split.architecture import Architecture
from torch import Tensor, nn

import exactness
from test_pairs import GROWING, REFUSED, L, Made, attend, problem, qkv

Run = Callable[[Any, Tensor], Tensor]


def powers(arch: Architecture) -> dict[Any, float | None]:
    """By what the products of each key are divided."""
    return {key: port.power for key, port in arch.ports.items() if port.reads is not None}


def without_values(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> Architecture:
    """The trace of a network that is too large."""
    with monkeypatch.context() as patched:
        patched.setattr(verification, "_MAX_MACS", -1)
        arch = trace(model, x)
    assert "compared sizes only" in arch.note
    return arch


@pytest.mark.parametrize("name", GROWING)
def test_the_numbers_tell_what_values_tell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same groups grow, with the same scales, and really split they change nothing."""
    model, x = problem(name)
    arch = without_values(monkeypatch, model, x)
    assert arch.widths == GROWING[name].widths
    monkeypatch.setattr(tracing, "scaled_by_numbers", lambda model, arch, names, run: (arch, frozenset()))
    assert powers(arch) == powers(trace(model, x))
    monkeypatch.undo()
    monkeypatch.setattr(verification, "_MAX_MACS", -1)
    assert exactness.deviation(model, x, 0) < 1e-12


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_with_values_is_refused_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For reasons that labels tell."""
    torch.set_default_dtype(torch.float64)
    assert without_values(monkeypatch, REFUSED[name].double(), torch.randn(2, 5, 3)).widths == {"v": 4}


def scores(s: Any, x: Tensor) -> Tensor:
    """Products that nobody has divided."""
    return s.q(x) @ s.k(x).mT


def root(s: Any) -> float:
    """Of the width."""
    return float(s.q.weight.shape[0]) ** 0.5


def _in_place(s: Any, x: Tensor) -> Tensor:
    found = scores(s, x)
    found /= root(s)
    found.add_(s.bias)
    return s.o(found.softmax(-1) @ s.v(x))


def _queries_in_place(s: Any, x: Tensor) -> Tensor:
    q = s.q(x)
    q.mul_(1 / root(s))
    return s.o(attend(q, s.k(x), s.v(x), 1.0))


SCALED: dict[str, tuple[Run, float]] = {
    "by a tensor": (lambda s, x: s.o((scores(s, x) / torch.tensor(root(s))).softmax(-1) @ s.v(x)), 0.5),
    "by a new tensor": (lambda s, x: s.o((scores(s, x) / x.new_tensor(root(s))).softmax(-1) @ s.v(x)), 0.5),
    "by the root of a tensor": (
        lambda s, x: s.o((scores(s, x) * torch.tensor(root(s) ** 2).rsqrt()).softmax(-1) @ s.v(x)),
        0.5,
    ),
    "both halves": (
        lambda s, x: s.o(attend(s.q(x) / root(s) ** 0.5, s.k(x) / root(s) ** 0.5, s.v(x), 1.0)),
        0.5,
    ),
    "queries by the width": (lambda s, x: s.o(attend(s.q(x) / root(s) ** 2, s.k(x), s.v(x), 1.0)), 1.0),
    "there and back": (lambda s, x: s.o(attend(s.q(x) * root(s), s.k(x) / root(s), s.v(x), 1.0)), 0.0),
    "in place": (_in_place, 0.5),
    "queries in place": (_queries_in_place, 0.5),
    "and added to": (
        lambda s, x: s.o(torch.baddbmm(s.bias, s.q(x), s.k(x).mT, alpha=1 / root(s)).softmax(-1) @ s.v(x)),
        0.5,
    ),
    "masked and capped": (
        lambda s, x: s.o(
            (5 * torch.tanh((scores(s, x) / root(s)).masked_fill(s.mask, -1e9) / 5)).softmax(-1) @ s.v(x)
        ),
        0.5,
    ),
    "times a temperature": (
        lambda s, x: s.o((scores(s, x) * s.t.exp() / root(s)).softmax(-1) @ s.v(x)),
        0.5,
    ),
    "a bias of its own": (
        lambda s, x: s.o(attend(F.linear(x, s.q.weight) + s.q.bias, x @ s.k.weight.T + s.k.bias, s.v(x))),
        0.5,
    ),
}

HIDDEN: dict[str, Run] = {
    "a table beside the keys": lambda s, x: s.o(attend(s.q(x), s.k(x) + s.places, s.v(x))),
    "a number beside the keys": lambda s, x: s.o(attend(s.q(x), s.k(x) + 1.0, s.v(x))),
    "a column beside the keys": lambda s, x: s.o(attend(s.q(x), s.k(x) + s.places[:, :1], s.v(x))),
    "a key of nobody": lambda s, x: s.o(
        (scores(s, x).softmax(-1) @ s.v(x))
        + attend(s.q(x), torch.cat([s.places[None, :1].expand(2, -1, -1), s.k(x)[:, 1:]], 1), s.v(x))
    ),
    "padded keys": lambda s, x: s.o(attend(s.q(x), F.pad(s.k(x)[:, 1:], (0, 0, 1, 0), value=1.0), s.v(x))),
    "scaled queries that are read": lambda s, x: (
        s.o(attend((q := s.q(x) / root(s)), s.k(x), s.v(x), 1.0)) + s.r(q)
    ),
    "places of scaled queries": lambda s, x: s.o(attend(s.q(x) / root(s) + s.places, s.k(x), s.v(x), 1.0)),
    "scaled with a bias": lambda s, x: s.o(((scores(s, x) + s.bias) / root(s)).softmax(-1) @ s.v(x)),
    "scaled later": lambda s, x: s.o(scores(s, x).relu() / root(s) ** 2 @ s.v(x)),
    "scaled values": lambda s, x: s.o(attend(s.q(x), s.k(x), s.v(x)) / root(s)),
    "scaled here, and not there": lambda s, x: s.o(
        ((t := scores(s, x)) / root(s)).softmax(-1) @ s.v(x) + t.softmax(-1) @ s.v(x)
    ),
    "scaled from some width on": lambda s, x: s.o(attend(s.q(x), s.k(x), s.v(x), max(root(s), 2.5) ** -1)),
    "by a tensor like another": lambda s, x: s.o(
        (scores(s, x) / torch.full_like(x[:, :, :1], root(s))).softmax(-1) @ s.v(x)
    ),
    "by a sum of ones": lambda s, x: s.o(
        (scores(s, x) / torch.ones_like(s.q(x)).sum(-1, True).sqrt()).softmax(-1) @ s.v(x)
    ),
    "by a new sum of ones": lambda s, x: s.o(
        (scores(s, x) / x.new_ones(2, 5, s.q.weight.shape[0]).sum(-1, True).sqrt()).softmax(-1) @ s.v(x)
    ),
    "by a sum of equals": lambda s, x: s.o(
        (scores(s, x) / x[..., :1].expand(-1, -1, s.q.weight.shape[0]).sum(-1, True)).softmax(-1) @ s.v(x)
    ),
    "by a sum of equals that a layer makes": lambda s, x: s.o(
        (scores(s, x) / s.e(x).expand(-1, -1, s.q.weight.shape[0]).sum(-1, True)).softmax(-1) @ s.v(x)
    ),
    "some of them": lambda s, x: s.o(
        scores(s, x)[..., : s.q.weight.shape[0] // 2].tanh().sum(-1, True) * s.v(x)
    ),
    "to the power of the width": lambda s, x: s.o(scores(s, x).softmax(-1) ** s.q.weight.shape[0] @ s.v(x)),
    "added to, then scaled": lambda s, x: s.o(
        (torch.baddbmm(s.bias, s.q(x), s.k(x).mT) / root(s)).softmax(-1) @ s.v(x)
    ),
    "by a table": lambda s, x: s.o((scores(s, x) / torch.full((5, 5), root(s))).softmax(-1) @ s.v(x)),
    "a view in place": lambda s, x: s.o(_part_in_place(s, x)),
    "the best few": lambda s, x: s.o(
        (t := scores(s, x)).masked_fill(t < t.topk(int(root(s) ** 2) // 2)[0][..., -1:], -1e9).softmax(-1)
        @ s.v(x)
    ),
    "rounded": lambda s, x: s.o(torch.div(scores(s, x), root(s), rounding_mode="floor").softmax(-1) @ s.v(x)),
}


def _part_in_place(s: Any, x: Tensor) -> Tensor:
    q = s.q(x)
    q[:, :2].mul_(1 / root(s))
    return attend(q, s.k(x), s.v(x), 1.0)


def made(run: Run) -> tuple[Made, Tensor]:
    """Queries and keys of width 4, and whatever the cases need."""
    torch.set_default_dtype(torch.float64)
    model = Made(
        run,
        **qkv(r=L(4, 2), e=L(3, 1), t=nn.Parameter(torch.zeros(1)), places=nn.Parameter(torch.zeros(5, 4))),
    )
    model.bias = nn.Parameter(torch.zeros(2, 5, 5))
    model.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).triu(1))
    x = torch.randn(2, 5, 3)
    exactness.randomise(model, x)
    return model, x


@pytest.mark.parametrize("name", SCALED)
def test_factors_are_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the code multiplies by them, and however it has come by them."""
    run, power = SCALED[name]
    model, x = made(run)
    arch = without_values(monkeypatch, model, x)
    assert "q" in arch.widths, str(arch)
    assert set(powers(arch).values()) == {power}
    assert arch.widths == trace(model, x).widths
    monkeypatch.setattr(verification, "_MAX_MACS", -1)
    assert exactness.deviation(model, x, 0) < 1e-12


@pytest.mark.parametrize("name", HIDDEN)
def test_what_shows_in_values_only_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not a factor of the scores alone; what is left splits exactly."""
    model, x = made(HIDDEN[name])
    arch = without_values(monkeypatch, model, x)
    assert "q" not in arch.widths, str(arch)
    assert set(arch.widths) <= set(trace(model, x).widths)
    monkeypatch.setattr(verification, "_MAX_MACS", -1)
    assert exactness.deviation(model, x, 0) < 1e-12


def test_code_that_looks_at_values_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not run on outlines."""

    def run(s: Any, x: Tensor) -> Tensor:
        return s.o(attend(s.q(x), s.k(x), s.v(x), 0.5 if float(x.sum()) < 1e9 else 1.0))

    model, x = made(run)
    arch = without_values(monkeypatch, model, x)
    assert "shows in values only" in {u.name: u.reason for u in arch.unsplittable}["q"]
