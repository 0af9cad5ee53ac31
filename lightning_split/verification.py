"""Proof by trial: after widening, every layer must read what it read before, with split channels repeated.

A trial split has two copies with unequal weights, which would not hide a wrong column, and a *ghost*: an
offspring of weight zero with other incoming weights, which nobody may notice. It shows which of the offspring
stands where.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_split.architecture import Architecture, ChannelGroup
from lightning_split.layers import rule_for
from lightning_split.measuring import batch_size, fixed_statistics, undisturbed
from lightning_split.readings import Readings, differences, readings, what_broke
from lightning_split.surgery import Split, Surgery
from lightning_split.trials import all_haunted, multiplied, one_more, one_of_each, portions

__all__ = ["Run", "verified_sizes", "verified_values", "within_a_layer"]

Run = Callable[[nn.Module, Any], Any]  # run(model, example)

_SAMPLES = 2  # in a trial that compares values
_LARGE_MACS = 1e10  # from here on one sample will do
_MAX_GHOSTS = 1000  # neurons of a network small enough to try all of them
_MAX_MACS = 5e10  # of one such pass; a larger network is compared on the check batch of each growth


def verified_sizes(
    model: nn.Module,
    arch: Architecture,
    run: Run,
    example: Any,
    seen: Mapping[bool, Readings],
    *,
    hollow: bool,
) -> Architecture:
    """The architecture, less the groups at whose new widths the model would fail or read other sizes.

    In training mode one neuron of every group is split in two, all at once; in eval mode (or the only mode
    there is) all neurons, and neighbouring groups by different factors, so that no integer division hides a
    size that does not follow. Where this fails the culprits are searched by halving. The model is left as it
    was.

    Args:
        model: The model.
        arch: What tracing found.
        run: Runs the model on an example.
        example: The example.
        seen: What the layers read while they were traced, by mode (True for training).
        hollow: Whether the example is an outline, on which a trial costs next to nothing.
    """
    for train, read in seen.items():
        trial = _Trial(model, run, example, read, train=train, graph=not hollow)
        many = (not train or len(seen) == 1) and (hollow or _is_small(arch))
        splits = multiplied(arch) if many else one_more(arch)
        arch = _without_culprits(model, arch, trial, splits, hollow=hollow)
    return arch


def verified_values(
    model: nn.Module,
    arch: Architecture,
    run: Run,
    example: Any,
    macs: float,
    told: Collection[str] = (),
    *,
    compare_outputs: bool = True,
) -> Architecture:
    """The same for values: in eval mode, on a few samples, if the network is not too large for that.

    Args:
        model: The model.
        arch: What tracing found.
        run: Runs the model on an example.
        example: The example.
        macs: What a pass takes, in multiply-accumulates per sample.
        told: Paired groups of which is known how their products are scaled.
        compare_outputs: Whether the values of the output may not change either.
    """
    size = batch_size(example)
    samples = min(size, _SAMPLES if macs < _LARGE_MACS else 1)
    if macs * samples > _MAX_MACS:
        return _sizes_only(model, arch, told, "the network is large")
    few = _few_samples(example, size, samples)
    trial = _value_trial(model, run, few) or _value_trial(model, run, example)
    if trial is None:
        return _sizes_only(model, arch, told, "the model does not run on the example in eval mode")
    trial.compare_outputs = compare_outputs
    arch = _scaled(model, arch, trial)
    for portion in portions(model, arch, macs):
        arch = _without_culprits(model, arch, trial, one_of_each(model, portion))
    if _is_small(arch):
        for part in (0, 1):  # so that not both sides of a weight become twice as large
            arch = _without_culprits(model, arch, trial, all_haunted(model, arch, part))
    return arch


def _sizes_only(model: nn.Module, arch: Architecture, told: Collection[str], why: str) -> Architecture:
    reason = f"how their products are scaled shows in values only, which were not compared, as {why}"
    unknown = [g for g in arch.groups if g.paired and g.name not in told and not within_a_layer(model, g)]
    # Whether a softmax mixes neurons or treats each alike does not show where there is one.
    lone = f"an operator may mix neurons, of which there is one; values were not compared, as {why}"
    arch = arch.without(
        {g.name: lone for g in arch.groups if g.width == 1} | {g.name: reason for g in unknown}
    )
    note = f"The trial splits compared sizes only, as {why}; each growth compares values on its first batch."
    return replace(arch, note=f"{arch.note} {note}".strip())


def within_a_layer(model: nn.Module, group: ChannelGroup) -> bool:
    """Whether neurons meet their partners in one layer, whose rule says how."""
    places = {*group.producers, *group.consumers}
    rule = rule_for(model.get_submodule(places.pop())) if len(places) == 1 else None
    return rule is not None and rule.attends


def _is_small(arch: Architecture) -> bool:
    return sum(group.width for group in arch.groups) <= _MAX_GHOSTS


def _without_culprits(
    model: nn.Module,
    arch: Architecture,
    trial: _Trial,
    splits: Mapping[str, Sequence[Split]],
    *,
    hollow: bool = False,
) -> Architecture:
    """The architecture, less the groups whose splits the trial does not pass."""
    reasons: dict[str, str] = {}

    def broken(names: Sequence[str]) -> str | None:
        together = [s for name in names for s in splits[name]]
        return trial.broken_by(Surgery(model, together, arch, hollow=hollow)) if names else None

    def search(names: Sequence[str], why: str | None) -> None:
        if why is not None and len(names) == 1:
            reasons[names[0]] = why
        elif why is not None:
            half = len(names) // 2
            for part in (names[:half], names[half:]):
                search(part, broken(part))

    tried = [g for g in arch.groups if g.name in splits]
    names = [g.name for g in tried]
    why = broken(names)
    for first, *alike in _kinds_of_pairs(model, () if trial.values or why is None else tried):
        alone = broken([first.name]) if alike else None
        if alone is not None:  # code that fixes a size of heads does so in every layer
            reasons |= {first.name: alone, **{g.name: f"{alone} (in '{first.name}')" for g in alike}}
    if reasons:
        names = [name for name in names if name not in reasons]
        why = broken(names)
    search(names, why)
    return arch.without(reasons) if reasons else arch


def _kinds_of_pairs(model: nn.Module, groups: Sequence[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Paired groups, sorted by the classes of the layers that read them and of the modules around."""
    kinds: dict[Any, list[ChannelGroup]] = defaultdict(list)
    for group in groups:
        if group.paired:
            reader = group.consumers[-1]
            around = model.get_submodule(reader.rpartition(".")[0])
            kinds[type(around), type(model.get_submodule(reader))].append(group)
    return list(kinds.values())


