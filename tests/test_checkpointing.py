"""Activation checkpoints run a part of a network again in the backward pass; measuring must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_split import TopK, grow
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class Net(nn.Module):
    """Checkpoints its first half in a given manner."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh())
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.how(self.first, x))


HOW: dict[str, Any] = {
    "plain": lambda part, x: part(x),
    "not reentrant": lambda part, x: checkpoint(part, x, use_reentrant=False),
    "reentrant": lambda part, x: checkpoint(part, x.requires_grad_(), use_reentrant=True),
    "sequential": lambda part, x: checkpoint_sequential(part, 2, x, use_reentrant=False),
}


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0].clone()), batch[1])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("how", list(HOW)[1:])
def test_a_checkpointed_network_grows_as_the_plain_one(how: str) -> None:
    """The same neurons, the same gains, the same weights; and checkpoints work as before afterwards."""
    batches = [(torch.randn(16, 6), torch.arange(16) % 3) for _ in range(2)]
    grown = {}
    for name in ("plain", how):
        torch.manual_seed(1)
        model = Net(HOW[name])
        report = grow(model, batches, _loss, strategy=TopK(count=3))
        state = {n: t.clone() for n, t in model.state_dict().items()}
        _loss(model, batches[0]).backward()  # which runs BatchNorm twice under a checkpoint
        grown[name] = report.predicted_gain, state, [p.grad for p in model.parameters()]
    torch.testing.assert_close(grown[how], grown["plain"], rtol=1e-12, atol=1e-12)
    assert torch.utils.checkpoint.CheckpointFunction.__name__ == "CheckpointFunction"
