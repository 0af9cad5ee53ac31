"""Lineage: who descends from whom."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["Lineage"]


class Lineage:
    """The family tree of all neurons of a run, group by group.

    Every neuron has an id that is unique in its group: seed neurons are 0, 1, 2 …, offspring (the
    first one too) and new neurons get the next free ids. The order of the current neurons is that of the
    network: offspring stand next to each other where their parent stood.
    """

    def __init__(self) -> None:
        self._current: dict[str, list[int]] = {}  # group -> ids of its neurons in order
        self._parent: dict[str, list[int]] = {}  # group -> parent of every id, -1 for seed and new neurons
        self._born: dict[str, list[int]] = {}  # group -> growth in which every id was born, 0 for the seed

    @classmethod
    def start(cls, widths: Mapping[str, int]) -> Lineage:
        """The seed network."""
        lineage = cls()
        for group, width in widths.items():
            lineage._add_group(group, width)
        return lineage

    def record(
        self,
        group: str,
        offspring: Mapping[int, int],
        *,
        growth: int,
        width: int = 0,
        new: Mapping[int, Collection[int]] | None = None,
    ) -> None:
        """Note a growth of one group.

        Args:
            group: Its name; a group that was not there before starts with ``width`` neurons.
            offspring: Neuron (index before the growth) -> number of its offspring.
            growth: Number of the growth, from 1.
            width: Width before the growth, needed for a new group only.
            new: Neuron -> which of its offspring are new neurons, which have no ancestors. If all but one
                are, the neuron itself lives on.

        Raises:
            ValueError: If a neuron is out of range or gets fewer than two offspring.
        """
        old = self._current.get(group, list(range(width)))
        for neuron, count in offspring.items():
            if not 0 <= neuron < len(old) or count < 2:
                raise ValueError(
                    f"Group '{group}' has {len(old)} neurons; neuron {neuron} cannot become "
                    f"{count} offspring."
                )
        if group not in self._current:
            self._add_group(group, width)
        current: list[int] = []
        for neuron, identity in enumerate(old):
            count, fresh = offspring.get(neuron, 1), (new or {}).get(neuron, ())
            for ordinal in range(count):
                if ordinal not in fresh and count - len(fresh) == 1:
                    current.append(identity)
                    continue
                current.append(len(self._parent[group]))
                self._parent[group].append(-1 if ordinal in fresh else identity)
                self._born[group].append(int(growth))
        self._current[group] = current

    @property
    def widths(self) -> dict[str, int]:
        """Number of neurons of every group."""
        return {group: len(ids) for group, ids in self._current.items()}

    def ancestor(self, group: str, neuron: int) -> int:
        """The seed neuron, or the new one, that a neuron descends from."""
        identity = self._identity(group, neuron)
        while self._parent[group][identity] >= 0:
            identity = self._parent[group][identity]
        return identity

    def generation(self, group: str, neuron: int) -> int:
        """How many splits lie between a neuron and its seed neuron."""
        identity, count = self._identity(group, neuron), 0
        while self._parent[group][identity] >= 0:
            identity, count = self._parent[group][identity], count + 1
        return count

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, which a checkpoint holds."""
        return {
            group: {
                "current": list(self._current[group]),
                "parent": list(self._parent[group]),
                "born": list(self._born[group]),
            }
            for group in self._current
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Lineage:
        """The lineage that :meth:`to_dict` described."""
        lineage = cls()
        for group, lists in state.items():
            lineage._current[group] = [int(i) for i in lists["current"]]
            lineage._parent[group] = [int(i) for i in lists["parent"]]
            lineage._born[group] = [int(i) for i in lists["born"]]
        return lineage

    def _identity(self, group: str, neuron: int) -> int:
        width = len(self._current.get(group, ()))
        if not 0 <= neuron < width:
            raise ValueError(f"There is no neuron {neuron} in group '{group}', which has {width} neurons.")
        return self._current[group][neuron]

    def _add_group(self, group: str, width: int) -> None:
        self._current[group] = list(range(width))
        self._parent[group] = [-1] * width
        self._born[group] = [0] * width