def _scaled(model: nn.Module, arch: Architecture, trial: _Trial) -> Architecture:
    """The architecture with what the sums over paired neurons are divided by, as the code has it.

    The nearest of three powers of the width shows where a group is twice as wide, and holds for all groups in
    modules of the same classes.
    """
    for groups in _kinds_of_pairs(model, [g for g in arch.groups if not _known_scale(arch, g)]):
        first, names = groups[0], [group.name for group in groups]
        still = torch.zeros(()).expand(2, first.dim)
        wide = [Split(first.name, i, (2.0, -1.0), still) for i in range(first.width)]
        powers = {p: arch.scaled(names, p) for p in (0.0, 0.5, 1.0)}
        far = {p: trial.distance(Surgery(model, wide, scaled)) for p, scaled in powers.items()}
        arch = powers[min(far, key=far.__getitem__)]
    return arch


def _known_scale(arch: Architecture, group: ChannelGroup) -> bool:
    """Whether the operators say by what the sums over these neurons are divided."""
    ports = [port for port in arch.ports.values() if port.reads is not None]
    mine = [port for port in ports if np.isin(port.neuron[port.reads], group.neurons).any()]
    return all(port.power is not None for port in mine)


@dataclass
class _Trial:
    """One way to run the model, and what its layers read before any split."""

    model: nn.Module
    run: Run
    example: Any
    expected: Readings
    train: bool
    graph: bool  # whether to record what backward needs: a pass may differentiate inside
    values: bool = False
    compare_outputs: bool = False

    def broken_by(self, surgery: Surgery) -> str | None:
        """Why these splits cannot be, or ``None`` if they can."""
        surgery.apply()
        try:
            after = self._after(surgery)
        except Exception as error:
            # The user's forward pass failed at the new width; whatever it raised is the reason.
            first = str(error).strip().splitlines() or [type(error).__name__]
            return f"after growth the forward pass fails: {first[0]}"
        return what_broke(
            *(self.expected, after, surgery),
            compare_outputs=self.compare_outputs,
            compare_values=self.values,
            ghosts=True,
        )

    def distance(self, surgery: Surgery) -> float:
        """How far these splits, which have no ghosts, are from changing nothing."""
        surgery.apply()
        try:
            after = self._after(surgery)
        except Exception:  # why, the trial of the same group tells
            return math.inf
        found = differences(self.expected, after, surgery, self.compare_outputs, self.values, ghosts=False)
        return max((far for _, far in found), default=0.0)

    def _after(self, surgery: Surgery) -> Readings:
        """What the layers read after a surgery that was applied, which is taken back."""
        try:
            if self.values:
                surgery.displace()
            return _pass(self.model, self.run, self.example, self.train, self.graph, self.values)
        finally:
            surgery.revert()


def _value_trial(model: nn.Module, run: Run, example: Any) -> _Trial | None:
    """The trial that compares values, or ``None`` if the model does not run on the example in eval mode."""
    for graph in (False, True):
        try:
            read = _pass(model, run, example, train=False, graph=graph, values=True)
        except Exception:
            continue
        return _Trial(model, run, example, read, train=False, graph=graph, values=True)
    return None


def _pass(model: nn.Module, run: Run, example: Any, train: bool, graph: bool, values: bool) -> Readings:
    with undisturbed(model, train=train), torch.set_grad_enabled(graph):
        fixed_statistics(model)
        return readings(model, lambda m: run(m, example), values=values)


def _few_samples(example: Any, size: int, samples: int) -> Any:
    """The first samples of a batch, if its tensors have samples along their first axis."""
    return tree_map_only(
        Tensor, lambda t: t[:samples] if t.ndim and t.shape[0] == size > samples else t, example
    )
