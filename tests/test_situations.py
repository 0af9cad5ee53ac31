"""What people's models do: every situation either grows exactly or is refused with its reason."""

from __future__ import annotations

import functools
import random
import re
from collections import deque, namedtuple
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_split import TopK, grow, split_neurons, trace
from lightning_split.architecture import Architecture
from lightning_split.measuring import tensors_in
from lightning_split.surgery import Split
from lightning_split.tracing import trace_step
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from exactness import splits
from networks import Residual, randomised
from test_exactness import Block

pytestmark = pytest.mark.usefixtures("double")


class Net(Block):
    """Layers, and the function of any inputs that connects them."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.fwd(self, *inputs, **named)


def net(fwd: Callable[..., Any], **parts: Any) -> Net:
    """Such a network with random parameters; tensors that are no parameters become buffers."""
    model = Net(fwd)
    for name, part in parts.items():
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            model.register_buffer(name, part)
        else:
            setattr(model, name, part)
    randomised(model)
    return model


def lin(i: int, o: int, **options: Any) -> nn.Linear:
    return nn.Linear(i, o, **options)


def chain(between: Callable[[Tensor], Tensor] = lambda h: h, **changed: nn.Module) -> Net:
    """Four layers of widths 5, 6, 4 and 2, with something between the second and the third."""
    parts = {"a": lin(3, 5), "b": lin(5, 6), "c": lin(6, 4), "d": lin(4, 2)} | changed
    if isinstance(between, nn.Module):
        parts["between"] = between
    return net(lambda m, x: m.d(torch.tanh(m.c(between(torch.tanh(m.b(torch.tanh(m.a(x)))))))), **parts)


def batch(rows: int = 4, columns: int = 3) -> Tensor:
    return torch.randn(rows, columns)


# what must hold ------------------------------------------------------------------------------------


def answers(model: nn.Module, train: bool, *inputs: Any, **named: Any) -> list[Tensor]:
    """All tensors that the model returns in one mode; its modes and buffers stay."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(m._buffers, n, b, b.clone()) for m in model.modules() for n, b in m._buffers.items()]
    torch.manual_seed(0)
    try:
        return [t.detach().clone() for t in tensors_in(model.train(train)(*inputs, **named))]
    finally:
        for m, training in modes:
            m.training = training
        for store, name, buffer, value in buffers:
            store[name] = buffer.copy_(value)


def snapshot(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """What a trace must leave alone: every object that the modules hold, and every value."""
    objects: list[Any] = []
    for m in model.modules():
        for name, value in vars(m).items():
            objects += [name, value]
            if isinstance(value, dict):
                objects += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple)):
                objects += value
    objects += [p.grad for p in model.parameters()]
    values = [t.detach().clone() for t in objects if isinstance(t, Tensor) and not is_lazy(t)]
    values += [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy())]
    return objects, [values, random.getstate()]


def traced(model: nn.Module, *inputs: Any, **named: Any) -> Architecture:
    """``trace``, and the proof that nothing of the model or of the random state is another afterwards."""
    for p in list(model.parameters())[::2]:
        p.grad = torch.ones_like(p) if p.requires_grad else None
    (objects, (values, state)) = snapshot(model)
    arch = trace(model, *inputs, **named)
    (after, (values_after, state_after)) = snapshot(model)
    assert len(objects) == len(after)
    for old, new in zip(objects, after, strict=True):
        assert old is new
    for old, new in zip(values, values_after, strict=True):
        assert torch.equal(old, new)
    assert state == state_after
    return arch


def assert_grows(
    model: nn.Module,
    *inputs: Any,
    groups: Sequence[str],
    also: Sequence[Tensor] = (),
    modes: Sequence[bool] = (False, True),
    tolerance: float = 1e-9,
    rounds: int = 2,
    **named: Any,
) -> Architecture:
    """Neurons of exactly these groups are split in place, again and again, and all answers stay.

    Every round splits up to two neurons of each group into copies, and again into ghosts. The answers to
    single inputs ``also`` that were not traced must stay too.
    """
    rng = np.random.default_rng(0)
    calls = [(inputs, named), *(((x,), {}) for x in also)]
    expected = {(i, t): answers(model, t, *c[0], **c[1]) for i, c in enumerate(calls) for t in modes}
    for tensors in expected.values():
        assert all(t.isfinite().all() for t in tensors)
    first = None
    for kind in ("copies", "ghosts") * rounds:
        arch = traced(model, *inputs, **named)
        first = first or arch
        assert set(arch.widths) == set(groups), str(arch)
        split_neurons(model, splits(arch, rng, kind), arch=arch)
        for (i, train), before in expected.items():
            after = answers(model, train, *calls[i][0], **calls[i][1])
            for a, b in zip(before, after, strict=True):
                scale = float(a.abs().max()) if a.numel() else 0.0
                torch.testing.assert_close(b, a, rtol=0, atol=tolerance * scale)
    assert first is not None
    assert all(traced(model, *inputs, **named).widths[g] > first.widths[g] for g in groups)
    return first


def reason(arch: Architecture, name: str) -> str:
    """Why a layer's neurons are left alone."""
    return {u.name: u.reason for u in arch.unsplittable}[name]


def assert_refused(arch: Architecture, name: str, pattern: str) -> None:
    """The layer's neurons are left alone, for a reason that says this."""
    assert name not in arch.widths
    assert re.search(pattern, reason(arch, name), re.IGNORECASE), reason(arch, name)


# control flow that depends on data -----------------------------------------------------------------


def test_branches_on_the_input_grow() -> None:
    """Both branches use the same layers, and the one that was not traced stays right too."""
    model = net(
        lambda m, x: m.out(torch.tanh(m.hidden(x)) if x.mean() > 0 else torch.sigmoid(m.hidden(x)).neg()),
        hidden=lin(3, 5),
        out=lin(5, 2),
    )
    x = batch().abs()
    assert_grows(model, x, groups=["hidden"], also=[-x])


def test_branches_on_hidden_values_are_refused() -> None:
    """A mean over the neurons would change with their number, and the branch with it."""
    model = chain(lambda h: torch.sin(h) if h.mean() > 0 else h)
    assert_refused(assert_grows(model, batch(), groups=["a", "c"]), "b", "mixes the neurons")
    model = chain(lambda h: torch.sin(h) if h[0, 0] > 0 else h)
    assert_refused(assert_grows(model, batch(), groups=["a", "c"]), "b", "cuts|Python number")


def _either(m: nn.Module, x: Tensor) -> Tensor:
    return m.out(torch.tanh(m.left(x) if x.mean() > 0 else m.right(x)))


def test_layers_that_no_pass_has_called_are_told() -> None:
    """Growing one branch breaks the other that was not seen, so the table must name what was not called."""
    arch = traced(net(_either, left=lin(3, 5), right=lin(3, 5), out=lin(5, 2)), batch().abs())
    assert "'right'" in arch.note


