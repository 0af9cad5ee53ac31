"""Segments: which reads belong together, and that one double backward exists at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from lightning_split import trace
from lightning_split.curvature import SplittingOperator
from lightning_split.segments import Segment, segments
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks import CASES, loss_of


def test_reads_that_share_weights_are_one_segment() -> None:
    """A chain falls apart at every cut; what reads the same sum, or the same layer, stays together."""
    theta = {(name, "weight"): nn.Parameter(torch.randn(3, 3)) for name in "abcd"}
    a, b, c, d = theta.values()
    x = torch.randn(2, 3)
    stream = x @ a
    reads = [stream, (stream.detach() @ c).tanh(), stream + x @ b, (x @ d).sin(), x @ a]
    ones = [(read, torch.ones_like(read)) for read in reads]
    found = segments(ones, theta)
    assert [[name for name, _ in s.theta] for s in found] == [["a", "b"], ["c"], ["d"]]
    assert [s.size for s in found] == [6 * 4 * 6 * k for k in (3, 1, 1)]
    assert segments([(x.clone().requires_grad_() * 2, x)], theta) == []


def test_the_products_of_segments_are_second_derivatives() -> None:
    """φ = Σ⟨c, tanh(w x)⟩ + ⟨c, w x⟩: the linear read adds nothing; weights not asked for are left out."""
    key, other = ("layer", "weight"), ("other", "weight")
    w, u = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    x, c, v = (torch.randn(3, dtype=torch.float64) for _ in range(3))
    parts = segments([((w * x).tanh(), c), (w * x, c), (u * x, c)], {key: w, other: u})
    for part in parts:
        part.differentiate()
    t = (w * x).tanh().detach()
    expected = -2 * c * t * (1 - t**2) * x**2 * v
    torch.testing.assert_close(parts[0].product({key: v})[key], expected)
    assert parts[0].product({other: v}) == {}
    assert parts[1].product({other: v}) == {}  # linear


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_one_double_backward_exists_at_a_time(cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for kept graphs, whatever the number of layers and batches; with it, all of them."""
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    differentiate = Segment.differentiate

    def counted(self: Segment) -> None:
        differentiate(self)
        alive.extend(weakref.ref(g) for g in (self._first or {}).values())
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
