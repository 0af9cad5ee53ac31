"""What labels tell: which neurons each layer reads and makes, in passes over one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_split.architecture import PortKey
from lightning_split.borrowed import Loans, lending, sorted_tensors
from lightning_split.calls import CallMode
from lightning_split.constants import storage_key
from lightning_split.grouping import Findings
from lightning_split.labels import BookKeeping, LabelMode, Owner, stored_once
from lightning_split.layers import LayerRule, Port, layer_tensors, port_kind, rule_for
from lightning_split.loose import loose_size, loose_tensors
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import fixed_statistics, keep_in_mind, tensors_in, undisturbed
from lightning_split.neurons import NeuronTable
from lightning_split.operators import handler_of
from lightning_split.positions import Positional, Positions
from lightning_split.readings import Readings
from lightning_split.tally import Tally
from lightning_split.verification import Run

__all__ = ["Tracer"]

_OUTPUT = "they are part of the model's output"
_LOSS = "they reach the loss without passing a layer"


class Tracer(Watcher):
    """Collects what the runs of one model tell."""

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        example: Any,
        batch_size: int,
        outputs_count: bool,
        follow: Callable[[Any], None],
        positional: Positional,
    ) -> None:
        self.model = model
        self.example = example
        self.positions = Positions(positional)
        self.count_uses = True
        self._run = run
        self._follow = follow
        layers = dict(model.named_modules())
        rules = {path: rule for path, m in layers.items() if (rule := rule_for(m)) is not None}
        raw = {path: loose_tensors(m) for path, m in layers.items()}  # untold while watched
        table = NeuronTable()
        loans = Loans(table, {path: lending(m) for path, m in layers.items()})
        self.found = Findings(layers, rules, raw, Tally(batch_size), loans, table)
        self.seen: dict[bool, Readings] = {}
        self._rows = {  # of the weights behind each port, of layers that read inputs of several lengths
            (path, port): rows
            for path, rule in rules.items()
            if rule.attends
            for port, rows in _rows_of_ports(layers[path]).items()
        }
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
            mode.tally = self.found.tally if self.count_uses else None
            mode.owned, mode.guesses.leaves = sorted_tensors(self.found.layers)
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
        self.found.borrowed |= mode.borrowed
        self.found.adopted |= mode.guesses.adopted
        self.found.added |= mode.guesses.added
        self.found.pairs += mode.pairs
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
        """Run a layer, so that its weights are not taken for those of an operator outside of a layer."""
        mode, rule, tensors = self._mode, self.found.rules[path], tensors_in((args, kwargs))
        self.found.called.add(path)
        if tensors and not tensors[0].numel():
            self.found.starved.add(path)
        if path in self.positions.known:
            return self._along_positions(path, layer, rule, args, kwargs)
        simple = type(rule).forward is LayerRule.forward
        refusal = rule.refusal(layer)
        if refusal is None and simple and not tensors:
            refusal = "its rule describes one input and one output tensor, and it has others"
        if refusal is not None:
            return self._declined(path, layer, rule, refusal, args, kwargs)
        if simple:
            mode.bar(tensors[1:], f"they enter the {type(layer).__name__} '{path}' as a second input")
        own = rule.trusted and not rule.attends  # whether all products are those of its weights
        mode.inside += rule.trusted
        mode.suspended += simple
        self.found.tally.paused += own
        self.found.tally.attending += rule.attends
        try:
            output = call()
        finally:
            self.found.tally.attending -= rule.attends
            self.found.tally.paused -= own
            mode.suspended -= simple
            mode.inside -= rule.trusted
        if not rule.trusted and not any(p == path for p, _ in self.found.ports):
            why = f"a {type(layer).__name__} computes otherwise than the layer that it is derived from"
            self._decline(path, layer, rule, why, output)
            self._wrote(path, output)
        elif not rule.attends:
            self._count(path, layer, tensors, output)
            self._wrote(path, output)
        return output

    def _count(self, path: str, layer: nn.Module, inputs: list[Tensor], output: Any) -> None:
        first = next(iter(tensors_in(output)), None)
        if self.count_uses and inputs and first is not None:
            rule = self.found.rules[path]
            self.found.uses[path] += rule.positions(layer, inputs[0], first) / self._batch_size

    def _wrote(self, path: str, output: Any) -> None:
        first = next(iter(tensors_in(output)), None)
        if self.count_uses and first is not None:
            self.found.tally.wrote(path, self._mode, first)

    def _along_positions(self, path: str, layer: nn.Module, rule: LayerRule, args: Any, kwargs: Any) -> Any:
        """Run a layer that mixes positions, the same for all neurons; it is an operator like others."""
        self._mode.inside += 1
        try:
            output = type(layer).forward(layer, *args, **kwargs)
        finally:
            self._mode.inside -= 1
        for tensor in tensors_in(output):
            width = tensor.shape[rule.neuron_axis(layer, tensor)]
            self.found.declined[path] = "they are positions of other neurons, which can be split", width
        self._wrote(path, output)
        return output

    def _declined(
        self, path: str, layer: nn.Module, rule: LayerRule, why: str, args: Any, kwargs: Any
    ) -> Any:
        """Run a layer that cannot be grown: neither what enters it nor what it makes can be split."""
        self._mode.bar(tensors_in((args, kwargs)), f"they enter the {type(layer).__name__} '{path}': {why}")
        self.found.tally.paused -= 1  # nothing else counts what it multiplies
        try:
            output = self.sealed(lambda: type(layer).forward(layer, *args, **kwargs))
        finally:
            self.found.tally.paused += 1
        self._decline(path, layer, rule, why, output)
        self._wrote(path, output)
        return output

    def multiplied(self, path: str, name: str, count: int, output: Tensor) -> None:
        """Count a product with a raw matrix."""
        if self.count_uses:
            size = self.found.layers[path].get_parameter(name).numel()
            self.found.multiplied[path, name] += count / size / self._batch_size
            self._wrote(path, output)

    def _decline(self, path: str, layer: nn.Module, rule: LayerRule, why: str, output: Any) -> None:
        for tensor in tensors_in(output):
            self._mode.set(tensor, None)
            if tensor.ndim and rule.role == "mixer":
                self.found.declined[path] = why, tensor.shape[rule.neuron_axis(layer, tensor)]

    def _simple(self, path: str) -> bool:
        """Whether a layer has one input and one output, and its own forward pass."""
        rule = self.found.rules[path]
        return rule.role == "mixer" and type(rule).forward is LayerRule.forward

    def sealed(self, call: Callable[[], Any]) -> Any:
        """A layer's own business: it may use its weights, and labels are not followed."""
        self._mode.suspended += 1
        self._mode.inside += 1
        self.found.tally.paused += 1
        try:
            return call()
        finally:
            self._mode.suspended -= 1
            self._mode.inside -= 1
            self.found.tally.paused -= 1

    def concerns(self, owner: Owner, x: Tensor, axis: int, makes: int | None) -> bool:
        """Weights of positions are the same for all neurons; such a product is an operator like others."""
        if owner in self.positions.known or owner[0] in self.positions.known:
            return False
        if self._lies_otherwise(x, axis):
            parameter = self.found.layers[owner[0]].get_parameter(owner[1])
            count = None if makes is None else parameter.shape[makes]
            return not self.positions.makes_positions(owner, self._makers(x), count)
        self.positions.along(owner)
        return True

    def _lies_otherwise(self, x: Tensor, axis: int) -> bool:
        """Whether neurons lie along another axis than this one."""
        labels = self._mode.get(x)
        with BookKeeping():
            vary = [] if labels is None else self._mode.varying(labels)
        return any(v for d, v in enumerate(vary) if d != axis % x.ndim)

    def _makers(self, x: Tensor) -> set[str]:
        """The layers whose neurons these are."""
        labels = self._mode.get(x)
        if labels is None:
            return set()
        with BookKeeping():
            ids = stored_once(labels)
            return {key[0] for key, made in self._made.items() if bool(torch.isin(ids, made).any())}

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
        rows = self._rows.get((path, port))
        if rows is not None and self.count_uses:
            self.found.made[path, port] += x.numel() / rows / self._batch_size
            self.found.tally.wrote(path, self._mode, x)
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
                self._made[key] = torch.from_numpy(self.found.table.mint(x.shape[axis], tiles))
                rows = self._made[key].view(tiles, -1)
                self.found.table.tie(rows[:1].expand(rows.shape).flatten().numpy(), rows.flatten().numpy())
                self.found.ports[key] = rows[0].clone()
            profile = self._made[key]
            if loose_size(self.found.raw[path], port) is not None or self.found.rules[path].linear:
                mode.lines.begin(x)
        shape = [1] * x.ndim
        shape[axis] = -1
        mode.set(x, profile.view(shape).expand(x.shape))

    def _pass(self, path: str, port: Port, x: Tensor, axis: int) -> Tensor | None:
        """The neurons that a channelwise layer passes on, as the labels of its output are made of them."""
        mode, rule, layer = self._mode, self.found.rules[path], self.found.layers[path]
        labels, size = mode.get(x), rule.port_size(layer, port)
        self.found.passed.add(path)
        if labels is None or size is None:
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
        if size is None and self._lies_otherwise(x, axis) and self._simple(path):
            self.positions.across(path, self._makers(x))
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


def _rows_of_ports(layer: nn.Module) -> dict[Port, int]:
    """How many rows of a layer's matrices make the neurons of each port."""
    rows: dict[Port, int] = {}
    for tensor, axes in layer_tensors(layer).values():
        for block in axes.get(0, ()) if tensor.ndim > 1 else ():
            rows[block.port] = rows.get(block.port, 0) + block.size * block.multiple
    return rows