def test_a_loss_over_both_branches_grows_both() -> None:
    """``trace_step`` sees all that the loss runs: a loss over two inputs ties the two branches."""
    model, x = net(_either, left=lin(3, 5), right=lin(3, 5), out=lin(5, 2)), batch().abs()
    expected = [answers(model, False, s * x) for s in (1, -1)]
    arch = trace_step(model, [x, -x], lambda m, xs: sum(m(x).square().mean() for x in xs))
    assert arch.group("left").producers == ("left", "right")
    split_neurons(model, splits(arch, np.random.default_rng(0), "copies"), arch=arch)
    torch.testing.assert_close([answers(model, False, s * x) for s in (1, -1)], expected)


def _looping(m: nn.Module, x: Tensor) -> Tensor:
    h, size = torch.tanh(m.first(x)), x.abs().mean()
    while size > 0.3:
        h, size = torch.tanh(m.again(h)), size / 2
    return m.out(h)


def test_loops_with_steps_that_depend_on_data_grow() -> None:
    """However often the layer is called, its input and output are the same neurons."""
    x = batch()
    model = net(_looping, first=lin(3, 4), again=lin(4, 4), out=lin(4, 2))
    arch = assert_grows(model, x, groups=["first"], also=[0.1 * x, 4 * x])
    assert arch.group("first").producers == ("first", "again")


def test_loops_that_end_by_a_hidden_norm_are_refused() -> None:
    """The norm over the neurons decides how long the loop runs, so only what is inside a step can grow."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h, steps = torch.tanh(m.first(x)), 0
        while h.norm() > 0.5 and steps < 3:
            h, steps = 0.5 * torch.tanh(m.down(torch.tanh(m.up(h)))), steps + 1
        return m.out(h)

    model = net(fwd, first=lin(3, 4), up=lin(4, 6), down=lin(6, 4), out=lin(4, 2))
    assert_refused(assert_grows(model, batch(), groups=["up"]), "first", "norm.* mixes the neurons")


def test_early_exits_grow() -> None:
    """What is computed before the exit keeps feeding the exit and the rest."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.first(x))
        early = m.exit(h)
        return early if x.abs().max() > 9 else m.out(torch.tanh(m.second(h))) + early

    x = batch()
    model = net(fwd, first=lin(3, 4), exit=lin(4, 2), second=lin(4, 5), out=lin(5, 2))
    assert_grows(model, x, groups=["first", "second"], also=[100 * x])


# inputs and outputs --------------------------------------------------------------------------------


def test_several_inputs_by_position_and_by_name_grow() -> None:
    """Inputs may come in any way that Python knows, with defaults and without."""
    model = net(
        lambda m, x, y=None, *, scale, shift=0.0: m.out(torch.tanh(m.a(x) + m.b(y)) * scale + shift),
        a=lin(3, 5),
        b=lin(2, 5),
        out=lin(5, 2),
    )
    x, y, scale = batch(), batch(4, 2), torch.tensor(1.5)
    arch = assert_grows(model, x, y, groups=["a"], scale=scale)
    assert arch.group("a").producers == ("a", "b")
    assert_grows(model, groups=["a"], x=x, y=y, scale=scale, shift=torch.randn(4, 1))


@pytest.mark.parametrize("kind", ["dict", "tuple", "nested", "dataclass"])
def test_structured_batches_grow(kind: str) -> None:
    """A batch may be a dict, a tuple, an object or a nest of them."""
    x, y = batch(), batch(4, 2)
    given, take = {
        "dict": ({"x": x, "y": y, "name": "sample"}, lambda b: (b["x"], b["y"])),
        "tuple": ((x, y), lambda b: b),
        "nested": ({"in": [(x,), {"y": y}], "n": 4}, lambda b: (b["in"][0][0], b["in"][1]["y"])),
        "dataclass": (Answer(x, y), lambda b: (b.features, b.logits)),
    }[kind]
    model = net(
        lambda m, b: m.out(torch.tanh(m.a(take(b)[0]) + m.b(take(b)[1]))),
        a=lin(3, 5),
        b=lin(2, 5),
        out=lin(5, 2),
    )
    arch = assert_grows(model, given, groups=["a"])
    assert arch.uses["out"] == 1.0


@dataclass
class Answer:
    features: Any
    logits: Any


@dataclass(slots=True)
class Slotted:
    features: Any
    logits: Any


class Bare:
    __slots__ = ("features", "logits")

    def __init__(self, features: Any, logits: Any) -> None:
        self.features, self.logits = features, logits


class Plain:
    def __init__(self, features: Any, logits: Any) -> None:
        self.features, self.logits = features, logits


