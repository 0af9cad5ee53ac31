"""Extra passes over training batches that a running Trainer does not notice.

What a pass changes in the module itself (buffers, metric states, attributes, gradients, modes) is
undone by :func:`lightning_split.measuring.undisturbed`; this file minds what lies around it: the
Trainer, its loggers, its data pipeline and everybody's random state.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lightning_split._compat import MisconfigurationException, is_module, is_trainer, overrides
from lightning_split.interrupts import give_way, uninterrupted
from lightning_split.measuring import copied, isolated_rng, undisturbed

__all__ = [
    "BatchBuffer",
    "quiet",
    "refuse_unprobeable",
    "step_loss",
    "to_device",
    "training_batches",
]

_MOST_BATCHES = 4096  # index lists looked at per replay, so that a huge or endless sampler ends
_MOST_ITEMS = 64  # entries of a container in which generators are looked for
_DEPTH = 5  # attributes of attributes: loader.sampler.dataset._sampler.generator


@contextmanager
def quiet(trainer: pl.Trainer, pl_module: pl.LightningModule, *, seed: int | None = 0) -> Iterator[None]:
    """Run the module's own code without the Trainer taking note.

    Inside, ``log`` and ``log_dict`` do nothing on any nested LightningModule, the loggers are
    dummies, and the random state is borrowed: that of torch, NumPy and Python, and of every
    generator that the module, the datamodule or a nested module holds. The network may be grown
    inside; passes that run the module belong into
    :func:`~lightning_split.measuring.undisturbed` besides.

    Args:
        trainer: A Trainer inside ``fit``.
        pl_module: Its module.
        seed: Where the random state starts inside. Lightning does not restore it on resume, so with
            ``None``, which lets it run on, a resumed run measures with other draws.
    """
    modules = [m for m in pl_module.modules() if is_module(m)]
    owners = [*pl_module.modules(), getattr(trainer, "datamodule", None)]
    with uninterrupted(), ExitStack() as stack:
        stack.enter_context(isolated_rng(seed))
        stack.enter_context(_borrowed_generators(owners, seed, depth=2))
        for owner, name in [
            (trainer, "_loggers"),
            (trainer, "should_stop"),
            *((m, "_current_fx_name") for m in modules),
        ]:
            stack.callback(setattr, owner, name, getattr(owner, name))
        for attributes in map(vars, modules):
            for name in ("log", "log_dict"):
                if name in attributes:
                    stack.callback(attributes.__setitem__, name, attributes[name])
                else:
                    stack.callback(attributes.pop, name, None)
                attributes[name] = _ignore
        trainer.loggers = [DummyLogger()] if trainer.loggers else []
        yield


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``self.log`` while probing."""


# random state that objects hold -------------------------------------------------------------------


@contextmanager
def _borrowed_generators(roots: Iterable[Any], seed: int | None, *, depth: int = _DEPTH) -> Iterator[None]:
    """Restore the state of the generators that objects hold; inside they start from the seed."""
    with ExitStack() as stack:
        for source in _held(roots, _is_generator, depth):
            if isinstance(source, torch.Generator):
                stack.callback(source.set_state, source.get_state())
            elif isinstance(source, random.Random):
                stack.callback(source.setstate, source.getstate())
            elif isinstance(source, np.random.RandomState):
                stack.callback(source.set_state, source.get_state())
            else:
                stack.callback(setattr, source.bit_generator, "state", source.bit_generator.state)
            if seed is not None:
                _start(source, seed)
        yield


def _is_generator(value: Any) -> bool:
    kinds = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
    return isinstance(value, kinds)


def _start(source: Any, seed: int) -> None:
    if isinstance(source, torch.Generator):
        source.manual_seed(seed)
    elif isinstance(source, (random.Random, np.random.RandomState)):
        source.seed(seed % 2**32)
    else:
        source.bit_generator.state = type(source.bit_generator)(seed).state


