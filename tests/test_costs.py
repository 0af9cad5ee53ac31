"""Costs against torch's own counts on networks that were really grown, and budgets that hold there."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from lightning_split import (
    Activations,
    Cost,
    Energy,
    KnapsackEnergy,
    Macs,
    MeasuredLatency,
    Params,
    PerNeuron,
    SelectionStrategy,
    SteepestSplitting,
    Target,
    TopK,
    Transformed,
    grow,
    trace,
)
from lightning_split.architecture import ChannelGroup
from lightning_split.context import GrowthContext
from lightning_split.costs import as_cost
from lightning_split.pricing import Prices
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from networks import CASES, Raw, loss_of, randomised

pytestmark = pytest.mark.usefixtures("double")

COUNTED = ["mlp", "residual", "dense", "separable", "gated", "grouped", "shared", "scaled", "positions"]


class LayerScale(nn.Module):
    """Parameters that no layer owns grow with the neurons that they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.gamma, self.shift = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(5, 1, 1))
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(x)) * self.gamma
        return self.out(torch.tanh(self.conv2(x) + self.shift).mean((2, 3)))


class Positions(nn.Module):
    """Layers that mix positions run once for every neuron that passes; one of them twice, over two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.time, self.mid = nn.Conv1d(2, 6, 1), nn.Linear(5, 5), nn.Conv1d(6, 4, 1)
        self.rows, self.out = nn.Conv1d(5, 3, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.lift(x))
        x = torch.tanh(self.mid(x + torch.tanh(self.time(x))))
        x = x + torch.tanh(self.time(x))
        return self.out(torch.tanh(self.rows(x.transpose(1, 2))).mean(1))


def problem(name: str) -> tuple[nn.Module, Tensor, Any]:
    """A network, its inputs, and a loss."""
    if name == "scaled":
        model, x = LayerScale().eval(), torch.randn(3, 2, 5, 5)
    elif name == "positions":
        model, x = Positions().eval(), torch.randn(3, 2, 5)
    elif name == "raw":
        model, x = Raw().eval(), torch.randn(3, 2, 7, 7)
    else:
        case = CASES[name]
        model, x = randomised(case.model()).eval(), case.inputs()
    return model, x, loss_of(torch.randn_like(model(x).detach()))


def context_of(model: nn.Module, x: Tensor, loss: Any) -> GrowthContext:
    """What a cost sees."""
    return GrowthContext(model, trace(model, x), loss, [x])


def macs_of(model: nn.Module, x: Tensor) -> float:
    """What torch counts, per sample."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2 / len(x)


def params_of(model: nn.Module) -> int:
    """All parameters."""
    return sum(p.numel() for p in model.parameters())


def written_by(model: nn.Module, x: Tensor) -> float:
    """Values that layers with weights write for one sample."""
    found: list[int] = []
    layers = [m for m in model.modules() if list(m.parameters(recurse=False)) and not list(m.children())]
    handles = [m.register_forward_hook(lambda _, __, out: found.append(out.numel())) for m in layers]
    model(x)
    for handle in handles:
        handle.remove()
    return sum(found) / len(x)


COUNTS = {"params": params_of, "macs": macs_of, "activations": written_by}


class All(SelectionStrategy):
    """Every other neuron, with all its schemes in turn."""

    def __init__(self, cost: Any) -> None:
        self.cost = cost

    def select(self, candidates: Any) -> list[Any]:
        """Some candidates of every group."""
        return [c for c in candidates if (c.neuron + len(c.group)) % 2]


