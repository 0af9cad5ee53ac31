"""The toy experiments: their batched maths against autograd, the library and brute force; and the scripts."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning_split import Folding, TopK, grow, trace
from lightning_split.curvature import SplittingOperator
from lightning_split.growers import schemes
from torch import nn
from toy import rbf_claims
from toy.networks import (
    Data,
    Networks,
    choose,
    concatenate,
    descend,
    loss,
    new_neurons,
    split,
    splitting_matrices,
)
from toy.quadrature import gauss_rule
from toy.relu_networks import Networks as ReluNetworks
from toy.relu_networks import best_directions, train, typical_folds
from toy.report import Claim, table


def _networks(count: int, width: int, seed: int = 0) -> tuple[Networks, Data]:
    g = torch.Generator().manual_seed(seed)
    networks = Networks.of(
        torch.randn(count, width, 2, generator=g, dtype=torch.float64),
        torch.randn(count, width, generator=g, dtype=torch.float64),
    )
    x = torch.rand(count, 40, generator=g, dtype=torch.float64) * 6 - 3
    mass = torch.rand(count, 40, generator=g, dtype=torch.float64)
    return networks, Data(x, torch.sin(2 * x) + 1, mass / mass.sum(1, keepdim=True))


class _Rbf(nn.Module):
    def __init__(self, theta: torch.Tensor, w: torch.Tensor) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, len(w), dtype=torch.float64)
        self.out = nn.Linear(len(w), 1, bias=False, dtype=torch.float64)
        self.hidden.weight.data, self.hidden.bias.data = theta[:, :1].clone(), theta[:, 1].clone()
        self.out.weight.data = w[None].clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((-(self.hidden(x) ** 2) / 2).exp())


def test_splitting_matrices_in_closed_form_equal_the_library_s() -> None:
    """Every entry, for networks with their own data and masses."""
    networks, data = _networks(3, 4)
    found = splitting_matrices(networks, data)
    for b in range(3):
        model = _Rbf(networks.theta[b], networks.w[b])
        x, y, mass = data.x[b, :, None], data.y[b, :, None], data.mass[b, :, None]

        def loss_fn(m: nn.Module, batch: torch.Tensor, y: torch.Tensor = y, mass: torch.Tensor = mass):
            return ((m(batch) - y) ** 2 * mass).sum()

        operator = SplittingOperator(model, trace(model, x), [x], loss_fn)
        torch.testing.assert_close(operator.dense("hidden"), found[b], rtol=1e-9, atol=1e-12)


def test_descent_takes_autograd_s_steps_and_holds_what_is_held() -> None:
    """Three steps; a frozen and a dead neuron do not move; the recorded losses are those before the steps."""
    networks, data = _networks(2, 4)
    networks.free[:, 1] = False
    networks.alive[:, 3] = False
    networks.w[:, 3] = 0.0
    found, history, lowest = descend(networks, data, 3, rate=0.05, every=1)
    theta, w = networks.theta.clone(), networks.w.clone()
    expected = []
    for _ in range(3):
        theta.requires_grad_()
        w.requires_grad_()
        value = loss(Networks(theta, w, networks.alive, networks.free), data)
        expected.append(value.detach())
        slopes = torch.autograd.grad(value.sum(), [theta, w])
        moves = (networks.free & networks.alive).double()
        theta = theta.detach() - 0.05 * slopes[0] * moves[..., None]
        w = w.detach() - 0.05 * slopes[1] * moves
    torch.testing.assert_close(found.theta, theta)
    torch.testing.assert_close(found.w, w)
    torch.testing.assert_close(history, torch.stack(expected, 1))
    last = loss(Networks(theta, w, networks.alive, networks.free), data)
    torch.testing.assert_close(lowest, torch.stack([*expected, last], 1).amin(1))


def test_descent_that_settles_never_raises_a_loss_and_is_plain_descent_where_that_does_not() -> None:
    """One network of a batch has a target that is too large for the rate."""
    networks, data = _networks(2, 4)
    data.y[1] *= 5
    plain, jumps, lowest = descend(networks, data, 300, rate=0.1, every=1)
    found, falls, _ = descend(networks, data, 300, rate=0.1, every=1, settle=True)
    assert bool((jumps.diff(dim=1)[1] > 0).any())
    torch.testing.assert_close(lowest, torch.minimum(jumps.amin(1), loss(plain, data)))
    assert float(lowest[1]) < float(jumps[1, -1])
    assert bool((falls.diff(dim=1) <= 0).all())
    assert float(loss(found, data)[1]) <= float(falls[1, -1]) < float(falls[1, 0]) / 10
    torch.testing.assert_close(found.theta[0], plain.theta[0], rtol=0, atol=0)
    torch.testing.assert_close(falls[0], jumps[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("m", "c", "signed"), [(2, 1.0, False), (2, 3.0, True), (3, 3.0, True), (4, 5.0, True)]
)
def test_splits_change_the_loss_as_their_value_says(m: int, c: float, signed: bool) -> None:
    """ε²/2 times the value, to the third order; no network grows wider than it may."""
    networks, data = _networks(6, 3)
    before = loss(networks, data)
    offered = schemes(m, c, signed=signed)
    for step in (1e-2, 1e-3):
        grown, value = split(networks, data, offered, step, most=8)
        change = (loss(grown, data) - before) / (step**2 / 2)
        torch.testing.assert_close(change, value, rtol=0, atol=50 * step)
    assert bool((value < 0).all())
    assert set((grown.width - networks.width).tolist()) <= set(range(1, m))
    same, _ = split(networks, data, offered, 1e-2, most=3)
    assert same.width.tolist() == [3] * 6


def test_a_splitting_stable_network_stays_as_it_is_beside_one_that_splits() -> None:
    """S2D on a batch of both: the stable one keeps its weights, the table is filled with a dead neuron."""
    networks, data = _networks(8, 2, seed=3)
    lowest = torch.linalg.eigvalsh(splitting_matrices(networks, data))[..., 0].amin(1)
    tolerance = float(-lowest.median())
    grown, value = split(networks, data, schemes(2, 1.0, signed=False), 0.1, most=8, tolerance=tolerance)
    splits = lowest < -tolerance
    assert 0 < int(splits.sum()) < 8
    assert grown.width.tolist() == [3 if s else 2 for s in splits]
    torch.testing.assert_close(value, lowest)
    torch.testing.assert_close(loss(grown, data)[~splits], loss(networks, data)[~splits])


def test_a_new_neuron_s_weight_is_the_best_within_the_bound() -> None:
    """Against a fine grid of weights."""
    networks, data = _networks(3, 2)
    theta = torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w, gain = new_neurons(networks, data, theta, bound=0.3)
    before = loss(networks, data)
    for k in range(5):
        drops = torch.stack([
            before - loss(networks.with_neuron(theta[:, k], torch.full((3,), v, dtype=torch.float64)), data)
            for v in torch.linspace(-0.3, 0.3, 601).tolist()
        ])  # fmt: skip
        torch.testing.assert_close(gain[:, k], drops.amax(0), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(
            before - loss(networks.with_neuron(theta[:, k], w[:, k]), data), gain[:, k]
        )


def test_batches_are_put_together_and_chosen_from_row_by_row() -> None:
    """concatenate and at undo each other; choose takes each row from its alternative."""
    one, _ = _networks(3, 2, seed=1)
    two, _ = _networks(3, 2, seed=2)
    assert torch.equal(concatenate([one, two]).at(slice(3, 6)).theta, two.theta)
    chosen = choose([one, two], torch.tensor([1, 0, 1]))
    assert torch.equal(chosen.w, torch.stack([two.w[0], one.w[1], two.w[2]]))


def test_the_gauss_rule_has_the_points_means() -> None:
    """Polynomials up to its degree, and a bump; all masses positive."""
    x = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10 - 5
    nodes, mass = gauss_rule(x, 40)
    assert bool((mass > 0).all())
    for degree in (0, 1, 2, 17, 79):
        expected = ((x / 5) ** degree).mean()
        torch.testing.assert_close(((nodes / 5) ** degree * mass).sum(), expected, rtol=0, atol=1e-13)
    bump = lambda t: (-((t - 1) ** 2)).exp()  # noqa: E731
    torch.testing.assert_close((bump(nodes) * mass).sum(), bump(x).mean(), rtol=1e-8, atol=0)


def test_the_potential_of_herding_is_half_the_slope_of_the_mmd() -> None:
    """By the mass and by the place, against autograd; its second derivative against differences."""
    herding = importlib.import_module("herding")
    g = torch.Generator().manual_seed(0)
    place = torch.randn(2, 3, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.rand(2, 3, generator=g, dtype=torch.float64).requires_grad_()
    points = torch.randn(2, 20, generator=g, dtype=torch.float64)
    data = herding.Points(points, torch.full_like(points, 1 / 20))
    particles = herding.Particles(place, weight, torch.ones(2, 3, dtype=torch.bool))
    value = herding.mmd(particles, data, data.energy)
    by_place, by_mass = torch.autograd.grad(value.sum(), [place, weight])
    potential = herding.potential(particles, data, place)
    torch.testing.assert_close(by_mass, 2 * potential)
    slope = herding.potential(particles, data, place, order=1)
    torch.testing.assert_close(by_place, 2 * weight * slope)
    h = 1e-5
    ends = [herding.potential(particles, data, place + s * h, order=1) for s in (1, -1)]
    second = herding.potential(particles, data, place, order=2)
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * h), second, rtol=1e-6, atol=1e-8)
    exact = herding.Particles(points, torch.full_like(points, 1 / 20), torch.ones(2, 20, dtype=torch.bool))
    torch.testing.assert_close(
        herding.mmd(exact, data, data.energy), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-14
    )


def _relu_networks(count: int, units: int) -> tuple[ReluNetworks, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, generator=g)
    return ReluNetworks.draw(count, units, g), x, (x[:, 1] > x[:, 0].sin()).long()


def _loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_batched_training_is_adam() -> None:
    """Twenty steps of torch.optim.Adam on each network by itself."""
    networks, x, y = _relu_networks(3, 3)
    found = train(networks, x, y, 20, rate=0.01)
    for b in range(3):
        model = networks.module(b)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            _loss_fn(model, (x, y)).backward()
            optimizer.step()
        for parameter, values in zip(model.parameters(), vars(found).values(), strict=True):
            torch.testing.assert_close(parameter.detach(), values[b], rtol=1e-4, atol=1e-5)


def test_the_steepest_direction_has_the_largest_gradient_of_its_outgoing_weights() -> None:
    """Autograd on the grown network, for directions all around the fold point."""
    networks, x, y = _relu_networks(4, 2)
    instance, fold = typical_folds(networks, x, y, clusters=2)
    steepest, aligned = best_directions(networks, x, y, instance, fold)

    def sizes(direction: torch.Tensor) -> torch.Tensor:
        grown = networks.with_unit(direction, fold)
        outgoing = grown.W.clone().requires_grad_()
        logits = ReluNetworks(grown.A, grown.a, outgoing, grown.c).forward(x)[2]
        total = sum(F.cross_entropy(one.T, y) for one in logits)
        return torch.autograd.grad(total, outgoing)[0][:, :, -1].norm(dim=1)

    angles = torch.linspace(0, 6.2, 40)
    around = torch.stack([sizes(torch.tensor([[a.cos(), a.sin()]]).expand(4, 2)) for a in angles])
    assert bool((sizes(steepest) >= around.amax(0) * 0.99).all())
    assert bool((sizes(aligned) >= sizes(steepest) * 0.499).all())


def test_folding_finds_a_boundary_although_most_instances_see_none() -> None:
    """Both units are silent for nearly all points, where the network is constant: the others are typical."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([[0.0, 1.0], [0.0, 1.1]])
    model[0].bias.data = torch.tensor([-1.2, -1.2])
    _, x, y = _relu_networks(1, 2)
    assert int((x[:, 1] > 1.2).sum()) < 10
    report = grow(model, [(x, y)], _loss_fn, grower=Folding(clusters=2), strategy=TopK(count=1))
    assert report.widths_after == {"0": 3}


