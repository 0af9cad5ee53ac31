"""Optimizers after a growth: state follows its neurons. The only file to touch trainer.strategy."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_split._compat import MisconfigurationException, twins
from lightning_split.architecture import Architecture
from lightning_split.checkpoint import growth_enabled
from lightning_split.effective import own_parameters
from lightning_split.interrupts import uninterrupted
from lightning_split.ranks import Ranks
from lightning_split.surgery import AxisMap, Replacement

__all__ = [
    "TrainerRanks",
    "carry_all",
    "carry_state",
    "check_trained",
    "interfaces",
    "refuse_optimizers",
    "refuse_strategy",
]

Mode = Literal["transfer", "reset"]
Replaced = Mapping[nn.Parameter, Replacement]
T = TypeVar("T")

_LIGHTNING_OPTIMIZER = twins("core.optimizer.LightningOptimizer")
_DDP = twins("strategies.DDPStrategy")
_PLAIN = (*twins("strategies.SingleDeviceStrategy"), *_DDP)

# How the entries of torch.optim's states go with the gradient. The gradient of a new entry is s
# times that of the entry that it copies (s = AxisMap.scale), hence so is every average of
# gradients, s² times every average of their squares. An entry that is not listed cannot be scaled:
# its parameter starts anew.
_SCALING: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg", "prev"), lambda s: s),
    "exp_inf": torch.abs,  # Adamax: running maximum of |g|
    **dict.fromkeys(
        ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance", "row_var", "col_var"),
        torch.square,
    ),
    # Rprop's own step length, and Adadelta's squared updates: neither changes when g is rescaled.
    **dict.fromkeys(("step_size", "acc_delta"), torch.ones_like),
}
# ASGD's running average of the parameter itself. Copies would add up in a consumer, whose columns
# surgery has divided, so the average goes on from the grown parameter.
_PARAMETER_AVERAGE = "ax"
# Adafactor's two factors of the second moment, by the axis that each is a mean over (size 1).
_FACTORED = {"row_var": -1, "col_var": -2}


class _UnknownEntryError(Exception):
    """An entry of an optimizer's state that cannot follow its parameter."""


@uninterrupted()
def carry_state(optimizer: Optimizer, replaced: Replaced, mode: Mode = "transfer") -> None:
    """Put grown parameters in the places of the old ones, and let their state follow.

    Works on any optimizer, without a Trainer. Number, order and hyper-parameters of the groups
    stay, and so do learning-rate schedulers and whoever else holds the optimizer. Parameters are
    told apart by identity. The state is transferred for the classes of ``torch.optim`` only: others
    may keep blocks that look like moments and are not, so there the state of grown parameters
    starts anew, with a warning. LBFGS always starts anew, because its history consists of vectors
    over all parameters at once.

    Args:
        optimizer: Any optimizer; a LightningOptimizer is unwrapped.
        replaced: What surgery returned: old parameter -> replacement.
        mode: ``"transfer"`` copies the entries along the grown axes and rescales them as the
            gradient is rescaled; ``"reset"`` drops them.
    """
    optimizer = _unwrapped(optimizer)
    found: dict[nn.Parameter, Replacement] = {
        p: replaced[p] for group in optimizer.param_groups for p in group["params"] if p in replaced
    }
    if not found:
        return
    carried: dict[Tensor, dict[str, Any]] = {}
    lost: list[str] = []
    for old, replacement in found.items():
        state = optimizer.state.get(old)
        if mode == "reset" or not state or replacement.anew or isinstance(optimizer, LBFGS):
            continue
        try:
            if not type(optimizer).__module__.startswith("torch.optim"):
                raise _UnknownEntryError(f"{type(optimizer).__name__} is not a class of torch.optim")
            carried[replacement.new] = _carried(state, old, replacement)
        except _UnknownEntryError as error:
            lost.append(str(error))
    # All new state exists: from here on nothing can fail half-way.
    for group in optimizer.param_groups:
        for place, p in enumerate(group["params"]):
            if p in found:
                group["params"][place] = found[p].new
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
        optimizer._numel_cache = None
        optimizer._params = optimizer.param_groups[0]["params"]
    for old in found:
        optimizer.state.pop(old, None)
    optimizer.state.update(carried)
    if lost:
        warnings.warn(
            f"The {type(optimizer).__name__} state of {len(lost)} grown parameters starts anew, "
            f"because {lost[0]}; optimizer_state='reset' does that without this warning.",
            stacklevel=2,
        )


def _unwrapped(optimizer: Any) -> Optimizer:
    # Its class imitates the wrapped one, but only the inner object has the live state.
    inner: Optimizer = optimizer.optimizer if isinstance(optimizer, _LIGHTNING_OPTIMIZER) else optimizer
    return inner