def _held(roots: Iterable[Any], wanted: Callable[[Any], bool], depth: int = _DEPTH) -> list[Any]:
    """The wanted objects among some roots, their attributes and their attributes' attributes."""
    found: list[Any] = []
    seen: set[int] = set()
    level = list(roots)
    for _ in range(depth + 1):
        below: list[Any] = []
        for value in level:
            if id(value) in seen or isinstance(value, (Tensor, np.ndarray, str, bytes, type)):
                continue
            seen.add(id(value))
            if wanted(value):
                found.append(value)
            if isinstance(value, dict):
                below += islice(value.values(), _MOST_ITEMS)
            elif isinstance(value, (list, tuple)):
                below += value[:_MOST_ITEMS]
            elif isinstance(value, functools.partial):
                below += [value.func, *value.args, *value.keywords.values()]
            elif not (is_trainer(value) or isinstance(value, torch.Generator)):
                below += getattr(value, "__dict__", {}).values()
                below.append(getattr(value, "__self__", None))  # of a bound method
        level = below
    return found


# batches ------------------------------------------------------------------------------------------


def training_batches(trainer: pl.Trainer, num: int, *, seed: int, skip: int = 0) -> list[Any] | None:
    """Some batches of the training data, drawn without touching the running loader.

    Replays the samplers: each one is asked for the index lists of an epoch once more, some of the
    lists are chosen at random, and only their samples are read and collated, in this process. So a
    loader that does not shuffle still gives other batches for another seed, and batches whose place
    in training was never reached (``limit_train_batches``) are not used. At most the first 4096
    lists are looked at. The last batch of an epoch is left out if it is smaller than the others,
    because batches count alike. Under a distributed sampler each rank replays its own shard.

    Workers, the running iterator, the random state, the samplers' attributes and all generators
    that loader, samplers, data set and collate function hold are left as they are.

    Args:
        trainer: A Trainer inside ``fit``.
        num: How many batches; fewer come back if an epoch has fewer. Of several loaders the shorter
            ones are cycled.
        seed: The same seed draws the same batches again, as long as the samplers' own attributes
            (an epoch number, a list shuffled in place) are the same; another seed draws others.
        skip: Leave out so many of the batches that the seed draws, to go on where another call ended.

    Returns:
        Different batches in random order, on the CPU, structured as the Trainer's own; ``None`` if
        a loader cannot be replayed: an iterable data set, a stateful loader, one of one's own
        making, one whose workers are initialised by a function of one's own, or a combination in
        sequential mode.
    """
    combined: CombinedLoader | None = trainer.fit_loop._combined_loader
    if combined is None or combined._mode == "sequential":
        return None
    loaders = combined.flattened
    if not loaders or not all(map(_is_replayable, loaders)):
        return None
    limits = combined.limits or [_MOST_BATCHES] * len(loaders)
    roots = [
        part
        for dl in loaders
        for part in (dl.generator, dl.sampler, dl.batch_sampler, dl.dataset, dl.collate_fn)
    ]
    with (
        uninterrupted(),
        isolated_rng(seed),
        _kept_samplers(roots),
        _borrowed_generators(roots, seed),
    ):
        columns = [
            _replayed(dl, slice(skip, skip + num), int(min(limit, _MOST_BATCHES)), seed)
            for dl, limit in zip(loaders, limits, strict=True)
        ]
    count = (min if combined._mode == "min_size" else max)(map(len, columns))
    if not all(columns):
        return [] if skip else None
    return [
        tree_unflatten([column[i % len(column)] for column in columns], combined._spec) for i in range(count)
    ]


def _is_replayable(loader: Any) -> bool:
    if not isinstance(loader, DataLoader) or hasattr(loader, "state_dict"):
        return False  # a stateful loader counts what it hands out
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return False
    init: Any = loader.worker_init_fn
    init = init.func if isinstance(init, functools.partial) else init
    lightnings = getattr(init, "__name__", "") == "pl_worker_init_function"
    if loader.num_workers > 0 and init is not None and not lightnings:
        return False  # it may open what the data set reads from, in the workers only
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return not any(isinstance(sampler, Iterator) for sampler in samplers)  # asking uses it up


def _index_source(loader: DataLoader[Any]) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


@contextmanager
def _kept_samplers(roots: Iterable[Any]) -> Iterator[None]:
    """Restore the attributes of samplers, which may count epochs or shuffle a list in place.

    The list that a distributed wrapper keeps of its sampler's indices is even read by the running
    iterator.
    """
    kept = []
    for sampler in _held(roots, _samples):
        attributes = dict(vars(sampler))
        contents = [
            (value, value.clone() if isinstance(value, Tensor) else copy(value))
            for value in attributes.values()
            if isinstance(value, (list, dict, set, deque, Tensor, np.ndarray))
        ]
        kept.append((vars(sampler), attributes, contents))
    try:
        yield
    finally:
        for live, attributes, contents in kept:
            live.clear()
            live.update(attributes)
            for value, content in contents:
                _refill(value, content)