def test_claims_follow_the_results() -> None:
    """With S2D's and S3D's results exchanged, the claims about them turn."""
    rbf = importlib.import_module("rbf")
    low, high = torch.full((4, 1), 1e-4), torch.full((4, 1), 0.5)

    def runs(**finals: torch.Tensor) -> dict[str, object]:
        names = ["S2D", "S3D m=2 c=3", "S3D m=3 c=3", "S3D m=4 c=3", "random split", "new initialisation",
                 "gradient boosting", "from scratch", "best of 100 new", "best new, trial", "Mixed",
                 "Mixed, trial"]  # fmt: skip
        values = {name: finals.get(name.split()[0].strip(","), torch.full((4, 1), 1e-3)) for name in names}
        none = torch.zeros(4, dtype=torch.bool)
        return {name: rbf.Run([], v, v, v[:, 0], none) for name, v in values.items()}

    def verdicts(found: dict[str, object]) -> list[bool]:
        power = torch.ones(4)
        both = [*rbf_claims.of_methods(found, power), *rbf_claims.of_mixed(found, power)]
        return [claim.holds for claim in both]

    assert verdicts(runs(S2D=high, S3D=low, Mixed=low)) == [False, True, True, True, True, True, True, True]
    assert verdicts(runs(S2D=low, S3D=high, Mixed=high)) == [
        True,
        False,
        False,
        True,
        False,
        False,
        False,
        False,
    ]