def _carried(state: Mapping[str, Any], old: nn.Parameter, replacement: Replacement) -> dict[str, Any]:
    """The state of one parameter at its new size."""
    new, maps, _ = replacement
    carried: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            carried[name] = value
        elif value.ndim == 0:  # step counters and the like
            carried[name] = value.clone()
        elif name == _PARAMETER_AVERAGE:
            carried[name] = new.detach().clone().to(value.dtype)
        elif name not in _SCALING or value.shape != _expected_shape(name, old):
            raise _UnknownEntryError(f"its entry '{name}' of shape {tuple(value.shape)} has no known meaning")
        else:
            carried[name] = _along_axes(name, value, maps)
    if _FACTORED.keys() <= carried.keys():
        taken = {name: carried[name] for name in _FACTORED}
        for name, other in (("row_var", "col_var"), ("col_var", "row_var")):
            axis = _FACTORED[name] % old.ndim
            if axis in maps:
                # A factor that is a mean over this axis follows the other's mean along it: exact
                # where the squared gradient is the product of its factors, which is what Adafactor
                # assumes.
                rest = {a: m for a, m in maps.items() if a != axis}
                before = _along_axes(other, state[other], rest).mean(axis, keepdim=True)
                after = taken[other].mean(axis, keepdim=True)
                carried[name] = taken[name] * torch.where(before > 0, after / before, 1)
    return carried


def _expected_shape(name: str, old: nn.Parameter) -> tuple[int, ...]:
    shape = list(old.shape)
    if name in _FACTORED:
        shape[_FACTORED[name]] = 1
    return tuple(shape)


def _along_axes(name: str, value: Tensor, maps: Mapping[int, AxisMap]) -> Tensor:
    """An entry copied and rescaled along the grown axes, but for the one it is a mean over."""
    for axis, grew in maps.items():
        if name in _FACTORED and axis == _FACTORED[name] % value.ndim:
            continue
        value = value.index_select(axis, grew.index.to(value.device))
        scale = _SCALING[name](grew.scale).to(value)  # cast first: float64 would promote the state
        value = value * scale.view([-1 if a == axis else 1 for a in range(value.ndim)])
    return value


def carry_all(
    trainer: pl.Trainer,
    replaced: Replaced,
    optimizer_state: Mode = "transfer",
    lr_schedule: Literal["keep", "restart"] = "keep",
) -> None:
    """Carry all optimizers of a Trainer over a growth, and make sure that what grew is trained.

    With ``lr_schedule="restart"`` the module's ``configure_optimizers`` runs again, on the grown
    module, so that learning rates and schedules start anew. It makes new optimizers; with
    ``optimizer_state="transfer"`` each gets the state that its predecessor has just carried over,
    for the parameters that both hold. What the old optimizers had besides is gone: groups added
    while training (BaseFinetuning) and references that a module keeps to them (manual
    optimization). The check in the end catches the first. ``"keep"`` has no such limits.

    Args:
        trainer: A Trainer inside ``fit``.
        replaced: What surgery returned: old parameter -> replacement.
        optimizer_state: See :func:`carry_state`.
        lr_schedule: Whether schedules run on or start anew.

    Raises:
        MisconfigurationException: From :func:`refuse_optimizers`, before anything changes.
        RuntimeError: If a grown parameter is not where the old one was.
    """
    refuse_optimizers(trainer)
    before = [_unwrapped(o) for o in trainer.optimizers]
    expected = _occurrences(before)
    for optimizer in before:
        carry_state(optimizer, replaced, optimizer_state)
    if lr_schedule == "restart":
        _restart(trainer, before, optimizer_state)
    check_trained(trainer.optimizers, replaced, expected)


def _restart(trainer: pl.Trainer, before: list[Optimizer], optimizer_state: Mode) -> None:
    for optimizer in before:
        # A module may return the very same optimizer again, whose rates schedulers have changed.
        for group in optimizer.param_groups:
            group["lr"] = group.pop("initial_lr", group.get("lr"))
    trainer.strategy.setup_optimizers(trainer)
    for old, current in zip(before, trainer.optimizers, strict=False):
        new = _unwrapped(current)
        if optimizer_state == "transfer" and new is not old and type(new) is type(old):
            mine = _occurrences([new])
            new.state.update({p: state for p, state in old.state.items() if id(p) in mine})


def check_trained(optimizers: Iterable[Any], replaced: Replaced, expected: Mapping[int, int]) -> None:
    """Make sure that new parameters are in the optimizers as often as the old ones were.

    Args:
        optimizers: All optimizers, after the growth.
        replaced: What surgery returned.
        expected: How often each old parameter, by its ``id``, was in the optimizers before.

    Raises:
        RuntimeError: Otherwise: the network would go on training without its new neurons, silently.
    """
    now = _occurrences(map(_unwrapped, optimizers))
    left = sum(id(old) in now for old in replaced)
    missing = sum(now[id(r.new)] != expected.get(id(old), 0) for old, r in replaced.items())
    if left or missing:
        raise RuntimeError(
            f"After the growth {missing} grown parameters are not in the optimizers as often as "
            f"before and {left} old ones still are, so the growth would not be trained; let "
            "configure_optimizers create its optimizers from the module's current parameters, or "
            "choose lr_schedule='keep'."
        )


def _occurrences(optimizers: Iterable[Optimizer]) -> Counter[int]:
    """How often each parameter, by its ``id``, occurs in the optimizers."""
    return Counter(id(p) for o in optimizers for group in o.param_groups for p in group["params"])


