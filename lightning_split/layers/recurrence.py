"""Rules for recurrent layers and their cells.

Each forward pass here computes what the layer's own computes, with operators that can be differentiated
twice, and marks where neurons are read and made. Between the marks activations carry no labels, so that
tracing has nothing to do there: a view gets them right where somebody reads it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from lightning_split.layers.registry import register_layer_rule
from lightning_split.layers.rule import AxisPorts, LayerRule, Marks, Port

__all__: list[str] = []

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

Axes = dict[str, dict[int, AxisPorts]]


class _State(NamedTuple):
    """What a recurrent layer hands from one step to the next; ``c`` for LSTMs only."""

    h: Tensor
    c: Tensor | None

    def rows(self, start: int, stop: int | None = None) -> _State:
        return _State(self.h[start:stop], None if self.c is None else self.c[start:stop])


def _stacked(states: Sequence[_State]) -> _State:
    """States of several samples one below the other."""
    if len(states) == 1:
        return states[0]
    c = [state.c for state in states if state.c is not None]
    return _State(torch.cat([state.h for state in states]), torch.cat(c) if c else None)


def _zero(like: _State, rows: int) -> _State:
    c = None if like.c is None else like.c.new_zeros(rows, *like.c.shape[1:])
    return _State(like.h.new_zeros(rows, *like.h.shape[1:]), c)


def _step(kind: str, x: Tensor, h: Tensor, state: _State | None) -> _State:
    """The next state.

    Args:
        kind: ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``.
        x: What the gates get from the input, side by side.
        h: What they get from the hidden state.
        state: The last state, element by element; ``None`` if it is zero.
    """
    if kind == "LSTM":
        i, f, g, o = (x + h).chunk(4, -1)
        c = torch.sigmoid(i) * torch.tanh(g)
        if state is not None and state.c is not None:
            c = c + torch.sigmoid(f) * state.c
        return _State(torch.sigmoid(o) * torch.tanh(c), c)
    if kind == "GRU":
        (rx, zx, nx), (rh, zh, nh) = x.chunk(3, -1), h.chunk(3, -1)
        z = torch.sigmoid(zx + zh)
        new = (1 - z) * torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
        return _State(new if state is None else new + z * state.h, None)
    return _State((torch.relu if kind == "RNN_RELU" else torch.tanh)(x + h), None)


class _Hidden:
    """Where the neurons of a recurrent layer are made and read.

    All layers and directions of an ``nn.LSTM`` have one ``hidden_size``: its neuron number j is the j-th unit
    of each, and so there is one port for all.
    """

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._seen = False  # whether any matrix has seen them

    def made(self, x: Tensor) -> Tensor:
        """The same values, as the neurons that they are."""
        return self._marks.made("out", x.view_as(x), -1)

    def read(self, x: Tensor) -> Tensor:
        """What a matrix gets to see of the neurons."""
        self._seen = True
        return self._marks.read("in:hidden", self.made(x), -1)

    def done(self, x: Tensor) -> Tensor:
        """The result; after one step from nothing the matrix of states waits for it, and must grow along."""
        if not self._seen:
            self.read(x)
        return x

    def given(self, x: Tensor) -> Tensor:
        """A state that comes from outside: element by element it belongs to the neurons."""
        torch.sub(x, self.made(x.detach().clone()))  # where both meet
        unlabelled: Tensor = self._marks.sealed(lambda: x.view_as(x))
        return unlabelled


class _RecurrentRule(LayerRule):
    """``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``."""

    role = "mixer"

    def axes(self, layer: nn.Module) -> Axes:
        assert isinstance(layer, nn.RNNBase)
        rows: AxisPorts = ("out",) * _GATES[layer.mode]
        found: Axes = {}
        for level, suffix in _places(layer):
            inputs: AxisPorts = ("in:hidden",) * (1 + layer.bidirectional) if level else "in"
            found[f"weight_ih{suffix}"] = {0: rows, 1: inputs}
            found[f"weight_hh{suffix}"] = {0: rows, 1: "in:hidden"}
            if layer.bias:
                found |= {f"bias_ih{suffix}": {0: rows}, f"bias_hh{suffix}": {0: rows}}
        return found

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        assert isinstance(layer, nn.RNNBase)
        layer.input_size, layer.hidden_size = sizes["in"], sizes["out"]
        # New lists, so that the old ones can be put back.
        weights = [layer._parameters.get(name) for name in layer._flat_weights_names]
        layer._flat_weights = weights
        layer._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]
        if all(w is not None and w.is_contiguous() for w in weights):  # and not the outlines of a trial
            layer.flatten_parameters()

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        return -1

    def refusal(self, layer: nn.Module) -> str | None:
        assert isinstance(layer, nn.RNNBase)
        if layer.proj_size:
            return (
                "torch knows a projection (proj_size) by its width, which growth could make that of the cells"
            )
        return None

    def forward(self, layer: nn.Module, marks: Marks, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(layer, nn.RNNBase)
        return _recurrent(layer, marks, *args, **kwargs)


def _places(layer: nn.RNNBase) -> list[tuple[int, str]]:
    """Every layer and direction: the number of the layer, and how the names of its tensors end."""
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    return [(level, f"_l{level}{end}") for level in range(layer.num_layers) for end in ends]


def _recurrent(layer: nn.RNNBase, marks: Marks, input: Tensor | PackedSequence, hx: Any = None) -> Any:
    """The forward pass of a recurrent layer, in a loop over time."""
    hidden = _Hidden(marks)
    packed = isinstance(input, PackedSequence)
    x = marks.read("in", input.data if isinstance(input, PackedSequence) else input, -1)
    batched = packed or x.ndim == 3
    if isinstance(input, PackedSequence):
        sizes = [int(n) for n in input.batch_sizes.tolist()]
    else:
        x = x if batched else x.unsqueeze(1)
        x = x.transpose(0, 1) if layer.batch_first and batched else x
        sizes = []
    places = _places(layer)
    starts: list[_State | None] = [None] * len(places)
    if hx is not None:
        given = [t if batched else t.unsqueeze(1) for t in (hx if layer.mode == "LSTM" else (hx,))]
        if isinstance(input, PackedSequence) and input.sorted_indices is not None:
            given = [t.index_select(1, input.sorted_indices) for t in given]
        h, *c = [hidden.given(t) for t in given]
        starts = [_State(h[k], c[0][k] if c else None) for k in range(len(places))]
    last: list[_State] = []
    outputs: list[Tensor] = []
    for level in range(layer.num_layers):
        if level:
            both = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            both = F.dropout(both, layer.dropout, layer.training) if layer.dropout else both
            read = [hidden.read(part) for part in both.split(outputs[0].shape[-1], -1)]
            x = torch.cat(read, -1) if len(read) > 1 else read[0]
            outputs = []
        for k, (at, suffix) in enumerate(places):
            if at == level:
                made, end = _direction(layer, hidden, suffix, x, sizes, starts[k])
                outputs.append(made)
                last.append(end)
    if layer.batch_first and batched and not packed:
        outputs = [t.transpose(0, 1) for t in outputs]
    outputs = [hidden.made(t if batched else t.squeeze(1)) for t in outputs]
    output: Any = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    order = input.unsorted_indices if isinstance(input, PackedSequence) else None

    def final(states: list[Tensor]) -> Tensor:
        states = states if order is None else [t.index_select(0, order) for t in states]
        return torch.stack([hidden.made(t if batched else t.squeeze(0)) for t in states])

    if isinstance(input, PackedSequence):
        output = PackedSequence(output, *input[1:])
    h_n = hidden.done(final([state.h for state in last]))
    if layer.mode != "LSTM":
        return output, h_n
    return output, (h_n, final([state.c for state in last if state.c is not None]))


def _direction(
    layer: nn.RNNBase, hidden: _Hidden, suffix: str, x: Tensor, sizes: list[int], start: _State | None
) -> tuple[Tensor, _State]:
    """One layer in one direction: the hidden states of all steps, and the last state of each sample.

    Args:
        layer: The layer.
        hidden: Where its neurons are made and read.
        suffix: How the names of its tensors end.
        x: Inputs, ``(T, N, ...)``, or packed.
        sizes: How many samples there are at each step of packed inputs, falling; else empty.
        start: The state at the start, ``None`` for zero.
    """
    w_ih, w_hh, b_ih, b_hh = (
        layer._parameters.get(f"{name}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    assert w_ih is not None
    assert w_hh is not None
    x = F.linear(x, w_ih, b_ih)
    steps = list(x.split(sizes) if sizes else x.unbind(0))
    backwards = suffix.endswith("_reverse")
    state, done = start, []
    if start is not None and sizes and backwards:
        state = start.rows(0, sizes[-1])
    made = []
    for gates in reversed(steps) if backwards else steps:
        n = len(gates)
        if state is not None and len(state.h) > n:  # packed sequences that have ended
            done.append(state.rows(n))
            state = state.rows(0, n)
        elif state is not None and len(state.h) < n:  # those that begin, seen from the end
            begin = len(state.h)
            more = _zero(state, n - begin) if start is None else start.rows(begin, n)
            state = _stacked([state, more])
        if state is not None:
            recurrent = F.linear(hidden.read(state.h), w_hh, b_hh)
        else:
            recurrent = torch.zeros_like(gates) if b_hh is None else b_hh
        state = _step(layer.mode, gates, recurrent, state)
        made.append(state.h)
    assert state is not None
    if backwards:
        made.reverse()
    return torch.cat(made) if sizes else torch.stack(made), _stacked([state, *reversed(done)])


class _CellRule(LayerRule):
    """``nn.RNNCell``, ``nn.LSTMCell`` and ``nn.GRUCell``."""

    role = "mixer"

    def axes(self, layer: nn.Module) -> Axes:
        rows: AxisPorts = ("out",) * _GATES[_cell_kind(layer)]
        return {
            "weight_ih": {0: rows, 1: "in"},
            "weight_hh": {0: rows, 1: "in:hidden"},
            "bias_ih": {0: rows},
            "bias_hh": {0: rows},
        }

    def resize(self, layer: nn.Module, sizes: Mapping[Port, int]) -> None:
        assert isinstance(layer, RNNCellBase)
        layer.input_size, layer.hidden_size = sizes["in"], sizes["out"]

    def neuron_axis(self, layer: nn.Module, activation: Tensor) -> int:
        return -1

    def forward(self, layer: nn.Module, marks: Marks, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(layer, RNNCellBase)
        return _cell(layer, marks, *args, **kwargs)


def _cell(layer: RNNCellBase, marks: Marks, input: Tensor, hx: Any = None) -> Any:
    kind, hidden = _cell_kind(layer), _Hidden(marks)
    b_ih, b_hh = layer._parameters.get("bias_ih"), layer._parameters.get("bias_hh")
    x = F.linear(marks.read("in", input, -1), layer.weight_ih, b_ih)
    state = None
    if hx is not None:
        h, *c = [hidden.given(t) for t in (hx if kind == "LSTM" else (hx,))]
        state = _State(h, c[0] if c else None)
        recurrent = F.linear(hidden.read(h), layer.weight_hh, b_hh)
    else:
        recurrent = torch.zeros_like(x) if b_hh is None else b_hh
    after = _step(kind, x, recurrent, state)
    h = hidden.done(hidden.made(after.h))
    return h if after.c is None else (h, hidden.made(after.c))


def _cell_kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.RNNCell):
        return f"RNN_{layer.nonlinearity.upper()}"
    return "LSTM" if isinstance(layer, nn.LSTMCell) else "GRU"


for _recurrent_type in (nn.RNN, nn.LSTM, nn.GRU):
    register_layer_rule(_recurrent_type, _RecurrentRule())
for _cell_type in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
    register_layer_rule(_cell_type, _CellRule())
