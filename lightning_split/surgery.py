"""Surgery: split neurons in place, completely or not at all. The only stage that changes a model."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture, ChannelGroup, Index, PortMap
from lightning_split.layers import Block, Port, layer_tensors, port_kind, port_sizes, rule_for

__all__ = ["AxisMap", "Replacement", "Split", "Surgery", "split_neurons"]


@dataclass(frozen=True)
class Split:
    """One neuron and the offspring that it becomes.

    The neuron θ is replaced by ``m`` offspring θ + δ_i whose outgoing weights are those of the neuron times
    w_i (S2D, Eq. 2). With Σ w_i = 1 and δ_i = 0 the network computes what it computed.
    """

    group: str
    neuron: int
    weights: tuple[float, ...]  # w, (m,), sums to 1
    displacements: Tensor  # δ, (m, dim), step size included, laid out as ChannelGroup.theta

    def __post_init__(self) -> None:
        if isinstance(self.group, ChannelGroup):
            object.__setattr__(self, "group", self.group.name)


@dataclass(frozen=True, eq=False)
class AxisMap:
    """How one axis of a tensor grew."""

    index: Tensor  # (new size,) int64: the old position that each new position copies
    scale: Tensor  # (new size,) float64: gradient of the new entry over the gradient of the old one


class Replacement(NamedTuple):
    """The parameter that stands where another stood, and how its axes grew."""

    new: nn.Parameter
    maps: dict[int, AxisMap]


class _Displacement(NamedTuple):
    axis: int  # of the parameter, along which the displaced rows lie
    entries: Tensor  # (n,) which rows
    values: Tensor  # (n, ...) what is added to them, the row axis in front


@dataclass(frozen=True, eq=False)
class _PortGrowth:
    index: Tensor  # (new,) old position
    factor: Tensor  # (new,) offspring weight w_i, 1 where nothing was split
    split: Tensor  # (new,) number of the split that made the entry, -1 where nothing was split
    ordinal: Tensor  # (new,) which of its offspring


def split_neurons(
    model: nn.Module, splits: Sequence[Split], *, arch: Architecture
) -> dict[nn.Parameter, Replacement]:
    """Split neurons of a network in place.

    Consumers' columns are multiplied by w_i, producers' rows are copied and displaced by δ_i, tensors of
    channelwise layers are copied. Offspring stand next to their parent. All new tensors are computed
    before the first is put in; if anything fails the model is as it was.

    Args:
        model: The network that ``arch`` was traced from.
        splits: At most one split per neuron.
        arch: The result of :func:`lightning_split.trace`, not older than the last growth.

    Returns:
        For each parameter that was replaced, the new one and the maps of its axes, which is what is needed
        to carry an optimizer's state along.

    Raises:
        ValueError: If a split does not fit the architecture, or the architecture does not fit the model.
            Nothing has changed then.
    """
    surgery = Surgery(model, splits, arch)
    surgery.apply()
    try:
        surgery.displace()
    except BaseException:
        surgery.revert()
        raise
    return surgery.replaced


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
        self._displacements: list[tuple[nn.Parameter, _Displacement]] = []
        self._put: list[tuple[dict[str, Any], str, Tensor]] = []  # where, and what comes in
        self._undo: list[Callable[[], Any]] = []
        _check_splits(arch, splits, values=not hollow)
        self._splits = tuple(splits)
        # Number of the split of each neuron id, -1 for none; the last entry stands for "no neuron" (-1).
        self._number = np.full(
            2 + max((int(p.neuron.max(initial=-1)) for p in arch.ports.values()), default=0), -1
        )
        for n, split in enumerate(self._splits):
            self._number[arch.group(split.group).neurons[split.neuron]] = n
        # All offspring weights one after the other, and where those of each split begin.
        self._weights = np.array([w for split in self._splits for w in split.weights] + [1.0])
        self._offspring = np.array([*(len(split.weights) for split in self._splits), 1])  # 1: no split
        self._first = np.cumsum([0, *self._offspring[:-1]])
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

    def displace(self) -> None:
        """Move the offspring to their places."""
        with torch.no_grad():
            for parameter, (axis, entries, values) in self._displacements:
                parameter.movedim(axis, 0).index_add_(0, entries, values)

    def revert(self) -> None:
        """Restore what was there before :meth:`apply`."""
        while self._undo:
            self._undo.pop()()

    def layout(self, path: str, port: Port) -> Tensor | None:
        """Old position of each new position on a port, or ``None`` if the port does not grow."""
        growth = self._growth.get(id(self._model.get_submodule(path)), {}).get(port)
        return None if growth is None else growth.index

    def alive(self, path: str, port: Port) -> Tensor:
        """Which positions of a port that grew are not the last offspring of their neuron."""
        g = self._growth[id(self._model.get_submodule(path))][port]
        last = torch.from_numpy(self._offspring - 1)
        return g.ordinal != torch.where(g.split >= 0, last[g.split], -1)

    def knows(self, path: str, port: Port) -> bool:
        """Whether the architecture says what lies on a port."""
        return (path, port) in self._arch.ports

    def port_size(self, path: str, port: Port) -> int:
        """Number of positions on a port before the growth."""
        return len(self._arch.ports[path, port].neuron)

    # preparation ----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        growth: dict[str, dict[Port, _PortGrowth]] = defaultdict(dict)
        for (path, name), port in self._arch.ports.items():
            if self._touched(port):
                growth[path][name] = self._port_growth(port)
        self._growth: dict[int, dict[Port, _PortGrowth]] = defaultdict(dict)
        self._layers: list[nn.Module] = []
        theta = {} if self._hollow else self._theta_displacements()
        sites = _sites(self._model)
        done: set[int] = set()
        for path, mine in growth.items():
            layer = self._model.get_submodule(path)
            self._growth[id(layer)] = mine
            self._layers.append(layer)
            for name, (tensor, axes) in layer_tensors(layer).items():
                ports = {block.port for blocks in axes.values() for block in blocks}
                if id(tensor) in done or not ports & mine.keys():
                    continue
                done.add(id(tensor))
                new, moved, maps = self._grown(path, name, tensor, axes, mine, theta.get((path, name)))
                if isinstance(tensor, nn.Parameter):
                    new = _as_parameter(new, tensor)
                    self.replaced[tensor] = Replacement(new, maps)
                    if moved is not None:
                        self._displacements.append((new, moved))
                self._put += [(store, key, new) for store, key in sites[id(tensor)]]

    def _touched(self, port: PortMap) -> bool:
        return bool((self._number[port.neuron] >= 0).any())

    def _port_growth(self, port: PortMap) -> _PortGrowth:
        """New layout of one port: each run of a split neuron is repeated as a block per offspring."""
        neuron, run = port
        starts = np.flatnonzero(np.r_[True, (neuron[1:] != neuron[:-1]) | (run[1:] != run[:-1])])
        lengths = np.diff(np.r_[starts, len(neuron)])
        number = self._number[neuron[starts]]
        offspring = self._offspring[number]
        # One entry per block, then one per position: run, and position in it, counted from its first.
        block = np.repeat(np.arange(len(starts)), offspring)
        ordinal = _count(offspring)
        length = lengths[block]
        index = np.repeat(starts[block], length) + _count(length)
        split = number[block]
        weights = np.where(split >= 0, self._weights[self._first[split] + ordinal], 1.0)
        parts = (np.repeat(part, length) for part in (weights, split, ordinal))
        return _PortGrowth(torch.from_numpy(index), *map(torch.from_numpy, parts))

    def _grown(
        self,
        path: str,
        name: str,
        tensor: Tensor,
        axes: Mapping[int, tuple[Block, ...]],
        growth: Mapping[Port, _PortGrowth],
        displaced: Mapping[tuple[int, int], Tensor] | None,
    ) -> tuple[Tensor, _Displacement | None, dict[int, AxisMap]]:
        """The widened tensor, how it is displaced, and how its axes grew."""
        moved = None
        maps: dict[int, AxisMap] = {}
        scales: list[tuple[int, Tensor]] = []
        for axis, blocks in sorted(axes.items(), key=lambda item: port_kind(item[1][0].port) == "in"):
            if not any(block.port in growth for block in blocks):
                continue
            self._check_fit(path, name, tensor, axis, blocks)
            g = _joined([_stretched(growth.get(block.port), block) for block in blocks])
            consumed = port_kind(blocks[0].port) == "in"
            maps[axis] = AxisMap(g.index, torch.ones_like(g.factor) if consumed else g.factor)
            if consumed:
                scales.append((axis, g.factor))
                if moved is not None:
                    other = axis + (axis < moved.axis)
                    values = moved.values.index_select(other, g.index.to(tensor.device))
                    moved = moved._replace(values=_scale_(values, g.factor, other))
            elif displaced:
                moved = _displacement(tensor, axis, g, displaced)
        if self._hollow:
            shape = [len(maps[d].index) if d in maps else size for d, size in enumerate(tensor.shape)]
            return tensor.detach().new_zeros(()).expand(shape), moved, maps
        new = _selected(tensor.detach(), {axis: m.index for axis, m in maps.items()})
        for axis, factor in scales:
            _scale_(new, factor, axis)
        return _same_format(new, tensor), moved, maps

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

    def _theta_displacements(self) -> dict[tuple[str, str], dict[tuple[int, int], Tensor]]:
        """For each producer tensor: (split, old row) -> displacement of that row for every offspring."""
        found: dict[tuple[str, str], dict[tuple[int, int], Tensor]] = defaultdict(dict)
        for number, split in enumerate(self._splits):
            group = self._arch.group(split.group)
            offset = 0
            for block in group.theta:
                part = split.displacements[:, offset : offset + block.size]
                offset += block.size
                tensor = self._model.get_submodule(block.module)._parameters[block.tensor]
                assert tensor is not None
                shape = tensor.movedim(block.axis, 0).shape[1:]
                rows = block.rows[split.neuron].tolist()
                values = part.reshape(len(split.weights), len(rows), *shape)
                for r, row in enumerate(rows):
                    found[block.module, block.tensor][number, row] = values[:, r]
        return found

    def _sizes(self, layer: nn.Module) -> dict[Port, int]:
        """Number of neurons on each port of a layer that already holds its new tensors."""
        return port_sizes(layer) | {port: len(g.index) for port, g in self._growth[id(layer)].items()}


def _check_splits(arch: Architecture, splits: Sequence[Split], *, values: bool) -> None:
    seen: set[tuple[str, int]] = set()
    for split in splits:
        group: ChannelGroup = _known_group(arch, split.group)
        here = f"The split of neuron {split.neuron} of '{split.group}'"
        if not 0 <= split.neuron < group.width:
            raise ValueError(f"{here} is out of range: the group has {group.width} neurons.")
        if (split.group, split.neuron) in seen:
            raise ValueError(f"{here} occurs twice; give one split with all its offspring.")
        seen.add((split.group, split.neuron))
        shape = tuple(split.displacements.shape)
        if len(split.weights) < 2 or shape != (len(split.weights), group.dim):
            raise ValueError(
                f"{here} has {len(split.weights)} offspring weights and displacements of shape {shape}; it "
                f"needs at least two weights and displacements of shape (number of weights, {group.dim})."
            )
        total = math.fsum(split.weights)
        if not math.isfinite(total) or abs(total - 1) > 1e-6:
            raise ValueError(
                f"{here} has offspring weights that sum to {total}; they must sum to 1, or the network's "
                "function would jump."
            )
        if values and not bool(torch.isfinite(split.displacements).all()):
            raise ValueError(f"{here} has displacements that are not finite.")


def _known_group(arch: Architecture, name: str) -> ChannelGroup:
    try:
        return arch.group(name)
    except KeyError as error:
        raise ValueError(error.args[0]) from None


def _count(lengths: Index) -> Index:
    """``0 … n - 1`` for each of the lengths, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _stretched(growth: _PortGrowth | None, block: Block) -> _PortGrowth:
    """The growth of a port, entry by entry of the block of a tensor's axis that belongs to it."""
    if growth is None:
        index = torch.arange(block.size)
        growth = _PortGrowth(
            index, torch.ones(block.size, dtype=torch.float64), torch.full_like(index, -1), index * 0
        )
    m = block.multiple
    index = block.start + (growth.index[:, None] * m + torch.arange(m)).flatten()
    rest = (t.repeat_interleave(m) for t in (growth.factor, growth.split, growth.ordinal))
    return _PortGrowth(index, *rest)


