r"""Splitting matrices of all neurons at once, without ever forming one.

Cut the network at the input of every consumer. Between cuts each neuron is a function of its own incoming
weights, so with the inputs ``h`` of the segments and the cotangents :math:`c_k = \partial L/\partial x_k` at
the cuts held constant,

.. math:: \varphi(\theta) = \sum_k \langle c_k, x_k(\theta; h)\rangle, \qquad
          \nabla^2\varphi = \mathrm{blockdiag}(S_1, \dots, S_n),

and one Hessian-vector product of φ by double backward is :math:`S_i v_i` for every neuron of every layer. The
parts between cuts (:mod:`lightning_split.segments`) are differentiated one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_split.architecture import Architecture, ChannelGroup
from lightning_split.layers import Port, port_kind
from lightning_split.lean import LeanDerivatives, transformed, without_autocast
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import gradients_only_for, undisturbed
from lightning_split.segments import Layout, Part, Plan, Segment, in_words, parts
from lightning_split.surrogates import SmoothDerivatives

__all__ = ["LossFn", "SplittingOperator"]

LossFn = Callable[[nn.Module, Any], Tensor]
Vectors = dict[str, Tensor]  # group name -> (width, dim)


class SplittingOperator:
    r"""The block-diagonal operator :math:`V \mapsto S V` over all neurons of all groups.

    :math:`S_i = \mathbb{E}[\Phi'(\sigma(\theta_i)) \nabla^2\sigma(\theta_i)]` is the splitting matrix of
    neuron i (S2D, Definition 2.1 and Eq. 7), averaged over the batches.

    Shapes: a group of ``N`` neurons with ``D`` incoming weights each has vectors ``(N, D)``.

    Cost: preparing a batch takes two forward and two backward passes; a product takes a little less than a
    training step. Batches whose graphs do not fit into ``cache_bytes`` are prepared anew for every product;
    of these the double backward of only one part of the network exists at a time.

    Args:
        model: The network; left as it was by every method.
        arch: Its architecture, from :func:`lightning_split.trace`.
        batches: What ``loss_fn`` takes; each batch counts the same.
        loss_fn: ``loss_fn(model, batch)`` returns the scalar mean loss.
        surrogate_beta: Sharpness of the softplus whose derivatives stand in for those of piecewise-linear
            activations; ``None`` keeps the true ones, whose second derivative is zero.
        train: Run in training mode (BatchNorm by the statistics of the batch) instead of eval mode.
        cache_bytes: Graphs of batches are kept between products until they take about so much memory.
        seed: Seed of the random state in every pass (dropout in training mode).
    """

    def __init__(
        self,
        model: nn.Module,
        arch: Architecture,
        batches: Iterable[Any],
        loss_fn: LossFn,
        *,
        surrogate_beta: float | None = 3.0,
        train: bool = False,
        cache_bytes: int = 2**28,
        seed: int = 0,
    ) -> None:
        self._model = model
        self._groups: dict[str, ChannelGroup] = {g.name: g for g in arch.groups}
        self._cuts = _consuming(arch)
        self._batches = list(batches)
        self._loss_fn = loss_fn
        self._beta = surrogate_beta
        self._train = train
        self._cache_bytes, self._kept_bytes = cache_bytes, 0
        self._seed = seed
        self._kept: dict[int, list[Segment]] = {}  # by number of the batch
        self._lean = True  # whether only the incoming weights of neurons need gradients
        if not self._batches:
            raise ValueError("The splitting matrices need at least one batch, and there is none.")
        if not self._groups:
            raise ValueError("The architecture has no channel group, so there is no splitting matrix.")
        self._layout = Layout(self._groups.values(), self._parameters())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(N, D)`` of every group."""
        return {name: (g.width, g.dim) for name, g in self._groups.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the incoming weights."""
        return self._some_weight().dtype

    @property
    def device(self) -> torch.device:
        """Where the incoming weights live."""
        return self._some_weight().device

    @property
    def num_batches(self) -> int:
        """Number of batches that the matrices are averaged over."""
        return len(self._batches)

    def matvec(self, vectors: Mapping[str, Tensor]) -> Vectors:
        """Multiply every neuron's splitting matrix with that neuron's vector.

        Args:
            vectors: ``{group name: (N, D)}``; groups left out count as zero and are left out of the result.

        Returns:
            ``{group name: (N, D)}``, row i holding ``S_i @ v_i``.

        Raises:
            ValueError: If a name or a shape does not fit, or a loss is not a finite scalar that depends on
                the network.
        """
        self._check(vectors)
        total = {name: torch.zeros_like(v) for name, v in vectors.items()}
        multiply = self._adding(dict(vectors), total)
        for number in range(self.num_batches):
            self._apply(number, multiply)
        return {name: value.div_(self.num_batches) for name, value in total.items()}

    def products(self, vectors: Mapping[str, Tensor]) -> Iterator[Vectors]:
        """The same product for every batch by itself, one after the other."""
        self._check(vectors)
        for number in range(self.num_batches):
            product = {name: torch.zeros_like(v) for name, v in vectors.items()}
            self._apply(number, self._adding(dict(vectors), product))
            yield product

    def quadratic_forms(self, vectors: Mapping[str, Tensor]) -> Iterator[Vectors]:
        r""":math:`v^\top S v` of several vectors of every neuron, for every batch by itself.

        Costs one preparation and ``K`` products per batch.

        Args:
            vectors: ``{group name: (N, K, D)}``.

        Returns:
            Batch after batch ``{group name: (N, K)}``.
        """
        count = max((v.shape[1] for v in vectors.values()), default=0)
        many = [{name: v[:, k] for name, v in vectors.items()} for k in range(count)]
        for number in range(self.num_batches):
            forms = [{name: v.new_zeros(len(v)) for name, v in vectors.items()} for _ in many]

            def multiply(segment: Segment, forms: list[Vectors] = forms) -> None:
                for some, form in zip(many, forms, strict=True):
                    products = segment.product(self._layout.spread(some, segment.theta))
                    self._layout.forms(products, some, form)

            self._apply(number, multiply, keep=False)  # every batch is looked at once
            yield {name: torch.stack([form[name] for form in forms], dim=1) for name in vectors}

    def release(self) -> None:
        """Let go of all kept graphs; the next product prepares its batches anew."""
        self._kept.clear()
        self._kept_bytes = 0

    def dense(self, group: str | ChannelGroup) -> Tensor:
        """The splitting matrices of one group (or its name), ``(N, D, D)``; costs D products."""
        group = group.name if isinstance(group, ChannelGroup) else group
        width, dim = self.shapes[group]
        columns = []
        for j in range(dim):
            unit = torch.zeros(width, dim, dtype=self.dtype, device=self.device)
            unit[:, j] = 1
            columns.append(self.matvec({group: unit})[group])
        return torch.stack(columns, dim=2)

    # one batch --------------------------------------------------------------------------------------

    def _check(self, vectors: Mapping[str, Tensor]) -> None:
        for name, v in vectors.items():
            if name not in self._groups:
                raise ValueError(
                    f"There is no channel group named {name!r}; the groups are: "
                    f"{', '.join(map(repr, self._groups))}."
                )
            if tuple(v.shape) != self.shapes[name]:
                raise ValueError(
                    f"The vectors of group '{name}' have shape {tuple(v.shape)}, not {self.shapes[name]}."
                )

    def _apply(self, number: int, multiply: Callable[[Segment], None], *, keep: bool = True) -> None:
        """Run through the segments of one batch."""
        kept = self._kept.get(number)
        if kept is not None:
            for segment in kept:
                multiply(segment)
            return
        batch = self._batches[number]
        plan = self._plan(batch, number)
        keep = keep and self._kept_bytes + plan.size <= self._cache_bytes
        smooth = nullcontext() if self._beta is None else SmoothDerivatives(self._beta)
        lean = LeanDerivatives()
        done: list[Segment] = []

        def finish(part: Part) -> None:
            segment = plan.segment(part)
            with torch.enable_grad(), without_autocast(self.device.type):
                segment.differentiate()
                multiply(segment)
            if keep:
                done.append(segment)

        def cut(x: Tensor) -> Tensor:
            part = plan.read(x)
            # Not in the middle of what is going to run again, or of a transformed function.
            if part is not None and not (lean.recomputing() or transformed()):
                finish(part)
            return plan.beyond(x)

        with self._running(cut), smooth, lean:
            self._loss_fn(self._model, batch)
            for part in plan.close():
                finish(part)
        if keep and not lean.recomputed:
            self._kept[number] = done
            self._kept_bytes += plan.size

    def _adding(self, vectors: Vectors, answer: Vectors) -> Callable[[Segment], None]:
        """Adds the product with each segment."""
        layout = self._layout

        def multiply(segment: Segment) -> None:
            directions, totals = layout.spread(vectors, segment.theta), layout.matrices(answer, segment.theta)
            layout.collect(segment.product(directions, totals), answer)

        return multiply

    def _plan(self, batch: Any, number: int) -> Plan:
        """Gradient of the loss at every consumer's input, through that consumer alone, and the parts."""
        if self._lean:
            try:
                plan = self._plan_once(batch, number)
            except RuntimeError:
                plan = None  # the loss may take gradients of its own, in other parameters
            if plan is not None:
                return plan
            self._lean = False
        plan = self._plan_once(batch, number)
        if plan is None:
            raise ValueError(
                "The loss does not depend on any splittable neuron, so there is nothing to gain from "
                "splitting; check that loss_fn uses the output of the model."
            )
        return plan

    def _plan_once(self, batch: Any, number: int) -> Plan | None:
        """``None`` if the loss does not depend on what needs gradients."""
        taps: list[Tensor] = []
        nodes: list[Any] = []

        def tap(x: Tensor) -> Tensor:
            taps.append(x.view_as(x))
            nodes.append(taps[-1].grad_fn)
            return taps[-1]

        with self._running(tap):
            loss = self._loss_fn(self._model, batch)
            if self._lean and not getattr(loss, "requires_grad", True):
                return None
            check_loss(loss, number)
            count = len(taps)  # a checkpointed layer runs again in backward
            calls = list(self._consumer_calls)
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
        _check_finite({i: calls[i] for i in found}, found, number)
        ends = {i: nodes[i].next_functions[0][0] for i in found}
        return Plan(count, found, parts(ends, nodes, self._parameters()))

    def _running(self, replace: Callable[[Tensor], Tensor]) -> ExitStack:
        """Context in which every consumer's input is passed through ``replace``."""
        stack = ExitStack()
        self._consumer_calls: list[str] = []
        stack.enter_context(undisturbed(self._model, train=self._train, seed=self._seed))
        if self._lean:
            stack.enter_context(gradients_only_for(self._model, self._parameters().values()))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
        stack.enter_context(watched(self._model, _Cuts(self._cuts, self._consumer_calls, replace)))
        return stack

    def _parameters(self) -> dict[tuple[str, str], nn.Parameter]:
        found: dict[tuple[str, str], nn.Parameter] = {}
        for group in self._groups.values():
            for block in group.theta:
                parameter = self._model.get_submodule(block.module)._parameters[block.tensor]
                assert parameter is not None
                found[block.module, block.tensor] = parameter
        return found

    def _some_weight(self) -> Tensor:
        return next(iter(self._parameters().values()))


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

    def __init__(
        self, where: set[tuple[str, Port]], calls: list[str], replace: Callable[[Tensor], Tensor]
    ) -> None:
        self._where, self._calls, self._replace = where, calls, replace

    def read(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        if (path, port) not in self._where:
            return x
        self._calls.append(path)
        return self._replace(x)


def _check_finite(calls: Mapping[int, str], cotangents: Mapping[int, Tensor], number: int) -> None:
    """Refuse gradients that are not finite, naming the layer; one look at the device for all of them."""
    found = {i: torch.isfinite(c).all() for i, c in cotangents.items()}
    where = next(iter(found.values())).device
    if bool(torch.stack([flag.to(where) for flag in found.values()]).all()):
        return
    name = next(calls[i] for i, flag in found.items() if not bool(flag))
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
