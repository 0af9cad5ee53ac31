"""Grow a small residual network on handwritten digits while it trains.

    python examples/quickstart.py          # about a minute on two cores
    tensorboard --logdir runs              # scalars, histograms and a figure for every growth

The module below knows nothing of lightning_split. It starts with two channels; one callback grows it.
In the end the same seed is trained equally long without the callback.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_split import SplittingCallback, TopK


class Block(nn.Module):
    """x + conv(relu(conv(x))), with BatchNorm."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class DigitNet(pl.LightningModule):
    """An ordinary module: two residual blocks on 8x8 images, Adam with a cosine schedule, cross-entropy."""

    def __init__(self, width: int = 2, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Block(width, width),
            nn.MaxPool2d(2),
            Block(width, width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, 10),
        )
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        epochs = self.trainer.max_epochs
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)]


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 digits that scikit-learn ships, 70 % for training."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    train, val = train_test_split(range(len(y)), test_size=0.3, random_state=0, stratify=labels)
    return TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val])


def fit(name: str, callbacks: list[pl.Callback], args: argparse.Namespace) -> tuple[DigitNet, float]:
    """Train the seed network; returns it with its validation accuracy."""
    pl.seed_everything(args.seed, verbose=False)
    train, val = digits()
    model = DigitNet(args.width)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=TensorBoardLogger(args.out, name="quickstart", version=name),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(val, 512))
    accuracy = float(trainer.callback_metrics["val_acc"])
    print(
        f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"training loss {float(trainer.callback_metrics['train_loss']):.4f}, "
        f"validation accuracy {accuracy:.2%}, {time.perf_counter() - start:.0f} s"
    )
    return model, accuracy


def draw(path: Path, folder: Path, history: list[dict[str, Any]]) -> None:
    """Loss and accuracy of both runs from their TensorBoard files, and the widths, as one picture."""
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for name, color in (("grown", "C0"), ("seed without growth", "0.55")):
        files = (folder / "quickstart" / name).glob("events.*")  # of earlier runs too
        events = EventAccumulator(str(max(files, key=lambda file: file.stat().st_mtime)))
        events.Reload()
        for ax, tag in zip(axes, ("train_loss", "val_acc"), strict=False):
            points = [(e.step, e.value) for e in events.Scalars(tag)]
            ax.plot(*zip(*points, strict=True), color=color, label=name, linewidth=1.8)
    steps = [event["step"] for event in history]
    end = axes[0].get_xlim()[1]
    for number, name in enumerate(history[0]["widths_before"]):
        widths = [history[0]["widths_before"][name], *(e["widths_after"][name] for e in history)]
        style = {"where": "post", "color": f"C{number + 1}", "label": name}
        axes[2].step([0, *steps, end], [*widths, widths[-1]], **style)
    for ax, label in zip(axes, ("training loss", "validation accuracy", "neurons"), strict=True):
        for step in steps:
            ax.axvline(step, color="0.88", zorder=0)
        ax.set_ylabel(label)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="upper left" if ax is axes[2] else "best")
    axes[0].set_yscale("log")
    axes[1].set_ylim(0.7, 1.0)
    axes[2].set(xlabel="training step (vertical lines: growths)", xlim=(0, end), ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the example; returns the two accuracies and the number of growths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--width", type=int, default=2, help="channels of the seed network")
    parser.add_argument("--seed", type=int, default=6, help="of 0 to 10, growth gains the median on this one")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for TensorBoard")
    parser.add_argument("--picture", type=Path, help="also draw both runs to this file")
    parser.add_argument("--fast", action="store_true", help="a few epochs, for a test")
    args = parser.parse_args(argv)
    if args.fast:
        args.epochs = 8
    torch.set_num_threads(1)  # images of 8x8 pixels: more threads would only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.14

    splitting = SplittingCallback(
        strategy=TopK(fraction=0.5),
        monitor="train_loss",
        patience=1 if args.fast else 2,
        min_delta=10.0 if args.fast else 0.1,
        cooldown=0 if args.fast else 2,
        step_size=0.02,
        max_growths=2 if args.fast else 5,
    )
    _, grown = fit("grown", [splitting], args)
    _, seed = fit("seed without growth", [], args)
    growths = sum(1 for event in splitting.history if event["num_splits"])
    print(
        f"{growths} growths took the validation accuracy from {seed:.2%} (the seed trained equally long) "
        f"to {grown:.2%}.\nTensorBoard: tensorboard --logdir {args.out}"
    )
    if args.picture:
        draw(args.picture, args.out, splitting.history)
    return {"grown": grown, "seed": seed, "growths": float(growths)}


if __name__ == "__main__":
    main()
