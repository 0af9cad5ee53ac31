"""What a run remembers of its growths, over a crash too. Plain numbers and names only."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from lightning_split.lineage import Lineage
from lightning_split.report import GrowthReport

__all__ = ["Chronicle"]


class Chronicle:
    """The growths so far, the family tree of the neurons, and the groups that have to be left alone."""

    def __init__(self) -> None:
        self.reports: list[GrowthReport] = []  # of this process, not restored on resume
        self.history: list[dict[str, Any]] = []
        self.lineage = Lineage()
        self.barred: dict[str, str] = {}
        self.followers: dict[str, str] = {}  # copies that grow with their originals

    @property
    def num_growths(self) -> int:
        """How many of the growths split something."""
        return sum(1 for event in self.history if event["num_splits"])

    @property
    def seed_cost(self) -> float | None:
        """What the network cost before its first growth, in the strategy's unit."""
        return self.history[0]["cost_before"] if self.history else None

    def begin(
        self, widths: Mapping[str, int], barred: Mapping[str, str], followers: Mapping[str, str]
    ) -> None:
        """Note the network as the first batch found it; one that has grown keeps its lineage."""
        self.barred |= barred
        self.followers |= followers
        if not self.history:
            self.lineage = Lineage.start(widths)

    def record(self, report: GrowthReport, *, epoch: int, step: int) -> int:
        """Note a growth, and return its number, from 1."""
        number = len(self.history) + 1
        self.barred.update(report.barred)
        offspring: dict[str, dict[int, tuple[float, ...]]] = {}
        for split in report.splits:
            offspring.setdefault(split.group, {})[split.neuron] = split.weights
        for group, weights in offspring.items():
            self.lineage.record(
                group,
                {neuron: len(w) for neuron, w in weights.items()},
                growth=number,
                width=report.widths_before[group],
                new={neuron: [i for i, v in enumerate(w) if v == 0] for neuron, w in weights.items()},
            )
        self.history.append(
            {
                "growth": number,
                "epoch": int(epoch),
                "step": int(step),
                "num_splits": len(report.splits),
                "splits": [[s.group, int(s.neuron), list(s.weights)] for s in report.splits],
                "predicted_gain": float(report.predicted_gain),
                "loss_before": float(report.loss_before),
                "loss_after": float(report.loss_after),
                "params": int(report.cost_after.params),
                "macs": float(report.cost_after.macs),
                "cost_before": float(report.spending.before),
                "spent": float(report.spending.spent),
                "widths_before": dict(report.widths_before),
                "widths_after": dict(report.widths_after),
            }
        )
        self.reports.append(report)
        return number

    def state_dict(self) -> dict[str, Any]:
        """A copy that later growths do not change: another thread may write it later."""
        return {
            "history": deepcopy(self.history),
            "lineage": self.lineage.to_dict(),
            "barred": dict(self.barred),
            "followers": dict(self.followers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        self.history = [dict(event) for event in state["history"]]
        self.lineage = Lineage.from_dict(state["lineage"])
        self.barred = dict(state["barred"])
        self.followers = dict(state["followers"])