Pair = namedtuple("Pair", ["features", "logits"])
SHAPES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda h, y: (h, y),
    "dict": lambda h, y: {"features": h, "logits": y},
    "named tuple": Pair,
    "dataclass": Answer,
    "dataclass with slots": Slotted,
    "object": Plain,
    "nested": lambda h, y: {"all": [(h,), {"y": Pair(None, y)}], "n": 3},
    "none and numbers": lambda h, y: (None, h, 3, y, 0.5, "text"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_values_among_the_outputs_are_refused(shape: str) -> None:
    """Whatever the output is packed in, what is in it keeps its size, and what is before it grows."""
    model = net(
        lambda m, x: SHAPES[shape](h := torch.tanh(m.second(torch.tanh(m.first(x)))), m.out(h)),
        first=lin(3, 4),
        second=lin(4, 5),
        out=lin(5, 2),
    )
    arch = assert_grows(model, batch(), groups=["first"])
    assert_refused(arch, "second", "part of the model's output")
    assert_refused(arch, "out", "part of the model's output")


@pytest.mark.parametrize(
    "pack",
    [
        pytest.param(Bare, id="slots"),
        pytest.param(lambda h, y: [[[[[[[h]]]]]], y], id="deep"),
        pytest.param(lambda h, y: deque([h, y]), id="deque"),
    ],
)
def test_hidden_values_in_unusual_objects_are_refused(pack: Callable[[Tensor, Tensor], Any]) -> None:
    """Slots, deques and deep nests hold tensors just like lists do."""
    model = net(lambda m, x: pack(h := torch.tanh(m.first(x)), m.out(h)), first=lin(3, 4), out=lin(4, 2))
    assert_refused(traced(model, batch()), "first", "part of the model's output")


def test_a_model_that_returns_nothing_grows() -> None:
    """The answer may be kept in an attribute; layers still say what they read."""

    def fwd(m: nn.Module, x: Tensor) -> None:
        m.kept = m.out(torch.tanh(m.hidden(x)))

    model, x = net(fwd, hidden=lin(3, 4), out=lin(4, 2)), batch()
    assert_grows(model, x, groups=["hidden"])
    expected = model.kept
    arch = traced(model, x)
    split_neurons(model, splits(arch, np.random.default_rng(1), "ghosts"), arch=arch)
    model(x)
    torch.testing.assert_close(model.kept, expected, rtol=0, atol=1e-12)


def test_a_loss_on_an_attribute_of_the_model_is_seen() -> None:
    """Hidden values that the loss reads from the model are as much bound as outputs are."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        m.features = torch.tanh(m.second(torch.tanh(m.first(x))))
        return m.out(m.features)

    model = net(fwd, first=lin(3, 4), second=lin(4, 5), out=lin(5, 2))
    arch = trace_step(model, batch(), lambda m, b: m(b).square().mean() + m.features.abs().mean())
    assert set(arch.widths) == {"first"}
    assert_refused(arch, "second", "mixes the neurons")
    assert not hasattr(model, "features")


@pytest.mark.parametrize("shape", [(1, 3), (3,)], ids=["one", "unbatched"])
def test_single_samples_grow(shape: tuple[int, ...]) -> None:
    """A batch of one sample and a sample without a batch axis are traced like others."""
    assert_grows(chain(), torch.randn(shape), groups=["a", "b", "c"], also=[batch()])


def test_an_empty_batch_is_refused_by_name() -> None:
    """Nothing can be seen in a batch without samples, and the reason says so."""
    with pytest.raises(ValueError, match="batch is empty"):
        trace(chain(), batch(0))


@pytest.mark.parametrize("train", [True, False])
def test_one_sample_through_batch_norm_grows(train: bool) -> None:
    """BatchNorm cannot train on one sample, and tracing does not ask it to, whatever the model's mode."""
    parts = {"a": lin(3, 4), "norm": nn.BatchNorm1d(4), "out": lin(4, 2)}
    model = net(lambda m, x: m.out(torch.tanh(m.norm(m.a(x)))), **parts).train(train)
    assert_grows(model, batch(1), groups=["a"], modes=[False], also=[batch()])


def test_a_model_without_layers_has_no_groups() -> None:
    """There is nothing to split; the table says so, and growing it is an error with a reason."""
    model = nn.Sequential(nn.Tanh(), nn.Flatten())
    arch = traced(model, batch())
    assert arch.groups == arch.unsplittable == ()
    assert "No neuron" in str(arch)
    assert split_neurons(model, [], arch=arch) == {}
    with pytest.raises(ValueError, match="no layer that has a LayerRule was called"):
        grow(model, [batch()], lambda m, x: m(x).square().mean())


# shared, tied and frozen weights -------------------------------------------------------------------


def test_siamese_networks_grow() -> None:
    """One encoder sees both inputs; its neurons are the same in both."""
    model = net(
        lambda m, x, y: m.out((m.encode(x) - m.encode(y)).abs()),
        encode=nn.Sequential(lin(3, 5), nn.Tanh(), lin(5, 4), nn.Tanh()),
        out=lin(4, 1),
    )
    arch = assert_grows(model, batch(), batch(), groups=["encode.0", "encode.2"])
    assert arch.uses["encode.0"] == 2.0


def test_one_module_under_two_names_grows() -> None:
    """The second name is the same module: it is called twice and grows once."""
    model = net(
        lambda m, x: m.out(torch.tanh(m.alias(torch.tanh(m.inner(torch.tanh(m.first(x))))))),
        first=lin(3, 4),
        inner=lin(4, 4),
        out=lin(4, 2),
    )
    model.alias = model.inner
    assert_grows(model, batch(), groups=["first"])
    assert model.alias is model.inner
    assert model.state_dict()["alias.weight"].shape == model.state_dict()["inner.weight"].shape


def test_two_layers_with_one_parameter_are_refused() -> None:
    """Two layers that share a tensor would have to grow alike in different places; what is beside grows."""
    model = chain()
    model.e = lin(6, 6)
    model.f = lin(6, 6)
    model.f.weight = model.e.weight
    model.fwd = lambda m, x: m.d(torch.tanh(m.c(m.f(torch.tanh(m.e(torch.tanh(m.b(torch.tanh(m.a(x))))))))))
    arch = assert_grows(model, batch(), groups=["a", "c"])
    for name in ("b", "e", "f"):
        assert_refused(arch, name, "shared by 'e.weight' and 'f.weight'")
    assert model.f.weight is model.e.weight


def test_a_shared_bias_is_refused() -> None:
    """A tensor that two layers add to their outputs binds both."""
    model = chain()
    model.b.bias = nn.Parameter(torch.randn(6))
    model.a2 = lin(5, 6)
    model.a2.bias = model.b.bias
    model.fwd = lambda m, x: m.d(torch.tanh(m.c(torch.sin(m.b(h := torch.tanh(m.a(x))) * m.a2(h)))))
    arch = assert_grows(model, batch(), groups=["a", "c"])
    assert_refused(arch, "b", "shared by 'b.bias' and 'a2.bias'")


def test_an_embedding_tied_to_its_decoder_is_refused() -> None:
    """The width of the embedding stays, and the layers between embedding and decoder grow."""
    model = net(
        lambda m, x: m.decode(torch.tanh(m.down(torch.tanh(m.up(m.embed(x)))))),
        embed=nn.Embedding(7, 4),
        up=lin(4, 6),
        down=lin(6, 4),
        decode=lin(4, 7, bias=False),
    )
    model.decode.weight = model.embed.weight
    arch = assert_grows(model, torch.randint(0, 7, (3, 5)), groups=["up"])
    for name in ("embed", "down"):
        assert_refused(arch, name, "shared by 'embed.weight' and 'decode.weight'")
    assert model.decode.weight is model.embed.weight


@pytest.mark.parametrize("names", [["weight", "bias"], ["weight"], ["bias"]])
def test_neurons_with_frozen_incoming_weights_are_refused(names: list[str]) -> None:
    """Offspring could not move apart; the frozen layer still follows when what it reads grows."""
    model = chain()
    for name in names:
        getattr(model.b, name).requires_grad_(False)
    arch = assert_grows(model, batch(), groups=["a", "c"])
    assert_refused(arch, "b", f"'b.{names[0]}' is frozen")
    assert not any(getattr(model.b, name).requires_grad for name in names)


def test_a_frozen_model_is_refused_in_one_sentence() -> None:
    """Nothing to train is nothing to split."""
    model = chain().requires_grad_(False)
    assert_grows(model, batch(), groups=[])
    with pytest.raises(ValueError, match=r"No neuron of this network can be split .*frozen"):
        grow(model, [batch()], lambda m, x: m(x).square().mean())


class FrozenNorm(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> FrozenNorm:
        return super().train(False)


def test_frozen_batch_norm_grows() -> None:
    """Its tensors are copied, and it stays frozen and in eval mode."""
    parts = {"a": lin(3, 5), "norm": FrozenNorm(5).eval().requires_grad_(False), "out": lin(5, 2)}
    model = net(lambda m, x: m.out(torch.tanh(m.norm(m.a(x)))), **parts)
    assert_grows(model, batch(8), groups=["a"])
    assert not model.norm.training
    assert not any(p.requires_grad for p in model.norm.parameters())


# weights that are computed from others -------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w + w.flip(0)


def _old_spectral_norm(layer: nn.Module) -> None:
    nn.utils.spectral_norm(layer)


def _custom(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Symmetric())


def _custom_bias(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "bias", nn.Tanh())


def _pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", amount=0.4)


def _pruned_rows(layer: nn.Module) -> None:
    prune.ln_structured(layer, "weight", amount=0.4, n=2, dim=0)


def _pruned_bias(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "bias", amount=0.4)


COMPUTED = [
    *(_old_spectral_norm, parametrizations.spectral_norm),
    *(parametrizations.orthogonal, _custom, _custom_bias, _pruned, _pruned_rows, _pruned_bias),
]


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated")
@pytest.mark.parametrize("change", COMPUTED)
def test_computed_weights_are_refused(change: Callable[[nn.Module], Any]) -> None:
    """The layer keeps its size on both sides, and so does what it reads; the others grow."""
    model = chain()
    change(model.b)
    arch = assert_grows(model, batch(), groups=["c"])
    assert_refused(arch, "a", "enter the .*Linear 'b': its (weights are parametrized|tensor .* is computed)")
    assert "b" not in {g.name for g in arch.groups}


def test_a_layer_that_computes_its_weights_is_named_in_the_table() -> None:
    """The first layer reads no neurons that could tell of it, so its own neurons have to."""
    model = chain()
    parametrizations.spectral_norm(model.a)
    arch = assert_grows(model, batch(), groups=["b", "c"])
    assert_refused(arch, "a", "parametrized")


def test_made_permanent_pruning_grows() -> None:
    """``prune.remove`` leaves a plain parameter, zeros and all."""
    model = chain()
    _pruned(model.b)
    prune.remove(model.b, "weight")
    assert_grows(model, batch(), groups=["a", "b", "c"])


def test_parametrized_batch_norm_is_refused() -> None:
    """A channelwise layer whose scale is computed cannot be copied channel by channel."""
    norm = nn.BatchNorm1d(6)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    arch = assert_grows(chain(norm), batch(8), groups=["a", "c"])
    assert_refused(arch, "b", "BatchNorm1d 'between': its weights are parametrized")


# lazy, quantised, compiled and scripted modules ----------------------------------------------------


def test_lazy_models_grow_once_they_have_seen_a_batch() -> None:
    """Before it the error says what to do; after it lazy layers are layers like any other."""
    model = nn.Sequential(
        nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5)
    )
    model.append(nn.Sequential(nn.Tanh(), nn.LazyLinear(2)))
    x = torch.randn(4, 2, 6)
    with pytest.raises(ValueError, match="layer '0' is lazy.*run the model on one batch"):
        trace(model, x)
    model(x)
    assert_grows(randomised(model), x, groups=["0", "4"])


@pytest.mark.filterwarnings("ignore")  # of which torch's own quantisation gives many
def test_dynamically_quantised_layers_are_refused() -> None:
    """Integer weights have no rule, and where no gradient comes through, ``grow`` says so."""
    from torch.ao.quantization import quantize_dynamic

    x = batch().float()
    model = quantize_dynamic(chain().float().eval(), {"b"})
    arch = assert_grows(model, x, groups=["c"], tolerance=1e-4)
    assert_refused(arch, "a", "linear_dynamic.*'b'")
    whole, last = (quantize_dynamic(chain().float().eval(), which) for which in ({nn.Linear}, {"d"}))
    assert traced(whole, x).groups == ()
    assert re.search(r"consists of 'a' \(torch.*dynamic.*Linear\)", str(traced(whole, x)))
    assert set(traced(last, x).widths) == {"a", "b"}  # which grow, if anything tells them how
    for refused in (whole, last):
        with pytest.raises(ValueError, match="loss does not depend on"):
            grow(refused, [x], lambda m, x: m(x).square().mean())


@pytest.mark.filterwarnings("ignore")
def test_quantisation_aware_layers_are_refused() -> None:
    """Their weights and activations pass through fake quantisers, whose scales depend on all neurons."""
    from torch.ao.quantization import FakeQuantize, get_default_qat_qconfig, prepare_qat

    torch.set_default_dtype(torch.float32)  # for the observers
    model = nn.Sequential(lin(3, 5), nn.Tanh(), lin(5, 6), nn.Tanh(), lin(6, 4), nn.Tanh(), lin(4, 2))
    randomised(model)
    model[2].qconfig = get_default_qat_qconfig("x86")
    model = prepare_qat(model.train())
    assert any(isinstance(m, FakeQuantize) for m in model.modules())
    model(x := batch(8))
    arch = assert_grows(model, x, groups=["4"], tolerance=1e-4)
    assert_refused(arch, "0", "'2'")


def test_models_compiled_as_a_whole_grow() -> None:
    """``torch.compile`` wraps the model; tracing looks inside, and the wrapper compiles anew after growth."""
    model, x = chain(), batch()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    groups = ["_orig_mod.a", "_orig_mod.b", "_orig_mod.c"]
    assert_grows(compiled, x, groups=groups, rounds=1)
    assert isinstance(compiled, torch._dynamo.OptimizedModule)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_submodules_grow(in_place: bool) -> None:
    """A part that was compiled, as a wrapper or in place, grows like the part that it is."""
    body = nn.Sequential(lin(5, 6), nn.Tanh(), lin(6, 4))
    if in_place:
        body.compile(backend="eager")
    else:
        body = torch.compile(body, backend="eager")
    model = net(lambda m, x: m.d(torch.tanh(m.body(torch.tanh(m.a(x))))), a=lin(3, 5), body=body, d=lin(4, 2))
    inner = "body" if in_place else "body._orig_mod"
    assert_grows(model, batch(), groups=["a", f"{inner}.0", f"{inner}.2"], rounds=1)


SCRIPTED = [
    "script",
    "trace",
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("how", SCRIPTED)
def test_scripted_submodules_are_refused(how: str) -> None:
    """TorchScript runs without hooks and with fixed types: what enters it stays, the rest grows."""
    x = batch()
    inner = nn.Sequential(lin(6, 5), nn.Tanh(), lin(5, 6))
    scripted = torch.jit.script(inner) if how == "script" else torch.jit.trace(inner, batch(4, 6))
    arch = assert_grows(chain(scripted), x, groups=["a", "c"])
    assert_refused(arch, "b", "matrix product" if how == "script" else "'between'")


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("how", SCRIPTED)
def test_a_scripted_model_is_refused_in_one_sentence(how: str) -> None:
    """Nothing inside of it can be grown."""
    inner = nn.Sequential(lin(3, 5), nn.Tanh(), lin(5, 2))
    scripted = torch.jit.script(inner) if how == "script" else torch.jit.trace(inner, batch())
    assert "scripted modules cannot be looked into" in str(traced(scripted, batch()))
    with pytest.raises(ValueError, match="No neuron of this network can be split"):
        grow(scripted, [batch()], lambda m, x: m(x).square().mean())


# weights outside of layers -------------------------------------------------------------------------


class Functional(nn.Module):
    """A layer of the user's own that keeps raw parameters and calls a function on them."""

    def __init__(self, call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.call = call
        self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.weights)


FUNCTIONAL: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], str]] = {
    "layer norm": (lambda x, w: F.layer_norm(x, (6,), w), ((6,),), "layer normalisation"),
    "distances": (torch.cdist, ((6, 6),), "cdist"),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_use_of_raw_parameters_is_refused(name: str) -> None:
    """Whoever does more with neurons and raw parameters than to multiply and add needs a rule."""
    call, shapes, why = FUNCTIONAL[name]
    arch = assert_grows(chain(Functional(call, *shapes)), batch(), groups=["a", "c"])
    assert_refused(arch, "b", why)


def test_raw_parameters_that_do_not_run_along_the_neurons_grow() -> None:
    """Scalars and maps over space are the same for every neuron."""
    model = net(
        lambda m, x: m.c((torch.tanh(m.a(x)) * m.gain + m.table["place"]).flatten(1)),
        a=nn.Conv1d(2, 4, 3),
        gain=nn.Parameter(torch.randn(1)),
        table=nn.ParameterDict({"place": torch.randn(1, 6)}),
        c=lin(24, 2),
    )
    assert_grows(model, torch.randn(4, 2, 8), groups=["a"])


def test_the_weight_of_another_layer_used_functionally_grows() -> None:
    """``F.linear(x, other.weight)`` is a second call of the layer; of the computed weight it is none."""
    model = chain()
    model.fwd = lambda m, x: m.d(
        torch.tanh(m.c(torch.tanh(m.b(h := torch.tanh(m.a(x)))) + F.linear(h, m.b.weight)))
    )
    assert_grows(model, batch(), groups=["a", "b", "c"])
    model.fwd = lambda m, x: m.d(
        torch.tanh(m.c(torch.tanh(m.b(h := torch.tanh(m.a(x)))) + F.linear(h, m.b.weight.abs())))
    )
    arch = assert_grows(model, batch(), groups=["c"])
    assert_refused(arch, "b", "'b.weight', .* abs|extend along|reads it")
    assert_refused(arch, "a", "outside of a layer|'b.weight'")


def test_a_transposed_weight_as_decoder_is_refused() -> None:
    """A tied autoencoder decodes by the encoder's transpose."""
    model = net(
        lambda m, x: F.linear(torch.tanh(m.second(torch.tanh(m.first(x)))), m.second.weight.t()),
        first=lin(3, 5),
        second=lin(5, 4),
    )
    arch = assert_grows(model, batch(), groups=[])
    assert_refused(arch, "second", "'second.weight', which the code uses itself")


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass with more attributes and methods, and the forward of its parent."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.note = "mine"

    def extra_repr(self) -> str:
        return self.note


class Standardised(nn.Linear):
    """Computes with other weights than those that it holds."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.std(1, keepdim=True)
        return F.linear(x, weight, self.bias)


def test_subclasses_that_compute_with_other_weights_are_refused() -> None:
    """A layer that standardises its weights is another layer; what is beside it grows."""
    arch = assert_grows(chain(b=Standardised(5, 6)), batch(), groups=["c"])
    assert_refused(arch, "a", "outside of a layer with a rule.*'b'")
    assert_refused(arch, "b", "otherwise than the layer that it is derived from")


def test_subclasses_that_add_to_the_operator_of_the_layer_grow() -> None:
    """What stands around the layer's own operator on its own weights is traced like any module."""
    assert_grows(chain(b=Doubled(5, 6)), batch(), groups=["a", "b", "c"])


def test_subclasses_that_inherit_forward_grow() -> None:
    """What a subclass adds beside the forward pass does not matter."""
    model = chain(b=Named(5, 6))
    assert_grows(model, batch(), groups=["a", "b", "c"])
    assert type(model.b) is Named


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    """A patched layer is as unknown as a subclass."""
    model = chain()
    model.b.forward = lambda x: F.linear(x, model.b.weight) ** 3
    assert_refused(assert_grows(model, batch(), groups=["c"]), "a", "outside of a layer with a rule")


# hooks ---------------------------------------------------------------------------------------------


def test_hooks_that_record_shapes_see_the_new_width() -> None:
    """Hooks that only look do not matter, and see the grown layer afterwards."""
    model, x, seen = chain(), batch(), []
    model.b.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    model.b.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape)))
    assert_grows(model, x, groups=["a", "b", "c"])
    model(x)
    assert seen[-2:] == [(4, model.a.out_features), (4, model.b.out_features)]
    assert len(model.b._forward_hooks) == len(model.b._forward_pre_hooks) == 1


