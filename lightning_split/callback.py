"""The callback: knows when to grow, and delegates how."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_split._compat import Callback, MisconfigurationException
from lightning_split.admission import check_choice, check_least, check_patterns, first_look, refuse_setup
from lightning_split.batches import BatchSupply
from lightning_split.checkpoint import enable_growth
from lightning_split.chronicle import Chronicle
from lightning_split.company import averaging_done, follow, shadow_models, share_buffers
from lightning_split.growers import Grower, SteepestSplitting
from lightning_split.growth import NothingToSplitError, grow
from lightning_split.interrupts import uninterrupted
from lightning_split.lineage import Lineage
from lightning_split.measuring import OnCopies
from lightning_split.monitoring import Monitor
from lightning_split.optim import TrainerRanks, refuse_optimizers
from lightning_split.probing import quiet, step_loss
from lightning_split.report import GrowthReport
from lightning_split.reporting import announce, log_growth
from lightning_split.selection import SelectionStrategy, TopK
from lightning_split.stepsize import StepSize, as_step_size
from lightning_split.triggers import Plateau, Trigger

__all__ = ["SplittingCallback"]

STATE_VERSION = 3


class SplittingCallback(Callback):
    """Grow the network by splitting neurons whenever training stops making progress.

    Add it to the callbacks of any Trainer; the LightningModule stays as it is. When the trigger says so, at
    the start of an epoch or between two optimizer steps, the callback measures on training batches how much
    the loss would fall if each neuron were split, lets the strategy choose, widens the layers in place,
    carries the optimizers' state along and logs the gains. Measuring leaves no trace.

    Note:
        Works with one device and with DDP; other strategies are refused in ``setup``. Modules with manual
        optimization need ``loss_fn``. A ``training_step`` that logs is fine: nothing is logged while probing.

    Args:
        strategy: Which neurons to split: :class:`TopK`, :class:`Threshold`, :class:`KnapsackEnergy` or your
            own :class:`SelectionStrategy`.
        grower: How new neurons are proposed.
        trigger: When to grow; default a :class:`Plateau` of the next five arguments.
        monitor: Name of the logged metric that the default trigger watches.
        mode: ``"min"`` or ``"max"``: which way the metric improves.
        patience: Epochs without improvement before a growth.
        min_delta: What counts as an improvement.
        cooldown: Epochs after a growth before patience counts again.
        step_size: The lengths of the offspring's displacements: ε for all of them, ``"line_search"``, or a
            :class:`Relative`, :class:`LineSearch` or another :class:`~lightning_split.stepsize.StepSize`.
        num_batches: Training batches from which the splitting matrices are estimated.
        confirm_batches: Fresh training batches on which the gains are measured again: 16, 32 … and at most so
            many, until enough gains can be told from noise; 0 does without.
        significance: Only neurons whose gain is more than noise are split: of those, at most this share is
            expected to be no gain. ``None`` splits what looks best. Fewer than eight fresh batches are not
            tested.
        loss_fn: ``loss_fn(pl_module, batch)`` returning the scalar mean loss; default the module's own
            ``training_step``.
        include: Patterns of group names that may grow (see ``print(trace(model, x))``).
        exclude: Patterns of group names that may not grow.
        max_growths: Stop growing after so many growths.
        max_params: Never exceed so many parameters.
        max_macs: Never exceed so many multiply-accumulates per sample.
        stop_when_done: Stop training when the trigger asks for a growth and there is none to be had: nothing
            is worth splitting, or a limit is reached. The last growth still gets its training.
        optimizer_state: ``"transfer"`` lets moments follow their neurons, ``"reset"`` starts them anew.
        lr_schedule: ``"keep"`` lets learning-rate schedules run on, ``"restart"`` starts them anew.
        seed: Makes growths repeatable bit for bit.
        verbose: Print a table and a new model summary for every growth, and at the start what tracing
            could not look at.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        trainer = Trainer(max_epochs=50, callbacks=[SplittingCallback(strategy=TopK(fraction=0.3))])
        trainer.fit(model, loader)
    """

    def __init__(
        self,
        strategy: SelectionStrategy | None = None,
        grower: Grower | None = None,
        trigger: Trigger | None = None,
        monitor: str = "train_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 1e-3,
        cooldown: int = 0,
        step_size: float | str | StepSize = 1e-2,
        num_batches: int = 16,
        confirm_batches: int = 64,
        significance: float | None = 0.01,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        max_growths: int | None = None,
        max_params: int | None = None,
        max_macs: float | None = None,
        stop_when_done: bool = False,
        optimizer_state: Literal["transfer", "reset"] = "transfer",
        lr_schedule: Literal["keep", "restart"] = "keep",
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        check_choice("optimizer_state", optimizer_state, ("transfer", "reset"))
        check_choice("lr_schedule", lr_schedule, ("keep", "restart"))
        check_least("num_batches", num_batches, 1)
        check_least("confirm_batches", confirm_batches, 0)
        check_least("max_growths", max_growths, 0)
        check_least("max_params", max_params, 0)
        check_least("max_macs", max_macs, 0)
        check_patterns("include", include)
        check_patterns("exclude", exclude)
        if significance is not None and not 0 < significance < 1:
            raise ValueError(f"significance must be between 0 and 1, or None, got {significance}.")
        self.strategy = strategy or TopK(fraction=0.3)
        self.grower = grower or SteepestSplitting()
        self.trigger = trigger or Plateau(
            monitor=monitor, mode=mode, patience=patience, min_delta=min_delta, cooldown=cooldown
        )
        self.step_size = as_step_size(step_size)
        self.num_batches = num_batches
        self.confirm_batches = confirm_batches
        self.significance = significance
        self.loss_fn = loss_fn
        self.include = include
        self.exclude = exclude
        self.max_growths = max_growths
        self.max_params = max_params
        self.max_macs = max_macs
        self.stop_when_done = stop_when_done
        self.optimizer_state = optimizer_state
        self.lr_schedule = lr_schedule
        self.seed = seed
        self.verbose = verbose
        self._chronicle = Chronicle()
        self._monitor = Monitor(self.trigger)
        self._supply = BatchSupply(num_batches, confirm_batches)
        self._traced = False
        self._clock = 0  # optimizer steps of the Trainer that was here last
        self._module: weakref.ref[nn.Module] | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """All growths of the run, those before a resume included, as plain numbers and names."""
        return self._chronicle.history

    @property
    def reports(self) -> list[GrowthReport]:
        """The growths of this process, in full."""
        return self._chronicle.reports

    @property
    def lineage(self) -> Lineage:
        """Who descends from whom."""
        return self._chronicle.lineage

    @property
    def barred(self) -> dict[str, str]:
        """Channel groups that are left alone from now on, with the reason."""
        return self._chronicle.barred

    # refusals ---------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._refuse_others(pl_module)
            refuse_setup(trainer, pl_module, own_loss=self.loss_fn is not None)
            self._module = weakref.ref(pl_module)
        # Every stage may load a checkpoint of another width, and a load comes before any other hook of ours.
        enable_growth(pl_module)
        for shadow in shadow_models(trainer):
            enable_growth(shadow)

    def _refuse_others(self, pl_module: pl.LightningModule) -> None:
        known = self._module() if self._module is not None else None
        if self._module is not None and known is not pl_module and (self.history or known is not None):
            raise MisconfigurationException(
                "This SplittingCallback already belongs to another module, whose growths it remembers; "
                "create a new SplittingCallback for each module."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_optimizers(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step < self._clock:  # fitted further by another Trainer, perhaps on other data
            self.trigger.restarted()
            self._monitor.restarted()
            self._supply = BatchSupply(self.num_batches, self.confirm_batches)
            self._traced = False
        self._clock = trainer.global_step

    # when ---------------------------------------------------------------------------------------------

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._monitor.epoch_starts(trainer)
        self._grow_if_due(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._traced:
            self._first_look(trainer, pl_module, batch)
        self._monitor.batch_starts(trainer)
        # A gradient under accumulation belongs to the old sizes: grow where Lightning zeroes it.
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._grow_if_due(trainer, pl_module)
        # Only now, because a resumed run may catch up here on a growth that was due when the epoch started.
        if not self._exhausted():
            self._supply.saw(trainer, batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._monitor.batch_ends(trainer)
        self._clock = trainer.global_step

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._monitor.validation_ends(trainer)

    def _grow_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or averaging_done(trainer):
            return
        exhausted = self._exhausted()
        if exhausted and not self.stop_when_done:
            return
        epoch, step = trainer.current_epoch, trainer.global_step
        if not self.trigger.due(epoch=epoch, step=step):
            return
        if exhausted:
            self._stop(trainer, pl_module, f"max_growths={self.max_growths} is reached")
            return
        self._grow_now(trainer, pl_module, epoch, step)

    @uninterrupted()  # from the first pass until optimizers and records know of the growth
    def _grow_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, step: int) -> None:
        batches = self._supply.take(trainer, pl_module, self._growth_seed)
        if batches is None:
            return  # not enough went by yet; due stays due
        try:
            report = self._grow(trainer, pl_module, *batches)
        except NothingToSplitError as error:
            if not error.frozen:  # it was otherwise on the first batch
                rank_zero_warn(f"A growth was due, and training goes on without it: {error}")
            self.trigger.fired(epoch=epoch, step=step)  # look again when the trigger says so again
            return
        self.trigger.fired(epoch=epoch, step=step)
        self._record(trainer, pl_module, report)
        if self.stop_when_done and not report.splits:
            self._stop(trainer, pl_module, "no split is worth its cost and within the limits")

    def _stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule, why: str) -> None:
        if self.verbose and not trainer.should_stop:
            pl_module.print(f"Growth is done, and training stops: {why}.")
        trainer.should_stop = True

    def _exhausted(self) -> bool:
        return self.max_growths is not None and self._chronicle.num_growths >= self.max_growths

    # how ----------------------------------------------------------------------------------------------

    def _first_look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        look = first_look(
            trainer,
            pl_module,
            batch,
            loss_fn=self._loss(trainer, pl_module),
            grower=self.grower,
            include=self.include,
            exclude=self.exclude,
            barred=self.barred,
            followers=self._chronicle.followers,
            seed=self._growth_seed,
        )
        if self.verbose and look.note:
            pl_module.print(f"Growth: {look.note}")
        self._chronicle.begin(look.widths, look.barred, look.followers)
        self._supply.begins(trainer, self._growth_seed)
        self._traced = True

    @property
    def _growth_seed(self) -> int:
        """Another one for every growth, the same after a resume."""
        return self.seed + len(self.history)

    def _loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[[nn.Module, Any], Tensor]:
        return OnCopies(self.loss_fn if self.loss_fn is not None else step_loss(trainer, pl_module))

    def _grow(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batches: list[Any],
        fresh: Iterable[Any] | None,
    ) -> GrowthReport:
        share_buffers(trainer)
        with quiet(trainer, pl_module, seed=self._growth_seed):
            report = grow(
                pl_module,
                batches,
                self._loss(trainer, pl_module),
                grower=self.grower,
                strategy=self.strategy,
                step_size=self.step_size,
                confirm_batches=fresh,
                significance=self.significance,
                include=self.include,
                exclude=self.exclude,
                barred=self.barred,
                followers=self._chronicle.followers,
                max_params=self.max_params,
                max_macs=self.max_macs,
                seed_cost=self._chronicle.seed_cost,
                seed=self._growth_seed,
                ranks=TrainerRanks(trainer),
            )
        if report.splits:
            follow(trainer, pl_module, report, self.optimizer_state, self.lr_schedule)
        return report

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, report: GrowthReport) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        number = self._chronicle.record(report, epoch=trainer.current_epoch, step=step)
        log_growth(trainer, report, self.history)
        if self.verbose:
            announce(trainer, pl_module, report, number)

    # state --------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        return "lightning_split.SplittingCallback"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            **self._chronicle.state_dict(),
            "trigger": deepcopy(self.trigger.state_dict()),
            "strategy": deepcopy(self.strategy.state_dict()),
            "monitor": self._monitor.state_dict(),
            "batches": self._supply.state_dict(),
        }

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # What the trigger has yet to see, the resumed Trainer will have forgotten.
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            state["monitor"] = self._monitor.state_now(trainer)
            if not self._exhausted():
                state["batches"] = self._supply.state_now(trainer)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        version = state_dict.get("version")
        if version != STATE_VERSION:
            raise MisconfigurationException(
                f"The checkpoint's SplittingCallback state has version {version}, this release reads version "
                f"{STATE_VERSION}; resume it with the release that wrote it."
            )
        self._chronicle.load_state_dict(state_dict)
        self.trigger.load_state_dict(state_dict["trigger"])
        self.strategy.load_state_dict(state_dict["strategy"])
        self._monitor.load_state_dict(state_dict["monitor"])
        self._supply.load_state_dict(state_dict["batches"])
        self._clock = 0  # what the Trainer resumes from belongs to this state
