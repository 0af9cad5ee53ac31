"""grow: all stages together, without a Trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from lightning_split import (
    Exact,
    KnapsackEnergy,
    SelectionStrategy,
    SteepestSplitting,
    Threshold,
    TopK,
    grow,
    trace,
)
from torch import Tensor, nn

from networks import CASES, Residual, loss_of, randomised, relu_mlp

pytestmark = pytest.mark.usefixtures("double")


def _problem(name: str = "residual") -> tuple[nn.Module, Tensor, Any]:
    case = CASES[name]
    model, x = randomised(case.model()).eval(), case.inputs()
    return model, x, loss_of(torch.randn_like(model(x).detach()))


@pytest.mark.parametrize("name", ["mlp", "residual", "dense", "separable", "gated", "shared", "text"])
def test_the_loss_falls_by_what_was_predicted(name: str) -> None:
    """With exact eigenpairs and a small step the measured gain is the predicted one, and positive."""
    model, x, loss = _problem(name)
    report = grow(
        model,
        [x],
        loss,
        grower=SteepestSplitting(solver=Exact()),
        strategy=TopK(fraction=0.5),
        step_size=1e-2,
        surrogate_beta=None,
    )
    assert report.predicted_gain > 0
    assert report.measured_gain == pytest.approx(report.predicted_gain, rel=0.05)
    assert float(loss(model, x).detach()) == pytest.approx(report.loss_after, abs=1e-12)
    widths = trace(model, x).widths
    assert widths == dict(report.widths_after)
    assert sum(widths.values()) == sum(report.widths_before.values()) + len(report.splits)


def test_costs_in_the_report_are_those_of_the_grown_network() -> None:
    """Parameters are counted, MACs are torch's own FLOP count halved: before, after, and no other."""
    from torch.utils.flop_counter import FlopCounterMode

    def macs(model: nn.Module, x: Tensor) -> float:
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops() / 2 / len(x)

    model, x, loss = _problem()
    before = (sum(p.numel() for p in model.parameters()), macs(model, x))
    report = grow(model, [x], loss, strategy=TopK(count=6))
    assert tuple(report.cost_before) == before
    assert tuple(report.cost_after) == (sum(p.numel() for p in model.parameters()), macs(model, x))
    assert report.cost_after.macs > report.cost_before.macs


def test_growth_at_zero_step_changes_the_function_by_rounding() -> None:
    """ε = 0: wider, and the same."""
    model, x, loss = _problem()
    y = model(x).detach()
    report = grow(model, [x], loss, step_size=0.0, strategy=_All())
    torch.testing.assert_close(model(x).detach(), y, rtol=1e-12, atol=1e-12)
    assert len(report.splits) == 15


class _All(SelectionStrategy):
    def select(self, candidates: Any) -> list[Any]:
        return list(candidates)


def test_growth_is_repeatable_bit_for_bit() -> None:
    """The same seed gives the same grown parameters, whatever the global random state."""
    results = []
    for seed in (1, 2):
        model, x, _ = _problem()
        loss = loss_of(torch.ones(8, 3))
        x = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
        torch.manual_seed(seed)
        rng = torch.get_rng_state()
        grow(model, [x, x * 2], loss, confirm_batches=[x * 3], seed=5)
        assert torch.equal(torch.get_rng_state(), rng)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_only_what_is_included_grows() -> None:
    """include and exclude are patterns of group or producer names."""
    for options, expected in (
        ({"include": ["conv*"]}, {"stem", "conv1"}),  # conv2 is a producer of the group "stem"
        ({"exclude": ["stem", "head"]}, {"conv1"}),
        ({"include": ["head"]}, {"head"}),
    ):
        model, x, loss = _problem()
        report = grow(model, [x], loss, strategy=_All(), **options)
        assert {s.group for s in report.splits} == expected


