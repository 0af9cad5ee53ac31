"""The neurons that a trace meets: which exist, which are one and the same, which are barred and why."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["FIXED", "Ids", "NeuronTable"]

Ids = npt.NDArray[np.int64]
FIXED = -1  # label of an element that belongs to no neuron


class NeuronTable:
    """Ids of all channel positions that layers produce, and what was found out about them.

    An *id* is one position on the output of a producer. Ids that are *tied* are one neuron; ids that are
    *fused* are, in addition, neighbours that must stay together as one block.
    """

    def __init__(self) -> None:
        self._ties: list[Ids] = []  # each (2, n)
        self._kept: list[Ids] = []  # ties of which only the first row is seen again
        self._store = np.full(1, FIXED)  # the block of each id; what is left stands for no neuron
        self._lookup = torch.from_numpy(self._store)
        self._runs = self._store[:0]
        self._reasons: dict[int, str] = {}
        self.num_fused = 0  # how often blocks have become larger

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self._runs)

    def mint(self, count: int, tiles: int = 1) -> Ids:
        """New ids for the outputs of a producer; a gap before each tile, so that others are no neighbours."""
        if tiles > 1:
            return np.concatenate([self.mint(count // tiles) for _ in range(tiles)])
        old, start = self.size, self.size + 1
        end = start + count
        if end >= len(self._store):
            self._store = np.append(self._runs, np.full(end + 1, FIXED))  # twice as long
            self._lookup = torch.from_numpy(self._store)
        self._runs = self._store[:end]
        self._runs[old:] = np.arange(old, end, dtype=np.int64)
        return self._runs[start:].copy()

    def tie(self, a: Ids, b: Ids, *, both: bool = False) -> None:
        """Declare ``a[i]`` and ``b[i]`` the same neuron.

        Args:
            a: Ids, which what is computed of both has.
            b: Others.
            both: Nothing is computed of both: each has its own from there on.
        """
        self._ties.append(np.stack([a, b]))
        if not both:
            self._kept.append(self._ties[-1])

    @property
    def num_kept(self) -> int:
        """How many ties have made values of which one neuron is seen in place of two."""
        return len(self._kept)

    def release(self, ties: slice) -> None:
        """What these ties made of two neurons is gone again, and nobody has read it."""
        for i in range(*ties.indices(len(self._kept))):
            self._kept[i] = self._kept[i][:, :0]

    def origins(self, ids: Ids) -> Ids:
        """The blocks that these ids stand for: where values with these labels come from."""
        found = np.unique(self.blocks(ids))
        if not self._kept:
            return found
        seen, hidden = self._store[np.concatenate(self._kept, axis=1)]
        while True:
            more = np.union1d(found, hidden[np.isin(seen, found)])
            if len(more) == len(found):
                return found
            found = more

    def fuse(self, ids: Ids) -> bool:
        """Declare neighbouring ids one block; ``False`` if they are not neighbours."""
        members = np.flatnonzero(np.isin(self._runs, self._runs[ids]))  # whole blocks fuse
        if len(members) != members[-1] - members[0] + 1:
            return False
        self.num_fused += bool((self._runs[members] != members[0]).any())
        self._runs[members] = members[0]
        return True

    def join(self, rows: Tensor) -> bool:
        """Make each row of neighbouring ids one neuron, which moves as a block; ``False`` if it cannot be."""
        for row in rows.numpy():
            if (row >= 0).any():
                if (row < 0).any() or not self.fuse(row):
                    return False
                self.tie(row[:-1], row[1:])
        return True

    def runs(self, labels: Tensor) -> Tensor:
        """Labels with every id replaced by its block's first id (``-1`` stays)."""
        return self._lookup[labels]  # to which -1 leads, the last entry, is free

    def blocks(self, ids: Ids) -> Ids:
        """The same for an array."""
        return self._store[ids]

    def bar(self, ids: Iterable[int], reason: str) -> None:
        """Mark neurons as unsplittable; the first reason given is kept."""
        for i in ids:
            if i >= 0:
                self._reasons.setdefault(i, reason)

    def resolve(self) -> tuple[Ids, Ids, dict[int, str]]:
        """For each id its neuron (smallest tied id) and its block; and why barred neurons are barred."""
        a, b = np.concatenate([np.stack([np.arange(self.size), self._runs]), *self._ties], axis=1)
        edges = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(self.size, self.size))
        _, component = connected_components(edges, directed=False)
        _, first = np.unique(component, return_index=True)
        neuron = first[component].astype(np.int64)
        reasons: dict[int, str] = {}
        for i, reason in self._reasons.items():
            reasons.setdefault(int(neuron[i]), reason)
        return neuron, self._runs.copy(), reasons
