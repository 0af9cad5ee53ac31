"""trace: groups as written out by hand, refusals with their reasons, and a model left untouched."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_split import LayerRule, register_layer_rule, trace
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from exactness import assert_splits_exactly
from networks import CASES, Residual, randomised

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_written_out_by_hand(name: str) -> None:
    """Producers, channelwise layers and consumers of every group of the case table."""
    case = CASES[name]
    arch = trace(randomised(case.model()), case.inputs())
    assert {g.name: (g.producers, g.channelwise, g.consumers) for g in arch.groups} == case.groups


@pytest.mark.parametrize("name", CASES)
def test_every_neuron_is_explained_or_refused(name: str) -> None:
    """Each output of each producer is in exactly one group or under unsplittable."""
    case = CASES[name]
    arch = trace(case.model(), case.inputs())
    produced = {i for (_, port), p in arch.ports.items() if port == "out" for i in p.neuron.tolist()}
    grouped = [i for g in arch.groups for i in g.neurons]
    assert len(grouped) == len(set(grouped)) == sum(g.width for g in arch.groups)
    assert len(produced) == len(grouped) + sum(u.width for u in arch.unsplittable)


def test_dim_counts_weights_and_biases_of_all_producers() -> None:
    """dim is the number of incoming weights over all producers, biases included."""
    arch = trace(Residual(), torch.randn(2, 1, 6, 6))
    assert arch.group("stem").dim == (9 + 1) + (5 * 9 + 1)
    assert arch.group("conv1").dim == 4 * 9


def test_costs_of_one_more_neuron_by_hand() -> None:
    """params and macs count incoming, channelwise and outgoing weights at the true spatial sizes."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.Flatten(),
        nn.Linear(6 * 16, 2),
    )
    arch = trace(net, torch.randn(3, 1, 8, 8))
    first, second = arch.groups
    assert (first.params, first.macs) == (9 + 1 + 2 + 6 * 9, 9 * 36 + 6 * 9 * 16)
    assert (second.params, second.macs) == (4 * 9 + 1 + 2 * 16, 4 * 9 * 16 + 2 * 16)


def test_tracing_leaves_the_model_as_it_was() -> None:
    """Parameters (identity and value), buffers, modes, gradients, hooks and random state are unchanged."""
    model = randomised(Residual())
    model.norm1.eval()
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    before, grad = copy.deepcopy(model.state_dict()), model.stem.weight.grad
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    modes, attributes = [m.training for m in model.modules()], [dict(vars(m)) for m in model.modules()]
    rng = torch.get_rng_state()
    trace(model, torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert identities == [id(t) for t in (*model.parameters(), *model.buffers())]
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model.stem.weight.grad is grad
    assert modes == [m.training for m in model.modules()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    for m, old in zip(model.modules(), attributes, strict=True):
        assert {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str))} == {
            k: v for k, v in old.items() if isinstance(v, (int, float, str))
        }
    assert torch.equal(torch.get_rng_state(), rng)


