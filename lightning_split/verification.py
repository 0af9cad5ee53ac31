"""Proof by trial: after widening, every layer must read what it read before, with split channels doubled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture, ChannelGroup
from lightning_split.layers import Port, rule_for
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


def what_broke(before: Readings, after: Readings, surgery: Surgery, *, compare_outputs: bool) -> str | None:
    """The first place where the widened network reads something else, as a reason; ``None`` if none."""
    for key, read in before.calls.items():
        path, port, _ = key
        new = after.calls.get(key)
        if new is None:
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
        if not _agree(old, new):
            return f"after growth '{path}' would no longer read the same values in the same places"
    if before.shapes != after.shapes:
        return "after growth the output has another shape"
    if compare_outputs:
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

    One neuron of every group is split without displacement, all at once; only if that fails are the
    culprits searched by halving. Costs two forward passes if all is well. The model is left as it was.
    """
    if not arch.groups:
        return arch
    with undisturbed(model, train=False):
        before = readings(model, arch, run)

    def trial(groups: Sequence[ChannelGroup]) -> str | None:
        splits = [_trial_split(group) for group in groups]
        with undisturbed(model, train=False):
            surgery = Surgery(model, splits, arch)
            surgery.apply()
            try:
                after = readings(model, arch, run)
            except Exception as error:
                # The user's forward pass failed at the new width; whatever it raised is the reason.
                first = str(error).strip().splitlines() or [type(error).__name__]
                return f"after growth the forward pass fails: {first[0]}"
            finally:
                surgery.revert()
        return what_broke(before, after, surgery, compare_outputs=compare_outputs)

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


def _trial_split(group: ChannelGroup) -> Split:
    """A split in the middle of the group, whose unequal weights would not hide a wrong column."""
    return Split(group.name, (group.width - 1) // 2, (2.0, -1.0), torch.zeros(2, group.dim))
