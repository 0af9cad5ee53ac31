"""By what sums of products over neurons are divided, found without values.

How scores ``q @ k.mT / q.shape[-1] ** 0.5`` depend on the number of channels shows in the numbers by which
the code multiplies queries, keys and scores. The network runs over outlines at its own widths, and again with
twice as many neurons in every such sum. Nothing but these factors may differ between the two, and keys must
be proportional to the rows that make them: so nothing can have been added to them that would have to be
multiplied along.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_split.architecture import Architecture, ChannelGroup
from lightning_split.constants import storage_key
from lightning_split.labels import tensors_of, written_by
from lightning_split.layers import Port, port_kind
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import fixed_statistics, tensors_in, undisturbed
from lightning_split.outlines import shape_only
from lightning_split.surgery import Split, Surgery

__all__ = ["scaled_by_numbers"]

_POWERS = (0.0, 0.5, 1.0)


def scaled_by_numbers(
    model: nn.Module, arch: Architecture, names: Sequence[str], run: Callable[[nn.Module], Any]
) -> tuple[Architecture, frozenset[str]]:
    """The architecture with the powers of the width by which sums over paired neurons are divided.

    Args:
        model: The model; left as it was.
        arch: Its architecture.
        names: Of paired groups.
        run: Runs the model on an outline.

    Returns:
        The architecture, and the groups of which this could be told.
    """
    groups = [arch.group(name) for name in names]
    splits = [
        Split(g.name, i, (2.0, -1.0), torch.zeros(()).expand(2, g.dim))
        for g in groups
        for i in range(g.width)
    ]
    scaled = {(block.module, block.tensor) for g in groups for block in g.outgoing}
    wider = {path for g in groups for path in (*g.producers, *_weighing(arch, g))}
    surgery = Surgery(model, splits, arch, hollow=True)
    try:
        before = _followed(model, scaled, wider, run)
        surgery.apply()
        after = _followed(model, scaled, wider, run)
    except Exception:  # why, the trials tell
        return arch, frozenset()
    finally:
        surgery.revert()
    told = {g.name: _power(arch, g, before, after) for g in groups}
    for power in _POWERS:
        arch = arch.scaled([name for name, found in told.items() if found == power], power)
    return arch, frozenset(name for name, found in told.items() if found is not None)


def _power(arch: Architecture, group: ChannelGroup, before: _Numbers, after: _Numbers) -> float | None:
    """Of the width by which all products over these neurons are divided; ``None`` if nobody can tell."""
    if before.record != after.record or len(before.products) != len(after.products):
        return None
    making, weighing = set(group.producers), set(_weighing(arch, group))
    ratios = set()
    for old, new in zip(before.products, after.products, strict=True):
        sides = [(old.left, old.right), (old.right, old.left)]
        mine = [key for query, key in sides if query.origins & making and key.origins & weighing]
        if not mine:
            continue
        if len(old.ends) != len(new.ends) or not old.ends or not all(key.clean for key in mine):
            return None
        ratios |= {round(n / o, 9) if o else 0.0 for o, n in zip(old.ends, new.ends, strict=True)}
    return next((p for p in _POWERS if ratios == {round(2**-p, 9)}), None)


def _weighing(arch: Architecture, group: ChannelGroup) -> Iterator[str]:
    """The layers whose rows are outgoing weights of a group."""
    for (path, _), port in arch.ports.items():
        if port.reads is not None and np.isin(port.neuron[port.reads], group.neurons).any():
            yield path


def _followed(
    model: nn.Module, scaled: set[tuple[str, str]], wider: set[str], run: Callable[[nn.Module], Any]
) -> _Numbers:
    """What the numbers of one pass in eval mode tell."""
    with undisturbed(model), torch.no_grad():
        fixed_statistics(model)
        given = {t: (path, n) in scaled for path, m in model.named_modules() for n, t in _tensors(m)}
        mode = _Numbers(given, wider)
        # The fused kernels hide their numbers, and which one runs depends on the widths.
        with sdpa_kernel(SDPBackend.MATH), watched(model, _Follower(mode)), mode:
            output = run(model)
        for t in tensors_in(output):
            mode.end(t)
    return mode


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]


@dataclass(frozen=True)
class _Line:
    """A tensor that is a sum of what layers made, times numbers."""

    origins: frozenset[str]  # paths of the layers
    scale: float = 1.0  # the numbers
    clean: bool = True  # whether nothing else was added
    product: _Product | None = None  # whose sums these are, instead


@dataclass(eq=False)
class _Product:
    """Products of two such tensors that are summed."""

    left: _Line
    right: _Line
    ends: list[float] = field(default_factory=list)  # by what the sums are multiplied, wherever they are used


class _Numbers(TorchDispatchMode):
    """Follows what layers make through sums of products, and notes all numbers and sizes that are not theirs.

    Args:
        given: The tensors that the model has, and whether growth multiplies them like rows of keys.
        wider: Layers that make the factors; sizes of what is computed of these are theirs.
    """

    def __init__(self, given: Mapping[Tensor, bool], wider: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record: list[Any] = []
        self.products: list[_Product] = []
        self.suspended = 0  # > 0 in a layer
        self._wider = wider
        self._wide: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lines: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._open: WeakIdKeyDictionary = WeakIdKeyDictionary()  # products element by element, not yet summed
        self._given: WeakIdKeyDictionary = WeakIdKeyDictionary()  # and what is computed of those alone
        self._given.update(given)

    def begin(self, tensor: Tensor, path: str) -> None:
        """A layer has made this."""
        self._lines[tensor] = _Line(frozenset({path}))
        if path in self._wider:
            self._wide[tensor] = True

    def end(self, tensor: Tensor) -> None:
        """A tensor is used in some other way."""
        self.record += [factor.scale for factor in self._open.get(tensor, ())]
        line: _Line | None = self._lines.get(tensor)
        if line is not None and line.product is not None:
            line.product.ends.append(line.scale)
        elif line is not None:
            self.record.append(line.scale)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.suspended:
            with torch._C.DisableTorchFunction():
                self._follow(func, func.overloadpacket.__name__, args, kwargs or {}, out)
        return out

    def _follow(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        written, outputs = written_by(func, args, kwargs), tensors_of(out)
        leaves = tree_leaves((list(args), kwargs))
        if not outputs and not written:
            return  # a size, a device
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        if tensors and all(t in self._given for t in tensors):
            same = len(tensors) == 1 and name in _MOVES and self._given[tensors[0]]
            self._given.update(dict.fromkeys(outputs, same))
            return
        if not any(map(shape_only, tensors)):
            if any(t in self._given for t in tensors):
                self._given.update(dict.fromkeys(outputs, False))
            return  # of constants alone: they count where they meet activations
        sizes = name in _MOVES or name in _MADE
        numbers = [n for n in leaves if type(n) is float or (type(n) is int and not sizes)]
        if "full" in name:
            numbers = [args[-1]]  # the rest is its shape
        constants = [t for t in tensors if not shape_only(t) and t not in self._given]
        lines = [t for t in tensors if t in self._lines]
        wide = any(t in self._wide for t in tensors)
        result: _Line | None = None
        base = name.removesuffix("_")
        if base in _SCALES and _scales(base, args, kwargs, lines):
            other = args[1] if args[0] is lines[0] else args[0]
            if isinstance(other, (int, float)) or (other.numel() == 1 and any(other is c for c in constants)):
                factor, numbers, constants = float(other), [], []
            else:
                factor = 1.0  # the same at every width, or made of numbers that are noted
            line: _Line = self._lines[lines[0]]
            result = replace(line, scale=line.scale * factor if base == "mul" else line.scale / factor)
        elif base in _PRODUCTS:
            result, numbers = self._multiplied(base, args, kwargs, numbers)
        elif name in ("sum", "mean") and args[0] in self._open:
            result = self._summed(
                self._open[args[0]], 1.0 if name == "sum" else out.numel() / args[0].numel()
            )
        elif name == "mul" and len(lines) == 2 and not any(self._lines[t].product for t in lines):
            self._open[out] = [self._lines[t] for t in lines]
        elif lines or any(t in self._open for t in tensors):
            result = self._moved(base, args, tensors, lines)
        shapes = [] if wide or "empty" in name else [tuple(t.shape) for t in outputs]
        self.record.append((name, shapes, numbers, [_print_of(t) for t in constants]))
        self._note_aliases(written)
        if wide and not (base in _PRODUCTS and len(lines) > 1):
            self._wide.update(dict.fromkeys(outputs, True))
        for t in (*outputs, *written):
            if result is not None:
                self._lines[t] = result
            else:
                self._lines.pop(t, None)

    def _note_aliases(self, written: list[Tensor]) -> None:
        """Of lines that are written into under another name nothing is known."""
        for t in written:
            key = storage_key(t)
            if any(storage_key(other) == key and other is not t for other in list(self._lines)):
                self.record.append(object())

    def _moved(
        self, name: str, args: Sequence[Any], tensors: list[Tensor], lines: list[Tensor]
    ) -> _Line | None:
        """What becomes of lines in an operator that multiplies nothing."""
        for t in tensors:
            if t in self._open:
                self.end(t)
        if not lines:
            return None
        found: list[_Line] = [self._lines[t] for t in lines]
        others = [t for t in tensors if t not in self._lines]
        first = found[0]
        moves = name in _MOVES and not (name == "constant_pad_nd" and len(args) > 2 and args[2])
        factors = all(line.product is None for line in found)
        if len(lines) == 1 and moves and not others:
            return first
        if factors and name in ("add", "sub", "cat", "stack"):
            alike = all(line.scale == first.scale for line in found)
            whole = len(tensors) > 1 or name in ("cat", "stack")  # or a number is added
            if not (alike and whole) or others:
                for t in lines:  # numbers before what is joined to something else may not depend on the width
                    self.end(t)
            clean = whole and all(line.clean for line in found)
            clean = clean and all(self._given.get(t, False) for t in others)
            origins = frozenset().union(*(line.origins for line in found))
            return _Line(origins, first.scale if alike else 1.0, clean)
        for t in lines:
            self.end(t)
        return None

    def _multiplied(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any], numbers: list[Any]
    ) -> tuple[_Line | None, list[Any]]:
        """A matrix product: what becomes of its factors, and the numbers that are not its own."""
        *added, left, right = args[: 3 if name.startswith(("add", "badd")) else 2]
        factors: list[_Line | None] = [self._lines.get(left), self._lines.get(right)]
        first, second = factors
        for t in added:
            self.end(t)
        if first is None or second is None or first.product or second.product:
            self.end(left)
            self.end(right)
            return None, numbers
        own = kwargs.get("alpha")
        line = self._summed((first, second), 1.0 if own is None else own)
        if added and line.product is not None:
            line.product.ends.append(line.scale)
        return None if added else line, [n for n in numbers if n is not own]

    def _summed(self, factors: Sequence[_Line], number: float) -> _Line:
        """The sums of products of two lines, times a number."""
        first, second = factors
        product = _Product(first, second)
        self.products.append(product)
        return _Line(frozenset(), first.scale * second.scale * number, True, product)


class _Follower(Watcher):
    def __init__(self, mode: _Numbers) -> None:
        self._mode = mode

    def read(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        self._mode.end(x)
        return x

    def made(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        if port_kind(port) == "out":
            self._mode.begin(x, path)
        return x

    def sealed(self, call: Callable[[], Any]) -> Any:
        self._mode.suspended += 1
        try:
            return call()
        finally:
            self._mode.suspended -= 1


def _scales(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], lines: list[Tensor]) -> bool:
    """Whether a line is multiplied with, or divided by, something that is none."""
    return len(lines) == 1 and len(args) == 2 and not kwargs and (name == "mul" or args[0] is lines[0])


def _print_of(tensor: Tensor) -> Any:
    """By which a constant is known again."""
    values = tensor.detach().double().flatten()
    if len(values) <= _FEW:
        return tuple(tensor.shape), tuple(values.tolist())
    weights = torch.cos(torch.arange(len(values), dtype=values.dtype, device=values.device))
    return tuple(tensor.shape), float(values.sum()), float(values.nan_to_num(0, 1, -1) @ weights)


_FEW = 256
_SCALES = {"mul", "div"}
_MADE = {
    f"{new}{kind}" for new in ("", "new_") for kind in ("empty", "zeros", "ones", "full", "empty_strided")
}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
# Operators whose result is proportional to each of their inputs, or to their one input.
_MOVES = {
    *("neg", "sum", "clone", "_to_copy", "contiguous", "detach", "alias", "native_dropout", "view_as"),
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "movedim", "expand"),
    *("squeeze", "unsqueeze", "slice", "select", "unbind", "split", "split_with_sizes", "cat", "stack"),
    *("unsafe_split", "unsafe_split_with_sizes", "index_select", "repeat", "flip", "roll", "constant_pad_nd"),
}
