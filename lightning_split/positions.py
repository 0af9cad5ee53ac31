"""Which layers and raw matrices run along positions: along another axis than that of the neurons."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from lightning_split.architecture import Architecture
from lightning_split.labels import Owner

__all__ = ["Positional", "Positions"]


class Positional(NamedTuple):
    """What is taken for granted in a trace."""

    known: frozenset[str | Owner] = frozenset()  # layers and raw matrices that leave neurons what they are
    crossed: frozenset[Owner] = frozenset()  # raw matrices that make neurons of their own of positions


class Positions:
    """What a trace has seen of them.

    Args:
        granted: Those of which this is known.
    """

    def __init__(self, granted: Positional) -> None:
        self.known, self._crossed = granted
        self.kept: dict[Owner, int] = {}  # raw matrices that made positions; how many
        self._across: dict[str | Owner, set[str]] = {}  # what met neurons along another axis: and whose
        self._along: set[Owner] = set()  # raw matrices that met neurons, or nobody's values, along theirs

    def across(self, who: str | Owner, makers: Set[str]) -> None:
        """A layer or a raw matrix meets neurons of these layers along another axis than it reads."""
        self._across.setdefault(who, set()).update(makers)

    def makes_positions(self, who: Owner, makers: Set[str], count: int | None) -> bool:
        """Whether a raw matrix that meets neurons across leaves them what they are, or makes others.

        Args:
            who: The matrix.
            makers: The layers whose neurons they are.
            count: Of what it makes; ``None`` if it sums.
        """
        if who in self._crossed:
            return False
        self.across(who, makers)
        if count is not None:
            self.kept[who] = count
        return True

    def along(self, who: Owner) -> None:
        """A raw matrix reads along the axis of neurons, or values of nobody."""
        self._along.add(who)

    def found(self, arch: Architecture) -> frozenset[str | Owner]:
        """Layers along whose inputs neurons lie otherwise, and which make none that can be split.

        And raw matrices of which that is true in some products, but not in all: those in which it is true
        of all are operators like others.
        """
        growing: set[str | Owner] = {path for group in arch.groups for path in group.producers}
        growing |= {(block.module, block.tensor) for group in arch.groups for block in group.theta}
        found: set[str | Owner] = set()
        for who, makers in self._across.items():  # in the order of the calls
            mixed = isinstance(who, str) or who in self._along
            if mixed and who not in growing and not makers & found:
                found.add(who)
        return frozenset(found)
