"""Step sizes: lengths, the search for one, and growths that follow it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_split import Absolute, Exact, LineSearch, Relative, SteepestSplitting, TopK, grow
from lightning_split.stepsize import StepSize, as_step_size
from torch import Tensor, nn

from networks import CASES, loss_of, randomised

pytestmark = pytest.mark.usefixtures("double")


def test_lengths() -> None:
    """Absolute: one ε. Relative: a fraction of each norm, of the mean norm where that is zero."""
    weights = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert Absolute(0.5).lengths(weights).tolist() == [0.5, 0.5, 0.5]
    assert Relative(0.5).lengths(weights).tolist() == [2.5, 1.0, 0.5]
    assert LineSearch(0.25).lengths(weights).tolist() == [0.25, 0.25, 0.25]


@given(best=st.floats(1e-4, 1e4), depth=st.floats(-1, 1), factor=st.floats(1.5, 6), passes=st.integers(1, 12))
def test_line_search_keeps_the_best_of_what_it_tried_and_never_a_worse_one(
    best: float, depth: float, factor: float, passes: int
) -> None:
    """A parabola in log ε of any depth, some of them above the loss without growth."""
    tried: dict[float, float] = {}

    def loss_at(ratio: float) -> float:
        tried[ratio] = 1 - depth + 0.1 * math.log(ratio / best) ** 2
        return tried[ratio]

    ratio, loss = LineSearch(factor=factor, max_passes=passes).ratio(loss_at, 1.0)
    assert len(tried) <= passes
    lowest = min(tried, key=tried.__getitem__)
    if tried[lowest] < 1:
        assert (ratio, loss) == (lowest, tried[lowest])
    else:
        assert (ratio, loss) == (0.0, 1.0)
    first = tried[1.0] < 1 or best < 1  # else it looks for the optimum on the wrong side
    if (
        first
        and depth > 0.2 * math.log(factor) ** 2
        and abs(math.log(best)) < (passes - 2) * math.log(factor)
    ):
        assert loss < 1  # the optimum lies within reach
        assert abs(math.log(ratio / best)) <= math.log(factor)


def test_line_search_takes_what_is_no_number_for_worse() -> None:
    """Losses beyond the range of floats end the search in that direction."""
    losses = {1.0: math.nan, 1 / 3: math.inf, 1 / 9: 0.5}
    ratio, loss = LineSearch(max_passes=3).ratio(lambda r: losses[min(losses, key=lambda k: abs(k - r))], 1.0)
    assert ratio == pytest.approx(1 / 9)
    assert loss == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Absolute(-1.0), "at least 0, got -1.0"),
        (lambda: Relative(math.inf), "at least 0, got inf"),
        (lambda: LineSearch(factor=1.0), "factor above 1, got 1.0"),
        (lambda: LineSearch(max_passes=0), "max_passes=0"),
        (lambda: LineSearch(start=LineSearch()), "lengths of its own"),
        (lambda: as_step_size("linesearch"), "\"line_search\" or a StepSize, got 'linesearch'"),
        (lambda: as_step_size(math.nan), "at least 0, got nan"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    """What is allowed, and what came."""
    with pytest.raises(ValueError, match=message):
        make()


def _problem() -> tuple[nn.Module, Tensor, Any]:
    torch.manual_seed(0)
    case = CASES["residual"]
    model, x = randomised(case.model()).eval(), case.inputs()
    return model, x, loss_of(torch.randn_like(model(x).detach()))


def _grown(step_size: float | str | StepSize) -> tuple[Any, nn.Module, Any, Tensor]:
    model, x, loss = _problem()
    report = grow(
        *(model, [x], loss),
        grower=SteepestSplitting(solver=Exact()),
        strategy=TopK(fraction=0.5),
        step_size=step_size,
        surrogate_beta=None,
    )
    return report, model, loss, x


def test_relative_steps_displace_each_neuron_by_a_fraction_of_its_norm() -> None:
    """The displacements have these lengths, and the prediction holds for them."""
    model = _problem()[0]
    report, *_ = _grown(Relative(0.02))
    for split in report.splits:
        group = report.architecture.group(split.group)
        theta = torch.cat(
            [
                model.get_submodule(b.module).get_parameter(b.tensor)[b.rows[split.neuron][0]].flatten()
                for b in group.theta
            ]
        )
        assert split.displacements.norm(dim=1).max() == pytest.approx(0.02 * float(theta.detach().norm()))
    assert report.measured_gain == pytest.approx(report.predicted_gain, rel=0.1)


def test_the_prediction_follows_the_step_that_line_search_found() -> None:
    """The grown network is the one whose loss was the lowest, and gains are those of its ε."""
    reference, *_ = _grown(1e-2)
    report, model, loss, x = _grown(LineSearch(start=1e-2, factor=2.0))
    assert report.loss_after < reference.loss_after < report.loss_before
    assert float(loss(model, x).detach()) == pytest.approx(report.loss_after, abs=1e-13)
    ratio = report.splits[0].displacements.norm() / reference.splits[0].displacements.norm()
    assert math.log2(ratio) == pytest.approx(round(math.log2(ratio)))
    assert ratio > 1
    assert report.predicted_gain == pytest.approx(reference.predicted_gain * float(ratio) ** 2)
    assert report.estimated_gain == pytest.approx(reference.estimated_gain * float(ratio) ** 2)


def test_nothing_grows_where_no_step_helps() -> None:
    """A loss that rises with every displacement: the network is untouched, and the report says why."""
    model, x, loss = _problem()
    before = copy.deepcopy(model.state_dict())
    tensors = [id(p) for p in model.parameters()]
    seed = model.stem.weight.detach().clone()

    def rising(m: nn.Module, b: Tensor) -> Tensor:
        moved = (m.stem.weight[:, None] - seed).square().flatten(2).sum(2).min(1).values.sum()
        return loss(m, b) + 1e6 * moved

    report = grow(model, [x], rising, step_size=LineSearch(max_passes=3), include=["stem"])
    assert report.splits == ()
    assert report.loss_after == report.loss_before
    assert report.predicted_gain == report.estimated_gain == 0
    assert report.cost_after == report.cost_before
    assert "found no step at which the loss falls" in str(report)
    assert [id(p) for p in model.parameters()] == tensors
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
