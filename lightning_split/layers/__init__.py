"""Layer rules: what the library must know about a type of layer.

The files of this package are the only ones that name layer classes. A rule answers four questions about a
layer: along which axis of its activations the neurons lie, which axes of its tensors run along the neurons
that it reads (port ``"in"``), makes (``"out"``) or passes on (``"through"``), how its attributes follow when
those axes grow, and why it cannot be grown, if it cannot.

``rule.py`` states what a rule is, ``registry.py`` finds the one that holds for a layer, ``standins.py`` has
those for layers that are refused or derived from others; the other files are the built-in rules, which
register themselves when they are imported.
"""

from __future__ import annotations

from lightning_split.layers import affine, attention, convolution, recurrence  # noqa: F401  (their rules)
from lightning_split.layers.channelwise import keeps_batch_statistics
from lightning_split.layers.registry import (
    RuleSource,
    is_uninitialized,
    known_type,
    layer_tensors,
    normalises,
    port_sizes,
    register_layer_rule,
    rule_for,
)
from lightning_split.layers.rule import AxisPorts, Block, LayerRule, Marks, Port, port_kind
from lightning_split.layers.standins import is_refused, refuse_layer

__all__ = [
    "AxisPorts",
    "Block",
    "LayerRule",
    "Marks",
    "Port",
    "RuleSource",
    "is_refused",
    "is_uninitialized",
    "keeps_batch_statistics",
    "known_type",
    "layer_tensors",
    "normalises",
    "port_kind",
    "port_sizes",
    "refuse_layer",
    "register_layer_rule",
    "rule_for",
]