@pytest.mark.parametrize("where", ["before", "after", "module"])
def test_hooks_that_change_values_pointwise_grow(where: str) -> None:
    """A hook that works element by element is one more activation function."""
    model = chain()
    if where == "before":
        model.b.register_forward_pre_hook(lambda m, args: (torch.sin(args[0]),))
    elif where == "after":
        model.b.register_forward_hook(lambda m, args, out: torch.sin(2 * out))
    else:
        model.register_forward_hook(lambda m, args, out: 2 * out)
    assert_grows(model, batch(), groups=["a", "b", "c"])


MIXING = {
    "sum": lambda h: h - h.mean(-1, keepdim=True),
    "flip": lambda h: h.flip(-1),
    "cumsum": lambda h: h.cumsum(-1),
    "swap": lambda h: h[..., [1, 0, *range(2, h.shape[-1])]],
    "mask": lambda h: torch.cat([h[..., :1] * 0.5, h[..., 1:]], -1),
}


@pytest.mark.parametrize("name", MIXING)
def test_hooks_before_a_layer_that_mix_neurons_are_refused(name: str) -> None:
    """What the layer reads is no longer what the one before it computed."""
    model = chain()
    model.c.register_forward_pre_hook(lambda m, args: (MIXING[name](args[0]),))
    arch = assert_grows(model, batch(), groups=["a", "c"])
    assert_refused(arch, "b", "mixes|cuts or reorders|indexing")


