"""What growth costs: parameters, multiply-accumulates, activation memory, energy, or a measure of your own.

A cost looks at the network once per growth and gives a price list (:class:`~lightning_split.pricing.Prices`).
:class:`~lightning_split.latency.MeasuredLatency` is one more.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_split.architecture import ChannelGroup
from lightning_split.context import GrowthContext
from lightning_split.counting import macs, outputs, params, weights
from lightning_split.pricing import Prices, Product

__all__ = [
    "COSTS",
    "Activations",
    "Cost",
    "CostLike",
    "Energy",
    "Macs",
    "Params",
    "PerNeuron",
    "Transformed",
    "as_cost",
]


class Cost(ABC):
    """A measure of what growth costs; the seam for one of your own.

    If the cost of a neuron does not depend on how wide the other groups become, a function of the channel
    group is enough (:class:`PerNeuron`).
    """

    unit: str = "cost"  # what is counted, for the report

    @abstractmethod
    def price(self, context: GrowthContext) -> Prices:
        """The network's cost, now and after any growth.

        Called on every process, with the same network; use ``context.ranks`` for what could differ.

        Args:
            context: The traced network and its batches. Nothing of it may be changed.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs in order to find the same prices."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved state."""
        return None


@dataclass(frozen=True)
class Params(Cost):
    """Parameters, frozen ones included; a tensor that several layers share counts once."""

    unit = "params"

    def price(self, context: GrowthContext) -> Prices:
        """See :meth:`Cost.price`."""
        return params(context.model, context.arch)


@dataclass(frozen=True)
class Macs(Cost):
    """Multiply-accumulates for one sample, at the true spatial sizes.

    Those of all matrix products and convolutions: of layers, of raw matrices, and of activations with each
    other (the scores of attention, and what they weigh). As torch's counter of floating-point operations
    counts them, at two operations each; it passes over kernels that it does not know, such as the fused
    attention on the CPU.
    """

    unit = "macs"

    def price(self, context: GrowthContext) -> Prices:
        """See :meth:`Cost.price`."""
        return macs(context.model, context.arch)


@dataclass(frozen=True)
class Activations(Cost):
    """Activation memory: values that layers, and products with raw matrices, write for one sample.

    Pointwise functions and products of activations with each other are left out.
    """

    unit = "activations"

    def price(self, context: GrowthContext) -> Prices:
        """See :meth:`Cost.price`."""
        return Prices.of([found.size for found in outputs(context.arch)], unit="activations")


@dataclass(frozen=True)
class Energy(Cost):
    r"""Energy of one forward pass per sample, by a linear model of arithmetic and memory traffic.

    .. math:: E = e_\mathrm{mac} M + e_\mathrm{byte} \left(W / b + 2 A\right)

    with :math:`M` multiply-accumulates, :math:`W` bytes of weights, each read once for a batch of :math:`b`
    samples, and :math:`A` bytes of activations, each written once and read once. The defaults are in
    picojoules for 32-bit floating point and off-chip memory in 45 nm (multiply 3.7, add 0.9; 640 for 32
    bits of DRAM).

    Args:
        mac: Energy of one multiply-accumulate.
        byte: Energy of moving one byte.
        batch_size: Samples that share one reading of the weights.

    Raises:
        ValueError: If a figure is negative, or the batch size is not positive.

    References:
        Horowitz (2014), "Computing's energy problem (and what we can do about it)", ISSCC.
    """

    mac: float = 4.6
    byte: float = 160.0
    batch_size: int = 1

    unit = "pJ"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not (self.mac >= 0 and self.byte >= 0 and self.batch_size >= 1):
            raise ValueError(
                "Energy needs mac and byte of at least 0 and a batch_size of at least 1, got "
                f"mac={self.mac!r}, byte={self.byte!r}, batch_size={self.batch_size!r}."
            )

    def price(self, context: GrowthContext) -> Prices:
        """See :meth:`Cost.price`."""
        model, arch = context.model, context.arch
        found = list(weights(model, arch))
        reading = self.byte / self.batch_size
        left = {id(p): p.numel() * p.element_size() for p in model.parameters()}
        terms, seen = list[Product](), set[int]()
        for tensor, size, _ in found:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                left.pop(id(tensor), None)
                terms.append(replace(size, factor=tensor.element_size() * reading))
        for size, each in outputs(arch):
            terms.append(replace(size, factor=size.factor * 2 * each * self.byte))
        traffic = Prices.of(terms, sum(left.values()) * reading)
        return macs(model, arch, found).times(self.mac).plus(traffic, "pJ")


