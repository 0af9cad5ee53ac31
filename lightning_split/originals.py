"""Originals: the parameters that a weight is computed of, and those that make a grown weight.

Knows ``torch.nn.utils.parametrizations.weight_norm``, the older ``torch.nn.utils.weight_norm``, and whatever
``torch.nn.utils.parametrize`` has registered with a ``right_inverse``; of other ways to compute a weight it
says why they cannot grow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_split.measuring import undisturbed
from lightning_split.widening import AxisMap, Replacement, as_parameter, same_format

__all__ = ["HIDDEN", "Refusal", "Source", "Written", "computed", "forget_cached"]

HIDDEN = "parametrizations"  # the submodule under which torch keeps them
_SHRUNK = 1e-3  # by how much weights are changed to see whether others than the present can be computed


@dataclass(eq=False)
class Refusal:
    """A tensor that is computed in a way that growth cannot keep."""

    why: str


@dataclass(eq=False)
class Written:
    """The originals of a grown weight."""

    new: list[nn.Parameter]
    replaced: dict[nn.Parameter, Replacement]
    missed: Tensor  # which entries of the weight they do not make


class Source(ABC):
    """A tensor that a module computes of parameters.

    Args:
        module: The module.
        name: Of the tensor.
        kind: By what it is computed, for messages.
        store: Holds the originals.
        keys: Under these names.
    """

    hook: Any = None  # the forward pre-hook that computes it, if that is what does
    advice = "torch.nn.utils.parametrize.remove_parametrizations before training makes them plain"

    def __init__(
        self, module: nn.Module, name: str, kind: str, store: dict[str, Any], keys: tuple[str, ...]
    ) -> None:
        self.module, self.name, self.kind, self.store, self.keys = module, name, kind, store, keys

    @property
    def originals(self) -> tuple[Any, ...]:
        """What it is computed of now."""
        hidden: dict[str, Any] = {} if self.hook is None else vars(self.module)
        return tuple(hidden.get(key, self.store.get(key)) for key in self.keys)

    @property
    def others(self) -> int:
        """How many numbers that can be trained take part besides, and do not grow."""
        return 0

    def value(self) -> Tensor:
        """The weight now, detached."""
        return self.again(self.originals).clone(memory_format=torch.preserve_format)

    def why_not(self, stores: Mapping[int, int]) -> str | None:
        """Why the tensor cannot grow, as the end of a sentence, or ``None`` if it can.

        Args:
            stores: At how many places of the model each parameter is, by its id.
        """
        if not all(isinstance(p, nn.Parameter) for p in self.originals):
            why: str | None = f"not all originals of '{self.name}' are parameters"
        elif any(stores[id(p)] > 1 for p in self.originals):
            why = f"an original of '{self.name}' is shared with another layer"
        else:
            why = self._failing()
        return None if why is None else _refused(self.kind, why, self.advice)

    def written(self, before: Tensor, replacement: Replacement) -> Written:
        """The originals of a grown weight, and what becomes of each of the old ones.

        Args:
            before: The weight before the growth.
            replacement: The grown weight, and how its axes grew.
        """
        olds, weight = self.originals, replacement.new.detach()
        try:
            values, maps = self._grown(before, weight, replacement.maps)
            missed = ~_near(self.again(values), weight)
            for v in values:  # an infinite original may make the weight, but cannot be trained
                missed |= ~v.isfinite() if v.shape == weight.shape else not bool(v.isfinite().all())
        except Exception:  # the user's code may raise anything
            return Written([], {}, torch.ones_like(weight, dtype=torch.bool))
        new = [as_parameter(same_format(v, old), old) for v, old in zip(values, olds, strict=True)]
        found = {
            old: Replacement(one, m or {}, anew=m is None or not _fits(old, one, m))
            for old, one, m in zip(olds, new, maps, strict=True)
        }
        return Written(new, found, missed)

    def saved(self, state_dict: Mapping[str, Any], prefix: str) -> list[Tensor] | None:
        """The originals in a state dict; ``None`` if they are not all there."""
        for names in self._names():
            found = [state_dict.get(f"{prefix}{name}") for name in names]
            if all(isinstance(t, Tensor) for t in found):
                return found  # type: ignore[return-value]
        return None

    @abstractmethod
    def again(self, originals: Sequence[Tensor]) -> Tensor:
        """The weight of any originals."""

    @abstractmethod
    def follows(self, weight: Tensor) -> list[tuple[int, ...]]:
        """The axes of the weight that each original has, too."""

    @abstractmethod
    def shaped(self, saved: Sequence[Tensor]) -> Tensor | None:
        """A tensor of the shape of the weight that saved originals make; ``None`` if they make none."""

    @abstractmethod
    def _failing(self) -> str | None:
        """Why originals of grown weights cannot be found."""

    @abstractmethod
    def _grown(
        self, before: Tensor, weight: Tensor, maps: Mapping[int, AxisMap]
    ) -> tuple[list[Tensor], list[dict[int, AxisMap] | None]]:
        """The originals of a grown weight, and how the axes of each grew; ``None``: that has no meaning."""

    @abstractmethod
    def _names(self) -> list[list[str]]:
        """The names of the originals in a state dict, and others that are read in their place."""


class _WeightNormed(Source):
    """Weight norm: a norm g for each entry of a dimension, and a direction v."""

    def __init__(self, dim: int, *args: Any) -> None:
        super().__init__(*args)
        self._dim = dim  # -1: one norm for the whole tensor

    def again(self, originals: Sequence[Tensor]) -> Tensor:
        g, v = originals
        with torch.inference_mode(False), torch.no_grad():
            weight: Tensor = torch._weight_norm(v, g, self._dim)
        return weight

    def follows(self, weight: Tensor) -> list[tuple[int, ...]]:
        return [() if self._dim == -1 else (self._dim % weight.ndim,), tuple(range(weight.ndim))]

    def shaped(self, saved: Sequence[Tensor]) -> Tensor | None:
        return saved[1]

    def _failing(self) -> None:
        return None  # every weight has a norm and a direction

    @torch.no_grad()
    def _grown(
        self, before: Tensor, weight: Tensor, maps: Mapping[int, AxisMap]
    ) -> tuple[list[Tensor], list[dict[int, AxisMap] | None]]:
        """The norms and directions of a grown weight; v is as long, beside the weight, as it was.

        Any length would do (``right_inverse`` sets v to the weight), but the steps of the optimizer go with
        it. Where the weight is zero, v keeps its direction. What no split touches keeps its very bits.
        """
        g, v = (p.detach() for p in self.originals)
        axis = None if self._dim == -1 else self._dim % v.ndim
        others = [d for d in range(v.ndim) if d != axis]
        mine = {a: grew for a, grew in maps.items() if a == axis}
        direction, norm = _widened(v, maps), _widened(g, mine)
        sign = torch.where(norm < 0, -1, 1).to(norm)
        length = _widened(torch.norm_except_dim(v, 2, self._dim), mine)
        new = weight * torch.where(norm == 0, sign, length / norm)
        new = torch.where(torch.norm_except_dim(new, 2, self._dim) == 0, direction, new)
        norms = sign * torch.norm_except_dim(weight, 2, self._dim)
        if maps.keys() <= mine.keys():
            same = weight == _widened(before, maps)
            same = same.all(dim=others, keepdim=True) if others else same
            new, norms = torch.where(same, direction, new), torch.where(same, norm, norms)
        # Where a direction was turned round, the derivative in its norm has the opposite sign.
        for a, grew in mine.items():
            turned = (new * direction).movedim(a, 0).reshape(new.shape[a], -1).sum(1) < 0
            scale = grew.scale * torch.where(turned, -1, 1).to(grew.scale)
            mine = {a: AxisMap(grew.index, scale)}
        return [norms, new], [mine, dict(maps)]

    def _names(self) -> list[list[str]]:
        """Either style loads its own; the new one loads what the old one has written, too."""
        old = [f"{self.name}_g", f"{self.name}_v"]
        return [old] if self.hook is not None else [[f"{HIDDEN}.{self.name}.{key}" for key in self.keys], old]


class _Hooked(_WeightNormed):
    """The older style, in which a hook computes the weight before every forward pass."""

    advice = "torch.nn.utils.remove_weight_norm before training makes them plain"

    def __init__(self, module: nn.Module, hook: WeightNorm) -> None:
        keys = (f"{hook.name}_g", f"{hook.name}_v")
        super().__init__(hook.dim, module, hook.name, "WeightNorm", module._parameters, keys)
        self.hook = hook


class _Registered(Source):
    """Any steps under ``torch.nn.utils.parametrize``."""

    def __init__(self, several: Any, *args: Any) -> None:
        super().__init__(*args)
        self._several = several

    @property
    def others(self) -> int:
        return sum(p.numel() for step in self._several for p in step.parameters())

    def again(self, originals: Sequence[Tensor]) -> Tensor:
        with self._apart():
            return self._computed(originals)

    def follows(self, weight: Tensor) -> list[tuple[int, ...]]:
        return [
            tuple(a for a in range(weight.ndim) if p.shape[a] == weight.shape[a])
            if p.ndim == weight.ndim
            else ()
            for p in self.originals
        ]

    def shaped(self, saved: Sequence[Tensor]) -> Tensor | None:
        try:
            return self.again([one.to(old) for one, old in zip(saved, self.originals, strict=True)])
        except Exception:
            return None  # for load_state_dict to complain about

    def _failing(self) -> str | None:
        try:
            return self._unlike()
        except Exception as error:  # the user's code may raise anything
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"the right_inverse of a grown '{self.name}' fails ({first})"

    def _unlike(self) -> str | None:
        with self._apart(train=False):
            weight = self._computed(self.originals)
        with self._apart(train=True):
            other = self._computed(self.originals)
        if not _same(weight, other):
            return f"'{self.name}' depends on the mode, or on random numbers"
        if not _same(self.again(self._inverse(weight)), weight):
            return f"right_inverse does not reproduce '{self.name}'"
        wider = _wider(weight)
        if not _same(self.again(self._inverse(wider)), wider):
            return f"right_inverse does not reproduce a grown '{self.name}'"
        return None

    def _grown(
        self, before: Tensor, weight: Tensor, maps: Mapping[int, AxisMap]
    ) -> tuple[list[Tensor], list[dict[int, AxisMap] | None]]:
        """What ``right_inverse`` makes of a grown weight.

        An original that it does not give back is one of many that make the same weight.
        """
        moved: list[dict[int, AxisMap] | None] = []
        for back, original, axes in zip(
            self._inverse(before), self.originals, self.follows(before), strict=True
        ):
            same = _same(back, original.detach())
            moved.append({a: maps[a] for a in axes if a in maps} if same else None)
        return self._inverse(weight), moved

    def _names(self) -> list[list[str]]:
        return [[f"{HIDDEN}.{self.name}.{key}" for key in self.keys]]

    @contextmanager
    def _apart(self, train: bool | None = None) -> Iterator[None]:
        """The user's steps may write to buffers, and draw random numbers."""
        with undisturbed(self._several, train=train), torch.no_grad():
            yield

    def _computed(self, originals: Sequence[Tensor]) -> Tensor:
        first, *rest = self._several
        weight: Tensor = first(*originals)
        for step in rest:
            weight = step(weight)
        return weight

    def _inverse(self, weight: Any) -> list[Tensor]:
        with self._apart():
            for step in reversed(list(self._several)):
                weight = step.right_inverse(weight)
            found = [weight] if isinstance(weight, Tensor) else list(weight)
            if len(found) != len(self.keys):
                raise ValueError(f"it returns {len(found)} tensors instead of {len(self.keys)}")
            return [t.detach().clone() for t in found]