@pytest.mark.parametrize("name", MIXING)
def test_hooks_after_a_layer_that_mix_neurons_are_refused(name: str) -> None:
    """What comes out of the layer is no longer what its rule says."""
    model = chain()
    model.b.register_forward_hook(lambda m, args, out: MIXING[name](out))
    arch = assert_grows(model, batch(), groups=["a", "c"])
    assert_refused(arch, "b", "mixes|cuts or reorders|indexing|after growth")


# formats and types ---------------------------------------------------------------------------------


def test_weights_that_are_not_contiguous_grow() -> None:
    """Strides are nobody's business but the tensor's."""
    model = chain()
    model.b.weight = nn.Parameter(torch.randn(5, 6).t())
    model.c.weight = nn.Parameter(torch.randn(4, 12)[:, ::2])
    assert not model.b.weight.is_contiguous()
    assert_grows(model, batch(), groups=["a", "b", "c"])


def test_channels_last_networks_grow_and_stay_channels_last() -> None:
    """The memory format of weights and inputs is kept."""
    model = randomised(Residual()).to(memory_format=torch.channels_last)
    x = torch.randn(4, 1, 6, 6).contiguous(memory_format=torch.channels_last)
    assert_grows(model, x, groups=["stem", "conv1", "head"])
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.conv2.weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_networks_grow(dtype: torch.dtype) -> None:
    """Parameters keep their type, and outputs stay up to the rounding of that type."""
    model, x = randomised(Residual()).to(dtype), torch.randn(4, 1, 6, 6, dtype=dtype)
    assert_grows(model, x, groups=["stem", "conv1", "head"], tolerance=16 * torch.finfo(dtype).eps, rounds=1)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_autocast_inside_forward_grows() -> None:
    """Casts of weights and activations are followed."""
    model = chain().float()
    plain = model.fwd

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(m, x).float()

    model.fwd = fwd
    assert_grows(model, batch().float(), groups=["a", "b", "c"], tolerance=0.1, rounds=1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def _complex(m: nn.Module, x: Tensor) -> Tensor:
    return m.c(torch.tanh(m.b(torch.tanh(m.a(torch.complex(x, x.sin())))))).abs()


def test_complex_layers_are_split_exactly_or_refused() -> None:
    """Complex neurons are neurons, or are said not to be."""
    options = {"dtype": torch.complex128}
    model = net(_complex, a=lin(3, 5, **options), b=lin(5, 4, **options), c=lin(4, 2, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.imag.normal_()
    arch = traced(model, batch())
    if arch.groups:
        assert_grows(model, batch(), groups=["a", "b"])
        grow(model, [batch()], lambda m, x: m(x).square().mean())
    else:
        assert_refused(arch, "a", "complex")


def test_a_fourier_transform_over_space_is_followed() -> None:
    """Over space a Fourier transform treats every channel by itself, and so does the modulus."""
    model = net(
        lambda m, x: m.c(
            torch.fft.irfft(torch.fft.rfft(torch.tanh(m.b(torch.tanh(m.a(x))))).abs()).flatten(1)
        ),
        a=nn.Conv1d(2, 3, 1),
        b=nn.Conv1d(3, 4, 1),
        c=lin(4 * 8, 2),
    )
    assert_grows(model, torch.randn(4, 2, 8), groups=["a", "b"])


# autograd ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_grow(reentrant: bool) -> None:
    """Recomputed parts are run once by the trace, and their layers are met like others."""
    body = nn.Sequential(lin(5, 6), nn.Tanh(), lin(6, 4))
    model = net(
        lambda m, x: m.d(torch.tanh(checkpoint(m.body, torch.tanh(m.a(x)), use_reentrant=reentrant))),
        a=lin(3, 5),
        body=body,
        d=lin(4, 2),
    )
    x = batch()
    assert_grows(model, x, groups=["a", "body.0", "body.2"])


def _recomputing(reentrant: bool) -> Net:
    return net(
        lambda m, x: m.d(torch.tanh(checkpoint(m.b, torch.tanh(m.a(x)), use_reentrant=reentrant))),
        a=lin(3, 5),
        b=lin(5, 4),
        d=lin(4, 2),
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_network_is_grown_by_its_curvature(reentrant: bool) -> None:
    """The second derivative goes through what would be recomputed, and is that of the plain network."""
    plain, x = _recomputing(False), batch()
    plain.fwd = lambda m, x: m.d(torch.tanh(m.b(torch.tanh(m.a(x)))))
    models = plain, _recomputing(reentrant)
    reports = [grow(m, [x], lambda m, x: (m(x) - 1).square().mean()) for m in models]
    assert reports[0].splits
    assert reports[1].predicted_gain == pytest.approx(reports[0].predicted_gain, rel=1e-9)
    assert reports[1].widths_after == reports[0].widths_after


def test_a_gradient_inside_forward_is_traced_or_refused() -> None:
    """A forward pass may differentiate: an energy model returns the slope of its energy."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = m.c(torch.tanh(m.b(torch.tanh(m.a(x))))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = net(fwd, a=lin(3, 5), b=lin(5, 4), c=lin(4, 1))
    arch = traced(model, batch())
    assert_grows(model, batch(), groups=list(arch.widths))
    for name in {"a", "b"} - set(arch.widths):
        assert_refused(arch, name, "differentiates the network")


def test_a_gradient_penalty_in_the_loss_is_traced_or_refused() -> None:
    """The penalty reads the weights backwards; either they grow exactly or they say why not."""
    model, x = chain(), batch()

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = m(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.square().mean() + slope.square().sum(1).mean()

    objects, _ = snapshot(model)
    arch = trace_step(model, x, loss_fn)
    assert all(a is b for a, b in zip(objects, snapshot(model)[0], strict=True))
    before = loss_fn(model, x)
    split_neurons(model, splits(arch, np.random.default_rng(0), "copies"), arch=arch)
    torch.testing.assert_close(loss_fn(model, x), before, rtol=1e-10, atol=0)
    for name in {"a", "b", "c"} - set(arch.widths):
        assert_refused(arch, name, "differentiates the network")


class Squash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x / (1 + x.abs())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs()) ** 2


class Centre(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(1, keepdim=True)


class Rows(torch.autograd.Function):
    """Leaves torch: nothing says what becomes of the neurons."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_pointwise_autograd_functions_grow() -> None:
    """Tracing sees the operators inside of a function of the user's own."""
    assert_grows(chain(Squash.apply), batch(), groups=["a", "b", "c"])


def test_autograd_functions_that_mix_neurons_are_refused() -> None:
    """And sees when they mix the neurons."""
    arch = assert_grows(chain(Centre.apply), batch(), groups=["a", "c"])
    assert_refused(arch, "b", "mean mixes the neurons")


def test_functions_that_leave_torch_are_refused() -> None:
    """A detour over NumPy drops the neurons; what is before and behind it is safe."""
    arch = assert_grows(chain(Rows.apply), batch(), groups=["a", "c"])
    assert_refused(arch, "b", "no layer that tracing sees reads them|after growth|outside of torch")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_parts_without_gradients_grow(context: Callable[[], Any]) -> None:
    """A frozen body under ``no_grad`` can be split like any other, though no gradient asks for it."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        with context():
            h = torch.tanh(m.b(torch.tanh(m.a(x))))
        return m.d(torch.tanh(m.c(h.clone())))

    model = net(fwd, a=lin(3, 5), b=lin(5, 6), c=lin(6, 4), d=lin(4, 2))
    assert_grows(model, batch(), groups=["a", "b", "c"])


# state ---------------------------------------------------------------------------------------------


def _counting(m: nn.Module, x: Tensor) -> Tensor:
    m.calls += 1
    m.seen = m.seen + len(x)
    m.log.append(tuple(x.shape))
    m.number += 1
    return m.out(torch.tanh(m.hidden(x)))


def test_counters_that_a_pass_changes_do_not_move_and_the_model_grows() -> None:
    """Buffers written in place or anew, lists and numbers are what they were after every trace."""
    model = net(_counting, hidden=lin(3, 4), out=lin(4, 2), calls=torch.zeros(()), seen=torch.zeros(()))
    model.log, model.number = [], 0
    x = batch()
    trace(model, x)
    assert (float(model.calls), float(model.seen), model.log, model.number) == (0.0, 0.0, [], 0)
    assert_grows(model, x, groups=["hidden"])


@pytest.mark.parametrize("how", ["in place", "anew"])
def test_a_pass_that_writes_to_parameters_leaves_no_trace(how: str) -> None:
    """A teacher that follows the student inside of forward is after tracing what it was before."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        if m.training:
            with torch.no_grad():
                for student, teacher in zip(m.s.parameters(), m.t.parameters(), strict=True):
                    if how == "anew":
                        teacher.data = teacher.data * 0.9 + student.data * 0.1
                    else:
                        teacher.mul_(0.9).add_(student, alpha=0.1)
        with torch.no_grad():
            t = m.t(m.a(x))
        return (m.s(torch.tanh(m.a(x))) - t).square()

    model = net(fwd, a=lin(3, 5), s=lin(5, 2), t=lin(5, 2))
    model.t.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    assert set(traced(model, batch()).widths) == {"a"}
    grow(model, [batch()], lambda m, x: m(x).mean(), include=["a"], train_mode=True)
    assert model.a.out_features > 5
    torch.testing.assert_close(model.t.bias, before[-1], rtol=0, atol=0)


@functools.lru_cache
def _ramp(size: int) -> Tensor:
    return torch.linspace(0.5, 1.5, size)


def test_caches_keyed_by_sizes_stay_and_the_model_grows() -> None:
    """Constants over space may be cached anywhere; the objects in the cache are never replaced."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        if h.shape[2] not in m.cache:
            m.cache[h.shape[2]] = torch.linspace(0, 1, h.shape[2])
        return m.c((h * _ramp(h.shape[2]) + m.cache[h.shape[2]]).flatten(1))

    _ramp.cache_clear()
    model, x = net(fwd, a=nn.Conv1d(2, 4, 3), c=lin(24, 2)), torch.randn(4, 2, 8)
    model.cache = {}
    traced(model, x)
    assert model.cache == {}
    model(x)
    kept, cached = _ramp(6), model.cache[6]
    assert_grows(model, x, groups=["a"])
    assert _ramp(6) is kept
    assert model.cache[6] is cached


def test_a_cache_keyed_by_the_width_is_refused() -> None:
    """A constant per neuron that is cached outside of the model is a constant per neuron."""
    arch = assert_grows(chain(lambda h: h * _ramp(h.shape[1])), batch(), groups=["a", "c"])
    assert_refused(arch, "b", "extend along the neurons")


@pytest.mark.parametrize("how", ["attribute", "closure"])
def test_a_cached_weight_is_refused(how: str) -> None:
    """A weight that is computed once and kept does not grow, nor does tracing fill the cache wrongly."""
    kept: dict[str, Tensor] = {}

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        store = kept if how == "closure" else m.kept
        if "w" not in store:
            store["w"] = F.softmax(m.b.weight.detach(), 1)
        return m.d(torch.tanh(m.c(torch.tanh(F.linear(torch.tanh(m.a(x)), store["w"])))))

    model, x = chain(), batch()
    model.fwd, model.kept = fwd, {}
    arch = traced(model, x)
    assert set(arch.widths) == {"c"}
    assert_refused(arch, "a", "outside of a layer")
    assert model(x).shape == (4, 2)
    assert_grows(model, x, groups=["c"])


def test_caches_outside_of_the_model_hold_real_tensors_afterwards() -> None:
    """What a trace leaves in a cache is what a pass of the model by itself would have left there."""
    kept: dict[str, Tensor] = {}

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        if "scale" not in kept:
            kept["scale"] = x.new_full((1,), 2.0)
        return m.out(torch.tanh(m.hidden(x)) * kept["scale"])

    model, x = net(fwd, hidden=lin(3, 4), out=lin(4, 2)), batch()
    assert traced(model, x).widths == {"hidden": 4}
    assert all(type(t) is Tensor for t in kept.values())
    torch.testing.assert_close(model(x), model.out(2 * torch.tanh(model.hidden(x))), rtol=0, atol=1e-12)


def test_hidden_state_kept_between_calls_is_refused() -> None:
    """A state of the old width meets neurons of the new one; without a state there is nothing yet to meet."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.b(torch.tanh(m.a(x))))
        if m.state is not None:
            h = 0.5 * (h + m.state)
        m.state = h.detach()
        return m.c(h)

    model = net(fwd, a=lin(3, 5), b=lin(5, 6), c=lin(6, 2))
    model.state, x = None, batch()
    model(x)
    arch = traced(model, x)
    assert_refused(arch, "b", "extend along the neurons")
    assert set(arch.widths) == {"a"}


def test_random_numbers_in_forward_do_not_disturb() -> None:
    """Noise is drawn anew; the global random state after the trace is that before it."""
    model = chain(lambda h: h + 0.0 * torch.randn(()) + 0.0 * random.random() + 0.0 * np.random.rand())
    assert_grows(model, batch(), groups=["a", "b", "c"])


def test_dropout_does_not_hide_what_grows() -> None:
    """Values are random in training mode, so only eval mode is compared."""
    model = chain(nn.Dropout(0.4))
    for train in (True, False):
        assert_grows(model.train(train), batch(), groups=["a", "b", "c"], modes=[False], rounds=1)


# modes and wrappers --------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("branch", [True, False])
def test_branches_of_one_mode_only_grow(train: bool, branch: bool) -> None:
    """Layers that run in training only, or in eval only, follow in whichever mode the model is traced."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.hidden(x))
        return m.out(h) + (m.extra(torch.tanh(m.deep(h))) if m.training is branch else 0)

    model = net(fwd, hidden=lin(3, 4), deep=lin(4, 5), extra=lin(5, 2), out=lin(4, 2)).train(train)
    arch = assert_grows(model, batch(), groups=["hidden", "deep"])
    assert model.training is train
    assert set(arch.group("hidden").consumers) == {"out", "deep"}


def test_data_parallel_wrappers_grow() -> None:
    """Without devices the wrapper calls its module; names begin with ``module``."""
    model = nn.DataParallel(chain())
    assert_grows(model, batch(), groups=["module.a", "module.b", "module.c"])


def test_functional_calls_with_the_models_own_parameters_grow() -> None:
    """``functional_call`` puts other tensors in the layers' places for the time of a call."""

    def fwd(m: nn.Module, x: Tensor) -> Tensor:
        doubled = {name: 1.5 * p for name, p in m.inner.named_parameters()}
        return m.d(torch.tanh(torch.func.functional_call(m.inner, doubled, (torch.tanh(m.a(x)),))))

    model = net(fwd, a=lin(3, 5), inner=nn.Sequential(lin(5, 6), nn.Tanh(), lin(6, 4)), d=lin(4, 2))
    assert_grows(model, batch(), groups=["a", "inner.0", "inner.2"])


def test_functional_calls_with_parameters_from_elsewhere_are_refused() -> None:
    """Tensors that a dict outside of the model holds do not grow; the trial finds them."""
    inner = nn.Sequential(lin(5, 6), nn.Tanh(), lin(6, 4))
    held = {name: torch.randn_like(p) for name, p in inner.named_parameters()}
    model = net(
        lambda m, x: m.d(
            torch.tanh(m.c(torch.tanh(torch.func.functional_call(m.inner, held, (torch.tanh(m.a(x)),)))))
        ),
        a=lin(3, 5),
        inner=inner,
        c=lin(4, 3),
        d=lin(3, 2),
    )
    arch = assert_grows(model, batch(), groups=["c"])
    for name in ("a", "inner.0", "inner.2"):
        assert_refused(arch, name, "after growth")


def test_maps_over_samples_are_traced_or_refused() -> None:
    """``vmap`` inside of forward runs on tensors of its own, in which neurons cannot be followed."""
    model = net(
        lambda m, x: m.d(torch.tanh(torch.func.vmap(m.b)(torch.tanh(m.a(x))))),
        a=lin(3, 5),
        b=lin(5, 6),
        d=lin(6, 2),
    )
    arch = traced(model, batch())
    assert_grows(model, batch(), groups=list(arch.widths))


# sizes in code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True])
def test_a_width_in_the_code_or_in_an_attribute_is_refused(held: bool) -> None:
    """The library resizes layers, not the numbers that a model keeps for itself; the trial finds them."""
    model = net(
        lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x)).reshape(-1, 24 if not held else m.width)))),
        a=nn.Conv1d(2, 4, 3),
        b=lin(24, 5),
        c=lin(5, 2),
    )
    model.width = 24
    arch = assert_grows(model, torch.randn(4, 2, 8), groups=["b"])
    assert_refused(arch, "a", "after growth the forward pass fails")


