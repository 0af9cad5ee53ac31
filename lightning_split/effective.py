"""Effective weights: parametrized and weight-normed tensors as plain parameters while a network is looked at.

All other stages know plain parameters only. Inside of :class:`EffectiveWeights` a weight that is computed of
others (:mod:`lightning_split.originals`) is one, under its own name. Where it has grown, the originals of the
grown weight are put in afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_split.interrupts import uninterrupted
from lightning_split.layers import is_refused, refuse_layer
from lightning_split.originals import HIDDEN, Refusal, Source, Written, computed, forget_cached
from lightning_split.widening import Replacement, as_parameter

__all__ = ["EffectiveWeights", "originals_of", "own_parameters", "stored_sizes"]

_BEHIND: WeakIdKeyDictionary = WeakIdKeyDictionary()  # effective weight -> its Source


class EffectiveWeights:
    """Context in which the computed weights of a model are plain parameters.

    Inside, a layer has its own class, its computed weights are parameters of their values, and the originals
    are attributes that nobody trains. Afterwards all is as before, to the very objects, but for what was
    :meth:`written_back`. Layers whose weights could not be written back stay as they are, and are refused
    with the reason. May be entered again, and inside of another one of the same model; where no weight is
    computed nothing is touched.

    Args:
        model: The model.

    Cost: of each parametrization that is not weight norm, four calls and two of its ``right_inverse``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._hosts: list[_Host] = []
        self._refused: list[tuple[nn.Module, str]] = []
        self._depth = 0
        self._whole = uninterrupted()  # while anything is not as it was
        self._undo: list[Callable[[], None]] = []
        self._written: dict[int, Written] = {}  # by the id of the parameter that has taken a weight's place
        found = [
            (path, m, t) for path, m in model.named_modules() if not is_refused(m) and (t := computed(m))
        ]
        stores = Counter[int]()
        if found:
            stores.update(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        for path, module, tensors in found:
            sources = [t for t in tensors if isinstance(t, Source)]
            reasons = [t.why if isinstance(t, Refusal) else t.why_not(stores) for t in tensors]
            why = next(filter(None, reasons), None)
            if why is None:
                self._hosts.append(_Host(path, module, sources))
            else:
                self._refused.append((module, why))

    def __bool__(self) -> bool:
        """Whether any weight is computed."""
        return bool(self._hosts)

    def __enter__(self) -> EffectiveWeights:
        self._depth += 1
        if self._depth == 1 and (self._hosts or self._refused):
            self._whole.__enter__()
            try:
                for layer, why in self._refused:
                    self._undo.append(refuse_layer(layer, why))
                for host in self._hosts:
                    host.enter()
            except BaseException:
                self._depth = 0
                self._leave({})
                self._whole.__exit__()
                raise
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0 and (self._hosts or self._refused):
            self._leave(self._written if kind is None else {})
            self._whole.__exit__()

    def _leave(self, written: Mapping[int, Written]) -> None:
        self._written = {}
        for host in self._hosts:
            host.leave(written)
        while self._undo:
            self._undo.pop()()

    # growth ----------------------------------------------------------------------------------------

    def unheld(self, replaced: Mapping[nn.Parameter, Replacement]) -> dict[nn.Parameter, Tensor]:
        """Grown weights that their parametrization cannot compute: negative ones of an exponential, say.

        Args:
            replaced: What surgery has made, effective weights among it.

        Returns:
            Effective weight -> which entries of the grown one would come out otherwise.
        """
        found = {}
        for _, source, effective in self._weights():
            if effective in replaced:
                missed = source.written(effective.detach(), replaced[effective]).missed
                if bool(missed.any()):
                    found[effective] = missed
        return found

    def written_back(self, replaced: Mapping[nn.Parameter, Replacement]) -> dict[nn.Parameter, Replacement]:
        """Find the originals of grown weights; they are put in on leaving.

        Args:
            replaced: What surgery has put in.

        Returns:
            The same in terms of the parameters that the model has outside.

        Raises:
            ValueError: If a parametrization cannot compute a grown weight; none is put in then.
        """
        outside = dict(replaced)
        written: dict[int, Written] = {}
        for host, source, effective in self._weights():
            replacement = outside.pop(effective, None)
            if replacement is None:
                continue
            new = source.written(effective.detach(), replacement)
            if bool(new.missed.any()):
                raise ValueError(
                    f"The parametrization of '{host.named(source)}' ({source.kind}) cannot compute the grown "
                    "weight, so nothing was changed. Smaller displacements or positive offspring weights "
                    "(SteepestSplitting(signed=False)) may do, or exclude=[...] with the group."
                )
            written[id(replacement.new)] = new
            outside |= new.replaced
        self._written = written
        return outside

    # checkpoints -----------------------------------------------------------------------------------

    def seen_through(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """A state dict that has the effective weights, too."""
        found = {}
        for host, source, _ in self._weights():
            saved = source.saved(state_dict, host.prefix(prefix))
            value = None if saved is None else source.shaped(saved)
            if value is not None:
                found[host.prefix(prefix) + source.name] = value
        return {**state_dict, **found} if found else state_dict

    def resized(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Let the originals of weights that were resized have the shapes of a state dict, without values."""
        for host, source, effective in self._weights():
            now = host.module._parameters.get(source.name)
            saved = source.saved(state_dict, host.prefix(prefix))
            if now is None or now is effective or saved is None:
                continue
            pairs = zip(source.originals, saved, strict=True)
            new = [as_parameter(old.detach().new_empty(one.shape), old) for old, one in pairs]
            self._written[id(now)] = Written(new, {}, torch.zeros(0, dtype=torch.bool))

    def _weights(self) -> Iterator[tuple[_Host, Source, nn.Parameter]]:
        return ((host, *weight) for host in self._hosts for weight in host.weights)


def originals_of(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Inside of the context: the originals of a layer, each with the name of the weight that it makes."""
    for name, parameter in layer._parameters.items():
        source: Source | None = None if parameter is None else _BEHIND.get(parameter)
        for original in () if source is None else source.originals:
            yield name, original


def own_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Outside of it: the parameters of a layer, originals included, without those of other submodules."""
    yield from layer.parameters(recurse=False)
    hidden = layer._modules.get(HIDDEN)
    if hidden is not None:
        yield from hidden.parameters()


def stored_sizes(parameter: Tensor) -> list[tuple[int, tuple[int, ...]]] | None:
    """How many numbers the model stores for an effective weight; ``None`` of a plain parameter.

    Returns:
        For each original a factor, and the axes of the weight by whose lengths it is multiplied. What a
        parametrization has of its own does not grow.
    """
    source: Source | None = _BEHIND.get(parameter)
    if source is None:
        return None
    found = []
    for original, axes in zip(source.originals, source.follows(parameter), strict=True):
        rest = original.numel()
        for axis in axes:
            rest //= max(1, parameter.shape[axis])
        found.append((rest, axes))
    return [*found, (source.others, ())] if source.others else found


class _Weight(NamedTuple):
    """A computed weight, and the parameter that stands for it."""

    source: Source
    effective: nn.Parameter


class _Host:
    """A module with computed weights, and what it is outside of the context."""

    def __init__(self, path: str, module: nn.Module, sources: list[Source]) -> None:
        self.path, self.module = path, module
        self.weights: list[_Weight] = []
        self._inside, self._fresh = False, True
        for source in sources:
            trained = all(p.requires_grad for p in source.originals)
            with torch.inference_mode(False):
                effective = nn.Parameter(source.value(), requires_grad=trained)
            _BEHIND[effective] = source
            self.weights.append(_Weight(source, effective))
        self._hooked = [source for source in sources if source.hook is not None]

    def prefix(self, before: str) -> str:
        """What stands before the names of the module's tensors in a state dict."""
        return f"{before}{self.path}." if self.path else before

    def named(self, source: Source) -> str:
        """The full name of a weight."""
        return self.prefix("") + source.name

    def enter(self) -> None:
        """Let the weights be plain parameters, of the values that they have now."""
        module, own = self.module, vars(self.module)
        for source, effective in () if self._fresh else self.weights:
            value = source.value()
            if not torch.equal(effective, value):
                with torch.no_grad():
                    effective.copy_(value)
        self._fresh = False
        self._class = self._plain = type(module)
        self._parameters, self._modules = dict(module._parameters), dict(module._modules)
        self._hooks = dict(module._forward_pre_hooks)
        self._attributes: dict[str, Any] = {}
        self._inside = True
        for source in self._hooked:
            if source.name in own:
                self._attributes[source.name] = own.pop(source.name)
            own |= {key: module._parameters.pop(key) for key in source.keys}
            for number, hook in self._hooks.items():
                if hook is source.hook:
                    del module._forward_pre_hooks[number]
        if HIDDEN in module._modules:
            own[HIDDEN] = module._modules.pop(HIDDEN)
            self._plain = self._class.__bases__[0]
            module.__class__ = self._plain
        module._parameters.update({source.name: effective for source, effective in self.weights})

    def leave(self, written: Mapping[int, Written]) -> None:
        """Let the module be what it was, with new originals where a weight has grown."""
        if not self._inside:
            return
        self._inside = False
        module, own = self.module, vars(self.module)
        now = dict(module._parameters)
        grown = {source: written.get(id(now.pop(source.name, None))) for source, _ in self.weights}
        for name in [HIDDEN, *(key for source in self._hooked for key in source.keys)]:
            own.pop(name, None)
        _refill(module._parameters, {**self._parameters, **now})
        _refill(module._modules, self._modules)
        _refill(module._forward_pre_hooks, self._hooks)
        own.update(self._attributes)
        if self._class is not self._plain:
            kept = type(module) is self._plain
            module.__class__ = self._class if kept else _derived(self._class, type(module))
        for source, found in grown.items():
            if found is not None:
                source.store.update(zip(source.keys, found.new, strict=True))
                forget_cached(source)
                if source.hook is not None:
                    own[source.name] = source.value()


def _refill(store: Any, content: Mapping[Any, Any]) -> None:
    store.clear()
    store.update(content)


def _derived(parametrized: type, plain: type) -> type:
    """The class with the computed weights as properties, derived from another class of the layer."""
    own = {k: v for k, v in vars(parametrized).items() if k not in ("__dict__", "__weakref__", "__module__")}
    return type(f"Parametrized{plain.__name__}", (plain,), own)