@dataclass(frozen=True)
class PerNeuron(Cost):
    """A cost of your own per neuron of a group, whatever the widths of the others.

    Args:
        function: Maps a :class:`~lightning_split.architecture.ChannelGroup` to the cost of one more neuron.

    Example:
        >>> by_fan_in = PerNeuron(lambda group: float(group.dim))
    """

    function: Callable[[ChannelGroup], float]

    @property
    def unit(self) -> str:  # type: ignore[override]
        """The name of the function."""
        return str(getattr(self.function, "__name__", "cost"))

    def price(self, context: GrowthContext) -> Prices:
        """See :meth:`Cost.price`."""
        each = {group.name: self._checked(group) for group in context.arch.groups}
        total = math.fsum(each[g.name] * g.width for g in context.arch.groups)
        return Prices(total, each, unit=self.unit)

    def _checked(self, group: ChannelGroup) -> float:
        value = float(self.function(group))
        if not 0.0 < value < math.inf:
            raise ValueError(
                f"The cost function '{self.unit}' gave {value!r} for group '{group.name}'; the cost of one "
                "more neuron must be positive and finite."
            )
        return value


@dataclass(frozen=True)
class Transformed(Cost):
    """The square root or the logarithm of another cost of a neuron, which evens out large and small layers.

    Each neuron is priced at the transform of what it adds by itself, so products of groups play no part,
    and a fractional budget refers to the sum over all neurons that can be split. The official code of the
    paper uses the square root on CIFAR and the logarithm on ImageNet.

    Args:
        cost: Another cost, or its name.
        function: ``"sqrt"`` or ``"log"`` (natural).

    Raises:
        ValueError: If the function is unknown; when priced, if the logarithm is not positive.

    References:
        Wang et al. (2019), arXiv:1910.03103, and its code.
    """

    cost: str | Cost
    function: Literal["sqrt", "log"] = "sqrt"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.function not in ("sqrt", "log"):
            raise ValueError(
                f"Transformed does not know the function {self.function!r}; use 'sqrt' or 'log'."
            )
        object.__setattr__(self, "cost", as_cost(self.cost))

    @property
    def unit(self) -> str:  # type: ignore[override]
        """The function and what it is applied to."""
        return f"{self.function} {as_cost(self.cost).unit}"

    def price(self, context: GrowthContext) -> Prices:
        """See :meth:`Cost.price`."""
        inner = as_cost(self.cost).price(context)
        transform = math.sqrt if self.function == "sqrt" else math.log

        def transformed(group: ChannelGroup) -> float:
            alone = inner.alone(group.name)
            return transform(alone) if alone > 0 else 0.0

        transformed.__name__ = self.unit
        return PerNeuron(transformed).price(context)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Cost.state_dict`."""
        return as_cost(self.cost).state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Cost.load_state_dict`."""
        as_cost(self.cost).load_state_dict(state)


COSTS: dict[str, type[Cost]] = {
    "params": Params,
    "macs": Macs,
    "activations": Activations,
    "energy": Energy,
}
CostLike = str | Cost | Callable[[ChannelGroup], float]


def as_cost(cost: CostLike) -> Cost:
    """A cost by its name, itself, or made of a function of the channel group.

    Raises:
        ValueError: If there is no cost of that name.
    """
    if isinstance(cost, Cost):
        return cost
    if isinstance(cost, str) and cost in COSTS:
        return COSTS[cost]()
    if isinstance(cost, (str, type)) or not callable(cost):
        raise ValueError(
            f"lightning_split does not know cost {cost!r}; use one of {', '.join(COSTS)}, an instance "
            "of Cost, or a function that maps a channel group to the cost of one more neuron."
        )
    return PerNeuron(cost)