def test_an_assertion_on_the_width_is_refused() -> None:
    """The user's own words are the reason."""

    def check(h: Tensor) -> Tensor:
        assert h.shape[1] == 6, "six channels, please"
        return h

    arch = assert_grows(chain(check), batch(), groups=["a", "c"])
    assert_refused(arch, "b", "after growth the forward pass fails: six channels, please")


def test_code_that_behaves_otherwise_at_the_next_width_is_refused() -> None:
    """A wider map takes another branch: the values differ, and the trial sees it."""
    arch = assert_grows(chain(lambda h: h**3 if h.shape[1] > 6 else h), batch(), groups=["a", "c"])
    assert_refused(arch, "b", "after growth")


def _limit(h: Tensor) -> Tensor:
    if h.shape[1] in (9, 10, 11):
        raise RuntimeError("not about ten channels, please")
    return h


@pytest.mark.parametrize(
    "between", [_limit, lambda h: h**3 if h.shape[1] in (9, 10, 11) else h], ids=["fails", "differs"]
)
def test_a_width_that_breaks_later_is_caught_by_the_growth(between: Callable[[Tensor], Tensor]) -> None:
    """A few neurons more work, many do not: ``grow`` tries the real widths and leaves the group out."""
    model, x = chain(between), batch()
    report = grow(model, [x], lambda m, x: (m(x) - 1).square().mean(), strategy=TopK(count=12))
    assert "after growth" in report.barred["b"]
    assert report.widths_after["b"] == 6 == model.b.out_features
    assert report.widths_after["c"] > 4
    assert model(x).shape == (4, 2)


