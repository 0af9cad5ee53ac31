"""What tracing finds: channel groups, where their neurons sit in every layer, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_split.layers import Port

__all__ = ["Architecture", "ChannelGroup", "Counted", "PortMap", "ThetaBlock", "Unsplittable", "Written"]

Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
PortKey = tuple[str, Port]


class PortMap(NamedTuple):
    """Which neuron sits at each position of one port of one layer."""

    neuron: Index  # (size,) id of the neuron at each position, -1 where nothing can grow
    run: Index  # (size,) neighbouring positions of equal run move as one block
    reads: Mask | None = None  # (size,) rows that are outgoing weights: of a key, which its query meets
    power: float | None = None  # by which of their number what they make is divided, if that is known


class ThetaBlock(NamedTuple):
    """The part of the neurons' weights that one tensor holds."""

    module: str  # path of the layer
    tensor: str  # name of the parameter or buffer in the layer
    axis: int  # axis of the tensor along which neurons lie
    rows: Index  # (width, r) entries of that axis that each neuron owns
    size: int  # number of scalars per neuron: r x (elements of one entry)


class Counted(NamedTuple):
    """A number per sample that grows with neurons: a factor times sizes."""

    factor: float
    axes: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = ()
    # axes: a size, and for each neuron by its id how many entries of it belong to the neuron

    def led(self, leaders: Mapping[int, int]) -> Counted:
        """The same with some neurons taken for others, with which they grow."""
        return self._replace(
            axes=tuple((size, tuple((leaders.get(i, i), n) for i, n in own)) for size, own in self.axes)
        )


class Written(NamedTuple):
    """What one call of a layer writes, or a product with a raw matrix."""

    values: Counted
    bytes_each: int
    axis: int | None  # along which neurons lie, from the end


@dataclass(frozen=True)
class ChannelGroup:
    """All axes of all layers that must have the same width, because they carry the same neurons.

    A neuron's incoming weights θ are its rows in all ``producers``, in order: each producer's weight
    flattened, then its bias; ``dim`` scalars together. Its outgoing weights are its columns in all
    ``consumers``, in the same manner.

    Neurons may also meet other activations in a sum of products, as queries meet keys. Then the rows that
    make the other factor are outgoing weights, and their layer is a consumer.
    """

    name: str
    width: int  # number of neurons
    dim: int  # number of incoming weights of one neuron, biases included
    producers: tuple[str, ...]  # paths of the layers that compute the neurons
    channelwise: tuple[str, ...]  # paths of the layers that treat each of them by itself
    consumers: tuple[str, ...]  # paths of the layers that read them
    params: int = 0  # parameters that one more neuron adds
    macs: float = 0.0  # multiply-accumulates per sample that one more neuron adds
    neurons: tuple[int, ...] = field(default=(), repr=False)  # ids used in Architecture.ports
    theta: tuple[ThetaBlock, ...] = field(default=(), repr=False)
    through: tuple[ThetaBlock, ...] = field(default=(), repr=False)  # what channelwise layers keep of them
    outgoing: tuple[ThetaBlock, ...] = field(default=(), repr=False)  # what consumers multiply them by
    paired: bool = False  # whether they meet other activations in a sum of products (queries meet keys)


@dataclass(frozen=True)
class Unsplittable:
    """Neurons that are left alone, and why."""

    name: str
    reason: str
    width: int = 0


