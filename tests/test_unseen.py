"""Modules written to try the tracer after it was built: each of them once met a mistake of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_split import TopK, grow, split_neurons, trace, verification
from torch import Tensor, nn
from torchvision.ops import roi_align

from exactness import assert_splits_exactly, outputs, randomise, splits


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
        self.one, self.other = nn.GRU(4, 7, batch_first=True), nn.LSTM(4, 6, batch_first=True, proj_size=3)
        self.left, self.right, self.gate = nn.Linear(7, 8), nn.Linear(3, 8), nn.Linear(10, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, p = self.one(x[..., :4])[1][-1], self.other(x[..., 4:])[0][:, -1]
        z = torch.sigmoid(self.gate(torch.cat([h, p], -1)))
        return self.head(z * torch.tanh(self.left(h)) + (1 - z) * torch.tanh(self.right(p)))


def test_a_refused_layer_runs_as_it_is() -> None:
    """Trial splits and measurements run a recurrent layer with projections by its own forward pass."""
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, dtype=torch.float64)
    model = _randomised(TwoModes(), x)
    arch = assert_splits_exactly(model, x)
    assert {g.name: g.width for g in arch.groups} == {"one": 7, "gate": 8}
    assert not arch.note
    assert "proj_size" in {u.name: u.reason for u in arch.unsplittable}["other"]
    report = grow(model, [x, x], lambda m, batch: m(batch).square().mean(), strategy=TopK(count=2))
    assert report.splits
    assert not trace(model, x).note


class OverTime(nn.Module):
    """Applies a layer to the other axis."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class Forecaster(nn.Module):
    """Trend and rest of a sequence of features are carried on by a linear map of its steps each."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.smooth = nn.GRU(4, 7, batch_first=True), nn.AvgPool1d(3, 1, 1)
        self.trend, self.rest = OverTime(nn.Linear(8, 5)), OverTime(nn.Linear(8, 5, bias=False))
        self.head = nn.Sequential(nn.GELU(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)[0]
        trend = self.smooth(h.transpose(1, 2)).transpose(1, 2)
        return self.head(self.trend(trend) + self.rest(h - trend))


class SpatialGate(nn.Module):
    """One half of the channels gates the other, after a mixture of positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(positions, positions, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, -1)
        return u * self.mix(v)


