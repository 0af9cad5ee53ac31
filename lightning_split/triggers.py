"""Triggers: when to grow."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

__all__ = ["Every", "Plateau", "Trigger"]


class Trigger(ABC):
    """Decides when a growth is due; the base class for a schedule of your own.

    Only :meth:`due` has to be written. A growth is *due* until it has been tried: do not rely on being
    asked at one certain moment, because a resumed run may skip it. On several processes a trigger must
    decide alike on all of them: the monitored value is the first process's, a wall clock is not.

    What a trigger remembers it keeps in attributes whose names begin with an underscore. Those go into
    the checkpoint, and must be numbers, strings, booleans, ``None``, or lists and dicts of these.

    Example::

        class OncePerSize(Trigger):
            def __init__(self, epochs: list[int]) -> None:
                self.epochs = epochs
                self._done = 0  # in the checkpoint, because of the underscore

            def due(self, *, epoch: int, step: int) -> bool:
                return self._done < len(self.epochs) and epoch >= self.epochs[self._done]

            def fired(self, *, epoch: int, step: int) -> None:
                self._done += 1
    """

    monitor: str | None = None  # name of the logged metric that observe() wants to see
    interval: Literal["epoch", "step"] = "epoch"  # how often

    def observe(self, value: float | None, *, epoch: int, step: int) -> None:
        """See the monitored metric.

        With ``interval = "epoch"`` it is called once for every epoch that has ended, and ``None`` means
        that nothing new was logged. With ``interval = "step"`` it is called whenever the metric was
        logged anew, after an optimizer step or a validation.
        """
        return None

    @abstractmethod
    def due(self, *, epoch: int, step: int) -> bool:
        """Whether the network should grow now, before the given epoch or step is trained."""

    def fired(self, *, epoch: int, step: int) -> None:
        """A growth has just been tried."""
        return None

    def restarted(self) -> None:
        """Another Trainer fits the network further, and counts epochs and steps from zero again."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the attributes that begin with one underscore, without it."""
        return {name[1:]: value for name, value in vars(self).items() if _is_state(name)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved.

        Raises:
            ValueError: If the state is that of another trigger.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"The saved trigger state {sorted(state)} is not one of {type(self).__name__}; "
                "resume with the trigger that the run was started with."
            )
        vars(self).update({f"_{name}": value for name, value in state.items()})


