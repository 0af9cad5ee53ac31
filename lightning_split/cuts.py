"""The cut network: runs in which everything that consumers read can be looked at and replaced.

Cut at the input of every consumer, each neuron is a function of its own incoming weights. What the pieces
are used for is another matter: :mod:`lightning_split.curvature`, :mod:`lightning_split.differences`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_split.architecture import Architecture
from lightning_split.effective import EffectiveWeights
from lightning_split.layers import Port, port_kind
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import gradients_only_for, undisturbed
from lightning_split.segments import in_words

__all__ = ["CutNetwork", "FirstPass", "LossFn", "Place", "check_loss"]

LossFn = Callable[[nn.Module, Any], Tensor]


class Place(NamedTuple):
    """Where a consumer reads."""

    path: str
    port: Port
    axis: int  # of what it reads, along which neurons lie


@dataclass(eq=False)
class FirstPass:
    """What a pass over a batch has shown; reads are numbered in the order in which they happen."""

    count: int  # number of reads
    places: list[Place]
    values: list[Tensor]  # what was read; empty unless asked for
    nodes: list[Any]  # nodes of the graph that stand for the cuts
    cotangents: dict[int, Tensor]  # gradient of the loss at a read, through that consumer alone


class CutNetwork:
    """A network, and the places where splittable neurons are read.

    Args:
        model: The network; left as it was by every method.
        arch: Its architecture.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss.
        train: Run in training mode instead of eval mode.
        seed: Seed of the random state in every pass.
    """

    def __init__(
        self, model: nn.Module, arch: Architecture, loss_fn: LossFn, *, train: bool = False, seed: int = 0
    ) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._train, self._seed = train, seed
        self._where = _consuming(arch)
        self._lean = True  # whether only the incoming weights of neurons need gradients
        self.parameters: dict[tuple[str, str], nn.Parameter] = {}  # those that hold incoming weights
        self._effective = EffectiveWeights(model)
        with self._effective:
            for group in arch.groups:
                for block in group.theta:
                    parameter = model.get_submodule(block.module)._parameters[block.tensor]
                    assert parameter is not None
                    self.parameters[block.module, block.tensor] = parameter

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch; to be called while :meth:`running`."""
        return self._loss_fn(self._model, batch)

    def running(self, replace: Callable[[Place, Tensor], Tensor]) -> ExitStack:
        """Context in which every consumer's input is passed through ``replace``.

        Parameters whose ``data`` is exchanged inside have their own again afterwards.
        """
        stack = ExitStack()
        stack.enter_context(self._effective)
        stack.enter_context(undisturbed(self._model, train=self._train, seed=self._seed))
        if self._lean:
            stack.enter_context(gradients_only_for(self._model, self.parameters.values()))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
        stack.enter_context(watched(self._model, _Cuts(self._where, replace)))
        return stack

    def first_pass(
        self, batch: Any, number: int, *, values: bool = False, shifts: Sequence[Tensor] | None = None
    ) -> FirstPass:
        """Gradient of the loss at every consumer's input.

        Costs a forward and a backward pass.

        Args:
            batch: What ``loss_fn`` takes.
            number: Of the batch, for messages.
            values: Keep copies of what was read.
            shifts: What is added to it, read by read.

        Raises:
            ValueError: If the loss is not a finite scalar, or does not depend on any splittable neuron, or a
                gradient is not finite.
        """
        if self._lean:
            try:
                found = self._try(batch, number, values, shifts)
            except RuntimeError:
                found = None  # the loss may take gradients of its own, in other parameters
            if found is not None:
                return found
            self._lean = False
        found = self._try(batch, number, values, shifts)
        if found is None:
            raise ValueError(
                "The loss does not depend on any splittable neuron, so there is nothing to gain from "
                "splitting; check that loss_fn uses the output of the model."
            )
        return found

    def late_gradient(self, batch: Any, number: int, at: int) -> tuple[Place, Tensor] | None:
        """Gradient of the loss at one read, on its way through everything that follows.

        Costs a forward pass without a graph, and one backward through what comes after the read.

        Args:
            batch: What ``loss_fn`` takes.
            number: Of the batch, for messages.
            at: Number of the read.

        Returns:
            Where it is, and the gradient; ``None`` if the loss does not depend on a read of this number, or
            takes gradients of its own in what is constant here.

        Raises:
            ValueError: If the gradient is not finite.
        """
        places: list[Place] = []
        reads: list[Tensor] = []

        def replace(place: Place, x: Tensor) -> Tensor:
            places.append(place)
            if len(places) - 1 != at:
                return x
            reads.append(x.detach().requires_grad_())
            return reads[0].clone()  # no leaf, so that it may be written to

        with self.running(replace), gradients_only_for(self._model, ()):
            try:
                loss = self.loss(batch)
                gradients: Sequence[Tensor | None] = (
                    torch.autograd.grad(loss, reads, allow_unused=True) if reads else [None]
                )
            except RuntimeError:
                return None  # a true error comes out in the first pass over what is kept of the batch
        if gradients[0] is None:
            return None
        _check_finite(places, {at: gradients[0]}, number)
        return places[at], gradients[0]

    def _try(self, batch: Any, number: int, keep: bool, shifts: Sequence[Tensor] | None) -> FirstPass | None:
        """``None`` if the loss does not depend on what needs gradients."""
        places: list[Place] = []
        taps: list[Tensor] = []
        nodes: list[Any] = []
        values: list[Tensor] = []

        def tap(place: Place, x: Tensor) -> Tensor:
            taps.append(x.view_as(x) if shifts is None else _shifted(x, shifts, len(places)))
            places.append(place)
            nodes.append(taps[-1].grad_fn)
            if keep:
                values.append(x.detach().clone())  # the network may write to it later
            return taps[-1]

        with self.running(tap):
            loss = self.loss(batch)
            if self._lean and not getattr(loss, "requires_grad", True):
                return None
            check_loss(loss, number)
            count = len(taps)  # a checkpointed layer runs again in backward
            wanted = [i for i in range(count) if taps[i].requires_grad]
            if not wanted:
                return None
            try:
                grads: tuple[Tensor | None, ...] = torch.autograd.grad(
                    loss, [taps[i] for i in wanted], allow_unused=True
                )
            except RuntimeError as error:
                raise in_words(error) from error
        found = {i: g.detach() for i, g in zip(wanted, grads, strict=True) if g is not None}
        if not found:
            return None
        _check_finite(places, found, number)
        return FirstPass(count, places[:count], values[:count], nodes, found)


