"""Operators between two layers: what is followed splits exactly, what is not is refused with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_split import trace
from lightning_split.tracing import trace_step
from torch import Tensor, nn

from exactness import assert_splits_exactly, deviation, randomise

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:index_reduce"),
]

Middle = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A function between a hidden layer and one that reads it; ``layers`` are within the function's reach."""

    def __init__(self, hidden: nn.Module, middle: Any, last: nn.Module, **layers: nn.Module) -> None:
        super().__init__()
        self.hidden, self.middle, self.last = hidden, middle, last
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.last(self.middle(h))


def on_vectors(middle: Any, width: int = 5, read: int | None = None) -> tuple[nn.Module, Tensor]:
    """Between linear layers on 7 samples."""
    model = Between(nn.Linear(3, width), middle, nn.Linear(width if read is None else read, 2))
    return model, torch.randn(7, 3)


def on_maps(middle: Any, width: int = 5, read: int | None = None) -> tuple[nn.Module, Tensor]:
    """Between convolutions on maps of 6 x 8."""
    model = Between(nn.Conv2d(3, width, 1), middle, nn.Conv2d(width if read is None else read, 2, 1))
    return model, torch.randn(2, 3, 6, 8)


def on_rows(middle: Any, width: int = 5, read: int | None = None) -> tuple[nn.Module, Tensor]:
    """Between linear layers on sequences of 6 positions."""
    model = Between(nn.Linear(3, width), middle, nn.Linear(width if read is None else read, 2))
    return model, torch.randn(2, 6, 3)


def _fixed(*shape: int) -> Tensor:
    """Values that are the same in every pass."""
    return torch.arange(float(torch.Size(shape).numel())).mul(1.7).cos().view(shape)


def _nodes(write: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Middle:
    """Messages of 7 nodes to 4 others; ``write(zeros, index, messages)``."""
    index = torch.tensor([0, 2, 1, 2, 3, 0, 0])
    return lambda h: write(h.new_zeros(4, h.shape[1]), index, torch.tanh(h))


def _statement(write: Callable[[Tensor, Tensor, Tensor], Any]) -> Middle:
    """The same with zeros from nowhere, and an in-place operator whose result nobody takes."""
    index = torch.tensor([0, 2, 1, 2, 3, 0, 0])

    def middle(h: Tensor) -> Tensor:
        out = torch.zeros(4, h.shape[1])
        write(out, index, torch.tanh(h))
        return out

    return middle


def _depthwise(h: Tensor) -> Tensor:
    """Products of two activations, channel by channel."""
    return (h @ h.cos().transpose(2, 3)).flatten(2).transpose(1, 2)


def _blur(h: Tensor) -> Tensor:
    return F.conv2d(h, torch.tensor([[1.0, 2.0], [3.0, 1.0]]).repeat(h.shape[1], 1, 1, 1), groups=h.shape[1])


def _blur_in_batch(h: Tensor) -> Tensor:
    b, c, *space = h.shape
    return F.conv2d(h.reshape(b * c, 1, *space), _fixed(1, 1, 3, 3)).unflatten(0, (b, c)).squeeze(2)


def _unpool(h: Tensor) -> Tensor:
    return F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2)


def _set(out: Tensor, index: Any, values: Any) -> Tensor:
    out[index] = values
    return out


def _attend(h: Tensor) -> Tensor:
    """Attention by hand of fixed, masked scores."""
    scores = torch.arange(36.0).view(6, 6).cos().masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ h


def _drop_by_hand(h: Tensor) -> Tensor:
    return h * torch.empty(h.shape).fill_(2.0) / h.new_full((h.shape[1],), 3.0)


def _add_to(total: Tensor, h: Tensor) -> Tensor:
    for scale in (1.0, 2.0):
        total += scale * torch.tanh(h)
    return total


FOLLOWED: dict[str, tuple[Callable[..., tuple[nn.Module, Tensor]], Any, list[int]]] = {}


def _follow(on: Callable[..., tuple[nn.Module, Tensor]], cases: dict[str, Any]) -> None:
    for name, case in cases.items():
        middle, *sizes = case if isinstance(case, tuple) else (case,)
        FOLLOWED[name] = (on, middle, sizes)


