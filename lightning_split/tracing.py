"""Trace a network: which neurons exist, where each one sits in every layer, which can be split."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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
from lightning_split.constants import storage_key
from lightning_split.labels import BookKeeping, CallMode, LabelMode, NeuronTable
from lightning_split.layers import (
    Block,
    LayerRule,
    Port,
    is_uninitialized,
    layer_tensors,
    port_kind,
    rule_for,
)
from lightning_split.loose import growing_tensors, loose_port, loose_tensors
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import fixed_statistics, keep_in_mind, tensors_in, undisturbed
from lightning_split.operators import handler_of
from lightning_split.outlines import Outline, collector_paused, quiet
from lightning_split.verification import Readings, Run, batch_size, verified_sizes, verified_values

__all__ = ["trace", "trace_step"]

_OUTPUT = "they are part of the model's output"
_LOSS = "they reach the loss without passing a layer"
_STARVED = "the traced batch sends no sample through the layer that makes them"
_REFUSED_IN_USE = "no layer that tracing sees reads them"


def trace(model: nn.Module, *inputs: Any, **kwargs: Any) -> Architecture:
    """Find the channel groups of a network by running it once on example inputs.

    The model is called as ``model(*inputs, **kwargs)`` in the mode that it is in and, if that works, in
    the other mode too, so that branches used only in training are seen. These runs compute shapes only,
    unless the control flow depends on values. Then one neuron of every group is really split, into two copies
    and an offspring of weight zero, and every layer must read what it read before, with the split channels
    repeated; groups that fail are reported with the reason. The model and the random state are left as they
    were.

    Args:
        model: Any ``nn.Module``.
        inputs: Positional arguments of one forward pass; a small batch is enough.
        kwargs: Keyword arguments of the forward pass.

    Returns:
        The architecture. A neuron is either in a group, fully explained, or listed as unsplittable.
        ``print()`` shows it as a table.

    Raises:
        ValueError: If the model has lazy layers that were not yet initialised.

    Cost: two forward passes over at most two samples (four where a network is so small that all of its
    neurons are tried), and the time that Python takes for a few more.
    """
    return _trace(
        model,
        lambda m, example: m(*example[0], **example[1]),
        (inputs, kwargs),
        compare_outputs=True,
    )


def trace_step(model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor]) -> Architecture:
    """Like :func:`trace`, but runs ``loss_fn(model, batch)``, so the loss itself bounds what can grow."""
    return _trace(
        model,
        loss_fn,
        batch,
        compare_outputs=False,  # a penalty on the weights changes the loss, though not the function
    )


def _trace(
    model: nn.Module,
    run: Run,
    example: Any,
    *,
    compare_outputs: bool,
) -> Architecture:
    for path, layer in model.named_modules():
        if is_uninitialized(layer):
            raise ValueError(
                f"The layer '{path}' is lazy and has no weights yet; run the model on one batch before "
                "tracing it."
            )
    if any(t.ndim and not t.shape[0] for t in tensors_in(example)[:1]):
        raise ValueError(
            "The example batch is empty, and nothing can be seen in it; trace a batch with samples."
        )
    outline = Outline(example)
    try:
        with quiet():
            tracer, note = _labelled(model, run, example, outline, compare_outputs)
            hollow = tracer.example is not example
            with collector_paused(hollow):
                arch = tracer.architecture()
                arch = dataclasses.replace(arch, note=f"{arch.note} {note}".strip())
                arch = verified_sizes(model, arch, run, tracer.example, tracer.seen, hollow=hollow)
        del tracer
    finally:
        outline.forget()
    return verified_values(model, arch, run, example, compare_outputs=compare_outputs)


def _labelled(
    model: nn.Module, run: Run, example: Any, outline: Outline, compare_outputs: bool
) -> tuple[_Tracer, str]:
    """What labels tell in both modes, and a note on what could not be seen."""

    def tracer_of(example: Any) -> _Tracer:
        return _Tracer(model, run, example, batch_size(example), compare_outputs, outline.follow)

    mode, tracer = model.training, tracer_of(outline.example)
    try:
        with collector_paused():
            tracer.run(train=mode)
    except Exception:
        tracer = tracer_of(example)  # control flow that depends on values, say
    if mode not in tracer.seen:  # outside of the handler, so that an error of the user's comes alone
        tracer.run(train=mode, graph=True)
    tracer.count_uses = False
    try:
        try:
            hollow = tracer.example is not example
            with collector_paused(hollow):
                tracer.run(train=not mode, graph=not hollow)
        except Exception:
            tracer.example = example
            tracer.run(train=not mode, graph=True)
    except Exception as error:
        # The other mode may need other inputs (targets, say), so its failure is told, not raised.
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        other = "eval" if mode else "training"
        return tracer, (
            f"Branches used in {other} mode only were not seen, because a pass in that mode fails: {what}"
        )
    return tracer, ""


class _Tracer(Watcher):
    """Collects what the runs of one model tell."""

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        example: Any,
        batch_size: int,
        outputs_count: bool,
        follow: Callable[[Any], None],
    ) -> None:
        self.model = model
        self.example = example
        self.count_uses = True
        self._run = run
        self._follow = follow
        self.table = NeuronTable()
        self.layers: dict[str, nn.Module] = dict(model.named_modules())
        self.rules: dict[str, LayerRule] = {
            path: rule for path, m in self.layers.items() if (rule := rule_for(m)) is not None
        }
        self.ports: dict[PortKey, Tensor] = {}
        self.starved: set[str] = set()  # layers through which no sample has gone
        self.loose: dict[PortKey, Tensor] = {}  # ids along the axes of loose tensors that were looked at
        self._made: dict[PortKey, Tensor] = {}  # ids of all channels of an output, tile by tile
        self.uses: dict[str, float] = defaultdict(float)
        self.leaked: dict[tuple[str, str], str] = {}
        self.seen: dict[bool, Readings] = {}
        self.declined: dict[str, tuple[str, int]] = {}  # refused layers: the reason, and their own width
        self._batch_size = batch_size
        self._outputs_count = outputs_count  # whether the output is what the model is for, or a loss
        self._stack: list[str] = []
        self._passing: dict[str, Tensor | None] = {}
        self._passed: set[str] = set()  # channelwise layers that were called, if only without neurons
        self._blank: dict[PortKey, int] = {}  # ports that have read nothing but constants so far
        self._mode: LabelMode

    # running --------------------------------------------------------------------------------------

    def run(self, *, train: bool, graph: bool = False) -> None:
        """Run the model once in one mode.

        Args:
            train: The mode.
            graph: Whether autograd records the pass, which one that differentiates inside needs.
        """
        self._stack = []
        self._reading = Readings()
        self._mode = mode = LabelMode(self.table, self._where, handler_of, self._follow, self._loose_ids)
        with undisturbed(self.model, train=train), torch.set_grad_enabled(graph):
            mode.owned = {
                id(tensor): (path, name)
                for path in self.rules
                for name, (tensor, _) in layer_tensors(self.layers[path]).items()
            }
            mode.guesses.leaves = {
                id(tensor): (path, name)
                for path, module in self.layers.items()
                for name, tensor in loose_tensors(module).items()
            }
            fixed_statistics(self.model)  # which one sample per channel would be too few for
            mode.parameters = {storage_key(p): p for p in self.model.parameters()}
            try:
                with self._located(), watched(self.model, self), CallMode(mode), mode:
                    output = self._run(self.model, self.example)
            finally:
                with torch.no_grad():
                    for parameter, values in mode.kept:
                        parameter.copy_(values)
                        keep_in_mind(parameter)
        for tensor in tensors_in(output):
            mode.bar([tensor], _OUTPUT if self._outputs_count else _LOSS)
            self._reading.shapes.append(tuple(tensor.shape))
            if self._outputs_count:
                mode.leak([tensor], "is part of the model's output")
        self.leaked.update(mode.leaked)
        self.seen[train] = self._reading

    def _loose_ids(self, owner: tuple[str, str], axis: int, size: int) -> Tensor:
        path, name = owner
        key = path, loose_port(name, axis)
        if key not in self.loose:
            self.loose[key] = torch.from_numpy(self.table.mint(size))
        return self.loose[key]

    def _where(self) -> str:
        inner = next((p for p in reversed(self._stack) if p), "")
        return f" (in '{inner}')" if inner else ""

    @contextmanager
    def _located(self) -> Iterator[None]:
        """Keep account of the module whose forward pass is running."""

        def follow(path: str, module: nn.Module) -> None:
            def enter(*_: Any) -> None:
                self._stack.append(path)

            def leave(*_: Any) -> None:
                self._stack.pop()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)

        with ExitStack() as stack:
            for path, module in self.layers.items():
                with suppress(RuntimeError):  # scripted modules take no hooks
                    follow(path, module)
            yield

    # layers with a rule ---------------------------------------------------------------------------

    def around(self, path: str, layer: nn.Module, args: Any, kwargs: Any, call: Callable[[], Any]) -> Any:
        mode, rule, tensors = self._mode, self.rules[path], tensors_in((args, kwargs))
        if tensors and not tensors[0].numel():
            self.starved.add(path)
        simple = type(rule).forward is LayerRule.forward
        refusal = rule.refusal(layer)
        if refusal is None and simple and not tensors:
            refusal = "its rule describes one input and one output tensor, and it has others"
        if refusal is not None:
            return self._declined(path, layer, rule, refusal, args, kwargs)
        if simple:
            mode.bar(tensors[1:], f"they enter the {type(layer).__name__} '{path}' as a second input")
        mode.inside += rule.trusted
        mode.suspended += simple
        try:
            output = call()
        finally:
            mode.suspended -= simple
            mode.inside -= rule.trusted
        if not rule.trusted and not any(p == path for p, _ in self.ports):
            why = f"a {type(layer).__name__} computes otherwise than the layer that it is derived from"
            self._decline(path, layer, rule, why, output)
        first = next(iter(tensors_in(output)), None)
        if self.count_uses and first is not None:
            self.uses[path] += rule.positions(layer, tensors[0], first) / self._batch_size
        return output

    def _declined(
        self, path: str, layer: nn.Module, rule: LayerRule, why: str, args: Any, kwargs: Any
    ) -> Any:
        """Run a layer that cannot be grown: neither what enters it nor what it makes can be split."""
        self._mode.bar(tensors_in((args, kwargs)), f"they enter the {type(layer).__name__} '{path}': {why}")
        output = self.sealed(lambda: type(layer).forward(layer, *args, **kwargs))
        self._decline(path, layer, rule, why, output)
        return output

    def _decline(self, path: str, layer: nn.Module, rule: LayerRule, why: str, output: Any) -> None:
        for tensor in tensors_in(output):
            self._mode.set(tensor, None)
            if tensor.ndim and rule.role == "mixer":
                self.declined[path] = why, tensor.shape[rule.neuron_axis(layer, tensor)]

    def sealed(self, call: Callable[[], Any]) -> Any:
        """A layer's own business: it may use its weights, and labels are not followed."""
        self._mode.suspended += 1
        self._mode.inside += 1
        try:
            return call()
        finally:
            self._mode.suspended -= 1
            self._mode.inside -= 1

    def read(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        """Let a layer consume the labels of its input."""
        mode = self._mode
        self._reading.note(path, port, x, axis)
        mode.leak([x], f"is read by '{path}'")
        with BookKeeping():
            loose = mode.guesses.among([x])
            for t in loose:
                mode.guesses.adopt(
                    t, frozenset({axis % x.ndim - x.ndim}), f"'{path}' reads it along another axis"
                )
            if port_kind(port) == "through":
                self._passing[path] = self._pass(path, port, x, axis)
            else:
                self._consume(path, port, x, axis)
            for t in loose:
                mode.set(t, None)
        if mode.suspended:
            return x
        mode.suspended += 1
        try:
            return x.view_as(x)  # which carries no labels
        finally:
            mode.suspended -= 1

    def made(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor:
        """Give labels to what a layer computed."""
        with BookKeeping():
            self._mode.constants.forget(x)
            self._label(path, port, x, axis)
        return x

    def _label(self, path: str, port: Port, x: Tensor, axis: int) -> None:
        mode, rule, layer = self._mode, self.rules[path], self.layers[path]
        axis %= x.ndim
        if port_kind(port) == "through":
            profile = self._passing.pop(path, None)
            if profile is None:
                return
            size = rule.port_size(layer, port)
            if size is None:  # nothing of the layer's is per neuron
                mode.set(x, profile if profile.shape == x.shape else None)
                return
            profile = profile.repeat_interleave(x.shape[axis] // size)
        else:
            key: PortKey = (path, port)
            if key not in self._made:
                self._made[key] = torch.from_numpy(self.table.mint(x.shape[axis]))
                rows = self._made[key].view(rule.tiles(layer), -1)
                self.table.tie(rows[:1].expand(rows.shape).flatten().numpy(), rows.flatten().numpy())
                self.ports[key] = rows[0].clone()
            profile = self._made[key]
        shape = [1] * x.ndim
        shape[axis] = -1
        mode.set(x, profile.view(shape).expand(x.shape))

    def _pass(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor | None:
        """The neurons that a channelwise layer passes on, as the labels of its output are made of them."""
        mode, rule, layer = self._mode, self.rules[path], self.layers[path]
        labels, size = mode.get(x), rule.port_size(layer, port)
        if labels is None or size is None:
            self._passed.add(path)
            return labels
        profile = self._profile(f"'{path}'", x, axis)
        if profile is None:
            return None
        block = rule.block(layer)
        if block > 1 and not self.table.join(profile.view(-1, block)):
            why = "takes mean and variance over several neurons that do not lie side by side"
            mode.bar([x], f"the {type(layer).__name__} '{path}' {why}")
            return None
        self._meet((path, port), profile, size)
        return profile

    def _profile(self, layer: str, x: Tensor, axis: int) -> Tensor | None:
        """The labels along the neuron axis alone, or ``None`` (and a barrier) if there is more to them."""
        labels = self._mode.get(x)
        if labels is None:
            return None
        axis %= x.ndim
        if any(v for d, v in enumerate(self._mode.varying(labels)) if d != axis):
            self._mode.bar([x], f"their axis is not the one along which {layer} reads neurons")
            return None
        for d in range(labels.ndim):
            if d != axis:
                labels = labels.narrow(d, 0, 1)
        return labels.flatten()

    def _meet(self, key: PortKey, labels: Tensor | None, size: int) -> None:
        """Record what lies on a port; a layer that is called again must find the same neurons there."""
        if labels is None:
            labels = torch.full((size,), -1)
        if key in self.ports:
            why = f"a second call of '{key[0]}'"
            self.ports[key] = self._mode.unify(self.ports[key], labels, why).clone()
        else:
            self.ports[key] = labels.clone()

    def _consume(self, path: str, port: Port, x: Tensor, axis: int) -> None:
        mode, rule, layer = self._mode, self.rules[path], self.layers[path]
        size = rule.port_size(layer, port)
        kind = type(layer).__name__
        if size is not None and mode.get(x) is None and (mode.constants.uniform(x) or not x.numel()):
            self._blank[path, port] = size  # zeros before the first step, an expert without samples
            return
        if size is None:
            mode.bar([x], f"the {kind} '{path}' is not linear in the neurons it reads")
            return
        labels = self._profile(f"'{path}'", x, axis)
        tiles = rule.tiles(layer)
        if labels is not None and len(labels) != tiles * size:
            mode.bar([x], f"the {kind} '{path}' reads another number of channels")
            labels = None
        if labels is not None:
            labels = mode.merge(labels.view(tiles, size), 0, f"'{path}'")[0]
        self._meet((path, port), labels, size)

    # what it comes to ------------------------------------------------------------------------------

    def architecture(self) -> Architecture:
        """Sort the neurons into groups by where they occur."""
        self._blank = {key: size for key, size in self._blank.items() if key not in self.ports}
        self.ports |= {key: torch.full((size,), -1) for key, size in self._blank.items()}
        self._bar_shared_and_leaked()
        neuron, runs, reasons = self.table.resolve()
        made = np.zeros(self.table.size + 1, dtype=bool)  # the last stands for "no neuron"
        for key, labels in self.ports.items():
            if port_kind(key[1]) == "out":
                made[neuron[labels.numpy()]] = True
        ports: dict[PortKey, PortMap] = {}
        for key, labels in (self.ports | self.loose).items():
            raw = labels.numpy()
            known = (raw >= 0) & made[np.append(neuron, -1)[raw]]  # others met no neuron of a layer
            if key in self.ports or known.any():
                ports[key] = PortMap(np.where(known, neuron[raw], -1), np.where(known, runs[raw], -1))
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
        order = {key: n for n, key in enumerate(ports)}
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
        unsplittable += [Unsplittable(path, why, width) for path, (why, width) in self.declined.items()]
        return Architecture(tuple(groups), tuple(unsplittable), ports, dict(self.uses), self._not_called())

    def _not_called(self) -> str:
        """A note on layers that no pass has reached: if they read a neuron, nobody knows."""
        called = (
            {path for path, _ in self.ports.keys() - self._blank.keys()} | self.declined.keys() | self._passed
        )
        with_ports = [p for p in self.rules if p not in called and layer_tensors(self.layers[p])]
        idle = [path for path in with_ports if not any(path.startswith(f"{c}.") for c in called if c)]
        if not idle:
            return ""
        named = ", ".join(f"'{path}'" for path in idle[:5]) + (" and others" if len(idle) > 5 else "")
        return f"Layers that no pass called do not grow with the others: {named}."

    def _group(
        self, keys: list[PortKey], members: list[int], ports: Mapping[PortKey, PortMap]
    ) -> ChannelGroup:
        by_kind = {
            kind: tuple(dict.fromkeys(path for path, port in keys if port_kind(port) == kind))
            for kind in ("out", "through", "in")
        }
        params, macs = 0, 0.0
        layouts: dict[str, list[ThetaBlock]] = {"out": [], "through": [], "in": []}
        rank = np.full(self.table.size, -1)
        rank[members] = np.arange(len(members))
        for path in dict.fromkeys(path for path, _ in keys):
            module = self.layers[path]
            mine = {port for p, port in keys if p == path}
            for name, (tensor, axes) in growing_tensors(module).items():
                for axis, blocks in axes.items():
                    found = [
                        _rows(ports[path, b.port], b, rank, len(members)) for b in blocks if b.port in mine
                    ]
                    kind = port_kind(blocks[0].port)
                    if not found or not (isinstance(tensor, nn.Parameter) or kind == "through"):
                        continue
                    rows = np.concatenate(found, axis=1)
                    size = rows.shape[1] * (tensor.numel() // max(1, tensor.shape[axis]))
                    layouts[kind].append(ThetaBlock(path, name, axis, rows, size))
                    if isinstance(tensor, nn.Parameter):
                        params += size
                        macs += size * self.uses.get(path, 0.0) * (tensor.ndim > 1)
        return ChannelGroup(
            name=by_kind["out"][0] or "(root)",
            width=len(members),
            dim=sum(block.size for block in layouts["out"]),
            producers=by_kind["out"],
            channelwise=by_kind["through"],
            consumers=by_kind["in"],
            params=params,
            macs=macs,
            neurons=tuple(members),
            theta=tuple(layouts["out"]),
            through=tuple(layouts["through"]),
            outgoing=tuple(layouts["in"]),
        )

    def _why_not(self, group: ChannelGroup) -> str | None:
        if not group.consumers:
            return _STARVED if self.starved.intersection(group.producers) else _REFUSED_IN_USE
        for block in group.theta:
            tensor = self.layers[block.module]._parameters.get(block.tensor)
            if tensor is None or not tensor.requires_grad:
                return f"the incoming weight '{block.module}.{block.tensor}' is frozen (requires_grad=False)"
        if not group.dim:
            return "they have no incoming weights of their own"
        return None

    def _bar_shared_and_leaked(self) -> None:
        sites: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for path, module in self.layers.items():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    sites[id(tensor)].append((path, name))
        reasons = dict(self.leaked)
        for places in sites.values():
            if len(places) > 1:
                names = " and ".join(f"'{p}.{n}'" for p, n in places)
                reasons |= dict.fromkeys(places, f"is one tensor shared by {names}")
        for (path, name), why in reasons.items():
            _, axes = growing_tensors(self.layers[path]).get(name, (None, {}))
            for port in {block.port for blocks in axes.values() for block in blocks}:
                ids = self.ports.get((path, port), self.loose.get((path, port)))
                if ids is not None:
                    self.table.bar(ids.tolist(), f"the tensor '{f'{path}.{name}'.lstrip('.')}' {why}")


def _rows(port: PortMap, block: Block, rank: Index, width: int) -> Index:
    """Entries of a tensor's axis that each neuron of a group owns in one block, ``(width, r)``, in order."""
    owner = np.where(port.neuron >= 0, rank[port.neuron], -1)
    owner = np.repeat(owner, block.multiple)
    positions = np.flatnonzero(owner >= 0)
    positions = positions[np.argsort(owner[positions], kind="stable")]
    return block.start + positions.reshape(width, -1)