ROWS = [nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 5, 3), nn.Linear(2, 3), nn.SiLU(), nn.Conv2d(5, 2, 1)]
MIX = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 8))
POSITIONAL = {
    "forecaster": (Forecaster(), {"encode": 7}, {"trend.layer": 5, "rest.layer": 5}),
    "gate": (
        nn.Sequential(nn.Linear(4, 12), nn.GELU(), SpatialGate(8), nn.Linear(6, 2)),
        {"0": 6},
        {"2.mix": 8},
    ),
    "rows": (nn.Sequential(*ROWS), {"1": 5}, {"2": 3}),
    # Here the layers of positions have a hidden layer of their own, which is what grows.
    "mixer": (nn.Sequential(nn.Linear(4, 6), OverTime(MIX), nn.Linear(6, 2)), {"1.layer.0": 5}, {}),
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_layers_of_positions_keep_the_neurons_of_others(name: str) -> None:
    """A layer that mixes positions, alike for all neurons, does not keep them from being split."""
    torch.manual_seed(0)
    model, groups, positions = POSITIONAL[name]
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    arch = assert_splits_exactly(_randomised(model, x), x)
    assert {g.name: g.width for g in arch.groups} == groups
    assert {u.name: u.width for u in arch.unsplittable if "positions" in u.reason} == positions
    report = grow(model, [x, x], lambda m, batch: m(batch).square().mean(), strategy=TopK(count=1))
    assert report.loss_after < report.loss_before


class Detector(nn.Module):
    """Classifies what a pooled map shows in the boxes that are found in it, of which there may be none."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.first, self.map = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.scores, self.hidden, self.head = nn.Conv2d(5, 1, 1), nn.Linear(5 * 4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.map(F.silu(self.first(x))))
        found = []
        for scores in self.scores(h).detach():
            y, x0 = torch.where(scores[0] > self.threshold)
            corners = torch.stack([x0, y, x0 + 3, y + 2], -1).to(h)
            found.append(corners[:6])
        index = torch.cat([torch.full((len(b), 1), float(i)) for i, b in enumerate(found)]).to(h)
        boxes = torch.cat([index, torch.cat(found)], -1)
        pooled = roi_align(h, boxes, (2, 2), sampling_ratio=2)
        return self.head(torch.tanh(self.hidden(pooled.flatten(1))))


def test_boxes_that_are_pooled() -> None:
    """Pooling in boxes treats every channel by itself."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    model = _randomised(Detector(0.0), x)
    arch = assert_splits_exactly(model, x)
    assert {g.name: g.width for g in arch.groups} == {"first": 4, "map": 5, "hidden": 6}
    report = grow(model, [x, x], lambda m, batch: m(batch).square().mean(), strategy=TopK(count=2))
    assert report.loss_after < report.loss_before


def test_no_boxes_are_found() -> None:
    """Nothing but empty tensors is joined; what no sample reaches is left alone, with the reason."""
    arch = trace(Detector(1e9), torch.randn(2, 1, 8, 8))
    assert "sends no sample" in {u.name: u.reason for u in arch.unsplittable}["hidden"]


class SentToExperts(nn.Module):
    """What an expert makes is added to zeros that are as wide as what was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(3, 5), nn.Linear(5, 2)
        self.experts, self.out = nn.ModuleList(nn.Linear(5, 5) for _ in range(2)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        chosen, y = self.router(h).argmax(-1), torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            rows = torch.where(chosen == e)[0]
            y = y.index_add(0, rows, expert(h[rows]))
        return self.out(torch.tanh(y))


@pytest.mark.usefixtures("double")
def test_zeros_as_wide_as_some_neurons_make_others_as_wide() -> None:
    """The experts' outputs grow only together with what they read."""
    model, x = SentToExperts(), torch.randn(12, 3)
    randomise(model, x)
    arch = assert_splits_exactly(model, x, rounds=2)
    assert arch.widths == {"first": 5}
    assert arch.groups[0].producers == ("first", "experts.0", "experts.1")


class SharedHeads(nn.Module):
    """Attention whose number of heads is left open, with several queries to a head of keys and values."""

    def __init__(self, width: int, queries: int, heads: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.q, self.o = nn.Linear(width, queries * size), nn.Linear(queries * size, width)
        self.k, self.v = nn.Linear(width, heads * size), nn.Linear(width, heads * size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def test_a_head_of_keys_and_values_grows_with_its_queries() -> None:
    """Llama and its kin: a neuron is a head with all queries that it serves, so that the ratio stays."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    model = _randomised(nn.Sequential(nn.Linear(6, 8), SharedHeads(8, 4, 2, 3), nn.Linear(8, 2)), x)
    arch = assert_splits_exactly(model, x, rounds=2)
    group = next(g for g in arch.groups if "1.k" in g.producers)
    assert (group.width, group.dim) == (2, (2 + 1 + 1) * 3 * 9)
    assert group.consumers == ("1.o",)


class Sinusoids(nn.Embedding):
    """Marian's table of positions: an embedding that is asked for a shape."""

    def forward(self, shape: torch.Size) -> Tensor:  # type: ignore[override]
        return super().forward(torch.arange(shape[1]))


def test_an_embedding_that_reads_no_tensor_is_refused_and_its_neighbours_grow() -> None:
    """What it makes is added to the stream, which therefore stays; what lies behind it grows."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.positions = nn.Linear(3, 6), Sinusoids(5, 6)
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.b(torch.tanh(self.a(h + self.positions(h.shape))))

    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    arch = assert_splits_exactly(_randomised(Encoder(), x), x)
    assert "a" in arch.widths, str(arch)


class Joined(nn.Module):
    """Joins six channels and two, and normalises them four by four."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv1d(4, 6, 1), nn.Conv1d(4, 2, 1)
        self.norm, self.last = nn.GroupNorm(2, 8), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.cat([F.silu(self.one(x)), self.other(x)], 1)))


def test_a_normalisation_that_is_refused_was_called() -> None:
    """No note says that a layer was not called because nothing on it can grow."""
    arch = trace(Joined(), torch.randn(2, 4, 5))
    reasons = {u.name: u.reason for u in arch.unsplittable}
    assert not arch.groups
    assert "several neurons that do not lie side by side" in reasons["one"]
    assert not arch.note


class Steps(nn.Module):
    """Two residual sums, each normalised in groups of another size: both find the sizes of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.first = nn.Conv1d(4, 8, 1), nn.Conv1d(4, 8, 3, padding=1)
        self.fine, self.second = nn.GroupNorm(4, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.coarse, self.last = nn.GroupNorm(2, 8), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.skip(x) + self.first(x)
        return self.last(F.silu(self.coarse(self.second(F.silu(self.fine(h))) + h)))


class InTrainingOnly(Steps):
    """Its forward pass in eval mode lacks something."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise NotImplementedError("prediction needs more inputs")
        return super().forward(x)


def test_blocks_of_channels_reach_all_that_is_added_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four channels are one neuron, also in the layer whose sum was normalised before that was known."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    model = _randomised(Steps(), x)
    assert assert_splits_exactly(model, x, rounds=2).widths == {"skip": 2}
    monkeypatch.setattr(verification, "_MAX_MACS", -1)  # a network too large to compare values
    arch = assert_splits_exactly(model, x)
    assert arch.widths == {"skip": 2}
    assert arch.group("skip").producers == ("skip", "first", "second")


def test_blocks_of_channels_in_a_network_that_runs_in_training_mode_only() -> None:
    """Where the other mode's pass fails, that of this mode is done again."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    model = InTrainingOnly().double()
    (before,) = outputs(model, x, True)
    arch = trace(model, x)
    assert arch.widths == {"skip": 2}
    assert "compared sizes only" in arch.note
    split_neurons(model, splits(arch, np.random.default_rng(0), "ghosts"), arch=arch)
    torch.testing.assert_close(outputs(model, x, True)[0], before, rtol=0, atol=1e-12)


class Squeezed(nn.Module):
    """Squeeze and excite, as many channels for sixteen: here none."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, channels), nn.Linear(channels, 2)
        self.down, self.up = nn.Linear(channels, channels // 16), nn.Linear(channels // 16, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h * torch.sigmoid(self.up(F.relu(self.down(h)))))


def test_layers_without_neurons() -> None:
    """They make and read nothing, and what is beside them grows."""
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="zero-element"):
        model = Squeezed(5).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    arch = assert_splits_exactly(model, x, rounds=2)
    assert {g.name: (g.width, g.producers) for g in arch.groups} == {"first": (5, ("first", "up"))}
    report = grow(model, [x, x], lambda m, batch: m(batch).square().mean(), strategy=TopK(count=1))
    assert report.loss_after < report.loss_before


class Grouped(nn.Module):
    """A grouped convolution beside a normalisation of all channels at once, which are one neuron."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before, self.norm = before, nn.GroupNorm(1, 8)
        self.first, self.groups, self.last = (
            nn.Conv1d(3, 8, 1),
            nn.Conv1d(8, 8, 1, groups=2),
            nn.Conv1d(8, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.groups(self.norm(h).sin()) if self.before else self.norm(self.groups(h))
        return self.last(h.sin())


class LinearAttention(nn.Module):
    """Heads of queries, keys and values, and more of them by a grouped convolution; their number is open."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.groups = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 12, 1, groups=6)
        self.last = nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([(y := self.first(x)), self.groups(y)], 1)
        q, k, v = h.reshape(len(x), -1, 6, x.shape[-1]).mT.chunk(3, -1)
        return self.last((q.relu() @ (k.relu().mT @ v)).mT.reshape(len(x), -1, x.shape[-1]))


GROUPED = {
    "read": (Grouped(True), {"groups": 4}, "cuts channels apart that are one neuron"),
    "made": (Grouped(False), {"first": 4}, "do not lie side by side"),
    "heads": (LinearAttention(), {}, "do not lie side by side"),
}


@pytest.mark.parametrize("name", GROUPED)
def test_no_neuron_reaches_over_groups_of_a_convolution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offspring would have to stand in each group, but the block of channels is copied as one."""
    torch.manual_seed(0)
    monkeypatch.setattr(verification, "_MAX_MACS", -1)  # so that no trial of values finds it out
    model, widths, reason = GROUPED[name]
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    arch = assert_splits_exactly(_randomised(model, x), x)
    assert arch.widths == widths
    assert any(reason in u.reason for u in arch.unsplittable)
