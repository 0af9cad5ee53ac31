"""Proof by trial: after widening, every layer must read what it read before, with split channels doubled.

Copies alone do not show which of two offspring stands where, so a second trial splits into the neuron itself
and a *ghost*: an offspring of weight zero with other incoming weights, which nobody may notice.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture, ChannelGroup
from lightning_split.layers import Port, keeps_batch_statistics, rule_for
from lightning_split.measuring import tensors_in, undisturbed
from lightning_split.surgery import Split, Surgery

__all__ = ["Readings", "readings", "verified", "what_broke"]

Run = Callable[[nn.Module], Any]
Read = tuple[Tensor, Tensor]  # weighted sum and norm of each position on a port, (size,) each


@dataclass
class Readings:
    """What every layer with a neuron port read in one run, call by call, in a few numbers per channel."""

    calls: dict[tuple[str, Port, int], Read] = field(default_factory=dict)
    outputs: list[Read] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)


def readings(model: nn.Module, arch: Architecture, run: Run) -> Readings:
    """Run the model and note what each layer reads.

    Args:
        model: The model, in the mode it is to be run in.
        arch: Says which layers have neurons on their input.
        run: Calls the model.
    """
    found = Readings()
    count: dict[tuple[str, Port], int] = defaultdict(int)

    def listen(path: str, port: Port) -> Callable[..., None]:
        def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = tensors_in((args, kwargs))
            rule = rule_for(layer)
            if tensors and rule is not None:
                axis = rule.neuron_axis(layer, tensors[0])
                key = (path, port, count[path, port])
                count[path, port] += 1
                found.calls[key] = _read(tensors[0].detach().movedim(axis, 0))

        return note

    with ExitStack() as stack:
        for path, port in arch.ports:
            if port != "out":
                layer = model.get_submodule(path)
                handle = layer.register_forward_pre_hook(listen(path, port), with_kwargs=True)
                stack.callback(handle.remove)
        with torch.enable_grad():
            output = run(model)
    for tensor in tensors_in(output):
        found.shapes.append(tuple(tensor.shape))
        found.outputs.append(_read(tensor.detach().reshape(1, -1)))
    return found


def _read(rows: Tensor) -> Read:
    flat = rows.reshape(rows.shape[0], -1)
    flat = flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32)
    probe = torch.cos(torch.arange(flat.shape[1], device=flat.device, dtype=flat.dtype) * 1.7 + 0.3)
    return flat @ probe, flat.norm(dim=1)


def what_broke(
    before: Readings,
    after: Readings,
    surgery: Surgery,
    *,
    compare_outputs: bool,
    compare_values: bool = True,
    ghosts: bool = False,
) -> str | None:
    """The first place where the widened network reads something else, as a reason; ``None`` if none.

    Args:
        before: The readings before growth.
        after: The same after it.
        surgery: The growth.
        compare_outputs: Whether the outputs' values count.
        compare_values: Whether any values count, or only sizes (a run with random dropout, say).
        ghosts: Whether only the first offspring of each neuron carries the neuron's values.
    """
    for key, read in before.calls.items():
        path, port, _ = key
        new = after.calls.get(key)
        if new is None:
            if not compare_values:
                continue  # layers that are dropped at random
            return f"after growth '{path}' is no longer called"
        index = surgery.layout(path, port)
        old = read
        if index is not None:  # a grouped convolution reads several copies of its port side by side
            size = surgery.port_size(path, port)
            tiles = torch.arange(len(read[0]) // size)[:, None] * size
            index = (tiles + index).flatten().to(read[0].device)
            old = (read[0][index], read[1][index])
        if len(new[0]) != len(old[0]):
            return (
                f"after growth '{path}' would read {len(new[0])} channels instead of {len(old[0])} (does the "
                "forward pass hard-code a size?)"
            )
        if ghosts and index is not None:  # the first of equal positions is the neuron itself
            first = torch.ones(len(index), dtype=torch.bool, device=index.device)
            first[1:] = index[1:] > index.cummax(0).values[:-1]
            old, new = (old[0][first], old[1][first]), (new[0][first], new[1][first])
        if compare_values and not _agree(old, new):
            return f"after growth '{path}' would no longer read the same values in the same places"
    if before.shapes != after.shapes:
        return "after growth the output has another shape"
    if compare_outputs and compare_values:
        for old, new in zip(before.outputs, after.outputs, strict=True):
            if not _agree(old, new):
                return "after growth the output has other values"
    return None


def _agree(old: Read, new: Read) -> bool:
    """Equal up to the rounding that another order of summation brings."""
    tolerance = 1e-7 if old[0].dtype == torch.float64 else 2e-3
    scale = old[1].max().clamp_min(torch.finfo(old[1].dtype).tiny)
    if not bool(torch.isfinite(scale)):
        return True  # the network was broken before; nothing can be told
    return all(bool(((a - b).abs() <= tolerance * scale).all()) for a, b in zip(old, new, strict=True))


def verified(model: nn.Module, arch: Architecture, run: Run, *, compare_outputs: bool = True) -> Architecture:
    """The architecture, less the groups whose neurons do not survive a real split.

    One neuron of every group is split, all at once: into copies, into itself and a ghost, and into copies in
    training mode, whose branches may fix other sizes (values are random there, so only sizes count). Only if
    that fails are the culprits searched by halving. Costs five forward passes if all is well. The model is
    left as it was.
    """
    if not arch.groups:
        return arch
    with _mode(model, train=False):
        expected = {False: readings(model, arch, run)}
    try:
        with _mode(model, train=True):
            expected[True] = readings(model, arch, run)
    except Exception:
        expected.pop(True, None)  # training mode may need other inputs; Architecture.note says so

    def trial(groups: Sequence[ChannelGroup]) -> str | None:
        for train, ghosts in ((False, False), (False, True), (True, False)):
            before = expected.get(train)
            if before is None:
                continue
            splits = [_trial_split(model, group, ghosts) for group in groups]
            with _mode(model, train=train):
                surgery = Surgery(model, splits, arch)
                surgery.apply()
                try:
                    surgery.displace()
                    after = readings(model, arch, run)
                except Exception as error:
                    # The user's forward pass failed at the new width; whatever it raised is the reason.
                    first = str(error).strip().splitlines() or [type(error).__name__]
                    return f"after growth the forward pass fails: {first[0]}"
                finally:
                    surgery.revert()
            why = what_broke(
                *(before, after, surgery),
                compare_outputs=compare_outputs,
                compare_values=not train,
                ghosts=ghosts,
            )
            if why is not None:
                return why
        return None

    reasons: dict[str, str] = {}

    def search(groups: Sequence[ChannelGroup]) -> None:
        why = trial(groups) if groups else None
        if why is None:
            return
        if len(groups) == 1:
            reasons[groups[0].name] = why
            return
        half = len(groups) // 2
        search(groups[:half])
        search(groups[half:])

    search(arch.groups)
    return arch.without(reasons) if reasons else arch


@contextmanager
def _mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    with undisturbed(model, train=train):
        for layer in model.modules():
            if keeps_batch_statistics(layer):
                layer.eval()  # one sample per channel is too few for statistics
        yield


def _trial_split(model: nn.Module, group: ChannelGroup, ghost: bool) -> Split:
    """A split in the middle of the group, whose unequal weights would not hide a wrong column."""
    neuron = (group.width - 1) // 2
    if not ghost:
        return Split(group.name, neuron, (2.0, -1.0), torch.zeros(2, group.dim))
    generator = torch.Generator().manual_seed(0)
    parts = []
    for block in group.theta:
        size = float(model.get_submodule(block.module).get_parameter(block.tensor).detach().abs().mean())
        size = size + 1e-2 if math.isfinite(size) else 1.0
        parts.append(size * torch.randn(block.size, generator=generator))
    return Split(group.name, neuron, (1.0, 0.0), torch.stack([torch.zeros(group.dim), torch.cat(parts)]))
