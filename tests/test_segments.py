"""Segments: which reads belong together, and that one double backward exists at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from lightning_split import trace
from lightning_split.curvature import SplittingOperator
from lightning_split.segments import Part, Plan, Segment, parts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks import CASES, loss_of


def test_reads_that_share_weights_are_one_part() -> None:
    """A chain falls apart at every cut; what reads the same sum, or the same layer, stays together."""
    theta = {(name, "weight"): nn.Parameter(torch.randn(3, 3)) for name in "abcd"}
    a, b, c, d = theta.values()
    x = torch.randn(2, 3)
    stream = x @ a
    cut = stream.view_as(stream)
    reads = [stream, (cut @ c).tanh(), stream + x @ b, (x @ d).sin(), x @ a]
    found = parts({i: read.grad_fn for i, read in enumerate(reads)}, [cut.grad_fn, None], theta)
    assert [(part.reads, [name for name, _ in part.theta]) for part in found] == [
        ([0, 2, 4], ["a", "b"]),
        ([1], ["c"]),
        ([3], ["d"]),
    ]
    assert parts({0: (x.clone().requires_grad_() * 2).grad_fn}, [], theta) == []


def test_a_part_is_complete_with_its_last_read() -> None:
    """Parts are handed out as early as can be, in any order, and reads without a part are passed over."""
    key = ("layer", "weight")
    w = nn.Parameter(torch.randn(3))
    some = [Part([1, 4], {key: w}), Part([2], {key: w}), Part([5], {key: w})]
    reads = [torch.full((2,), float(i)) * w.sum() for i in range(7)]
    plan = Plan(7, {i: torch.ones(2) for i in (1, 2, 3, 4, 5)}, list(some))
    assert plan.size == 6 * 4 * 2 * 4
    given = [plan.read(x) for x in reads]
    assert given == [None, None, some[1], None, some[0], some[2], None]
    plan.segment(some[1])
    late = plan.close()
    assert next(late) is some[0]
    plan.segment(some[0])
    assert next(late) is some[2]
    assert plan.read(reads[0]) is None
    plan.segment(some[2])
    assert list(late) == []


def test_passes_that_differ_are_told_apart() -> None:
    """Another number of calls, or another shape, is refused with what to do."""
    part = Part([0], {("layer", "weight"): nn.Parameter(torch.randn(3))})
    with pytest.raises(ValueError, match="1 and 0 times.*deterministic"):
        next(Plan(1, {0: torch.ones(2)}, [part]).close())
    with pytest.raises(ValueError, match=r"read \(3,\) where it was \(2,\)"):
        Plan(1, {0: torch.ones(2)}, [part]).read(torch.ones(3))


def test_the_products_of_segments_are_second_derivatives() -> None:
    """φ = Σ⟨c, tanh(w x)⟩ + ⟨c, w x⟩: the linear read adds nothing; weights not asked for are left out."""
    key, other = ("layer", "weight"), ("other", "weight")
    w, u = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    x, c, v = (torch.randn(3, dtype=torch.float64) for _ in range(3))
    segment, linear = Segment([((w * x).tanh(), c), (w * x, c)], {key: w}), Segment([(u * x, c)], {other: u})
    segment.differentiate()
    linear.differentiate()
    t = (w * x).tanh().detach()
    expected = -2 * c * t * (1 - t**2) * x**2 * v
    for _ in range(2):
        torch.testing.assert_close(segment.product({key: v})[key], expected)
    assert segment.product({other: v}) == {}
    assert linear.product({other: v}) == {}


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_one_double_backward_exists_at_a_time(cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for kept graphs, whatever the number of layers and batches; with it, all of them."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    differentiate = Segment.differentiate

    def counted(self: Segment) -> None:
        differentiate(self)
        alive.extend(weakref.ref(g) for g in self._first.values())
        counts.append(len({id(g()) for g in alive if g() is not None}))

    monkeypatch.setattr(Segment, "differentiate", counted)
    model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(4, 4, bias=False), nn.Tanh())))
    model.append(nn.Linear(4, 3))
    x = torch.randn(8, 4)
    operator = SplittingOperator(
        model, trace(model, x), [x] * 3, loss_of(torch.randn(8, 3)), cache_bytes=cache_bytes
    )
    operator.matvec({name: torch.randn(shape) for name, shape in operator.shapes.items()})
    assert counts == ([1] * 15 if cache_bytes == 0 else list(range(1, 16)))
    operator.release()
    assert not any(g() is not None for g in alive)


class _Noted(nn.Module):
    """Tells when it runs."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.note = events.append  # an attribute that is a list would be restored

    def forward(self, x: Tensor) -> Tensor:
        self.note("layer")
        return x.tanh()