def test_branches_used_in_training_only_are_seen() -> None:
    """A consumer that only runs in training mode is part of the group, whatever the model's mode."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out, self.aux = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            x = torch.tanh(self.body(x))
            return (self.out(x), self.aux(x)) if self.training else self.out(x)

    for model in (Auxiliary().train(), Auxiliary().eval()):
        assert trace(model, torch.randn(2, 3)).group("body").consumers == ("out", "aux")


class Refused(nn.Module):
    """A hidden layer whose output goes through ``middle`` before the last layer."""

    def __init__(self, middle: Any, width: int = 6, read: int = 6) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(3, width), nn.Linear(read, 2)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(torch.tanh(self.hidden(x))))


_gamma = nn.Parameter(torch.randn(6))
REFUSALS = {
    "layer norm": (nn.LayerNorm(6), 6, "layer normalisation"),
    "softmax": (lambda x: x.softmax(1), 6, "softmax normalises over the neurons"),
    "raw parameter": (lambda x: x * _gamma.to(x), 6, "extend along the neurons"),
    "sum": (lambda x: x + x.sum(1, keepdim=True), 6, "sum mixes the neurons"),
    "slice": (lambda x: x[:, :4], 4, "slice cuts or reorders"),
    "flip": (lambda x: x.flip(1), 6, "flip cuts or reorders"),
    "sort": (lambda x: x.sort(1)[0], 6, "sort is an operator"),
    "functional": (lambda x: F.linear(x, torch.ones(6, 6).to(x)), 6, "outside of a layer with a rule"),
    "gather": (lambda x: x[:, torch.tensor([1, 0, 2, 3, 4, 5])], 6, "indexing"),
    "cut axis": (lambda x: x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6), 6, "after growth"),
    "attention": (lambda x: x @ (x.T @ x), 6, "contracts the neurons|matrix product"),
    "split": (lambda x: x.split(3, 1)[0] * x.split(3, 1)[1], 3, "split cuts or reorders"),
    "query and key": (
        lambda x: F.scaled_dot_product_attention(x[None], x[None], torch.ones(1, len(x), 6).to(x))[0],
        6,
        "attention scores contract",
    ),
    "cumsum": (lambda x: x.cumsum(1), 6, "cumsum mixes the neurons"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_understood_is_refused_with_its_reason(name: str) -> None:
    """A barrier leaves the neurons alone and names the operator."""
    middle, read, reason = REFUSALS[name]
    arch = trace(Refused(middle, read=read).double(), torch.randn(4, 3))
    reasons = {u.name: u.reason for u in arch.unsplittable}
    assert "hidden" not in arch.widths
    assert re.search(reason, reasons["hidden"]), reasons["hidden"]


def _frozen(m: Refused) -> None:
    m.hidden.weight.requires_grad_(False)


def _tied(m: Refused) -> None:
    m.middle.weight = m.hidden.weight


def _parametrized(m: Refused) -> None:
    parametrize.register_parametrization(m.hidden, "weight", nn.Tanh())


def _pruned(m: Refused) -> None:
    prune.l1_unstructured(m.last, "weight", amount=0.5)


def _overridden(m: Refused) -> None:
    class Standardised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)

    m.last = Standardised(6, 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_frozen, "'hidden.weight' is frozen"),
        (_tied, "shared by 'hidden.weight' and 'middle.weight'"),
        (_parametrized, "no reason: the layer itself is refused"),
        (_pruned, "tensor 'weight' is computed from others"),
        (_overridden, "outside of a layer with a rule"),
    ],
)
def test_layers_in_a_special_state_are_refused(change: Any, reason: str) -> None:
    """Frozen, tied, parametrized, pruned and overridden layers have a stated answer."""
    model = Refused(nn.Linear(6, 3) if change is _tied else nn.Identity(), 6, 6)
    if change is _tied:
        model.hidden, model.middle, model.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
    change(model)
    arch = trace(model, torch.randn(4, 6 if change is _tied else 3))
    assert "hidden" not in arch.widths
    if change is not _parametrized:
        assert reason in {u.name: u.reason for u in arch.unsplittable}["hidden"]


def test_penalties_on_weights_do_not_block_growth() -> None:
    """A weight decay written into the forward pass is not a use of the neurons."""

    class Penalised(Refused):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().mean() + sum(p.square().sum() for p in self.parameters())

    from lightning_split.tracing import trace_step

    arch = trace_step(Penalised(nn.Identity()), torch.randn(4, 3), lambda m, b: m(b))
    assert list(arch.widths) == ["hidden"]


def test_a_weight_used_outside_of_its_layer_is_refused() -> None:
    """Neurons whose layer's weight is also contracted elsewhere cannot be split."""

    class Leaky(Refused):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x @ self.hidden.weight.exp().T).detach().mean()

    arch = trace(Leaky(nn.Identity()), torch.randn(4, 3))
    reasons = {u.name: u.reason for u in arch.unsplittable}
    assert "'hidden.weight', which the code uses itself" in reasons["hidden"]


def test_a_hard_coded_width_is_found_by_the_trial() -> None:
    """A reshape to a constant number of features shows only when the network is really widened."""

    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.out = nn.Conv2d(1, 4, 3), nn.Linear(4 * 16, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.fc(torch.tanh(self.conv(x)).view(-1, 4 * 16))))

    arch = trace(LeNet(), torch.randn(2, 1, 6, 6))
    assert list(arch.widths) == ["fc"]
    assert "after growth" in {u.name: u.reason for u in arch.unsplittable}["conv"]


def test_single_channels_do_not_slip_through() -> None:
    """With one neuron nothing varies along its axis; picking "channel 0" is still found out."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(2, 1, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.conv(x))[:, 0])

    assert "conv" not in trace(First(), torch.randn(4, 2, 8)).widths


def test_lazy_layers_ask_for_a_batch() -> None:
    """A lazy network has nothing to trace yet, and the message says what to do."""
    with pytest.raises(ValueError, match="layer '0' is lazy.*run the model on one batch"):
        trace(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), torch.randn(2, 4))


def test_users_rules_describe_their_layers() -> None:
    """A registered rule makes a layer of the user's own splittable; a wrong one is a TypeError."""

    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(-(x[:, None] - self.centres).square().sum(2))

    model = nn.Sequential(nn.Linear(2, 3), Distance(), nn.Linear(4, 2))
    assert trace(model, torch.randn(5, 2)).groups == ()

    @register_layer_rule(Distance)
    class DistanceRule(LayerRule):
        role = "mixer"

        def axes(self, layer: nn.Module) -> dict[str, dict[int, str]]:
            return {"centres": {0: "out"}}

    arch = trace(model, torch.randn(5, 2))
    assert arch.widths == {"1": 4}
    assert "not linear in the neurons" in arch.unsplittable[0].reason
    with pytest.raises(TypeError, match="subclass of nn.Module"):
        register_layer_rule(model, DistanceRule())
    with pytest.raises(TypeError, match="must be an instance of LayerRule"):
        register_layer_rule(Distance, DistanceRule)