def _shifted(x: Tensor, shifts: Sequence[Tensor], number: int) -> Tensor:
    if number >= len(shifts) or shifts[number].shape != x.shape:
        raise ValueError(DIFFERENT)
    return x + shifts[number]


DIFFERENT = (
    "Two passes over the same batch called the layers differently, so the forward pass depends on more than "
    "its input; pass a loss_fn that is deterministic for a seeded random state."
)


def _consuming(arch: Architecture) -> set[tuple[str, Port]]:
    """The ports on which splittable neurons are read."""
    neurons = [i for group in arch.groups for i in group.neurons]
    return {
        key
        for key, port in arch.ports.items()
        if port_kind(key[1]) == "in" and bool(np.isin(port.neuron, neurons).any())
    }


class _Cuts(Watcher):
    """Replaces what consumers read."""

    def __init__(self, where: set[tuple[str, Port]], replace: Callable[[Place, Tensor], Tensor]) -> None:
        self._where, self._replace = where, replace

    def read(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        return self._replace(Place(path, port, axis), x) if (path, port) in self._where else x


def _check_finite(places: list[Place], cotangents: Mapping[int, Tensor], number: int) -> None:
    """Refuse gradients that are not finite, naming the layer; one look at the device for all of them."""
    found = {i: torch.stack(torch.aminmax(c)).isfinite().all() for i, c in cotangents.items() if c.numel()}
    if not found:
        return
    where = next(iter(found.values())).device
    if bool(torch.stack([flag.to(where) for flag in found.values()]).all()):
        return
    name = next(places[i].path for i, flag in found.items() if not bool(flag))
    raise ValueError(
        f"The gradient of the loss at the input of '{name}' is not finite in batch {number}; the network has "
        "diverged, so splitting was not tried."
    )


def check_loss(loss: Any, number: int) -> None:
    """Refuse what is no finite scalar loss, naming the batch."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return one scalar tensor, the mean loss; it returned {shape}.")
    if not bool(torch.isfinite(loss).all()):
        raise ValueError(
            f"The loss of batch {number} is {float(loss.detach())}; splitting needs a finite loss, so "
            "nothing was changed."
        )
    if not loss.requires_grad:
        raise ValueError(
            "The loss does not depend on the network's parameters; loss_fn(model, batch) must return a "
            "tensor that carries gradients."
        )
