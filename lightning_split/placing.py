"""Where the weights of the offspring lie in the new tensors: to move them, to read them, to fill them in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_split.architecture import Architecture, ThetaBlock
from lightning_split.splits import PARTS, Part, Split, blocks_of
from lightning_split.widening import AxisGrowth, scale_

__all__ = ["Move", "Placing", "Widened"]


@dataclass(frozen=True, eq=False)
class Widened:
    """A new tensor, and how its axes grew."""

    new: Tensor
    axes: dict[int, AxisGrowth]


class Move(NamedTuple):
    """What is added to some rows of a tensor."""

    tensor: Tensor
    axis: int  # along which the displaced rows lie
    entries: Tensor  # (n,) which rows
    values: Tensor  # (n, ...) what is added to them, the row axis in front

    def carry_out(self) -> None:
        """Add it, in place."""
        self.tensor.movedim(self.axis, 0).index_add_(0, self.entries, self.values)


class _Place(NamedTuple):
    entries: Tensor  # (splits x entries per neuron,) along the block's axis
    others: dict[int, Tensor]  # for each other axis that grew the entries of the first offspring
    num_splits: int
    lifts: dict[
        int, Tensor
    ]  # by axis, where it is not 1: what displacements of the entries are multiplied by

    def lifted(self, rows: Tensor, axis: int) -> Tensor:
        """Entries along the block's axis in front, times what their displacements are multiplied by."""
        for a, lift in self.lifts.items():
            place = 0 if a == axis else a + (a < axis)
            rows = scale_(rows.clone(), lift, place)
        return rows


