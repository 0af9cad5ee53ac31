"""Optimizers after a growth: state follows its neurons. The only file that touches ``trainer.strategy``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_split.ranks import Ranks
from lightning_split.surgery import AxisMap, Replacement

__all__ = [
    "TrainerRanks",
    "carry_all",
    "carry_state",
    "refuse_strategy",
    "rewrap",
    "shadow_models",
]

Mode = Literal["transfer", "reset"]
Replaced = Mapping[nn.Parameter, Replacement]
T = TypeVar("T")

# How an entry of the state goes with the gradient g. After a split into copies the gradient of offspring i is
# w_i times the old one (AxisMap.scale), so what is linear in g is multiplied by w_i and what is quadratic by
# w_i². Everything that is not listed (step sizes, averages of the parameter itself) is copied as it is.
_LINEAR = {"exp_avg", "momentum_buffer", "grad_avg", "prev"}
_ABSOLUTE = {"exp_inf"}
_QUADRATIC = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "row_var", "col_var", "variance"}
_PARAMETER = {"ax"}  # ASGD's running average of the parameter: starts anew from the grown parameter


def carry_state(optimizer: Optimizer, replaced: Replaced, mode: Mode = "transfer") -> set[int]:
    """Put grown parameters in the places of the old ones, and let their state follow.

    Number, order and hyper-parameters of the groups stay. Works without a Trainer.

    Args:
        optimizer: Any optimizer (LightningOptimizer is unwrapped).
        replaced: What surgery returned: old parameter -> replacement.
        mode: ``"transfer"`` indexes and scales the entries along the grown axes; ``"reset"`` drops them.

    Returns:
        ``id`` of the new parameters that are now in this optimizer.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    known = type(optimizer).__module__.split(".")[0] == "torch"
    found: dict[nn.Parameter, Replacement] = {}
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            if old in replaced:
                found[old] = replaced[old]
                group["params"][place] = replaced[old].new
    if not found:
        return set()
    if isinstance(optimizer, LBFGS):
        # Its history is one flat vector over all parameters: directions of another space now.
        optimizer.state.clear()
        optimizer._numel_cache = None
        optimizer._params = optimizer.param_groups[0]["params"]
        return {id(r.new) for r in found.values()}
    lost = []
    for old, replacement in found.items():
        new, maps = replacement
        state = optimizer.state.pop(old, None)
        if mode == "reset" or not state:
            continue
        if not known:
            lost.append(new)
            continue
        carried = {
            name: _carried(name, value, old, new, maps) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
        if any(value is _UNKNOWN for value in carried.values()):
            lost.append(new)
        else:
            optimizer.state[new] = carried
    if lost:
        warnings.warn(
            f"The state of {len(lost)} grown parameters in {type(optimizer).__name__} starts anew, because its "
            "layout is not known; training goes on.",
            stacklevel=2,
        )
    return {id(r.new) for r in found.values()}


_UNKNOWN = torch.empty(0)


def _carried(
    name: str, value: Tensor, old: nn.Parameter, new: nn.Parameter, maps: Mapping[int, AxisMap]
) -> Tensor:
    """One entry of the state at the new size; factored entries have size 1 along some axes."""
    if value.ndim == 0:
        return value.clone()
    if name in _PARAMETER:
        return new.detach().clone()
    if value.ndim != old.ndim or any(
        s not in (1, o) for s, o in zip(value.shape, old.shape, strict=True)
    ):
        return _UNKNOWN
    value = value.clone()
    for axis, grew in maps.items():
        if value.shape[axis] != old.shape[axis]:
            continue
        value = value.index_select(axis, grew.index.to(value.device))
        shape = [1] * value.ndim
        shape[axis] = -1
        scale = grew.scale.to(value.device).view(shape)
        if name in _LINEAR:
            value = value * scale.to(value.dtype)
        elif name in _ABSOLUTE:
            value = value * scale.abs().to(value.dtype)
        elif name in _QUADRATIC:
            value = value * scale.square().to(value.dtype)
    return value


def carry_all(
    trainer: pl.Trainer,
    replaced: Replaced,
    optimizer_state: Mode = "transfer",
    lr_schedule: Literal["keep", "restart"] = "keep",
) -> None:
    """Carry all optimizers of a Trainer over a growth, and make sure that what grew is trained.

    With ``lr_schedule="restart"`` the module's ``configure_optimizers`` runs again, so learning rates and
    schedules start anew; with ``optimizer_state="transfer"`` the moments are still kept. Optimizers that a
    module keeps a reference to (manual optimization) are then the old ones.

    Raises:
        RuntimeError: If a grown parameter ended up in no optimizer, or in more than before.
    """
    expected = _placed(trainer.optimizers, replaced.keys())
    for optimizer in trainer.optimizers:
        carry_state(optimizer, replaced, optimizer_state)
    if lr_schedule == "restart":
        before = [getattr(o, "optimizer", o).state for o in trainer.optimizers]
        trainer.strategy.setup_optimizers(trainer)
        if optimizer_state == "transfer":
            for state, optimizer in zip(before, trainer.optimizers, strict=False):
                mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
                optimizer.state.update({p: s for p, s in state.items() if id(p) in mine})
    check_trained(trainer.optimizers, replaced, expected)


def _placed(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> dict[int, int]:
    """How often each parameter occurs in the optimizers, by identity."""
    wanted = {id(p) for p in parameters}
    count: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in wanted:
                    count[id(p)] = count.get(id(p), 0) + 1
    return count


def check_trained(
    optimizers: Iterable[Optimizer], replaced: Replaced, expected: Mapping[int, int]
) -> None:
    """Make sure that new parameters are where old ones were, and no old one is left."""
    optimizers = list(optimizers)
    left = _placed(optimizers, replaced.keys())
    now = _placed(optimizers, (r.new for r in replaced.values()))
    wrong = [r.new for old, r in replaced.items() if now.get(id(r.new), 0) != expected.get(id(old), 0)]
    if left or wrong:
        raise RuntimeError(
            f"After the growth {len(wrong)} grown parameters are missing from the optimizers and {len(left)} old "
            "ones are still in them, so they would not be trained; is an optimizer created outside of "
            "configure_optimizers?"
        )


def refuse_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies under which parameters are not plain tensors of one process.

    Raises:
        MisconfigurationException: Naming the strategy.
    """
    strategy = trainer.strategy
    plain = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    if not plain or strategy.restore_checkpoint_after_setup:
        raise MisconfigurationException(
            f"SplittingCallback cannot grow a network under {type(strategy).__name__}, which shards or "
            "rewrites its parameters; use one device or the 'ddp' strategy."
        )


def rewrap(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Wrap a grown module for DDP anew; nothing to do on one device.

    The old wrapper's reducer knows the old parameters: left in place it fails, or with
    ``find_unused_parameters`` lets the ranks drift apart silently.
    """
    strategy: Any = trainer.strategy
    if strategy.model is pl_module or not isinstance(strategy, DDPStrategy):
        return
    strategy.model = pl_module
    strategy.configure_ddp()
    # Else manual optimization with static_graph never delays the first all-reduce again, and ranks drift.
    strategy._pl_static_graph_delay_done = False


def shadow_models(trainer: pl.Trainer) -> list[nn.Module]:
    """The copies of the module that averaging callbacks (EMA, SWA) hold."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        shadow = getattr(callback, "_average_model", None)
        if isinstance(shadow, nn.Module):
            inner = getattr(shadow, "module", shadow)
            found.append(inner if isinstance(inner, nn.Module) else shadow)
    return found


class TrainerRanks(Ranks):
    """The collectives of a Trainer's strategy; identity on one process."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer

    def mean_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor averaged over the processes."""
        if self._trainer.world_size == 1:
            return tensors
        strategy = self._trainer.strategy
        # reduce works in place on what it is given, and NCCL takes tensors on the device only
        return {
            name: strategy.reduce(t.clone().to(strategy.root_device), reduce_op="mean").to(t.device)
            for name, t in tensors.items()
        }

    def gather_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor concatenated over the processes along its first dimension, in rank order."""
        if self._trainer.world_size == 1:
            return tensors
        strategy = self._trainer.strategy
        return {
            name: strategy.all_gather(t.to(strategy.root_device)).flatten(0, 1).to(t.device)
            for name, t in tensors.items()
        }

    def agree(self, decision: T) -> T:
        """The decision of the first process."""
        if self._trainer.world_size == 1:
            return decision
        agreed: T = self._trainer.strategy.broadcast(decision)
        return agreed
