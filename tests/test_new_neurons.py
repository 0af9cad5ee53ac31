"""Growers that add new neurons, baselines, and all of them together."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_split import (
    Exact,
    Folding,
    GradMax,
    Mixed,
    Net2Net,
    NewNeurons,
    RandomSplit,
    SelectionStrategy,
    SteepestSplitting,
    TopK,
    grow,
    split_neurons,
    trace,
)
from lightning_split.context import GrowthContext
from lightning_split.deciding import as_split
from lightning_split.growers import Grower, NotApplicableError
from lightning_split.growers.folding import Instance, fold_point, steepest_turn, typical_instances
from lightning_split.growers.gradmax import leading_pairs
from lightning_split.selection import Candidate, best_per_neuron
from lightning_split.significance import FreshBatches
from lightning_split.splits import weights_of
from lightning_split.stepsize import Relative
from torch import Tensor, nn

from networks import CASES, loss_of, randomised, relu_mlp
from test_composites import network

pytestmark = pytest.mark.usefixtures("double")


class Everything(SelectionStrategy):
    """The best candidate of every neuron, whatever its gain."""

    def select(self, candidates: Any) -> list[Candidate]:
        return best_per_neuron(candidates)


def _context(name: str, *, fresh: bool = False) -> GrowthContext:
    case = CASES[name]
    model, x = randomised(case.model()).eval(), case.inputs()
    loss = loss_of(torch.randn_like(model(x).detach()))
    again = FreshBatches([x, x]) if fresh else None
    return GrowthContext(model, trace(model, x), loss, [x], again, surrogate_beta=None)


def _grown(context: GrowthContext, candidates: list[Candidate]) -> nn.Module:
    model = copy.deepcopy(context.model)
    split_neurons(model, [as_split(c) for c in candidates], arch=context.arch)
    return model


def _loss(context: GrowthContext, model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(context.loss_fn(model, x)) for x in context.batches) / len(context.batches)


# on all kinds of networks ------------------------------------------------------------------------

ANYWHERE = [NewNeurons(draws=1), GradMax(), RandomSplit(), Net2Net()]


@pytest.mark.parametrize("name", CASES)
def test_at_zero_step_nothing_changes_and_at_a_small_one_the_prediction_holds(name: str) -> None:
    """Outputs move by rounding in both modes; then the loss falls by what was predicted."""
    context = _context(name)
    x = context.batches[0]
    for grower in ANYWHERE:
        still = best_per_neuron(grower.propose(context, step_size=0.0).candidates)
        assert still
        grown = _grown(context, still)
        for train in (False, True):
            a, b = (copy.deepcopy(m).train(train)(x) for m in (context.model, grown))
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
        if isinstance(grower, Net2Net):
            continue  # which predicts nothing
        best = sorted(grower.propose(context, step_size=1e-4).candidates, key=lambda c: -c.gain)[:2]
        change = _loss(context, context.model) - _loss(context, _grown(context, best))
        assert change == pytest.approx(sum(c.predicted for c in best), rel=2e-3)


@pytest.mark.parametrize("name", ["lstm", "attention", "bilinear"])
def test_gates_heads_and_products_get_new_neurons_too(name: str) -> None:
    """Neurons of several rows and columns, and such as read themselves."""
    model, x = network(name)
    loss = loss_of(torch.randn_like(model.eval()(x).detach()))
    context = GrowthContext(model, trace(model, x), loss, [x], surrogate_beta=None)
    for grower in (NewNeurons(draws=1), GradMax()):
        still = grower.propose(context, step_size=0.0).candidates
        torch.testing.assert_close(_grown(context, list(still))(x), model(x), rtol=1e-12, atol=1e-12)
        best = max(grower.propose(context, step_size=1e-4).candidates, key=lambda c: c.gain)
        change = _loss(context, model) - _loss(context, _grown(context, [best]))
        assert change == pytest.approx(best.gain, rel=2e-3)


@pytest.mark.parametrize("grower", [NewNeurons(draws=1, first_step=False), GradMax(first_step=False)])
def test_without_the_first_step_the_network_computes_what_it_computed(grower: Grower) -> None:
    """At a large ε too, with BatchNorm and without; the gain is that of the step that is left out."""
    for name in ("residual", "gated"):
        context = _context(name, fresh=True)
        candidates = best_per_neuron(grower.propose(context, step_size=0.3).candidates)
        assert all(c.predicted == 0 for c in candidates)
        assert max(c.gain for c in candidates) > 0
        grown = _grown(context, candidates)
        x = context.batches[0]
        for train in (False, True):
            a, b = (copy.deepcopy(m).train(train)(x) for m in (context.model, grown))
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


# new neurons ---------------------------------------------------------------------------------------


def test_of_several_draws_the_best_is_kept_and_judged_on_fresh_batches() -> None:
    """More draws never gain less where they were compared; the gain offered is that of the fresh batches."""
    context = _context("residual")
    gains = []
    for draws in (1, 4):
        found = NewNeurons(draws=draws).propose(context, step_size=0.1)
        gains.append({(c.group, c.neuron): c.gain for c in found.candidates})
    assert all(gains[1][key] >= gains[0][key] for key in gains[0])
    assert sum(gains[1].values()) > 1.2 * sum(gains[0].values())
    fresh = [torch.randn_like(context.batches[0]) for _ in range(3)]
    again = GrowthContext(context.model, context.arch, context.loss_fn, context.batches, FreshBatches(fresh))
    found = NewNeurons(draws=1).propose(again, step_size=0.1)
    assert found.num_batches == 3
    candidate = max(found.candidates, key=lambda c: c.gain)
    samples = []
    for x in fresh:
        one = GrowthContext(context.model, context.arch, context.loss_fn, [x])
        change = _loss(one, _grown(one, [candidate.at(1e-4)])) - _loss(one, context.model)
        samples.append(-change / 1e-4)
    assert candidate.gain == pytest.approx(sum(samples) / 3, rel=2e-3)
    error = float(torch.tensor(samples).std()) / 3**0.5
    assert candidate.standard_error == pytest.approx(error, rel=2e-2)
    assert found.estimated_gain[candidate.group, candidate.neuron, "new neuron"] == pytest.approx(
        gains[0][candidate.group, candidate.neuron]
    )


def test_statistics_of_a_new_channel_are_those_of_its_activations() -> None:
    """BatchNorm keeps mean and variance of what the new channel computes, and scale 1 and shift 0."""
    context = _context("residual")
    candidates = NewNeurons(draws=1).propose(context, step_size=0.1).candidates
    (chosen,) = [c for c in candidates if (c.group, c.neuron) == ("conv1", 2)]
    grown: Any = _grown(context, [chosen])
    with torch.no_grad():
        z = grown.conv1(torch.tanh(grown.stem(context.batches[0])))[:, 3]
    norm = grown.norm1
    torch.testing.assert_close(norm.running_mean[3], z.mean())
    torch.testing.assert_close(norm.running_var[3], z.var())
    assert (float(norm.weight[3].detach()), float(norm.bias[3].detach())) == (1.0, 0.0)
    old: Any = context.model
    torch.testing.assert_close(norm.running_var[[0, 1, 2, 4, 5]], old.norm1.running_var)


def test_new_weights_are_as_large_as_the_old_ones_or_as_asked_for() -> None:
    """Default: the root mean square of each tensor of the layer; outgoing weights of the relative length."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2))
    with torch.no_grad():
        model[0].weight.mul_(7.0)
        model[0].bias.zero_()
    x = torch.randn(20, 40)
    context = GrowthContext(model, trace(model, x), loss_of(torch.randn(20, 2)), [x])
    group = context.arch.group("0")
    theta = weights_of(model, group, "incoming")

    def new(grower: Grower) -> Tensor:
        found = grower.propose(context, step_size=Relative(0.5)).candidates
        columns = model[2].weight.detach().norm(dim=0)
        for c in found:
            assert float(c.outgoing[1].norm()) == pytest.approx(0.5 * float(columns[c.neuron]))
        return torch.stack([theta[c.neuron] + c.displacements[1] for c in found])

    rows = new(NewNeurons(draws=1))
    assert float(rows[:, :40].std()) == pytest.approx(float(theta[:, :40].std()), rel=0.1)
    assert not rows[:, 40].any()
    assert float(new(NewNeurons(draws=1, std=0.2)).std()) == pytest.approx(0.2, rel=0.1)


