"""Where a growth's batches come from: samplers asked once more, or the last batches that went by.

What went by is gone after a crash. So the last batches are part of the callback's state where they are
small and plain, and a resumed run measures on the same ones as the uninterrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_split.optim import TrainerRanks
from lightning_split.probing import BatchBuffer, quiet, to_device, training_batches
from lightning_split.significance import FIRST_LOOK, DrawnBatches

__all__ = ["MOST_BYTES", "BatchSupply"]

MOST_BYTES = 2**25  # of batches in a checkpoint, those of all processes together
_ATOMS = (bool, int, float, complex, str, bytes, type(None))


class BatchSupply:
    """Hands out training batches to measure with, and to confirm what was measured.

    Loaders whose samplers can be replayed (:func:`~lightning_split.probing.training_batches`) cost nothing
    until a growth is due. Of others the last batches are kept, as many as a growth needs or an epoch has.

    Args:
        num_batches: To estimate with.
        confirm_batches: To measure again with, at most; 0 does without.
    """

    def __init__(self, num_batches: int, confirm_batches: int) -> None:
        self._num, self._confirm = num_batches, confirm_batches
        self._count = num_batches + min(confirm_batches, FIRST_LOOK)  # what a growth starts with
        self._recent = BatchBuffer(self._count)
        self._collecting = False
        self._epoch, self._seen = 0, 0  # the epoch of the last batch, and how many it had until then
        self._whole: int | None = None  # how many the last whole epoch had
        self._saved: dict[str, Any] | None = None  # before the crash, not yet on the device

    # during the run -----------------------------------------------------------------------------------

    def begins(self, trainer: pl.Trainer, seed: int) -> None:
        """To be called once the loaders are there."""
        self._collecting = training_batches(trainer, 1, seed=seed) is None

    def saw(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """To be called with every training batch, as it is on the device."""
        if not self._collecting:
            return
        self._restore(trainer)
        self._turn_to(trainer.current_epoch)
        self._seen = batch_idx + 1
        self._recent.add(batch)

    def take(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, seed: int
    ) -> tuple[list[Any], Iterable[Any] | None] | None:
        """Batches on the device, to estimate and to confirm with.

        Args:
            trainer: A Trainer inside ``fit``.
            pl_module: Its module.
            seed: The same seed draws the same batches.

        Returns:
            Where an epoch has fewer batches than asked for, it is shared out; ``None`` if too few went by.
        """
        with quiet(trainer, pl_module, seed=seed):
            batches = training_batches(trainer, self._count, seed=seed)
            if batches is not None:
                batches = [to_device(trainer, pl_module, batch) for batch in batches]
        self._collecting = batches is None
        if batches is not None:
            drawn = self._confirm - FIRST_LOOK if len(batches) == self._count else 0
            epoch = float(trainer.num_training_batches) if len(batches) == self._count else len(batches)
        else:
            self._restore(trainer)
            self._turn_to(trainer.current_epoch)
            needed = self._needed(trainer)
            batches, drawn, epoch = self._recent.batches()[-needed:], 0, math.inf
            if len(batches) < needed:
                return None
        if not self._confirm:
            return batches, None
        num = min(self._num, (len(batches) + 1) // 2)
        fresh = batches[num:]
        if not fresh:
            return batches[:num], None

        def draw(skip: int) -> list[Any]:
            if drawn <= skip:
                return []
            more = min(drawn - skip, FIRST_LOOK)
            found = training_batches(trainer, more, seed=seed, skip=self._count + skip) or []
            return [to_device(trainer, pl_module, batch) for batch in found]

        most = int(min(epoch - num, max(len(fresh), self._confirm)))
        return batches[:num], DrawnBatches(fresh, draw, most, epoch - num)

    def _turn_to(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._whole, self._seen = int(epoch), self._seen or self._whole, 0

    def _needed(self, trainer: pl.Trainer) -> int:
        """How many batches a growth waits for: not more than an epoch has, as far as that is known."""
        known = trainer.num_training_batches
        whole = self._whole if math.isinf(known) else int(known)
        return min(self._count, whole or self._count)

    # over a crash ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a Trainer is not needed for."""
        return {"epoch": self._epoch, "seen": self._seen, "whole": self._whole, "recent": None, "lost": ""}

    def state_now(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The same with the batches that are kept right now; to be called on every process."""
        state = self.state_dict()
        if self._saved is not None:  # nothing went by since that was loaded
            return state | self._saved
        if not self._collecting:
            return state
        batches = self._recent.batches()
        size = _size(batches)
        sizes = torch.tensor([math.inf if size is None else size], dtype=torch.float64)
        total = float(TrainerRanks(trainer).gather_of({"sizes": sizes})["sizes"].sum())
        if math.isinf(total):
            state["lost"] = "they hold more than tensors and numbers in lists, tuples and dicts"
        elif total > MOST_BYTES:
            state["lost"] = f"they take {total / 2**20:,.0f} MiB, more than {MOST_BYTES / 2**20:.0f}"
        else:
            devices = [t.device.type for t in _tensors(batches)]
            packed = _replaced(batches, iter([t.cpu() for t in _tensors(batches)]))
            state["recent"] = TrainerRanks(trainer).collect({"batches": packed, "devices": devices})
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        self._epoch, self._seen, self._whole = state["epoch"], state["seen"], state["whole"]
        self._recent = BatchBuffer(self._count)
        self._saved = {"recent": state["recent"], "lost": state["lost"]}

    def _restore(self, trainer: pl.Trainer) -> None:
        saved, self._saved = self._saved, None
        if saved is None:
            return
        if saved["lost"]:
            rank_zero_warn(
                "The checkpoint does not hold the last training batches, which SplittingCallback measures "
                f"with, because {saved['lost']}; a growth waits until {self._needed(trainer)} batches have "
                "gone by, so this run may differ from an uninterrupted one."
            )
        ranks = saved["recent"] or []
        if len(ranks) != trainer.world_size:
            return
        mine = ranks[trainer.global_rank]
        root = trainer.strategy.root_device
        moved = [
            t if device == "cpu" else t.to(root)
            for t, device in zip(_tensors(mine["batches"]), mine["devices"], strict=True)
        ]
        for batch in _replaced(mine["batches"], iter(moved)):
            self._recent.add(batch)


def _size(value: Any) -> int | None:
    """Bytes of the tensors in plain containers; ``None`` if a checkpoint could not be loaded with it."""
    if type(value) is Tensor:
        return value.numel() * value.element_size() if value.layout is torch.strided else None
    if isinstance(value, _ATOMS):
        return 0 if type(value) in _ATOMS else None
    if type(value) not in (list, tuple, dict):
        return None
    parts = list(value.values()) if isinstance(value, dict) else list(value)
    if isinstance(value, dict) and not all(type(key) in _ATOMS for key in value):
        return None
    sizes = [_size(part) for part in parts]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same containers with other tensors, in order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _replaced(part, tensors) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(part, tensors) for part in value)
    return value