def _samples(value: Any) -> bool:
    return isinstance(value, Sampler) or isinstance(getattr(value, "_sampler", None), Sampler)


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, (Tensor, np.ndarray)):
        value[...] = content
        return
    value.clear()
    (value.extend if isinstance(value, (list, deque)) else value.update)(content)


def _replayed(loader: DataLoader[Any], which: slice, limit: int, seed: int) -> list[Any]:
    dataset: Any = loader.dataset
    lists = list(islice(iter(_index_source(loader)), limit))
    if loader.batch_sampler is not None and loader.batch_size is not None:
        lists = [found for found in lists if len(found) == loader.batch_size] or lists
    # The same choice for every loader: where two loaders run side by side, they stay so.
    chosen = np.random.default_rng(seed).permutation(len(lists))[which]
    batches = []
    for indices in (lists[place] for place in chosen.tolist()):
        give_way()
        if loader.batch_sampler is None:
            samples = dataset[indices]
        elif getattr(dataset, "__getitems__", None):
            samples = dataset.__getitems__(indices)
        else:
            samples = [dataset[i] for i in indices]
        batches.append(loader.collate_fn(samples))
    return batches


class BatchBuffer:
    """The last few training batches, for loaders that cannot be replayed.

    Args:
        size: How many batches are kept, on the device where they are.
    """

    def __init__(self, size: int) -> None:
        self._batches: deque[Any] = deque(maxlen=max(1, size))

    def add(self, batch: Any) -> None:
        """Keep a copy of a batch: any nesting of containers and objects, its tensors detached and cloned."""
        self._batches.append(copied(batch))

    def batches(self) -> list[Any]:
        """What is kept, oldest first."""
        return list(self._batches)


def to_device(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """A batch as ``training_step`` gets it: converted, hooked and on the device."""
    with undisturbed(pl_module, train=None, seed=None):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


# the loss -----------------------------------------------------------------------------------------


def step_loss(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[[nn.Module, Any], Tensor]:
    """The module's own ``training_step`` as a ``loss_fn(model, batch)``.

    Runs under the Trainer's precision and with batch index 0, and returns the loss as it is: not
    divided by ``accumulate_grad_batches``, and of this process only. Raises a
    MisconfigurationException if there is no scalar to differentiate.
    """
    owner = type(pl_module).__name__
    # Lightning's own rule: the second argument is the index, whatever its name.
    takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        step: Any = model.training_step
        with trainer.precision_plugin.train_step_context():
            output = step(batch, 0) if takes_index else step(batch)
        loss = output.get("loss") if isinstance(output, dict) else output
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            return loss.reshape(())
        if not isinstance(loss, Tensor):
            missing = isinstance(output, dict) and "loss" not in output
            wrong = "a dict without 'loss'" if missing else f"{type(loss).__name__} as its loss"
        elif loss.numel() != 1:
            wrong = f"a loss of shape {tuple(loss.shape)} instead of a scalar"
        else:
            wrong = "a loss without gradient"
        raise MisconfigurationException(
            f"{owner}.training_step returned {wrong}, so splitting has nothing to go by; {_ASK_FOR_LOSS_FN}"
        )

    return loss_fn


_ASK_FOR_LOSS_FN = (
    "pass SplittingCallback(loss_fn=...) with a function loss_fn(pl_module, batch) that returns "
    "the mean loss."
)


def refuse_unprobeable(pl_module: pl.LightningModule) -> None:
    """Refuse modules whose ``training_step`` cannot be run for measurement.

    Raises:
        MisconfigurationException: Asking for ``loss_fn``.
    """
    why = None
    if not overrides(pl_module, "training_step"):
        why = "has no training_step to measure the loss with"
    elif not pl_module.automatic_optimization:
        why = "uses manual optimization, so its training_step would take optimizer steps"
    elif is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        why = "takes a dataloader_iter in training_step, so no single batch can be passed to it"
    if why is not None:
        raise MisconfigurationException(f"{type(pl_module).__name__} {why}; {_ASK_FOR_LOSS_FN}")
