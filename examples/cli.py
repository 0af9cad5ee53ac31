"""Train and grow a network from a YAML file, with Lightning's command line.

    python examples/cli.py fit --config examples/config.yaml
    python examples/cli.py fit --config examples/config.yaml --trainer.max_epochs=20 \\
        --trainer.callbacks.trigger.n=2 --trainer.callbacks.strategy=Threshold \\
        --trainer.callbacks.strategy.value=-1e-4
    python examples/cli.py fit --trainer.callbacks.help=lightning_split.SplittingCallback

Nothing here is particular to growing: the callback stands in the YAML file, and so do its strategy,
grower, solver and trigger, each by class. An argument after the file overrides what the file says;
`--trainer.callbacks.` means the last callback of its list.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from quickstart import DigitNet, digits
from torch.utils.data import DataLoader


class Digits(pl.LightningDataModule):
    """scikit-learn's handwritten digits.

    Args:
        batch_size: Images in a training batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train, self.val = digits()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, 512)


def main(args: Any = None) -> LightningCLI:
    """Run the command line; returns it, with its trainer, model and data."""
    return LightningCLI(DigitNet, Digits, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