class _Block(nn.Module):
    """A residual block whose stream has no splittable neurons, as in a Transformer."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act = _Noted(events)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def test_a_segment_is_done_with_before_the_next_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no two graphs exist at a time; in the user's autocast region nothing of ours is cast."""
    events: list[str] = []
    differentiate = Segment.differentiate

    def noted(self: Segment) -> None:
        events.append("segment")
        assert not torch.is_autocast_enabled("cpu")
        differentiate(self)

    monkeypatch.setattr(Segment, "differentiate", noted)
    model, x = nn.Sequential(*(_Block(events) for _ in range(3)), nn.Linear(4, 2)), torch.randn(8, 4)
    arch = trace(model, x)
    assert [g.name for g in arch.groups] == ["0.up", "1.up", "2.up"]

    def loss(m: nn.Module, b: Tensor) -> Tensor:
        events.append("pass")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(b).float().square().mean()

    events.clear()
    operator = SplittingOperator(model, arch, [x], loss, cache_bytes=0)
    operator.matvec({name: torch.randn(shape) for name, shape in operator.shapes.items()})
    assert events == ["pass", *["layer"] * 3, "pass", *["layer", "segment"] * 3]


def test_a_loss_may_take_gradients_of_its_own() -> None:
    """In weights that belong to no neuron, which are constants as long as nobody asks; flags stay."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(8, 4)
    model[2].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]

    def plain(m: nn.Module, b: Tensor) -> Tensor:
        loss = m(b).square().mean()
        assert loss.requires_grad  # in every pass
        return loss

    def penalised(m: nn.Module, b: Tensor) -> Tensor:
        loss = plain(m, b)
        (g,) = torch.autograd.grad(loss, m[2].weight, create_graph=True)
        return loss + 0 * g.square().sum()

    arch = trace(model, x)
    v = {"0": torch.randn(6, 5)}
    expected, found = (SplittingOperator(model, arch, [x], f).matvec(v)["0"] for f in (plain, penalised))
    torch.testing.assert_close(found, expected)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_several_vectors_take_one_preparation() -> None:
    """Quadratic forms equal those of separate products; the loss runs twice per batch."""
    case = CASES["residual"]
    model, x = case.model(), case.inputs()
    calls = []
    target = torch.randn(8, 3)

    def loss(m: nn.Module, b: Tensor) -> Tensor:
        calls.append(b)
        return loss_of(target)(m, b)

    operator = SplittingOperator(model, trace(model, x), [x, 2 * x], loss, cache_bytes=0)
    vectors = {name: torch.randn(n, 3, d) for name, (n, d) in operator.shapes.items()}
    forms = list(operator.quadratic_forms(vectors))
    assert len(calls) == 4
    for k in range(3):
        products = list(operator.products({name: v[:, k] for name, v in vectors.items()}))
        for form, product in zip(forms, products, strict=True):
            for name, v in vectors.items():
                torch.testing.assert_close(form[name][:, k], (v[:, k] * product[name]).sum(-1))


class _Checkpointed(nn.Module):
    def __init__(self, *, recompute: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.recompute = recompute

    def _block(self, x: Tensor) -> Tensor:
        return self.second(x.relu()).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = checkpoint(self._block, x, use_reentrant=False) if self.recompute else self._block(x)
        return self.third(x)


def test_gradient_checkpointing_changes_no_product() -> None:
    """Equal products, again and again, from graphs that are kept."""
    plain, saving = _Checkpointed(recompute=False), _Checkpointed(recompute=True)
    saving.load_state_dict(plain.state_dict())
    x, loss = torch.randn(8, 4), loss_of(torch.randn(8, 2))
    operators = [SplittingOperator(model, trace(model, x), [x], loss) for model in (plain, saving)]
    v = {name: torch.randn(shape) for name, shape in operators[0].shapes.items()}
    for _ in range(3):
        expected, found = (operator.matvec(v) for operator in operators)
        assert all(torch.equal(found[name], expected[name]) for name in v)
    assert [len(operator._kept) for operator in operators] == [1, 1]
