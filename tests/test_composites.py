"""Layers with several ports: recurrence, attention, bilinear forms."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning_split import fit_to_state_dict, split_neurons, trace
from lightning_split.architecture import Architecture
from lightning_split.curvature import SplittingOperator
from lightning_split.layers import rule_for
from lightning_split.layers.attention import WideMultiheadAttention
from lightning_split.marking import Watcher, watched
from lightning_split.measuring import tensors_in
from lightning_split.optim import carry_state
from lightning_split.surgery import Split, Surgery
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from exactness import assert_splits_exactly, depends_on_every_group, outputs, randomise, splits
from test_exactness import Block
from test_optim import expected, snapshot

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]

LENGTHS = torch.tensor([2, 3, 1, 3])
PADDING = torch.arange(3) >= LENGTHS[:, None]
CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)


def rnd(*shape: int) -> Tensor:
    return torch.randn(*shape)


def packed(x: Tensor, *, ordered: bool = False) -> PackedSequence:
    """Sequences of several lengths, ``(T, N, ...)``."""
    lengths = LENGTHS.sort(descending=True)[0] if ordered else LENGTHS
    return pack_padded_sequence(x, lengths, enforce_sorted=ordered)


# the rules compute what the layers compute -----------------------------------------------------------

# layer, arguments, keyword arguments
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
MHA = nn.MultiheadAttention


def _recurrent_calls() -> dict[str, Callable[[], Call]]:
    found: dict[str, Callable[[], Call]] = {}
    for cls in (nn.RNN, nn.LSTM, nn.GRU):
        n = cls.__name__

        def state(*shape: int, cls: type = cls) -> Any:
            return (rnd(*shape), rnd(*shape)) if cls is nn.LSTM else rnd(*shape)

        found |= {
            f"{n} plain": lambda c=cls: (c(3, 4), (rnd(5, 2, 3),), {}),
            f"{n} batch first": lambda c=cls: (c(3, 4, 2, batch_first=True), (rnd(2, 5, 3),), {}),
            f"{n} deep": lambda c=cls, s=state: (
                c(3, 4, 3, bidirectional=True, bias=False),
                (rnd(5, 2, 3), s(6, 2, 4)),
                {},
            ),
            f"{n} unbatched": lambda c=cls, s=state: (
                c(3, 4, 2, bidirectional=True, batch_first=True),
                (rnd(5, 3),),
                {"hx": s(4, 4)},
            ),
            f"{n} packed": lambda c=cls, s=state: (
                c(3, 4, 2, bidirectional=True),
                (packed(rnd(3, 4, 3)), s(4, 4, 4)),
                {},
            ),
            f"{n} packed, no state": lambda c=cls: (
                c(3, 4, bidirectional=True, batch_first=True),
                (packed(rnd(3, 4, 3), ordered=True),),
                {},
            ),
        }
    for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        n = cell.__name__

        def state(*shape: int, cls: type = cell) -> Any:
            return (rnd(*shape), rnd(*shape)) if cls is nn.LSTMCell else rnd(*shape)

        found |= {
            n: lambda c=cell: (c(3, 4), (rnd(2, 3),), {}),
            f"{n} with state": lambda c=cell, s=state: (c(3, 4, bias=False), (rnd(2, 3), s(2, 4)), {}),
            f"{n} unbatched": lambda c=cell, s=state: (c(3, 4), (rnd(3), s(4)), {}),
        }
    found["RNN relu"] = lambda: (nn.RNN(3, 4, nonlinearity="relu"), (rnd(5, 2, 3),), {})
    found["RNNCell relu"] = lambda: (nn.RNNCell(3, 4, nonlinearity="relu"), (rnd(2, 3), rnd(2, 4)), {})
    return found


def _self_attended(layer: nn.Module, *shape: int, **options: Any) -> Call:
    x = rnd(*shape)
    return layer, (x, x, x), options


CALLS: dict[str, Callable[[], Call]] = _recurrent_calls() | {
    "attention": lambda: _self_attended(MHA(6, 2), 3, 4, 6),
    "attention batch first": lambda: _self_attended(MHA(6, 3, batch_first=True), 4, 3, 6),
    "attention without bias": lambda: _self_attended(MHA(6, 2, bias=False), 3, 4, 6, need_weights=False),
    "attention unbatched": lambda: _self_attended(MHA(6, 2, batch_first=True), 3, 6),
    "attention weights of each head": lambda: _self_attended(MHA(6, 2), 3, 4, 6, average_attn_weights=False),
    "attention masks": lambda: _self_attended(
        MHA(6, 2), 3, 4, 6, key_padding_mask=PADDING, attn_mask=CAUSAL, need_weights=False
    ),
    "attention causal": lambda: _self_attended(
        MHA(6, 2, batch_first=True), 4, 3, 6, attn_mask=CAUSAL, is_causal=True, need_weights=False
    ),
    "attention causal, padded": lambda: _self_attended(
        MHA(6, 2, batch_first=True), 4, 3, 6, attn_mask=CAUSAL, is_causal=True, key_padding_mask=PADDING
    ),
    "attention to nothing": lambda: _self_attended(
        MHA(6, 2), 3, 4, 6, key_padding_mask=torch.ones(4, 3, dtype=torch.bool), need_weights=False
    ),
    "attention, a mask for each head": lambda: _self_attended(MHA(6, 2), 3, 4, 6, attn_mask=rnd(8, 3, 3)),
    "attention, unbatched with padding": lambda: _self_attended(
        MHA(6, 2), 3, 6, key_padding_mask=torch.tensor([False, True, False])
    ),
    "attention to another sequence": lambda: (MHA(6, 2), (rnd(3, 4, 6), *[rnd(5, 4, 6)] * 2), {}),
    "attention of other widths": lambda: (
        MHA(6, 2, kdim=3, vdim=5),
        (rnd(2, 4, 6), rnd(5, 4, 3), rnd(5, 4, 5)),
        {},
    ),
    "attention of other widths without bias": lambda: (
        MHA(6, 2, bias=False, kdim=3, vdim=5, batch_first=True),
        (rnd(4, 2, 6), rnd(4, 5, 3), rnd(4, 5, 5)),
        {"need_weights": False},
    ),
    "bilinear": lambda: (nn.Bilinear(3, 4, 5), (rnd(2, 7, 3), rnd(2, 7, 4)), {}),
    "bilinear by name": lambda: (nn.Bilinear(3, 4, 5), (), {"input2": rnd(2, 4), "input1": rnd(2, 3)}),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_the_rule_computes_what_the_layer_computes(name: str, train: bool) -> None:
    """Watched and unwatched passes give the same outputs, number by number and in the same structure."""
    layer, args, kwargs = CALLS[name]()
    for p in layer.parameters():  # biases of attention start at zero
        nn.init.normal_(p, std=0.5)
    layer.train(train)
    with torch.no_grad():
        theirs = layer(*args, **kwargs)
        with watched(layer, Watcher()):
            ours = layer(*args, **kwargs)
    assert type(ours) is type(theirs)
    found, wanted = tensors_in(ours), tensors_in(theirs)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith("attention")])
def test_the_class_of_a_grown_attention_computes_the_same_at_any_width(name: str) -> None:
    """The forward pass that surgery puts in, on weights that the original's can still run."""
    layer, args, kwargs = CALLS[name]()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        theirs = layer(*args, **kwargs)
        layer.__class__ = WideMultiheadAttention
        ours = layer(*args, **kwargs)
    for a, b in zip(tensors_in(ours), tensors_in(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# networks -------------------------------------------------------------------------------------------


def _steps(model: Any, x: Tensor) -> Tensor:
    """A user's own loop over time, from no state."""
    state = None
    for step in x:
        state = model.r(step, state)
    return model.o(state[0] if isinstance(state, tuple) else state)


def _steps_from_zeros(model: Any, x: Tensor) -> Tensor:
    state = torch.zeros(x.shape[1], model.r.hidden_size)
    for step in x:
        state = model.r(step, state)
    return model.o(state)


def _from_encoder(model: Any, x: Tensor) -> Tensor:
    _, state = model.e(x)
    return model.o(model.d(x, state)[0])


def _from_layer(model: Any, x: Tensor) -> Tensor:
    first = torch.tanh(model.i(x[0]))[None]
    return model.o(model.r(x, first)[0])


def _last_of_packed(model: Any, x: Tensor) -> Tensor:
    _, last = model.r(packed(x))
    return model.o(last[-1])


def _decoder(model: Any, x: Tensor) -> Tensor:
    return model.o(model.a(x, torch.tanh(x)))


def _padded(model: Any, x: Tensor) -> Tensor:
    return model.o(model.a(x, src_key_padding_mask=PADDING))


def _encoder(norm_first: bool = False, activation: str = "relu") -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 7, 0.0, activation, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=not norm_first)


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: dict[str, tuple[int, tuple[str, ...]]]  # by hand: incoming weights of a neuron, consumers


RO = ("r", "o")
ENCODED = {
    "a.layers.0.self_attn": (2 * 7, ("a.layers.0.self_attn.out_proj",)),
    "a.layers.0.self_attn#2": (2 * 7, ("a.layers.0.self_attn",)),
    "a.layers.0.linear1": (7, ("a.layers.0.linear2",)),
}
CASES: dict[str, Case] = {
    "lstm": Case(
        lambda: Block(lambda s, x: s.o(s.r(x)[0]), r=nn.LSTM(3, 4), o=nn.Linear(4, 2)),
        (3, 2, 3),
        {"r": (4 * (3 + 4 + 2), RO)},
    ),
    "deep lstm": Case(
        lambda: Block(
            lambda s, x: s.o(s.r(x)[0]),
            r=nn.LSTM(3, 3, 2, bidirectional=True, batch_first=True),
            o=nn.Linear(6, 2),
        ),
        (2, 2, 3),
        {"r": (2 * 4 * (3 + 3 + 2) + 2 * 4 * (6 + 3 + 2), RO)},
    ),
    "gru": Case(
        lambda: Block(
            lambda s, x: s.o(s.r(torch.tanh(s.i(x)))[1][-1]),
            i=nn.Linear(2, 3),
            r=nn.GRU(3, 4, 2, bias=False),
            o=nn.Linear(4, 2),
        ),
        (3, 2, 2),
        {"i": (3, ("r",)), "r": (3 * (3 + 4) + 3 * (4 + 4), RO)},
    ),
    "rnn": Case(
        lambda: Block(lambda s, x: s.o(s.r(x)[0]), r=nn.RNN(3, 3, bidirectional=True), o=nn.Linear(6, 2)),
        (3, 2, 3),
        {"r": (2 * (3 + 3 + 2), RO)},
    ),
    "cell states": Case(
        lambda: Block(lambda s, x: s.o(s.r(x)[1][1][0]), r=nn.LSTM(3, 4), o=nn.Linear(4, 2)),
        (3, 2, 3),
        {"r": (4 * (3 + 4 + 2), RO)},
    ),
    "packed": Case(
        lambda: Block(_last_of_packed, r=nn.GRU(3, 4, bidirectional=True), o=nn.Linear(4, 2)),
        (3, 4, 3),
        {"r": (2 * 3 * (3 + 4 + 2), RO)},
    ),
    "rnn cell": Case(lambda: Block(_steps, r=nn.RNNCell(3, 4), o=nn.Linear(4, 2)), (3, 2, 3), {"r": (9, RO)}),
    "lstm cell": Case(
        lambda: Block(_steps, r=nn.LSTMCell(3, 4), o=nn.Linear(4, 2)), (3, 2, 3), {"r": (4 * 9, RO)}
    ),
    "gru cell": Case(
        lambda: Block(_steps, r=nn.GRUCell(3, 4, bias=False), o=nn.Linear(4, 2)),
        (3, 2, 3),
        {"r": (3 * 7, RO)},
    ),
    "gru cell from zeros": Case(
        lambda: Block(_steps_from_zeros, r=nn.GRUCell(3, 4), o=nn.Linear(4, 2)),
        (3, 2, 3),
        {"r": (3 * 9, RO)},
    ),
    "one step": Case(
        lambda: Block(lambda s, x: s.o(s.r(x)[1][0]), r=nn.LSTM(3, 4), o=nn.Linear(4, 2)),
        (1, 2, 3),
        {"r": (4 * 9, RO)},
    ),
    "one step both ways": Case(
        lambda: Block(
            lambda s, x: s.o(s.r(x)[0]), r=nn.RNN(3, 4, bidirectional=True, bias=False), o=nn.Linear(8, 2)
        ),
        (1, 2, 3),
        {"r": (2 * 7, RO)},
    ),
    "one step of a cell": Case(
        lambda: Block(lambda s, x: s.o(s.r(x)), r=nn.GRUCell(3, 4), o=nn.Linear(4, 2)),
        (2, 3),
        {"r": (3 * 9, RO)},
    ),
    "encoder and decoder": Case(
        lambda: Block(_from_encoder, e=nn.LSTM(3, 3), d=nn.LSTM(3, 3), o=nn.Linear(3, 2)),
        (2, 2, 3),
        {"e": (2 * 4 * (3 + 3 + 2), ("e", "d", "o"))},
    ),
    "state of a layer": Case(
        lambda: Block(_from_layer, i=nn.Linear(3, 4), r=nn.GRU(3, 4), o=nn.Linear(4, 2)),
        (3, 2, 3),
        {"i": (4 + 3 * 9, RO)},
    ),
    "attention": Case(
        lambda: Block(
            lambda s, x: s.o(s.a(*[torch.tanh(s.i(x))] * 3)[0]),
            i=nn.Linear(3, 6),
            a=MHA(6, 2, batch_first=True),
            o=nn.Linear(6, 2),
        ),
        (2, 3, 3),
        {"i": (4, ("a",)), "a": (2 * 7, ("a.out_proj",)), "a#2": (2 * 7, ("a",)), "a.out_proj": (7, ("o",))},
    ),
    "attention of other widths": Case(
        lambda: Block(
            lambda s, x: s.o(s.a(s.q(x), s.k(x), s.v(x), need_weights=False)[0]),
            **{"q": nn.Linear(3, 6), "k": nn.Linear(3, 3), "v": nn.Linear(3, 4)},
            a=MHA(6, 2, kdim=3, vdim=4, bias=False),
            o=nn.Linear(6, 2),
        ),
        (3, 2, 3),
        {
            **dict.fromkeys("qkv", (4, ("a",))),
            "a": (2 * 4, ("a.out_proj",)),
            "a#2": (2 * 6, ("a",)),
            "a.out_proj": (6, ("o",)),
        },
    ),
    "encoder": Case(
        lambda: Block(lambda s, x: s.o(s.a(x)), a=_encoder(), o=nn.Linear(6, 2)), (4, 3, 6), ENCODED
    ),
    "encoder, norm first": Case(
        lambda: Block(lambda s, x: s.o(s.a(x)), a=_encoder(True, "gelu"), o=nn.Linear(6, 2)),
        (4, 3, 6),
        ENCODED,
    ),
    "encoder of padded sequences": Case(
        lambda: Block(_padded, a=_encoder(activation="gelu"), o=nn.Linear(6, 2)), (4, 3, 6), ENCODED
    ),
    "decoder": Case(
        lambda: Block(_decoder, a=nn.TransformerDecoderLayer(6, 2, 7, 0.0, "gelu"), o=nn.Linear(6, 2)),
        (3, 2, 6),
        {
            "a.self_attn": (14, ("a.self_attn.out_proj",)),
            "a.self_attn#2": (14, ("a.self_attn",)),
            "a.multihead_attn": (14, ("a.multihead_attn.out_proj",)),
            "a.multihead_attn#2": (14, ("a.multihead_attn",)),
            "a.linear1": (7, ("a.linear2",)),
        },
    ),
    "bilinear": Case(
        lambda: Block(
            lambda s, x: s.o(torch.tanh(s.b(torch.tanh(s.i(x)), torch.tanh(s.j(x))))),
            i=nn.Linear(2, 3),
            j=nn.Linear(2, 4),
            b=nn.Bilinear(3, 4, 5),
            o=nn.Linear(5, 2),
        ),
        (6, 2),
        {"i": (3, ("b",)), "j": (3, ("b",)), "b": (13, ("o",))},
    ),
    "bilinear form of one layer": Case(
        lambda: Block(
            lambda s, x: s.b(*[torch.tanh(s.i(x))] * 2), i=nn.Linear(2, 3), b=nn.Bilinear(3, 3, 2, bias=False)
        ),
        (6, 2),
        {"i": (3, ("b",))},
    ),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    case = CASES[name]
    model, x = case.model(), rnd(*case.shape)
    randomise(model, x)
    return model.eval(), x


def grown(name: str, times: int = 1) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network before and after neurons of every group were split and moved a little."""
    model, x = network(name)
    wide, rng = copy.deepcopy(model), np.random.default_rng(1)
    for _ in range(times):
        arch = trace(wide, x)
        moved = [
            Split(s.group, s.neuron, s.weights, 0.1 * torch.randn_like(s.displacements))
            for s in splits(arch, rng, "copies")
        ]
        split_neurons(wide, moved, arch=arch)
    return model, wide, x


@pytest.mark.parametrize("name", CASES)
def test_the_groups_are_those_that_must_exist(name: str) -> None:
    """Every group, its number of incoming weights and its consumers, against lists written by hand."""
    model, x = network(name)
    arch = trace(model, x)
    assert {g.name: (g.dim, g.consumers) for g in arch.groups} == CASES[name].groups, str(arch)
    assert not depends_on_every_group(model, x, arch)


@pytest.mark.parametrize("name", CASES)
def test_splits_are_exact_again_and_again(name: str) -> None:
    """Copies and ghosts of all groups, four growths one upon the other, in eval and in training mode."""
    model, x = network(name)
    assert_splits_exactly(model, x, rounds=2)


@pytest.mark.parametrize("group", ENCODED)
@pytest.mark.parametrize("name", ["encoder", "encoder, norm first", "encoder of padded sequences"])
def test_a_transformer_layer_that_grew_in_one_place_only_runs_by_its_inference_kernel(
    name: str, group: str
) -> None:
    """The kernel stays for a wider feed-forward part, and is kept away from wider values."""
    model, x = network(name)
    arch = trace(model, x)
    before = outputs(model, x, False)[0]
    split_neurons(model, [Split(group, 1, (2.0, -1.0), torch.zeros(2, arch.group(group).dim))], arch=arch)
    torch.testing.assert_close(outputs(model, x, False)[0], before, rtol=1e-10, atol=1e-12)


def test_heads_of_a_single_channel_do_not_grow_wrongly() -> None:
    """Where channels of heads lie side by side, offspring could not stand beside their parents."""
    model = Block(lambda s, x: s.o(s.a(x, x, x)[0]), a=MHA(3, 3), o=nn.Linear(3, 2))
    x = rnd(3, 2, 3)
    randomise(model, x)
    assert_splits_exactly(model, x)


# curvature ------------------------------------------------------------------------------------------

LINEAR = ["attention", "decoder"]
CURVED = ["lstm", "deep lstm", "gru", "rnn", "lstm cell", "gru cell", "packed", "cell states", "bilinear"]
CURVED += ["encoder and decoder", "state of a layer", *LINEAR]


@pytest.mark.parametrize("name", CURVED)
def test_the_remainder_of_the_prediction_falls_as_the_fourth_power(name: str) -> None:
    """Rule 3: a neuron of every group at once, (1/2, 1/2) along +-v; half the step, 1/16 of the rest."""
    model, x = network(name)
    target = outputs(model, x, False)[0] + 1.0

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return (m(batch) - target).square().mean()

    arch = trace(model, x)
    vectors = {}
    for group in arch.groups:
        v = torch.zeros(group.width, group.dim)
        v[-1] = torch.randn(group.dim)
        vectors[group.name] = v / v.norm()
    products = SplittingOperator(model, arch, [x], loss, surrogate_beta=None).matvec(vectors)
    curvatures = {n: float((products[n] * v).sum()) for n, v in vectors.items()}
    for group, curvature in curvatures.items():  # projections of attention are linear, before and after it
        assert (abs(curvature) < 1e-15) == (name in LINEAR and group != "i" and "linear" not in group)

    def remainder(step: float) -> float:
        wide, found = copy.deepcopy(model), []
        for group in arch.groups:
            v = step * vectors[group.name][-1]
            found.append(Split(group.name, group.width - 1, (0.5, 0.5), torch.stack([v, -v])))
        split_neurons(wide, found, arch=arch)
        with torch.no_grad():
            change = loss(wide, x) - loss(model, x)
        return float(change) - 0.5 * step**2 * sum(curvatures.values())

    assert 13 < remainder(0.08) / remainder(0.04) < 19


# after growth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_seed_sized_network_takes_a_grown_checkpoint(name: str) -> None:
    """Names of tensors stay the same; sizes follow from shapes, both up and down."""
    model, wide, x = grown(name, 2)
    seed = copy.deepcopy(model)
    fit_to_state_dict(seed, wide.state_dict())
    seed.load_state_dict(wide.state_dict())
    torch.testing.assert_close(outputs(seed, x, False), outputs(wide, x, False), rtol=0, atol=1e-12)
    assert repr(seed) == repr(wide)
    fit_to_state_dict(wide, model.state_dict())
    wide.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(wide, x, False), outputs(model, x, False), rtol=0, atol=1e-12)
    assert [type(m) for m in wide.modules()] == [type(m) for m in model.modules()]
    assert repr(wide) == repr(model)


def _everything(model: nn.Module) -> list[Any]:
    """Classes, attributes and tensors, all of them by identity."""
    found: list[Any] = []
    for module in model.modules():
        found.append(type(module))
        for name, value in vars(module).items():
            stores = name in ("_parameters", "_buffers")
            found += [name, {k: id(t) for k, t in value.items()} if stores else id(value)]
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_growth_is_taken_back_bit_for_bit(name: str) -> None:
    """Classes, attributes and tensors are the very ones from before."""
    model, x = network(name)
    arch = trace(model, x)
    before, values = _everything(model), copy.deepcopy(model.state_dict())
    surgery = Surgery(model, splits(arch, np.random.default_rng(0), "ghosts"), arch)
    surgery.apply()
    surgery.displace()
    assert _everything(model) != before
    surgery.revert()
    assert _everything(model) == before
    for name_of, value in model.state_dict().items():
        assert torch.equal(value, values[name_of])


@pytest.mark.parametrize("name", CASES)
def test_grown_layers_are_copied_pickled_and_trained(name: str) -> None:
    """Copies compute the same; every parameter gets a gradient of its new shape, twice."""
    _, wide, x = grown(name)
    again = copy.deepcopy(wide)
    for path, child in wide.named_children():
        setattr(again, path, pickle.loads(pickle.dumps(child)))
    torch.testing.assert_close(outputs(again, x, True), outputs(wide, x, True), rtol=0, atol=0)
    optimizer = torch.optim.Adam(again.train().parameters())
    losses = []
    for _ in range(2):
        loss = again(x).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in again.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["deep lstm", "gru", "lstm cell", "attention", "attention of other widths"])
def test_the_optimizer_follows_the_gates_and_the_heads(name: str) -> None:
    """Every entry of Adam's moments goes with the row and column that it belongs to."""
    model, x = network(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    arch = trace(model, x)
    before = snapshot(optimizer)
    moved = [Split(g.name, 1, (-1.0, 2.0), torch.zeros(2, g.dim)) for g in arch.groups]
    replaced = split_neurons(model, moved, arch=arch)
    carry_state(optimizer, replaced)
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    for old, new in replaced.items():
        for entry, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            torch.testing.assert_close(
                optimizer.state[new.new][entry], expected(before[old][entry], new, power), rtol=0, atol=0
            )


def test_grown_layers_print_their_new_size() -> None:
    """What a user sees of a layer is what it is."""
    _, wide, _ = grown("deep lstm")
    width = trace(wide, rnd(2, 2, 3)).groups[0].width
    assert repr(wide.r) == f"LSTM(3, {width}, num_layers=2, batch_first=True, bidirectional=True)"
    _, wide, _ = grown("lstm cell")
    assert repr(wide.r) == f"LSTMCell(3, {wide.r.weight_hh.shape[1]})"
    _, wide, _ = grown("attention")
    values = wide.a.out_proj.in_features
    queries = (len(wide.a.in_proj_weight) - values) // 2
    assert isinstance(wide.a, nn.MultiheadAttention)
    shown = f"WideMultiheadAttention(\n  num_heads=2, query_width={queries}, value_width={values}\n"
    assert shown in repr(wide.a)
    _, wide, _ = grown("bilinear")
    assert f"in1_features={wide.i.out_features}, in2_features={wide.j.out_features}" in repr(wide.b)


def test_grown_layers_say_their_new_widths() -> None:
    """Attributes that other code may ask, and the list by which a recurrent layer hands out its weights."""
    _, wide, _ = grown("attention of other widths")
    assert (wide.a.kdim, wide.a.vdim) == (wide.k.out_features, wide.v.out_features)
    for name in ("deep lstm", "gru", "rnn"):
        model, x = network(name)
        arch = trace(model, x)
        split_neurons(model, splits(arch, np.random.default_rng(0), "copies"), arch=arch)
        assert not model.r._weights_have_changed()
        assert [id(w) for w in model.r._flat_weights] == [id(w) for w in model.r.parameters()]


def test_dropout_between_the_layers_is_part_of_the_watched_pass() -> None:
    """A watched pass in training mode drops as many values as the layer's own, and traces alike."""
    layer = nn.LSTM(3, 50, 2, dropout=0.9)
    nn.init.zeros_(layer.weight_hh_l1)
    with torch.no_grad():
        layer.weight_ih_l1.copy_(torch.eye(50).repeat(4, 1))
        layer.bias_ih_l1.fill_(0.0)
        layer.bias_hh_l1.fill_(0.0)
        with watched(layer, Watcher()):
            ours = layer(rnd(4, 8, 3))[0][0]
        theirs = layer(rnd(4, 8, 3))[0][0]
    for found in (ours, theirs):
        assert 0.85 < float((found == 0).double().mean()) < 0.95
    model = Block(lambda s, x: s.o(s.r(x)[0]), r=nn.LSTM(3, 4, 2, dropout=0.5), o=nn.Linear(4, 2))
    assert trace(model, rnd(3, 2, 3)).widths == {"r": 4}


# what is refused --------------------------------------------------------------------------------------


class Own(nn.MultiheadAttention):
    """A class of the user's, with nothing new."""


def _alone(layer: nn.Module, width: int = 6) -> nn.Module:
    if isinstance(layer, nn.MultiheadAttention):
        return Block(lambda s, x: s.o(s.r(x, x, x)[0]), r=layer, o=nn.Linear(width, 2))
    return Block(lambda s, x: s.o(s.r(x)[0]), r=layer, o=nn.Linear(width, 2))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "projection": (lambda: _alone(nn.LSTM(6, 4, proj_size=3), 3), "proj_size"),
    "added keys": (lambda: _alone(MHA(6, 2, add_bias_kv=True)), "add_bias_kv"),
    "added zeros": (lambda: _alone(MHA(6, 2, add_zero_attn=True)), "add_zero_attn"),
    "derived class": (lambda: _alone(Own(6, 2)), "derived from nn.MultiheadAttention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_grow_is_refused_with_the_reason(name: str) -> None:
    """The layer's own forward pass runs, and neither it nor what it reads is splittable."""
    make, reason = REFUSED[name]
    model = nn.Sequential(nn.Linear(3, 6), make())
    x = rnd(3, 2, 3)
    arch = trace(model, x)
    assert not arch.groups
    why = {u.name: u.reason for u in arch.unsplittable}
    assert reason in why["1.r"]
    assert reason in why["0"]
    assert rule_for(model[1].r) is not None


def test_a_learned_initial_state_grows_along() -> None:
    """It holds a value for every neuron; a state that the model is given does not."""
    for cls in (nn.LSTM, nn.GRU, nn.RNN):

        def run(s: Any, x: Tensor, cls: type = cls) -> Tensor:
            return s.o(s.r(x, (s.h, s.h) if cls is nn.LSTM else s.h)[0])

        model = Block(run, r=cls(3, 4), o=nn.Linear(4, 2), h=nn.Parameter(rnd(1, 2, 4)))
        randomise(model, rnd(3, 2, 3))
        arch = assert_splits_exactly(model, rnd(3, 2, 3))
        assert arch.group("r").channelwise == ("",)

        arch = trace(Block(lambda s, x: s.r(*x)[0], r=nn.GRU(3, 4)), (rnd(3, 2, 3), rnd(1, 2, 4)))
        assert not arch.groups


def test_neurons_go_through_packing_and_padding() -> None:
    """Both move samples and steps only."""

    def run(s: Any, x: Tensor) -> Tensor:
        return s.o(pad_packed_sequence(s.r(packed(torch.tanh(s.i(x))))[0])[0])

    model = Block(run, i=nn.Linear(3, 3), r=nn.GRU(3, 4), o=nn.Linear(4, 2))
    x = rnd(3, 4, 3)
    randomise(model, x)
    arch: Architecture = assert_splits_exactly(model, x)
    assert {"i", "r"} == {g.name for g in arch.groups}


def test_a_state_as_wide_as_other_neurons_ties_the_cell_to_them() -> None:
    """``zeros_like`` of what feeds the cell is its first state."""

    def run(s: Any, x: Tensor) -> Tensor:
        e = torch.tanh(s.i(x))
        h = torch.zeros_like(e)
        for _ in range(2):
            h = s.c(e, h)
        return s.o(h)

    model, x = Block(run, i=nn.Linear(3, 4), c=nn.GRUCell(4, 4), o=nn.Linear(4, 2)), rnd(4, 3)
    randomise(model, x)
    assert assert_splits_exactly(model, x).group("i").producers == ("i", "c")


def test_keys_are_what_reads_queries() -> None:
    """One group: rows of queries make its neurons, rows of keys are their outgoing weights."""
    model, x = network("attention")
    group = trace(model, x).group("a#2")
    assert (group.width, group.producers, group.consumers, group.paired) == (3, ("a",), ("a",), True)
    rows = {
        part: [(b.tensor, b.rows.tolist()) for b in getattr(group, part)] for part in ("theta", "outgoing")
    }
    queries, keys = [[0, 3], [1, 4], [2, 5]], [[6, 9], [7, 10], [8, 11]]
    assert rows["theta"] == [("in_proj_weight", queries), ("in_proj_bias", queries)]
    assert rows["outgoing"] == [("in_proj_weight", keys), ("in_proj_bias", keys)]
