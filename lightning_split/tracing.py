"""Trace a network: which neurons exist, where each one sits in every layer, which can be split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_split.architecture import Architecture, PortKey
from lightning_split.constants import storage_key
from lightning_split.grouping import Findings
from lightning_split.labels import BookKeeping, CallMode, LabelMode
from lightning_split.layers import LayerRule, Port, is_uninitialized, layer_tensors, port_kind, rule_for
from lightning_split.loose import loose_size, loose_tensors
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import fixed_statistics, keep_in_mind, tensors_in, undisturbed
from lightning_split.operators import handler_of
from lightning_split.outlines import Outline, collector_paused, quiet
from lightning_split.verification import Readings, Run, batch_size, verified_sizes, verified_values

__all__ = ["trace", "trace_step"]

_OUTPUT = "they are part of the model's output"
_LOSS = "they reach the loss without passing a layer"


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
                arch = tracer.found.architecture()
                arch = dataclasses.replace(arch, note=f"{arch.note} {note}".strip())
                arch = verified_sizes(model, arch, run, tracer.example, tracer.seen, hollow=hollow)
        del tracer
    finally:
        outline.forget()
    if not arch.groups and not arch.unsplittable:
        return dataclasses.replace(arch, note=f"{_opaque(model)} {arch.note}".strip())
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


def _opaque(model: nn.Module) -> str:
    """What a network consists of in which no layer was seen."""
    kinds: dict[str, str] = {}
    for path, module in model.named_modules():
        inner = any(not name.startswith("_") for name, _ in module.named_children())
        if not inner and not path.rpartition(".")[2].startswith("_"):
            kinds.setdefault(f"{type(module).__module__}.{type(module).__qualname__}", path or "(root)")
    what = ", ".join(f"'{path}' ({kind})" for kind, path in list(kinds.items())[:5])
    return (
        f"No layer that has a LayerRule was called. The network consists of {what}. Quantized and scripted "
        "modules cannot be looked into; other layers need a rule (register_layer_rule)."
    )


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
        layers = dict(model.named_modules())
        rules = {path: rule for path, m in layers.items() if (rule := rule_for(m)) is not None}
        raw = {path: loose_tensors(m) for path, m in layers.items()}  # untold while watched
        self.found = Findings(layers, rules, raw)
        self.seen: dict[bool, Readings] = {}
        self._made: dict[PortKey, Tensor] = {}  # ids of all channels of an output, tile by tile
        self._batch_size = batch_size
        self._outputs_count = outputs_count  # whether the output is what the model is for, or a loss
        self._stack: list[str] = []
        self._passing: dict[str, Tensor | None] = {}
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
        self._mode = mode = LabelMode(
            self.found.table, self._where, handler_of, self._follow, self.found.loose_ids
        )
        with undisturbed(self.model, train=train), torch.set_grad_enabled(graph):
            mode.owned = {
                id(tensor): (path, name)
                for path in self.found.rules
                for name, (tensor, _) in layer_tensors(self.found.layers[path]).items()
            }
            mode.guesses.leaves = {
                id(tensor): (path, name)
                for path, module in self.found.layers.items()
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
        self.found.leaked.update(mode.leaked)
        self.found.adopted |= mode.guesses.adopted
        self.found.added |= mode.guesses.added
        self.seen[train] = self._reading

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
            for path, module in self.found.layers.items():
                with suppress(RuntimeError):  # scripted modules take no hooks
                    follow(path, module)
            yield

    # layers with a rule ---------------------------------------------------------------------------

    def around(self, path: str, layer: nn.Module, args: Any, kwargs: Any, call: Callable[[], Any]) -> Any:
        mode, rule, tensors = self._mode, self.found.rules[path], tensors_in((args, kwargs))
        if tensors and not tensors[0].numel():
            self.found.starved.add(path)
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
        if not rule.trusted and not any(p == path for p, _ in self.found.ports):
            why = f"a {type(layer).__name__} computes otherwise than the layer that it is derived from"
            self._decline(path, layer, rule, why, output)
        first = next(iter(tensors_in(output)), None)
        if self.count_uses and first is not None:
            self.found.uses[path] += rule.positions(layer, tensors[0], first) / self._batch_size
        return output

    def _declined(
        self, path: str, layer: nn.Module, rule: LayerRule, why: str, args: Any, kwargs: Any
    ) -> Any:
        """Run a layer that cannot be grown: neither what enters it nor what it makes can be split."""
        self._mode.bar(tensors_in((args, kwargs)), f"they enter the {type(layer).__name__} '{path}': {why}")
        output = self.sealed(lambda: type(layer).forward(layer, *args, **kwargs))
        self._decline(path, layer, rule, why, output)
        return output

    def multiplied(self, path: str, name: str, count: int) -> None:
        if self.count_uses:
            size = self.found.raw[path][name].numel()
            self.found.multiplied[path, name] += count / size / self._batch_size

    def _decline(self, path: str, layer: nn.Module, rule: LayerRule, why: str, output: Any) -> None:
        for tensor in tensors_in(output):
            self._mode.set(tensor, None)
            if tensor.ndim and rule.role == "mixer":
                self.found.declined[path] = why, tensor.shape[rule.neuron_axis(layer, tensor)]

    def sealed(self, call: Callable[[], Any]) -> Any:
        """A layer's own business: it may use its weights, and labels are not followed."""
        self._mode.suspended += 1
        self._mode.inside += 1
        try:
            return call()
        finally:
            self._mode.suspended -= 1
            self._mode.inside -= 1

    def concerns(self, x: Tensor, axis: int) -> bool:
        """Weights of positions are the same for all neurons; such a product is an operator like others."""
        labels = self._mode.get(x)
        with BookKeeping():
            vary = [] if labels is None else self._mode.varying(labels)
        return not any(v for d, v in enumerate(vary) if d != axis % x.ndim)

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
        mode, layer = self._mode, self.found.layers[path]
        axis %= x.ndim
        if port_kind(port) == "through":
            rule, profile = self.found.rules[path], self._passing.pop(path, None)
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
                tiles = 1 if loose_size(self.found.raw[path], port) else self.found.rules[path].tiles(layer)
                self._made[key] = torch.from_numpy(self.found.table.mint(x.shape[axis]))
                rows = self._made[key].view(tiles, -1)
                self.found.table.tie(rows[:1].expand(rows.shape).flatten().numpy(), rows.flatten().numpy())
                self.found.ports[key] = rows[0].clone()
            profile = self._made[key]
        shape = [1] * x.ndim
        shape[axis] = -1
        mode.set(x, profile.view(shape).expand(x.shape))

    def _pass(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor | None:
        """The neurons that a channelwise layer passes on, as the labels of its output are made of them."""
        mode, rule, layer = self._mode, self.found.rules[path], self.found.layers[path]
        labels, size = mode.get(x), rule.port_size(layer, port)
        if labels is None or size is None:
            self.found.passed.add(path)
            return labels
        profile = self._profile(f"'{path}'", x, axis)
        if profile is None:
            return None
        block = rule.block(layer)
        if block > 1 and not self.found.table.join(profile.view(-1, block)):
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
        if key in self.found.ports:
            why = f"a second call of '{key[0]}'"
            self.found.ports[key] = self._mode.unify(self.found.ports[key], labels, why).clone()
        else:
            self.found.ports[key] = labels.clone()

    def _consume(self, path: str, port: Port, x: Tensor, axis: int) -> None:
        mode, layer = self._mode, self.found.layers[path]
        size, tiles, kind = loose_size(self.found.raw[path], port), 1, type(layer).__name__
        if size is None:
            rule = self.found.rules[path]
            size, tiles = rule.port_size(layer, port), rule.tiles(layer)
        if size is not None and mode.get(x) is None and (mode.constants.uniform(x) or not x.numel()):
            self.found.blank[path, port] = size  # zeros before the first step, an expert without samples
            return
        if size is None:
            mode.bar([x], f"the {kind} '{path}' is not linear in the neurons it reads")
            return
        labels = self._profile(f"'{path}'", x, axis)
        if labels is not None and len(labels) != tiles * size:
            mode.bar([x], f"the {kind} '{path}' reads another number of channels")
            labels = None
        if labels is not None:
            labels = mode.merge(labels.view(tiles, size), 0, f"'{path}'")[0]
        self._meet((path, port), labels, size)