# nothing is left behind ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m: setattr(m, "fwd", lambda m, x: m.b(torch.tanh(m.a(x)))[:, 99]),
        lambda m: setattr(m, "lazy", nn.LazyLinear(3)),
    ],
    ids=["forward", "lazy"],
)
def test_a_trace_that_fails_leaves_nothing_behind(break_it: Callable[[nn.Module], None]) -> None:
    """An error in the user's forward pass comes through, and no hook stays."""
    model = chain()
    break_it(model)
    objects, _ = snapshot(model)
    with pytest.raises((IndexError, ValueError)):
        trace(model, batch())
    after, _ = snapshot(model)
    assert len(objects) == len(after)
    assert all(a is b for a, b in zip(objects, after, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_no_hook_stays_where_one_cannot_be_set() -> None:
    """Whether or not a script module can be traced, the modules before it have no hook afterwards."""
    model = chain(torch.jit.script(nn.Tanh()))
    with suppress(RuntimeError):
        trace(model, batch())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (model, model.a, model.b, model.d))


# ten rounds ----------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    def __init__(self, first: int = 3, second: int = 4, hidden: int = 5) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, first, 3, padding=1), nn.Conv2d(first, second, 3)
        self.hidden, self.out = nn.Linear(4 * second, hidden), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.second(torch.tanh(self.first(x)))), 2)
        return self.out(torch.tanh(self.hidden(x.flatten(1))))


