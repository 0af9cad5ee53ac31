"""Which neurons are tried together."""

from __future__ import annotations

import math

import pytest
import torch
from lightning_split import trace, trials, verification
from torch import Tensor, nn


def _mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU()),
        *(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2)),
    )


def test_portions_bound_the_copied_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group is tried once; the weights that one portion copies are a share of all, or one group's."""
    model = _mlp()
    arch = trace(model, torch.randn(3, 4))
    assert trials.portions(model, arch, 1.0) == [arch.groups]  # small enough for one pass
    monkeypatch.setattr(trials, "_LARGE_WEIGHTS", 1)
    assert trials.portions(model, arch, math.inf) == [arch.groups]  # passes are dear
    portions = trials.portions(model, arch, 1.0)
    # The first two groups share the large matrix, and with it would copy 0.99 of all weights.
    assert [[g.name for g in p] for p in portions] == [["0"], ["2", "4"]]


class Mean(nn.Module):
    """The mean over the inputs of a layer that takes a sum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.sum = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(x / x.shape[-1])


@pytest.mark.parametrize("place", [2, 4, 6])
def test_each_portion_is_tried(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that only values show is found whichever portion it is in."""
    monkeypatch.setattr(trials, "_LARGE_WEIGHTS", 1)
    model = _mlp()
    model[place] = Mean(model[place].in_features, model[place].out_features)
    arch = trace(model, torch.randn(3, 4))
    assert {u.width for u in arch.unsplittable if "same values" in u.reason} == {model[place].sum.in_features}
    assert len(arch.groups) == 2


class Shuffled(nn.Module):
    """Two groups of channels are read across each other; of two channels, each is a group."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, channels), nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h.unflatten(1, (2, -1)).transpose(1, 2).flatten(1))


def test_one_neuron_more_shows_how_many_the_code_has_in_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without values: two more, or twice as many, could be split in two again."""
    monkeypatch.setattr(verification, "_MAX_MACS", -1)
    arch = trace(Shuffled(2), torch.randn(4, 3))
    assert "Provided sizes [2, -1]" in {u.name: u.reason for u in arch.unsplittable}["first"]
    assert trace(Shuffled(6), torch.randn(4, 3)).widths == {"first": 3}


class OverOne(nn.Module):
    """A softmax over neurons, of which there may be one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x).softmax(1))


def test_a_single_neuron_is_not_split_where_values_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """An axis of length one does not tell what an operator does along it."""
    assert not trace(OverOne(1), torch.randn(4, 3)).groups
    monkeypatch.setattr(verification, "_MAX_MACS", -1)
    for width, why in ((1, "of which there is one"), (2, "softmax normalises over the neurons")):
        arch = trace(OverOne(width), torch.randn(4, 3))
        assert not arch.groups
        assert why in {u.name: u.reason for u in arch.unsplittable}["hidden"]