def _is_state(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


class Plateau(Trigger):
    """Grow when a metric has stopped improving.

    After a growth the best value starts anew, so the bump that a growth may cause is forgiven. A
    value that is not finite counts as no improvement and is never the best; an epoch without a
    value does not count.

    Args:
        monitor: Name of the logged metric.
        mode: ``"min"`` or ``"max"``: which way it improves.
        patience: Grow after so many values in a row without improvement: epochs, or optimizer steps
            (validations, of a metric that they log) with ``interval="step"``.
        min_delta: Changes smaller than this are no improvement.
        min_delta_mode: Whether ``min_delta`` is absolute (``"abs"``, as in Lightning's
            EarlyStopping) or a share of the best value (``"rel"``).
        cooldown: So many values after a growth do not count; they only enter the average.
        warmup: The same at the start of the run.
        smoothing: Share of the past in an exponential average of the metric, whose start is corrected
            as in Adam; 0 takes the metric as it comes. The loss of single steps wants 0.9 to 0.99, and
            a cooldown and warm-up of some ``1 / (1 - smoothing)`` steps, because a young average is
            as noisy as the loss.
        interval: ``"epoch"`` looks at the metric once per epoch, ``"step"`` after each optimizer step
            that logged it (``self.log`` with ``on_step=True``), and after each validation.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        monitor: str = "train_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 1e-3,
        min_delta_mode: Literal["abs", "rel"] = "abs",
        cooldown: int = 0,
        warmup: int = 0,
        smoothing: float = 0.0,
        interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}.")
        if min_delta_mode not in ("abs", "rel"):
            raise ValueError(f"min_delta_mode must be 'abs' or 'rel', got {min_delta_mode!r}.")
        if interval not in ("epoch", "step"):
            raise ValueError(f"interval must be 'epoch' or 'step', got {interval!r}.")
        for name, count, least in (
            ("patience", patience, 1),
            ("cooldown", cooldown, 0),
            ("warmup", warmup, 0),
        ):
            if count < least:
                raise ValueError(f"{name} must be at least {least}, got {count}.")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be at least 0 and finite, got {min_delta}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {smoothing}.")
        self.monitor = monitor
        self.mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.min_delta_mode = min_delta_mode
        self.cooldown = cooldown
        self.warmup = warmup
        self.smoothing = smoothing
        self.interval = interval
        self._best: float | None = None
        self._average: float | None = None
        self._weight = 0.0  # of all values in the average, 1 in the long run
        self._stale = 0  # observations in a row without improvement
        self._resting = warmup  # observations still to be ignored

    def observe(self, value: float | None, *, epoch: int, step: int) -> None:
        """Count the value, unless it falls into the warm-up or a cooldown."""
        if value is None:
            return
        smoothed = self._smoothed(float(value))
        if self._resting > 0:
            self._resting -= 1
            return
        if smoothed is not None and self._improves(smoothed):
            self._best, self._stale = smoothed, 0
        else:
            self._stale += 1

    def due(self, *, epoch: int, step: int) -> bool:
        """Whether patience has run out."""
        return self._stale >= self.patience

    def fired(self, *, epoch: int, step: int) -> None:
        """Forget the past and rest for the cooldown."""
        self._best = self._average = None
        self._weight = 0.0
        self._stale, self._resting = 0, self.cooldown

    def _smoothed(self, value: float) -> float | None:
        if not math.isfinite(value):
            return None
        self._weight = self.smoothing * self._weight + (1 - self.smoothing)
        rate = (1 - self.smoothing) / self._weight  # 1 for the first value, and without smoothing
        if self._average is None or rate == 1:
            self._average = value
        else:
            self._average += rate * (value - self._average)
        return self._average

    def _improves(self, value: float) -> bool:
        if self._best is None:
            return True
        margin = self.min_delta * (abs(self._best) if self.min_delta_mode == "rel" else 1.0)
        return value < self._best - margin if self.mode == "min" else value > self._best + margin

    def __repr__(self) -> str:
        return (
            f"Plateau(monitor={self.monitor!r}, mode={self.mode!r}, patience={self.patience}, "
            f"min_delta={self.min_delta}, min_delta_mode={self.min_delta_mode!r}, "
            f"cooldown={self.cooldown}, warmup={self.warmup}, smoothing={self.smoothing}, "
            f"interval={self.interval!r})"
        )


class Every(Trigger):
    """Grow every ``n`` epochs or optimizer steps; never before the first.

    Args:
        n: The period.
        unit: ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: If ``n`` is below 1 or the unit is another word.
    """

    def __init__(self, n: int, unit: Literal["epoch", "step"] = "epoch") -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}.")
        if unit not in ("epoch", "step"):
            raise ValueError(f"unit must be 'epoch' or 'step', got {unit!r}.")
        self.n = n
        self.unit = unit
        self._last = 0  # epoch or step of the last growth

    def due(self, *, epoch: int, step: int) -> bool:
        """Whether ``n`` epochs or steps have passed since the last growth."""
        return (epoch if self.unit == "epoch" else step) >= self._last + self.n

    def fired(self, *, epoch: int, step: int) -> None:
        """The next growth is ``n`` from here."""
        self._last = epoch if self.unit == "epoch" else step

    def restarted(self) -> None:
        """The next growth is ``n`` from the start."""
        self._last = 0

    def __repr__(self) -> str:
        return f"Every({self.n}, {self.unit!r})"
