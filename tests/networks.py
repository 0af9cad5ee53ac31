"""Networks for the tests, one per kind of coupling; smooth unless the name says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two producers in one group, BatchNorm, a flattened map and an inner group."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.act = act
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 9, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        x = F.avg_pool2d(self.act(x + y), 2).flatten(1)
        return self.out(self.act(self.head(x)))


class Dense(nn.Module):
    """Concatenation: consumers read several groups side by side, and the input too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 3, 3, padding=1)
        self.b = nn.Conv2d(5, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(9)
        self.c = nn.Conv2d(9, 3, 1)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.sigmoid(self.a(x))
        x = torch.cat([x, a], 1)
        x = torch.cat([x, torch.tanh(self.b(x))], 1)
        return self.out(torch.tanh(self.c(self.norm(x))).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise layers, one of them with a channel multiplier of two."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(2, 4, 1)
        self.norm1 = nn.BatchNorm2d(4)
        self.depth = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.norm2 = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 3, 1)
        self.depth2 = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.out = nn.Linear(3 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.expand(x)))
        x = F.silu(self.norm2(self.depth(x)))
        x = F.softplus(self.depth2(self.project(x)))
        return self.out(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Gated(nn.Module):
    """A squeeze-excite gate and a product of two branches: two producers each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.squeeze = nn.Conv2d(4, 2, 1)
        self.excite = nn.Conv2d(2, 4, 1)
        self.left, self.right = nn.Linear(4, 5), nn.Linear(4, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        gate = self.excite(torch.tanh(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = (x * torch.sigmoid(gate)).mean((2, 3))
        return self.out(self.left(x) * torch.sigmoid(self.right(x)))


class Grouped(nn.Module):
    """A grouped convolution, a channel shuffle, and a gated unit by chunk: neurons of several channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 1)
        self.grouped = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.mixed = nn.Conv2d(8, 6, 1)
        self.out = nn.Linear(3 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.grouped(torch.sigmoid(self.first(x)))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        value, gate = self.mixed(x).chunk(2, 1)
        return self.out(F.adaptive_avg_pool2d(value * torch.sigmoid(gate), 2).flatten(1))


class Attention(nn.Module):
    """Hand-written attention with two heads: queries, values and a gated feed-forward layer can be split."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6)
        self.join = nn.Linear(6, 4)
        self.up, self.down = nn.Linear(4, 10), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = F.layer_norm(x + self.join(y), (4,))
        return self.down(F.glu(self.up(y), -1)).mean(1)


class Shared(nn.Module):
    """One layer called twice on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.again(x))
        return self.out(torch.tanh(self.again(x)))


class Text(nn.Module):
    """Embedding, Conv1d, PReLU per channel, Conv1d depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.conv = nn.Conv1d(4, 5, 3, padding=1)
        self.act = nn.PReLU(5)
        self.depth = nn.Conv1d(5, 5, 3, padding=1, groups=5)
        self.norm = nn.BatchNorm1d(5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(torch.tanh(self.embed(x)).transpose(1, 2)))
        return self.out(torch.tanh(self.norm(self.depth(x))).mean(2))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7),
        nn.Tanh(),
        nn.Dropout(0.0),
        nn.Linear(7, 6, bias=False),
        nn.Sigmoid(),
        nn.Linear(6, 3),
    )


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1),
        nn.BatchNorm3d(3),
        nn.SiLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(3, 3, 3, padding=1, groups=3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(3 * 8, 2),
    )


def relu_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3)
    )


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    groups: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]
    # groups, written out by hand: name -> (producers, channelwise, consumers)


CASES: dict[str, Case] = {
    "mlp": Case(mlp, lambda: torch.randn(16, 5), {"0": (("0",), (), ("3",)), "3": (("3",), (), ("5",))}),
    "residual": Case(
        Residual,
        lambda: torch.randn(8, 1, 6, 6),
        {
            "stem": (("stem", "conv2"), ("norm2",), ("conv1", "head")),
            "conv1": (("conv1",), ("norm1",), ("conv2",)),
            "head": (("head",), (), ("out",)),
        },
    ),
    "dense": Case(
        Dense,
        lambda: torch.randn(8, 2, 5, 5),
        {
            "a": (("a",), ("norm",), ("b", "c")),
            "b": (("b",), ("norm",), ("c",)),
            "c": (("c",), (), ("out",)),
        },
    ),
    "separable": Case(
        Separable,
        lambda: torch.randn(8, 2, 6, 6),
        {
            "expand": (("expand",), ("norm1", "depth", "norm2"), ("project",)),
            "project": (("project",), ("depth2",), ("out",)),
        },
    ),
    "gated": Case(
        Gated,
        lambda: torch.randn(8, 2, 5, 5),
        {
            "conv": (("conv", "excite"), (), ("squeeze", "left", "right")),
            "squeeze": (("squeeze",), (), ("excite",)),
            "left": (("left", "right"), (), ("out",)),
        },
    ),
    "grouped": Case(
        Grouped,
        lambda: torch.randn(8, 2, 5, 5),
        {
            "first": (("first",), (), ("grouped",)),
            "grouped": (("grouped",), ("norm",), ("mixed",)),
            "mixed": (("mixed",), (), ("out",)),
        },
    ),
    "attention": Case(
        Attention,
        lambda: torch.randn(8, 5, 4),
        {"q": (("q",), (), ("k",)), "v": (("v",), (), ("join",)), "up": (("up",), (), ("down",))},
    ),
    "shared": Case(Shared, lambda: torch.randn(16, 3), {"first": (("first", "again"), (), ("again", "out"))}),
    "text": Case(
        Text,
        lambda: torch.randint(0, 11, (16, 7)),
        {
            "embed": (("embed",), (), ("conv",)),
            "conv": (("conv",), ("act", "depth", "norm"), ("out",)),
        },
    ),
    "volumes": Case(volumes, lambda: torch.randn(8, 1, 4, 4, 4), {"0": (("0",), ("1", "4"), ("7",))}),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters and BatchNorm statistics random, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.6 / max(1, p[0].numel()) ** 0.5 + 0.15))
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=generator) * 0.3)
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
                m.weight.add_(1.0)
    return model


def loss_of(targets: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    """Mean squared distance to fixed targets."""
    return lambda model, x: (model(x) - targets).square().mean()


class Raw(nn.Module):
    """Matrices that no layer owns, in every kind of product."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "conv": (4, 2, 3, 3),
            "conv2": (5, 4, 3, 3),
            "a": (5, 6),
            "b": (7, 6),
            "c": (3, 7, 4),
            "d": (3, 4, 5),
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 3))
        self.shift, self.bias, self.out = (
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(6)),
            nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.conv2d(x, self.conv, self.shift, padding=1))
        x = torch.tanh(F.conv2d(x, self.conv2, stride=2)).flatten(2).transpose(1, 2)
        x = torch.tanh(x @ self.a + self.bias)
        x = torch.tanh(F.linear(x, self.b)).mean(1)
        x = torch.tanh(torch.einsum("bi,eio->ebo", x, self.c))
        return self.out(torch.tanh(torch.bmm(x, self.d)).sum(0))
