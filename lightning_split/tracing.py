"""Trace a network: which neurons exist, where each one sits in every layer, which can be split."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_split.architecture import (
    Architecture,
    ChannelGroup,
    Index,
    PortKey,
    PortMap,
    ThetaBlock,
    Unsplittable,
)
from lightning_split.labels import ChunkMode, LabelMode, NeuronTable
from lightning_split.layers import (
    LayerRule,
    Port,
    is_uninitialized,
    keeps_batch_statistics,
    layer_tensors,
    rule_for,
)
from lightning_split.measuring import tensors_in, undisturbed
from lightning_split.operators import handler_of
from lightning_split.verification import verified

__all__ = ["trace", "trace_step"]

_REFUSED_IN_USE = "no layer reads them"


def trace(model: nn.Module, *inputs: Any, **kwargs: Any) -> Architecture:
    """Find the channel groups of a network by running it once on example inputs.

    The model is called as ``model(*inputs, **kwargs)`` in the mode that it is in and, if that works, in
    the other mode too, so that branches used only in training are seen. Then one neuron of every group
    is really split, into copies and into itself and an offspring of weight zero, and every layer must read
    what it read before, with the split channels doubled; groups that fail are reported with the reason.
    The model and the random state are left as they were.

    Args:
        model: Any ``nn.Module``.
        inputs: Positional arguments of one forward pass; a small batch is enough.
        kwargs: Keyword arguments of the forward pass.

    Returns:
        The architecture. A neuron is either in a group, fully explained, or listed as unsplittable.
        ``print()`` shows it as a table.

    Raises:
        ValueError: If the model has lazy layers that were not yet initialised.

    Cost: about seven forward passes.
    """
    return _trace(
        model,
        lambda m: m(*inputs, **kwargs),
        inputs or kwargs,
        output_reason="they are part of the model's output",
        compare_outputs=True,
    )


def trace_step(model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor]) -> Architecture:
    """Like :func:`trace`, but runs ``loss_fn(model, batch)``, so the loss itself bounds what can grow."""
    return _trace(
        model,
        lambda m: loss_fn(m, batch),
        batch,
        output_reason="they reach the loss without passing a layer",
        compare_outputs=False,  # a penalty on the weights changes the loss, though not the function
    )


def _trace(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    example: Any,
    output_reason: str,
    compare_outputs: bool,
) -> Architecture:
    for path, layer in model.named_modules():
        if is_uninitialized(layer):
            raise ValueError(
                f"The layer '{path}' is lazy and has no weights yet; run the model on one batch before "
                "tracing it."
            )
    tracer = _Tracer(model, batch_size=_batch_size(example))
    mode, note = model.training, ""
    with undisturbed(model, train=mode):
        tracer.run(run, output_reason)
    try:
        with undisturbed(model, train=not mode):
            for layer in model.modules():
                if keeps_batch_statistics(layer):
                    layer.eval()  # one sample per channel is too few for statistics, and labels need none
            tracer.run(run, output_reason, count_uses=False)
    except Exception as error:
        # The other mode may need other inputs (targets, say), so its failure is told, not raised.
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        other = "eval" if mode else "training"
        note = f"Branches used in {other} mode only were not seen, because a pass in that mode fails: {what}"
    arch = dataclasses.replace(tracer.architecture(), note=note)
    return verified(model, arch, run, compare_outputs=compare_outputs)


class _Tracer:
    """Collects what the runs of one model tell."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.model = model
        self.table = NeuronTable()
        self.rules: dict[str, LayerRule] = {
            path: rule for path, m in model.named_modules() if (rule := rule_for(m)) is not None
        }
        self.ports: dict[PortKey, Tensor] = {}
        self.uses: dict[str, float] = defaultdict(float)
        self.leaked: dict[int, str] = {}
        self._batch_size = batch_size
        self._count_uses = True
        self._stack: list[str] = []

    # running --------------------------------------------------------------------------------------

    def run(self, run: Callable[[nn.Module], Any], output_reason: str, *, count_uses: bool = True) -> None:
        self._count_uses = count_uses
        self._stack = []
        mode = LabelMode(self.table, self._where, handler_of)
        with self._hooks(mode), torch.enable_grad(), ChunkMode(mode), mode:
            output = run(self.model)
        for tensor in tensors_in(output):
            labels = mode.get(tensor)
            if labels is not None:
                self.table.bar(mode.ids(labels), output_reason)
        self.leaked.update(mode.leaked)

    def _where(self) -> str:
        inner = next((p for p in reversed(self._stack) if p), "")
        return f" (in '{inner}')" if inner else ""

    @contextmanager
    def _hooks(self, mode: LabelMode) -> Iterator[None]:
        handles = []
        for path, module in self.model.named_modules():
            enter, leave = self._hook_pair(mode, path)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        with ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def _hook_pair(self, mode: LabelMode, path: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        rule = self.rules.get(path)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(path)
            if rule is not None:
                mode.suspended += 1

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if rule is not None:
                mode.suspended -= 1
                if not mode.suspended:
                    self._apply(mode, path, module, rule, args, kwargs, output)
            self._stack.pop()

        return enter, leave

    def _apply(
        self,
        mode: LabelMode,
        path: str,
        module: nn.Module,
        rule: LayerRule,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        """Let a layer consume the labels of its input and give labels to its output."""
        tensors = tensors_in((args, kwargs))
        kind = type(module).__name__
        refusal = rule.refusal(module)
        if refusal is None and not (isinstance(output, Tensor) and tensors):
            refusal = "its rule describes one input and one output tensor, and it has others"
        if refusal is not None:
            mode.bar(tensors, f"they enter the {kind} '{path}': {refusal}")
            for tensor in tensors_in(output):
                mode.set(tensor, None)
            return
        source = tensors[0]
        mode.bar(tensors[1:], f"they enter the {kind} '{path}' as a second input")
        if self._count_uses:
            self.uses[path] += rule.positions(module, source, output) / self._batch_size
        if rule.role == "mixer":
            self._consume(mode, path, module, rule, source)
            self._produce(mode, path, module, rule, output)
        else:
            self._pass_through(mode, path, module, rule, source, output)

    def _profile(
        self, mode: LabelMode, layer: str, rule: LayerRule, module: nn.Module, tensor: Tensor
    ) -> Tensor | None:
        """The labels along the neuron axis alone, or ``None`` (and a barrier) if there is more to them."""
        labels = mode.get(tensor)
        if labels is None:
            return None
        axis = rule.neuron_axis(module, tensor) % tensor.ndim
        if any(v for d, v in enumerate(mode.varying(labels)) if d != axis):
            mode.bar([tensor], f"their axis is not the one along which {layer} reads neurons")
            return None
        for d in range(labels.ndim):
            if d != axis:
                labels = labels.narrow(d, 0, 1)
        return labels.flatten()

    def _meet(self, mode: LabelMode, key: PortKey, labels: Tensor | None, size: int) -> None:
        """Record what lies on a port; a layer that is called again must find the same neurons there."""
        if labels is None:
            labels = torch.full((size,), -1)
        if key in self.ports:
            self.ports[key] = mode.unify(self.ports[key], labels, f"a second call of '{key[0]}'").clone()
        else:
            self.ports[key] = labels.clone()

    def _consume(
        self, mode: LabelMode, path: str, module: nn.Module, rule: LayerRule, source: Tensor
    ) -> None:
        size = rule.port_size(module, "in")
        if size is None:
            mode.bar([source], f"the {type(module).__name__} '{path}' is not linear in the neurons it reads")
            return
        labels = self._profile(mode, f"'{path}'", rule, module, source)
        tiles = rule.tiles(module)
        if labels is not None and len(labels) != tiles * size:
            mode.bar([source], f"the {type(module).__name__} '{path}' reads another number of channels")
            labels = None
        if labels is not None:
            labels = mode.merge(labels.view(tiles, size), 0, f"'{path}'")[0]
        self._meet(mode, (path, "in"), labels, size)

    def _produce(
        self, mode: LabelMode, path: str, module: nn.Module, rule: LayerRule, output: Tensor
    ) -> None:
        key: PortKey = (path, "out")
        axis = rule.neuron_axis(module, output) % output.ndim
        if key not in self.ports:
            self.ports[key] = torch.from_numpy(self.table.mint(output.shape[axis]))
            mode.merge(self.ports[key].view(rule.tiles(module), -1), 0, f"'{path}'")
        shape = [1] * output.ndim
        shape[axis] = -1
        mode.set(output, self.ports[key].view(shape).expand(output.shape))

    def _pass_through(
        self,
        mode: LabelMode,
        path: str,
        module: nn.Module,
        rule: LayerRule,
        source: Tensor,
        output: Tensor,
    ) -> None:
        labels = mode.get(source)
        size = rule.port_size(module, "through")
        if labels is None or size is None:  # no neurons, or nothing of the layer's is per neuron
            mode.set(output, None if labels is None or output.shape != source.shape else labels)
            return
        profile = self._profile(mode, f"'{path}'", rule, module, source)
        if profile is not None:
            self._meet(mode, (path, "through"), profile, size)
            axis = rule.neuron_axis(module, output) % output.ndim
            shape = [1] * output.ndim
            shape[axis] = -1
            profile = profile.repeat_interleave(output.shape[axis] // size)
            mode.set(output, profile.view(shape).expand(output.shape))

    # what it comes to ------------------------------------------------------------------------------

    def architecture(self) -> Architecture:
        """Sort the neurons into groups by where they occur."""
        self._bar_shared_and_leaked()
        neuron, runs, reasons = self.table.resolve()
        ports = {
            key: PortMap(np.where(raw >= 0, neuron[raw], -1), np.where(raw >= 0, runs[raw], -1))
            for key, labels in self.ports.items()
            for raw in [labels.numpy()]
        }
        places: dict[int, dict[PortKey, int]] = defaultdict(dict)
        for key, port in ports.items():
            ids, counts = np.unique(port.neuron[port.neuron >= 0], return_counts=True)
            for i, count in zip(ids.tolist(), counts.tolist(), strict=True):
                places[i][key] = count
        kinds: dict[tuple[Any, str | None], list[int]] = defaultdict(list)
        for i in sorted(places):
            kinds[tuple(sorted(places[i].items())), reasons.get(i)].append(i)
        return self._named(kinds, ports)

    def _named(
        self, kinds: Mapping[tuple[Any, str | None], list[int]], ports: Mapping[PortKey, PortMap]
    ) -> Architecture:
        order = {key: n for n, key in enumerate(self.ports)}
        groups, unsplittable = [], []
        used: dict[str, int] = defaultdict(int)
        for (signature, reason), members in sorted(kinds.items(), key=lambda kv: kv[1][0]):
            keys = sorted((key for key, _ in signature), key=order.__getitem__)
            group = self._group(keys, members, ports)
            used[group.name] += 1
            if used[group.name] > 1:
                group = dataclasses.replace(group, name=f"{group.name}#{used[group.name]}")
            why = reason or self._why_not(group)
            if why is None:
                groups.append(group)
            else:
                unsplittable.append(Unsplittable(group.name, why, group.width))
        return Architecture(tuple(groups), tuple(unsplittable), ports, dict(self.uses))

    def _group(
        self, keys: list[PortKey], members: list[int], ports: Mapping[PortKey, PortMap]
    ) -> ChannelGroup:
        by_port = {port: tuple(path for path, p in keys if p == port) for port in ("out", "through", "in")}
        theta, params, macs = [], 0, 0.0
        rank = np.full(self.table.size, -1)
        rank[members] = np.arange(len(members))
        for path, port in keys:
            module = self.model.get_submodule(path)
            rows = _rows(ports[path, port], rank, len(members))
            for name, (tensor, axes) in layer_tensors(module).items():
                for axis in (a for a, p in axes.items() if p == port):
                    multiple = tensor.shape[axis] // len(ports[path, port].neuron)
                    size = multiple * rows.shape[1] * (tensor.numel() // max(1, tensor.shape[axis]))
                    if isinstance(tensor, nn.Parameter):
                        params += size
                        macs += size * self.uses.get(path, 0.0) * (tensor.ndim > 1)
                        if port == "out":
                            theta.append(ThetaBlock(path, name, axis, rows, size))
        return ChannelGroup(
            name=by_port["out"][0] or "(root)",
            width=len(members),
            dim=sum(block.size for block in theta),
            producers=by_port["out"],
            channelwise=by_port["through"],
            consumers=by_port["in"],
            params=params,
            macs=macs,
            neurons=tuple(members),
            theta=tuple(theta),
        )

    def _why_not(self, group: ChannelGroup) -> str | None:
        if not group.consumers:
            return _REFUSED_IN_USE
        for block in group.theta:
            tensor = self.model.get_submodule(block.module)._parameters.get(block.tensor)
            if tensor is None or not tensor.requires_grad:
                return f"the incoming weight '{block.module}.{block.tensor}' is frozen (requires_grad=False)"
        if not group.dim:
            return "they have no incoming weights of their own"
        return None

    def _bar_shared_and_leaked(self) -> None:
        sites: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for path, module in self.model.named_modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    sites[id(tensor)].append((path, name))
        for owner, places in sites.items():
            reason = self.leaked.get(owner)
            if len(places) > 1:
                names = " and ".join(f"'{p}.{n}'" for p, n in places)
                reason = f"is one tensor shared by {names}"
            if reason is None:
                continue
            for path, name in places:
                axes: Mapping[int, Port] = {}
                if path in self.rules:
                    axes = self.rules[path].axes(self.model.get_submodule(path)).get(name, {})
                for port in axes.values():
                    ids = self.ports.get((path, port))
                    if ids is not None:
                        self.table.bar(ids.tolist(), f"the weight '{path}.{name}' {reason}")


def _rows(port: PortMap, rank: Index, width: int) -> Index:
    """Positions on the port that each neuron of the group owns, ``(width, r)``, in order."""
    owner = np.where(port.neuron >= 0, rank[port.neuron], -1)
    positions = np.flatnonzero(owner >= 0)
    positions = positions[np.argsort(owner[positions], kind="stable")]
    return positions.reshape(width, -1)


def _batch_size(example: Any) -> int:
    """Leading dimension of the first tensor with dimensions: the number of samples in a batch."""
    for tensor in tensors_in(example):
        if tensor.ndim:
            return max(1, tensor.shape[0])
    return 1
