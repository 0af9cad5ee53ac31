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
from lightning_split.lean import LeanDerivatives
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import undisturbed
from lightning_split.segments import Layout, Segment, segments
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
        self._layout: Layout | None = None
        if not self._batches:
            raise ValueError("The splitting matrices need at least one batch, and there is none.")
        if not self._groups:
            raise ValueError("The architecture has no channel group, so there is no splitting matrix.")

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
        for number in range(self.num_batches):
            self._apply(number, [dict(vectors)], [total])
        return {name: value.div_(self.num_batches) for name, value in total.items()}

    def products(self, vectors: Mapping[str, Tensor]) -> Iterator[Vectors]:
        """The same product for every batch by itself, one after the other."""
        self._check(vectors)
        for number in range(self.num_batches):
            product = {name: torch.zeros_like(v) for name, v in vectors.items()}
            self._apply(number, [dict(vectors)], [product])
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
            products = [{name: torch.zeros_like(v) for name, v in vectors.items()} for vectors in many]
            self._apply(number, many, products, keep=False)  # every batch is looked at once
            yield {
                name: torch.stack([(v[:, k] * products[k][name]).sum(-1) for k in range(count)], dim=1)
                for name, v in vectors.items()
            }

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

    def _apply(self, number: int, many: list[Vectors], answers: list[Vectors], *, keep: bool = True) -> None:
        """Add the products of one batch with several sets of vectors, from one preparation."""
        kept = self._kept.get(number)
        if kept is not None:
            for segment in kept:
                self._multiply(segment, many, answers)
            return
        batch = self._batches[number]
        cotangents = self._cotangents(batch, number)
        smooth = nullcontext() if self._beta is None else SmoothDerivatives(self._beta)
        lean = LeanDerivatives()
        reads: list[Tensor] = []

        def cut(x: Tensor) -> Tensor:
            reads.append(x)
            return x.detach()

        with self._running(cut), smooth, lean:
            self._loss_fn(self._model, batch)
            if len(reads) != len(cotangents):
                raise ValueError(
                    "Two passes over the same batch called the layers differently often "
                    f"({len(cotangents)} and {len(reads)} times), so the forward pass depends on more "
                    "than its input; pass a loss_fn that is deterministic for a seeded random state."
                )
            pairs = [(x, c) for x, c in zip(reads, cotangents, strict=True) if c is not None]
            parts = segments([(x, c) for x, c in pairs if x.requires_grad], self._parameters())
            reads.clear()
            del pairs, cotangents
            size = sum(segment.size for segment in parts)
            keep = keep and self._kept_bytes + size <= self._cache_bytes and not lean.recomputed
            done = []
            while parts:
                segment = parts.pop(0)
                segment.differentiate()
                self._multiply(segment, many, answers)
                if keep:
                    done.append(segment)
        if keep:
            self._kept[number] = done
            self._kept_bytes += size

    def _multiply(self, segment: Segment, many: list[Vectors], answers: list[Vectors]) -> None:
        if self._layout is None:
            self._layout = Layout(self._groups.values(), self._parameters())
        for vectors, answer in zip(many, answers, strict=True):
            directions = self._layout.spread(vectors, segment.theta)
            self._layout.collect(segment.product(directions), answer)

    def _cotangents(self, batch: Any, number: int) -> list[Tensor | None]:
        """Gradient of the loss at every consumer's input, through that consumer alone."""
        taps: list[Tensor] = []

        def tap(x: Tensor) -> Tensor:
            taps.append(x.view_as(x))
            return taps[-1]

        with self._running(tap):
            loss = self._loss_fn(self._model, batch)
            check_loss(loss, number)
            seen, calls = (
                list(taps),
                list(self._consumer_calls),
            )  # a checkpointed layer runs again in backward
            wanted = [t for t in seen if t.requires_grad]
            grads = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
        if not any(g is not None for g in grads):
            raise ValueError(
                "The loss does not depend on any splittable neuron, so there is nothing to gain from "
                "splitting; check that loss_fn uses the output of the model."
            )
        found = iter(grads)
        cotangents = [next(found) if t.requires_grad else None for t in seen]
        _check_finite(calls, cotangents, number)
        return [None if c is None else c.detach() for c in cotangents]

    def _running(self, replace: Callable[[Tensor], Tensor]) -> ExitStack:
        """Context in which every consumer's input is passed through ``replace``."""
        stack = ExitStack()
        self._consumer_calls: list[str] = []
        stack.enter_context(undisturbed(self._model, train=self._train, seed=self._seed))
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


def _check_finite(calls: list[str], cotangents: list[Tensor | None], number: int) -> None:
    """Refuse gradients that are not finite, naming the layer; one look at the device for all of them."""
    found = [
        (name, torch.isfinite(c).all()) for name, c in zip(calls, cotangents, strict=True) if c is not None
    ]
    where = found[0][1].device
    if bool(torch.stack([flag.to(where) for _, flag in found]).all()):
        return
    name = next(name for name, flag in found if not bool(flag))
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
