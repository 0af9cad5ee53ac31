"""Sort neurons into groups by where they occur, and say why the others are left alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_split.architecture import (
    Architecture,
    ChannelGroup,
    Index,
    PortKey,
    PortMap,
    ThetaBlock,
    Unsplittable,
)
from lightning_split.borrowed import Loans
from lightning_split.layers import Block, LayerRule, layer_tensors, port_kind
from lightning_split.loose import growing_tensors, loose_axes, loose_port, loose_size
from lightning_split.neurons import NeuronTable
from lightning_split.pairs import Pair, weighing
from lightning_split.tally import Tally

__all__ = ["Findings"]

Mask = npt.NDArray[np.bool_]
_STARVED = "the traced batch sends no sample through the layer that makes them"
_REFUSED_IN_USE = "no layer that tracing sees reads them"


@dataclass
class Findings:
    """What the passes over one model have told."""

    layers: Mapping[str, nn.Module]
    rules: Mapping[str, LayerRule]
    raw: Mapping[str, Mapping[str, Tensor]]  # the loose tensors of each module
    tally: Tally
    loans: Loans
    table: NeuronTable
    ports: dict[PortKey, Tensor] = field(default_factory=dict)  # ids at each position of each port
    loose: dict[PortKey, Tensor] = field(default_factory=dict)  # and along the axes of loose tensors
    adopted: set[int] = field(default_factory=set)  # ids of those that met neurons element by element
    added: set[tuple[str, str]] = field(default_factory=set)  # loose tensors added to neurons
    pairs: list[Pair] = field(default_factory=list)  # products of activations, summed over neurons
    blank: dict[PortKey, int] = field(default_factory=dict)  # sizes of ports that have read constants only
    borrowed: set[tuple[str, str]] = field(default_factory=set)  # tensors of layers that met activations
    called: set[str] = field(default_factory=set)  # layers with a rule, whatever they read
    passed: set[str] = field(default_factory=set)  # channelwise layers that were called
    starved: set[str] = field(default_factory=set)  # layers through which no sample has gone
    uses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    multiplied: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    made: dict[PortKey, float] = field(default_factory=lambda: defaultdict(float))
    leaked: dict[tuple[str, str], str] = field(default_factory=dict)  # tensors used elsewhere, and by what
    declined: dict[str, tuple[str, int]] = field(default_factory=dict)  # refused layers: reason and width

    def architecture(self) -> Architecture:
        """Sort the neurons into groups by where they occur."""
        self.blank = {key: size for key, size in self.blank.items() if key not in self.ports}
        self.ports |= {key: torch.full((size,), -1) for key, size in self.blank.items()}
        self.loans.settle(self.borrowed, self.ports, self.called, self.adopted)
        raw = self._matrices()
        read = [labels.numpy() for key, labels in self.ports.items() if port_kind(key[1]) == "in"]
        weights = weighing(self.pairs, self.table, np.concatenate([np.zeros(0, np.int64), *read]))
        self._bar_shared_and_leaked()
        neuron, runs, reasons = self.table.resolve()
        raw |= self._biases(neuron)
        made = np.zeros(self.table.size + 1, dtype=bool)  # the last stands for "no neuron"
        owner = np.append(neuron, -1)
        for key, labels in self.ports.items():
            if port_kind(key[1]) == "out":
                made[neuron[labels.numpy()]] = True
        ports: dict[PortKey, PortMap] = {}
        for key, labels in (self.ports | self.loose).items():
            ids = labels.numpy()
            known = (ids >= 0) & made[owner[ids]]  # others met no neuron of a layer
            if key in self.ports or (known.any() and key not in raw):
                ports[key] = PortMap(np.where(known, neuron[ids], -1), np.where(known, runs[ids], -1))
                reads = weights.reads(runs[ids]) if port_kind(key[1]) == "out" else None
                if reads is not None:
                    ports[key] = ports[key]._replace(reads=reads, power=weights.power(runs[ids]))
        groups, unsplittable = self._named(_alike(ports, self.table.size, reasons), ports)
        return Architecture(
            tuple(groups),
            tuple(unsplittable),
            ports,
            dict(self.uses),
            dict(self.multiplied),
            dict(self.made),
            self.tally.products(neuron, made),
            self.tally.written(neuron, made),
            self._not_called(),
        )

    def loose_ids(self, owner: tuple[str, str], axis: int, size: int) -> Tensor | None:
        """The ids along an axis of a loose tensor, or of one that a layer lends; ``None`` if none may be."""
        path, name = owner
        if self.loans.cover(path, name):
            return self.loans.along(path, name, axis)
        key = path, loose_port(name, axis)
        if key not in self.loose:
            self.loose[key] = torch.from_numpy(self.table.mint(size))
        return self.loose[key]

    def named(self, path: str, name: str) -> str:
        """What the neurons are called that a tensor makes."""
        return path if self.loans.cover(path, name) else f"{path}.{name}".lstrip(".")

    def _matrices(self) -> set[PortKey]:
        """Let the axes of raw matrices be the neurons that are read and made there; which axes these are."""
        found = set()
        for path, tensors in self.raw.items():
            for name, tensor in tensors.items():
                for axis in loose_axes(tensor):
                    ports = [self.ports.get((path, loose_port(name, axis, kind))) for kind in ("in", "out")]
                    if all(labels is None for labels in ports):
                        continue
                    found.add((path, loose_port(name, axis)))
                    full = f"{path}.{name}".lstrip(".")
                    ids_along = self.loose_ids((path, name), axis, tensor.shape[axis])
                    assert ids_along is not None
                    own = ids_along.numpy()
                    for labels in ports:
                        if labels is not None:
                            ids = labels.numpy()
                            self.table.tie(ids[ids >= 0], own[ids >= 0])
                            self.table.bar(
                                own[ids < 0].tolist(),
                                f"the tensor '{full}' is multiplied with other values too",
                            )
                    if ports[0] is not None and (ports[1] is not None or self.adopted.intersection(own)):
                        why = f"the tensor '{full}' is used in two ways along the same axis"
                        self.table.bar(own.tolist(), why)
        return found

    def _biases(self, neuron: Index) -> set[PortKey]:
        """Let what is added to the products of a raw matrix beside it be incoming weights, as in a layer.

        Args:
            neuron: The neuron of each id.

        Returns:
            The axes that make neurons now.
        """
        matrices: dict[str, list[Index]] = defaultdict(list)
        for (path, port), labels in self.ports.items():
            if port_kind(port) == "out" and loose_size(self.raw[path], port) is not None:
                matrices[path].append(neuron[labels.numpy()])
        found = set()
        for path, name in sorted(self.added):
            bias = self.raw[path].get(name)
            axes = [] if bias is None else loose_axes(bias)
            if not isinstance(bias, nn.Parameter) or not bias.requires_grad or len(axes) > 1:
                continue
            key = path, loose_port(name, axes[0])
            made = path, loose_port(name, axes[0], "out")
            if key not in self.loose or made in self.ports:
                continue
            own = neuron[self.loose[key].numpy()]
            if any(np.isin(own, ids).any() for ids in matrices[path]):
                self.ports[made] = self.loose[key]
                found.add(key)
        return found

    def _named(
        self,
        kinds: Sequence[_Kind],
        ports: Mapping[PortKey, PortMap],
    ) -> tuple[list[ChannelGroup], list[Unsplittable]]:
        groups, unsplittable = [], []
        rank = np.full(self.table.size, -1)  # of each neuron in the group that is looked at
        used: dict[str, int] = defaultdict(int)
        for keys, reason, members in kinds:
            rank[members] = np.arange(len(members))
            group = self._group(keys, members.tolist(), ports, rank)
            rank[members] = -1
            used[group.name] += 1
            if used[group.name] > 1:
                group = dataclasses.replace(group, name=f"{group.name}#{used[group.name]}")
            why = reason or self._why_not(group)
            if why is None:
                groups.append(group)
            else:
                unsplittable.append(Unsplittable(group.name, why, group.width))
        unsplittable += [Unsplittable(path, why, width) for path, (why, width) in self.declined.items()]
        return groups, unsplittable

    def _not_called(self) -> str:
        """A note on layers that no pass has reached: if they read a neuron, nobody knows."""
        called = (
            {path for path, _ in self.ports.keys() - self.blank.keys()} | self.declined.keys() | self.passed
        )
        with_ports = [p for p in self.rules if p not in called and layer_tensors(self.layers[p])]
        idle = [path for path in with_ports if not any(path.startswith(f"{c}.") for c in called if c)]
        if not idle:
            return ""
        named = ", ".join(f"'{path}'" for path in idle[:5]) + (" and others" if len(idle) > 5 else "")
        return f"Layers that no pass called do not grow with the others: {named}."

    def _group(
        self, keys: Sequence[PortKey], members: list[int], ports: Mapping[PortKey, PortMap], rank: Index
    ) -> ChannelGroup:
        kinds = {key: _kinds(key, ports[key], rank) for key in keys}
        by_kind = {
            kind: tuple(dict.fromkeys(key[0] for key in keys if kind in kinds[key]))
            for kind in ("out", "through", "in")
        }
        layouts: dict[str, list[ThetaBlock]] = {"out": [], "through": [], "in": []}
        for path in dict.fromkeys(path for path, _ in keys):
            module = self.layers[path]
            mine = {port for p, port in keys if p == path}
            for name, (tensor, axes) in growing_tensors(module, mine).items():
                for axis, blocks in axes.items():
                    for kind, layout in layouts.items():
                        found = [
                            _rows(ports[path, b.port], b, rank, len(members), kind)
                            for b in blocks
                            if b.port in mine and kind in kinds[path, b.port]
                        ]
                        if not found or not (isinstance(tensor, nn.Parameter) or kind == "through"):
                            continue
                        rows = np.concatenate(found, axis=1)
                        size = rows.shape[1] * (tensor.numel() // max(1, tensor.shape[axis]))
                        layout.append(ThetaBlock(path, name, axis, rows, size))
        return ChannelGroup(
            name=(by_kind["out"] + by_kind["in"])[0] or "(root)",
            width=len(members),
            dim=sum(block.size for block in layouts["out"]),
            producers=by_kind["out"],
            channelwise=by_kind["through"],
            consumers=by_kind["in"],
            neurons=tuple(members),
            theta=tuple(layouts["out"]),
            through=tuple(layouts["through"]),
            outgoing=tuple(layouts["in"]),
            paired=any("in" in found and port_kind(key[1]) == "out" for key, found in kinds.items()),
        )

    def _why_not(self, group: ChannelGroup) -> str | None:
        if not group.consumers:
            return _STARVED if self.starved.intersection(group.producers) else _REFUSED_IN_USE
        for block in group.theta:
            tensor = self.layers[block.module]._parameters.get(block.tensor)
            if tensor is None or not tensor.requires_grad:
                full = f"{block.module}.{block.tensor}".lstrip(".")
                return f"the incoming weight '{full}' is frozen (requires_grad=False)"
        if not group.dim:
            return "they have no incoming weights of their own"
        return None

    def _bar_shared_and_leaked(self) -> None:
        sites: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for path, module in self.layers.items():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    sites[id(tensor)].append((path, name))
        reasons = dict(self.leaked)
        for places in sites.values():
            if len(places) > 1:
                names = " and ".join(f"'{p}.{n}'" for p, n in places)
                reasons |= dict.fromkeys(places, f"is one tensor shared by {names}")
        for (path, name), why in reasons.items():
            _, axes = growing_tensors(self.layers[path]).get(name, (None, {}))
            for port in {block.port for blocks in axes.values() for block in blocks}:
                ids = self.ports.get((path, port), self.loose.get((path, port)))
                if ids is not None:
                    self.table.bar(ids.tolist(), f"the tensor '{f'{path}.{name}'.lstrip('.')}' {why}")


class _Kind(NamedTuple):
    """Neurons that occur on the same ports, equally often on each, and are barred for the same reason."""

    keys: Sequence[PortKey]  # the ports, in their order
    reason: str | None
    members: Index


def _alike(ports: Mapping[PortKey, PortMap], size: int, reasons: Mapping[int, str]) -> list[_Kind]:
    """All neurons sorted by where they occur, those with the smallest ids first."""
    kind = np.zeros(size, dtype=np.int64)
    steps: list[tuple[int, PortKey | None]] = [(0, None)]  # of each kind the one before, and one port more
    for key, port in ports.items():
        ids = port.neuron[port.neuron >= 0]
        counts = np.ones_like(ids)
        if not bool((ids[1:] > ids[:-1]).all()):
            ids, counts = np.unique(ids, return_counts=True)
        if ids.size:
            pairs = kind[ids] * (counts.max() + 1) + counts
            distinct, which = np.unique(pairs, return_inverse=True)
            kind[ids] = len(steps) + which
            steps += [(before, key) for before in (distinct // (counts.max() + 1)).tolist()]
    barred = np.zeros(size, dtype=np.int64)
    numbers: dict[str, int] = {}
    for i, reason in reasons.items():
        barred[i] = numbers.setdefault(reason, len(numbers) + 1)
    placed = np.flatnonzero(kind)
    _, first, which = np.unique(
        kind[placed] * (len(numbers) + 1) + barred[placed], return_index=True, return_inverse=True
    )
    by_kind = np.split(placed[np.argsort(which, kind="stable")], np.cumsum(np.bincount(which))[:-1])
    return [
        _Kind(_keys(steps, int(kind[members[0]])), reasons.get(int(members[0])), members)
        for members in (by_kind[n] for n in np.argsort(first).tolist())
    ]


def _keys(steps: Sequence[tuple[int, PortKey | None]], kind: int) -> list[PortKey]:
    keys = []
    while kind:
        kind, key = steps[kind]
        assert key is not None
        keys.append(key)
    return keys[::-1]


def _kinds(key: PortKey, port: PortMap, rank: Index) -> set[str]:
    """What a port is to the neurons of a group: rows of a producer may be outgoing weights."""
    if port.reads is None:
        return {port_kind(key[1])}
    mine = (port.neuron >= 0) & (rank[port.neuron] >= 0)
    return {"in" if reads else "out" for reads in np.unique(port.reads[mine]).tolist()}


def _rows(port: PortMap, block: Block, rank: Index, width: int, kind: str) -> Index:
    """Entries of a tensor's axis that each neuron of a group owns in one block, ``(width, r)``, in order."""
    owner = np.where(port.neuron >= 0, rank[port.neuron], -1)
    if port.reads is not None:
        owner[port.reads != (kind == "in")] = -1
    owner = np.repeat(owner, block.multiple)
    positions = np.flatnonzero(owner >= 0)
    positions = positions[np.argsort(owner[positions], kind="stable")]
    return block.start + positions.reshape(width, -1)
