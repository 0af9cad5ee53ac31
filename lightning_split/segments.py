r"""The parts between cuts: φ falls into pieces that are differentiated one by one.

What consumers read is cut from what comes after, so the graph of one batch consists of separate pieces, each
with its own incoming weights. :math:`\nabla^2\varphi` times a vector is a double backward through each piece
alone, and only one piece's graph of first derivatives need exist at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_split.architecture import ChannelGroup, ThetaBlock
from lightning_split.krylov import pieces
from lightning_split.lean import adding

__all__ = ["Layout", "Part", "Segment", "in_words", "parts"]

Key = tuple[str, str]  # path of a layer, name of its parameter
Vectors = dict[str, Tensor]  # group name -> (N, D)


class Segment:
    """One piece of φ: what is read at its end, and the incoming weights that it depends on.

    Args:
        reads: Pairs of what a consumer reads and the gradient of the loss there.
        theta: The incoming weights.
    """

    def __init__(self, reads: list[tuple[Tensor, Tensor]], theta: Mapping[Key, nn.Parameter]) -> None:
        self._reads = reads
        self.theta = theta
        self._first: dict[Key, Tensor] = {}
        self._along: dict[Key, Tensor] = {}

    def differentiate(self) -> None:
        """Form the gradient of φ in θ with its graph; before any product."""
        if not self._reads:
            return
        theta = list(self.theta.values())
        try:
            first = _gradients(
                [x for x, _ in self._reads], theta, [c.to(x.dtype) for x, c in self._reads], create_graph=True
            )
        except RuntimeError as error:
            raise in_words(error) from error
        # A gradient without history is constant in θ: those weights have no second derivative.
        self._first = {
            k: _Graph.apply(g, self._along, k)
            for k, g in zip(self.theta, first, strict=True)
            if g is not None and g.requires_grad
        }
        self._reads = []

    def product(
        self, directions: Mapping[Key, Tensor], totals: Mapping[Key, Tensor] | None = None
    ) -> dict[Key, Tensor]:
        """The second derivative of φ along a direction; entries that vanish are left out.

        Args:
            directions: Of some of the weights.
            totals: Matrices that the products may be added to at once; they are left out then.

        Raises:
            ValueError: If an operator has no second derivative.
        """
        keys = [k for k in self._first if k in directions]
        asked = [k for k in self.theta if k in directions]
        if not keys:
            return {}
        self._along.update((k, directions[k]) for k in keys)
        wanted = {self.theta[k]: total for k, total in (totals or {}).items() if k in asked}
        try:
            with adding(wanted) as added:
                found = _gradients(
                    [self._first[k] for k in keys],
                    [self.theta[k] for k in asked],
                    [torch.ones_like(self._first[k]) for k in keys],
                    create_graph=False,
                )
                pairs = [(k, p) for k, p in zip(asked, found, strict=True) if p is not None]
                return {k: p for k, p in pairs if not added(self.theta[k], p)}
        except RuntimeError as error:
            raise in_words(error) from error
        finally:
            self._along.clear()


class _Graph(torch.autograd.Function):
    """Stands for a gradient in the second backward pass: has its graph, and not its value.

    That would take as much memory as the weights, for every batch whose graph is kept.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, along: dict[Key, Tensor], key: Key) -> Tensor:
        ctx.along, ctx.key = along, key
        return gradient.new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor, None, None]:
        return ctx.along[ctx.key], None, None


@dataclass(eq=False)
class Part:
    """What a segment will be made of.

    Args:
        reads: Numbers of the reads at its end, ascending.
        theta: The incoming weights that they depend on.
    """

    reads: list[int]
    theta: dict[Key, nn.Parameter]


def parts(ends: Mapping[int, Any], cuts: Iterable[Any], theta: Mapping[Key, nn.Parameter]) -> list[Part]:
    """Sort reads into parts that share no weights, in the order in which they are first read.

    Costs two looks at every node of the graph.

    Args:
        ends: By the number of the read, the node of the graph that made it.
        cuts: Nodes beyond which another part lies.
        theta: The incoming weights.
    """
    owner, leading = _leading(ends.values(), cuts, theta)
    parent = {number: number for number in ends}  # union-find over the reads

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[Any, int] = {}  # node of the graph -> the read that met it first
    first: dict[Key, int] = {}  # weight -> the read that met it first
    for number, end in ends.items():
        pending = [end]
        while pending:
            node = pending.pop()
            if node not in leading:
                continue
            if node in seen:
                low, high = sorted((root(seen[node]), root(number)))
                parent[high] = low
                continue
            seen[node] = number
            if node in owner:
                first[owner[node]] = number
            pending += [following for following, _ in node.next_functions]
    found: dict[int, Part] = {}
    for number in ends:
        found.setdefault(root(number), Part([], {})).reads.append(number)
    for key, number in first.items():
        found[root(number)].theta[key] = theta[key]
    return [part for part in found.values() if part.theta]