def test_limits_hold_exactly() -> None:
    """max_params and max_macs are never exceeded, and the best splits within them are kept."""
    model, x, loss = _problem()
    total = sum(p.numel() for p in model.parameters())
    report = grow(copy.deepcopy(model), [x], loss, strategy=_All(), max_params=total + 200)
    assert total < report.cost_after.params <= total + 200
    assert "The limit max_params=" in report.limit
    macs = report.cost_before.macs
    report = grow(copy.deepcopy(model), [x], loss, strategy=_All(), max_macs=macs * 1.1)
    assert macs < report.cost_after.macs <= macs * 1.1
    report = grow(model, [x], loss, strategy=_All(), max_params=total)
    assert (len(report.splits), report.cost_after.params) == (0, total)


def test_strategies_see_costs_in_their_unit() -> None:
    """A knapsack over MACs stays within its fraction of the network's MACs."""
    model, x, loss = _problem()
    report = grow(model, [x], loss, strategy=KnapsackEnergy(budget=0.25, cost="macs"))
    spent = sum(c.cost for c in report.chosen)
    assert 0 < spent <= 0.25 * report.cost_before.macs
    model, x, loss = _problem()
    report = grow(model, [x], loss, strategy=Threshold(-1e9))
    assert report.splits == ()
    assert report.loss_after == report.loss_before
    assert "No neuron was split" in str(report)


def test_the_report_prints_a_table() -> None:
    """Widths before and after, splitting index, predicted gain, change of loss, parameters and MACs."""
    model, x, loss = _problem()
    report = grow(model, [x], loss, confirm_batches=[x], strategy=TopK(count=2))
    text = str(report)
    assert [line.split(" | ")[0].strip() for line in text.splitlines()[2:5]] == ["stem", "conv1", "head"]
    for part in ("splitting index", "predicted gain", "measured", "parameters", "MACs", "loss"):
        assert part in text


def test_bf16_and_relu_networks_grow() -> None:
    """A half-precision network keeps its dtype; eigenpairs are found in float32."""
    torch.set_default_dtype(torch.float32)
    model = relu_mlp().to(torch.bfloat16)
    x, y = torch.randn(64, 5).bfloat16(), torch.randn(64, 3)
    report = grow(model, [x], lambda m, b: (m(b).float() - y).square().mean(), strategy=TopK(count=3))
    assert len(report.splits) == 3
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def _everything(model: nn.Module) -> list[Any]:
    tensors = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())]
    values = [None if t is None else t.detach().clone() for t in tensors]
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    sizes = [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in model.modules()]
    return [[id(t) for t in tensors], values, flags, sizes, torch.get_rng_state()]


def _same(a: list[Any], b: list[Any]) -> bool:
    pairs = zip(a[1], b[1], strict=True)
    return (
        a[0] == b[0]
        and a[2:4] == b[2:4]
        and torch.equal(a[4], b[4])
        and all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)
    )


class _Failing(SelectionStrategy):
    def select(self, candidates: Any) -> list[Any]:
        raise RuntimeError("the user's strategy failed")


class _Silent(SelectionStrategy):
    """Forgets to return what it chose."""

    def select(self, candidates: Any) -> Any:
        """Nothing."""


def test_bad_input_gets_a_sentence_and_changes_nothing() -> None:
    """Rule 4: a growth that cannot happen leaves every tensor, flag, hook and the random state alone."""
    model, x, loss = _problem()
    stuck = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    before, stuck_before = _everything(model), _everything(stuck)
    for kwargs, message in (
        ({"batches": []}, "at least one batch"),
        ({"confirm_batches": []}, "confirm_batches is empty"),
        ({"step_size": -1.0}, "step_size .* got -1.0"),
        ({"include": ["nothing"]}, r"include=\['nothing'\].*the groups are: 'stem', 'conv1', 'head'"),
        ({"loss_fn": lambda m, b: loss(m, b) * float("nan")}, "loss of batch 0 is nan"),
        ({"loss_fn": lambda m, b: torch.zeros((), requires_grad=True)}, "does not depend on"),
        ({"strategy": _Failing()}, "the user's strategy failed"),
        ({"strategy": _Silent()}, "_Silent.select returned None; return a list of candidates"),
        ({"max_params": float("nan")}, "max_params must be at least 0, or None for no limit, got nan"),
        ({"max_macs": -1.0}, "max_macs must be at least 0, or None for no limit, got -1.0"),
        ({"model": stuck, "batches": [torch.randn(4, 3)], "loss_fn": lambda m, b: m(b).mean()},
         "No neuron of this network can be split.*layer normalisation"),
    ):  # fmt: skip
        arguments = {"model": model, "batches": [x], "loss_fn": loss, **kwargs}
        before[4] = stuck_before[4] = torch.get_rng_state()
        with pytest.raises((ValueError, RuntimeError), match=message):
            grow(**arguments)
        assert _same(_everything(model), before), message
        assert _same(_everything(stuck), stuck_before), message


