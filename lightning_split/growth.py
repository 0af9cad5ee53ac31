"""One growth: the stages once, in order. Knows no Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lightning_split.architecture import Architecture, ChannelGroup, table
from lightning_split.costs import NetworkCost, network_cost, neuron_cost
from lightning_split.curvature import LossFn, SplittingOperator, check_loss
from lightning_split.eigen import Eigenpairs
from lightning_split.growers import Grower, Proposal, SteepestSplitting
from lightning_split.measuring import undisturbed
from lightning_split.ranks import Ranks
from lightning_split.selection import Candidate, SelectionStrategy, TopK, best_per_neuron
from lightning_split.surgery import Replacement, Split, Surgery
from lightning_split.tracing import trace_step
from lightning_split.verification import Readings, readings, what_broke

__all__ = ["GrowthReport", "NothingToSplitError", "grow", "select_groups"]


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
    candidates: tuple[Candidate, ...] = field(default=(), repr=False)
    eigenpairs: Mapping[str, Eigenpairs] = field(default_factory=dict, repr=False)
    barred: Mapping[str, str] = field(default_factory=dict)  # groups that failed the check, and why
    limit: str = ""  # which limit cut the growth short, as a sentence
    confirmed: bool = False  # whether predicted_gain was measured on fresh batches
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
                    f"{sum(c.gain for c in mine):.3e}" if mine else "-",
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
        if not self.splits:
            lines.append("No neuron was split: no candidate was chosen.")
        if self.limit:
            lines.append(self.limit)
        lines += [f"'{name}' was left alone: {why}." for name, why in self.barred.items()]
        return "\n".join(lines)


class NothingToSplitError(ValueError):
    """The network has layers, and not one of their neurons can be split now."""

    def __init__(self, message: str, *, frozen: bool) -> None:
        super().__init__(message)
        self.frozen = frozen  # some only because their weights are frozen, which may change


def grow(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    grower: Grower | None = None,
    strategy: SelectionStrategy | None = None,
    step_size: float = 1e-2,
    confirm_batches: Iterable[Any] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    barred: Mapping[str, str] | None = None,
    max_params: int | None = None,
    max_macs: float | None = None,
    surrogate_beta: float | None = 3.0,
    train_mode: bool = False,
    cache_bytes: int = 2**30,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> GrowthReport:
    """Grow a network once, in place, by splitting the neurons that pay.

    Traces the network, finds the extreme eigenpairs of all splitting matrices, lets the strategy choose,
    widens the layers, checks that every layer reads what it read before, and moves the offspring apart.
    The growth happens completely or not at all; everything else about the model stays as it was.

    Args:
        model: Any network.
        batches: An iterable of what ``loss_fn`` takes; the splitting matrices are averaged over it.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss.
        grower: Proposes; default :class:`SteepestSplitting`.
        strategy: Chooses; default ``TopK(fraction=0.3)``.
        step_size: ε, the length of the offspring's displacement.
        confirm_batches: Fresh batches on which the gains are measured again, and the loss before and after.
            Without them both come from ``batches``.
        include: Patterns of group or producer names that may grow (``fnmatch``; default all).
        exclude: Patterns of names that may not.
        barred: Group names that must be left alone, with reasons (from earlier reports).
        max_params: The grown network has at most so many parameters.
        max_macs: The grown network has at most so many MACs per sample.
        surrogate_beta: See :class:`~lightning_split.curvature.SplittingOperator`.
        train_mode: Estimate in training mode instead of eval mode.
        cache_bytes: Memory for graphs that are kept between products; more is faster.
        seed: Makes a growth repeatable bit for bit.
        ranks: Collectives, where several processes grow together.

    Returns:
        The report; ``report.replaced`` carries an optimizer along
        (:func:`lightning_split.optim.carry_state`).

    Raises:
        ValueError: With one sentence, if a loss is not finite or does not depend on the network, there is no
            batch, no group matches, or no neuron can be split. The model is unchanged then.
    """
    grower = grower or SteepestSplitting()
    strategy = strategy or TopK(fraction=0.3)
    ranks = ranks or Ranks()
    batches = list(batches)
    fresh = None if confirm_batches is None else list(confirm_batches)
    _check_arguments(batches, fresh, step_size)
    whole = trace_step(model, batches[0], loss_fn)
    arch = select_groups(whole.without(dict(barred or {})), include, exclude)
    check = fresh or batches
    before_loss = _mean_loss(model, check, loss_fn, train_mode, seed, ranks)

    def operator(over: list[Any]) -> SplittingOperator:
        return SplittingOperator(
            model,
            arch,
            over,
            loss_fn,
            surrogate_beta=surrogate_beta,
            train=train_mode,
            cache_bytes=cache_bytes,
            seed=seed,
        )

    proposal = grower.propose(
        arch,
        operator(batches),
        step_size=step_size,
        confirm=None if fresh is None else operator(fresh),
        seed=seed,
        ranks=ranks,
    )
    cost = network_cost(model, whole)
    chosen = ranks.agree(_choose(proposal, arch, strategy, cost))

    before = _checked_readings(model, arch, check[0], loss_fn, seed)
    broken: dict[str, str] = {}
    while True:
        surgery, chosen, limit = _within_limits(model, whole, chosen, max_params, max_macs)
        why = ranks.agree(_first_break(model, arch, surgery, before, check[0], loss_fn, seed))
        if why is None:
            break
        culprit = ranks.agree(_culprit(model, arch, chosen, before, check[0], loss_fn, seed))
        broken[culprit] = why
        chosen = [c for c in chosen if c.group != culprit]

    after_cost = network_cost(model, whole, surgery)
    if chosen:
        surgery.apply()
        try:
            surgery.displace()
            after_loss = _mean_loss(model, check, loss_fn, train_mode, seed, ranks)
        except BaseException:
            surgery.revert()
            raise
    else:
        after_loss = before_loss
    grown = {c.group: 0 for c in chosen}
    for c in chosen:
        grown[c.group] += len(c.weights) - 1
    estimated = proposal.estimated_gain
    return GrowthReport(
        splits=tuple(_split(c) for c in chosen),
        chosen=tuple(chosen),
        predicted_gain=sum(c.gain for c in chosen),
        estimated_gain=sum(estimated.get((c.group, c.neuron, c.scheme), c.gain) for c in chosen),
        loss_before=before_loss,
        loss_after=after_loss,
        widths_before=arch.widths,
        widths_after={n: w + grown.get(n, 0) for n, w in arch.widths.items()},
        cost_before=cost,
        cost_after=after_cost,
        candidates=proposal.candidates,
        eigenpairs=proposal.eigenpairs,
        barred=broken,
        limit=limit,
        confirmed=fresh is not None,
        replaced=surgery.replaced,
        architecture=arch,
    )


def select_groups(
    arch: Architecture, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> Architecture:
    """The architecture with only the groups that the patterns let through.

    Raises:
        ValueError: If nothing is left, saying what there was.
    """

    def named(group: ChannelGroup, patterns: Sequence[str]) -> bool:
        names = (group.name, *group.producers)
        return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)

    if not arch.groups and not arch.unsplittable:
        raise ValueError(
            "No neuron of this network can be split: no layer that has a LayerRule was called. Either the "
            "loss does not depend on the network, or its layers need a rule (register_layer_rule)."
        )
    if not arch.groups:
        reasons = "; ".join(f"'{u.name}': {u.reason}" for u in arch.unsplittable[:5])
        raise NothingToSplitError(
            f"No neuron of this network can be split ({reasons}).",
            frozen=any("is frozen" in u.reason for u in arch.unsplittable),
        )
    kept = [
        g
        for g in arch.groups
        if (include is None or named(g, include)) and not (exclude and named(g, exclude))
    ]
    if not kept:
        known = ", ".join(repr(g.name) for g in arch.groups)
        raise ValueError(
            f"include={list(include) if include is not None else None} and "
            f"exclude={list(exclude) if exclude is not None else None} leave no channel group; the groups "
            f"are: {known}."
        )
    return replace(arch, groups=tuple(kept))


def _check_arguments(batches: list[Any], fresh: list[Any] | None, step_size: float) -> None:
    if not batches:
        raise ValueError("grow needs at least one batch, and the iterable is empty.")
    if fresh is not None and not fresh:
        raise ValueError("confirm_batches is empty; pass None to do without a confirmation.")
    if not 0 <= step_size < float("inf"):
        raise ValueError(
            f"step_size is the length of a displacement: it must be at least 0, got {step_size}."
        )


def _mean_loss(
    model: nn.Module, batches: list[Any], loss_fn: LossFn, train: bool, seed: int, ranks: Ranks
) -> float:
    losses = []
    for number, batch in enumerate(batches):
        with undisturbed(model, train=train, seed=seed):
            loss = loss_fn(model, batch)
            check_loss(loss, number)
            losses.append(loss.detach().double().cpu().reshape(()))
    return float(ranks.mean_of({"loss": torch.stack(losses).mean()})["loss"])


def _choose(
    proposal: Proposal, arch: Architecture, strategy: SelectionStrategy, cost: NetworkCost
) -> list[Candidate]:
    """Let the strategy choose among candidates that know their cost."""
    per_neuron = {g.name: neuron_cost(g, strategy.cost) for g in arch.groups}
    priced = [replace(c, cost=per_neuron[c.group] * max(1, len(c.weights) - 1)) for c in proposal.candidates]
    chosen = list(strategy.bind(float(getattr(cost, strategy.cost))).select(priced))
    unknown = [c for c in chosen if c.displacements is None or not c.weights]
    if unknown:
        raise ValueError(
            f"{type(strategy).__name__}.select returned a candidate that it was not given (neuron "
            f"{unknown[0].neuron} of '{unknown[0].group}'); return a subset of the candidates."
        )
    return best_per_neuron(chosen)


def _split(candidate: Candidate) -> Split:
    assert candidate.displacements is not None
    return Split(candidate.group, candidate.neuron, candidate.weights, candidate.displacements)


def _within_limits(
    model: nn.Module,
    arch: Architecture,
    chosen: list[Candidate],
    max_params: int | None,
    max_macs: float | None,
) -> tuple[Surgery, list[Candidate], str]:
    """The surgery on as many of the best candidates as the limits allow, sized exactly."""
    ranked = sorted(chosen, key=lambda c: (-c.gain, c.group, c.neuron))

    def prepared(count: int) -> tuple[Surgery, bool]:
        surgery = Surgery(model, [_split(c) for c in ranked[:count]], arch)
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


def _checked_readings(
    model: nn.Module, arch: Architecture, batch: Any, loss_fn: LossFn, seed: int
) -> Readings:
    with undisturbed(model, train=False, seed=seed):
        return readings(model, lambda m: loss_fn(m, batch))


def _first_break(
    model: nn.Module,
    arch: Architecture,
    surgery: Surgery,
    before: Readings,
    batch: Any,
    loss_fn: LossFn,
    seed: int,
) -> str | None:
    """What a trial of the widened network on the check batch breaks; the model is as before afterwards."""
    with undisturbed(model, train=False, seed=seed):
        surgery.apply()
        try:
            after = readings(model, lambda m: loss_fn(m, batch))
        except Exception as error:
            # The user's forward pass fails at the new width: its own words are the reason.
            first = str(error).strip().splitlines() or [type(error).__name__]
            return f"after growth the forward pass fails: {first[0]}"
        finally:
            surgery.revert()
    return what_broke(before, after, surgery, compare_outputs=False)


def _culprit(
    model: nn.Module,
    arch: Architecture,
    chosen: list[Candidate],
    before: Readings,
    batch: Any,
    loss_fn: LossFn,
    seed: int,
) -> str:
    """The first group that breaks the network by itself (or the first of all, if only together)."""
    names = list(dict.fromkeys(c.group for c in chosen))
    for name in names:
        surgery = Surgery(model, [_split(c) for c in chosen if c.group == name], arch)
        if _first_break(model, arch, surgery, before, batch, loss_fn, seed) is not None:
            return name
    return names[0]
