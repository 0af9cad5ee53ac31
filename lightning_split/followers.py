"""Copies of a part of the network that nobody trains: teachers, target networks, momentum encoders.

A training loop copies or averages weights from one to the other, name by name. So the copy has to have the
same widths: where its original grows, it grows by the same splits, with offspring that are equal to their
parents, which leaves what it computes as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture, PortKey, PortMap

__all__ = ["find_followers", "led", "may_follow", "untouched"]


def find_followers(model: nn.Module, is_trained: Callable[[nn.Module], bool]) -> dict[str, str]:
    """Parts of a network that are copies of others, to the last bit, and not trained.

    Args:
        model: The network, before it is trained: later a copy cannot be told by its values.
        is_trained: Whether anything trains one of a module's parameters.

    Returns:
        Path of each copy -> path of what it is a copy of; none lies within another.
    """
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    for paths in _alike(model):
        trained = [path for path in paths if is_trained(modules[path])]
        for copy in paths:
            if copy in trained or any(_within(copy, other) for other in found):
                continue
            original = next((path for path in trained if _equal(modules[path], modules[copy])), None)
            if original is not None and not (_within(original, copy) or _within(copy, original)):
                found = {c: o for c, o in found.items() if not _within(c, copy)} | {copy: original}
    return found


def may_follow(model: nn.Module) -> bool:
    """Whether any two parts of a network are equal to the last bit."""
    modules = dict(model.named_modules())
    return any(
        _equal(modules[first], modules[other])
        for paths in _alike(model)
        for first, other in combinations(paths, 2)
    )


def _alike(model: nn.Module) -> list[list[str]]:
    """Paths of modules that have the same class and tensors of the same names and shapes."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters()]
        if path and len({name.rpartition(".")[0] for name in names}) > 1:  # a neuron is made and read
            shapes = tuple((n, p.shape, p.dtype) for n, p in module.named_parameters())
            alike[type(module), shapes].append(path)
    return [paths for paths in alike.values() if len(paths) > 1]


def _equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    return all(a is not b and torch.equal(a, b) for a, b in pairs)


def _within(path: str, part: str) -> bool:
    return path == part or path.startswith(f"{part}.")


def led(arch: Architecture, followers: Mapping[str, str]) -> Architecture:
    """The architecture in which copies grow with their originals, and not by themselves.

    Args:
        arch: What tracing found.
        followers: Path of each copy -> path of its original.
    """
    if not followers:
        return arch
    ports: dict[PortKey, PortMap] = dict(arch.ports)
    reasons: dict[str, str] = {}
    leaders: dict[int, int] = {}  # of the neurons of copies
    places = {g.name: _places(arch, g.neurons) for g in arch.groups}
    for copy, original in followers.items():
        leading: list[int] = []
        for group in arch.groups:
            paths = {path for path, _ in places[group.name]}
            if any(_within(path, copy) for path in paths):
                reasons[group.name] = f"'{copy}' is not trained, and grows with '{original}' only"
            elif all(_within(path, original) for path in paths):
                leading += group.neurons
            elif any(_within(path, original) for path in paths):
                reasons[group.name] = (
                    f"it lies in part outside of '{original}', of which '{copy}' is a copy that has to keep "
                    "the same shapes"
                )
        for (path, port), found in arch.ports.items():
            if _within(path, original):
                kept = np.isin(found.neuron, leading)
                key = copy + path[len(original) :], port
                if key in arch.ports:
                    pairs = zip(arch.ports[key].neuron[kept], found.neuron[kept], strict=True)
                    leaders |= {int(own): int(leader) for own, leader in pairs}
                ports[key] = found._replace(
                    neuron=np.where(kept, found.neuron, -1), run=np.where(kept, found.run, -1)
                )
    products = tuple(count.led(leaders) for count in arch.products)
    written = {
        path: tuple(call._replace(values=call.values.led(leaders)) for call in calls)
        for path, calls in arch.written.items()
    }
    return replace(arch, ports=ports, products=products, written=written).without(reasons)


def _places(arch: Architecture, neurons: tuple[int, ...]) -> list[PortKey]:
    return [key for key, port in arch.ports.items() if np.isin(port.neuron, neurons).any()]


def untouched(loss: Tensor, module: nn.Module) -> bool:
    """Whether a loss has no gradient in any parameter of a module."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters or not loss.requires_grad:
        return True
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return all(grad is None for grad in grads)
