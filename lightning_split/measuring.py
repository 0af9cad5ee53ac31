"""Measuring without a trace: passes over a model that leave it, and the random state, as they were."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from copy import copy
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_split.interrupts import give_way, uninterrupted
from lightning_split.layers import keeps_batch_statistics

__all__ = [
    "batch_size",
    "fixed_statistics",
    "gradients_only_for",
    "is_written",
    "isolated_rng",
    "keep_in_mind",
    "tensors_in",
    "undisturbed",
]


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the global random state of torch (all devices in use), NumPy and Python on exit.

    Args:
        seed: If given, all of them start from this seed inside.
    """
    on_gpu = torch.cuda.is_initialized()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu_states = torch.cuda.get_rng_state_all() if on_gpu else []
    with uninterrupted():
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                # torch.manual_seed would also note the call stack for devices that are not in use
                torch.default_generator.manual_seed(seed)
                if on_gpu:
                    torch.cuda.manual_seed_all(seed)
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
            if on_gpu:
                torch.cuda.set_rng_state_all(gpu_states)


@contextmanager
def undisturbed(model: nn.Module, *, train: bool | None = False, seed: int | None = 0) -> Iterator[None]:
    """Run a model without leaving a trace.

    Inside, all modules are in one mode, gradients are enabled and the random state is seeded. On exit the
    training flag of every module, the buffers, the ``.grad`` of every parameter, the parameters that passes
    write to (:func:`keep_in_mind`), the modules' plain attributes (counters, lists, metric states) and the
    random state are what they were, whatever happened: Ctrl-C waits until they are, or comes out at the next
    entry (:mod:`lightning_split.interrupts`).

    Args:
        model: The model.
        train: The mode inside; ``None`` keeps the modules' own.
        seed: Seed of the random state inside; ``None`` keeps it running.
    """
    give_way()
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(m._buffers, name, b) for m in model.modules() for name, b in m._buffers.items()]
    grads = [(p, p.grad) for p in model.parameters()]
    values = [(p, p.data) for p in model.parameters()]
    with uninterrupted(), ExitStack() as stack:
        written: list[tuple[nn.Parameter, Tensor]] = []
        stack.enter_context(isolated_rng(seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_recomputation())
        for m, _ in modes:
            stack.callback(_Attributes(m).restore)
        try:
            written += [(p, p.detach().clone()) for p, _ in grads if p in _WRITTEN]
            # Copies take the buffers' places: the originals are not even written to, and a graph that is
            # kept for later products still finds the values that it was made with.
            copies: dict[int, Tensor] = {}
            for store, name, buffer in buffers:
                if buffer is not None:
                    store[name] = copies.setdefault(id(buffer), buffer.detach().clone())
            for p, _ in grads:
                p.grad = None
            if train is not None:
                model.train(train)  # respects modules that override it to stay frozen
            yield
        finally:
            for m, training in modes:
                m.training = training
            for store, name, buffer in buffers:
                store[name] = buffer
            for p, value in values:
                if p.data.data_ptr() != value.data_ptr():
                    p.data = value
            with torch.no_grad():
                for p, copied in written:
                    p.copy_(copied)
            for p, grad in grads:
                p.grad = grad


@contextmanager
def gradients_only_for(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, the model's other parameters are constants: what does not depend on these has no graph."""
    kept = {id(p) for p in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    try:
        for p in others:
            p.requires_grad_(False)
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


# Parameters that a forward pass writes to: a moving average of a network that the model itself keeps, say.
_WRITTEN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def keep_in_mind(parameter: nn.Parameter) -> None:
    """From now on :func:`undisturbed` restores the values of a parameter that passes write to."""
    _WRITTEN[parameter] = True


def is_written(tensor: Tensor) -> bool:
    """Whether a forward pass writes to this parameter."""
    return tensor in _WRITTEN


@contextmanager
def _without_recomputation() -> Iterator[None]:
    """Let activation checkpoints keep their activations.

    They run a part of the model once more in the backward pass, when neither the tracer looks on nor
    surrogate derivatives are in place, and what the first run did differs from the second.
    """
    module = torch.utils.checkpoint
    stand_ins: dict[str, Any] = {
        "CheckpointFunction": _CallsAtOnce,
        "_checkpoint_without_reentrant_generator": _nothing_around,
        "_checkpoint_without_reentrant_generator_impl": _nothing_around,  # what newer versions of torch call
    }
    known = {name: getattr(module, name) for name in stand_ins if hasattr(module, name)}
    try:
        for name in known:
            setattr(module, name, stand_ins[name])
        yield
    finally:
        for name, original in known.items():
            setattr(module, name, original)


class _CallsAtOnce:
    """Stands in for the autograd function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands in for what runs before and after the body of the other checkpoints."""
    yield


_INTERNAL = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque)


class _Attributes:
    """A module's own attributes, so that code may write to them, and it is undone."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes = attributes = vars(module)
        self._before = before = {name: v for name, v in attributes.items() if name not in _INTERNAL}
        self._contents = [saved for value in before.values() for saved in _contents(value)]
        # Some layers write to their own weights in the forward pass: embeddings with max_norm.
        rescaled = [] if before.get("max_norm") is None else module.parameters(recurse=False)
        self._weights = [(p, p.detach().clone()) for p in rescaled]
        for name, value in before.items():
            if isinstance(value, Tensor) and not value.requires_grad:
                attributes[name] = value.clone()  # metric states are added to in place
            elif isinstance(value, np.ndarray):
                attributes[name] = value.copy()

    def restore(self) -> None:
        """Put everything back."""
        attributes = self._attributes
        for name in [n for n in attributes if n not in self._before and n not in _INTERNAL]:
            del attributes[name]
        attributes.update(self._before)
        for container, content in self._contents:
            _refill(container, content)
        with torch.no_grad():
            for p, weight in self._weights:
                p.copy_(weight)


def _contents(value: Any, depth: int = 4) -> list[tuple[Any, Any]]:
    """Every container in a value, itself included, with a copy of what it holds; helper objects count."""
    if depth == 0:
        return []
    if type(value) not in _CONTAINERS:
        if value is None or isinstance(value, _PLAIN) or not _is_helper(value):
            return []
        value = vars(value)
    inner = value.values() if isinstance(value, dict) else value
    return [(value, copy(value)), *(saved for item in inner for saved in _contents(item, depth - 1))]


def _is_helper(value: Any) -> bool:
    """Whether an object is one of the user's that a module keeps for its own use."""
    origin = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and origin not in _LIBRARIES


_LIBRARIES = {"builtins", "torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric", "functools"}


def _refill(container: Any, content: Any) -> None:
    same = len(container) == len(content) and all(
        a is b for a, b in zip(_flat(container), _flat(content), strict=True)
    )
    if not same:
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _flat(container: Any) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


class OnCopies:
    """A ``loss_fn`` that each time gets a batch of its own: it may take it apart or write to it.

    ``batch.pop("labels")`` or ``images.div_(255)`` are fine in a training loop, where a batch is used once.
    """

    def __init__(self, loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
        self._loss_fn = loss_fn

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss on a copy of the batch."""
        return self._loss_fn(model, copied(batch))


def copied(value: Any, known: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """The same containers and objects anew, with detached clones of their tensors.

    What occurs twice is copied once. What cannot be copied, and what lies beyond some thousands of objects,
    stays as it is; what has a method ``clone`` is asked for one.
    """
    known = {} if known is None else known
    if value is None or isinstance(value, (*_ATOMS, nn.Module)) or len(known) > _MOST_COPIES:
        return value
    if id(value) not in known:
        known[id(value)] = value, value  # for what holds itself; the original lives as long as its number
        known[id(value)] = value, _copy_of(value, known)
    return known[id(value)][1]


_MOST_COPIES = 10_000


def _copy_of(value: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        parts = [copied(part, known) for part in value]
        if type(value) in (list, tuple):
            return type(value)(parts)
        return value._make(parts) if hasattr(value, "_make") else copy(value)
    try:
        if callable(getattr(value, "clone", None)):
            return value.clone()
        new = copy(value)
    except Exception:
        return value
    if isinstance(new, MutableMapping):
        for key in list(new):
            new[key] = copied(new[key], known)
    elif hasattr(new, "__dict__"):  # frozen dataclasses, too
        vars(new).update({name: copied(part, known) for name, part in vars(new).items()})
    return new


def fixed_statistics(model: nn.Module) -> None:
    """Let layers that normalise by statistics of the batch use those that they keep."""
    for layer in model.modules():
        if keeps_batch_statistics(layer):
            layer.eval()


def batch_size(example: Any) -> int:
    """Leading dimension of the first tensor with dimensions: the number of samples in a batch."""
    return next((max(1, t.shape[0]) for t in tensors_in(example) if t.ndim), 1)


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in nested tuples, lists, dicts, dataclasses and plain objects, in order."""
    return list(_tensors_in(value, set()))


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if value is None or isinstance(value, (*_ATOMS, nn.Module)) or id(value) in seen or len(seen) > 10_000:
        return
    seen.add(id(value))
    items: list[Any]
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (tuple, list, set, frozenset, deque)):
        items = list(value)
    else:
        slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
        items = [getattr(value, name) for name in slots if hasattr(value, name)]
        items += list(getattr(value, "__dict__", {}).values())
    for item in items:
        yield from _tensors_in(item, seen)


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


_ATOMS = (str, bytes, int, float, complex, type, ModuleType, FunctionType, torch.dtype, torch.device)
_PLAIN = (*_ATOMS, nn.Module, Tensor)
