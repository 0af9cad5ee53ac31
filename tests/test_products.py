"""What products of activations cost, against torch's counter on networks that were really grown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_split import (
    Activations,
    Energy,
    KnapsackEnergy,
    RandomSplit,
    SelectionStrategy,
    grow,
    split_neurons,
    trace,
)
from lightning_split.context import GrowthContext
from lightning_split.surgery import Split
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from networks import Raw, loss_of, randomised

pytestmark = pytest.mark.usefixtures("double")


def _matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v


def _bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2))
    return torch.bmm(scores.softmax(-1), flat[2]).unflatten(0, q.shape[:2])


def _einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhsd,bhtd->bhst", q, k).softmax(-1)
    return torch.einsum("bhst,bhtd->bhsd", scores, v)


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


def _baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    scores = torch.baddbmm(torch.zeros(()), flat[0], flat[1].mT)
    return torch.bmm(scores.softmax(-1), flat[2]).unflatten(0, q.shape[:2])


WAYS: dict[str, Callable[..., Tensor]] = {
    "matmul": _matmul,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    "linear": _linear,
    "fused": F.scaled_dot_product_attention,
}


class Attention(nn.Module):
    """Attention by hand; the values can grow, and so can the neurons on the other side of each weight.

    Args:
        way: How the products are written.
        values: Channels of a head's values; as many as those of queries let torch use its fused kernel.
        open_heads: Leave the number of heads open, so that a whole head is a neuron.
    """

    def __init__(self, way: str, values: int = 5, open_heads: bool = False) -> None:
        super().__init__()
        self.attend, self.open = WAYS[way], open_heads
        self.embed, self.q, self.k = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(6, 8)
        self.v, self.mix, self.out = nn.Linear(6, 2 * values), nn.Linear(2 * values, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        q, k, v = self.q(x), self.k(x), self.v(x)
        size = [q.shape[-1] // 2, k.shape[-1] // 2, v.shape[-1] // 2] if not self.open else [4, 4, 5]
        heads = [
            t.unflatten(-1, (-1, n) if self.open else (2, n)) for t, n in zip((q, k, v), size, strict=True)
        ]
        y = self.attend(*(t.transpose(1, 2) for t in heads))
        return self.out(torch.tanh(self.mix(y.transpose(1, 2).flatten(2)))).mean(1)


class Shared(nn.Module):
    """Two heads of queries share one of keys and values, and the code leaves open how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.out = nn.Linear(3, 6), nn.Linear(6, 16), nn.Linear(16, 2)
        self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        heads = [t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x))]
        y = F.scaled_dot_product_attention(*heads, enable_gqa=True)
        return self.out(torch.tanh(y.transpose(1, 2).flatten(2))).mean(1)


class Cross(nn.Module):
    """``nn.MultiheadAttention`` from one sequence to another, longer and wider one."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.a, self.b, self.packed = nn.Linear(3, 8), nn.Linear(2, 8 if packed else 6), packed
        sizes = {} if packed else {"kdim": 6, "vdim": 6}
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True, **sizes), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.tanh(self.b(torch.cat([x, x, x], 1)[..., :2]))
        y, _ = self.attention(torch.tanh(self.a(x)), memory, memory, need_weights=not self.packed)
        return self.out(torch.tanh(y)).mean(1)


class Positions(nn.Module):
    """Raw matrices over positions, on either side; a fixed filter for every channel; a refused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.out = nn.Conv1d(2, 6, 1), nn.Linear(4, 2)
        self.mid = nn.Conv1d(6, 4, 1)
        self.before, self.after = nn.Parameter(torch.randn(5, 5) / 2), nn.Parameter(torch.randn(5, 5) / 2)
        self.rows = nn.Parameter(torch.randn(4, 5) / 2)
        self.register_buffer("blur", torch.tensor([[[1.0, 2.0, 1.0]]]) / 4, persistent=False)
        self.normed = weight_norm(nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.lift(x)) @ self.after
        x = torch.tanh(F.linear(x, self.before) + x)
        x = torch.einsum("bct,st->bcs", x, self.rows)
        x = torch.tanh(self.mid(x))
        x = F.conv1d(x, self.blur.expand(x.shape[1], 1, 3), padding=1, groups=x.shape[1])
        return self.normed(self.out((self.rows.t() @ x.transpose(1, 2)).mean(1)))


