"""Grown checkpoints into seed-sized modules: the state dict says how wide each layer has to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_split.effective import EffectiveWeights
from lightning_split.layers import LayerRule, Port, layer_tensors, rule_for
from lightning_split.loose import loose_axes, loose_tensors

__all__ = ["enable_growth", "fit_to_state_dict", "growth_enabled", "load_grown"]

M = TypeVar("M", bound=nn.Module)


def fit_to_state_dict(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Resize the layers of a module, in place, to the shapes in a state dict.

    Layers with a rule are resized where all their tensors agree on the new sizes, and with them the
    parameters and buffers that no rule covers (layer scales, learned biases); anything else is left for
    ``load_state_dict`` to complain about. Works both ways: it grows and it shrinks. The new tensors are empty
    until the state dict is loaded.

    Args:
        module: The module, at any width.
        state_dict: The state dict that is about to be loaded.
        prefix: What stands before the module's own names in the state dict.

    Returns:
        Paths of the layers that were resized.
    """
    with EffectiveWeights(module) as effective:
        found = _fitted(module, effective.seen_through(state_dict, prefix), prefix)
        effective.resized(state_dict, prefix)
    return found


def _fitted(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    plans: list[tuple[str, nn.Module, LayerRule, dict[Port, int], dict[str, torch.Size]]] = []
    for path, layer in module.named_modules():
        rule = rule_for(layer)
        tensors = layer_tensors(layer)
        if rule is None or not tensors or rule.refusal(layer) is not None:
            continue
        keys = {name: f"{prefix}{path}.{name}" if path else f"{prefix}{name}" for name in tensors}
        incoming = {
            name: state_dict[key].shape
            for name, key in keys.items()
            if isinstance(state_dict.get(key), Tensor)
        }
        if all(tensors[name][0].shape == shape for name, shape in incoming.items()):
            continue
        head = f"{prefix}{path}." if path else prefix
        shapes = {
            key.removeprefix(head): saved.shape
            for key, saved in state_dict.items()
            if key.startswith(head) and isinstance(saved, Tensor)
        }
        told = rule.told(layer, shapes)
        sizes = _sizes(layer, told, incoming) if len(incoming) == len(tensors) else None
        if sizes is not None:
            plans.append((path, layer, rule, sizes, incoming))
    resized: dict[int, Tensor] = {}
    for _, layer, _, _, incoming in plans:
        for name, shape in incoming.items():
            _resize(layer, name, shape, resized)
    for _, layer, rule, sizes, _ in plans:
        rule.resize(layer, sizes)
    if plans:
        _resize_loose(module, state_dict, prefix, resized)
    return [path for path, *_ in plans]


def _resize_loose(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, resized: dict[int, Tensor]
) -> None:
    """Loose parameters and buffers have grown with the layers beside them."""
    for path, owner in module.named_modules():
        for name, tensor in loose_tensors(owner).items():
            saved = state_dict.get(f"{prefix}{path}.{name}" if path else f"{prefix}{name}")
            if not isinstance(saved, Tensor) or saved.ndim != tensor.ndim:
                continue
            sizes = enumerate(zip(saved.shape, tensor.shape, strict=True))
            if all(new == old or axis in loose_axes(tensor) for axis, (new, old) in sizes):
                _resize(owner, name, saved.shape, resized)


def _sizes(
    layer: nn.Module, told: Mapping[Port, int], incoming: Mapping[str, torch.Size]
) -> dict[Port, int] | None:
    """The new size of every port, or ``None`` if the tensors do not agree on one."""
    tensors = layer_tensors(layer)
    sizes = dict(told)
    for name, (tensor, axes) in tensors.items():
        shape = incoming[name]
        if len(shape) != tensor.ndim or any(
            shape[a] != tensor.shape[a] for a in range(tensor.ndim) if a not in axes
        ):
            return None
        for axis, blocks in axes.items():
            if len({block.port for block in blocks}) > 1:
                continue  # the layer's other tensors say how such an axis is shared out
            size, rest = divmod(shape[axis], sum(block.multiple for block in blocks))
            if rest or size == 0 or sizes.setdefault(blocks[0].port, size) != size:
                return None
    for name, (_, axes) in tensors.items():
        for axis, blocks in axes.items():
            known = sum(sizes.get(block.port, 0) * block.multiple for block in blocks)
            unknown = [block for block in blocks if block.port not in sizes]
            rest = incoming[name][axis] - known
            if rest % max(1, len(unknown)) or (rest == 0) != (not unknown) or rest < 0:
                return None
            sizes |= {block.port: rest // len(unknown) for block in unknown}
    return sizes


def _resize(layer: nn.Module, name: str, shape: torch.Size, resized: dict[int, Tensor]) -> None:
    """Put an empty tensor of another shape in a tensor's place, the same one for tied tensors."""
    store: dict[str, Any] = layer._parameters if name in layer._parameters else layer._buffers
    old = store[name]
    if old.shape == shape:
        return
    if id(old) not in resized:
        new: Tensor = old.detach().new_empty(shape)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            vars(new).update(vars(old))
        resized[id(old)] = new
    store[name] = resized[id(old)]


def refit_before_loading(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """The load pre-hook of :func:`enable_growth`; module-level, so that it pickles with the module."""
    fit_to_state_dict(module, state_dict, prefix)


def enable_growth(module: nn.Module) -> None:
    """Let a module load grown (or smaller) checkpoints: one line in its ``__init__``, after the layers.

    From then on ``load_state_dict``, ``load_from_checkpoint``, resuming and ``ddp_spawn`` first resize the
    module's layers to what they load. :class:`SplittingCallback` does this for the module that it grows;
    call it yourself where no callback is at hand. Calling it twice is harmless.
    """
    if not growth_enabled(module):
        module.register_load_state_dict_pre_hook(refit_before_loading)


def growth_enabled(module: nn.Module) -> bool:
    """Whether :func:`enable_growth` was called on this module."""
    hooks = module._load_state_dict_pre_hooks.values()
    return any(getattr(hook, "hook", hook) is refit_before_loading for hook in hooks)


def load_grown(cls: type[M], path: Any, **kwargs: Any) -> M:
    """``cls.load_from_checkpoint(path, **kwargs)`` for a checkpoint of a grown module.

    The class need not know about growth: it is built at its seed size and resized to the checkpoint.

    Args:
        cls: A LightningModule class (anything with ``load_from_checkpoint`` and ``on_load_checkpoint``).
        path: The checkpoint.
        kwargs: What ``load_from_checkpoint`` takes.

    Returns:
        The module at its grown size.

    Raises:
        TypeError: If the class has no ``load_from_checkpoint``.
    """
    loader: Callable[..., M] | None = getattr(cls, "load_from_checkpoint", None)
    if loader is None:
        raise TypeError(
            f"load_grown needs a LightningModule class with load_from_checkpoint, got {cls.__name__}; for a "
            "plain module call fit_to_state_dict(module, state_dict) before load_state_dict."
        )
    original = cls.__dict__.get("on_load_checkpoint")
    inherited: Callable[..., Any] = cls.on_load_checkpoint  # type: ignore[attr-defined]

    def on_load_checkpoint(self: nn.Module, checkpoint: dict[str, Any]) -> None:
        inherited(self, checkpoint)
        fit_to_state_dict(self, checkpoint["state_dict"])

    cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[attr-defined]
    try:
        return loader(path, **kwargs)
    finally:
        if original is None:
            del cls.on_load_checkpoint  # type: ignore[attr-defined]
        else:
            cls.on_load_checkpoint = original  # type: ignore[attr-defined]