class Placing:
    """The offspring of some splits in widened tensors.

    Args:
        arch: The architecture before the growth.
        splits: The splits.
        widened: The new tensors, by module path and name; may still fill up.
    """

    def __init__(
        self, arch: Architecture, splits: Sequence[Split], widened: Mapping[tuple[str, str], Widened]
    ) -> None:
        self._arch, self._splits, self._widened = arch, splits, widened
        self._of_group: dict[str, list[int]] = defaultdict(list)  # numbers of the splits of each group
        for n, split in enumerate(splits):
            self._of_group[split.group].append(n)

    def grown(self, part: Part) -> dict[tuple[str, str], Tensor]:
        """The new tensors that hold one part of the offspring's weights, by module path and name."""
        keys = [(b.module, b.tensor) for g in self._of_group for b in blocks_of(self._arch.group(g), part)]
        return {key: self._widened[key].new for key in dict.fromkeys(keys) if key in self._widened}

    def entries(self, path: str, name: str, ordinal: int) -> Tensor:
        """Entries of one offspring of every split, along the one neuron axis of a channelwise tensor."""
        (growth,) = self._widened[path, name].axes.values()
        return ((growth.split >= 0) & (growth.ordinal == ordinal)).nonzero().flatten()

    def gather(
        self, part: Part, ordinal: int, tensors: Mapping[tuple[str, str], Tensor]
    ) -> dict[str, Tensor]:
        """Entries of one offspring of every split in tensors shaped as the new ones (gradients, say).

        Returns:
            ``{group: (splits, length of the part)}``, the splits of each group in their order.
        """
        found: dict[str, list[Tensor]] = {n: [torch.zeros(len(m), 0)] for n, m in self._of_group.items()}
        for name, block, place in self._places(part, ordinal):
            rows = tensors[block.module, block.tensor]
            for axis, where in place.others.items():
                rows = rows.index_select(axis, where.to(rows.device))
            entries = place.entries.to(rows.device)
            mine = place.lifted(rows.movedim(block.axis, 0)[entries], block.axis)
            found[name].append(mine.reshape(place.num_splits, block.size))
        return {name: torch.cat([p.to(parts[-1]) for p in parts], dim=1) for name, parts in found.items()}

    def scatter(
        self, part: Part, ordinal: int, vectors: Mapping[str, Tensor]
    ) -> dict[tuple[str, str], Tensor]:
        """The transpose of :meth:`gather`: tensors that are zero but for one offspring of every split."""
        found = {key: torch.zeros_like(new) for key, new in self.grown(part).items()}
        offset: dict[str, int] = defaultdict(int)
        for name, block, place in self._places(part, ordinal):
            target = found[block.module, block.tensor]
            values = vectors[name][:, offset[name] : offset[name] + block.size].to(target)
            offset[name] += block.size
            others = [a for a in range(target.ndim) if a != block.axis]
            sizes = [len(place.others[a]) if a in place.others else target.shape[a] for a in others]
            rows = place.lifted(values.reshape(len(place.entries), *sizes), block.axis)
            for number, axis in enumerate(others, start=1):
                where = place.others.get(axis)
                if where is not None:
                    wide = list(rows.shape)
                    wide[number] = target.shape[axis]
                    rows = rows.new_zeros(wide).index_copy_(number, where.to(rows.device), rows)
            target.movedim(block.axis, 0).index_add_(0, place.entries.to(target.device), rows)
        return found

    def moves(self, splits: Sequence[Split]) -> list[Move]:
        """What the displacements of these splits (in any order) add to which tensors."""
        found = {(split.group, split.neuron): split for split in splits}
        ordered = [found[split.group, split.neuron] for split in self._splits]
        return [move for part in PARTS for move in self._of_part(part, ordered)]

    def _of_part(self, part: Part, splits: Sequence[Split]) -> Iterator[Move]:
        for name, mine in self._of_group.items():
            if all(splits[n].part(part) is None for n in mine):
                continue
            offset = 0
            for block in blocks_of(self._arch.group(name), part):
                start, offset = offset, offset + block.size
                found = self._widened.get((block.module, block.tensor))
                if found is None:
                    continue  # a tensor that is tied to another one
                moved = []
                for n in mine:
                    value = splits[n].part(part)
                    moved.append(
                        found.new.new_zeros(len(splits[n].weights), block.size)
                        if value is None
                        else value[:, start:offset].to(found.new)
                    )
                yield self._move(block, found, mine, torch.cat(moved))

    def _move(self, block: ThetaBlock, found: Widened, mine: list[int], moved: Tensor) -> Move:
        g = found.axes[block.axis]
        # Row of ``moved`` where the offspring of each split begin, and which of its entries each old row is.
        begins = torch.full((len(self._splits) + 1,), -1)
        counts = [len(self._splits[n].weights) for n in mine]
        begins[mine] = torch.tensor([0, *counts]).cumsum(0)[:-1]
        position = _positions(block, g)
        entries = ((begins[g.split] >= 0) & (position >= 0)).nonzero().flatten()
        position = position[entries]
        others = [a for a in range(found.new.ndim) if a != block.axis]
        rows = moved.reshape(len(moved), block.rows.shape[1], *self._old_shape(found, others))
        offspring = begins[g.split[entries]] + g.ordinal[entries]
        values = rows[offspring.to(rows.device), position.to(rows.device)]
        for number, axis in enumerate(others, start=1):
            grew = found.axes.get(axis)
            if grew is not None:
                values = values.index_select(number, grew.index.to(values.device))
                if bool(grew.reads.any()):
                    scale_(values, grew.factor, number)
        lift = g.lift[entries]
        if bool((lift != 1).any()):
            scale_(values, lift, 0)
        return Move(found.new, block.axis, entries.to(found.new.device), values)

    @staticmethod
    def _old_shape(found: Widened, axes: Sequence[int]) -> list[int]:
        return [int(found.axes[a].index.max()) + 1 if a in found.axes else found.new.shape[a] for a in axes]

    def _places(self, part: Part, ordinal: int) -> Iterator[tuple[str, ThetaBlock, _Place]]:
        """Where one offspring of every split is, block by block."""
        for name, mine in self._of_group.items():
            order = torch.full((len(self._splits) + 1,), -1)
            order[mine] = torch.arange(len(mine))
            for block in blocks_of(self._arch.group(name), part):
                found = self._widened.get((block.module, block.tensor))
                if found is None:
                    continue
                g = found.axes[block.axis]
                position = _positions(block, g)
                inside = (order[g.split] >= 0) & (g.ordinal == ordinal) & (position >= 0)
                entries = inside.nonzero().flatten()
                key = order[g.split[entries]] * block.rows.shape[1] + position[entries]
                others = {a: grew.originals for a, grew in found.axes.items() if a != block.axis}
                entries = entries[key.argsort()]
                lifts = {a: grew.lift[others.get(a, entries)] for a, grew in found.axes.items()}
                lifts = {a: lift for a, lift in lifts.items() if bool((lift != 1).any())}
                yield name, block, _Place(entries, others, len(mine), lifts)


def _positions(block: ThetaBlock, growth: AxisGrowth) -> Tensor:
    """For each new entry of the block's axis, which of its neuron's entries it is, or -1."""
    found = torch.full((int(growth.index.max()) + 1,), -1)
    found[torch.from_numpy(block.rows)] = torch.arange(block.rows.shape[1]).expand(block.rows.shape)
    return found[growth.index]
