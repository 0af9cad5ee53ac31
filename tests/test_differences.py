"""What splits change in the cut network is what really split networks change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from lightning_split import trace
from lightning_split.architecture import Architecture
from lightning_split.curvature import SplittingOperator
from lightning_split.differences import SplittingDifferences
from lightning_split.surgery import Split, split_neurons
from torch import Tensor, nn

from networks import CASES, loss_of, randomised, relu_mlp
from test_composites import CURVED
from test_composites import network as composite

pytestmark = pytest.mark.usefixtures("double")

Loss = Callable[[nn.Module, Tensor], Tensor]
WEIGHTS, ALONG = (-1.0, 2.0), (1.0, 0.5)  # a negative binary split


def _directions(arch: Architecture) -> dict[str, Tensor]:
    found = {g.name: torch.randn(g.width, g.dim) for g in arch.groups}
    return {name: v / v.norm(dim=1, keepdim=True) for name, v in found.items()}


def _split_changes(
    model: nn.Module, arch: Architecture, x: Tensor, loss: Loss, v: dict[str, Tensor], step: float
) -> dict[str, Tensor]:
    """The change of the loss by each split alone, of a network that is really split."""
    with torch.no_grad():
        before = loss(model, x)
        found: dict[str, Tensor] = {}
        for group in arch.groups:
            changes = []
            for neuron in range(group.width):
                grown = copy.deepcopy(model)
                delta = step * torch.tensor(ALONG)[:, None] * v[group.name][neuron]
                split_neurons(grown, [Split(group.name, neuron, WEIGHTS, delta)], arch=arch)
                changes.append(loss(grown, x) - before)
            found[group.name] = torch.stack(changes)
    return found


def _predicted(
    model: nn.Module,
    arch: Architecture,
    batches: list[Tensor],
    loss: Loss,
    v: dict[str, Tensor],
    step: float,
    far: float = 1.0,
) -> dict[str, Tensor]:
    """The first term far away and as displaced, and the second, averaged over the batches: ``(N, 3)``."""
    weights = {n: torch.tensor(WEIGHTS).expand(len(d), -1) for n, d in v.items()}
    moved = {n: step * torch.tensor(ALONG)[None, :, None] * d[:, None] for n, d in v.items()}
    further = {n: torch.full((len(d),), far) for n, d in v.items()}
    differences = SplittingDifferences(model, arch, batches, loss)
    found = list(
        differences.changes(weights, lambda k: {n: d[:, k].clone() for n, d in moved.items()}, further)
    )
    return {name: torch.stack([change[name] for change in found]).mean(0) for name in v}


@pytest.mark.parametrize("name", CASES)
def test_changes_are_those_of_really_split_networks(name: str) -> None:
    """Each neuron alone; at a small step what comes after is linear. Kinks and all."""
    case = CASES[name]
    model, x = randomised(case.model()).eval(), case.inputs()
    loss, arch = loss_of(torch.randn_like(model(x).detach())), trace(model, x)
    v = _directions(arch)
    exact = _split_changes(model, arch, x, loss, v, 1e-3)
    for group, change in _predicted(model, arch, [x], loss, v, 1e-3).items():
        scale = float(exact[group].abs().max())
        torch.testing.assert_close(change[:, 0], exact[group], rtol=2e-3, atol=1e-4 * scale + 1e-14)


@pytest.mark.parametrize("name", CURVED)
def test_changes_of_recurrent_and_attending_layers(name: str) -> None:
    """A neuron that is read by its own layer, by heads, by another network's layers."""
    model, x = composite(name)
    loss, arch = loss_of(1 + torch.zeros(())), trace(model, x)
    v = _directions(arch)
    exact = _split_changes(model, arch, x, loss, v, 1e-3)
    for group, change in _predicted(model, arch, [x], loss, v, 1e-3).items():
        scale = float(exact[group].abs().max())
        torch.testing.assert_close(change[:, 0], exact[group], rtol=5e-3, atol=1e-3 * scale + 1e-13)


def test_kinks_count_where_derivatives_are_blind_to_them() -> None:
    """A ReLU network at a large step: the true second derivative is zero, the change is not."""
    model, x = randomised(relu_mlp()).eval(), torch.randn(400, 5)
    loss, arch = loss_of(torch.randn(400, 3)), trace(model, x)
    v = _directions(arch)
    operator = SplittingOperator(model, arch, [x], loss, surrogate_beta=None)
    assert not any(bool(p.any()) for p in operator.matvec(v).values())
    exact = _split_changes(model, arch, x, loss, v, 0.05)
    near = _predicted(model, arch, [x], loss, v, 0.05)
    far = _predicted(model, arch, [x], loss, v, 0.01, far=5.0)
    closer = _predicted(model, arch, [x], loss, v, 0.01)
    for group, change in near.items():
        scale = float(exact[group].abs().max())
        assert scale > 1e-6
        torch.testing.assert_close(change[:, 0], exact[group], rtol=0.05, atol=0.02 * scale)
        torch.testing.assert_close(far[group][:, 0], change[:, 0])
        torch.testing.assert_close(far[group][:, 1], closer[group][:, 1])
        assert 0 < float(far[group][:, 2].sum()) < 0.1 * float(change[:, 2].sum())


def test_the_second_term_is_the_curvature_of_what_comes_after() -> None:
    """At a large step it makes the prediction exact; the noise of the random signs averages out."""
    model, x = randomised(relu_mlp()).eval(), torch.randn(400, 5)
    loss, arch = loss_of(torch.randn(400, 3)), trace(model, x)
    v = _directions(arch)
    exact = _split_changes(model, arch, x, loss, v, 1.0)
    for group, change in _predicted(model, arch, [x] * 400, loss, v, 1.0).items():
        left = (exact[group] - change[:, 0]).abs()
        assert float((exact[group] - change[:, 1:].sum(1)).abs().max()) < 0.1 * float(left.max())
        assert float(change[:, 2].sum()) > 0


def test_without_autocast_if_that_can_be() -> None:
    """What is cast would hide the displacement; code that relies on it is run as it is."""
    model, x = randomised(relu_mlp()).float().eval(), torch.randn(64, 5).float()
    arch, y = trace(model, x), torch.randn(64, 3).float()
    v = {name: d.float() for name, d in _directions(arch).items()}

    def loss(m: nn.Module, batch: Tensor, half: bool = False) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (m(batch.bfloat16() if half else batch).float() - y).square().mean()

    exact = _predicted(model, arch, [x], loss_of(y), v, 1e-3)
    found = _predicted(model, arch, [x], loss, v, 1e-3)
    rough = _predicted(model, arch, [x], lambda m, b: loss(m, b, half=True), v, 1.0)
    for group, change in exact.items():
        torch.testing.assert_close(found[group], change)
        assert bool(rough[group].isfinite().all())
