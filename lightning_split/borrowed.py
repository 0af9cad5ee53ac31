"""Weights of layers that the code around them uses itself: ``F.linear(x, self.fc.weight)``.

Such a layer need not be called at all. Where its weight multiplies neurons as the layer would, that is a call
of the layer; anything else that becomes of its tensors is followed like the use of a raw parameter, with the
labels of the layer's own neurons. Which layers lend their tensors says their rule: those that are one
operator, whose whole computation is known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_split.effective import originals_of
from lightning_split.labels import Held, Owner
from lightning_split.layers import LayerRule, Port, layer_tensors, port_kind, rule_for
from lightning_split.loose import loose_tensors
from lightning_split.neurons import NeuronTable

__all__ = ["Lending", "Lent", "Loans", "lending", "sorted_tensors"]


class Lent(NamedTuple):
    """What lies along an axis of a layer's tensor."""

    port: Port
    size: int  # number of neurons on the port
    tiles: int  # how often they follow each other: in a grouped convolution a neuron is in every group
    multiple: int  # neighbouring entries per neuron


Lending = Mapping[str, Mapping[int, Lent]]  # by the name of the tensor and its axis


def lending(layer: nn.Module) -> Lending:
    """The tensors that a layer lends to the code around it; empty if it lends none.

    Asked before the layer is watched, when it seems to have a forward pass of its own.
    """
    rule = rule_for(layer)
    if rule is None or not rule.trusted or type(rule).forward is not LayerRule.forward:
        return {}
    if rule.refusal(layer) is not None:
        return {}
    found: dict[str, dict[int, Lent]] = {}
    for name, (_, axes) in layer_tensors(layer).items():
        found[name] = {}
        for axis, blocks in axes.items():
            first = blocks[0]
            if all(block.port == first.port for block in blocks):
                found[name][axis] = Lent(first.port, first.size, len(blocks), first.multiple)
    return found


def sorted_tensors(layers: Mapping[str, nn.Module]) -> tuple[dict[int, Held], dict[int, Owner]]:
    """Whose all tensors are that may lie along neurons, by identity; before the layers are watched.

    Args:
        layers: All modules, by path.

    Returns:
        Those of layers; and those that may be used anywhere, so that what becomes of them is guessed.
    """
    held: dict[int, Held] = {}
    anywhere: dict[int, Owner] = {}
    for path, layer in layers.items():
        anywhere |= {id(t): (path, name) for name, t in loose_tensors(layer).items()}
        lent = lending(layer)
        for name, (tensor, _) in layer_tensors(layer).items():
            held[id(tensor)] = Held((path, name), name in lent)
            if name in lent:
                anywhere[id(tensor)] = path, name
        for name, original in originals_of(layer):  # what a weight is computed of is as good as the weight
            held[id(original)] = Held((path, name))
    return held, anywhere


class Loans:
    """The neurons that lie along the axes of lent tensors, as the operators of a trace meet them.

    Args:
        table: Of all neurons.
        lent: What each layer lends, by its path.
    """

    def __init__(self, table: NeuronTable, lent: Mapping[str, Lending]) -> None:
        self._table = table
        self._lent = lent
        self._ids: dict[tuple[Owner, Port], Tensor] = {}  # of each tensor, (tiles, size)

    def cover(self, path: str, name: str) -> bool:
        """Whether this is a lent tensor."""
        return name in self._lent.get(path, {})

    def along(self, path: str, name: str, axis: int) -> Tensor | None:
        """The ids along an axis; ``None`` where no neurons lie."""
        found = self._lent[path][name].get(axis)
        if found is None:
            return None
        key = (path, name), found.port
        if key not in self._ids:
            rows = torch.from_numpy(self._table.mint(found.tiles * found.size)).view(found.tiles, -1)
            self._table.tie(rows[:1].expand(rows.shape).flatten().numpy(), rows.flatten().numpy())
            self._ids[key] = rows
        return self._ids[key].flatten().repeat_interleave(found.multiple)

    def settle(
        self,
        borrowed: Collection[Owner],
        ports: MutableMapping[tuple[str, Port], Tensor],
        called: Collection[str],
        adopted: Collection[int],
    ) -> None:
        """Let them be the neurons that were found on the ports; layers that nobody called have ports by them.

        Args:
            borrowed: The tensors that met activations; what became of the others does not matter.
            ports: Ids at each position of each port.
            called: Paths of layers that were called.
            adopted: Ids that have met neurons element by element.
        """
        for (owner, port), rows in self._ids.items():
            if owner not in borrowed:
                continue
            path, own = owner[0], rows[0].numpy()
            found = ports.get((path, port))
            if found is not None:
                ids = found.numpy()
                self._table.tie(ids[ids >= 0], own[ids >= 0])
                self._table.bar(own[ids < 0].tolist(), f"'{path}' also reads values of no neuron there")
            elif path in called:
                self._table.bar(own.tolist(), f"'{path}' is also called, with other values")
            if port_kind(port) != "in":
                ports.setdefault((path, port), rows[0])
            elif any(i in adopted for i in rows.flatten().tolist()):
                why = f"the code also uses the weights with which '{path}' reads them, element by element"
                self._table.bar(own.tolist(), why)