@pytest.mark.parametrize(
    ("name", "cost", "count"),
    [
        *((name, cost, count) for name in COUNTED for cost, count in COUNTS.items()),
        *(("raw", cost, COUNTS[cost]) for cost in ("params", "macs")),
    ],
)
def test_predicted_costs_are_those_of_the_grown_network(name: str, cost: str, count: Any) -> None:
    """Several groups at once, two and four offspring: to the last parameter, MAC and value."""
    model, x, loss = problem(name)
    arguments = (model, x) if cost != "params" else (model,)
    before = count(*arguments)
    grower = SteepestSplitting(max_offspring=4)
    report = grow(model, [x], loss, grower=grower, strategy=All(cost))
    assert len({s.group for s in report.splits}) > 1 or len(report.widths_before) == 1
    assert report.spending.before == before
    assert report.spending.before + report.spending.spent == count(*arguments)
    assert report.spending.unit == cost
    assert (report.cost_after.params, report.cost_after.macs) == (params_of(model), macs_of(model, x))


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("budget", [0.1, 0.6])
def test_budgets_and_limits_hold_on_the_grown_network(name: str, budget: float) -> None:
    """MACs by torch's counter, parameters counted: never above, and nothing that would still fit is left."""
    model, x, loss = problem(name)
    macs, params = macs_of(model, x), params_of(model)
    most = int(params * (1 + budget / 2))
    strategy = KnapsackEnergy(budget, cost="macs", max_factor=None)
    report = grow(model, [x], loss, strategy=strategy, max_params=most, step_size=1e-3)
    assert macs_of(model, x) <= macs * (1 + budget)
    assert params_of(model) <= most
    grown = {(s.group, s.neuron) for s in report.splits}
    left = {c.group for c in report.candidates if c.gain > 0 and (c.group, c.neuron) not in grown}
    for group in (g for g in trace(model, x).groups if g.name in left):
        room = macs * (1 + budget) - macs_of(model, x), most - params_of(model)
        assert group.macs > room[0] or group.params > room[1]


def test_energy_is_the_stated_linear_model() -> None:
    """Counted by hand on two linear layers: arithmetic, weights once a batch, activations twice."""
    model, x, loss = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        torch.randn(5, 3),
        loss_of(torch.zeros(5, 2)),
    )
    prices = Energy(mac=2.0, byte=3.0, batch_size=10).price(context_of(model, x, loss))
    weights, values = 3 * 4 + 4 + 4 * 2 + 2, 4 + 2
    assert prices.total == pytest.approx(2.0 * 20 + 3.0 * (8 * weights / 10 + 2 * 8 * values))
    assert prices.alone("0") == pytest.approx(2.0 * 5 + 3.0 * (8 * 6 / 10 + 2 * 8 * 1))


def test_transforms_price_each_neuron_by_itself() -> None:
    """The square root and the logarithm of what one neuron adds; products of groups play no part."""
    model, x, loss = problem("mlp")
    context = context_of(model, x, loss)
    macs = Macs().price(context)
    for name, function in (("sqrt", math.sqrt), ("log", math.log)):
        prices = Transformed("macs", name).price(context)
        assert prices.unit == f"{name} macs"
        for group in context.arch.groups:
            assert prices.alone(group.name, 3) == pytest.approx(3 * function(macs.alone(group.name)))
        whole = sum(g.width * prices.alone(g.name) for g in context.arch.groups)
        assert prices.total == pytest.approx(whole)


