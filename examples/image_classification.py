"""Grow an image classifier on Fashion-MNIST, CIFAR-10, CIFAR-100 or a folder of images.

    python examples/image_classification.py --dataset fashion-mnist
    python examples/image_classification.py --dataset cifar10 --data-dir data --arch resnet18
    python examples/image_classification.py --dataset folder --data-dir photos --image-size 128

Fashion-MNIST is read from the gzip files that Debian's package dataset-fashion-mnist installs, if they are
there (or in --data-dir), and downloaded by torchvision otherwise; so are CIFAR-10 and CIFAR-100. A folder
holds train/CLASS/*.jpg and val/CLASS/*.jpg. --arch takes "tiny" or any classification model of torchvision.
"""

from __future__ import annotations

import argparse
import gzip
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from lightning_split import KnapsackEnergy, SelectionStrategy, SplittingCallback, TopK

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
Split = tuple[Dataset[Any], Dataset[Any], int, int]  # training, validation, classes, channels


def read_idx(path: Path) -> Tensor:
    """The array of bytes in a gzipped IDX file."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(data[4 + 4 * dimensions :]), dtype=torch.uint8).reshape(shape)


def fashion_mnist_from_gzip(folder: Path) -> Split:
    """Fashion-MNIST from its four gzip files."""
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz").unsqueeze(1)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long()
        parts.append(TensorDataset((images.float() / 255 - 0.286) / 0.353, labels))
    return parts[0], parts[1], 10, 1


def load(name: str, folder: Path, size: int) -> Split:
    """Training and validation data of one of the known data sets."""
    scale = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if name == "fashion-mnist":
        for place in (folder, DEBIAN):
            if (place / "train-images-idx3-ubyte.gz").exists():
                return fashion_mnist_from_gzip(place)
        make = torchvision.datasets.FashionMNIST
        plain = v2.Compose([*scale, v2.Normalize([0.286], [0.353])])
        train = make(folder, train=True, transform=plain, download=True)
        return train, make(folder, train=False, transform=plain, download=True), 10, 1
    if name in ("cifar10", "cifar100"):
        make = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
        norm = v2.Normalize([0.491, 0.482, 0.447], [0.247, 0.243, 0.262])
        augment = v2.Compose([v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), *scale, norm])
        train = make(folder, train=True, transform=augment, download=True)
        val = make(folder, train=False, transform=v2.Compose([*scale, norm]), download=True)
        return train, val, len(train.classes), 3
    norm = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    augment = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *scale, norm])
    plain = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *scale, norm])
    train = torchvision.datasets.ImageFolder(str(folder / "train"), augment)
    return train, torchvision.datasets.ImageFolder(str(folder / "val"), plain), len(train.classes), 3


def tiny(channels: int, classes: int, width: int) -> nn.Module:
    """Three strided convolutions with BatchNorm: a seed that is much too narrow."""
    layers: list[nn.Module] = []
    for factor in (1, 2, 2):
        layers += [
            nn.Conv2d(channels, factor * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(factor * width),
            nn.ReLU(inplace=True),
        ]
        channels = factor * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes))


class Classifier(pl.LightningModule):
    """Cross-entropy, SGD with momentum and a cosine schedule."""

    def __init__(self, net: nn.Module, classes: int, lr: float, grey_to_rgb: bool) -> None:
        super().__init__()
        self.net, self.lr, self.grey_to_rgb = net, lr, grey_to_rgb
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.expand(-1, 3, -1, -1) if self.grey_to_rgb else x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        out = self(batch[0])
        out = out[0] if isinstance(out, tuple) else out  # GoogLeNet and Inception have auxiliary heads
        loss = F.cross_entropy(out, batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the example; returns validation accuracy, parameters and the number of growths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("fashion-mnist", "cifar10", "cifar100", "folder")
    parser.add_argument("--dataset", choices=names, default="fashion-mnist")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--arch", default="tiny", help='"tiny" or a model of torchvision.models')
    parser.add_argument("--width", type=int, default=4, help="channels of the tiny seed")
    parser.add_argument("--image-size", type=int, default=128, help="for a folder of images")
    parser.add_argument("--strategy", choices=("top-k", "knapsack"), default="knapsack")
    parser.add_argument("--budget", type=float, default=0.3, help="share of neurons, or of the MACs")
    parser.add_argument("--max-growths", type=int, default=4)
    parser.add_argument("--patience", type=int, default=1)
    parser.add_argument("--min-delta", type=float, default=0.02)
    parser.add_argument("--step-size", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use only so many training images")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for TensorBoard")
    parser.add_argument("--fast", action="store_true", help="a few steps, for a test")
    args = parser.parse_args(argv)
    if args.fast:
        args.epochs, args.limit, args.max_growths = 4, args.limit or 512, 1
        args.patience, args.min_delta = 1, 10.0
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    pl.seed_everything(args.seed, verbose=False)
    train, val, classes, channels = load(args.dataset, args.data_dir, args.image_size)
    if args.limit:
        train, val = (Subset(d, range(min(args.limit, len(d)))) for d in (train, val))  # type: ignore[arg-type]
    if args.arch == "tiny":
        net = tiny(channels, classes, args.width)
    else:
        net = torchvision.models.get_model(args.arch, weights=None, num_classes=classes)
    model = Classifier(net, classes, args.lr, grey_to_rgb=args.arch != "tiny" and channels == 1)
    strategy: SelectionStrategy = TopK(fraction=args.budget)
    if args.strategy == "knapsack":
        strategy = KnapsackEnergy(budget=args.budget, cost="macs")
    splitting = SplittingCallback(
        strategy=strategy,
        patience=args.patience,
        min_delta=args.min_delta,
        step_size=args.step_size,
        max_growths=args.max_growths,
    )
    loader = {"batch_size": args.batch_size, "num_workers": args.workers}
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=1,
        callbacks=[splitting],
        logger=TensorBoardLogger(args.out, name=args.dataset),
        enable_progress_bar=not args.fast,
        enable_checkpointing=not args.fast,
        log_every_n_steps=10,
    )
    trainer.fit(
        model,
        DataLoader(train, shuffle=True, drop_last=True, **loader),
        DataLoader(val, **loader),
    )
    result = {
        "val_acc": float(trainer.callback_metrics["val_acc"]),
        "params": float(sum(p.numel() for p in model.parameters())),
        "growths": float(len(splitting.history)),
    }
    print(
        f"{args.dataset}: validation accuracy {result['val_acc']:.2%} with {result['params']:,.0f} "
        f"parameters after {result['growths']:.0f} growths"
    )
    return result


if __name__ == "__main__":
    main()