def interfaces(trainer: pl.Trainer, pl_module: pl.LightningModule, arch: Architecture) -> dict[str, str]:
    """Channel groups between two networks that different optimizers train, with the reason to leave them.

    The images between generator and discriminator look like hidden neurons to the generator's loss, but
    the discriminator's loss, which nobody measures, reads real ones beside them.
    """
    owner: dict[int, set[int]] = defaultdict(set)
    for number, optimizer in enumerate(map(_unwrapped, trainer.optimizers)):
        for group in optimizer.param_groups:
            for p in group["params"]:
                owner[id(p)].add(number)
    layers = dict(pl_module.named_modules())

    def owners(paths: Iterable[str]) -> set[int]:
        found = (p for path in paths if path in layers for p in own_parameters(layers[path]))
        return set().union(*(owner[id(p)] for p in found))

    between = {}
    for channels in arch.groups:
        making, reading = owners(channels.producers), owners(channels.consumers)
        if making and reading and not making & reading:
            between[channels.name] = (
                "different optimizers train its producers and its consumers, so a loss that was not measured "
                "may read it beside data of its present width"
            )
    return between


def refuse_optimizers(trainer: pl.Trainer) -> None:
    """Refuse optimizers that shard their state over processes; ask once they exist.

    Raises:
        MisconfigurationException: Naming the optimizer.
    """
    for optimizer in map(_unwrapped, trainer.optimizers):
        if hasattr(optimizer, "consolidate_state_dict"):
            raise MisconfigurationException(
                f"SplittingCallback cannot carry {type(optimizer).__name__} over a growth, because "
                "it shards its state over processes by parameter; use the plain optimizer that it "
                "wraps."
            )


def refuse_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies whose parameters are not plain tensors, or that would lose a growth.

    Raises:
        MisconfigurationException: Naming the strategy.
    """
    strategy: Any = trainer.strategy
    plain = isinstance(strategy, _PLAIN)
    # The flag marks strategies that shard, and that load weights too late to be resized.
    if not plain or strategy.restore_checkpoint_after_setup:
        raise MisconfigurationException(
            f"SplittingCallback cannot grow a network under {type(strategy).__name__}, which "
            "shards or rewrites its parameters; use one device or the 'ddp' strategy."
        )
    method = getattr(strategy, "_start_method", "popen")
    if method != "popen" and not growth_enabled(trainer.lightning_module):
        # The main process gets the grown weights back for its seed-sized module, where no callback
        # runs.
        raise MisconfigurationException(
            f"Under {type(strategy).__name__} with start method '{method}' the grown weights come "
            "back to a process where no callback runs; call lightning_split.enable_growth(self) at "
            f"the end of {type(trainer.lightning_module).__name__}.__init__, or use strategy 'ddp'."
        )


class TrainerRanks(Ranks):
    """The collectives of a Trainer's strategy; identity on one process.

    Every rank must pass the same names with the same shapes.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer

    @property
    def is_first(self) -> bool:
        """Whether this is the process that the others follow."""
        return bool(self._trainer.global_rank == 0)

    def mean_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor averaged over the processes, in one collective per dtype and device."""
        if self._trainer.world_size == 1:
            return tensors
        strategy = self._trainer.strategy
        alike: dict[tuple[torch.dtype, torch.device], list[str]] = defaultdict(list)
        for name, t in tensors.items():
            alike[t.dtype, t.device].append(name)
        mean: dict[str, Tensor] = {}
        for (_, device), names in alike.items():
            # reduce works in place, so on this copy; and NCCL takes tensors on the device only
            flat = torch.cat([tensors[name].flatten() for name in names]).to(strategy.root_device)
            flat = strategy.reduce(flat, reduce_op="mean").to(device)
            parts = flat.split([tensors[name].numel() for name in names])
            mean |= {name: part.view_as(tensors[name]) for name, part in zip(names, parts, strict=True)}
        return {name: mean[name] for name in tensors}

    def gather_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor concatenated over the processes along its first dimension, in rank order."""
        if self._trainer.world_size == 1:
            return tensors
        strategy = self._trainer.strategy
        gathered = {}
        for name, t in tensors.items():
            # A sum in which each rank fills its own row is exact; all_gather is deprecated.
            rows = torch.zeros(self._trainer.world_size, *t.shape, dtype=t.dtype, device=strategy.root_device)
            rows[self._trainer.global_rank] = t
            gathered[name] = strategy.reduce(rows, reduce_op="sum").flatten(0, 1).to(t.device)
        return gathered

    def collect(self, mine: T) -> list[T]:
        """What each process has, in rank order: anything that pickles."""
        if self._trainer.world_size == 1:
            return [mine]
        strategy = self._trainer.strategy
        return [strategy.broadcast(mine, src=rank) for rank in range(self._trainer.world_size)]

    def agree(self, decision: T) -> T:
        """The decision of the first process."""
        if self._trainer.world_size == 1:
            return decision
        agreed: T = self._trainer.strategy.broadcast(decision)
        return agreed
