"""Loose tensors: parameters and buffers of modules without a rule, which may belong to neurons.

A layer scale, a learned bias, a class token, the statistics of a frozen normalisation: what the axes of
such a tensor mean shows only where it meets neurons. Until then each of its axes is a *guess*: labels that go
through the operators like those of neurons, one guess at a time. Where neurons come in, the guess that lies
along them becomes true, and the tensor is copied with them like one of a channelwise layer; all others are
fixed, and what they belong to cannot grow. A guess that turns out wrong never costs a neuron anything.

Constants that are joined to other values (the zero state beside the first input of a recurrent network) are
guessed in the same way: how many entries they have depends on who reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_split.constants import is_pointwise
from lightning_split.layers import Block, Port, known_type, layer_tensors, rule_for

if TYPE_CHECKING:
    from lightning_split.labels import LabelMode, Owner

__all__ = [
    "Guesses",
    "filters_apart",
    "growing_tensors",
    "loose_axes",
    "loose_port",
    "loose_size",
    "loose_tensors",
]


def loose_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a module that no rule speaks of, if they could belong to neurons."""
    rule = rule_for(module)
    if known_type(module) and (rule is None or rule.trusted or rule.refusal(module) is not None):
        return {}
    taken = layer_tensors(module)
    saved = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    return {
        name: tensor
        for name, tensor in {**module._parameters, **saved}.items()
        if tensor is not None and name not in taken and _could_grow(tensor)
    }


def _could_grow(tensor: Tensor) -> bool:
    return bool(loose_axes(tensor)) and (tensor.is_floating_point() or tensor.dtype is torch.bool)


def loose_axes(tensor: Tensor) -> list[int]:
    """Axes along which neurons may lie."""
    return [axis for axis, size in enumerate(tensor.shape) if size > 1]


def loose_port(name: str, axis: int, kind: str = "through") -> Port:
    """The port of one axis of a loose tensor; a raw matrix reads or makes neurons there (``in``, ``out``)."""
    return f"{kind}:{name}.{axis}"


def loose_size(tensors: Mapping[str, Tensor], port: Port) -> int | None:
    """Number of neurons on the port of a loose tensor among these; ``None`` for the ports of rules."""
    name, _, axis = port.partition(":")[2].rpartition(".")
    tensor = tensors.get(name) if axis.isdigit() else None
    return None if tensor is None else int(tensor.shape[int(axis)])


def growing_tensors(
    module: nn.Module, ports: Collection[Port] = ()
) -> dict[str, tuple[Tensor, dict[int, tuple[Block, ...]]]]:
    """All tensors of a module that may grow, with their axes: its rule's, and the loose ones.

    Args:
        module: The module.
        ports: The ports of the module that are known; they tell what raw matrices read and make.
    """
    found = layer_tensors(module)
    loose = loose_tensors(module)
    for name, tensor in sorted(loose.items(), key=lambda item: len(loose_axes(item[1])) < 2):  # biases last
        axes: dict[int, tuple[Block, ...]] = {}
        for axis in loose_axes(tensor):
            kinds = [loose_port(name, axis, kind) for kind in ("in", "out")]
            port = next((p for p in kinds if p in ports), loose_port(name, axis))
            axes[axis] = (Block(port, 0, tensor.shape[axis], 1),)
        found[name] = (tensor, axes)
    return found


