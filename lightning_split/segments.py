r"""The parts between cuts: φ falls into pieces that are differentiated one by one.

What consumers read is cut from what comes after, so the graph of one batch consists of separate pieces, each
with its own incoming weights. :math:`\nabla^2\varphi` times a vector is a double backward through each piece
alone, and only one piece's graph of first derivatives need exist at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_split.architecture import ChannelGroup, ThetaBlock

__all__ = ["Layout", "Segment", "no_second_derivative", "segments"]

Key = tuple[str, str]  # path of a layer, name of its parameter
Vectors = dict[str, Tensor]  # group name -> (N, D)


class Segment:
    """One piece of φ: what is read at its end, and the incoming weights that it depends on.

    Args:
        reads: Pairs of what a consumer reads and the gradient of the loss there.
        theta: The incoming weights.
    """

    def __init__(self, reads: list[tuple[Tensor, Tensor]], theta: dict[Key, nn.Parameter]) -> None:
        self._reads = reads
        self.theta = theta
        self._first: dict[Key, Tensor] | None = None

    @property
    def size(self) -> int:
        """Bytes that its graph will take, roughly: activations, cotangents and first derivatives."""
        # Beside each cut activation there are some five of like size: the input, what the layers save in the
        # forward and in the double backward pass, and the cotangent.
        return 6 * sum(x.element_size() * x.nelement() for x, _ in self._reads)

    def differentiate(self) -> None:
        """Form the gradient of φ in θ with its graph; before any product."""
        theta = list(self.theta.values())
        first = _gradients(
            [x for x, _ in self._reads], theta, [c.to(x.dtype) for x, c in self._reads], create_graph=True
        )
        # A gradient without history is constant in θ: those weights have no second derivative.
        self._first = {
            k: g for k, g in zip(self.theta, first, strict=True) if g is not None and g.requires_grad
        }
        self._reads = []

    def product(self, directions: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """The second derivative of φ along a direction; entries that vanish are left out.

        Raises:
            ValueError: If an operator has no second derivative.
        """
        assert self._first is not None
        keys = [k for k in self._first if k in directions]
        asked = [k for k in self.theta if k in directions]
        if not keys:
            return {}
        try:
            found = _gradients(
                [self._first[k] for k in keys],
                [self.theta[k] for k in asked],
                [directions[k] for k in keys],
                create_graph=False,
            )
        except RuntimeError as error:
            raise no_second_derivative(error) from error
        return {k: p for k, p in zip(asked, found, strict=True) if p is not None}


def segments(reads: Sequence[tuple[Tensor, Tensor]], theta: Mapping[Key, nn.Parameter]) -> list[Segment]:
    """Sort reads into pieces that share no weights, in the order in which they are first read.

    Costs one look at every node of the graph.
    """
    owner = {id(p): key for key, p in theta.items()}
    parent = list(range(len(reads)))  # union-find over the reads

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[Any, int] = {}  # node of the graph -> the read that met it first; keeps the nodes alive
    first: dict[Key, int] = {}  # weight -> the read that met it first
    for number, (x, _) in enumerate(reads):
        pending = [x.grad_fn]
        while pending:
            node = pending.pop()
            if node is None:
                continue
            if node in seen:
                low, high = sorted((root(seen[node]), root(number)))
                parent[high] = low
                continue
            seen[node] = number
            key = owner.get(id(getattr(node, "variable", None)))
            if key is not None:
                first[key] = number
            pending += [following for following, _ in node.next_functions]
    pieces: dict[int, tuple[list[tuple[Tensor, Tensor]], dict[Key, nn.Parameter]]] = {}
    for number, pair in enumerate(reads):
        pieces.setdefault(root(number), ([], {}))[0].append(pair)
    for key, number in first.items():
        pieces[root(number)][1][key] = theta[key]
    return [Segment(pairs, weights) for pairs, weights in pieces.values() if weights]


class Layout:
    """Where the vectors' entries lie in the parameters: ``(N, D)`` of each group to and from their shapes."""

    def __init__(self, groups: Iterable[ChannelGroup], theta: Mapping[Key, nn.Parameter]) -> None:
        self._blocks: dict[Key, list[tuple[str, slice, ThetaBlock, Tensor | None]]] = {}
        for group in groups:
            offset = 0
            for block in group.theta:
                key = (block.module, block.tensor)
                flat = torch.from_numpy(block.rows.reshape(-1))
                axis = theta[key].shape[block.axis]
                whole = len(flat) == axis and bool((flat == torch.arange(axis)).all())
                rows = None if whole else flat.to(theta[key].device)
                columns = slice(offset, offset + block.size)
                self._blocks.setdefault(key, []).append((group.name, columns, block, rows))
                offset += block.size

    def spread(self, vectors: Vectors, theta: Mapping[Key, nn.Parameter]) -> dict[Key, Tensor]:
        """Directions of those parameters that hold weights of the vectors' groups."""
        directions: dict[Key, Tensor] = {}
        for key, parameter in theta.items():
            for name, columns, block, rows in self._blocks[key]:
                if name not in vectors:
                    continue
                values = vectors[name][:, columns].to(parameter.dtype)
                shape = parameter.movedim(block.axis, 0).shape
                if rows is None:
                    directions[key] = values.reshape(shape).movedim(0, block.axis)
                else:
                    if key not in directions:
                        directions[key] = torch.zeros_like(parameter)
                    target = directions[key].movedim(block.axis, 0)
                    target[rows] = values.reshape(len(rows), *shape[1:])
        return directions

    def collect(self, products: Mapping[Key, Tensor], into: Vectors) -> None:
        """Add products to the groups' vectors."""
        for key, product in products.items():
            for name, columns, block, rows in self._blocks[key]:
                if name in into:
                    source = product.movedim(block.axis, 0)
                    source = source if rows is None else source[rows]
                    into[name][:, columns] += source.reshape(len(block.rows), -1).to(into[name].dtype)


def _gradients(
    outputs: list[Tensor], inputs: list[nn.Parameter], weights: list[Tensor], *, create_graph: bool
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad``, retaining the graph, for what may run forward passes on its way.

    Gradient checkpointing does. ``torch.autograd.grad`` itself would be an overridden function to the modes
    that are active, and such a function runs without them; the passes would lose the smooth derivatives.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    found: Sequence[Tensor | None] = engine.run_backward(
        tuple(outputs),
        tuple(weights),
        True,
        create_graph,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


def no_second_derivative(error: RuntimeError) -> Exception:
    """The error of a product in words, if an operator cannot be differentiated twice."""
    what = str(error).strip().partition("\n")[0]
    if not re.search(r"derivative for .* is not implemented|twice|double.backward", what, re.IGNORECASE):
        return error
    return ValueError(
        f"An operator of the network has no second derivative ({what}), so the splitting matrices of the "
        "neurons before it cannot be computed; leave them out (exclude=...), or use another form of the "
        "operator in loss_fn."
    )