def _vit() -> nn.Module:
    import torchvision

    return torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 12, num_classes=3)


def _swin() -> nn.Module:
    import torchvision

    return torchvision.models.SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=3)


def _timm() -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=12, num_heads=3, num_classes=3
    )
    return model


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2))


class Recurrent(nn.Module):
    """Hidden units on both sides of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.rnn(x)[0])).mean(1)


SEQUENCE, IMAGE = (3, 5, 3), (2, 3, 16, 16)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{way: (lambda way=way: Attention(way), SEQUENCE) for way in WAYS},  # type: ignore[misc]
    "flash": (lambda: Attention("fused", 4), SEQUENCE),
    "single": (lambda: Attention("matmul", 1), SEQUENCE),
    "heads": (lambda: Attention("matmul", open_heads=True), SEQUENCE),
    "fused heads": (lambda: Attention("fused", open_heads=True), SEQUENCE),
    "shared heads": (Shared, SEQUENCE),
    "encoder": (_encoder, SEQUENCE),
    "cross": (lambda: Cross(True), SEQUENCE),
    "wide cross": (lambda: Cross(False), SEQUENCE),
    "positions": (Positions, (3, 2, 5)),
    "raw": (Raw, (3, 2, 7, 7)),
    "vit": (_vit, IMAGE),
    "swin": (_swin, IMAGE),
    "timm": (_timm, (2, 3, 32, 32)),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Any]:
    """A network, its inputs, and a loss."""
    torch.manual_seed(3)
    make, shape = NETWORKS[name]
    model, x = randomised(make()).eval(), torch.randn(shape)
    return model, x, loss_of(torch.randn_like(model(x).detach()))


def macs_of(model: nn.Module, x: Tensor) -> float:
    """What torch counts, per sample; it does not know the fused attention on the CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2 / len(x)


class Some(SelectionStrategy):
    """Two of three neurons, in every group."""

    cost = "macs"

    def select(self, candidates: Any) -> list[Any]:
        """Some candidates of every group."""
        return [c for c in candidates if c.neuron % 3 != 1]


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_of_products_are_those_that_torch_counts(name: str) -> None:
    """Before and after a growth of all groups at once, so that products meet products: to the last MAC."""
    model, x, loss = problem(name)
    before = macs_of(model, x)
    report = grow(model, [x], loss, grower=RandomSplit(), strategy=Some())
    assert {s.group for s in report.splits} == set(report.widths_before)
    after = macs_of(model, x)
    assert (report.cost_before.macs, report.cost_after.macs) == (before, after)
    assert (report.spending.before, report.spending.before + report.spending.spent) == (before, after)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("vit", "swin", "timm")])
def test_a_group_says_what_one_more_neuron_adds(name: str) -> None:
    """One neuron of each group by itself, counted in parameters and by torch."""
    groups = trace(*problem(name)[:2]).groups
    assert groups
    for group in groups:
        model, x, _ = problem(name)
        arch = trace(model, x)
        macs, params = macs_of(model, x), sum(p.numel() for p in model.parameters())
        split_neurons(model, [Split(group.name, 0, (0.5, 0.5), torch.zeros(2, group.dim))], arch=arch)
        assert macs_of(model, x) - macs == arch.group(group.name).macs
        assert sum(p.numel() for p in model.parameters()) - params == arch.group(group.name).params


