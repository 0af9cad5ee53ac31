"""Networks and data that the benchmarks of the splitting phase share."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
Batch = tuple[Tensor, Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of every subject."""
    return F.cross_entropy(model(batch[0]), batch[1])


class SmallTransformer(nn.Module):
    """Pre-norm encoder over the patches of an image."""

    def __init__(self, channels: int, patch: int, tokens: int, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(channels * patch**2, dim)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, 4, hidden, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()
    return net


def _mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    net = mobilenet_v2(num_classes=10)
    for block in (net.features[0], net.features[2].conv[1]):
        block[0].stride = (1, 1)
    return net


LARGE: dict[str, Callable[[], nn.Module]] = {  # for images of CIFAR's size
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    ),
    "resnet18": _resnet18,
    "mobilenet": _mobilenet,
    "transformer": lambda: SmallTransformer(3, 4, 64, 128, 256, 4),
}


def images(count: int) -> Batch:
    """Random images of CIFAR's size, with random labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 32, 32, generator=generator)
    return x, torch.randint(0, 10, (count,), generator=generator)


def _small_convolutions(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 1
    for out in (width, 2 * width, 2 * width):
        layers += [nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))


SMALL: dict[str, Callable[[int], nn.Module]] = {  # seeds for Fashion-MNIST
    "mlp": lambda width: nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    ),
    "convolutions": lambda width: _small_convolutions(width // 2),
    "transformer": lambda width: SmallTransformer(1, 7, 16, 32, width, 2),
}


def fashion_mnist(folder: Path) -> Batch:
    """The training images and labels, from the gzip files in ``folder`` or of Debian's package."""
    for place in (folder, DEBIAN):
        if (place / "train-images-idx3-ubyte.gz").exists():
            x = _idx(place / "train-images-idx3-ubyte.gz").unsqueeze(1).float()
            return (x / 255 - 0.286) / 0.353, _idx(place / "train-labels-idx1-ubyte.gz").long()
    raise SystemExit(
        f"There is no Fashion-MNIST in {folder}; install dataset-fashion-mnist or pass --data-dir."
    )


def _idx(path: Path) -> Tensor:
    data = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return torch.frombuffer(bytearray(data[4 + 4 * data[3] :]), dtype=torch.uint8).reshape(shape)


def trained(net: nn.Module, data: Batch, *, epochs: float, batch: int, lr: float = 2e-3) -> nn.Module:
    """A network trained by Adam for some epochs, in eval mode."""
    x, y = data
    optimizer = torch.optim.Adam(net.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    left = round(epochs * len(x) / batch)
    net.train()
    while left > 0:
        for ids in torch.randperm(len(x), generator=generator).split(batch)[:left]:
            optimizer.zero_grad()
            cross_entropy(net, (x[ids], y[ids])).backward()
            optimizer.step()
            left -= 1
    return net.eval()


def batches_of(data: Batch, size: int, seed: int) -> list[Batch]:
    """All batches of one epoch, shuffled, without the short one at the end."""
    x, y = data
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [(x[ids], y[ids]) for ids in order.split(size) if len(ids) == size]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a plain-text table; numbers with three significant digits."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_shown(row.get(key, "")) for key in head] for row in rows]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in [head, *cells]
    )


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
