"""What a trigger gets to see of a running Trainer, in an uninterrupted run and in a resumed one.

A metric is a mean over an epoch, and Lightning forgets on resume what it had summed up. So a callback
that decides by metrics carries over a crash what its trigger has not seen yet: a value that was
logged but not looked at, and the sums of an epoch that was cut in two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_split._compat import MisconfigurationException
from lightning_split.optim import TrainerRanks
from lightning_split.triggers import Trigger

__all__ = ["Monitor"]


class Monitor:
    """Shows a trigger the metric that it monitors: once per epoch, or once per optimizer step.

    All of its methods are to be called on every process; the trigger sees the first one's value.

    Args:
        trigger: Whose ``monitor`` and ``interval`` say what it wants to see.
    """

    def __init__(self, trigger: Trigger) -> None:
        self._trigger = trigger
        self._seen: Tensor | None = None  # the metric when the trigger looked last
        self._pending: float | None = None  # logged before the crash, and not looked at
        self._epoch = -1  # the last one that was observed
        self._step = -1
        self._whole = -1  # the last epoch that this process has begun
        self._cut: dict[str, Any] | None = None  # sums of an epoch up to the crash
        self._joined: dict[str, Any] = {}  # what Lightning sums up, begun before the crash

    # during the run ---------------------------------------------------------------------------------

    def restarted(self) -> None:
        """To be called when epochs and steps are counted from zero again."""
        self.load_state_dict({"epoch": -1, "step": -1, "pending": None, "cut": None})

    def epoch_starts(self, trainer: pl.Trainer) -> None:
        """To be called when an epoch starts: the metrics of the last one are complete."""
        self._catch_up(trainer)
        self._whole = int(trainer.current_epoch)

    def batch_starts(self, trainer: pl.Trainer) -> None:
        """To be called before each batch, because a resumed run may skip the start of its epoch."""
        self._catch_up(trainer)
        if self._by_step and self._pending is not None:
            self._show(trainer, int(trainer.current_epoch))

    def batch_ends(self, trainer: pl.Trainer) -> None:
        """To be called after each batch."""
        self._join(trainer)
        if self._by_step and trainer.global_step > self._step:
            self._show(trainer, int(trainer.current_epoch))

    def validation_ends(self, trainer: pl.Trainer) -> None:
        """To be called after each validation within a fit."""
        if self._by_step:
            self._show(trainer, int(trainer.current_epoch))

    @property
    def _by_step(self) -> bool:
        return self._trigger.monitor is not None and self._trigger.interval == "step"

    def _catch_up(self, trainer: pl.Trainer) -> None:
        """Let the trigger see the epoch that has just ended, once."""
        finished = int(trainer.current_epoch) - 1
        if self._trigger.monitor is None or finished < 0 or finished <= self._epoch:
            return
        if not self._show(trainer, finished):
            if self._epoch < 0 and self._step < 0:
                self._refuse_unknown(trainer, finished)
                return
            if not self._by_step:
                self._trigger.observe(None, epoch=finished, step=int(trainer.global_step))
        self._epoch = finished
        self._cut, self._joined = None, {}

    def _show(self, trainer: pl.Trainer, epoch: int) -> bool:
        """Whether there was something new for the trigger to see."""
        # Logged without sync_dist it differs between processes, which must grow at the same time.
        value = TrainerRanks(trainer).agree(self._unobserved(trainer))
        self._seen, self._pending = self._metric(trainer), None
        if value is None:
            return False
        self._step = int(trainer.global_step)
        self._trigger.observe(value, epoch=epoch, step=self._step)
        return True

    def _metric(self, trainer: pl.Trainer) -> Tensor | None:
        name = self._trigger.monitor or ""
        known = trainer.callback_metrics
        if self._trigger.interval == "step" and f"{name}_step" in known:
            name = f"{name}_step"  # under its plain name the mean of an epoch comes between the steps
        return known.get(name)

    def _unobserved(self, trainer: pl.Trainer) -> float | None:
        """The monitored metric, if it was logged since the trigger looked last."""
        metric = self._metric(trainer)
        if metric is None:
            return self._pending
        # Lightning keeps the last value of what is not logged in every epoch, detached for every caller.
        if self._seen is not None and metric.data_ptr() == self._seen.data_ptr():
            return self._pending
        if self._trigger.interval == "epoch" and self._joined:
            return float(next(iter(self._joined.values())).compute())
        return float(metric)

    def _refuse_unknown(self, trainer: pl.Trainer, finished: int) -> None:
        """Say so if a whole epoch, with its validation, has not logged what the trigger wants to see."""
        between = trainer.check_val_every_n_epoch or 1
        if finished + 1 < between or self._whole != finished:
            return
        known = ", ".join(map(repr, sorted(trainer.callback_metrics))) or "none"
        monitor = self._trigger.monitor
        raise MisconfigurationException(
            f"SplittingCallback monitors {monitor!r}, which was not logged; log it with "
            f"self.log({monitor!r}, ...) or monitor one of: {known}."
        )

    # epochs that were cut in two ----------------------------------------------------------------------

    def _sums(self, trainer: pl.Trainer) -> dict[str, Any]:
        """What Lightning has summed up of the monitored metric in this epoch, by its own keys."""
        results: Mapping[str, Any] = trainer.fit_loop.epoch_loop._results
        return {
            key: self._joined.get(key, item)
            for key, item in results.items()
            if item.meta.name == self._trigger.monitor
            and item.meta.on_epoch
            and item.is_tensor
            and not item.has_reset
        }

    def _join(self, trainer: pl.Trainer) -> None:
        """Sum up beside Lightning, from where the saved run was: it starts its own sums at zero.

        Its sums stay as they are without this callback; the copy gets the same numbers in the same
        order as those of the uninterrupted run, so its mean is equal to the last bit.
        """
        if self._cut is None or self._cut["epoch"] != trainer.current_epoch:
            return
        for key, item in self._sums(trainer).items():
            if key in self._joined or key not in self._cut["sums"]:
                continue
            value, count = self._of_rank(trainer, self._cut["sums"][key])
            both = _summed(item, item.value.new_tensor(value), int(count))
            if item.meta.is_mean_reduction or item.meta.is_sum_reduction:
                both.value = both.value + item.value
            else:
                both.value = item.meta.reduce_fx(both.value, item.value)
            if item.meta.is_mean_reduction:
                both.cumulated_batch_size = both.cumulated_batch_size + item.cumulated_batch_size
            self._joined[key] = both
            item.update = _in_both(item.update, both.update)

    @staticmethod
    def _of_rank(trainer: pl.Trainer, rows: list[list[float]]) -> list[float]:
        """This process's share; with another number of processes than before, the first one's."""
        return rows[trainer.global_rank] if len(rows) == trainer.world_size else rows[0]

    # over a crash ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was observed, as plain numbers."""
        return {"epoch": self._epoch, "step": self._step, "pending": self._pending, "cut": None}

    def state_now(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The same with what a Trainer that is saved right now has to forget."""
        state = self.state_dict()
        if self._by_step and trainer.global_step <= self._step:
            return state  # in the middle of an accumulation
        state["pending"] = self._unobserved(trainer)
        sums = {} if self._by_step else self._sums(trainer)
        if sums and trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            # Resumed from here the epoch is over, and the hooks of its end may not be called any more.
            item = next(iter(sums.values()))
            state["pending"] = float(_summed(item, item.value, _count(item)).compute())
        elif sums:
            state["cut"] = {"epoch": int(trainer.current_epoch), "sums": self._of_all_ranks(trainer, sums)}
        return state

    @staticmethod
    def _of_all_ranks(trainer: pl.Trainer, sums: Mapping[str, Any]) -> dict[str, list[list[float]]]:
        rows = {}
        for key, item in sums.items():
            mine = torch.tensor([[float(item.value), _count(item)]], dtype=torch.float64)
            rows[key] = TrainerRanks(trainer).gather_of({"sums": mine})["sums"].tolist()
        return rows

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        self._epoch, self._step = int(state["epoch"]), int(state["step"])
        self._pending, self._cut = state["pending"], state["cut"]
        self._seen, self._whole, self._joined = None, -1, {}


def _count(item: Any) -> int:
    return int(item.cumulated_batch_size) if item.meta.is_mean_reduction else 0


def _summed(item: Any, value: Tensor, count: int) -> Any:
    """Another of Lightning's records of a logged metric, with these sums."""
    record = type(item)(item.meta, True).to(value.device)
    record.value = value
    if item.meta.is_mean_reduction:
        record.cumulated_batch_size = torch.full_like(record.cumulated_batch_size, count)
    record._update_count = 1  # else it warns that it has seen nothing
    return record


def _in_both(first: Any, second: Any) -> Any:
    def update(*args: Any, **kwargs: Any) -> None:
        first(*args, **kwargs)
        second(*args, **kwargs)

    return update