@pytest.mark.parametrize("train", [False, True])
def test_values_grow_under_dropout_of_the_scores(train: bool) -> None:
    """Random numbers for each pair of positions are none for each neuron: torch's Transformer layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.5, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2)).train(train)
    assert trace(model, torch.randn(3, 5, 3)).widths == {
        **dict.fromkeys(("1.self_attn", "1.self_attn#2"), 4),
        "1.linear1": 12,
    }


def test_a_recurrent_unit_counts_its_own_weight_to_itself() -> None:
    """One more unit of ``n`` adds ``2 n + 1`` recurrent weights for each gate."""
    group = trace(Recurrent(), torch.randn(2, 5, 3)).groups[0]
    assert group.params == 4 * (3 + 2 * 4 + 1 + 2) + 2
    assert group.macs == 5 * (4 * (3 + 2 * 4 + 1) + 2)


@pytest.mark.parametrize(("name", "budget"), [("matmul", 0.5), ("heads", 0.3), ("wide cross", 0.1)])
def test_budgets_and_limits_hold_where_values_grow(name: str, budget: float) -> None:
    """A share of the network, and an absolute limit, by torch's counter; what would still fit is taken."""
    model, x, loss = problem(name)
    before = macs_of(model, x)
    grow(model, [x], loss, strategy=KnapsackEnergy(budget, cost="macs", max_factor=None), step_size=1e-3)
    assert before < macs_of(model, x) <= before * (1 + budget)
    model, x, loss = problem(name)
    most = int(before * (1 + budget))
    report = grow(model, [x], loss, strategy=KnapsackEnergy(10**9), max_macs=most, step_size=1e-3)
    assert macs_of(model, x) <= most
    grown = {(s.group, s.neuron) for s in report.splits}
    left = {c.group for c in report.candidates if c.gain > 0 and (c.group, c.neuron) not in grown}
    assert all(trace(model, x).group(g).macs > most - macs_of(model, x) for g in left)


class Written(TorchDispatchMode):
    """Counts the values that products with parameters, or with what is made of them alone, return."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kept: list[Tensor] = [*model.parameters()]  # so that no other takes the memory
        self.weights = {p.untyped_storage().data_ptr() for p in self.kept}
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        of_weights = [t.untyped_storage().data_ptr() in self.weights for t in args if isinstance(t, Tensor)]
        if name in ("mm", "bmm", "convolution", "addmm", "baddbmm"):
            factors = of_weights[1:3] if name in ("addmm", "baddbmm") else of_weights[:2]
            self.values += out.numel() * any(factors)
        elif of_weights and all(of_weights):
            for t in tree_leaves(out):
                self.kept.append(t)
                self.weights.add(t.untyped_storage().data_ptr())
        return out


def written_by(model: nn.Module, x: Tensor) -> float:
    """Values that products with weights write for one sample."""
    with sdpa_kernel(SDPBackend.MATH), Written(model) as counted:
        model(x)
    return counted.values / len(x)


@pytest.mark.parametrize("name", ["matmul", "heads", "cross", "wide cross", "raw", "positions"])
def test_activations_are_what_products_with_weights_write(name: str) -> None:
    """Queries, keys and values at their own lengths, and raw matrices, before and after a growth."""
    model, x, loss = problem(name)
    strategy = Some()
    vars(strategy)["cost"] = "activations"
    before = written_by(model, x)
    report = grow(model, [x], loss, strategy=strategy)
    assert (report.spending.before, report.spending.before + report.spending.spent) == (
        before,
        written_by(model, x),
    )


def test_energy_counts_products_and_every_weight() -> None:
    """The stated linear model, of what torch and hooks count."""
    model, x, loss = problem("matmul")
    context = GrowthContext(model, trace(model, x), loss, [x])
    weights = sum(p.numel() for p in model.parameters())
    values = Activations().price(context).total
    prices = Energy(mac=2.0, byte=3.0).price(context)
    assert prices.total == pytest.approx(2.0 * macs_of(model, x) + 3.0 * 8 * (weights + 2 * values))
    added = prices.added({"v": 2, "mix": 1})
    split_neurons(
        model,
        [
            Split(g, 0, (1 / n,) * n, torch.zeros(n, context.arch.group(g).dim))
            for g, n in (("v", 3), ("mix", 2))
        ],
        arch=context.arch,
    )
    grown = Energy(mac=2.0, byte=3.0).price(GrowthContext(model, trace(model, x), loss, [x]))
    assert math.isclose(grown.total, prices.total + added, rel_tol=1e-12)
