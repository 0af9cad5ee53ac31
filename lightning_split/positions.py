"""Which layers and raw matrices run along positions: along another axis than that of the neurons."""

from __future__ import annotations

from collections.abc import Set

from lightning_split.architecture import Architecture
from lightning_split.labels import Owner

__all__ = ["Positional", "Positions"]

Positional = frozenset[str | Owner]  # paths of layers, and raw matrices


class Positions:
    """What a trace has seen of them.

    Args:
        known: Those that are positional whatever they meet, and leave neurons what they are.
    """

    def __init__(self, known: Positional) -> None:
        self.known = known
        self._across: dict[str | Owner, set[str]] = {}  # what met neurons along another axis: and whose
        self._along: set[Owner] = set()  # raw matrices that met neurons, or nobody's values, along theirs

    def across(self, who: str | Owner, makers: Set[str]) -> None:
        """A layer or a raw matrix meets neurons of these layers along another axis than it reads."""
        self._across.setdefault(who, set()).update(makers)

    def along(self, who: Owner) -> None:
        """A raw matrix reads along the axis of neurons, or values of nobody."""
        self._along.add(who)

    def found(self, arch: Architecture) -> Positional:
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
