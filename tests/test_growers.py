"""Schemes: feasible, with the values that the theory gives and a numerical optimiser finds."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_split import Exact, KnapsackEnergy, SelectionStrategy, SteepestSplitting, TopK, grow, trace
from lightning_split.context import GrowthContext
from lightning_split.curvature import SplittingOperator
from lightning_split.growers import Scheme, schemes
from lightning_split.selection import Candidate
from lightning_split.significance import FreshBatches
from lightning_split.surgery import Split, split_neurons
from scipy.optimize import minimize
from torch import nn

from networks import CASES, loss_of, randomised

pytestmark = pytest.mark.usefixtures("double")


def _value(scheme: Scheme, low: float, high: float) -> float:
    alpha, beta = scheme.coefficients
    return alpha * low + beta * high


@given(
    c=st.floats(1.01, 8),
    low=st.floats(-4, 4),
    spread=st.floats(0, 4),
    offspring=st.sampled_from([2, 3, 4]),
)
def test_schemes_are_feasible_and_have_the_values_of_the_table(
    c: float, low: float, spread: float, offspring: int
) -> None:
    """Σw = 1, Σ|w| ≤ c, Σwδ = 0, ‖δ‖ ≤ 1, no cross term, and the values of DESIGN 2.4."""
    high = low + spread
    expected = {
        "positive binary": low,
        "negative binary": -(c - 1) / (c + 1) * high,
        "positive triplet": (c + 1) / 2 * low,
        "negative triplet": -(c - 1) / 2 * high,
        "mixed triplet": 2 * c / (c + 1) * low - (c - 1) / (c + 1) * high,
        "quartet": (c + 1) / 2 * low - (c - 1) / 2 * high,
    }
    offered = schemes(offspring, c)
    assert len(offered) == {2: 2, 3: 5, 4: 6}[offspring]
    for scheme in offered:
        w, along = np.array(scheme.weights), np.array(scheme.along)
        assert len(w) <= offspring
        assert w.sum() == pytest.approx(1)
        assert np.abs(w).sum() <= max(1, c) + 1e-9
        assert w @ along == pytest.approx(np.zeros(2), abs=1e-9)
        assert (np.linalg.norm(along, axis=1) <= 1 + 1e-12).all()
        assert w @ (along[:, 0] * along[:, 1]) == pytest.approx(0, abs=1e-12)
        assert _value(scheme, low, high) == pytest.approx(expected[scheme.name], abs=1e-9)


def test_unsigned_or_c_one_is_s2d() -> None:
    """Without negative weights only the positive binary split is left."""
    assert [s.name for s in schemes(4, 3.0, signed=False)] == ["positive binary"]
    assert [s.name for s in schemes(4, 1.0)] == ["positive binary"]


def _numerical_optimum(matrix: np.ndarray, m: int, c: float, rng: np.random.Generator) -> float:
    """Best value of Σ w δᵀSδ under the constraints, by SLSQP from random starts."""
    d = len(matrix)

    def unpack(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return z[:m] - z[m : 2 * m], z[2 * m :].reshape(m, d)  # w = w⁺ - w⁻

    def objective(z: np.ndarray) -> float:
        w, delta = unpack(z)
        return float(w @ np.einsum("id,de,ie->i", delta, matrix, delta))

    constraints = [
        {"type": "eq", "fun": lambda z: unpack(z)[0].sum() - 1},
        {"type": "eq", "fun": lambda z: unpack(z)[0] @ unpack(z)[1]},
        {"type": "ineq", "fun": lambda z: c - z[: 2 * m].sum()},
        {"type": "ineq", "fun": lambda z: 1 - (unpack(z)[1] ** 2).sum(1)},
    ]
    bounds = [(0, c)] * (2 * m) + [(-1, 1)] * (m * d)
    best = 0.0
    for _ in range(25):
        start = np.concatenate([rng.uniform(0, 1.5, 2 * m), rng.normal(size=m * d) * 0.7])
        found = minimize(objective, start, method="SLSQP", bounds=bounds, constraints=constraints)
        broken = max(0.0, *(-np.min(k["fun"](found.x)) for k in constraints if k["type"] == "ineq"))
        broken = max(broken, *(np.abs(k["fun"](found.x)).max() for k in constraints if k["type"] == "eq"))
        if broken < 1e-6:
            best = min(best, float(found.fun))
    return best


@pytest.mark.parametrize("c", [1.5, 3.0])
@pytest.mark.parametrize("m", [2, 3, 4])
def test_values_are_those_of_a_numerical_optimiser(m: int, c: float) -> None:
    """No other weights and displacements with as many offspring do better (S3D)."""
    rng = np.random.default_rng(m)
    for ratio in {2: (1.0,), 3: (0.3, 1.2, 40.0), 4: (0.5,)}[m]:  # of the ends: each triplet wins once
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        matrix = turn @ np.diag([-1.0, rng.uniform(-0.9, 0.2), ratio]) @ turn.T
        low, high = np.linalg.eigvalsh(matrix)[[0, -1]]
        ours = min(0.0, *(_value(s, low, high) for s in schemes(m, c)))
        assert ours == pytest.approx(_numerical_optimum(matrix, m, c, rng), rel=2e-4)


@settings(deadline=None, max_examples=60)
@given(low=st.floats(-3, -0.01), ratio=st.floats(0.02, 12), c=st.floats(1.05, 7))
def test_the_mixed_triplet_wins_exactly_where_the_theory_says(low: float, ratio: float, c: float) -> None:
    """It beats both pure triplets iff (c-1)/2 |λ-| < λ+ < 4c/(c-1)² |λ-|."""
    high = -low * ratio
    values = {s.name: _value(s, low, high) for s in schemes(3, c)}
    wins = values["mixed triplet"] < min(values["positive triplet"], values["negative triplet"]) - 1e-12
    lower, upper = (c - 1) / 2, 4 * c / (c - 1) ** 2
    if min(abs(ratio / lower - 1), abs(ratio / upper - 1)) > 1e-6:
        assert wins == (lower < ratio < upper)


@pytest.mark.parametrize("offspring", [2, 3, 4])
def test_candidates_carry_the_best_scheme_of_their_neuron(offspring: int) -> None:
    """Gain = -ε²/2 · Σ w δᵀSδ / ε² of the offered weights and displacements, and no scheme is better."""
    case = CASES["residual"]
    model, x = randomised(case.model()), case.inputs()
    arch = trace(model, x)
    context = GrowthContext(model, arch, loss_of(torch.randn(8, 3)), [x])
    operator = context.operator([x])
    grower = SteepestSplitting(max_offspring=offspring, solver=Exact())
    proposal = grower.propose(context, step_size=0.1)
    assert len(proposal.candidates) == 15
    used = set()
    for candidate in proposal.candidates:
        matrix = operator.dense(candidate.group)[candidate.neuron]
        low, high = torch.linalg.eigvalsh(matrix)[[0, -1]].tolist()
        best = min(_value(s, low, high) for s in schemes(offspring, 3.0))
        delta, w = candidate.displacements, torch.tensor(candidate.weights)
        form = float(w @ torch.einsum("id,de,ie->i", delta, matrix, delta))
        assert candidate.splitting_index == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert candidate.gain == pytest.approx(-0.005 * best, rel=1e-6, abs=1e-12)
        assert candidate.gain == pytest.approx(-form / 2, rel=1e-6, abs=1e-12)
        used.add(candidate.scheme)
    assert used <= {s.name for s in schemes(offspring, 3.0)}
    assert len(used) > 1 or offspring == 4


@pytest.mark.parametrize(("strategy", "every"), [(KnapsackEnergy(0.5), True), (TopK(count=3), False)])
def test_a_knapsack_sees_every_scheme_and_the_others_the_best(
    strategy: SelectionStrategy, every: bool
) -> None:
    """Without being asked for: what is offered follows from the strategy."""
    model, x = CASES["mlp"].model(), torch.randn(16, 5)
    report = grow(
        *(model, [x], loss_of(torch.randn(16, 3))),
        grower=SteepestSplitting(max_offspring=4, solver=Exact()),
        strategy=strategy,
    )
    offered: dict[tuple[str, int], list[Candidate]] = {}
    for c in report.candidates:
        offered.setdefault((c.group, c.neuron), []).append(c)
    assert len(offered) == 13
    for mine in offered.values():
        assert [c.scheme for c in mine] == [s.name for s in schemes(4, 3.0)] if every else len(mine) == 1
    assert len({(s.group, s.neuron) for s in report.splits}) == len(report.splits) > 0


def test_confirmation_replaces_the_gain_by_that_on_fresh_batches() -> None:
    """Gains and standard errors come from the fresh batches' Rayleigh quotients; estimates are kept apart."""
    case = CASES["mlp"]
    model, x = case.model(), case.inputs()
    y = torch.randn(16, 3)
    arch, loss = trace(model, x), (lambda m, b: (m(b) - y).square().mean())
    fresh = [torch.randn(16, 5) for _ in range(3)]
    grower = SteepestSplitting(signed=False, solver=Exact())
    proposal = grower.propose(GrowthContext(model, arch, loss, [x], FreshBatches(fresh)), step_size=0.1)
    singles = [SplittingOperator(model, arch, [b], loss).dense("0") for b in fresh]
    own = SplittingOperator(model, arch, [x], loss).dense("0")
    for candidate in (c for c in proposal.candidates if c.group == "0"):
        v = torch.linalg.eigh(own[candidate.neuron])[1][:, 0]
        samples = torch.stack([v @ s[candidate.neuron] @ v for s in singles])
        key = (candidate.group, candidate.neuron, candidate.scheme)
        assert candidate.gain == pytest.approx(-0.005 * float(samples.mean()), rel=1e-6)
        assert candidate.standard_error == pytest.approx(0.005 * float(samples.std()) / 3**0.5, rel=1e-6)
        estimate = -0.005 * float(torch.linalg.eigvalsh(own[candidate.neuron])[0])
        assert proposal.estimated_gain[key] == pytest.approx(estimate, rel=1e-6)


