"""What a rule says about a type of layer: the contract between layers, tracing and surgery."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn

__all__ = ["AxisPorts", "Block", "LayerRule", "Marks", "Port", "own_tensor", "port_kind", "several"]


Port = str  # "in", "out" or "through"; a layer with several of a kind names them: "in:hidden"


AxisPorts = Port | tuple[Port, ...]  # several: the axis holds their neurons one after the other


def port_kind(port: Port) -> str:
    """``"in"``, ``"out"`` or ``"through"``."""
    return port.partition(":")[0]


class Block(NamedTuple):
    """The stretch of a tensor's axis that belongs to one port."""

    port: Port
    start: int  # first entry
    size: int  # number of neurons on the port
    multiple: int  # neighbouring entries per neuron


class Marks(Protocol):
    """Through which :meth:`LayerRule.forward` says where in a layer neurons are read and made."""

    def read(self, port: Port, x: Tensor, axis: int) -> Tensor:
        """Here the layer reads the neurons that lie along ``axis`` of ``x``; go on with the result."""
        ...

    def made(self, port: Port, x: Tensor, axis: int) -> Tensor:
        """Here the neurons of a port have been computed, along ``axis`` of ``x``; go on with the result."""
        ...

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own ``forward``."""
        ...

    def sealed(self, call: Callable[[], Any]) -> Any:
        """Run a part of the computation that is the rule's business, unseen."""
        ...


class LayerRule(ABC):
    """What the tracer and the surgery must know about one type of layer.

    A **mixer** computes new neurons from those that it reads: its tensors have an ``"out"`` port and,
    if the output is linear in each input neuron, an ``"in"`` port. A mixer without ``"in"`` port reads
    its inputs in some other way, and the neurons that enter it are not splittable. A **channelwise**
    layer treats each neuron by itself and has one ``"through"`` port; the tensors on it are copied when
    a neuron is split.

    The parameters on the ``"out"`` port of a mixer are the incoming weights θ of its neurons. The
    output of a neuron may depend on its own θ and on the layer's input only.

    Subclass it, set :attr:`role`, implement :meth:`axes`, and register it with
    :func:`register_layer_rule`.
    """

    role: ClassVar[Literal["mixer", "channelwise"]]
    trusted: ClassVar[bool] = True  # whether the layer uses its own tensors only as the rule says
    normalises: ClassVar[bool] = False  # whether a neuron's scale makes no difference behind the layer
    linear: ClassVar[bool] = False  # whether the neurons a mixer makes are linear in their incoming weights
    attends: ClassVar[bool] = False  # whether it multiplies activations with each other, of several lengths

    @abstractmethod
    def axes(self, layer: nn.Module) -> Mapping[str, Mapping[int, AxisPorts]]:
        """For each parameter or buffer of the layer that has a neuron axis: ``{axis: port}``.

        An axis may be a whole multiple of its port: then each neuron owns that many neighbouring
        entries (a depthwise convolution with a channel multiplier). A tuple of ports says that their neurons
        follow each other along the axis; a port may occur several times (the gates of an LSTM).
        """

    def forward(self, layer: nn.Module, marks: Marks, *args: Any, **kwargs: Any) -> Any:
        """The layer's computation, with marks where neurons are read and made.

        The default reads the first tensor and makes the output. A layer with several ports, or one that
        reads its own neurons (recurrence), computes here what its ``forward`` computes, with operators that
        can be differentiated twice, and marks each place.
        """
        reads, makes = ("in", "out") if self.role == "mixer" else ("through", "through")

        def read(x: Tensor) -> Tensor:
            return marks.read(reads, x, self.neuron_axis(layer, x))

        if args:
            args = (read(args[0]), *args[1:])
        else:
            name = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
            kwargs = {**kwargs, name: read(kwargs[name])}
        output = marks.own(*args, **kwargs)
        return marks.made(makes, output, self.neuron_axis(layer, output))

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        """Set the attributes that state the layer's sizes (``out_features`` …) after its tensors grew.

        Args:
            layer: The layer, already holding its new tensors.
            sizes: The new number of neurons on each port that the layer's tensors have.
        """
        return None

    def port_size(self, layer: nn.Module, port: Port) -> int | None:
        """Number of neurons on a port, read from the tensors; ``None`` if no tensor lies on it."""
        for name, axes in self.axes(layer).items():
            tensor = own_tensor(layer, name)
            for axis, ports in axes.items():
                if tensor is not None and {port} == {*several(ports)}:
                    return int(tensor.shape[axis]) // len(several(ports))
        return None

    def told(self, layer: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Mapping[Port, int]:
        """Sizes of ports in a saved layer that its own tensors do not tell.

        Args:
            layer: The layer, at any width.
            shapes: Of the saved tensors of the layer and of those inside it, by name.
        """
        return {}

    def tiles(self, layer: nn.Module) -> int:
        """Number of equal groups into which a mixer cuts its channels; a neuron is one channel of each.

        Its ports have the size of one group.
        """
        return 1

    def block(self, layer: nn.Module) -> int:
        """Number of neighbouring channels that a channelwise layer treats together: they are one neuron."""
        return 1

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        """Axis of the layer's input and output along which neurons lie (negative counts from the end)."""
        return 1

    def output_shape(self, layer: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
        """The output's shape for an input of this shape; ``None`` if that is for the layer to tell.

        Tracing asks this instead of running the layer on a tensor without values, which takes torch longer.
        """
        return None

    def refusal(self, layer: nn.Module) -> str | None:
        """Why this very layer cannot take part in growth, or ``None`` if it can."""
        return None

    def fresh(self, layer: nn.Module) -> Mapping[str, float]:
        """What a channelwise layer's tensors hold for a new neuron; those left out copy a neighbour.

        A neuron that sends zero should still send zero behind the layer.
        """
        return {}

    def statistics(self, layer: nn.Module, x: Tensor, axis: int) -> Mapping[str, Tensor]:
        """What the layer's tensors that describe the data should hold for the channels of ``x``."""
        return {}

    def positions(self, layer: nn.Module, inputs: Tensor, output: Tensor) -> int:
        """How often each weight is used in one call; ``weights x positions`` are the call's MACs."""
        return output.numel() // max(1, output.shape[self.neuron_axis(layer, output)])  # a layer may be empty


def several(ports: AxisPorts) -> tuple[Port, ...]:
    """The ports along an axis, also if there is one only."""
    return (ports,) if isinstance(ports, str) else ports


def own_tensor(layer: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of the layer, if it has one of that name that is set."""
    if name in layer._parameters:
        return layer._parameters[name]
    return layer._buffers.get(name)
