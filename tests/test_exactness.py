"""Every group that trace calls splittable splits exactly: random networks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning_split import split_neurons, trace
from lightning_split.curvature import SplittingOperator
from lightning_split.surgery import Split
from torch import Tensor, nn

from exactness import assert_splits_exactly, depends_on_every_group, outputs, randomise

pytestmark = pytest.mark.usefixtures("double")

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


# random networks -----------------------------------------------------------------------------------


class Block(nn.Module):
    """A few layers and the function that connects them."""

    def __init__(self, fwd: Callable[[Any, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.fwd = fwd
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.fwd(self, x)


class Builder:
    """Draws sizes and activations; knows the number of channels and the space of the current map."""

    def __init__(self, dims: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.dims, self.channels = dims, self.width(2)
        self.space = [(6,), (4, 3), (3, 2, 4)][dims - 1]
        self.inputs = (4, self.channels, *self.space)

    def width(self, least: int = 1) -> int:
        return self.rng.randint(least, 4)

    def act(self) -> Callable[[Tensor], Tensor]:
        return self.rng.choice([torch.tanh, F.silu, F.gelu, F.softplus, F.mish])

    def conv(self, i: int, o: int, groups: int = 1) -> nn.Module:
        size = self.rng.choice([1, 3])
        bias = self.rng.random() < 0.7
        return CONV[self.dims - 1](i, o, size, padding=size // 2, groups=groups, bias=bias)

    def linear(self, i: int, o: int) -> nn.Module:
        return nn.Linear(i, o, bias=self.rng.random() < 0.7)

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(range(2, 2 + self.dims))

    def to(self, channels: int) -> int:
        self.channels = channels
        return channels


Make = Callable[[Builder], nn.Module]


def _conv(b: Builder) -> nn.Module:
    act = b.act()
    return Block(lambda s, x: act(s.a(x)), a=b.conv(b.channels, b.to(b.width())))


def _norm(b: Builder) -> nn.Module:
    act, c = b.act(), b.channels
    return Block(lambda s, x: act(s.n(s.a(x))), a=b.conv(c, b.to(b.width())), n=NORM[b.dims - 1](b.channels))


def _residual(b: Builder) -> nn.Module:
    act, c, inner = b.act(), b.channels, b.width()
    norm = NORM[b.dims - 1](c)
    return Block(lambda s, x: act(x + s.n(s.e(act(s.a(x))))), a=b.conv(c, inner), e=b.conv(inner, c), n=norm)


def _concat(b: Builder) -> nn.Module:
    act, c, more = b.act(), b.channels, b.width()
    b.to(c + more)
    return Block(lambda s, x: torch.cat([x, act(s.a(x))], 1), a=b.conv(c, more))


def _fork(b: Builder) -> nn.Module:
    act, c, left, right = b.act(), b.channels, b.width(), b.width()
    b.to(left + right)
    return Block(lambda s, x: torch.cat([act(s.a(x)), s.e(x)], 1), a=b.conv(c, left), e=b.conv(c, right))


def _depthwise(b: Builder) -> nn.Module:
    act, c = b.act(), b.channels
    return Block(lambda s, x: act(s.a(x)), a=b.conv(c, b.to(c * b.rng.randint(1, 2)), groups=c))


def _excite(b: Builder) -> nn.Module:
    c, inner, axes = b.channels, b.width(), b.axes
    return Block(
        lambda s, x: x * torch.sigmoid(s.e(torch.tanh(s.a(x.mean(axes, keepdim=True))))),
        a=b.conv(c, inner),
        e=b.conv(inner, c),
    )


def _gate(b: Builder) -> nn.Module:
    c, o = b.channels, b.to(b.width())
    return Block(lambda s, x: s.a(x) * torch.sigmoid(s.e(x)), a=b.conv(c, o), e=b.conv(c, o))


def _shared(b: Builder) -> nn.Module:
    act = b.act()
    return Block(lambda s, x: act(s.a(act(s.a(x)))), a=b.conv(b.channels, b.channels))


def _average(b: Builder) -> nn.Module:
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[b.dims - 1]
    return Block(lambda s, x: pool(x, 2, stride=1, padding=1) + 0.5)


def _prelu(b: Builder) -> nn.Module:
    return nn.PReLU(b.rng.choice([1, b.channels]))


def _maximum(b: Builder) -> nn.Module:
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[b.dims - 1]
    return pool(2, stride=1, padding=1)


def _instance(b: Builder) -> nn.Module:
    return INSTANCE[b.dims - 1](b.channels, affine=True)


def _transposed(b: Builder) -> nn.Module:
    act, c = b.act(), b.channels
    return Block(lambda s, x: act(s.a(x)), a=TRANSPOSED[b.dims - 1](c, b.to(b.width()), 2))


def _narrow(b: Builder) -> nn.Module:
    act, c = b.act(), b.channels
    return Block(lambda s, x: s.e(act(s.a(x))), a=b.conv(c, 1), e=b.conv(1, b.to(b.width())))


def _stack(b: Builder) -> nn.Module:
    act, c, o, where = b.act(), b.channels, b.to(b.width(2)), b.rng.choice([0, 1, -1])
    return Block(
        lambda s, x: torch.stack([act(s.a(x)), s.e(x)], where).mean(where), a=b.conv(c, o), e=b.conv(c, o)
    )


def _halves(b: Builder) -> nn.Module:
    # Of a single channel trace cannot tell halves of space from halves of channels, and refuses it.
    c = b.channels
    return Block(
        lambda s, x: torch.cat([2 * (y := s.a(x)).chunk(2, -1)[1], y.chunk(2, -1)[0]], -1),
        a=b.conv(c, b.to(b.width(2))),
    )


def _channels_last(b: Builder) -> nn.Module:
    act, c = b.act(), b.channels
    lin = b.linear(c, b.to(b.width()))
    return Block(lambda s, x: act(s.a(x.movedim(1, -1))).movedim(-1, 1), a=lin)


def _context(b: Builder) -> nn.Module:
    axes, c = b.axes, b.channels
    return Block(lambda s, x: x + s.a(x.mean(axes, keepdim=True)), a=b.conv(c, c))


def _crop(b: Builder) -> nn.Module:
    return Block(lambda s, x: F.pad(x, (2, 1), value=0.3)[..., 1:-1].flip(-1))


def _resize(b: Builder) -> nn.Module:
    return Block(lambda s, x: F.interpolate(x, scale_factor=2, mode="nearest")[..., ::2])


def _scale(b: Builder) -> nn.Module:
    return Block(lambda s, x: F.dropout(x * s.gain, 0.0, s.training), gain=nn.Parameter(torch.ones(())))


def _vectors(b: Builder) -> nn.Module:
    act, c = b.act(), b.channels
    shape = (-1, *[1] * b.dims)
    return Block(
        lambda s, x: x + s.scale.view(shape) * act(s.a(x) + torch.tanh(s.shift)) + s.state.view(1, *shape),
        a=b.conv(c, c),
        scale=nn.Parameter(torch.ones(c)),
        shift=nn.Parameter(torch.ones(c, *shape[1:])),
        state=nn.Parameter(torch.ones(c)),
    )


def _pick(b: Builder) -> nn.Module:
    return Block(lambda s, x: x[torch.tensor([2, 0, 1, 3])][..., torch.tensor([1, 0])])


def _glu(b: Builder) -> nn.Module:
    c, o = b.channels, b.to(b.width())
    if b.rng.random() < 0.5:
        return Block(lambda s, x: F.glu(s.a(x), 1), a=b.conv(c, 2 * o))
    return Block(lambda s, x: torch.tanh(s.a(x).chunk(2, 1)[0]) * s.a(x).chunk(2, 1)[1], a=b.conv(c, 2 * o))


def _grouped(b: Builder) -> nn.Module:
    act, c, groups = b.act(), b.channels, b.rng.choice([2, 3])
    inner = groups * b.width()
    grouped = b.conv(inner, b.to(groups * b.width()), groups)
    return Block(lambda s, x: act(s.e(act(s.a(x)))), a=b.conv(c, inner), e=grouped)


def _grouped_transposed(b: Builder) -> nn.Module:
    act, c, groups = b.act(), b.channels, b.rng.choice([2, 3])
    inner = groups * b.width()
    grouped = TRANSPOSED[b.dims - 1](inner, b.to(groups * b.width()), 2, groups=groups)
    return Block(lambda s, x: act(s.e(act(s.a(x)))), a=b.conv(c, inner), e=grouped)


def _group_norm(b: Builder) -> nn.Module:
    act, c, size = b.act(), b.channels, b.rng.choice([1, 2, 3])
    wide = size * b.width()
    return Block(
        lambda s, x: s.e(act(s.n(s.a(x)))),
        a=b.conv(c, wide),
        n=nn.GroupNorm(wide // size, wide),
        e=b.conv(wide, b.to(b.width())),
    )


def _shuffle(b: Builder) -> nn.Module:
    c, o = b.channels, b.to(2 * b.width())
    return Block(
        lambda s, x: (y := s.a(x)).unflatten(1, (2, -1)).transpose(1, 2).reshape(y.shape) * 1.5,
        a=b.conv(c, o),
    )


def _crelu(b: Builder) -> nn.Module:
    b.to(2 * b.channels)
    return Block(lambda s, x: torch.cat([F.softplus(x), F.softplus(-x)], 1))


def _spatial_gate(b: Builder) -> nn.Module:
    return Block(lambda s, x: x * torch.sigmoid(s.a(x)), a=b.conv(b.channels, 1))


def _repeat(b: Builder) -> nn.Module:
    c = b.to(2 * b.channels) // 2
    return Block(lambda s, x: x.repeat(1, 2, *[1] * (x.ndim - 2)) if c < 3 else x.repeat_interleave(2, 1))


def _layer_norm(b: Builder) -> nn.Module:
    return nn.GroupNorm(1, b.channels)


def _attended(b: Builder) -> nn.Module:
    c, o = b.channels, b.to(b.width())
    return Block(
        lambda s, x: (
            F.scaled_dot_product_attention(
                *(layer(x).flatten(2).transpose(1, 2) for layer in (s.q, s.k, s.v))
            )
            .transpose(1, 2)
            .reshape(len(x), -1, *x.shape[2:])
        ),
        q=CONV[b.dims - 1](c, 2, 1),
        k=CONV[b.dims - 1](c, 2, 1),
        v=CONV[b.dims - 1](c, o, 1),
    )


SMOOTH: dict[str, Make] = {
    f.__name__[1:]: f
    for f in (
        *(_conv, _norm, _residual, _concat, _fork, _depthwise, _excite, _gate, _shared, _average, _instance),
        *(_transposed, _narrow, _stack, _halves, _channels_last, _context, _crop, _resize, _scale, _pick),
        _vectors,
    )
}
PLAIN = SMOOTH | {f.__name__[1:]: f for f in (_prelu, _maximum)}
# Blocks that couple channels with each other, or refuse some of them, depending on what surrounds them.
TRICKY = {
    f.__name__[1:]: f
    for f in (
        _glu,
        _grouped,
        _grouped_transposed,
        _group_norm,
        _shuffle,
        _crelu,
        _spatial_gate,
        _repeat,
        _layer_norm,
        _attended,
    )
}
FLATTENED = ("flatten", "channels last", "mean", "linear over columns")
FLAT = ("linear", "norm", "residual", "concat", "gate", "shared", "prelu", "narrow", "unflatten")


def _flat_layer(b: Builder, name: str) -> nn.Module:
    """A block on vectors."""
    act, c = b.act(), b.channels
    if name == "residual":
        inner = b.width()
        return Block(lambda s, x: x + s.e(act(s.a(x))), a=b.linear(c, inner), e=b.linear(inner, c))
    if name == "gate":
        return Block(lambda s, x: act(s.a(x)) * x, a=b.linear(c, c))
    if name == "shared":
        return Block(lambda s, x: act(s.a(act(s.a(x)))), a=b.linear(c, c))
    if name == "prelu":
        return nn.PReLU(c)
    if name == "unflatten":
        return Block(lambda s, x: x.unsqueeze(-1).mul(2.0).squeeze(-1).unflatten(1, (-1, 1)).flatten(1))
    if name == "norm":
        return nn.Sequential(b.linear(c, b.to(b.width())), nn.BatchNorm1d(b.channels), nn.SiLU())
    if name == "concat":
        o = b.width()
        b.to(c + o)
        return Block(lambda s, x: torch.cat([act(s.a(x)), x], -1), a=b.linear(c, o))
    if name == "narrow":
        return nn.Sequential(b.linear(c, 1), nn.Tanh(), b.linear(1, b.to(b.width())))
    return Block(lambda s, x: act(s.a(x)), a=b.linear(c, b.to(b.width())))


def network(
    blocks: list[Make], flatten: str, flat: list[str], dims: int, seed: int
) -> tuple[nn.Module, Tensor]:
    """A random network of these blocks and an input for it."""
    torch.manual_seed(seed)
    b = Builder(dims, seed)
    layers = [_conv(b), *(make(b) for make in blocks)]
    if b.channels == 1 and flatten == "channels last":  # of one channel, blocks and columns look the same
        layers.append(CONV[dims - 1](1, b.to(2), 1))
    axes = b.axes
    x = torch.randn(b.inputs)
    with torch.no_grad():
        columns = nn.Sequential(*copy.deepcopy(layers)).eval()(x)[0, 0].numel()
    if flatten == "flatten":
        layers.append(nn.Flatten())
        b.to(b.channels * columns)
    elif flatten == "channels last":
        layers.append(Block(lambda s, x: x.movedim(1, -1).flatten(1)))
        b.to(b.channels * columns)
    elif flatten == "linear over columns":
        weight = torch.randn(columns, 3)
        layers.append(Block(lambda s, x: torch.tanh(x.flatten(2) @ weight).flatten(1)))
        b.to(3 * b.channels)
    else:
        layers.append(Block(lambda s, x: x.mean(axes)))
    if b.channels > 1:  # a block whose neurons own several columns may not be normalised by itself
        layers.append(_flat_layer(b, "linear"))
    layers += [_flat_layer(b, name) for name in flat]
    layers.append(nn.Linear(b.channels, 3))
    model = nn.Sequential(*layers)
    randomise(model, x, seed)
    return model, x


_names = st.lists(st.sampled_from(sorted(PLAIN)), min_size=1, max_size=4)
_flat = st.lists(st.sampled_from(FLAT), max_size=2)
_quick: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@settings(**_quick, max_examples=60)
@given(_names, st.sampled_from(FLATTENED), _flat, st.integers(1, 3), st.integers(0, 10**6))
def test_random_networks_split_exactly_and_completely(
    names: list[str], flatten: str, flat: list[str], dims: int, seed: int
) -> None:
    """Rule 2 on random networks, and the reverse: of ordinary blocks nothing but the output is refused."""
    model, x = network([PLAIN[n] for n in names], flatten, flat, dims, seed)
    arch = assert_splits_exactly(model, x, seed=seed)
    assert arch.groups
    refused = {u.name: u.reason for u in arch.unsplittable if u.name != str(len(model) - 1)}
    assert not refused
    if "instance" not in names:  # whose mean over space forgets what is before it
        assert not depends_on_every_group(model, x, arch)


@settings(**_quick, max_examples=60)
@given(
    st.lists(st.sampled_from(sorted(PLAIN | TRICKY)), min_size=1, max_size=4),
    st.sampled_from(sorted(TRICKY)),
    st.sampled_from(FLATTENED),
    _flat,
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_coupled_channels_split_exactly_or_not_at_all(
    names: list[str], tricky: str, flatten: str, flat: list[str], dims: int, seed: int
) -> None:
    """Whatever trace makes of chunks, groups, shuffles, norms and attention: what it grants is exact."""
    makes = [(PLAIN | TRICKY)[n] for n in [*names, tricky]]
    random.Random(seed).shuffle(makes)
    model, x = network(makes, flatten, flat, dims, seed)
    assert_splits_exactly(model, x, seed=seed)


@settings(**_quick, max_examples=6)
@given(_names, st.sampled_from(FLATTENED), _flat, st.integers(1, 2), st.integers(0, 10**6))
def test_repeated_growth_stays_exact(
    names: list[str], flatten: str, flat: list[str], dims: int, seed: int
) -> None:
    """Offspring are split again, and ghosts too: three rounds of two growths each."""
    model, x = network([PLAIN[n] for n in names], flatten, flat, dims, seed)
    arch = assert_splits_exactly(model, x, rounds=3, seed=seed)
    assert arch.groups


@settings(**_quick, max_examples=20)
@given(
    st.lists(st.sampled_from(sorted(SMOOTH | TRICKY)), min_size=1, max_size=3),
    st.sampled_from(FLATTENED),
    st.lists(st.sampled_from([n for n in FLAT if n != "prelu"]), max_size=1),
    st.integers(1, 2),
    st.integers(0, 10**6),
)
def test_the_remainder_of_the_prediction_falls_as_the_fourth_power(
    names: list[str], flatten: str, flat: list[str], dims: int, seed: int
) -> None:
    """Rule 3: one neuron of every group at once, (1/2, 1/2) along +-v; the gains add up."""
    model, x = network([(SMOOTH | TRICKY)[n] for n in names], flatten, flat, dims, seed)
    targets = outputs(model, x, False)[0] + 1.0

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return (m(batch) - targets).square().mean()

    arch = trace(model, x)
    generator = torch.Generator().manual_seed(seed)
    vectors = {}
    for group in arch.groups:
        v = torch.zeros(group.width, group.dim)
        v[-1] = torch.randn(group.dim, generator=generator)
        vectors[group.name] = v / v.norm()
    products = SplittingOperator(model, arch, [x], loss, surrogate_beta=None).matvec(vectors)
    curvature = sum(float((products[n] * v).sum()) for n, v in vectors.items())
    scale = sum(float((products[n] * v).sum().abs()) for n, v in vectors.items())

    def remainder(step: float) -> float:
        grown = copy.deepcopy(model)
        found = []
        for group in arch.groups:
            v = step * vectors[group.name][-1]
            found.append(Split(group.name, group.width - 1, (0.5, 0.5), torch.stack([v, -v])))
        split_neurons(grown, found, arch=arch)
        with torch.no_grad():
            change = loss(grown.eval(), x) - loss(model.eval(), x)
        return float(change) - 0.5 * step**2 * curvature

    large, small = abs(remainder(2e-2)), abs(remainder(1e-2))
    assert large <= 0.1 * 0.5 * 4e-4 * scale + 1e-12
    assert small <= large / 10 + 1e-12
