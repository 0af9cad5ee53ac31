"""Which of the proposed splits are carried out: priced, chosen by the strategy, and cut to the limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from lightning_split.architecture import Architecture
from lightning_split.costs import NetworkCost, network_cost, neuron_cost
from lightning_split.selection import Candidate, SelectionStrategy, best_per_neuron
from lightning_split.surgery import Split, Surgery

__all__ = ["as_split", "chooser", "within_limits"]


def chooser(
    arch: Architecture, strategy: SelectionStrategy, cost: NetworkCost
) -> Callable[[Sequence[Candidate]], list[Candidate]]:
    """What the strategy chooses among candidates that know their cost."""
    per_neuron = {g.name: neuron_cost(g, strategy.cost) for g in arch.groups}
    bound = strategy.bind(float(getattr(cost, strategy.cost)))

    def choose(candidates: Sequence[Candidate]) -> list[Candidate]:
        priced = [replace(c, cost=per_neuron[c.group] * max(1, len(c.weights) - 1)) for c in candidates]
        chosen = list(bound.select(priced))
        unknown = [c for c in chosen if c.displacements is None or not c.weights]
        if unknown:
            raise ValueError(
                f"{type(strategy).__name__}.select returned a candidate that it was not given (neuron "
                f"{unknown[0].neuron} of '{unknown[0].group}'); return a subset of the candidates."
            )
        return best_per_neuron(chosen)

    return choose


def as_split(candidate: Candidate) -> Split:
    """What surgery does for a candidate."""
    assert candidate.displacements is not None
    return Split(
        candidate.group,
        candidate.neuron,
        candidate.weights,
        candidate.displacements,
        candidate.through,
        candidate.outgoing,
    )


def within_limits(
    model: nn.Module,
    arch: Architecture,
    chosen: list[Candidate],
    max_params: int | None,
    max_macs: float | None,
) -> tuple[Surgery, list[Candidate], str]:
    """The surgery on as many of the best candidates as the limits allow, sized exactly."""
    ranked = sorted(chosen, key=lambda c: (-c.gain, c.group, c.neuron))

    def prepared(count: int) -> tuple[Surgery, bool]:
        surgery = Surgery(model, [as_split(c) for c in ranked[:count]], arch)
        size = network_cost(model, arch, surgery)
        fits = (max_params is None or size.params <= max_params) and (
            max_macs is None or size.macs <= max_macs
        )
        return surgery, fits

    surgery, fits = prepared(len(ranked))
    if fits or not ranked:
        return surgery, chosen, ""
    low, high = 0, len(ranked)  # low fits (or is empty), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if prepared(middle)[1] else (low, middle)
    kept = {id(c) for c in ranked[:low]}
    limits = [f"max_params={max_params:,}"] if max_params is not None else []
    limits += [f"max_macs={max_macs:,.0f}"] if max_macs is not None else []
    limit = f"The limit {' and '.join(limits)} left {low} of {len(ranked)} chosen splits."
    return prepared(low)[0], [c for c in chosen if id(c) in kept], limit