@dataclass(frozen=True)
class Architecture:
    """The traced network: every neuron is either in one of ``groups`` or under ``unsplittable``."""

    groups: tuple[ChannelGroup, ...]
    unsplittable: tuple[Unsplittable, ...] = ()
    ports: Mapping[PortKey, PortMap] = field(default_factory=dict, repr=False)
    uses: Mapping[str, float] = field(default_factory=dict, repr=False)
    # uses: how often each weight of a layer is used for one sample (spatial positions, repeated calls)
    multiplied: Mapping[tuple[str, str], float] = field(default_factory=dict, repr=False)
    # multiplied: the same for each entry of a raw matrix, by the path of its module and its name
    made: Mapping[PortKey, float] = field(default_factory=dict, repr=False)
    # made: the same for each row on a port, of layers that read inputs of several lengths
    products: tuple[Counted, ...] = field(default=(), repr=False)
    # products: MACs of activations with each other, and of weights over positions
    written: Mapping[str, tuple[Written, ...]] = field(default_factory=dict, repr=False)
    # written: what each call of a layer writes, by its path; and what raw matrices write
    note: str = ""  # what tracing could not look at, as a sentence

    def group(self, name: str) -> ChannelGroup:
        """The group of that name.

        Raises:
            KeyError: If there is none; the message lists the names that exist.
        """
        found = self._by_name.get(name)
        if found is not None:
            return found
        known = ", ".join(repr(g.name) for g in self.groups) or "none"
        raise KeyError(f"There is no channel group named {name!r}; the groups are: {known}.")

    @cached_property
    def _by_name(self) -> dict[str, ChannelGroup]:
        return {group.name: group for group in reversed(self.groups)}

    @cached_property
    def owners(self) -> Index:
        """Number of the group of each neuron, by its id; -1 for those that cannot grow, and at the end."""
        most = max([int(p.neuron.max(initial=-1)) for p in self.ports.values()], default=-1)
        owners = np.full(most + 2, -1)  # an id of -1 stands for "no neuron"
        for k, group in enumerate(self.groups):
            owners[list(group.neurons)] = k
        return owners

    @property
    def widths(self) -> dict[str, int]:
        """Number of neurons of every group."""
        return {group.name: group.width for group in self.groups}

    @cached_property
    def curved(self) -> Architecture:
        """The same network with only the groups that can have a splitting matrix other than zero."""
        return replace(self, groups=tuple(g for g in self.groups if not g.paired))

    def scaled(self, names: Collection[str], power: float) -> Architecture:
        """The same network, whose sums of products are divided by their length to this power.

        Args:
            names: Of the paired groups that are summed over.
            power: 0.5 for scores of attention that are divided by the root of the width.
        """
        ports = dict(self.ports)
        for group in map(self.group, names):
            for key, port in self.ports.items():
                if port.reads is not None and np.isin(port.neuron[port.reads], group.neurons).any():
                    ports[key] = port._replace(power=power)
        return replace(self, ports=ports)

    def without(self, reasons: Mapping[str, str]) -> Architecture:
        """The same network with some groups moved to ``unsplittable``, by name and with the reason."""
        kept = tuple(g for g in self.groups if g.name not in reasons)
        moved = tuple(
            Unsplittable(g.name, reasons[g.name], g.width) for g in self.groups if g.name in reasons
        )
        return replace(self, groups=kept, unsplittable=self.unsplittable + moved)

    def __str__(self) -> str:
        lines = []
        if self.groups:
            rows = [
                (
                    *(g.name or "(root)", str(g.width), str(g.dim)),
                    *(_few(p, g.name) for p in (g.producers[1:], g.channelwise, g.consumers)),
                    *(f"{g.params:,}", f"{g.macs:,.0f}"),
                )
                for g in self.groups
            ]
            head = ("group", "width", "dim", "also made by", "channelwise", "read by", "+params", "+MACs")
            lines += table(head, rows, right=(1, 2, 6, 7))
            total = sum(g.width for g in self.groups)
            lines.append(f"{total} splittable neurons in {len(self.groups)} groups.")
        else:
            lines.append("No neuron of this network can be split.")
        if self.unsplittable:
            lines += ["", "Left alone:"]
            lines += table(("neurons of", "width", "reason"), _alike(self.unsplittable), right=(1,))
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines)


def _alike(refused: Sequence[Unsplittable]) -> list[tuple[str, str, str]]:
    """Rows of a table: what differs in numbers only, and is refused for the same reason, is one row."""
    kinds: dict[tuple[str, str], list[Unsplittable]] = {}
    for u in refused:
        kinds.setdefault((re.sub(r"\d+", "*", u.name), u.reason.split(" (in '")[0]), []).append(u)
    rows = []
    for (_, reason), members in kinds.items():
        if len(members) == 1:
            rows.append((members[0].name or "(root)", str(members[0].width), members[0].reason))
        else:
            widths = sorted({u.width for u in members})
            each = str(widths[0]) if len(widths) == 1 else f"{widths[0]}..{widths[-1]}"
            pieces = zip(*(re.split(r"(\d+)", u.name) for u in members), strict=True)
            pattern = "".join(same[0] if len(set(same)) == 1 else "*" for same in pieces)
            rows.append((pattern, f"{len(members)} x {each}", reason))
    return rows


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a plain-text table; columns listed in ``right`` are set flush right."""
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        " | ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    rule = "-+-".join("-" * w for w in widths)
    return [lines[0], rule, *lines[1:]]


def _few(paths: Sequence[str], beside: str, limit: int = 2) -> str:
    """The first paths; what they have in common with another one is left out."""
    shown = ", ".join(_short(p, beside) for p in paths[:limit])
    return shown + (f" +{len(paths) - limit}" if len(paths) > limit else "") or "-"


def _short(path: str, beside: str) -> str:
    """``…mlp.3`` for ``encoder.1.mlp.3`` beside ``encoder.1.mlp.0``; numbers alone would say nothing."""
    parts, others, same = path.split("."), beside.split("."), 0
    while same < min(len(parts) - 1, len(others)) and parts[same] == others[same]:
        same += 1
    while same and all(part.isdigit() for part in parts[same:]):
        same -= 1
    return "…" + ".".join(parts[same:]) if same else path or "(root)"
