"""Trace a network: which neurons exist, where each one sits in every layer, which can be split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_split.architecture import Architecture, Unsplittable
from lightning_split.counting import priced
from lightning_split.effective import EffectiveWeights
from lightning_split.followers import led
from lightning_split.labels import Owner
from lightning_split.layers import is_uninitialized
from lightning_split.measuring import batch_size, tensors_in
from lightning_split.outlines import Outline, collector_paused, quiet
from lightning_split.positions import Positional
from lightning_split.scaling import scaled_by_numbers
from lightning_split.tracer import Tracer
from lightning_split.verification import Run, verified_sizes, verified_values, within_a_layer

__all__ = ["trace", "trace_step"]

_POSITIONS = "they are positions along which other neurons lie"


def trace(model: nn.Module, *inputs: Any, **kwargs: Any) -> Architecture:
    """Find the channel groups of a network by running it once on example inputs.

    The model is called as ``model(*inputs, **kwargs)`` in the mode that it is in and, if that works, in
    the other mode too, so that branches used only in training are seen, and again as long as channels turn
    out to be one neuron. These runs compute shapes only, unless the control flow depends on values. Then one
    neuron of every group is really split, into two copies and an offspring of weight zero, and every layer
    must read what it read before, with the split channels repeated; groups that fail are reported with the
    reason. The model and the random state are left as they were.

    Args:
        model: Any ``nn.Module``.
        inputs: Positional arguments of one forward pass; a small batch is enough.
        kwargs: Keyword arguments of the forward pass.

    Returns:
        The architecture. A neuron is either in a group, fully explained, or listed as unsplittable.
        ``print()`` shows it as a table.

    Raises:
        ValueError: If the model has lazy layers that were not yet initialised.

    Cost: two forward passes over at most two samples (over one, if the network is large; four where it is so
    small that all of its neurons are tried), and the time that Python takes for a few more. Networks whose
    weights take most of the memory are tried portion by portion, with a pass for each.
    """
    return _trace(
        model,
        lambda m, example: m(*example[0], **example[1]),
        (inputs, kwargs),
        compare_outputs=True,
    )


def trace_step(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    followers: Mapping[str, str] | None = None,
) -> Architecture:
    """Like :func:`trace`, but runs ``loss_fn(model, batch)``, so the loss itself bounds what can grow.

    Args:
        model: The network.
        batch: What the loss is taken of.
        loss_fn: The loss.
        followers: Copies of parts of it that grow with them (:mod:`lightning_split.followers`).
    """
    return _trace(
        model,
        loss_fn,
        batch,
        compare_outputs=False,  # a penalty on the weights changes the loss, though not the function
        followers=followers,
    )


def _trace(
    model: nn.Module,
    run: Run,
    example: Any,
    *,
    compare_outputs: bool,
    followers: Mapping[str, str] | None = None,
) -> Architecture:
    for path, layer in model.named_modules():
        if is_uninitialized(layer):
            raise ValueError(
                f"The layer '{path}' is lazy and has no weights yet; run the model on one batch before "
                "tracing it."
            )
    if any(t.ndim and not t.shape[0] for t in tensors_in(example)[:1]):
        raise ValueError(
            "The example batch is empty, and nothing can be seen in it; trace a batch with samples."
        )
    with EffectiveWeights(model):
        return _traced(model, run, example, compare_outputs=compare_outputs, followers=followers)


def _traced(
    model: nn.Module,
    run: Run,
    example: Any,
    *,
    compare_outputs: bool,
    followers: Mapping[str, str] | None,
) -> Architecture:
    outline = Outline(example)
    try:
        with quiet():
            tracer, arch = _best_of(partial(_labelled, model, run, example, outline, compare_outputs))
            hollow = tracer.example is not example
            arch = led(arch, followers or {})
            with collector_paused(hollow):
                arch = verified_sizes(model, arch, run, tracer.example, tracer.seen, hollow=hollow)
                paired = [g.name for g in arch.groups if g.paired and not within_a_layer(model, g)]
                told: frozenset[str] = frozenset()  # groups of which nothing shows in values only
                if paired and hollow:
                    arch, told = scaled_by_numbers(model, arch, paired, lambda m: run(m, outline.example))
        del tracer
    finally:
        outline.forget()
    if not arch.groups and not arch.unsplittable:
        return dataclasses.replace(arch, note=f"{_opaque(model)} {arch.note}".strip())
    arch, macs = priced(model, arch)
    return verified_values(model, arch, run, example, macs, told, compare_outputs=compare_outputs)


def _best_of(label: Callable[[Positional], tuple[Tracer, Architecture]]) -> tuple[Tracer, Architecture]:
    """The trace in which most neurons can be split, of some that differ in what they take for positions."""

    def neurons(traced: tuple[Tracer, Architecture]) -> int:
        return sum(group.width for group in traced[1].groups)

    best = label(Positional())
    known = best[0].positions.found(best[1])
    if known:  # what they make cannot grow, and keeps other neurons from growing
        other = label(Positional(known))
        # Whom a raw matrix meets along positions counts still, and only the trial would refuse it.
        least = neurons(best) + all(isinstance(who, str) for who in known)
        best, known = (other, known) if neurons(other) >= least else (best, frozenset())
    crossed = frozenset(best[0].positions.kept) | {who for who in known if not isinstance(who, str)}
    while crossed:  # what if those that make positions make neurons?
        other = label(Positional(known - crossed, crossed))
        if neurons(other) > neurons(best):
            best = other
        fewer = crossed & _owners(other[1])  # only those that would be split
        crossed = fewer if fewer < crossed else frozenset()
    tracer, arch = best
    kept = {who: count for who, count in tracer.positions.kept.items() if who not in _owners(arch)}
    left = [Unsplittable(tracer.found.named(*who), _POSITIONS, count) for who, count in kept.items()]
    return tracer, dataclasses.replace(arch, unsplittable=(*arch.unsplittable, *left))


def _owners(arch: Architecture) -> set[Owner]:
    """The tensors that hold incoming weights of neurons that can be split."""
    return {(block.module, block.tensor) for group in arch.groups for block in group.theta}


def _labelled(
    model: nn.Module,
    run: Run,
    example: Any,
    outline: Outline,
    compare_outputs: bool,
    positional: Positional,
) -> tuple[Tracer, Architecture]:
    """What labels tell in both modes, with a note on what could not be seen."""

    def tracer_of(example: Any) -> Tracer:
        return Tracer(model, run, example, batch_size(example), compare_outputs, outline.follow, positional)

    mode, tracer = model.training, tracer_of(outline.example)
    try:
        with collector_paused():
            tracer.run(train=mode)
    except Exception:
        tracer = tracer_of(example)  # control flow that depends on values, say
    if mode not in tracer.seen:  # outside of the handler, so that an error of the user's comes alone
        tracer.run(train=mode, graph=True)
    tracer.count_uses = False
    table = tracer.found.table
    note, fused = "", table.num_fused
    try:
        try:
            hollow = tracer.example is not example
            with collector_paused(hollow):
                tracer.run(train=not mode, graph=not hollow)
        except Exception:
            tracer.example = example
            tracer.run(train=not mode, graph=True)
    except Exception as error:
        # The other mode may need other inputs (targets, say), so its failure is told, not raised.
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        other = "eval" if mode else "training"
        note = f"Branches used in {other} mode only were not seen, because a pass in that mode fails: {what}"
        fused = 0
    while table.num_fused > fused:  # until blocks have reached what was added to their neurons before
        fused, hollow = table.num_fused, tracer.example is not example
        with collector_paused(hollow):
            tracer.run(train=mode, graph=not hollow)
    arch = tracer.found.architecture()
    return tracer, dataclasses.replace(arch, note=f"{arch.note} {note}".strip())


def _opaque(model: nn.Module) -> str:
    """What a network consists of in which no layer was seen."""
    kinds: dict[str, str] = {}
    for path, module in model.named_modules():
        inner = any(not name.startswith("_") for name, _ in module.named_children())
        if not inner and not path.rpartition(".")[2].startswith("_"):
            kinds.setdefault(f"{type(module).__module__}.{type(module).__qualname__}", path or "(root)")
    what = ", ".join(f"'{path}' ({kind})" for kind, path in list(kinds.items())[:5])
    return (
        f"No layer that has a LayerRule was called. The network consists of {what}. Quantized and scripted "
        "modules cannot be looked into; other layers need a rule (register_layer_rule)."
    )