class Guesses:
    """The labels that loose tensors, and what is computed of them, would have.

    Args:
        mode: Carries the labels of neurons.
        label: The ids along an axis of a loose tensor; ``None`` where no neurons can be.
    """

    def __init__(self, mode: LabelMode, label: Callable[[Owner, int, int], Tensor | None]) -> None:
        self.leaves: dict[int, Owner] = {}  # id of a loose tensor -> whose it is
        self.subject = ""  # whose guesses are looked at, as the end of a reason
        self._mode = mode
        self._label = label
        self._found: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> list of labels
        self._owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> owners
        self._fixed: set[Owner] = set()
        self.adopted: set[int] = set()  # ids that have met neurons element by element
        self.added: set[Owner] = set()  # tensors that were added to neurons

    def among(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those without neurons that have a guess."""
        found = {id(t): t for t in tensors if id(t) in self.leaves or t in self._found}
        return [t for t in found.values() if self._mode.get(t) is None and self._of(t)]

    def adopt(self, tensor: Tensor, dims: frozenset[int], why: str) -> None:
        """Give a tensor the labels that vary along these dimensions (from the end); fix it if none do."""
        guesses = self._of(tensor)
        right = next((labels for labels in guesses if self._dims(labels) == dims), None)
        if right is None:
            self.fix(tensor, why)
            return
        self._mode.set(tensor, right)
        self.adopted.update(self._mode.ids(right))
        for labels in guesses:
            if labels is not right:
                self._bar(tensor, labels, why)

    def fix(self, tensor: Tensor, why: str) -> None:
        """The tensor is used in a way that growth would change."""
        owner = self.leaves.get(id(tensor))
        if owner is not None and tensor not in self._found:
            self._fixed.add(owner)  # no need to make labels in order to bar them
        for labels in self._of(tensor):
            self._bar(tensor, labels, why)

    def meet(
        self, func: Any, name: str, args: Sequence[Any], loose: Sequence[Tensor], neurons: Sequence[Tensor]
    ) -> None:
        """An operator brings loose tensors together with neurons."""
        dims: set[int] = set()
        for t in neurons:
            labels = self._mode.get(t)
            if labels is not None:
                dims |= self._dims(labels)
        for t in loose:
            if name in {"add", "add_"}:
                self.added |= self._owners_of(t)
            if is_pointwise(func) or name in _JOINS:
                self.adopt(t, frozenset(dims), f"{name} uses it along other neurons")
            elif name == "convolution" and filters_apart(args) and dims == {1 - args[0].ndim}:
                self.adopt(t, frozenset({-t.ndim}), f"{name} uses it along other neurons")
            else:
                self.fix(t, f"{name} reads it")

    def judge(self, name: str, loose: Sequence[Tensor], outputs: Sequence[Tensor], handle: Any) -> None:
        """An operator without neurons: what becomes of each guess.

        Args:
            name: The operator.
            loose: Its inputs that have guesses; none for a constant that is joined to others.
            outputs: What it returned.
            handle: Moves labels through the operator.
        """
        owners = frozenset(o for t in loose for o in self._owners_of(t))
        if outputs and all(not t.ndim for t in outputs):  # part of a loss, perhaps: a penalty
            self._mode.watch(outputs, owners)
            return
        if name in _READS or not outputs:
            for t in loose:
                self.fix(t, f"{name} reads it")
            return
        made: list[list[Tensor]] = [[] for _ in outputs]
        for world in self._worlds(name, loose):
            for t, labels in world:
                self._mode.set(t, labels)
            whose = self._told(frozenset(o for t, _ in world for o in self._owners_of(t)))
            self.subject = f", seen on {whose}" if whose else ""
            try:
                handle()
            finally:
                self.subject = ""
                for t, _ in world:
                    self._mode.set(t, None)
            for t, guesses in zip(outputs, made, strict=True):
                moved = self._mode.get(t)
                if moved is not None:
                    guesses.append(moved)
                self._mode.set(t, None)
        for t, found in zip(outputs, made, strict=True):
            if found:
                self._found[t] = found
                self._owners[t] = owners

    def _worlds(self, name: str, loose: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Guesses that go together: they lie along the same dimensions, one of each tensor."""
        worlds: dict[frozenset[int], dict[int, tuple[Tensor, Tensor]]] = {}
        for t in loose:
            for labels in self._of(t):
                world = worlds.setdefault(self._dims(labels), {})
                if id(t) in world:
                    self._bar(t, labels, f"{name} uses it twice")
                else:
                    world[id(t)] = (t, labels)
        if not loose:
            yield []
        for world in worlds.values():
            yield list(world.values())

    def _of(self, tensor: Tensor) -> list[Tensor]:
        found: list[Tensor] | None = self._found.get(tensor)
        owner = self.leaves.get(id(tensor))
        if found is None and owner is not None and owner not in self._fixed:
            found = []
            for axis in loose_axes(tensor):
                labels = self._label(owner, axis, tensor.shape[axis])
                shape = [1] * tensor.ndim
                shape[axis] = -1
                if labels is not None:
                    found.append(labels.view(shape).expand(tensor.shape))
            self._found[tensor] = found
        return found or []

    def _owners_of(self, tensor: Tensor) -> frozenset[Owner]:
        owner = self.leaves.get(id(tensor))
        if owner is not None:
            return frozenset({owner})
        found: frozenset[Owner] = self._owners.get(tensor, frozenset())
        return found

    def _bar(self, tensor: Tensor, labels: Tensor, why: str) -> None:
        whose = self._told(self._owners_of(tensor))
        what = f"{whose}, belongs to them, and " if whose else ""
        self._mode.table.bar(self._mode.ids(labels), f"{what}{why}{self._mode.place()}")

    def _told(self, owners: frozenset[Owner]) -> str:
        if not owners:
            return ""
        names = " and ".join(sorted(f"'{path}.{name}'" if path else f"'{name}'" for path, name in owners))
        return f"the tensor {names}, which the code uses itself"

    def _dims(self, labels: Tensor) -> frozenset[int]:
        return frozenset(d - labels.ndim for d, v in enumerate(self._mode.varying(labels)) if v)


def filters_apart(args: Sequence[Any]) -> bool:
    """Whether a convolution with these arguments has filters of its own for each channel."""
    x, weight, groups = args[0], args[1], args[8]
    return bool(weight.shape[1] == 1 and groups == x.shape[1])


# Operators after which nothing is left of the axes that they read.
_READS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "native_layer_norm"}
_READS |= {"native_group_norm", "native_batch_norm", "_fused_rms_norm"}
# Operators that bring elements together one by one, but for the pointwise ones.
_JOINS = {"cat", "stack", "copy_", "masked_fill", "masked_fill_", "index_put", "index_put_"}
_JOINS |= {"_index_put_impl_", "_unsafe_index_put"}
