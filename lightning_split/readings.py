"""What every layer with a neuron port reads in a run, before and after a growth, and where that differs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_split.layers import Port
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import tensors_in
from lightning_split.surgery import Surgery

__all__ = ["Readings", "differences", "readings", "what_broke"]

_FEW_ROWS = 16  # samples whose values are summed one after the other


class Read(NamedTuple):
    """What was read at one place."""

    size: int  # number of positions on the port
    values: tuple[Tensor, Tensor] | None = None  # weighted sum and norm of each, (size,)


@dataclass
class Readings:
    """What every layer with a neuron port read in one run, call by call, in a few numbers per channel."""

    calls: dict[tuple[str, Port, int], Read] = field(default_factory=dict)
    outputs: list[Read] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    _count: dict[tuple[str, Port], int] = field(default_factory=lambda: defaultdict(int))

    def note(self, path: str, port: Port, x: Tensor, axis: int, *, values: bool = False) -> None:
        """Note one reading."""
        number = self._count[path, port]
        self._count[path, port] += 1
        self.calls[path, port, number] = _read(x.detach(), axis) if values else Read(x.shape[axis])


class _Reader(Watcher):
    def __init__(self, found: Readings, values: bool) -> None:
        self._found = found
        self._values = values

    def read(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        self._found.note(path, port, x, axis, values=self._values)
        return x


def readings(model: nn.Module, run: Callable[[nn.Module], Any], *, values: bool = True) -> Readings:
    """Run the model and note what each layer with a rule reads.

    Args:
        model: The model, in the mode it is to be run in.
        run: Calls the model.
        values: Whether to note values, or sizes only.
    """
    found = Readings()
    with watched(model, _Reader(found, values)):
        output = run(model)
    for tensor in tensors_in(output):
        found.shapes.append(tuple(tensor.shape))
        if values:
            found.outputs.append(_read(tensor.detach().reshape(1, -1), 0))
    return found


def _read(x: Tensor, axis: int) -> Read:
    """A weighted sum and the norm of what lies at each position of an axis, without a copy of it."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    axis %= x.ndim
    before, size, after = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
    x = x.reshape(before, size, after)
    number = torch.arange(before * after, device=x.device, dtype=x.dtype)
    probe = torch.cos(number * 1.7 + 0.3).view(before, after)
    if after == 1:  # each the fastest way for its layout, many times faster than reducing two axes at once
        sums, norms = probe[:, 0] @ x[..., 0], x[..., 0].square().sum(0).sqrt()
    else:
        if 0 < before <= _FEW_ROWS:
            sums = torch.stack([x[i] @ probe[i] for i in range(before)]).sum(0)
        else:
            sums = torch.einsum("bsa,ba->s", x, probe)
        norms = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=2), dim=0)
    return Read(size, (sums, norms))


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
        ghosts: Whether the last offspring of each neuron has other values than the neuron.
    """
    found = differences(before, after, surgery, compare_outputs, compare_values, ghosts)
    return next((why for why, far in found if not far <= 1), None)


def differences(
    before: Readings,
    after: Readings,
    surgery: Surgery,
    compare_outputs: bool,
    compare_values: bool,
    ghosts: bool,
) -> Iterator[tuple[str, float]]:
    """Place by place what is different, and how much: from 1 on it is more than rounding.

    Takes what :func:`what_broke` takes.
    """
    for key, read in before.calls.items():
        path, port, _ = key
        if not surgery.knows(path, port):
            continue  # in a branch that tracing did not see
        new = after.calls.get(key)
        if new is None:
            if not compare_values:
                continue  # layers that are dropped at random
            yield f"after growth '{path}' is no longer called", math.inf
            return
        index, size = surgery.layout(path, port), read.size
        if index is not None:  # a grouped convolution reads several copies of its port side by side
            tiles = torch.arange(read.size // surgery.port_size(path, port)) * surgery.port_size(path, port)
            size = len(tiles) * len(index)
        if new.size != size:
            what = (
                f"after growth '{path}' would read {new.size} channels instead of {size} (does the "
                "forward pass hard-code a size?)"
            )
            yield what, math.inf
            return
        if not compare_values or read.values is None or new.values is None:
            continue
        old, now = read.values, new.values
        if index is not None:
            place = (tiles[:, None] + index).flatten().to(old[0].device)
            old = (old[0][place], old[1][place])
            if ghosts:
                alive = surgery.alive(path, port).repeat(len(tiles)).to(place.device)
                old, now = (old[0][alive], old[1][alive]), (now[0][alive], now[1][alive])
        what = f"after growth '{path}' would no longer read the same values in the same places"
        yield what, _distance(old, now)
    if before.shapes != after.shapes:
        yield "after growth the output has another shape", math.inf
    elif compare_outputs and compare_values:
        for was, now_is in zip(before.outputs, after.outputs, strict=True):
            if was.values and now_is.values:
                yield "after growth the output has other values", _distance(was.values, now_is.values)


def _distance(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> float:
    """The largest difference, in units of the rounding that another order of summation brings."""
    if not old[0].numel():  # a layer without neurons
        return 0.0
    tolerance = 1e-7 if old[0].dtype == torch.float64 else 2e-3
    scale = old[1].max().clamp_min(torch.finfo(old[1].dtype).tiny)
    if not bool(torch.isfinite(scale)):
        return 0.0  # the network was broken before; nothing can be told
    far = torch.stack([(a - b).abs().max() for a, b in zip(old, new, strict=True)]).max()
    return float(far / (tolerance * scale))