_follow(
    on_maps,
    {
        "layer norm over space": lambda h: F.layer_norm(h, [6, 8], _fixed(6, 8)),
        "pixel shuffle": (lambda h: F.pixel_shuffle(h, 2), 12, 3),
        "pixel unshuffle": (lambda h: F.pixel_unshuffle(h, 2), 3, 12),
        "channel shuffle": (lambda h: F.channel_shuffle(h, 3), 6),
        "channel shuffle module": (nn.ChannelShuffle(2), 6),
        "unfold": (lambda h: F.unfold(h, (2, 3)).unflatten(2, (5, 6)), 3, 18),
        "fold": (lambda h: F.fold(h.flatten(2)[..., :12], (6, 8), 2, stride=2), 12, 3),
        "max unpool": _unpool,
        "circular pad": lambda h: F.pad(h, (1, 2, 3, 0), mode="circular"),
        "circular pad of one side": lambda h: F.pad(h, (0, 2, 0, 0), mode="circular"),
        "fourier filter": lambda h: torch.fft.irfft2(torch.fft.rfft2(h) * _fixed(6, 5), s=(6, 8)),
        "fourier real": lambda h: torch.fft.fft2(h).real,
        "fourier imag": lambda h: torch.fft.fft(h).imag,
        "view as real": lambda h: torch.view_as_real(torch.fft.rfft(h)).flatten(3),
        "view as complex": lambda h: torch.view_as_complex(h.unflatten(3, (4, 2))).abs(),
        "grid sample": lambda h: F.grid_sample(h, _fixed(2, 4, 4, 2), align_corners=False),
        "affine grid": lambda h: F.grid_sample(
            h, F.affine_grid(_fixed(2, 2, 3), [2, 1, 4, 4], align_corners=False), align_corners=False
        ),
        "tensor unfold": lambda h: h.unfold(2, 3, 1).mean(-1),
        "repeat channels": (lambda h: h.repeat(1, 3, 1, 1), 4, 12),
        "tile space": lambda h: h.tile(2, 3),
        "repeat interleave channels": (lambda h: h.repeat_interleave(3, 1), 4, 12),
        "repeat interleave space": lambda h: h.repeat_interleave(2, 3),
        "roll and flip space": lambda h: h.roll((1, 2), (2, 3)).flip(3),
        "rot90": lambda h: h.rot90(1, (2, 3)),
        "fftshift": lambda h: torch.fft.fftshift(h, (2, 3)),
        "cumsum and cumprod": lambda h: h.cumsum(3) + torch.tanh(h).cumprod(2),
        "logcumsumexp": lambda h: h.logcumsumexp(2),
        "cummax": lambda h: h.cummax(3)[0] + h.cummin(2)[0],
        "topk": lambda h: h.flatten(2).topk(5)[0].unsqueeze(-1),
        "topk and gather": lambda h: (f := h.flatten(2)).gather(2, f.abs().topk(5)[1]).unsqueeze(-1),
        "sort": lambda h: h.sort(2, descending=True)[0],
        "stable sort": lambda h: h.sort(dim=3, stable=True)[0],
        "argsort as values": lambda h: h.argsort(2) * 0.1 + h,
        "msort of samples": lambda h: h.msort(),
        "kthvalue": lambda h: h.kthvalue(3, 3, keepdim=True)[0],
        "median": lambda h: h.median(2, keepdim=True)[0] + h.nanmedian(3, keepdim=True)[0],
        "mode": lambda h: h.round().mode(3, keepdim=True)[0],
        "quantile": lambda h: h.flatten(2).quantile(0.3, 2, keepdim=True).unsqueeze(-1),
        "aminmax": lambda h: (m := h.aminmax(dim=3, keepdim=True))[0] + 2 * m[1],
        "var and std": lambda h: h.var(3, correction=0, keepdim=True) + h.std((2, 3), keepdim=True),
        "count nonzero": lambda h: F.relu(h).count_nonzero(3).unsqueeze(-1) * 0.3 + h,
        "nanmean": lambda h: h.nanmean(2, keepdim=True),
        "normalize over space": lambda h: F.normalize(h.flatten(2), dim=2).unflatten(2, (6, 8)),
        "cosine similarity over space": lambda h: F.cosine_similarity(h, h.cos(), dim=3).unsqueeze(-1),
        "softmin": lambda h: F.softmin(h, 3) + torch._safe_softmax(h, 2),
        "tril": lambda h: h.tril() + h.triu(1) * 2,
        "diagonal": lambda h: h.diagonal(0, 2, 3).unsqueeze(-1),
        "blur pool": _blur,
        "blur pool expanded": lambda h: F.conv2d(
            h, _fixed(1, 1, 3, 3).expand(h.shape[1], -1, -1, -1), groups=h.shape[1]
        ),
        "blur pool in the batch": _blur_in_batch,
        "instance norm": lambda h: F.instance_norm(h) + h,
        "masked fill": lambda h: h.masked_fill(torch.ones(6, 8).triu(1).bool(), 0.5),
        "where of neurons": lambda h: torch.where(h > 0, h, torch.zeros_like(h)),
        "feature dropout off": lambda h: F.dropout2d(h, 0.5, training=False),
        "index space": lambda h: h[:, :, torch.tensor([3, 0, 3])],
        "index with a mask": lambda h: h[:, :, torch.ones(6, 8).triu().bool()].unsqueeze(-1),
        "write to space": lambda h: _set(h.clone(), (slice(None), slice(None), torch.tensor([1, 4])), 0.7),
        "buffer over space": lambda h: _set(
            torch.zeros(2, h.shape[1], 7, 8), (slice(None), slice(None), slice(1, None)), h
        ),
        "squeeze in place": lambda h: h.clone().unsqueeze_(2).squeeze_(2).transpose_(2, 3) * 2,
    },
)
_follow(
    on_vectors,
    {
        "index_add": _nodes(lambda z, i, m: z.index_add(0, i, m)),
        "index_add_": _nodes(lambda z, i, m: z.index_add_(0, i, m)),
        "index_add_ statement": _statement(lambda z, i, m: z.index_add_(0, i, m)),
        "index_copy": _nodes(lambda z, i, m: z.index_copy(0, i[:5], m[:5])),
        "index_reduce": _nodes(lambda z, i, m: z.index_reduce(0, i, m, "amax")),
        "index_fill": lambda h: h.index_fill(0, torch.tensor([1, 2]), 0.5),
        "scatter": _nodes(lambda z, i, m: z.scatter(0, i[1:5, None].expand(-1, m.shape[1]), m[:4])),
        "scatter_add": _nodes(lambda z, i, m: z.scatter_add(0, i[:, None].expand_as(m), m)),
        "scatter_add_ statement": _statement(lambda z, i, m: z.scatter_add_(0, i[:, None].expand_as(m), m)),
        "scatter by a repeated index": _nodes(
            lambda z, i, m: z.scatter_reduce(0, i[:, None].repeat(1, m.shape[1]), m, "mean")
        ),
        "gather samples": lambda h: h.gather(0, torch.tensor([[3], [1]]).expand(-1, h.shape[1])),
        "index_put": _nodes(lambda z, i, m: z.index_put((i,), m, accumulate=True)),
        "setitem": _nodes(lambda z, i, m: _set(z, i[1:5], m[:4])),
        "setitem statement": _statement(lambda z, i, m: _set(z, i[1:5], m[:4])),
        "setitem by mask": lambda h: _set(
            torch.zeros(9, h.shape[1]), torch.tensor([True] * 3 + [False] * 2 + [True] * 4), torch.tanh(h)
        ),
        "sum into zeros": lambda h: _add_to(torch.zeros(7, h.shape[1]), h),
        "constants": _drop_by_hand,
        "zeros like": lambda h: h + torch.zeros_like(h) + torch.full_like(h, 2.0),
        "filled empty": lambda h: h * torch.empty_like(h).fill_(0.3),
        "ones": lambda h: h * (torch.ones(7, h.shape[1]) * 2 - 0.5),
        "expanded scalar": lambda h: h + torch.tensor(0.3).expand(h.shape[1]),
        "zeros before": lambda h: torch.cat([torch.zeros(2, h.shape[1]), h[:-1]]),
        "stacked with zeros": lambda h: torch.stack([torch.zeros(7, h.shape[1]), h]).sum(0),
        "zeros beside": (lambda h: torch.cat([h, h.new_zeros(7, 2)], 1), 5, 7),
        "lerp and addc": lambda h: torch.addcdiv(torch.addcmul(h, h, h.cos()), h, h.square() + 1).lerp(
            h, 0.3
        ),
        "untagged in place": lambda h: h.clone().abs_().copysign_(h.cos()).heaviside_(h.sin()) + h,
        "nan to num": lambda h: torch.hypot(h.nan_to_num(), torch.copysign(h, h.cos())),
        "bucketize": lambda h: torch.bucketize(h, torch.tensor([-1.0, 0.0, 1.0])) * 0.1 + h,
        "mse kept": lambda h: (
            F.mse_loss(h, h.cos(), reduction="none") + F.huber_loss(h, h.sin(), reduction="none")
        ),
        "dropout off": lambda h: F.dropout(h, 0.0, training=True),
    },
)
_follow(
    on_rows,
    {
        "attention of fixed scores": _attend,
        "attention mask": lambda h: F.scaled_dot_product_attention(
            _fixed(2, 6, 3), torch.ones(2, 6, 3), h, attn_mask=torch.ones(6, 6).tril().bool()
        ),
        "shared heads": (
            lambda h: (
                F.scaled_dot_product_attention(
                    torch.ones(2, 4, 6, 3).cumsum(2).sin(),
                    torch.ones(2, 2, 6, 3).cumsum(2),
                    h.unflatten(2, (2, -1)).transpose(1, 2),
                    enable_gqa=True,
                )
                .transpose(1, 2)
                .flatten(2)
            ),
            6,
            12,
        ),
        "depthwise products": lambda h: _depthwise(h.permute(0, 2, 1).unflatten(2, (2, 3))),
    },
)


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed_splits_exactly(name: str) -> None:
    """Every group splits exactly, in both modes, and the hidden layer is one of them."""
    on, middle, sizes = FOLLOWED[name]
    model, x = on(middle, *sizes)
    randomise(model, x)
    arch = assert_splits_exactly(model, x)
    assert "hidden" in arch.widths, str(arch)