def _leading(
    ends: Iterable[Any], cuts: Iterable[Any], theta: Mapping[Key, nn.Parameter]
) -> tuple[dict[Any, Key], set[Any]]:
    """The nodes of the weights, and all nodes that lead from an end to one of them without a cut."""
    keys = {id(p): key for key, p in theta.items()}
    owner: dict[Any, Key] = {}
    before: dict[Any, list[Any]] = {node: [] for node in cuts}  # where one comes from; keeps the nodes alive
    before[None] = []
    pending = []
    for end in ends:
        if end not in before:
            before[end] = []
            pending.append(end)
    while pending:
        node = pending.pop()
        key = keys.get(id(getattr(node, "variable", None)))
        if key is not None:
            owner[node] = key
        for following, _ in node.next_functions:
            if following not in before:
                before[following] = []
                pending.append(following)
            before[following].append(node)
    leading = set(owner)
    pending = list(owner)
    while pending:
        fresh = [node for node in before[pending.pop()] if node not in leading]
        leading.update(fresh)
        pending += fresh
    return owner, leading


class Plan:
    """The parts of one batch, filled as the forward pass goes along.

    A part is handed out as soon as all its ends have been read, so that its graph need not wait for the rest.

    Args:
        count: Number of reads.
        cotangents: Gradients of the loss where it depends on what is read, by the number of the read.
        parts: What belongs together.
    """

    def __init__(self, count: int, cotangents: dict[int, Tensor], parts: list[Part]) -> None:
        self._count, self._parts, self._next = count, parts, 0
        self._last = max(cotangents)
        self._where = {number: part for part in parts for number in part.reads}
        self._cotangents = {i: c for i, c in cotangents.items() if i in self._where}
        self._reads: dict[int, Tensor] = {}
        self._open = True
        # Beside each cut activation there are some five of like size: the input, what the layers save in the
        # forward and in the double backward pass, and the cotangent.
        self.size = 6 * sum(c.element_size() * c.nelement() for c in self._cotangents.values())

    def read(self, x: Tensor) -> Part | None:
        """Note what is read next; a part whose last end that was is returned."""
        number, self._next = self._next, self._next + 1
        if not self._open:
            return None  # gradient checkpointing has run a layer once more
        part = self._where.get(number)
        if part is None:
            return None
        if x.shape != self._cotangents[number].shape:
            raise ValueError(
                _DIFFERENT.format(
                    f"and read {tuple(x.shape)} where it was {tuple(self._cotangents[number].shape)}"
                )
            )
        self._reads[number] = x
        return part if number == part.reads[-1] else None

    def beyond(self, x: Tensor) -> Tensor:
        """What the consumer goes on with: what was read, without its history.

        The last one on which the loss depends begins a new history, because a loss without one is an error to
        the user's code.
        """
        if self._next - 1 != self._last or not self._open:
            return x.detach()
        return x.detach().requires_grad_().clone()  # no leaf, so that it may be written to

    def segment(self, part: Part) -> Segment:
        """The segment of a part that has been read; it is not there any more afterwards."""
        self._parts.remove(part)
        pairs = [(self._reads.pop(i), self._cotangents.pop(i)) for i in part.reads]
        return Segment([(x, c) for x, c in pairs if x.requires_grad], part.theta)

    def close(self) -> Iterator[Part]:
        """The forward pass is over: the parts that are left."""
        self._open = False
        if self._next != self._count:
            raise ValueError(_DIFFERENT.format(f"{self._count} and {self._next} times"))
        while self._parts:
            yield self._parts[0]


_DIFFERENT = (
    "Two passes over the same batch called the layers differently ({}), so the forward pass depends on more "
    "than its input; pass a loss_fn that is deterministic for a seeded random state."
)


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

    def matrices(self, into: Vectors, theta: Mapping[Key, nn.Parameter]) -> dict[Key, Tensor]:
        """Where in the groups' vectors the products of whole matrices lie as they are."""
        found = {}
        for key, parameter in theta.items():
            name, columns, block, rows = self._blocks[key][0]
            # one row each: a head owns several, and its vector is longer than a row of the matrix
            whole = rows is None and len(self._blocks[key]) == 1 and block.rows.shape[1] == 1
            if whole and parameter.ndim == 2 and block.axis == 0 and name in into:
                found[key] = into[name][:, columns]
        return found

    def forms(self, products: Mapping[Key, Tensor], vectors: Vectors, into: Vectors) -> None:
        """Add what products have along the vectors, neuron by neuron, to ``(N,)`` of each group."""
        for key, product in products.items():
            for name, columns, block, rows in self._blocks[key]:
                if name not in into:
                    continue
                source = product.movedim(block.axis, 0)
                source = source if rows is None else source[rows]
                source = source.reshape(len(block.rows), -1)
                v = vectors[name][:, columns]
                for some in pieces((source.shape[0], source.shape[1]), source.device):
                    into[name][some] += (source[some].to(v.dtype) * v[some]).sum(-1)


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


def in_words(error: RuntimeError) -> Exception:
    """The error of a backward pass in words, if an operator cannot be differentiated once or twice."""
    what = str(error).strip().partition("\n")[0]
    if "modified by an inplace operation" in what:
        return ValueError(
            "The network writes in place to values that its gradient needs, so torch cannot differentiate "
            "the loss in the mode of the estimation; pass a loss_fn that calls the network without that "
            "(models of Hugging Face: use_cache=False)."
        )
    if not re.search(r"derivative for .* is not implemented|twice|double.backward", what, re.IGNORECASE):
        return error
    return ValueError(
        f"An operator of the network has no second derivative ({what}), so the splitting matrices of the "
        "neurons before it cannot be computed; leave them out (exclude=...), or use another form of the "
        "operator in loss_fn."
    )