def test_costs_of_your_own() -> None:
    """A function of the channel group, and a subclass of Cost, in a strategy's option."""

    def fan_in(group: ChannelGroup) -> float:
        return float(group.dim)

    class Doubled(Cost):
        unit = "double params"

        def price(self, context: GrowthContext) -> Prices:
            inner = Params().price(context)
            return Prices(
                2 * inner.total, {g.name: 2.0 * g.params for g in context.arch.groups}, unit=self.unit
            )

    model, x, loss = problem("mlp")
    dims = {g.name: g.dim for g in trace(model, x).groups}
    report = grow(copy.deepcopy(model), [x], loss, strategy=KnapsackEnergy(20, cost=fan_in))
    assert report.spending.unit == "fan_in"
    assert report.spending.spent == sum(dims[s.group] for s in report.splits) <= 20
    report = grow(model, [x], loss, strategy=KnapsackEnergy(0.3, cost=Doubled()))
    assert report.spending.before == 2 * report.cost_before.params
    assert 0 < report.spending.spent <= 0.3 * report.spending.before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: as_cost("flops"),
            "does not know cost 'flops'; use one of params, macs, activations, energy",
        ),
        (lambda: as_cost(3), "does not know cost 3"),
        (lambda: as_cost(Params), "does not know cost .* an instance of Cost"),
        (lambda: Energy(mac=-1.0), "Energy needs mac and byte of at least 0"),
        (lambda: Transformed("macs", "cube"), "does not know the function 'cube'"),
        (lambda: Transformed("flops"), "does not know cost 'flops'"),
        (lambda: MeasuredLatency(factors=(2.0, 1.0)), "rising factors of which the first is 1"),
        (lambda: MeasuredLatency(repeats=0), "repeats of at least 1"),
        (lambda: Target(0, factor=2.0), "growths to be an integer of at least 1"),
        (lambda: Target(2), "either factor .* or total"),
        (lambda: Target(2, factor=2.0, total=3.0), "either factor .* or total"),
        (lambda: Target(2, factor=0.5), "factor of at least 1"),
        (lambda: Target(2, total=math.nan), "total of at least 0"),
        (lambda: Target(2, factor=2.0, spread="random"), "spread 'random'"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, message: str) -> None:
    """One sentence that says what to do."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_cost_function_that_makes_no_sense_is_refused(value: float) -> None:
    """The message names the function and the group, and the network is as it was."""
    model, x, loss = problem("mlp")
    before = copy.deepcopy(model.state_dict())

    def cost(group: ChannelGroup) -> float:
        return value

    with pytest.raises(ValueError, match="cost function 'cost' gave .* for group '.*must be positive"):
        grow(model, [x], loss, strategy=KnapsackEnergy(0.3, cost=cost))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_target_is_reached_in_its_growths() -> None:
    """Geometric and equal steps, overspent and underspent ones, and nothing beyond the target."""
    assert [Target(4, factor=16.0).allowance(2.0 * 2**k, 2.0) for k in range(5)] == [2.0, 4.0, 8.0, 16.0, 0.0]
    equal = Target(3, total=40.0, spread="equal")
    assert [equal.allowance(now, 10.0) for now in (10.0, 19.0, 24.0, 26.0, 41.0)] == [
        10.0,
        11.0,
        6.0,
        14.0,
        0.0,
    ]
    assert equal.allowance(10.0) == 10.0
    model, x, loss = problem("mlp")
    first = params_of(model)
    strategy = KnapsackEnergy(Target(3, factor=2.0), cost="params")
    sizes = []
    for _ in range(5):
        report = grow(model, [x], loss, strategy=strategy, seed_cost=first)
        sizes.append(params_of(model))
        assert report.spending.budget is not None
    assert sizes[0] <= first * 2 ** (1 / 3)
    assert sizes[1] <= first * 2 ** (2 / 3)
    assert max(sizes) <= 2 * first
    assert sizes[2] > first * 2 ** (2 / 3)
    assert len(set(sizes[2:])) == 1


def test_latency_is_a_lookup_of_timed_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stopwatch that counts multiply-accumulates the lookup has them, in between and beyond."""
    from lightning_split import latency

    model, x, loss = problem("mlp")
    context = context_of(model, x, loss)
    timed: list[tuple[int, ...]] = []

    def count(self: Any, sizes: Any) -> float:
        args, kwargs = self._inputs(sizes)
        layer = self._resized(sizes)
        assert layer(*args, **kwargs).shape[-1] == layer.weight.shape[0]
        timed.append(tuple(layer.weight.shape))
        return float(layer.weight.numel())

    monkeypatch.setattr(latency._Call, "_timed", count)
    cost = MeasuredLatency(factors=(1.0, 2.0))
    prices, macs = cost.price(context), Macs().price(context)
    assert prices.total == macs.total
    groups = [g.name for g in context.arch.groups]
    for counts in ({groups[0]: 1}, {groups[0]: 2, groups[1]: 3}, dict.fromkeys(groups, 20)):
        assert prices.added(counts) == pytest.approx(macs.added(counts))
    number = len(timed)
    assert number == 2 + 4 + 2
    again = MeasuredLatency(factors=(1.0, 2.0))
    again.load_state_dict(copy.deepcopy(cost.state_dict()))
    assert again.price(context).added(dict.fromkeys(groups, 2)) == prices.added(dict.fromkeys(groups, 2))
    assert len(timed) == number  # nothing was measured again


