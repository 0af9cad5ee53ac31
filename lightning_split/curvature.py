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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture, ChannelGroup
from lightning_split.cuts import CutNetwork, LossFn, Place, check_loss
from lightning_split.effective import EffectiveWeights
from lightning_split.interrupts import give_way
from lightning_split.lean import LeanDerivatives, transformed, without_autocast
from lightning_split.segments import Layout, Part, Plan, Segment, parts
from lightning_split.surrogates import SmoothDerivatives

__all__ = ["LossFn", "SplittingOperator", "check_loss"]

Vectors = dict[str, Tensor]  # group name -> (width, dim)


class SplittingOperator:
    r"""The block-diagonal operator :math:`V \mapsto S V` over all neurons of all groups.

    :math:`S_i = \mathbb{E}[\Phi'(\sigma(\theta_i)) \nabla^2\sigma(\theta_i)]` is the splitting matrix of
    neuron i (S2D, Definition 2.1 and Eq. 7), averaged over the batches.

    Those of paired groups (queries, whose outgoing weights are those of the keys) are zero.

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
        weigh: For each batch, what becomes of the gradient of the loss at a read
            (:mod:`lightning_split.sampling`); ``None`` leaves them all as they are.

    Attributes:
        has_surrogates: Whether some activation had derivatives of a surrogate in the batches so far.
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
        weigh: Sequence[Callable[[Place, Tensor], Tensor]] | None = None,
    ) -> None:
        self._groups: dict[str, ChannelGroup] = {g.name: g for g in arch.groups}
        self._batches = list(batches)
        self._beta, self._weigh = surrogate_beta, weigh
        self._cache_bytes, self._kept_bytes = cache_bytes, 0
        self._kept: dict[int, list[Segment]] = {}  # by number of the batch
        if not self._batches:
            raise ValueError("The splitting matrices need at least one batch, and there is none.")
        if not self._groups:
            raise ValueError("The architecture has no channel group, so there is no splitting matrix.")
        self._cut = CutNetwork(model, arch.curved, loss_fn, train=train, seed=seed)
        self._layout = Layout(arch.curved.groups, self._cut.parameters)
        first = arch.groups[0].theta[0]
        with EffectiveWeights(model):
            self._weight = model.get_submodule(first.module).get_parameter(first.tensor)
        self.has_surrogates = False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(N, D)`` of every group."""
        return {name: (g.width, g.dim) for name, g in self._groups.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the incoming weights."""
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the incoming weights live."""
        return self._weight.device

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
        give_way()
        if not self._cut.parameters:
            return  # all matrices are zero
        kept = self._kept.get(number)
        if kept is not None:
            for segment in kept:
                multiply(segment)
            return
        batch = self._batches[number]
        plan = self._plan(batch, number)
        keep = keep and self._kept_bytes + plan.size <= self._cache_bytes
        smooth = None if self._beta is None else SmoothDerivatives(self._beta)
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

        with self._cut.running(lambda place, x: cut(x)), smooth or nullcontext(), lean:
            self._cut.loss(batch)
            for part in plan.close():
                finish(part)
        self.has_surrogates = self.has_surrogates or (smooth is not None and smooth.used)
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
        """The parts, with the gradient of the loss at every consumer's input, through that consumer alone."""
        first = self._cut.first_pass(batch, number)
        cotangents = first.cotangents
        if self._weigh is not None:
            weigh = self._weigh[number]
            cotangents = {i: weigh(first.places[i], c) for i, c in cotangents.items()}
        ends = {i: first.nodes[i].next_functions[0][0] for i in cotangents}
        return Plan(first.count, cotangents, parts(ends, first.nodes, self._cut.parameters))
