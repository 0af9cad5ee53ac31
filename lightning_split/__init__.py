"""Grow the width of a network while it trains, by splitting neurons."""

from lightning_split.budgets import Target
from lightning_split.callback import SplittingCallback
from lightning_split.checkpoint import enable_growth, fit_to_state_dict, load_grown
from lightning_split.costs import Activations, Cost, Energy, Macs, Params, PerNeuron, Transformed
from lightning_split.eigen import Exact, Lanczos, RayleighDescent
from lightning_split.growers import (
    Folding,
    GradMax,
    Grower,
    Mixed,
    Net2Net,
    NewNeurons,
    RandomSplit,
    SteepestSplitting,
)
from lightning_split.growth import grow
from lightning_split.latency import MeasuredLatency
from lightning_split.layers import LayerRule, register_layer_rule
from lightning_split.report import GrowthReport
from lightning_split.selection import KnapsackEnergy, SelectionStrategy, Threshold, TopK
from lightning_split.stepsize import Absolute, LineSearch, Relative
from lightning_split.surgery import split_neurons
from lightning_split.tracing import trace
from lightning_split.triggers import Every, Plateau, Trigger

__version__ = "0.1.0"

__all__ = [
    "Absolute",
    "Activations",
    "Cost",
    "Energy",
    "Every",
    "Exact",
    "Folding",
    "GradMax",
    "Grower",
    "GrowthReport",
    "KnapsackEnergy",
    "Lanczos",
    "LayerRule",
    "LineSearch",
    "Macs",
    "MeasuredLatency",
    "Mixed",
    "Net2Net",
    "NewNeurons",
    "Params",
    "PerNeuron",
    "Plateau",
    "RandomSplit",
    "RayleighDescent",
    "Relative",
    "SelectionStrategy",
    "SplittingCallback",
    "SteepestSplitting",
    "Target",
    "Threshold",
    "TopK",
    "Transformed",
    "Trigger",
    "enable_growth",
    "fit_to_state_dict",
    "grow",
    "load_grown",
    "register_layer_rule",
    "split_neurons",
    "trace",
]