def test_the_table_names_groups_and_reasons() -> None:
    """print(arch) shows groups, widths, members, costs, then what is unsplittable and why."""
    text = str(trace(CASES["mlp"].model(), CASES["mlp"].inputs()))
    assert "13 splittable neurons in 2 groups." in text
    assert "they are part of the model's output" in text
    assert [line.split(" | ")[1].strip() for line in text.splitlines()[2:4]] == ["7", "6"]


def test_a_mode_that_cannot_be_run_is_told() -> None:
    """A model that fails in its other mode is traced in its own, and the table says what was not seen."""

    class NeedsTargets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("targets are missing")
            return self.out(torch.tanh(self.body(x)))

    arch = trace(NeedsTargets().eval(), torch.randn(2, 3))
    assert arch.widths == {"body": 4}
    assert str(arch).endswith("because a pass in that mode fails: targets are missing")
    assert "training mode only were not seen" in arch.note
    assert arch.without({"body": "x"}).note == arch.note
    assert trace(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(2, 3)).note == ""


def test_a_model_that_runs_in_training_mode_only_says_that_values_were_not_compared() -> None:
    """Without a pass in eval mode there is no proof by values, and the architecture tells so."""

    class TrainingOnly(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("targets, please")
            return super().forward(x)

    model = TrainingOnly(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double().train()
    arch = trace(model, torch.randn(4, 3, dtype=torch.float64))
    assert arch.widths == {"0": 6}
    assert "targets, please" in arch.note
    assert "compared sizes only" in arch.note


def test_an_error_of_the_model_comes_alone() -> None:
    """A forward pass that fails fails with its own error, not with those of tracing before it."""

    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError) as raised:
        trace(Failing(2, 2), torch.randn(1, 2))
    assert raised.value.__context__ is None


def test_a_normalised_input_is_no_layer_that_was_never_called() -> None:
    """A channelwise layer that meets no neuron has been seen all the same."""
    arch = trace(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3))
    assert not arch.note
    assert arch.widths == {"1": 4}


def test_a_gate_on_a_grouped_convolution_splits_with_it() -> None:
    """Each channel of a neuron meets a gate of its own: RegNet's squeeze-excite."""
    grouped = nn.Conv2d(4, 6, 3, groups=2, padding=1)
    model = Gated(grouped, nn.Conv2d(6, 6, 1), nn.Conv2d(6, 3, 1))
    arch = assert_splits_exactly(model, torch.randn(2, 4, 5, 5))
    (group,) = arch.groups
    assert (group.width, group.producers) == (3, ("grouped", "gate"))


class Gated(nn.Module):
    def __init__(self, grouped: nn.Module, gate: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.grouped, self.gate, self.out = grouped, gate, out

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(x)
        return self.out(h * torch.sigmoid(self.gate(h.mean((2, 3), keepdim=True))))


def test_the_table_says_once_what_is_the_same() -> None:
    """Paths are cut to what differs from the group's name; like refusals share a row."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(4, 2))
    arch = trace(model, torch.randn(2, 3, 4))
    text = str(arch)
    (mlp,) = [row for row in text.splitlines() if row.startswith("0.layers.1.linear1")]
    assert [cell.strip() for cell in mlp.split("|")] == [
        *("0.layers.1.linear1", "6", "5", "-", "-", "…linear2", "9", "24"),
    ]
    (keys,) = [row for row in text.splitlines() if row.startswith("0.layers.1.self_attn#2")]
    assert [cell.strip() for cell in keys.split("|")] == [
        *("0.layers.1.self_attn#2", "2", "10", "-", "-", "…self_attn", "20", "66"),
    ]
    (stream,) = [row for row in text.splitlines() if row.startswith("0.layers.*.linear2")]
    assert [cell.strip() for cell in stream.split("|")] == [
        *("0.layers.*.linear2", "3 x 4"),
        "add meets values that extend along the neurons but belong to none",
    ]
