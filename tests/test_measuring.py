"""undisturbed: whatever a forward pass writes to, it is as it was afterwards."""

from __future__ import annotations

import random
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from lightning_split.measuring import copied, isolated_rng, tensors_in, undisturbed
from torch import Tensor, nn


class Writer(nn.Module):
    """Writes to everything that it owns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.embed = nn.Embedding(5, 3, max_norm=0.1)
        self.count, self.name = 0, "a"
        self.total, self.array = torch.zeros(2), np.zeros(2)
        self.nested = {"list": [1, {"deep": [2]}], "set": {3}}
        self.recent: deque[int] = deque([1, 2], maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.name += "b"
        self.total += 1
        self.array += 1
        self.nested["list"][1]["deep"].append(9)
        self.nested["new"] = 5
        self.nested["set"].add(4)
        self.recent.append(7)
        self.fresh = x
        self.norm.bias.grad = torch.ones(3)
        random.random(), np.random.rand(), torch.rand(1)
        return self.norm(x) + self.embed(torch.arange(4))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_that_was_written_is_taken_back(fails: bool) -> None:
    """Buffers, weights, gradients, nested attributes, modes and random states; also after an error."""
    module = Writer().train()
    nested, recent, total = module.nested, module.recent, module.total
    state = {k: v.clone() for k, v in module.state_dict().items()}
    ids = [id(t) for t in (*module.parameters(), *module.buffers())]
    rng = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    with pytest.raises(ZeroDivisionError) if fails else undisturbed(module, train=True, seed=3):
        if fails:
            with undisturbed(module, train=False):
                module(torch.randn(4, 3))
                _ = 1 / 0
        module(torch.randn(4, 3))
        assert module.count == 1
    assert (module.count, module.name, module.total.tolist(), module.array.tolist()) == (
        0,
        "a",
        [0, 0],
        [0, 0],
    )
    assert module.nested == {"list": [1, {"deep": [2]}], "set": {3}}
    assert (module.nested is nested, module.recent is recent, module.total is total) == (True, True, True)
    assert list(module.recent) == [1, 2]
    assert not hasattr(module, "fresh")
    assert module.norm.bias.grad is None
    assert module.training
    assert module.norm.training
    assert ids == [id(t) for t in (*module.parameters(), *module.buffers())]
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert (str(np.random.get_state()), random.getstate()) == rng[1:]


def test_a_module_that_stays_frozen_is_asked_through_its_own_train() -> None:
    """Modules that override train() to keep BatchNorm in eval mode are run in that mode."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

    module = Frozen()
    with undisturbed(module, train=True):
        assert (module.training, module.norm.training) == (True, False)


def test_seeds_repeat_and_do_not_leak() -> None:
    """The same seed gives the same numbers of all three generators, and none of them moves outside."""
    draws = []
    for _ in range(2):
        with isolated_rng(7):
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    outside = torch.get_rng_state()
    with isolated_rng(8):
        torch.rand(3)
    assert draws[0] == draws[1]
    assert torch.equal(torch.get_rng_state(), outside)


def test_tensors_are_found_in_any_batch() -> None:
    """Tuples, dicts, dataclasses and plain objects, in order."""
    from dataclasses import dataclass

    @dataclass
    class Item:
        x: Tensor
        label: str

    class Plain:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    assert [float(t) for t in tensors_in({"k": (Item(a, "text"), [b]), "z": Plain(c), "n": None})] == [
        0,
        1,
        2,
    ]


def test_copies_of_batches_are_whole_and_keep_what_is_the_same() -> None:
    """Nested containers and objects are new, a tensor in two places is one again, cycles end."""

    class Item:
        def __init__(self, x: torch.Tensor) -> None:
            self.x, self.itself = x, self

    x = torch.ones(2, requires_grad=True)
    batch = {"a": [x, (x, "text")], "item": Item(x), "own": OrderedDict(n=3)}
    new = copied(batch)
    assert new["a"][0] is new["a"][1][0] is new["item"].x
    assert new["a"][0] is not x
    assert new["a"][0].requires_grad
    assert new["a"][0].is_leaf
    assert (type(new["own"]), new["a"][1][1]) == (OrderedDict, "text")
    new["own"]["n"] = 4
    del new["a"][1:]
    assert (batch["own"]["n"], len(batch["a"])) == (3, 2)
    assert batch["item"].x is x
