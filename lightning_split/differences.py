r"""What splits change, measured by really displacing the neurons of the cut network.

In the cut network (:mod:`lightning_split.cuts`) every neuron is a function of its own weights alone, so all
of them can be displaced at once, each without a trace in the others. With :math:`\Delta x` the change of what
consumers read of a neuron, the weighted sum over its offspring, the loss changes by

.. math:: \langle c, \Delta x\rangle + \tfrac12 \langle\Delta x, H\,\Delta x\rangle + \dots

which is exact in what the neuron computes, whether its activation has derivatives or not. :math:`H` is the
curvature of the rest of the network. For all neurons at once, the second term comes from one more gradient:
each is displaced by :math:`s_\ell\,\Delta x_\ell` with a random sign, and what others do to it has mean zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_split.architecture import Architecture
from lightning_split.cuts import DIFFERENT, CutNetwork, FirstPass, LossFn, Place
from lightning_split.lean import without_autocast
from lightning_split.segments import Layout

__all__ = ["SplittingDifferences"]

Vectors = dict[str, Tensor]
T = TypeVar("T")


class SplittingDifferences:
    """Changes of the loss by one split of every neuron, each by itself; none by those of paired groups.

    Passes run without autocast, if the user's code can: weights that are cast to a shorter format are
    displaced by something else.

    Args:
        model: The network; left as it was by every method.
        arch: Its architecture.
        batches: What ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss.
        train: Run in training mode instead of eval mode.
        seed: Seed of the random state in every pass, and of the signs.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: Architecture,
        batches: Iterable[Any],
        loss_fn: LossFn,
        *,
        train: bool = False,
        seed: int = 0,
    ) -> None:
        self._batches = list(batches)
        self._cut = CutNetwork(model, arch.curved, loss_fn, train=train, seed=seed)
        self._layout = Layout(arch.curved.groups, self._cut.parameters)
        self._slots = _Slots(arch)
        self._generator = torch.Generator().manual_seed(seed)
        self._full = True  # whether the code runs without autocast

    def changes(
        self,
        weights: Mapping[str, Tensor],
        displacements: Callable[[int], Vectors],
        far: Mapping[str, Tensor],
    ) -> Iterator[Vectors]:
        """How the loss changes, for every batch by itself.

        Costs two forward and two backward passes, and two forward passes for each offspring, per batch.

        Args:
            weights: ``{group name: (N, m)}``, offspring weights, which sum to 1.
            displacements: ``{group name: (N, D)}`` of the offspring with this number, new tensors.
            far: ``{group name: (N,)}``, by what displacements are multiplied for the first term, measured a
                second time. Where activations have kinks, few samples decide it at small distances.

        Returns:
            Batch after batch ``{group name: (N, 3)}``: the term of first order in what consumers read, far
            away and as displaced, and that of second order, in double precision on the CPU.

        Raises:
            ValueError: If a loss is not a finite scalar that depends on the network, or two passes over the
                same batch differ.
        """
        for number, batch in enumerate(self._batches):
            first = self._precisely(partial(self._cut.first_pass, batch, number, values=True))
            moved = self._moved(batch, first, weights, displacements, far)
            distant = self._slots.collect(first.places, moved, first.cotangents)
            if not all(bool(values.isfinite().all()) for values in distant.values()):
                yield {
                    name: distant[name][:, None].repeat(1, 3) for name in weights
                }  # for the caller to refuse
                continue
            moved = self._moved(batch, first, weights, displacements)
            close = self._slots.collect(first.places, moved, first.cotangents)
            signs = {name: self._signs(len(w)) for name, w in weights.items()}
            for change, sign in zip(moved, self._slots.spread(signs, first), strict=True):
                change.mul_(sign)
            second = self._precisely(partial(self._cut.first_pass, batch, number, shifts=moved))
            if second.places != first.places:
                raise ValueError(DIFFERENT)
            bent = {
                i: c if (before := first.cotangents.get(i)) is None else c - before
                for i, c in second.cotangents.items()
            }
            curved = self._slots.collect(first.places, moved, bent)
            yield {
                name: torch.stack([distant[name], close[name], curved[name] / 2], dim=1) for name in weights
            }

    def _moved(
        self,
        batch: Any,
        first: FirstPass,
        weights: Mapping[str, Tensor],
        displacements: Callable[[int], Vectors],
        far: Mapping[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """What all splits change in what is read."""
        total = [torch.zeros_like(x) for x in first.values]
        for k in range(max((w.shape[1] for w in weights.values()), default=0)):
            some = displacements(k)
            if far is not None:
                for name, moved in some.items():
                    moved.mul_(far[name].to(moved)[:, None])
            shares = self._slots.spread({name: w[:, k] for name, w in weights.items()}, first)
            self._precisely(partial(self._displace, batch, first, some, shares, total))
        return total

    def _signs(self, count: int) -> Tensor:
        return 2.0 * torch.randint(0, 2, (count,), generator=self._generator, dtype=torch.float64) - 1

    def _precisely(self, run: Callable[[], T]) -> T:
        """Run passes without autocast, unless the user's code needs what it casts."""
        if self._full:
            with _FullPrecision() as full:
                try:
                    return run()
                except RuntimeError:
                    if not full.lifted:
                        raise
            self._full = False  # found out in the first pass, before anything is added up
        return run()

    def _displace(
        self, batch: Any, first: FirstPass, displacements: Vectors, shares: list[Tensor], into: list[Tensor]
    ) -> None:
        """Add what displacements change in what is read, times its share."""
        directions = self._layout.spread(displacements, self._cut.parameters)
        count, last = 0, max(first.cotangents)

        def replace(place: Place, x: Tensor) -> Tensor:
            nonlocal count
            number, count = count, count + 1
            if number >= first.count or place != first.places[number]:
                raise ValueError(DIFFERENT)
            origin = first.values[number]
            if x.shape != origin.shape:
                raise ValueError(DIFFERENT)
            into[number].addcmul_(x.detach() - origin, shares[number])
            # The loss needs a history, or the user's code may refuse it.
            return origin.detach().requires_grad_().clone() if number == last else origin

        with self._cut.running(replace):
            for key, direction in directions.items():
                parameter = self._cut.parameters[key]
                parameter.data = parameter.data + direction  # the pass ends with its own again
            self._cut.loss(batch)
        if count != first.count:
            raise ValueError(DIFFERENT)


class _Slots:
    """Which neuron of which group a position on a port belongs to."""

    def __init__(self, arch: Architecture) -> None:
        self._widths = arch.widths
        ids = np.array([i for group in arch.groups for i in group.neurons], dtype=np.int64)
        slot = np.full(2 + max((int(p.neuron.max(initial=-1)) for p in arch.ports.values()), default=0), -1)
        slot[ids] = np.arange(len(ids))
        self._count = len(ids)
        self._ports = {key: torch.from_numpy(slot[port.neuron]) for key, port in arch.ports.items()}

    def _of(self, place: Place, x: Tensor) -> Tensor:
        """The neuron at each position along the axis; the number of neurons where there is none."""
        port = self._ports[place.path, place.port]
        # Groups of a convolution each read as many channels as the port has positions.
        slots = port.repeat(x.shape[place.axis] // len(port))
        return torch.where(slots < 0, self._count, slots)

    def spread(self, values: Vectors, first: FirstPass) -> list[Tensor]:
        """Numbers of the neurons, shaped to be multiplied with what is read; 0 where there is none."""
        whole = {name: torch.zeros(width, dtype=torch.float64) for name, width in self._widths.items()}
        flat = torch.cat([*(whole | values).values(), torch.zeros(1, dtype=torch.float64)])
        found = []
        for place, x in zip(first.places, first.values, strict=True):
            shape = [1] * x.ndim
            shape[place.axis] = -1
            found.append(flat[self._of(place, x)].to(x.device, x.dtype).view(shape))
        return found

    def collect(self, places: list[Place], values: list[Tensor], weights: Mapping[int, Tensor]) -> Vectors:
        """Sum the products of what belongs to the same neuron; one look at the device for all of them."""
        totals = torch.zeros(self._count + 1, dtype=torch.float64)
        sums = [_along(places[i].axis, values[i], w) for i, w in weights.items()]
        slots = [self._of(places[i], values[i]) for i in weights]
        totals.index_add_(0, torch.cat(slots), torch.cat(sums).cpu().double())
        found = totals[:-1].split(list(self._widths.values()))
        return dict(zip(self._widths, found, strict=True))


def _along(axis: int, change: Tensor, cotangent: Tensor) -> Tensor:
    """The product, summed over all axes but one."""
    exact = torch.float32 if change.device.type == "mps" else torch.float64
    others = [d for d in range(change.ndim) if d != axis % change.ndim]
    product = change * cotangent
    return product.sum(others, dtype=exact) if others else product.to(exact)


class _FullPrecision(TorchFunctionMode):
    """While active, autocast has no effect.

    Attributes:
        lifted: Whether it would have had one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lifted = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        device = next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")
        if not (torch.is_autocast_enabled(device) or torch.is_autocast_enabled("cpu")):
            return func(*args, **(kwargs or {}))
        self.lifted = True
        with without_autocast(device):
            return func(*args, **(kwargs or {}))
