"""One growth: the stages once, in order. Knows no Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lightning_split.architecture import Architecture, ChannelGroup
from lightning_split.context import GrowthContext
from lightning_split.counting import network_cost
from lightning_split.curvature import LossFn, check_loss
from lightning_split.deciding import Chooser, as_split, network_prices
from lightning_split.effective import EffectiveWeights
from lightning_split.growers import Grower, SteepestSplitting
from lightning_split.interrupts import give_way, uninterrupted
from lightning_split.measuring import undisturbed
from lightning_split.ranks import Ranks
from lightning_split.rehearsal import checked_readings, culprit, first_break
from lightning_split.report import GrowthReport
from lightning_split.selection import Candidate, SelectionStrategy, TopK
from lightning_split.significance import FreshBatches, GainTest
from lightning_split.stepsize import StepSize, as_step_size
from lightning_split.surgery import Replacement, Surgery
from lightning_split.tracing import trace_step

__all__ = ["GrowthReport", "NothingToSplitError", "grow", "select_groups"]

_CHECKED = 8  # fresh batches on which the loss is measured before and after


class NothingToSplitError(ValueError):
    """The network has layers, and not one of their neurons can be split now."""

    def __init__(self, message: str, *, frozen: bool) -> None:
        super().__init__(message)
        self.frozen = frozen  # some only because their weights are frozen, which may change


@uninterrupted()
def grow(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    grower: Grower | None = None,
    strategy: SelectionStrategy | None = None,
    step_size: float | str | StepSize = 1e-2,
    confirm_batches: Iterable[Any] | None = None,
    significance: float | None = 0.01,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    barred: Mapping[str, str] | None = None,
    followers: Mapping[str, str] | None = None,
    max_params: int | None = None,
    max_macs: float | None = None,
    seed_cost: float | None = None,
    surrogate_beta: float | None = 3.0,
    train_mode: bool = False,
    cache_bytes: int = 2**28,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> GrowthReport:
    """Grow a network once, in place, by splitting the neurons that pay.

    Traces the network, finds the extreme eigenpairs of all splitting matrices, lets the strategy choose,
    widens the layers, checks that every layer reads what it read before, and moves the offspring apart.
    The growth happens completely or not at all; everything else about the model stays as it was. Ctrl-C comes
    out before the next pass over the model; pressed twice, at once.

    Args:
        model: Any network.
        batches: An iterable of what ``loss_fn`` takes; the splitting matrices are averaged over it.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss.
        grower: Proposes; default :class:`SteepestSplitting`.
        strategy: Chooses; default ``TopK(fraction=0.3)``.
        step_size: The lengths of the offspring's displacements: ε for all of them, ``"line_search"``, or
            another :class:`~lightning_split.stepsize.StepSize`.
        confirm_batches: Fresh batches on which the gains are measured again, as many of them as it takes to
            tell gains from noise (:mod:`lightning_split.significance`). The loss before and after is measured
            on the first eight. Without them both come from ``batches``.
        significance: Bound on the expected share of candidates without a true gain among those that selection
            may choose; ``None`` lets all of them pass. Fewer than eight fresh batches are not tested.
        include: Patterns of group or producer names that may grow (``fnmatch``; default all).
        exclude: Patterns of names that may not.
        barred: Group names that must be left alone, with reasons (from earlier reports).
        followers: Copies of parts of the network that nobody trains, by path, each with the path of what it
            is a copy of; they grow with it (a teacher, a target network).
        max_params: The grown network has at most so many parameters.
        max_macs: The grown network has at most so many MACs per sample.
        seed_cost: What the network cost before its first growth, in the strategy's unit
            (``report.spending.before`` of the first growth); a :class:`~lightning_split.budgets.Target`
            counts from there.
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
    fresh = None if confirm_batches is None else FreshBatches(confirm_batches, ranks)
    check = batches if fresh is None else fresh.first(_CHECKED)
    step = as_step_size(step_size)
    _check_arguments(batches, check, significance, max_params, max_macs)
    with EffectiveWeights(model) as effective:
        whole = trace_step(model, batches[0], loss_fn, followers)
        arch = select_groups(whole.without(dict(barred or {})), include, exclude)
        before_loss = _mean_loss(model, check, loss_fn, train_mode, seed, ranks)

        context = GrowthContext(
            model,
            arch,
            loss_fn,
            batches,
            fresh,
            all_schemes=strategy.all_schemes,
            surrogate_beta=surrogate_beta,
            train_mode=train_mode,
            cache_bytes=cache_bytes,
            seed=seed,
            ranks=ranks,
        )
        prices = network_prices(
            context, strategy, max_params=max_params, max_macs=max_macs, seed_cost=seed_cost
        )
        chooser = Chooser(strategy, prices)
        test = GainTest(chooser, significance, fresh)
        context = replace(context, test=test)
        proposal = grower.propose(context, step_size=step)
        passed = test.passed(proposal.candidates, proposal.num_batches, proposal.alternatives)
        offered = list(zip(proposal.candidates, passed, strict=True))

        before = checked_readings(model, arch, check[0], loss_fn, seed)
        broken: dict[str, str] = {}
        unheld: set[tuple[str, int, str]] = set()  # group, neuron and scheme
        while True:
            chosen = ranks.agree(test.choose([c for c, _ in offered], [ok for _, ok in offered]))
            surgery = Surgery(model, [as_split(c) for c in chosen], whole)
            lost = ranks.agree(_unheld(effective, surgery)) if effective else None
            if lost:
                unheld |= {(c.group, c.neuron, c.scheme) for c in chosen if (c.group, c.neuron) in lost}
                offered = [(c, ok and (c.group, c.neuron, c.scheme) not in unheld) for c, ok in offered]
                continue
            why = ranks.agree(first_break(model, arch, surgery, before, check[0], loss_fn, seed))
            if why is None:
                break
            group = ranks.agree(culprit(model, arch, chosen, before, check[0], loss_fn, seed))
            broken[group] = why
            offered = [(c, ok) for c, ok in offered if c.group != group]

        cost, after_cost = network_cost(model, whole), network_cost(model, whole, surgery)
        spending = chooser.spending(offered, chosen)
        notes, ratio, after_loss = list(proposal.notes), 1.0, before_loss
        replaced: dict[nn.Parameter, Replacement] = {}
        if unheld:
            notes.append(
                f"{len(unheld)} candidates were left out, because a parametrization cannot compute the "
                "weights that they would make (an exponential makes no negative ones, say); "
                "SteepestSplitting(signed=False) and a smaller step_size leave out fewer."
            )
        if chosen:

            def loss_at(ratio: float) -> float:
                with surgery.displaced([as_split(c.at(ratio)) for c in chosen]):
                    if effective.unheld(surgery.replaced):
                        return math.inf
                    return _mean_loss(model, check, loss_fn, train_mode, seed, ranks, strict=False)

            surgery.apply()
            try:
                ratio, after_loss = ranks.agree(step.ratio(loss_at, before_loss))
                if not math.isfinite(after_loss):
                    raise ValueError(
                        f"After the growth the loss is {after_loss}, so the growth was taken back; try a "
                        "smaller step_size."
                    )
                chosen = [c.at(ratio) for c in chosen]
                surgery.displace([as_split(c) for c in chosen])
                replaced = effective.written_back(surgery.replaced if ratio else {})
            except BaseException:
                surgery.revert()
                raise
            if ratio == 0:
                surgery.revert()
                chosen, after_cost = [], cost
                spending = replace(spending, spent=0.0)
                notes.append(f"{step!r} found no step at which the loss falls, so nothing was grown.")
        grown = {c.group: 0 for c in chosen}
        for c in chosen:
            grown[c.group] += len(c.weights) - 1

        def estimated(c: Candidate) -> float:
            gain = proposal.estimated_gain.get((c.group, c.neuron, c.scheme))
            return c.predicted if gain is None else gain * ratio**c.order

        report = GrowthReport(
            splits=tuple(as_split(c) for c in chosen),
            chosen=tuple(chosen),
            predicted_gain=sum(c.predicted for c in chosen),
            estimated_gain=sum(map(estimated, chosen)),
            loss_before=before_loss,
            loss_after=after_loss,
            widths_before=arch.widths,
            widths_after={n: w + grown.get(n, 0) for n, w in arch.widths.items()},
            cost_before=cost,
            cost_after=after_cost,
            candidates=proposal.candidates,
            eigenpairs=proposal.eigenpairs,
            barred=broken,
            spending=spending,
            limit=spending.limit,
            notes=tuple(notes),
            confirmed=fresh is not None,
            num_fresh=proposal.num_batches,
            num_passed=sum(passed),
            replaced=replaced,
            architecture=arch,
        )
        try:
            give_way()
        except BaseException:  # nobody would get the report
            surgery.revert()
            raise
        return report


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


