"""Modules written to try the tracer after it was built: each of them once met a mistake of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning_split import TopK, grow, trace
from torch import Tensor, nn

from exactness import assert_splits_exactly, randomise


def _randomised(model: nn.Module, x: Tensor) -> nn.Module:
    model = model.double()
    randomise(model, x)
    return model


class Block(nn.Module):
    """Two convolutions behind normalised groups of channels, and a scale and shift from the side."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, inputs), nn.Conv1d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, outputs), nn.Conv1d(outputs, outputs, 3, padding=1)
        self.side = nn.Linear(side, 2 * outputs)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.side(F.silu(side))[:, :, None].chunk(2, 1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Denoiser(nn.Module):
    """A diffusion U-Net: the joined halves are normalised in larger groups than each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2, 6), nn.SiLU(), nn.Linear(6, 5))
        self.first = nn.Conv1d(4, 8, 3, padding=1)
        self.down, self.bottom = nn.Conv1d(8, 8, 3, 2, 1), Block(8, 12, 5)
        self.encode, self.decode = Block(8, 8, 5), Block(16, 8, 5)
        self.up = nn.ConvTranspose1d(12, 8, 4, 2, 1)
        self.last = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv1d(8, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        t = x.mean((1, 2))
        side = self.time(torch.stack([t.sin(), t.cos()], -1))
        a = self.encode(self.first(x), side)
        b = self.bottom(self.down(a), side)
        return self.last(self.decode(torch.cat([self.up(b), a], 1), side))


def test_normalised_groups_of_several_sizes() -> None:
    """A block of channels may be part of a larger one, in the second pass as in the first."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    model = _randomised(Denoiser(), x)
    arch = assert_splits_exactly(model, x)
    assert [u.name for u in arch.unsplittable] == ["last.2"]
    assert not arch.note
    assert next(g for g in arch.groups if g.name == "first").width == 1

    def loss_fn(m: nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(m(batch), batch)

    assert grow(model, [x, x], loss_fn, strategy=TopK(count=2)).splits


class TwoModes(nn.Module):
    """Two sequences, one read by a recurrent layer with projected states, which cannot grow."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.GRU(4, 7, 2, batch_first=True), nn.LSTM(4, 6, batch_first=True, proj_size=3)
        self.left, self.right, self.gate = nn.Linear(7, 8), nn.Linear(3, 8), nn.Linear(10, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, p = self.one(x[..., :4])[1][-1], self.other(x[..., 4:])[0][:, -1]
        z = torch.sigmoid(self.gate(torch.cat([h, p], -1)))
        return self.head(z * torch.tanh(self.left(h)) + (1 - z) * torch.tanh(self.right(p)))


def test_a_refused_layer_runs_as_it_is() -> None:
    """Trial splits and measurements run a recurrent layer with projections by its own forward pass."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    model = _randomised(TwoModes(), x)
    arch = assert_splits_exactly(model, x)
    assert {g.name: g.width for g in arch.groups} == {"one": 7, "gate": 8}
    assert not arch.note
    assert "proj_size" in {u.name: u.reason for u in arch.unsplittable}["other"]
    report = grow(model, [x, x], lambda m, batch: m(batch).square().mean(), strategy=TopK(count=2))
    assert report.splits
    assert not trace(model, x).note