@pytest.mark.parametrize("name", ["positions", "raw"])
def test_latency_is_that_of_all_that_grows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stopwatch that counts multiply-accumulates: layers over positions, raw matrices, and all sizes."""
    from lightning_split import latency

    def of_layer(self: Any, sizes: Any) -> float:
        layer, args, kwargs = self._prepared(sizes)
        output = layer(*args, **kwargs)
        axis = -1 if isinstance(layer, nn.Linear) else 1
        return float(layer.weight.numel() * output.numel() / output.shape[axis])

    def of_matrix(self: Any, sizes: Any) -> float:
        product, (x, weight), _ = self._prepared(sizes)
        return float(product(x, weight).numel() * len(weight))

    monkeypatch.setattr(latency._Call, "_timed", of_layer)
    monkeypatch.setattr(latency._Product, "_timed", of_matrix)
    model, x, loss = problem(name)
    context, samples = context_of(model, x, loss), len(x)
    cost = MeasuredLatency(factors=(1.0, 2.0))
    prices, macs = cost.price(context), Macs().price(context)
    assert prices.total == samples * macs.total
    first, *others = [g.name for g in context.arch.groups]
    assert others
    for counts in ({first: 1}, {others[-1]: 2}, {first: 2, others[0]: 3}, {first: 20}):
        assert prices.added(counts) == pytest.approx(samples * macs.added(counts))
    report = grow(model, [x], loss, strategy=KnapsackEnergy(0.3, cost=cost, max_factor=None))
    assert report.spending.spent > 0
    assert report.cost_after.macs - report.cost_before.macs == pytest.approx(report.spending.spent / samples)
    assert report.cost_after.macs == macs_of(model, x) <= 1.3 * macs.total


@pytest.mark.parametrize(
    "name", ["residual", "dense", "separable", "gated", "grouped", "shared", "text", "positions", "raw"]
)
@pytest.mark.parametrize("backward", [False, True])
def test_every_layer_can_be_timed(name: str, backward: bool) -> None:
    """The price of a neuron is positive, a wider network is not faster, and the model is left alone."""
    model, x, loss = problem(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    context = context_of(model, x, loss)
    prices = MeasuredLatency(factors=(1.0, 2.0), repeats=1, backward=backward).price(context)
    assert prices.total > 0
    for group in context.arch.groups:
        costs = [prices.alone(group.name, n) for n in (1, 2, 2 * group.width, 9 * group.width)]
        assert costs == sorted(costs)
        assert costs[0] > 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    report = grow(model, [x], loss, strategy=KnapsackEnergy(0.5, cost=MeasuredLatency(repeats=1)))
    assert report.spending.unit == "ms"
    assert report.spending.spent <= report.spending.budget


def test_the_report_says_what_was_left_and_why() -> None:
    """Every neuron that was not split is counted under one reason, and the prices at the edge are told."""
    model, x, loss = problem("residual")
    report = grow(copy.deepcopy(model), [x], loss, strategy=KnapsackEnergy(0.3, per_group_max=2))
    spending = report.spending
    assert sum(spending.left.values()) + len(report.splits) == sum(report.widths_before.values())
    assert set(spending.left) <= {"without gain", "beyond the 2 of their group", "too dear for the budget"}
    best = max(c.gain / spending.price_left for c in report.candidates)
    assert spending.price_left is not None
    assert best > 0
    for part in ("spent", "macs", "gain per unit of cost", "neurons left: ", "too dear for the budget"):
        assert part in str(report)
    report = grow(model, [x], loss, strategy=TopK(count=2), max_params=report.cost_before.params + 1)
    assert report.splits == ()
    assert "do not fit into the 1 params that are left" in report.limit
    assert Activations().unit == "activations"
    assert PerNeuron(len).unit == "len"
