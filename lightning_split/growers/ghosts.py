r"""New neurons on trial: they stand in the network with weight zero, and what they could do is measured.

Nobody reads a *ghost*, so the loss is what it was; but it has a gradient in the ghost's outgoing weights u,
and where those are zero that gradient, as a function of the incoming weights θ, is all there is to know:

.. math:: L(\theta, u) = L - \langle -\nabla_u L(\theta, 0), u\rangle + O(\|u\|^2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_split.architecture import ChannelGroup
from lightning_split.context import GrowthContext
from lightning_split.curvature import check_loss
from lightning_split.layers import LayerRule, Port, port_kind, rule_for
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import undisturbed
from lightning_split.segments import in_words
from lightning_split.splits import Part, Split, blocks_of, weights_of
from lightning_split.surgery import Surgery
from lightning_split.surrogates import SmoothDerivatives

__all__ = ["Ghosts", "Vectors", "averaged", "fresh_through"]

Vectors = dict[str, Tensor]  # group -> (M, length of a part), M at most the width


class Ghosts:
    """New neurons beside the first M neurons of every group, with the same columns of zeros for all readers.

    Args:
        context: The network and how to run it.
        incoming: ``{group: (M, dim)}``, their incoming weights.
        through: What channelwise layers keep of them; default :func:`fresh_through`.
    """

    def __init__(self, context: GrowthContext, incoming: Vectors, through: Vectors | None = None) -> None:
        self._context = context
        splits = []
        for name, theta in incoming.items():
            group = context.arch.group(name)
            kept = fresh_through(context.model, group, len(theta)) if through is None else through[name]
            moved = theta - weights_of(context.model, group, "incoming")[: len(theta)].to(theta)
            kept_moved = kept - weights_of(context.model, group, "through")[: len(kept)].to(kept)
            splits += [
                Split(name, i, (1.0, 0.0), _second(row), _second(other))
                for i, (row, other) in enumerate(zip(moved, kept_moved, strict=True))
            ]
        self._surgery = Surgery(context.model, splits, context.arch)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Inside, the ghosts stand in the network."""
        self._surgery.apply()
        try:
            self._surgery.displace()
            yield
        finally:
            self._surgery.revert()

    def calibrate(self, batches: Sequence[Any]) -> None:
        """Measure, while present, what describes the ghosts' activations (the statistics of BatchNorm).

        Costs a forward pass per batch; nothing where no layer keeps statistics.
        """
        context, surgery = self._context, self._surgery
        watcher = _Calibration(context.model, surgery)
        if not watcher.needed:
            return
        for number, batch in enumerate(batches):
            watcher.number = number
            with self._running(), watched(context.model, watcher):
                context.loss_fn(context.model, batch)
        averages = context.ranks.mean_of({f"{p} {n}": t for (p, n), t in watcher.tensors.items()})
        for (path, name), tensor in watcher.tensors.items():
            tensor.copy_(averages[f"{path} {name}"])

    def through(self) -> Vectors:
        """What channelwise layers keep of the ghosts now."""
        return self._surgery.places.gather("through", 1, self._surgery.places.grown("through"))

    def outgoing_gradients(self, batches: Sequence[Any]) -> Iterator[Vectors]:
        """While present: the gradient of the loss in the ghosts' outgoing weights, batch by batch.

        Costs a training step of the widened network per batch.
        """
        tensors = self._surgery.places.grown("outgoing")
        for number, batch in enumerate(batches):
            with self._running():
                loss = self._context.loss_fn(self._context.model, batch)
                check_loss(loss, number)
                try:
                    gradients = _gradients(loss, tensors)
                except RuntimeError as error:
                    raise in_words(error) from error
            yield self._surgery.places.gather("outgoing", 1, gradients)

    def mixed(self, batches: Sequence[Any], part: Part, vectors: Vectors, *, smooth: bool = True) -> Vectors:
        r"""While present: products of vectors with the mixed second derivative of the loss in θ and u.

        Args:
            batches: What to average over.
            part: ``"outgoing"`` for :math:`u \mapsto \partial_\theta\langle\partial_u L, u\rangle`,
                ``"incoming"`` for its transpose.
            vectors: One for each ghost, of that part.
            smooth: Whether piecewise-linear activations have the derivatives of their smooth counterparts.

        Returns:
            Vectors of the other part.
        """
        other: Part = "incoming" if part == "outgoing" else "outgoing"
        direction = self._surgery.places.scatter(part, 1, vectors)
        near, far = self._surgery.places.grown(part), self._surgery.places.grown(other)
        products = []
        for number, batch in enumerate(batches):
            with self._running(smooth=smooth, twice=True):
                loss = self._context.loss_fn(self._context.model, batch)
                check_loss(loss, number)
                first = _gradients(loss, near, create_graph=True)
                inner = torch.stack([(first[key] * direction[key]).sum().double() for key in near]).sum()
                try:
                    second = _gradients(inner, far)
                except RuntimeError as error:
                    raise in_words(error) from error
            products.append(self._surgery.places.gather(other, 1, second))
        return averaged(self._context, products)

    def _running(self, *, smooth: bool = False, twice: bool = False) -> ExitStack:
        context, stack = self._context, ExitStack()
        stack.enter_context(undisturbed(context.model, train=context.train_mode, seed=context.seed))
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
        beta = context.surrogate_beta if smooth else None
        stack.enter_context(nullcontext() if beta is None else SmoothDerivatives(beta))
        return stack