class Perceptron(nn.Module):
    def __init__(self, first: int = 4, second: int = 3) -> None:
        super().__init__()
        self.first, self.second, self.out = (
            nn.Linear(3, first),
            nn.Linear(first, second),
            nn.Linear(second, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Normalised(nn.Module):
    """A residual stream with BatchNorm and a depthwise layer."""

    def __init__(self, stem: int = 4, inner: int = 3) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, stem, 3, padding=1), nn.Conv2d(stem, inner, 1, bias=False)
        self.norm, self.depth = nn.BatchNorm2d(inner), nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.back, self.last = nn.Conv2d(inner, stem, 1), nn.BatchNorm2d(stem)
        self.out = nn.Linear(stem, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.last(self.back(torch.tanh(self.depth(self.norm(self.inner(x))))))
        return self.out(torch.tanh(x).mean((2, 3)))


@pytest.mark.parametrize("step", [0.0, 0.1])
@pytest.mark.parametrize(
    ("build", "shape"), [(Convolutional, (8, 1, 6, 6)), (Perceptron, (8, 3)), (Normalised, (8, 1, 6, 6))]
)
def test_ten_rounds_end_in_a_network_of_those_widths(
    build: type[nn.Module], shape: tuple[int, ...], step: float
) -> None:
    """After ten growths the class, built at the final widths, loads the weights and is the same network."""
    model, x = randomised(build()), torch.randn(shape)
    rng = np.random.default_rng(0)
    expected = [answers(model, train, x) for train in (False, True)]
    for _ in range(10):
        arch = traced(model, x)
        chosen = [g for g in arch.groups if rng.random() < 0.8] or list(arch.groups)
        found = []
        for g in chosen:
            for neuron in rng.choice(g.width, int(rng.integers(1, 3)), replace=False):
                moved = step * torch.from_numpy(rng.standard_normal((2, g.dim)))
                found.append(Split(g.name, int(neuron), (w := float(rng.uniform(0.2, 0.8)), 1 - w), moved))
        split_neurons(model, found, arch=arch)
    grown = [answers(model, train, x) for train in (False, True)]
    if step:
        assert float((grown[0][0] - expected[0][0]).abs().max()) > 1e-6
    else:
        torch.testing.assert_close(grown, expected, rtol=0, atol=1e-12)
    widths = traced(model, x).widths
    assert all(w >= 10 for w in widths.values())
    fresh = build(**widths)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert repr(fresh) == repr(model)
    for train in (False, True):
        for a, b in zip(answers(fresh, train, x), answers(model, train, x), strict=True):
            assert torch.equal(a, b)
