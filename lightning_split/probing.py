"""Extra passes over training batches that a running Trainer does not notice."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from lightning_split.measuring import isolated_rng, undisturbed

__all__ = [
    "BatchBuffer",
    "quiet",
    "refuse_unprobeable",
    "step_loss",
    "to_device",
    "training_batches",
]

_MOST_BATCHES = 4096  # index lists looked at per replay, so that an endless sampler ends


@contextmanager
def quiet(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Run the module's own code without the Trainer taking note.

    Inside, ``self.log`` does nothing on any nested LightningModule, loggers are dummies and the random state
    is borrowed. What single passes change in the model is
    :func:`~lightning_split.measuring.undisturbed`'s business.
    """
    modules = [m for m in pl_module.modules() if isinstance(m, pl.LightningModule)]
    loggers, fx_name = list(trainer.loggers), pl_module._current_fx_name
    with ExitStack() as stack:
        stack.enter_context(isolated_rng())
        stack.callback(setattr, trainer, "loggers", loggers)
        stack.callback(setattr, pl_module, "_current_fx_name", fx_name)
        for module in modules:
            for name in ("log", "log_dict"):
                stack.callback(_put_back, vars(module), name, vars(module).get(name))
                vars(module)[name] = _ignore
        trainer.loggers = [DummyLogger()] if loggers else []
        yield


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``self.log`` while probing."""


def _put_back(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def training_batches(trainer: pl.Trainer, num: int, *, seed: int) -> list[Any] | None:
    """Some batches of the training data, drawn without touching the training loader's iterators.

    The samplers are asked for their index lists again, some lists are chosen at random, and their samples
    are read and collated in this process; workers and the running iterator are not involved. Random states
    of the loaders' generators are restored.

    Args:
        trainer: A Trainer inside ``fit``.
        num: How many batches; fewer come back if an epoch has fewer.
        seed: The same seed draws the same batches, another seed others.

    Returns:
        The batches, on the CPU, shaped as the Trainer's own; ``None`` if a loader cannot be replayed
        (an iterable data set, a loader of one's own making).
    """
    combined: CombinedLoader | None = trainer.fit_loop._combined_loader
    if combined is None or combined._mode == "sequential":
        return None
    loaders = combined.flattened
    if not loaders or not all(map(_replayable, loaders)):
        return None
    with isolated_rng(seed), ExitStack() as stack:
        columns = []
        for loader in loaders:
            for generator in _generators(loader):
                stack.callback(generator.set_state, generator.get_state())
                generator.manual_seed(seed)
            columns.append(_replay(loader, num, seed))
    if not all(columns):
        return None
    count = max(map(len, columns))
    return [
        tree_unflatten([column[i % len(column)] for column in columns], combined._spec)
        for i in range(count)
    ]


def _replayable(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(loader.dataset, "__getitem__")
        and not hasattr(loader, "state_dict")  # a stateful loader counts what it hands out
    )


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    holders = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _replay(loader: DataLoader[Any], num: int, seed: int) -> list[Any]:
    dataset: Any = loader.dataset
    source: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    lists = list(islice(iter(source), _MOST_BATCHES))
    # A sequential sampler would give the first batches every time: choose among all of an epoch's.
    chosen = np.random.default_rng(seed).permutation(len(lists))[:num]
    batches = []
    for place in chosen.tolist():
        indices = lists[place]
        if loader.batch_sampler is None:
            samples = dataset[indices]
        elif hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(indices)
        else:
            samples = [dataset[i] for i in indices]
        batches.append(loader.collate_fn(samples))
    return batches


class BatchBuffer:
    """The last few training batches, for loaders that cannot be replayed."""

    def __init__(self, size: int) -> None:
        self._batches: deque[Any] = deque(maxlen=max(1, size))

    def add(self, batch: Any) -> None:
        """Keep a copy of a batch."""
        self._batches.append(tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, batch))

    def batches(self) -> list[Any]:
        """What is kept, oldest first."""
        return list(self._batches)


def to_device(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """What the Trainer does to a batch before ``training_step`` sees it."""
    with undisturbed(pl_module, train=None, seed=None):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def step_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule
) -> Callable[[nn.Module, Any], Tensor]:
    """The module's own ``training_step`` as a ``loss_fn(model, batch)``, under the Trainer's precision."""
    takes_index = "batch_idx" in inspect.signature(pl_module.training_step).parameters

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        step: Any = model.training_step
        with trainer.precision_plugin.train_step_context():
            output = step(batch, batch_idx=0) if takes_index else step(batch)
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.training_step returned {type(output).__name__} without a loss, so "
                "splitting has nothing to go by; pass SplittingCallback(loss_fn=...) with a function "
                "loss_fn(pl_module, batch) that returns the mean loss."
            )
        return loss

    return loss_fn


def refuse_unprobeable(pl_module: pl.LightningModule) -> None:
    """Refuse modules whose ``training_step`` cannot be run for measurement.

    Raises:
        MisconfigurationException: Asking for ``loss_fn``.
    """
    name = type(pl_module).__name__
    why = None
    if not pl_module.automatic_optimization:
        why = "uses manual optimization, so its training_step would take optimizer steps"
    elif "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        why = "takes a dataloader_iter in training_step, so a single batch cannot be passed to it"
    if why is not None:
        raise MisconfigurationException(
            f"{name} {why}; pass SplittingCallback(loss_fn=...) with a function loss_fn(pl_module, batch) that "
            "returns the mean loss."
        )
