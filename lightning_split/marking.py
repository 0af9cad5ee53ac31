"""Run a model while something watches where its layers read neurons and where they make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_split.functional import RawMatrices, Reading
from lightning_split.layers import LayerRule, Port, rule_for
from lightning_split.matrices import Weights
from lightning_split.outlines import shape_only

__all__ = ["Watcher", "watched"]


class Watcher:
    """Sees every place where neurons are read or made; this one changes nothing."""

    def concerns(self, owner: tuple[str, str], x: Tensor, axis: int, makes: int | None) -> bool:
        """Whether a product of a raw matrix and ``x`` over this axis may be one with neurons.

        Args:
            owner: Whose matrix it is.
            x: The other factor.
            axis: Of ``x``, which is summed.
            makes: The matrix's axis along which the result lies, if it is one.
        """
        return True

    def read(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        """The layer at ``path`` reads ``x``, with neurons along ``axis``; it goes on with the result."""
        return x

    def made(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        """The layer at ``path`` has made the neurons of a port; it goes on with the result."""
        return x

    def multiplied(self, path: str, name: str, count: int, output: Tensor) -> None:
        """A raw matrix was multiplied with activations, in so many multiply-accumulates; with the result."""
        return None

    def around(self, path: str, layer: nn.Module, args: Any, kwargs: Any, call: Callable[[], Any]) -> Any:
        """The whole call of one layer; ``call()`` runs it, marks and all."""
        return call()

    def sealed(self, call: Callable[[], Any]) -> Any:
        """A part of a layer's computation that is its rule's business."""
        return call()


@contextmanager
def watched(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Inside, every layer with a rule runs as :meth:`LayerRule.forward` says, and the watcher is told.

    Layers inside a layer whose own ``forward`` runs are that layer's business and not watched. The inference
    kernels that would pass over a Transformer's layers are off.
    """
    sealed = [0]  # > 0 while a layer's own forward runs
    rules = {path: (layer, rule) for path, layer in model.named_modules() if (rule := rule_for(layer))}
    weights = Weights(model)
    kernels = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for path, (layer, rule) in rules.items():
            # An attribute of the instance goes before the method of the class.
            layer.__dict__["forward"] = partial(_run, sealed, watcher, path, layer, rule)
        with RawMatrices(weights, partial(_multiply, sealed, weights, watcher)) if weights else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(kernels)
        for layer, _ in rules.values():
            layer.__dict__.pop("forward", None)


def _multiply(sealed: list[int], weights: Weights, watcher: Watcher, reading: Reading) -> Tensor | None:
    """A product with a raw matrix, unless it is a layer's own business."""
    if sealed[0]:
        return None
    owner, x = reading.owner, reading.x
    sites = weights.sites(owner, reading.reads, reading.make, reading.groups)
    if sites is None:
        return None
    reads = [read for read in sites.reads if watcher.concerns(owner, x, read[0], reading.make)]
    if not reads:
        return None
    for axis, key in reads:
        x = watcher.read(*key, x, axis)
    output: Tensor = watcher.sealed(lambda: reading.call(x))
    if sites.made is not None:
        output = watcher.made(*sites.made, output, reading.out)
    watcher.multiplied(*owner, reading.count(output), output)
    return output


def _run(
    sealed: list[int],
    watcher: Watcher,
    path: str,
    layer: nn.Module,
    rule: LayerRule,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if sealed[0]:
        return type(layer).forward(layer, *args, **kwargs)
    marks = _Marks(sealed, watcher, path, layer, rule)

    def call() -> Any:
        if rule.refusal(layer) is not None:  # its rule may not know how to compute what it computes
            return marks.sealed(lambda: type(layer).forward(layer, *args, **kwargs))
        return rule.forward(layer, marks, *args, **kwargs)

    return watcher.around(path, layer, args, kwargs, call)


class _Marks:
    """What a rule's forward speaks to: the watcher, at one layer."""

    def __init__(
        self, sealed: list[int], watcher: Watcher, path: str, layer: nn.Module, rule: LayerRule
    ) -> None:
        self._sealed, self._watcher, self._path, self._layer, self._rule = sealed, watcher, path, layer, rule

    def read(self, port: Port, x: Tensor, axis: int) -> Tensor:
        return self._watcher.read(self._path, port, x, axis)

    def made(self, port: Port, x: Tensor, axis: int) -> Tensor:
        return self._watcher.made(self._path, port, x, axis)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if x is not None and shape_only(x) and _of_one_kind(x, layer):
            shape = self._rule.output_shape(layer, x.shape)
            if shape is not None:  # much faster than what the operator does to find the shape
                return x.new_empty(shape)
        return self.sealed(lambda: type(layer).forward(layer, *args, **kwargs))

    def sealed(self, call: Callable[[], Any]) -> Any:
        self._sealed[0] += 1
        try:
            return self._watcher.sealed(call)
        finally:
            self._sealed[0] -= 1


def _of_one_kind(x: Tensor, layer: nn.Module) -> bool:
    """Whether the layer's result has the input's dtype and device, and not an error to raise."""
    weights = (p for p in layer._parameters.values() if p is not None)
    return not torch.is_autocast_enabled(x.device.type) and all(
        p.dtype == x.dtype and p.device == x.device for p in weights
    )