def _joined(parts: Sequence[_PortGrowth]) -> _PortGrowth:
    if len(parts) == 1:
        return parts[0]
    return _PortGrowth(
        *(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(_PortGrowth))
    )


def _selected(tensor: Tensor, picks: Mapping[int, Tensor]) -> Tensor:
    """Entries picked along several axes, without a copy in between that is as large as the result."""
    (axis, index), *rest = ((a, i.to(tensor.device)) for a, i in picks.items())
    if not rest:
        return tensor.index_select(axis, index)
    shape = [len(picks[d]) if d in picks else size for d, size in enumerate(tensor.shape)]
    new, start = tensor.new_empty(shape), 0
    for part in index.chunk(16):
        piece = tensor.index_select(axis, part)
        for other, where in rest:
            piece = piece.index_select(other, where)
        new.narrow(axis, start, len(part)).copy_(piece)
        start += len(part)
    return new


def _displacement(
    new: Tensor, axis: int, g: _PortGrowth, displaced: Mapping[tuple[int, int], Tensor]
) -> _Displacement | None:
    """Displacements of the rows; consumers' columns are still those of the old layout."""
    entries, values = [], []
    for entry in (g.split >= 0).nonzero().flatten().tolist():
        row = displaced.get((int(g.split[entry]), int(g.index[entry])))
        if row is not None:
            entries.append(entry)
            values.append(row[int(g.ordinal[entry])].to(new))
    if not entries:
        return None
    return _Displacement(axis, torch.tensor(entries, device=new.device), torch.stack(values))


def _sites(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Every place of the model that holds a tensor, by the tensor's identity."""
    sites: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    sites[id(tensor)].append((store, name))
    return sites


def _scale_(tensor: Tensor, factor: Tensor, axis: int) -> Tensor:
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return tensor.mul_(factor.to(tensor).view(shape))  # cast first: float64 factors would promote bf16


def _same_format(new: Tensor, old: Tensor) -> Tensor:
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        fits = old.ndim == (4 if memory_format is torch.channels_last else 5)
        if fits and old.is_contiguous(memory_format=memory_format) and not old.is_contiguous():
            return new.contiguous(memory_format=memory_format)
    return new.contiguous()


def _as_parameter(new: Tensor, old: nn.Parameter) -> nn.Parameter:
    """A parameter that takes the place of another: same flags, attributes and hooks."""
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    vars(parameter).update(vars(old))
    for hook in (old._backward_hooks or {}).values():
        parameter.register_hook(hook)
    for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
        parameter.register_post_accumulate_grad_hook(hook)
    return parameter