class _Calibration(Watcher):
    """Writes what it sees of the ghosts into the layers that keep statistics, before they use them."""

    def __init__(self, model: nn.Module, surgery: Surgery) -> None:
        self._model, self._surgery = model, surgery
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self._rules: dict[str, LayerRule] = {}  # asked for now: a layer that is watched has none
        for (path, name), tensor in surgery.places.grown("through").items():
            layer = model.get_submodule(path)
            rule = rule_for(layer)
            if rule is not None and name in layer._buffers and name in rule.statistics(layer, _PROBE, 1):
                self.tensors[path, name] = tensor
                self._rules[path] = rule
        self.number = 0  # of the batch

    @property
    def needed(self) -> bool:
        return bool(self.tensors)

    def read(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        if path not in self._rules or port_kind(port) != "through":
            return x
        layer = self._model.get_submodule(path)
        for name, values in self._rules[path].statistics(layer, x, axis).items():
            kept = self.tensors.get((path, name))
            if kept is None:
                continue
            entries = self._surgery.places.entries(path, name, 1).to(x.device)
            new = values.to(kept)[entries]
            kept[entries] += (new - kept[entries]) / (self.number + 1)
            layer._buffers[name][entries] = kept[entries]  # type: ignore[index]  # this pass has a copy
        return x


_PROBE = torch.zeros(2, 1, 1)


def fresh_through(model: nn.Module, group: ChannelGroup, count: int, *, shared: bool = False) -> Tensor:
    """What channelwise layers keep of new neurons: neutral values, or copies of the neuron beside.

    Args:
        model: The network.
        group: The neurons' group.
        count: How many; the i-th stands beside neuron i.
        shared: Copy the first neuron for all of them.

    Returns:
        ``(count, length of the part)``.
    """
    kept = weights_of(model, group, "through").clone()
    if shared:
        kept = kept[:1].expand_as(kept).clone()
    offset = 0
    for block in blocks_of(group, "through"):
        layer = model.get_submodule(block.module)
        rule = rule_for(layer)
        value = None if rule is None else rule.fresh(layer).get(block.tensor)
        if value is not None:
            kept[:, offset : offset + block.size] = value
        offset += block.size
    return kept[:count]


def averaged(context: GrowthContext, vectors: Sequence[Vectors]) -> Vectors:
    """Mean over the batches and the processes."""
    total = {name: torch.stack([v[name] for v in vectors]).mean(0) for name in vectors[0]}
    return context.ranks.mean_of(total)


def _second(row: Tensor) -> Tensor:
    """Displacements of two offspring, of which the first stays."""
    return torch.stack([torch.zeros_like(row), row])


def _gradients(
    value: Tensor, tensors: Mapping[tuple[str, str], Tensor], *, create_graph: bool = False
) -> dict[tuple[str, str], Tensor]:
    """Gradients in all tensors; zero in those that are frozen or without influence."""
    wanted = [key for key, tensor in tensors.items() if tensor.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if wanted and value.requires_grad:
        inputs = [tensors[key] for key in wanted]
        found = torch.autograd.grad(value, inputs, create_graph=create_graph, allow_unused=True)
    known = dict(zip(wanted, found, strict=True))
    return {
        key: torch.zeros_like(tensor) if (g := known.get(key)) is None else g
        for key, tensor in tensors.items()
    }