def _two_views(h: Tensor) -> Tensor:
    buffer = torch.zeros(7, 2 * h.shape[1])
    buffer[:, : h.shape[1]] = h
    return buffer


def _beneath(h: Tensor) -> Tensor:
    buffer = torch.zeros(9, h.shape[1])
    buffer[:2] = torch.arange(5.0)[: h.shape[1]]
    buffer[2:] = h
    return buffer


def _noisy(h: Tensor) -> Tensor:
    return h + torch.empty_like(h).exponential_()


NOISE = "random numbers are drawn for each neuron"
REFUSED: dict[str, tuple[Any, Any, list[int], str]] = {
    "layer norm": (on_maps, lambda h: F.layer_norm(h, h.shape[1:]), [], "layer normalisation takes mean"),
    "rms norm": (on_vectors, lambda h: F.rms_norm(h, h.shape[1:]), [], "mean mixes|RMS normalisation"),
    "topk": (on_vectors, lambda h: h.topk(5, 1)[0], [], "topk is an operator that compares"),
    "median": (on_vectors, lambda h: h - h.median(1, keepdim=True)[0], [], "median mixes"),
    "cummax": (on_vectors, lambda h: h.cummax(1)[0], [], "cummax mixes"),
    "gather": (
        on_vectors,
        lambda h: h.gather(1, torch.tensor([[4, 3, 2, 1, 0]] * 7)),
        [],
        "gather picks or reorders",
    ),
    "gather a part": (on_vectors, lambda h: h.gather(0, torch.zeros(2, 4).long()), [5, 4], "gather cuts"),
    "index of each": (
        on_vectors,
        lambda h: h.gather(0, torch.arange(35).view(7, 5) % 7),
        [],
        "values that extend",
    ),
    "scatter on values": (
        on_vectors,
        lambda h: torch.arange(20.0).view(4, 5).index_add(0, torch.tensor([0, 1, 2, 3, 0, 1, 2]), h),
        [],
        "values that extend",
    ),
    "index add": (on_vectors, lambda h: h.index_add(1, torch.tensor([0]), h[:, :1]), [], "slice cuts|picks"),
    "index put": (on_vectors, lambda h: _set(h.clone(), (slice(None), 0), 0.0), [], "cuts or reorders"),
    "one neuron repeated": (on_vectors, lambda h: h.repeat(1, 3), [1, 3], "after growth"),
    "fourier": (on_vectors, lambda h: torch.fft.fft(h).real, [], "Fourier transform goes over the neurons"),
    "roll": (on_vectors, lambda h: h.roll(1, 1), [], "roll cuts or reorders"),
    "flat roll": (on_vectors, lambda h: h.roll(1), [], "roll cuts or reorders"),
    "cdist": (
        on_vectors,
        lambda h: torch.cdist(h, h.cos()),
        [5, 7],
        "distances .* are taken over the neurons",
    ),
    "normalize": (on_vectors, F.normalize, [], "linalg_vector_norm mixes the neurons"),
    "cosine": (on_vectors, lambda h: h * F.cosine_similarity(h, h.cos())[:, None], [], "mixes the neurons"),
    "loss": (on_vectors, lambda h: h + F.mse_loss(h, h.cos()), [], "mse_loss sums over the neurons"),
    "smooth loss": (on_vectors, lambda h: h + F.smooth_l1_loss(h, h.cos()), [], "smooth_l1_loss sums"),
    "bilinear": (on_vectors, lambda h: F.bilinear(h, h, torch.rand(5, 5, 5)), [], "bilinear form"),
    "affine grid": (
        on_vectors,
        lambda h: F.affine_grid(h.view(7, 2, 3), [7, 1, 2, 2], align_corners=False).flatten(1),
        [6, 8],
        "affine_grid makes coordinates",
    ),
    "equal": (on_vectors, lambda h: h * torch.equal(h, h.cos()), [], "read as a Python number"),
    "own filters": (
        on_maps,
        lambda h: F.conv2d(h, torch.arange(45.0).view(5, 1, 3, 3), groups=5),
        [],
        "convolution outside of a layer",
    ),
    "own filters of any width": (
        on_maps,
        lambda h: F.conv2d(h, torch.arange(9.0 * h.shape[1]).view(-1, 1, 3, 3), groups=h.shape[1]),
        [],
        "convolution outside of a layer",
    ),
    "outer product": (on_rows, lambda h: h.transpose(1, 2) @ h, [5, 5], "contracts the neurons"),
    "queries": (on_rows, lambda h: (h @ h.transpose(1, 2)).softmax(-1) @ h, [], "contracts the neurons"),
    "noise": (on_vectors, lambda h: h + torch.randn_like(h), [], NOISE),
    "noise of the shape": (on_vectors, lambda h: h + torch.randn(h.shape), [], NOISE),
    "uniform noise": (on_vectors, lambda h: h * torch.empty(h.shape).uniform_(), [], NOISE),
    "noise scaled first": (on_vectors, lambda h: h + 0.1 * torch.randn(7, h.shape[1]).abs(), [], NOISE),
    "integers": (on_vectors, lambda h: h + torch.randint_like(h, 3), [], NOISE),
    "normal": (on_vectors, lambda h: torch.normal(h, h.abs()), [], NOISE),
    "gumbel": (on_vectors, _noisy, [], NOISE),
    "stochastic neurons": (on_vectors, lambda h: torch.bernoulli(h.sigmoid()), [], NOISE),
    "rrelu": (on_vectors, lambda h: F.rrelu(h, training=True), [], NOISE),
    "fractional pooling": (on_maps, lambda h: F.fractional_max_pool2d(h, 2, 3), [], NOISE),
    "constants made other": (
        on_vectors,
        lambda h: h * _set(torch.ones(7, h.shape[1]), (slice(None), 0), 2.0),
        [],
        "values that extend",
    ),
    "cumulated ones": (
        on_vectors,
        lambda h: h * torch.ones(7, h.shape[1]).cumsum(1),
        [],
        "values that extend",
    ),
    "two views": (on_vectors, _two_views, [5, 10], "writes neurons into"),
    "values beneath": (on_vectors, _beneath, [], "writes neurons|values that extend"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_with_its_reason(name: str) -> None:
    """Along the axis of the neurons, or with random numbers for each of them."""
    on, middle, sizes, reason = REFUSED[name]
    model, x = on(middle, *sizes)
    randomise(model, x)
    arch = trace(model, x)
    reasons = {u.name: u.reason for u in arch.unsplittable}
    assert "hidden" not in arch.widths
    assert re.search(reason, reasons["hidden"]), reasons["hidden"]


def test_what_is_written_is_seen_through_views_made_before() -> None:
    """A view of a buffer, taken before neurons are added to the buffer, carries them too."""

    def middle(h: Tensor) -> Tensor:
        buffer = torch.zeros(7, h.shape[1])
        view = buffer[2:]
        buffer += torch.tanh(h)
        return buffer / view.abs().amax(1).sum()

    model, x = on_vectors(middle)
    arch = trace(model, x)
    assert "amax mixes the neurons" in {u.name: u.reason for u in arch.unsplittable}["hidden"]


def test_dropout_stays_followed() -> None:
    """Dropout draws for each neuron by design, also that of whole channels, and in training mode."""
    for model, x in (
        on_vectors(nn.Dropout(0.5)),
        on_maps(nn.Dropout2d(0.5)),
        on_maps(nn.AlphaDropout(0.5)),
        on_maps(nn.FeatureAlphaDropout(0.5)),
    ):
        assert "hidden" in trace(model.train(), x).widths


def test_noise_of_a_single_neuron_in_training_is_refused() -> None:
    """One neuron has no axis yet, and the trial that compares values runs in eval mode."""
    model, x = on_vectors(lambda h: h, 1)
    model.middle = _TrainingNoise()
    arch = trace(model, x)
    assert NOISE in {u.name: u.reason for u in arch.unsplittable}["hidden"]


@pytest.mark.parametrize("drop", [lambda h: h * torch.rand(len(h), 1).round(), lambda h: F.dropout(h, 0.5)])
def test_a_residual_stream_with_dropped_blocks_is_no_noise(drop: Any) -> None:
    """Random numbers have a part in the normalised stream; what stands in the way is what it is made of."""
    model, x = on_vectors(lambda h: h)
    model.middle = _DroppedStream(model.hidden.out_features, drop)
    refused = {u.name: u.reason for u in trace(model.train(), x).unsplittable}
    assert "layer normalisation" in refused["hidden"]
    assert "values that extend along the neurons but belong to none" in refused["middle.two"]


class _DroppedStream(nn.Module):
    def __init__(self, width: int, drop: Any) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.drop = drop

    def forward(self, h: Tensor) -> Tensor:
        h = F.layer_norm(h, h.shape[1:])
        h = h + self.drop(self.one(h))
        return h + self.drop(self.two(h))


class _TrainingNoise(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h + torch.randn(h.shape) if self.training else h


def test_a_loss_of_hidden_values_bounds_what_grows() -> None:
    """An auxiliary loss on activations ends there."""
    model, x = on_vectors(torch.tanh)

    def loss(m: Any, batch: Tensor) -> Tensor:
        return m(batch).square().mean() + F.mse_loss(m.hidden(batch), torch.zeros(7, 5))

    arch = trace_step(model, x, loss)
    assert "mse_loss sums over the neurons" in {u.name: u.reason for u in arch.unsplittable}["hidden"]


def test_the_width_of_a_half_says_how_long_channels_stay_in_it() -> None:
    """Why the streams of ShuffleNet's longer stages are left alone (docs, limitations), block by block."""
    for half in range(1, 40):
        stream = torch.arange(half)
        for block in range(1, 7):
            fresh = torch.full((half,), -1)  # what the block's convolutions make
            stream = F.channel_shuffle(torch.cat([stream, fresh])[None, :, None, None], 2).flatten()[:half]
            assert stream[stream >= 0].tolist() == list(range(-(-half // 2**block)))


@pytest.mark.parametrize("blocks", [2, 3, 4])
@pytest.mark.parametrize("half", [4, 6, 8, 12])
def test_streams_of_shuffled_blocks_grow_if_they_consist_of_bundles(half: int, blocks: int) -> None:
    """If two to the number of blocks less one divides the half; splits are exact then."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ends = nn.ModuleList(nn.Conv2d(3, half, 1) for _ in range(2))
            self.blocks = nn.ModuleList(nn.Conv2d(half, half, 1) for _ in range(blocks - 1))
            self.out = nn.Conv2d(2 * half, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.channel_shuffle(torch.cat([end(x) for end in self.ends], 1), 2)
            for block in self.blocks:
                one, two = x.chunk(2, 1)
                x = F.channel_shuffle(torch.cat([one, torch.tanh(block(two))], 1), 2)
            return self.out(x)

    model, x = Stage(), torch.randn(2, 3, 2, 2)
    assert bool(trace(model, x).groups) == (half % 2 ** (blocks - 1) == 0)
    assert deviation(model, x, 0) < 1e-12