def computed(module: nn.Module) -> list[Source | Refusal]:
    """The tensors of a module that are computed of others."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    found: list[Source | Refusal] = []
    hidden = module._modules.get(HIDDEN)
    if isinstance(hidden, nn.ModuleDict):
        found += [_registered(module, name, several) for name, several in hidden.items()]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found.append(_Hooked(module, hook))
        elif isinstance(hook, SpectralNorm):
            how = "spectral norm; torch.nn.utils.remove_spectral_norm makes it plain"
            found.append(Refusal(f"its tensor '{hook.name}' is computed from others ({how})"))
        elif isinstance(hook, prune.BasePruningMethod):
            how = "pruning; torch.nn.utils.prune.remove makes it plain"
            found.append(Refusal(f"its tensor '{hook._tensor_name}' is computed from others ({how})"))
    return found


def _registered(module: nn.Module, name: str, several: Any) -> Source | Refusal:
    steps = list(several)
    kind = ", ".join(type(step).__name__.lstrip("_") for step in steps)
    why = None
    if any(isinstance(step, _SpectralNorm) for step in steps):
        why = "every split changes the norm of the whole matrix, by which all weights are divided"
    elif any(isinstance(step, _Orthogonal) for step in steps):
        why = "offspring of a neuron are not orthogonal to each other"
    elif not all(hasattr(step, "right_inverse") for step in steps):
        why = "without right_inverse nobody knows which originals make a grown weight"
    elif not isinstance(vars(type(module)).get(name), property):
        why = "the class of the layer was changed after they were registered"
    if why is not None:
        return Refusal(_refused(kind, why, Source.advice))
    keys = ("original",) if several.is_tensor else tuple(f"original{i}" for i in range(several.ntensors))
    rest = module, name, kind, several._parameters, keys
    if len(steps) == 1 and type(steps[0]) is _WeightNorm:
        return _WeightNormed(steps[0].dim, *rest)
    return _Registered(several, *rest)


def _refused(kind: str, why: str, advice: str) -> str:
    return f"its weights are parametrized ({kind}): {why}; {advice}"


def forget_cached(source: Source) -> None:
    """Let ``parametrize.cached()`` forget the weight."""
    parametrize._cache.pop((id(source.module), source.name), None)


def _wider(weight: Tensor) -> Tensor:
    """A weight with an entry more along its first axes, all of them a little smaller than they were."""
    for axis in range(min(2, weight.ndim)):
        place = torch.arange(weight.shape[axis] + 1)
        index = place - (place > weight.shape[axis] // 2).long()
        weight = weight.index_select(axis, index.to(weight.device))
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    smaller: Tensor = weight - weight * noise * max(_SHRUNK, 4 * torch.finfo(weight.dtype).eps)
    return smaller


def _near(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors are equal up to the rounding of a few operations."""
    if a.shape != b.shape:
        raise ValueError(f"a weight of shape {tuple(a.shape)} instead of {tuple(b.shape)}")
    scale = b.abs().nan_to_num(0, 0, 0).max() if b.numel() else 0.0
    tolerance = 4 * torch.finfo(b.dtype).eps ** 0.75 * float(scale)
    near: Tensor = ((a - b).abs() <= tolerance) | (a.isnan() & b.isnan())
    return near


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(_near(a, b).all())


def _fits(old: Tensor, new: Tensor, maps: Mapping[int, AxisMap]) -> bool:
    """Whether the maps lead from one shape to the other."""
    sizes = [len(maps[a].index) if a in maps else size for a, size in enumerate(old.shape)]
    return list(new.shape) == sizes


def _widened(tensor: Tensor, maps: Mapping[int, AxisMap]) -> Tensor:
    """The tensor with entries repeated along the axes that grew."""
    for axis, grew in maps.items():
        tensor = tensor.index_select(axis, grew.index.to(tensor.device))
    return tensor