def test_a_network_that_ends_high_is_given_steps_that_do_not_raise_its_loss() -> None:
    """Before it counts as stuck: gradient descent at a fixed rate may just not settle."""
    rbf, networks = importlib.import_module("rbf"), importlib.import_module("toy.networks")
    setting = rbf.Setting(seeds=6, iterations=60, step=0.05, candidates=5, trial=1)
    points, rule = rbf.targets(setting)
    moves = {name: rbf.methods(setting)[name] for name in ("S2D", "new initialisation")}
    bound, released = rbf.BOUND * rbf.variances(points), 0
    for run in rbf.grow(moves, setting, points, rule).values():
        more = networks.descend(run.stages[-1], rule, 60, rbf.RATE, settle=True)
        high = run.final > bound
        assert bool((run.lowest[high] <= more.lowest[high]).all())
        assert bool((run.lowest[~high] <= bound[~high]).all())
        released += int((high & ~run.stuck(rbf.variances(points))).sum())
    assert released  # some come below the bound


def test_a_network_is_stuck_only_if_its_loss_stays_high() -> None:
    """Low at the end; high throughout; high at the end but not always; and with a loss that is no number."""
    rbf = importlib.import_module("rbf")
    power = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 100.0])
    final = torch.tensor([0.01, 0.9, 0.9, torch.nan, torch.nan, 0.9])
    lowest = torch.tensor([0.01, 0.06, 0.04, 0.06, 0.04, 0.9])
    run = rbf.Run([], final[:, None], final[:, None], lowest, torch.zeros(6, dtype=torch.bool))
    assert run.stuck(power).tolist() == [False, True, False, True, False, False]
    assert run.unsettled(power).tolist() == [False, False, True, False, True, False]


