"""Grown state dicts into seed-sized modules, and nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning_split import TopK, enable_growth, fit_to_state_dict, grow, load_grown
from lightning_split.checkpoint import growth_enabled
from torch import nn

from networks import CASES, loss_of, randomised

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("name", CASES)
def test_a_seed_module_takes_the_shape_of_a_grown_one_and_back(name: str) -> None:
    """After fitting, a strict load gives the same function; the seed's state dict shrinks it again."""
    case = CASES[name]
    seed, x = randomised(case.model()).eval(), case.inputs()
    grown = copy.deepcopy(seed)
    for _ in range(3):
        grow(grown, [x], loss_of(torch.randn_like(grown(x).detach())), strategy=TopK(fraction=0.5))
    fresh = case.model().eval()
    resized = fit_to_state_dict(fresh, grown.state_dict())
    assert resized
    fresh.load_state_dict(grown.state_dict())
    torch.testing.assert_close(fresh(x), grown(x), rtol=0, atol=0)
    sizes = [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in grown.modules()]
    assert sizes == [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in fresh.modules()]
    fit_to_state_dict(fresh, seed.state_dict())
    fresh.load_state_dict(seed.state_dict())
    torch.testing.assert_close(fresh(x), seed(x), rtol=0, atol=0)


def test_a_wrong_checkpoint_still_fails_and_changes_nothing() -> None:
    """Tensors that disagree on a size, or other kernel sizes, are left for load_state_dict to refuse."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    before = [id(p) for p in model.parameters()]
    other = nn.Sequential(nn.Conv2d(1, 5, 5), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)).state_dict()
    other["1.running_mean"] = torch.zeros(3)
    other["3.bias"] = torch.zeros(7)
    assert fit_to_state_dict(model, other) == []
    assert [id(p) for p in model.parameters()] == before
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
        enable_growth(self)


def test_enable_growth_makes_plain_loading_work() -> None:
    """Also inside another module, after pickling, and when called twice."""
    grown = Net()
    x = torch.randn(16, 3)
    grow(grown.inner, [x], loss_of(torch.randn(16, 1)), strategy=TopK(count=1))
    outer = nn.ModuleDict({"a": Net(), "b": nn.Linear(2, 2)})
    outer.load_state_dict({**{f"a.{k}": v for k, v in grown.state_dict().items()}, **{
        f"b.{k}": v for k, v in outer["b"].state_dict().items()
    }})  # fmt: skip
    torch.testing.assert_close(outer["a"].inner(x), grown.inner(x), rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(Net()))
    again.load_state_dict(grown.state_dict())
    enable_growth(again)
    assert len(again._load_state_dict_pre_hooks) == 1
    assert growth_enabled(again)
    assert not growth_enabled(nn.Linear(2, 2))


def test_load_grown_asks_for_a_lightning_module() -> None:
    """A plain module class gets a sentence with the way to go."""
    with pytest.raises(TypeError, match="fit_to_state_dict"):
        load_grown(Net, "nowhere.ckpt")
