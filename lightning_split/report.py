"""What one growth did, as a record that prints as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_split.architecture import Architecture, table
from lightning_split.counting import NetworkCost
from lightning_split.deciding import Spending
from lightning_split.eigen import Eigenpairs
from lightning_split.selection import Candidate
from lightning_split.surgery import Replacement, Split

__all__ = ["GrowthReport"]


@dataclass(frozen=True)
class GrowthReport:
    """What one growth did. ``print(report)`` is a table."""

    splits: tuple[Split, ...]
    chosen: tuple[Candidate, ...]
    predicted_gain: float  # predicted decrease of the loss, as selection saw it
    estimated_gain: float  # the same before it was measured again on fresh batches
    loss_before: float  # mean loss over the check batches, in the mode of the estimation
    loss_after: float
    widths_before: Mapping[str, int]
    widths_after: Mapping[str, int]
    cost_before: NetworkCost
    cost_after: NetworkCost
    spending: Spending = field(default_factory=lambda: Spending("params", 0.0, 0.0))
    candidates: tuple[Candidate, ...] = field(default=(), repr=False)
    eigenpairs: Mapping[str, Eigenpairs] = field(default_factory=dict, repr=False)
    barred: Mapping[str, str] = field(default_factory=dict)  # groups that failed the check, and why
    limit: str = ""  # which limit cut the growth short, as a sentence
    notes: tuple[str, ...] = ()  # what else there is to say, in sentences
    confirmed: bool = False  # whether predicted_gain was measured on fresh batches
    num_fresh: int = 0  # on how many, of all processes together
    num_passed: int = 0  # candidates whose gain is more than noise, by the significance asked for
    replaced: Mapping[nn.Parameter, Replacement] = field(default_factory=dict, repr=False)
    architecture: Architecture = field(default_factory=lambda: Architecture(()), repr=False)
    # architecture: as traced before the growth; with splits it repeats the growth on a copy of the network

    @property
    def measured_gain(self) -> float:
        """By how much the loss really fell."""
        return self.loss_before - self.loss_after

    @property
    def standard_error(self) -> float:
        """Standard error of :attr:`predicted_gain`, neurons taken as independent."""
        return math.sqrt(sum(c.standard_error**2 for c in self.chosen))

    def __str__(self) -> str:
        rows = []
        for name, before in self.widths_before.items():
            mine = [c for c in self.chosen if c.group == name]
            indexes = [c.splitting_index for c in mine if c.splitting_index is not None]
            rows.append(
                (
                    *(name, str(before), str(self.widths_after[name]), str(len(mine))),
                    f"{min(indexes):.3e}" if indexes else "-",
                    f"{sum(c.predicted for c in mine):.3e}" if mine else "-",
                )
            )
        head = ("group", "width", "after", "splits", "splitting index", "predicted gain")
        lines = table(head, rows, right=(1, 2, 3, 4, 5))
        old, new = self.cost_before, self.cost_after
        error = f" ± {self.standard_error:.1e}" if self.confirmed else ""
        lines += [
            f"predicted gain {self.predicted_gain:.3e}{error}"
            + (f" (estimated {self.estimated_gain:.3e})" if self.confirmed else "")
            + f", measured {self.measured_gain:.3e}",
            f"loss {self.loss_before:.5f} -> {self.loss_after:.5f}",
            f"parameters {old.params:,} -> {new.params:,}, MACs {old.macs:,.0f} -> {new.macs:,.0f}",
        ]
        if self.num_passed < len(self.candidates):
            lines.append(
                f"On {self.num_fresh} fresh batches {self.num_passed} of {len(self.candidates)} candidates "
                "have a gain that is more than noise."
            )
        if spending := str(self.spending):
            lines += spending.splitlines()
        if not self.splits:
            lines.append("No neuron was split: no candidate was chosen.")
        if self.limit:
            lines.append(self.limit)
        lines += self.notes
        lines += [f"'{name}' was left alone: {why}." for name, why in self.barred.items()]
        return "\n".join(lines)
