"""Surgery: split neurons in place, completely or not at all. The only stage that changes a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture
from lightning_split.effective import EffectiveWeights
from lightning_split.interrupts import uninterrupted
from lightning_split.layers import Block, Port, port_kind, port_sizes, rule_for
from lightning_split.loose import growing_tensors
from lightning_split.measuring import is_written
from lightning_split.placing import Placing, Widened
from lightning_split.splits import Split, check_splits
from lightning_split.widening import (
    AxisGrowth,
    AxisMap,
    Offspring,
    Replacement,
    as_parameter,
    grown_axis,
    grown_port,
    widened,
)

__all__ = ["AxisMap", "Replacement", "Split", "Surgery", "split_neurons"]


@uninterrupted()
def split_neurons(
    model: nn.Module, splits: Sequence[Split], *, arch: Architecture
) -> dict[nn.Parameter, Replacement]:
    """Split neurons of a network in place.

    Consumers' columns are multiplied by w_i, producers' rows are copied and displaced by δ_i, tensors of
    channelwise layers are copied. Keys are consumers of the queries that they meet. Offspring stand next to
    their parent. All new tensors are computed
    before the first is put in; if anything fails the model is as it was.

    Args:
        model: The network that ``arch`` was traced from.
        splits: At most one split per neuron.
        arch: The result of :func:`lightning_split.trace`, not older than the last growth.

    Returns:
        For each parameter that was replaced, the new one and the maps of its axes, which is what is needed
        to carry an optimizer's state along.

    Raises:
        ValueError: If a split does not fit the architecture, the architecture does not fit the model, or a
            parametrization cannot compute the grown weights. Nothing has changed then.
    """
    with EffectiveWeights(model) as effective:
        surgery = Surgery(model, splits, arch)
        surgery.apply()
        try:
            surgery.displace()
            return effective.written_back(surgery.replaced)
        except BaseException:
            surgery.revert()
            raise


class Surgery:
    """A set of splits, ready to be applied and, if need be, taken back.

    :meth:`apply` widens the layers with offspring equal to their parents, which leaves the function as it
    is; :meth:`displace` moves the offspring apart; :meth:`revert` restores the very tensors and attributes
    that were there before.
    """

    def __init__(
        self, model: nn.Module, splits: Sequence[Split], arch: Architecture, *, hollow: bool = False
    ) -> None:
        self.replaced: dict[nn.Parameter, Replacement] = {}
        self._model = model
        self._arch = arch
        self._hollow = hollow  # new tensors have shapes but no memory: to try how the model takes its sizes
        self._widened: dict[tuple[str, str], Widened] = {}
        self._replacing: dict[nn.Parameter, Widened] = {}  # by what was replaced
        self._put: list[tuple[dict[str, Any], str, Tensor]] = []  # where, and what comes in
        self._undo: list[Callable[[], Any]] = []
        check_splits(arch, splits, values=not hollow)
        self._splits = tuple(splits)
        self.places = Placing(arch, self._splits, self._widened)  # where the offspring are, once applied
        number = np.full(2 + max((int(p.neuron.max(initial=-1)) for p in arch.ports.values()), default=0), -1)
        for n, split in enumerate(self._splits):
            number[arch.group(split.group).neurons[split.neuron]] = n
        weights = np.array([w for split in self._splits for w in split.weights] + [1.0])
        count = np.array([*(len(split.weights) for split in self._splits), 1])
        self._offspring = Offspring(number, weights, count, np.cumsum([0, *count[:-1]]))
        with torch.no_grad():
            self._prepare()

    def apply(self) -> None:
        """Put in the widened tensors; the function stays the same up to rounding."""
        try:
            for store, name, tensor in self._put:
                self._undo.append(partial(store.__setitem__, name, store[name]))
                store[name] = tensor
            for layer in self._layers:
                before, cls = dict(vars(layer)), type(layer)
                rule = rule_for(layer)
                if rule is not None:
                    rule.resize(layer, self._sizes(layer))
                after = vars(layer)
                for name in [n for n in after if after[n] is not before.get(n, after)]:
                    if name in before:
                        self._undo.append(partial(after.__setitem__, name, before[name]))
                    else:
                        self._undo.append(partial(after.__delitem__, name))
                if type(layer) is not cls:
                    self._undo.append(partial(setattr, layer, "__class__", cls))
        except BaseException:
            self.revert()
            raise

    @torch.no_grad()
    def displace(self, splits: Sequence[Split] | None = None) -> None:
        """Move the offspring to their places.

        Args:
            splits: The splits of this surgery with other displacements, in any order; default its own.
        """
        for move in self.places.moves(splits or self._splits):
            move.carry_out()

    @contextmanager
    def displaced(self, splits: Sequence[Split]) -> Iterator[None]:
        """Inside, the offspring are where ``splits`` says; afterwards each is with its parent again."""
        moves = self.places.moves(splits)
        moved = {id(tensor): tensor for tensor, *_ in moves}.values()
        kept = [(tensor, tensor.detach().clone()) for tensor in moved]
        try:
            with torch.no_grad():
                for move in moves:
                    move.carry_out()
            yield
        finally:
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)

    def revert(self) -> None:
        """Restore what was there before :meth:`apply`."""
        while self._undo:
            self._undo.pop()()

    def behind(self, entries: Mapping[nn.Parameter, Tensor], *, moved: bool) -> set[tuple[str, int]]:
        """The splits that have made some entries of new tensors, each as its group and neuron.

        Args:
            entries: Parameter that was replaced -> mask of the new one, shaped as it.
            moved: Whether displacements have made them (of the rows that neurons are made of, rather than of
                columns by which they are read), or offspring weights.
        """
        found: set[int] = set()
        for parameter, mask in entries.items():
            where, widened = mask.nonzero().cpu(), self._replacing[parameter]
            left = torch.ones(len(where), dtype=torch.bool)
            for reads in (not moved, moved):
                blamed = torch.zeros(len(where), dtype=torch.bool)
                for axis, g in widened.axes.items():
                    number, outgoing = g.split[where[:, axis]], g.reads[where[:, axis]]
                    here = left & (number >= 0) & (outgoing == reads)
                    found |= set(number[here].tolist())
                    blamed |= here
                left &= ~blamed
            if bool(left.any()):  # entries that no split has made: all of them together have
                found |= {n for g in widened.axes.values() for n in g.split.tolist() if n >= 0}
        return {(self._splits[n].group, self._splits[n].neuron) for n in found}

    @property
    def splits(self) -> tuple[Split, ...]:
        """What it does."""
        return self._splits

    # what lies where after apply ------------------------------------------------------------------

    def layout(self, path: str, port: Port) -> Tensor | None:
        """Old position of each new position on a port, or ``None`` if the port does not grow."""
        growth = self._growth.get(id(self._model.get_submodule(path)), {}).get(port)
        return None if growth is None else growth.index

    def alive(self, path: str, port: Port) -> Tensor:
        """Which positions of a port that grew are not the last offspring of their neuron."""
        g = self._growth[id(self._model.get_submodule(path))][port]
        last = torch.from_numpy(self._offspring.count - 1)
        return g.ordinal != torch.where(g.split >= 0, last[g.split], -1)

    def knows(self, path: str, port: Port) -> bool:
        """Whether the architecture says what lies on a port."""
        return (path, port) in self._arch.ports

    def port_size(self, path: str, port: Port) -> int:
        """Number of positions on a port before the growth."""
        return len(self._arch.ports[path, port].neuron)

    # preparation ----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        growth: dict[str, dict[Port, AxisGrowth]] = defaultdict(dict)
        known: dict[str, set[Port]] = defaultdict(set)
        for (path, name), port in self._arch.ports.items():
            known[path].add(name)
            if bool((self._offspring.number[port.neuron] >= 0).any()):
                growth[path][name] = grown_port(port, self._offspring, reads=port_kind(name) == "in")
        self._growth: dict[int, dict[Port, AxisGrowth]] = defaultdict(dict)
        self._layers: list[nn.Module] = []
        sites = _sites(self._model)
        done: set[int] = set()
        for path, mine in growth.items():
            layer = self._model.get_submodule(path)
            self._growth[id(layer)] = mine
            self._layers.append(layer)
            for name, (tensor, axes) in growing_tensors(layer, known[path]).items():
                ports = {block.port for blocks in axes.values() for block in blocks}
                if id(tensor) in done or not ports & mine.keys():
                    continue
                done.add(id(tensor))
                found = self._grown(path, name, tensor, axes, mine)
                if isinstance(tensor, nn.Parameter):
                    grown = {} if self._hollow else found.axes
                    maps = {a: g.as_map() for a, g in grown.items()}
                    new = as_parameter(found.new, tensor)
                    found = self._replacing[tensor] = Widened(new, found.axes)
                    self.replaced[tensor] = Replacement(new, maps)
                self._widened[path, name] = found
                self._put += [(store, key, found.new) for store, key in sites[id(tensor)]]

    def _grown(
        self,
        path: str,
        name: str,
        tensor: Tensor,
        axes: Mapping[int, tuple[Block, ...]],
        growth: Mapping[Port, AxisGrowth],
    ) -> Widened:
        grown: dict[int, AxisGrowth] = {}
        for axis, blocks in axes.items():
            if any(block.port in growth for block in blocks):
                self._check_fit(path, name, tensor, axis, blocks)
                grown[axis] = grown_axis(growth, blocks)
        if self._hollow:
            shape = [len(grown[d].index) if d in grown else size for d, size in enumerate(tensor.shape)]
            blank = tensor.detach().new_zeros(shape if is_written(tensor) else ())
            return Widened(blank.expand(shape), grown)
        return Widened(widened(tensor.detach(), grown), grown)

    def _check_fit(self, path: str, name: str, tensor: Tensor, axis: int, blocks: Sequence[Block]) -> None:
        fits = sum(block.size * block.multiple for block in blocks) == tensor.shape[axis] and all(
            block.size == len(self._arch.ports[path, block.port].neuron)
            for block in blocks
            if (path, block.port) in self._arch.ports
        )
        if not fits:
            raise ValueError(
                f"The tensor '{path}.{name}' has {tensor.shape[axis]} entries along axis {axis}, which is "
                "not what the architecture says; trace the model again after each growth."
            )

    def _sizes(self, layer: nn.Module) -> dict[Port, int]:
        """Number of neurons on each port of a layer that already holds its new tensors."""
        return port_sizes(layer) | {port: len(g.index) for port, g in self._growth[id(layer)].items()}


def _sites(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Every place of the model that holds a tensor, by the tensor's identity."""
    sites: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    sites[id(tensor)].append((store, name))
    return sites