# GradMax -------------------------------------------------------------------------------------------


def test_gradmax_takes_the_singular_vectors_of_a_layer_that_bypasses_the_neurons() -> None:
    """Linear: M is the gradient of the auxiliary layer, by autograd; its singular values are the norms."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    x, y = torch.randn(32, 4), torch.randn(32, 5)
    loss = lambda m, b: (m(b) - y).square().mean()  # noqa: E731
    auxiliary = torch.zeros(5, 5, requires_grad=True)
    bypassed = model(x) + torch.cat([x, torch.ones(32, 1)], 1) @ auxiliary.T
    (gradient,) = torch.autograd.grad((bypassed - y).square().mean(), auxiliary)
    left, values, right = torch.linalg.svd(gradient)
    context = GrowthContext(model, trace(model, x), loss, [x])
    found = GradMax(first_step=False).propose(context, step_size=0.1).candidates
    assert len(found) == 5  # of six neurons: M has five directions
    grown: Any = _grown(context, list(found))
    norms = torch.stack([u[1] for u in (c.outgoing for c in found)])
    torch.testing.assert_close((norms @ left / 0.1).abs(), torch.eye(5), atol=1e-6, rtol=0)
    grads = torch.autograd.grad(loss(grown, x), [grown[0].weight, grown[0].bias])
    rows = torch.cat([grads[0], grads[1][:, None]], 1)[[2 * c.neuron + 1 for c in found]]
    torch.testing.assert_close(rows.norm(dim=1), 0.1 * values)
    torch.testing.assert_close((rows @ right.T).abs() / rows.norm(dim=1, keepdim=True), torch.eye(5),
                               atol=1e-6, rtol=0)  # fmt: skip
    stepped = GradMax().propose(context, step_size=1e-3).candidates
    torch.testing.assert_close(torch.tensor([c.gain for c in stepped]), 1e-6 * values, rtol=1e-3, atol=1e-9)


def test_no_other_outgoing_weights_have_a_larger_gradient_in_a_convolution() -> None:
    """Brute force: the gradient in the zero incoming weights, for the offered u and for random ones."""
    context = _context("volumes")
    found = GradMax(first_step=False).propose(context, step_size=1.0).candidates
    best = max(found, key=lambda c: c.gain)

    def norm(u: Tensor) -> float:
        split = as_split(best)
        split.outgoing[1] = u
        model = copy.deepcopy(context.model)
        split_neurons(model, [split], arch=context.arch)
        weights = [model[0].weight, model[0].bias]
        grads = torch.autograd.grad(context.loss_fn(model, context.batches[0]), weights)
        return float(torch.cat([g[best.neuron + 1].flatten() for g in grads]).norm())

    u = best.outgoing[1].clone()
    assert float(u.norm()) == pytest.approx(1.0)
    mine = norm(u)
    others = [norm(v / v.norm()) for v in torch.randn(30, len(u))]
    assert max(others) < mine
    near = [norm(F.normalize(u + 0.05 * v / v.norm(), dim=0)) for v in torch.randn(10, len(u))]
    assert max(near) < mine


@pytest.mark.parametrize("shape", [(3, 9), (40, 30), (30, 41)])
def test_leading_pairs_are_those_of_the_dense_decomposition(shape: tuple[int, int]) -> None:
    """Small matrices exactly, by forming them; large ones by iteration, several groups at once."""
    left, values, right = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    falling = values * 0.2 ** torch.arange(len(values))  # fast enough for a few iterations
    matrices = {"a": left @ torch.diag(falling) @ right, "b": torch.randn(2, 5)}
    n = {"a": 3, "b": 4}
    asked = []

    def product(part: str, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        asked.append(part)
        assert all(len(vectors[name]) == n[name] for name in n)
        return {k: v @ (matrices[k].T if part == "incoming" else matrices[k]) for k, v in vectors.items()}

    like = {name: torch.zeros(count, 1) for name, count in n.items()}
    found = leading_pairs(product, {k: m.shape for k, m in matrices.items()}, like, 4, 0)
    assert len(asked) <= 9 + 1
    for name, pairs in found.items():
        left, values, right = torch.linalg.svd(matrices[name], full_matrices=False)
        k = min(n[name], *matrices[name].shape)
        torch.testing.assert_close(pairs.values, values[:k], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close((pairs.left @ left[:, :k]).abs(), torch.eye(k), rtol=0, atol=1e-4)
        torch.testing.assert_close((pairs.right @ right[:k].T).abs(), torch.eye(k), rtol=0, atol=1e-4)


def test_gradmax_says_where_it_does_not_apply() -> None:
    """A sigmoid sends ½ at 0, and ReLU has no gradient there in torch; the other group grows."""
    model, x = CASES["mlp"].model(), torch.randn(16, 5)
    report = grow(model, [x], loss_of(torch.randn(16, 3)), grower=GradMax(), strategy=Everything())
    assert {s.group for s in report.splits} == {"0"}
    assert "GradMax left '3' alone: its neurons send something" in str(report)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(NotApplicableError, match="would never learn"):
        grow(model, [x], loss_of(torch.randn(16, 3)), grower=GradMax(first_step=False))
    report = grow(model, [x], loss_of(torch.randn(16, 3)), grower=GradMax(), strategy=TopK(count=1))
    assert report.measured_gain == pytest.approx(report.predicted_gain, rel=0.1)


# folding -------------------------------------------------------------------------------------------


def _separation() -> tuple[nn.Module, Any, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(3)
    model = randomised(nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)))
    x = torch.rand(60, 2) * 4 - 2
    batches = [(x[:40], (x[:40, 1] > torch.sin(3 * x[:40, 0])).long())]
    return model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batches


def test_folds_pass_through_the_decision_boundary_nearest_a_typical_instance() -> None:
    """The unit is zero at the fold point, active at the instance, and the boundary is where logits agree."""
    model, loss, batches = _separation()
    arch = trace(model, batches[0][0])
    context = GrowthContext(model, arch, loss, batches)
    found = Folding(clusters=4, direction="instance").propose(context, step_size=1e-2).candidates
    assert 1 < len(found) <= 4
    theta = weights_of(model, arch.group("0"), "incoming")
    x, y = batches[0]
    losses = F.cross_entropy(model(x), y, reduction="none").detach()
    on_data = 0
    for c in found:
        unit = theta[c.neuron] + c.displacements[1]
        normal, bias = unit[:2], unit[2]
        assert float(normal.norm()) == pytest.approx(float(theta[:, :2].norm(dim=1).mean()))
        # the fold is parallel to the boundary of the linear piece around some instance, at no distance
        for point, label in zip(x, y, strict=True):
            jacobian = torch.autograd.functional.jacobian(model, point)
            logits = model(point).detach()
            asked, predicted = int(label), int(logits.argmax())
            asked = 1 - predicted if asked == predicted else asked
            w = jacobian[asked] - jacobian[predicted]
            value = logits[asked] - logits[predicted]
            nearest = point - value * w / (w @ w)
            if abs(float(normal @ nearest + bias)) < 1e-9 and float(normal @ point + bias) > 0:
                on_data += 1
                # brute force: no point of that boundary is closer
                along = torch.linspace(-3, 3, 301)[:, None] * torch.stack([-w[1], w[0]]) / w.norm()
                assert (
                    float(((nearest + along) - point).norm(dim=1).min())
                    >= float((nearest - point).norm()) - 1e-12
                )
                break
    assert on_data == len(found)
    assert losses.max() > losses.mean()


@pytest.mark.parametrize("inputs", [2, 5])
def test_folds_turn_to_where_the_outgoing_weights_have_the_largest_gradient(inputs: int) -> None:
    """Against brute force over directions; the fold points and the lengths stay."""
    torch.manual_seed(inputs)
    model = randomised(nn.Sequential(nn.Linear(inputs, 6), nn.ReLU(), nn.Linear(6, 3)))
    x, y = torch.randn(80, inputs), torch.randint(3, (80,))
    batches = [(x[:40], y[:40]), (x[40:], y[40:])]
    context = GrowthContext(model, trace(model, x), lambda m, b: F.cross_entropy(m(b[0]), b[1]), batches)
    given = Folding(clusters=3, direction="instance").propose(context, step_size=1e-2).candidates
    theta = weights_of(model, context.arch.group("0"), "incoming")
    units = torch.stack([theta[c.neuron] + c.displacements[1] for c in given])
    points = -units[:, -1:] * units[:, :-1] / units[:, :-1].square().sum(1, keepdim=True)
    turned = steepest_turn(context, {"0": units}, {"0": points})["0"]
    torch.testing.assert_close(turned[:, :-1].norm(dim=1), units[:, :-1].norm(dim=1))
    torch.testing.assert_close((turned[:, :-1] * points).sum(1), -turned[:, -1])
    error = torch.softmax(model(x), 1).detach() - F.one_hot(y, 3)

    def size(normal: Tensor, point: Tensor) -> Tensor:
        return ((x - point) @ F.normalize(normal, dim=-1).T).clamp_min(0).T.mm(error).norm(dim=1)

    if inputs == 2:
        angle = torch.linspace(0, 2 * math.pi, 721)
        anywhere = torch.stack([angle.cos(), angle.sin()], 1)
    else:
        anywhere = torch.randn(2000, inputs)
    for unit, old, point in zip(turned, units, points, strict=True):
        (found,), (before,) = size(unit[None, :-1], point), size(old[None, :-1], point)
        assert found >= 0.99 * size(anywhere, point).max()
        assert found >= before
    chosen = Folding(clusters=3).propose(context, step_size=1e-2).candidates
    assert sum(c.gain for c in chosen) > sum(c.gain for c in given)


def test_the_typical_instance_is_in_the_middle_of_the_worst_cluster() -> None:
    """Three tight clusters of which the second is mis-predicted: its most central member comes first."""
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    instances = []
    for k, centre in enumerate(centres):
        for i in range(9):
            offset = torch.zeros(2) if i == 8 else torch.randn(2)
            instances.append(Instance(centre + offset, [0.1, 2.0, 0.5][k], 1.0, torch.ones(2)))
    found = typical_instances(instances, 3, seed=0)
    assert [round(one.loss, 1) for one in found] == [2.0, 0.5, 0.1]
    assert (found[0].point - centres[1]).norm() < 1.0
    fold = fold_point(Instance(torch.tensor([3.0, 4.0]), 0.0, 5.0, torch.tensor([0.0, 2.0])))
    assert fold.tolist() == [3.0, 1.5]


def test_folding_helps_at_once_and_refuses_what_has_no_fold() -> None:
    """Relu networks fold; convolutions, tanh and layers without bias are refused, each with its reason."""
    model, loss, batches = _separation()
    report = grow(model, batches, loss, grower=Folding(), strategy=TopK(count=1), step_size=0.05)
    assert report.measured_gain == pytest.approx(report.predicted_gain, rel=0.2)
    assert report.measured_gain > 0
    with pytest.raises(ValueError, match="loss_fn failed on a batch of one"):
        grow(model, [batches[0][0]], lambda m, x: F.cross_entropy(m(x), batches[0][1]), grower=Folding())
    table, out, image = torch.randn(8, 3), nn.Linear(4, 2), torch.randn(2, 1, 8, 8)
    for net, x, why in (
        (CASES["residual"].model(), torch.randn(8, 1, 6, 6), "'conv1' alone: its neurons are not those"),
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), out), table, "no ReLU units"),
        (nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), out), table, "a bias"),
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 1, 3)), image, "for MLPs"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), out), table, "'1' stands between"),
    ):
        with pytest.raises(NotApplicableError, match=why):
            grow(net, [x], lambda m, b: m(b).square().mean(), grower=Folding())


# all together --------------------------------------------------------------------------------------


def test_mixed_offers_what_its_members_offer_and_takes_the_better() -> None:
    """The same gains on the same fresh batches; new neurons stand beside those that gain least by a split."""
    members = [SteepestSplitting(solver=Exact()), NewNeurons(draws=2)]
    alone = [m.propose(_at(0, fresh=True), step_size=0.3).candidates for m in members]
    together = Mixed(members).propose(_at(0, fresh=True), step_size=0.3)
    assert sorted(c.gain for c in together.candidates) == pytest.approx(
        sorted(c.gain for found in alone for c in found)
    )
    assert together.num_batches == 2
    assert together.alternatives == 2
    assert set(together.eigenpairs) == {"stem", "conv1", "head"}
    for name in ("stem", "conv1", "head"):
        mine = [c for c in together.candidates if c.group == name]
        split = {c.neuron: c.gain for c in mine if c.scheme != "new neuron"}
        order = [c.neuron for c in sorted(mine, key=lambda c: -c.gain) if c.scheme == "new neuron"]
        assert [max(0.0, split[i]) for i in order] == sorted(max(0.0, g) for g in split.values())
    # each new neuron is the same one in its other place: the loss falls by what was predicted
    context = _at(0)
    for c in sorted(together.candidates, key=lambda c: -c.gain)[:3]:
        small = c.at(1e-3)
        change = _loss(context, context.model) - _loss(context, _grown(context, [small]))
        assert change == pytest.approx(small.gain, rel=5e-3)
    chosen = TopK(count=5).select(together.candidates)
    singles = [sum(c.gain for c in TopK(count=5).select(found)) for found in alone]
    assert sum(c.gain for c in chosen) >= max(singles)


def _at(seed: int, *, fresh: bool = False) -> GrowthContext:
    torch.manual_seed(seed)
    return _context("residual", fresh=fresh)


def test_mixed_leaves_out_members_that_do_not_apply_and_refuses_those_that_do_not_predict() -> None:
    """The report says which; with no member left the reasons are the error."""
    context = _context("residual")
    report = grow(
        *(copy.deepcopy(context.model), context.batches, context.loss_fn),
        grower=Mixed([Folding(), SteepestSplitting()]),
        strategy=TopK(count=1),
    )
    assert len(report.splits) == 1
    assert "Folding left 'stem' alone" in str(report)
    with pytest.raises(NotApplicableError, match="Folding left 'stem' alone"):
        Mixed([Folding()]).propose(context, step_size=0.1)
    for growers, message in (([], "at least one"), ([Net2Net()], "Net2Net does not predict gains")):
        with pytest.raises(ValueError, match=message):
            Mixed(growers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NewNeurons(draws=0), "at least one draw, got 0"),
        (lambda: NewNeurons(std=-1.0), "positive standard deviation, got -1.0"),
        (lambda: GradMax(iterations=0), "at least one iteration, got 0"),
        (lambda: Net2Net(noise=-1), "at least 0, got -1"),
        (lambda: Folding(clusters=0), "clusters of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    """What is allowed, and what came."""
    with pytest.raises(ValueError, match=message):
        make()


def test_all_growers_work_in_half_precision() -> None:
    """Weights keep their dtype; what needs more is computed in single precision."""
    torch.set_default_dtype(torch.float32)
    model = relu_mlp().to(torch.bfloat16)
    x, y = torch.randn(64, 5).bfloat16(), torch.randint(3, (64,))
    loss = lambda m, b: F.cross_entropy(m(b[0]).float(), b[1])  # noqa: E731
    for grower in (NewNeurons(draws=1), GradMax(), Folding(2, 16), RandomSplit(), Net2Net()):
        grown = copy.deepcopy(model)
        report = grow(grown, [(x, y)], loss, grower=grower, strategy=TopK(count=2), step_size=0.05)
        assert len(report.splits) == 2
        assert all(p.dtype == torch.bfloat16 for p in grown.parameters())


def test_baselines_choose_at_random_and_say_what_they_expect() -> None:
    """Other neurons for another seed; the split's prediction is a Rayleigh quotient, a copy's is zero."""
    model, x = randomised(relu_mlp()), torch.randn(16, 5)
    loss = loss_of(torch.randn(16, 3))
    for grower in (RandomSplit(), Net2Net(noise=0.0)):
        chosen = []
        for seed in range(4):
            grown = copy.deepcopy(model)
            report = grow(grown, [x], loss, grower=grower, strategy=TopK(count=3), seed=seed)
            chosen.append({(s.group, s.neuron) for s in report.splits})
            assert all(s.weights == (0.5, 0.5) for s in report.splits)
            if isinstance(grower, Net2Net):
                assert report.predicted_gain == 0
                torch.testing.assert_close(grown(x), model(x))
        assert len(set(map(frozenset, chosen))) > 1