def _check_arguments(
    batches: list[Any],
    check: list[Any],
    significance: float | None,
    max_params: float | None,
    max_macs: float | None,
) -> None:
    if not batches:
        raise ValueError("grow needs at least one batch, and the iterable is empty.")
    for name, limit in (("max_params", max_params), ("max_macs", max_macs)):
        if limit is not None and not limit >= 0:
            raise ValueError(f"{name} must be at least 0, or None for no limit, got {limit}.")
    if not check:
        raise ValueError("confirm_batches is empty; pass None to do without a confirmation.")
    if significance is not None and not 0 < significance < 1:
        raise ValueError(f"significance is a share between 0 and 1, or None for no test, got {significance}.")


def _unheld(effective: EffectiveWeights, surgery: Surgery) -> set[tuple[str, int]]:
    """The splits, by group and neuron, that a parametrization cannot compute the weights of."""
    lost = surgery.behind(effective.unheld(surgery.replaced), moved=False)
    if lost:
        return lost
    with surgery.displaced(surgery.splits):
        return surgery.behind(effective.unheld(surgery.replaced), moved=True)


def _mean_loss(
    model: nn.Module,
    batches: list[Any],
    loss_fn: LossFn,
    train: bool,
    seed: int,
    ranks: Ranks,
    *,
    strict: bool = True,
) -> float:
    losses = []
    for number, batch in enumerate(batches):
        with undisturbed(model, train=train, seed=seed):
            loss = loss_fn(model, batch)
            if strict:
                check_loss(loss, number)
            losses.append(loss.detach().double().cpu().reshape(()))
        del loss  # or its graph would live on beside the next one
    return float(ranks.mean_of({"loss": torch.stack(losses).mean()})["loss"])
