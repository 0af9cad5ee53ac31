"""Optimizers after a growth: new in the place of old, state with its neuron, and really training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import Residual, loss_of, randomised
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_split import split_neurons, trace
from lightning_split.optim import carry_state, check_trained
from lightning_split.surgery import Replacement, Split

pytestmark = pytest.mark.usefixtures("double")

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
}


def _step(optimizer: Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(y)(model, x)
        loss.backward()
        return loss

    optimizer.step(closure)


def _grown(
    make: Any, weights: tuple[float, float] = (0.5, 0.5), groups: Any = None
) -> tuple[nn.Module, Optimizer, dict[nn.Parameter, Replacement], dict[Any, Any], list[Any], Tensor, Tensor]:
    model = randomised(Residual()).eval()
    x, y = torch.randn(8, 1, 6, 6), torch.randn(8, 3)
    optimizer = make(groups(model) if groups else model.parameters())
    for _ in range(3):
        _step(optimizer, model, x, y)
    before = {p: dict(s) for p, s in optimizer.state.items()}
    places = [list(g["params"]) for g in optimizer.param_groups]
    arch = trace(model, x)
    splits = [Split(g.name, 1, weights, torch.zeros(2, g.dim)) for g in arch.groups]
    replaced = split_neurons(model, splits, arch=arch)
    return model, optimizer, replaced, before, places, x, y


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_parameters_stand_in_the_old_places_and_move(name: str) -> None:
    """Old ones are gone by identity, groups keep their order, and the next step moves every new one."""
    model, optimizer, replaced, _, places, x, y = _grown(OPTIMIZERS[name])
    carry_state(optimizer, replaced)
    expected = [[replaced[p].new if p in replaced else p for p in group] for group in places]
    now = [group["params"] for group in optimizer.param_groups]
    assert [[id(p) for p in g] for g in now] == [[id(p) for p in g] for g in expected]
    assert not any(p in optimizer.state for p in replaced)
    check_trained([optimizer], replaced, {id(p): 1 for p in replaced})
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        _step(optimizer, model, x, y)
    assert all(not torch.equal(p, values[n]) for n, p in model.named_parameters())


LINEAR = {"exp_avg", "momentum_buffer", "grad_avg", "prev"}
QUADRATIC = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Rprop"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (-1.0, 2.0)], ids=["positive", "signed"])
def test_moments_follow_their_neurons(name: str, weights: tuple[float, float]) -> None:
    """Entries of incoming weights are w_i (or w_i²) times the parent's, those of outgoing ones are the parent's."""
    model, optimizer, replaced, before, _, _, _ = _grown(OPTIMIZERS[name], weights)
    old_of = {id(r.new): p for p, r in replaced.items()}
    carry_state(optimizer, replaced)
    checked = 0
    for path, tiled in (("conv1.weight", False), ("out.weight", True), ("norm1.bias", False)):
        new = model.get_parameter(path)
        old = before[old_of[id(new)]]
        for key, value in optimizer.state[new].items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                assert value == old[key]
                continue
            power = 1.0 if key in LINEAR else 2.0 if key in QUADRATIC else 0.0
            factors = [abs(w) if key == "exp_inf" else w**power for w in weights]
            if tiled:  # a consumer: columns 1 and 2 are those of the parent
                torch.testing.assert_close(value[:, 1], old[key][:, 1])
                torch.testing.assert_close(value[:, 2], old[key][:, 1])
                torch.testing.assert_close(value[:, 3:], old[key][:, 2:])
            else:
                rows = value[:, [0, *range(2, value.shape[1])]] if path == "conv1.weight" else value
                # conv1's own columns grew too (its input is the split stream): compare the others
                kept = old[key] if value.ndim == 1 else old[key][:, [0, 1, 2, 3]]
                rows = value[:, [0, 1, 3, 4]] if value.ndim > 1 else value
                torch.testing.assert_close(rows[0], kept[0])
                torch.testing.assert_close(rows[1], kept[1] * factors[0])
                torch.testing.assert_close(rows[2], kept[1] * factors[1])
                torch.testing.assert_close(rows[3:], kept[2:])
            checked += 1
    assert checked >= 3


def test_transferred_momentum_is_that_of_a_network_that_was_wide_all_along() -> None:
    """SGD with momentum from zero: gradients of the grown network at ε = 0 are what the maps say, summed up.

    Two steps on the narrow network, growth, and the momentum equals that which the wide network would have
    gathered at the same points of the loss surface.
    """
    model, optimizer, replaced, before, _, _, _ = _grown(OPTIMIZERS["SGD"])
    carry_state(optimizer, replaced)
    new = model.get_parameter("head.weight")
    (old,) = [p for p, r in replaced.items() if r.new is new]
    buffer, expected = optimizer.state[new]["momentum_buffer"], before[old]["momentum_buffer"]
    maps = replaced[old].maps
    for axis, grew in sorted(maps.items()):
        expected = expected.index_select(axis, grew.index) * grew.scale.view([-1] + [1] * (1 - axis))
    torch.testing.assert_close(buffer, expected)
    assert sorted(maps) == [0, 1]


def test_reset_drops_the_state_of_what_grew_only() -> None:
    """mode="reset" starts grown parameters anew; the others keep their moments."""
    model, optimizer, replaced, before, _, _, _ = _grown(OPTIMIZERS["Adam"])
    carry_state(optimizer, replaced, "reset")
    assert all(r.new not in optimizer.state for r in replaced.values())
    kept = model.get_parameter("out.bias")
    assert torch.equal(optimizer.state[kept]["exp_avg"], before[kept]["exp_avg"])


def test_equal_values_are_not_identity() -> None:
    """A parameter that merely equals a replaced one stays where it is."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], 0.1)
    arch = trace(model, torch.randn(4, 2))
    bias = model[2].bias
    replaced = split_neurons(model, [Split("0", 0, (0.5, 0.5), torch.zeros(2, 3))], arch=arch)
    carry_state(optimizer, replaced)
    assert optimizer.param_groups[3]["params"][0] is bias
    assert len(optimizer.param_groups) == 6


def test_hyper_parameters_of_groups_stay() -> None:
    """Learning rates, decay and names of the groups are untouched, also where names are given."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        return [
            {"params": [(n, p) for n, p in named if "norm" in n], "lr": 0.5, "weight_decay": 0.0},
            {"params": [(n, p) for n, p in named if "norm" not in n], "lr": 0.25},
        ]

    _, optimizer, replaced, *_ = _grown(lambda p: torch.optim.AdamW(p, 0.1), groups=groups)
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    carry_state(optimizer, replaced)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    assert before[0]["param_names"][0] == "norm1.weight"


def test_unknown_optimizers_start_anew_with_a_warning() -> None:
    """Only torch's own layouts are transferred; another optimizer's state is reset, and it says so."""

    class Custom(torch.optim.SGD):
        pass

    _, optimizer, replaced, *_ = _grown(lambda p: Custom(p, 0.01, momentum=0.9))
    with pytest.warns(UserWarning, match="Custom state of 12 grown parameters starts anew"):
        carry_state(optimizer, replaced)
    assert not any(r.new in optimizer.state for r in replaced.values())


def test_parameters_left_out_are_noticed() -> None:
    """An optimizer that still holds old parameters is an error, not silence."""
    _, optimizer, replaced, *_ = _grown(OPTIMIZERS["SGD"])
    with pytest.raises(RuntimeError, match="12 grown parameters are not in the optimizers.*12 old ones"):
        check_trained([optimizer], replaced, {id(p): 1 for p in replaced})
