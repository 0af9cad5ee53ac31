r"""Products of activations that are summed over neurons, as queries meet keys in the scores of attention.

A score :math:`s = \sum_i q_i k_i` is linear in each key, and each key in the weights that make it. So those
are the outgoing weights of the query beside it: the rows of offspring j's key are those of :math:`k_i` times
:math:`w_j`. The splitting matrix of a neuron that is linear in its incoming weights is zero; what more
queries and keys would gain, new neurons find. (To displace both, by a and b, adds
:math:`\langle a, x\rangle\langle b, y\rangle` to the score, which is what a new pair does.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_split.neurons import Ids, NeuronTable

__all__ = ["Lines", "Pair", "Weighing", "weighing"]


class Pair(NamedTuple):
    """Two factors whose products are summed over an axis along which neurons lie."""

    left: Ids  # labels along the axis
    right: Ids
    power: float | None  # of the axis' length by which the sum is divided; None if nobody says
    why: str  # why its neurons are left alone, if they must be


class Product(NamedTuple):
    """What was multiplied element by element, both linear in the weights that made their neurons."""

    left: Tensor  # labels, as large as the product
    right: Tensor
    ties: slice  # those that the product has made


class Lines:
    """Which tensors are still linear in the weights that made their neurons, and products of two of them."""

    def __init__(self) -> None:
        self._straight: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.products: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> Product

    def begin(self, tensor: Tensor) -> None:
        """A layer has made these neurons, as a linear function of its weights."""
        self._straight[tensor] = True

    def straight(self, tensor: Tensor) -> bool:
        """Whether it is one."""
        return tensor in self._straight

    def follow(self, name: str, neurons: Sequence[Tensor], first: object, outputs: Iterable[Tensor]) -> None:
        """An operator has computed something of neurons.

        Args:
            name: The operator.
            neurons: Its inputs that carry neurons.
            first: Its first argument.
            outputs: What it returned.
        """
        if name.endswith("_"):
            for t in outputs:
                self.products.pop(t, None)
        name = name.removesuffix("_")
        scaled = len(neurons) == 1 and (name == "mul" or (name == "div" and first is neurons[0]))
        straight = (scaled or name in _LINEAR) and all(map(self.straight, neurons))
        for t in outputs:
            if straight:
                self._straight[t] = True
            else:
                self._straight.pop(t, None)


_LINEAR = {
    *("add", "sub", "rsub", "neg", "sum", "mean", "clone", "_to_copy", "contiguous", "detach", "alias"),
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "movedim", "expand"),
    *("squeeze", "unsqueeze", "slice", "select", "unbind", "split", "split_with_sizes", "cat", "stack"),
    *("unsafe_split", "unsafe_split_with_sizes", "index", "index_select", "gather", "repeat", "flip", "roll"),
    *("constant_pad_nd", "native_dropout", "view_as", "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d"),
}


class Weighing:
    """Rows of producers that are outgoing weights.

    Args:
        powers: By the block that such rows make: of the length by which the sum is divided, if that is known.
    """

    def __init__(self, powers: Mapping[int, float | None]) -> None:
        self._powers = powers
        self._blocks = np.array(list(powers), dtype=np.int64)

    def reads(self, blocks: Ids) -> npt.NDArray[np.bool_] | None:
        """Which of these blocks they make; ``None`` if none."""
        found = np.isin(blocks, self._blocks)
        return found if found.any() else None

    def power(self, blocks: Ids) -> float | None:
        """What holds for all of these blocks that they make; ``None`` if that is not known."""
        found = {self._powers[block] for block in np.intersect1d(blocks, self._blocks).tolist()}
        return found.pop() if len(found) == 1 else None


def weighing(pairs: Sequence[Pair], table: NeuronTable, read: Ids) -> Weighing:
    """Choose the factor of each product whose rows are outgoing weights; nobody else may read it.

    Args:
        pairs: The products.
        table: Bars the neurons of products in which both factors are read elsewhere too.
        read: Labels that layers read.
    """
    readers = table.origins(read) if pairs else read
    powers: dict[int, float | None] = {}
    for pair in pairs:
        for blocks in map(table.origins, (pair.right, pair.left)):
            if not np.isin(blocks, readers).any():
                powers |= dict.fromkeys(blocks.tolist(), pair.power)
                break
        else:
            table.bar([*pair.left.tolist(), *pair.right.tolist()], pair.why)
    return Weighing(powers)