def _one_layer(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize(("offspring", "signed"), [(2, True), (2, False), (4, True)])
@pytest.mark.parametrize("step", [1e-3, 10.0])
def test_kinked_networks_are_confirmed_by_what_splits_really_change(
    offspring: int, signed: bool, step: float
) -> None:
    """With a loss that is linear in what the neurons send on, exactly, at 0.2 of their norm or further."""
    model, y = _one_layer(), torch.randn(16, 3)
    arch, loss = trace(model, torch.randn(16, 5)), (lambda m, b: (m(b) * y).mean())
    fresh = [torch.randn(16, 5) for _ in range(9)]
    grower = SteepestSplitting(max_offspring=offspring, signed=signed, solver=Exact())
    batches = [torch.randn(16, 5)]
    proposals = [
        grower.propose(
            GrowthContext(model, arch, loss, batches, FreshBatches(fresh), all_schemes=every), step_size=step
        )
        for every in (True, False)
    ]
    theta = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach()
    assert len(proposals[0].candidates) == 6 * len(schemes(offspring, 3.0, signed=signed))
    for candidate in proposals[0].candidates:
        assert candidate.displacements is not None
        longer = max(1.0, 0.2 * float(theta[candidate.neuron].norm()) / step)
        assert (longer == 1) == (step == 10)
        grown = copy.deepcopy(model)
        moved = longer * candidate.displacements
        split_neurons(grown, [Split("0", candidate.neuron, candidate.weights, moved)], arch=arch)
        with torch.no_grad():
            gains = torch.stack([loss(model, b) - loss(grown, b) for b in fresh]) / longer**2
        assert candidate.gain == pytest.approx(float(gains.mean()), rel=1e-6, abs=1e-18)
        assert candidate.standard_error == pytest.approx(float(gains.std()) / 3, rel=1e-6, abs=1e-18)
        assert candidate.gain == pytest.approx(-candidate.splitting_index * step**2 / 2)
        longer = max(1.0, 0.03 * float(theta[candidate.neuron].norm()) / step)
        grown = copy.deepcopy(model)
        moved = longer * candidate.displacements
        split_neurons(grown, [Split("0", candidate.neuron, candidate.weights, moved)], arch=arch)
        with torch.no_grad():
            gains = torch.stack([loss(model, b) - loss(grown, b) for b in fresh]) / longer**2
        mean_and_error = float(gains.mean()), float(gains.std()) / 3
        assert candidate.nearby == pytest.approx(mean_and_error, rel=1e-6, abs=1e-15)
    # Without being asked for all, the scheme that promised most is measured, and no other.
    estimates, schemed = (
        proposals[0].estimated_gain,
        {(c.neuron, c.scheme): c for c in proposals[0].candidates},
    )
    assert [c.neuron for c in proposals[1].candidates] == list(range(6))
    assert proposals[1].alternatives == 1
    for candidate in proposals[1].candidates:
        mine = {s: g for (_, neuron, s), g in estimates.items() if neuron == candidate.neuron}
        assert mine[candidate.scheme] == max(mine.values())
        gain = schemed[candidate.neuron, candidate.scheme].gain
        assert candidate.gain == pytest.approx(gain, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("step", [0.2, 0.05])
def test_the_curvature_of_the_rest_counts_at_the_step_of_the_growth(step: float) -> None:
    """A square loss: gain = first term at 0.2 of the norm, scaled, and the second as really split."""
    model, y = _one_layer(1), 3 * torch.randn(300, 3)
    with torch.no_grad():
        model[0].weight /= model[0].weight.norm()
        model[0].bias.zero_()
    arch, loss = trace(model, torch.randn(300, 5)), (lambda m, b: (m(b) - y).square().mean())
    fresh = [torch.randn(300, 5) for _ in range(3)]
    context = GrowthContext(model, arch, loss, fresh[:1], FreshBatches(fresh))
    (candidate,) = SteepestSplitting(solver=Exact()).propose(context, step_size=step).candidates
    expected = []
    for batch in fresh:
        outputs = []
        for share in (0.2 / step, 1.0):
            grown = copy.deepcopy(model)
            moved = share * candidate.displacements
            split_neurons(grown, [Split("0", 0, candidate.weights, moved)], arch=arch)
            outputs.append((grown(batch) - model(batch)).detach())
        residual = (model(batch) - y).detach()
        first = 2 * (residual * outputs[0]).mean() * (step / 0.2) ** 2
        expected.append(-first - outputs[1].square().mean())
        assert float(outputs[1].square().mean()) > 1e-3 * float(first.abs())
    assert candidate.gain == pytest.approx(float(torch.stack(expected).mean()), rel=1e-6)


@pytest.mark.parametrize("step", [0.2, 0.05, 0.01])
def test_a_gain_is_measured_once_more_close_by(step: float) -> None:
    """A square loss: by how much it really changes at the step, or at 0.03 of the norm, scaled."""
    model, y = _one_layer(1), 3 * torch.randn(300, 3)
    arch, loss = trace(model, torch.randn(300, 5)), (lambda m, b: (m(b) - y).square().mean())
    fresh = [torch.randn(300, 5) for _ in range(3)]
    context = GrowthContext(model, arch, loss, fresh[:1], FreshBatches(fresh))
    (candidate,) = SteepestSplitting(solver=Exact()).propose(context, step_size=step).candidates
    norm = float(torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach().norm())
    longer = max(1.0, 0.03 * norm / step)
    grown = copy.deepcopy(model)
    moved = longer * candidate.displacements
    split_neurons(grown, [Split("0", 0, candidate.weights, moved)], arch=arch)
    gains = torch.stack([loss(model, b) - loss(grown, b) for b in fresh]).detach() / longer**2
    expected = float(gains.mean()), float(gains.std()) / 3**0.5
    assert candidate.nearby == pytest.approx(expected, rel=1e-6, abs=1e-15)
    assert float(gains.std()) > 0


def test_neurons_without_weights_are_measured_too() -> None:
    """No norm to take a share of: those of the group count, or 1."""
    for zeroed in (2, 6):
        model = _one_layer()
        nn.init.zeros_(model[0].weight[:zeroed])
        nn.init.zeros_(model[0].bias[:zeroed])
        x, y = torch.randn(16, 5), torch.randn(16, 3)
        fresh, loss = FreshBatches([x] * 2), (lambda m, b, y=y: (m(b) * y).mean())
        context = GrowthContext(model, trace(model, x), loss, [x], fresh)
        proposal = SteepestSplitting().propose(context, step_size=0.0)
        assert all(c.gain == 0 and math.isfinite(c.splitting_index) for c in proposal.candidates)
        assert any(c.splitting_index for c in proposal.candidates[:zeroed])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"max_offspring": 5}, "2, 3 or 4, got 5"), ({"c": 0.5}, "at least 1, got 0.5")],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    """What is allowed, and what came."""
    with pytest.raises(ValueError, match=message):
        SteepestSplitting(**arguments)