def test_mixed_is_judged_by_whether_it_stays_where_another_does_not() -> None:
    """Unsettled is not caught; staying high where another method only passes by below the bound is."""
    rbf = importlib.import_module("rbf")
    power, none = torch.ones(1), torch.zeros(1, dtype=torch.bool)

    def caught(mixed: float, other: float) -> bool:
        lows = dict.fromkeys(["S2D", "best of 100 new"], 0.5) | {"random split": other, "Mixed": mixed}
        lows["Mixed, trial"] = 0.5
        high = torch.full((1, 1), 0.5)
        runs = {name: rbf.Run([], high, high, torch.tensor([low]), none) for name, low in lows.items()}
        return not rbf_claims.of_mixed(runs, power)[1].holds

    assert caught(mixed=0.5, other=0.01)
    assert not caught(mixed=0.01, other=0.5)
    assert not caught(mixed=0.5, other=0.5)


def test_tables_and_claims_read_well() -> None:
    """Columns are aligned; a claim says whether it holds."""
    assert table(["a", "bb"], [["long", "1"]]) == "a     bb\n----  --\nlong   1"
    assert str(Claim("paper", "it falls", False, "it rose")).startswith(
        "DISAGREES  paper: it falls. Here: it"
    )


@pytest.mark.parametrize(
    ("name", "figures", "words"),
    [
        ("rbf", 4, ["S3D m=2 c=3", "gradient boosting", "Mixed", "S2D, figure 1d", "1000 points"]),
        ("herding", 2, ["optimal split, rate 0.1", "herding, rate 0.01", "S2D, figure 9"]),
        ("folding", 2, ["random 2-3-2", "towards the instance", "360 against 65", "the same unit"]),
    ],
)
def test_the_example_runs(
    name: str, figures: int, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table, claims and figures; the settings are too small for any result."""
    threads = torch.get_num_threads()
    try:
        result = importlib.import_module(name).main(["--fast", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert result
    assert all(word in printed for word in words)
    assert printed.count("agrees ") + printed.count("DISAGREES ") > 4
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == figures
    assert all(picture.stat().st_size > 5000 for picture in pictures)