class _Counting(nn.Module):
    """From some call on, reshapes to a number of features that was right when the network was built."""

    def __init__(self, calls: Iterator[int], patience: int) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(1, 4, 3), nn.Linear(64, 5), nn.Linear(5, 2)
        self.calls, self.patience = calls, patience

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        h = h.flatten(1) if next(self.calls) < self.patience else h.view(-1, 64)
        return self.out(torch.tanh(self.fc(h)))


@pytest.mark.parametrize("patience", [0, 5, 8, -3])
def test_a_hard_coded_width_is_caught_before_or_at_the_check(patience: int) -> None:
    """Whether the trial or the check batch finds it: the group is named, left alone, the rest grows."""
    x = torch.randn(4, 1, 6, 6)
    late = patience < 0
    if late:  # from the end: the check batch, then twice the loss after growth
        calls = count()
        grow(_Counting(calls, 10**9), [x, x], loss_of(torch.zeros(4, 2)), strategy=_All())
        patience += next(calls)
    model = _Counting(count(), patience)
    conv = model.conv.weight
    report = grow(model, [x, x], loss_of(torch.zeros(4, 2)), strategy=_All())
    assert model.conv.weight is conv
    assert model.conv.out_channels == 4
    assert {s.group for s in report.splits} == {"fc"}
    barred = dict(report.barred) | {u.name: u.reason for u in report.architecture.unsplittable}
    assert "after growth" in barred["conv"]
    assert ("conv" in report.barred) >= late  # the earlier ones may already be seen by tracing
    again = grow(_Counting(count(), 10**9), [x], loss_of(torch.zeros(4, 2)), strategy=_All(), barred=barred)
    assert {s.group for s in again.splits} == {"fc"}


def test_a_loss_that_diverges_after_the_displacement_is_taken_back() -> None:
    """If the loss is not finite after the growth the model is restored bit for bit."""
    model, x, loss = _problem()
    before = _everything(model)

    def fragile(m: nn.Module, b: Tensor) -> Tensor:
        width = m.get_submodule("stem").weight.shape[0]
        moved = (m.stem.weight[:4] - stem[:4]).abs().max() > 0 if width > 4 else torch.tensor(False)
        return loss(m, b) * (float("inf") if moved else 1.0)

    stem = model.stem.weight.detach().clone()
    before[4] = torch.get_rng_state()
    with pytest.raises(ValueError, match="After the growth the loss is inf.*smaller step_size"):
        grow(model, [x], fragile, strategy=_All(), step_size=0.1)
    assert _same(_everything(model), before)


def test_growth_after_growth_keeps_helping() -> None:
    """Train, grow, train: the widths keep rising and each growth lowers the loss at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    x = torch.randn(128, 2)
    loss = loss_of(torch.sin(3 * x[:, :1]) * x[:, 1:])
    losses = []
    for _ in range(3):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
        report = grow(model, [x], loss, strategy=TopK(fraction=0.5), step_size=5e-2)
        assert report.measured_gain > 0
        losses.append(report.loss_after)
    assert losses[2] < losses[0]
    assert [m.out_features for m in model if isinstance(m, nn.Linear)][:2] != [2, 2]


def test_widths_of_a_residual_stream_grow_in_all_its_layers() -> None:
    """One split of the stream widens both producers, the norm, and both consumers."""
    model, x, loss = _problem()
    assert isinstance(model, Residual)
    grow(model, [x], loss, strategy=TopK(count=1), include=["stem"])
    sizes = (model.stem.out_channels, model.conv2.out_channels, model.norm2.num_features)
    assert (*sizes, model.conv1.in_channels, model.head.in_features) == (5, 5, 5, 5, 45)
