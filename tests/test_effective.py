"""Weights that are computed of others: weight norm and parametrizations grow as plain weights do, or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning_split import (
    Exact,
    Folding,
    GradMax,
    LineSearch,
    Mixed,
    SteepestSplitting,
    TopK,
    fit_to_state_dict,
    grow,
    split_neurons,
    trace,
)
from lightning_split.architecture import Architecture
from lightning_split.company import grow_shadow
from lightning_split.curvature import SplittingOperator
from lightning_split.effective import EffectiveWeights
from lightning_split.optim import carry_state
from lightning_split.stepsize import Absolute
from lightning_split.surgery import Split, Surgery
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm, weight_norm
from torch.utils.data import DataLoader

from exactness import depends_on_every_group, deviation, randomise
from modules import Classifier, assert_same, images, trainer, two_splits

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated"),
]

Norm = Callable[..., Any]
STYLES: dict[str, Norm] = {"new": parametrizations.weight_norm, "old": weight_norm}


class Tcn(nn.Module):
    """Dilated, depthwise and transposed convolutions with a residual sum, every weight under a norm."""

    def __init__(self, norm: Norm, dim: int | None = 0) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(3, 6, 3, padding=1), dim=dim)
        self.inner = norm(nn.Conv1d(6, 6, 3, padding=2, dilation=2, bias=False), dim=dim)
        self.deep = norm(nn.Conv1d(6, 12, 3, padding=1, groups=6), dim=dim)
        self.up = norm(nn.ConvTranspose1d(12, 4, 4, stride=2), dim=dim)
        self.head = norm(nn.Linear(4, 2), dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.deep(h + torch.tanh(self.inner(h))))
        return self.head(torch.tanh(self.up(h)).mean(-1))


def tcn(style: str = "new", dim: int | None = 0) -> tuple[Tcn, Tensor]:
    """Such a network, its norms no longer those of its directions, some of them negative; and an input."""
    model, x = Tcn(STYLES[style], dim), torch.randn(4, 3, 10)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1.5).add_(0.2 * torch.randn_like(p))
            if name.endswith(("original0", "_g")) and p.numel() > 1:
                p.flatten()[1] *= -1
        model(x)  # the old style computes weights in the forward pass only
    return model, x


def plain_of(model: Tcn) -> Tcn:
    """The same network without norms. (A deep copy shares its classes, which torch would change.)"""
    plain = Tcn(lambda layer, dim: layer)
    with torch.no_grad():
        for layer, other in zip(plain.children(), model.children(), strict=True):
            layer.weight.copy_(other.weight)
            if layer.bias is not None:
                layer.bias.copy_(other.bias)
    return plain


class Exp(nn.Module):
    """Positive weights."""

    def forward(self, raw: Tensor) -> Tensor:
        return raw.exp()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.log()


class Polar(nn.Module):
    """Size and sign, as two tensors of which one is no more than a choice."""

    def forward(self, size: Tensor, rest: Tensor) -> Tensor:
        return size * rest

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.abs() + 1, weight / (weight.abs() + 1)


def positive(inner: nn.Module | None = None) -> nn.Sequential:
    """Two hidden layers whose weights and biases are exponentials."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), inner or nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    for layer in model:
        if isinstance(layer, nn.Linear):
            for name in ("weight", "bias"):
                with torch.no_grad():
                    getattr(layer, name).uniform_(0.1, 0.5)
                parametrize.register_parametrization(layer, name, Exp())
    return model


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a model that a growth that is taken back must leave alone: the very objects."""
    return {
        path: (
            type(m),
            {
                n: (id(p), p.detach().clone(), p.requires_grad)
                for n, p in m._parameters.items()
                if p is not None
            },
            {n: id(b) for n, b in m._buffers.items()},
            {n: id(v) for n, v in m._modules.items()},
            {n: id(v) for n, v in vars(m).items()},
            list(m._forward_pre_hooks.items()),
        )
        for path, m in model.named_modules()
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = everything(model)
    assert list(after) == list(before)
    for path, was in before.items():
        now = after[path]
        assert now[0] is was[0]
        assert list(now[1]) == list(was[1])
        for name, (number, value, trained) in was[1].items():
            assert now[1][name][0] == number
            assert now[1][name][2] == trained
            assert torch.equal(now[1][name][1], value)
        assert now[2:] == was[2:]


def halves(arch: Architecture, shift: float = 0.0, weights: tuple[float, ...] = (0.5, 0.5)) -> list[Split]:
    """One neuron of every group, in two."""
    return [
        Split(g.name, g.width // 2, weights, shift * torch.tensor([[1.0], [-1.0]]).expand(2, g.dim))
        for g in arch.groups
    ]


# exactness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("style", STYLES)
def test_weight_normed_networks_grow_exactly(style: str, dim: int | None) -> None:
    """Producers, consumers, depthwise and transposed layers, again and again, whatever the norm is over."""
    model, x = tcn(style, dim if dim != 2 else 0)
    if dim == 2:
        model.inner = STYLES[style](nn.Conv1d(6, 6, 3, padding=2, dilation=2), dim=2)
    kinds = {path: type(m) for path, m in model.named_modules()}
    assert deviation(model, x) < 1e-12
    assert deviation(model, x, seed=1) < 1e-12
    arch = trace(model, x)
    assert arch.widths["first"] == model.inner.in_channels == 18
    assert arch.widths["up"] > 12
    assert {path: type(m) for path, m in model.named_modules()} == kinds
    assert model.inner.out_channels == model.deep.groups == 18


def test_displacements_are_those_of_the_effective_weight() -> None:
    """A split at ε does to a weight-normed network what it does to the one without weight norm."""
    model, x = tcn()
    plain = plain_of(model)
    arch, expected = trace(model, x), model(x)
    split_neurons(model, halves(arch, 0.1, (2.0, -1.0)), arch=arch)
    split_neurons(plain, halves(arch, 0.1, (2.0, -1.0)), arch=trace(plain, x))
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
    assert (model(x) - expected).abs().max().item() > 1e-3


def test_every_group_of_a_weight_normed_network_shows_in_its_outputs() -> None:
    """Otherwise the tests of exactness would prove nothing."""
    model, x = tcn()
    assert depends_on_every_group(model, x, trace(model, x)) == []


@pytest.mark.parametrize("style", STYLES)
def test_batch_norm_behind_weight_norm(style: str) -> None:
    """Scale and statistics are copied beside the originals."""
    norm = STYLES[style]
    model = nn.Sequential(
        *(norm(nn.Conv2d(2, 4, 3)), nn.BatchNorm2d(4), nn.Tanh(), norm(nn.Conv2d(4, 5, 3))),
        *(nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), norm(nn.Linear(20, 3))),
    )
    x = torch.randn(6, 2, 6, 6)
    randomise(model, x)
    assert deviation(model, x) < 1e-12
    assert trace(model, x).widths == {"0": 10, "3": 11}


def test_norms_of_zero() -> None:
    """Where the weight is zero the direction stays; a row that comes to life has the norm of its weight."""
    model, x = tcn()
    with torch.no_grad():
        model.first.parametrizations.weight.original0[2] = 0
        model.up.parametrizations.weight.original0[3] = 0
    expected = model(x)
    direction = model.first.parametrizations.weight.original1[2].clone()
    arch = trace(model, x)
    still, moved = torch.zeros(2, arch.group("first").dim), torch.zeros(2, arch.group("up").dim)
    split_neurons(
        model, [Split("first", 2, (2.0, -1.0), still), Split("up", 1, (1.0, 0.0), moved)], arch=arch
    )
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    g, v = model.first.parametrizations.weight.original0, model.first.parametrizations.weight.original1
    assert g[2].item() == g[3].item() == 0
    assert torch.equal(v[2], direction)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    arch = trace(model, x)
    displaced = torch.zeros(2, arch.group("first").dim)
    displaced[0, :9] = 1.0
    before = copy.deepcopy(model)
    split_neurons(model, [Split("first", 2, (1.0, 0.0), displaced)], arch=arch)
    assert model.first.weight[2].norm().item() == pytest.approx(3.0)
    assert (model(x) - before(x)).abs().max().item() > 1e-3


def test_what_no_split_touches_keeps_its_bits_and_directions_their_length() -> None:
    """The steps of an optimizer depend on how long v is, so no row of v may change its length."""
    model, x = tcn()
    before, arch = copy.deepcopy(model), trace(model, x)
    moved = 0.1 * torch.randn(2, arch.group("first").dim)
    split_neurons(model, [Split("first", 1, (0.5, 0.5), moved)], arch=arch)
    kept = [0, *range(3, 7)]
    for old, new in zip(before.first.parameters(), model.first.parameters(), strict=True):
        assert torch.equal(new[kept], old[[0, *range(2, 6)]])
    for old, new in zip(
        before.up.parametrizations.parameters(), model.up.parametrizations.parameters(), strict=True
    ):
        places = [0, 1, *range(4, 12)]  # "deep" makes two of each, and "up" has a norm of each that it reads
        assert torch.equal(new[[0, 1, *range(6, 14)]], old[places])
    for layer, other in ((before.first, model.first), (before.inner, model.inner)):
        old, new = (m.parametrizations.weight.original1 / m.weight for m in (layer, other))
        torch.testing.assert_close(new[kept][:, 0], old[[0, *range(2, 6)]][:, 0])  # v over the weight


# a user's parametrization ---------------------------------------------------------------------------


def test_a_users_parametrization_grows_exactly() -> None:
    """Weights and biases that are exponentials; their class and their parametrization stay."""
    model, x = positive(), torch.randn(6, 3)
    expected, kinds = model(x), [type(m) for m in model]
    arch = trace(model, x)
    assert arch.widths == {"0": 5, "2": 4}
    for _ in range(2):
        split_neurons(model, halves(trace(model, x)), arch=trace(model, x))
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert [type(m) for m in model] == kinds
    assert model[2].parametrizations.weight.original.shape == (6, 7)
    assert parametrize.is_parametrized(model[2], "bias")


def test_weights_beyond_a_parametrization_change_nothing() -> None:
    """An exponential is never negative; the sentence says which weight, and what may be done."""
    model, x = positive(), torch.randn(6, 3)
    arch, before = trace(model, x), everything(model)
    for weights in ((2.0, -1.0), (1.0, 0.0)):  # of zero the logarithm is infinite, which nothing can train
        with pytest.raises(ValueError, match=r"parametrization of '2.weight' \(Exp\) cannot compute.*signed"):
            split_neurons(model, halves(arch, weights=weights), arch=arch)
        assert_untouched(model, before)


def test_growth_leaves_out_what_a_parametrization_cannot_hold() -> None:
    """Neurons whose best split needs negative weights are left out, with a note; the others are split."""
    model, x, y = positive(), torch.randn(64, 3), torch.tensor([3.0, 0.0]).expand(64, 2)

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        return (m(batch[0]) - batch[1]).square().mean()

    grower = SteepestSplitting(solver=Exact())
    options: Any = {"strategy": TopK(fraction=1.0), "grower": grower, "significance": None, "step_size": 1e-3}
    report = grow(model, [(x, y)], loss_fn, **options)
    assert any("cannot compute the weights" in note for note in report.notes)
    split = {(s.group, s.neuron) for s in report.splits}
    assert split == {(c.group, c.neuron) for c in report.candidates if min(c.weights) > 0}
    assert 0 < len(split) < len(report.candidates)
    assert model(x).isfinite().all()
    assert loss_fn(model, (x, y)).item() == pytest.approx(report.loss_after, abs=1e-12)


def test_a_line_search_ends_where_the_parametrization_does() -> None:
    """Longer steps would lower the loss further, with weights that no exponential makes."""
    model, x, y = positive(), torch.randn(64, 3), torch.tensor([0.5, 2.0]).expand(64, 2)

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        return (m(batch[0]) - batch[1]).square().mean()

    grower = SteepestSplitting(solver=Exact(), signed=False)
    options: Any = {"strategy": TopK(count=1), "grower": grower, "significance": None}
    report = grow(model, [(x, y)], loss_fn, step_size=LineSearch(0.05, 3.0), **options)
    assert report.loss_after < report.loss_before - 0.01
    assert loss_fn(model, (x, y)).item() == pytest.approx(report.loss_after, rel=1e-12)


def test_only_the_split_that_goes_too_far_is_left_out() -> None:
    """Of two that meet in one entry it is the one whose row moves, not the one that is read there."""
    model, x = positive(), torch.randn(6, 3)
    arch = trace(model, x)
    with EffectiveWeights(model) as effective:
        moved = torch.zeros(2, arch.group("2").dim)
        moved[1, 1] = -1.0
        still = torch.zeros(2, arch.group("0").dim)
        surgery = Surgery(model, [Split("0", 1, (0.5, 0.5), still), Split("2", 2, (0.5, 0.5), moved)], arch)
        assert effective.unheld(surgery.replaced) == {}
        with surgery.displaced(surgery.splits):
            assert surgery.behind(effective.unheld(surgery.replaced), moved=True) == {("2", 2)}
        negative = Surgery(
            model, [Split("0", 1, (2.0, -1.0), still), Split("2", 2, (0.5, 0.5), 0 * moved)], arch
        )
        assert negative.behind(effective.unheld(negative.replaced), moved=False) == {("0", 1)}


def test_an_average_that_cannot_move_so_far_stays_with_its_parents() -> None:
    """Its weights are other ones, and nearer to zero; it has the same shapes, and computes what it did."""
    model, x = positive(), torch.randn(6, 3)
    average = copy.deepcopy(model)
    with torch.no_grad():
        average[0].parametrizations.weight.original[2, 0] = -6.0
    arch, expected = trace(model, x), average(x)
    report: Any = SimpleNamespace(splits=halves(arch, 0.05), architecture=arch)
    split_neurons(model, report.splits, arch=arch)
    grow_shadow(average, report)
    torch.testing.assert_close(average(x), expected, rtol=0, atol=1e-12)
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.parameters()]


def test_several_originals_of_which_one_is_a_choice() -> None:
    """They are found anew, so that their optimizer state starts anew; where they are not, it follows."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", Polar())
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)
    expected, arch = model(x), trace(model, x)
    replaced = split_neurons(model, halves(arch, weights=(2.0, -1.0)), arch=arch)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    flags = {id(replacement.new): replacement.anew for replacement in replaced.values()}
    anew = {name: flags.get(id(p)) for name, p in model.named_parameters()}
    assert anew["0.parametrizations.weight.original0"]
    assert anew["2.parametrizations.weight.original0"] is anew["0.bias"] is False
    assert anew["2.bias"] is None


# refusals -------------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.triu()


class UnitRows(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return F.normalize(w, dim=1)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w


class Noisy(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w + 0.1 * torch.randn_like(w) if self.training else w

    def right_inverse(self, w: Tensor) -> Tensor:
        return w


class Adapted(nn.Module):
    """A low-rank update, whose shape is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 1)), nn.Parameter(torch.randn(1, 5))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.a @ self.b

    def right_inverse(self, w: Tensor) -> Tensor:
        return w - self.a @ self.b


class Bare(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.tanh()


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "symmetric": (lambda m: _registered(m, Symmetric()), "grown 'weight'"),
    "unit rows": (lambda m: _registered(m, UnitRows()), "does not reproduce a grown 'weight'"),
    "noise": (lambda m: _registered(m, Noisy()), "depends on the mode, or on random numbers"),
    "low rank": (lambda m: _registered(m, Adapted()), "the right_inverse of a grown 'weight' fails"),
    "no inverse": (lambda m: _registered(m, Bare()), r"parametrized \(Bare\): without right_inverse nobody"),
    "spectral": (parametrizations.spectral_norm, "every split changes the norm of the whole matrix"),
    "orthogonal": (parametrizations.orthogonal, "not orthogonal to each other"),
}


def _registered(layer: nn.Module, step: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", step)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_back_is_refused(name: str) -> None:
    """With its reason, on both sides of the layer; nothing is touched, and other layers grow."""
    change, reason = REFUSED[name]
    model, x = positive(nn.Linear(5, 5)), torch.randn(4, 3)
    model[4] = nn.Linear(5, 2)
    parametrize.remove_parametrizations(model[2], "weight")
    change(model[2])
    before, state = everything(model), torch.get_rng_state()
    arch = trace(model, x)
    assert arch.widths == {}
    reasons = {u.name: u.reason for u in arch.unsplittable}
    assert any(part in reasons["2"] for part in (reason.replace("\\", ""),)), reasons
    assert "they enter the ParametrizedLinear '2': its weights are parametrized" in reasons["0"]
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_original_that_two_layers_share_is_refused() -> None:
    """As a plain weight would be."""
    model, x = tcn("old")
    model.deep.weight_g = model.up.weight_g
    reasons = {u.name: u.reason for u in trace(model, x).unsplittable}
    assert "an original of 'weight' is shared with another layer" in reasons["deep"]


@pytest.mark.parametrize("style", STYLES)
def test_an_original_that_is_used_elsewhere_is_refused(style: str) -> None:
    """A forward pass that reads the norms besides would read as many as there are neurons."""
    model, x = tcn(style)
    inner = Tcn.forward

    class Reading(Tcn):
        def forward(self, x: Tensor) -> Tensor:
            g = self.up.parametrizations.weight.original0 if style == "new" else self.up.weight_g
            return inner(self, x) * g.square().sum()

    model.__class__ = Reading
    expected = model(x)
    arch = trace(model, x)
    assert list(arch.widths) == []
    assert any("the tensor 'up.weight' is used by mul" in u.reason for u in arch.unsplittable)
    assert torch.equal(model(x), expected)


def test_frozen_originals_are_frozen_weights() -> None:
    """The neurons' own weights could not move apart; as readers they may be scaled, and stay frozen."""
    model, x = tcn()
    model.up.parametrizations.weight.original1.requires_grad_(False)
    expected = model(x)
    arch = trace(model, x)
    assert list(arch.widths) == ["first"]
    assert "'up.weight' is frozen" in {u.name: u.reason for u in arch.unsplittable}["up"]
    split_neurons(model, halves(arch), arch=arch)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert not model.up.parametrizations.weight.original1.requires_grad
    assert model.up.parametrizations.weight.original0.requires_grad


# nothing happens but a growth -----------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_tracing_and_failures_leave_the_very_objects(style: str) -> None:
    """Classes, hooks, parameters, attributes: after a trace, a refused split, and an error in the loss."""
    model, x = tcn(style)
    before = everything(model)
    arch = trace(model, x)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="must sum to 1"):
        split_neurons(model, halves(arch, weights=(2.0, 2.0)), arch=arch)
    assert_untouched(model, before)

    def loss_fn(m: nn.Module, batch: Tensor) -> Tensor:
        return m(batch).square().mean()

    def broken(m: nn.Module, batch: Tensor) -> Tensor:
        if m.head.in_features > 4 or m.first.out_channels > 6:
            raise RuntimeError("no such width")
        return loss_fn(m, batch)

    with pytest.raises(ValueError, match="no such width"):
        grow(model, [x], broken)
    assert_untouched(model, before)

    class Interrupted(Absolute):
        def ratio(self, loss_at: Any, loss_before: float) -> tuple[float, float]:
            assert model.up.out_channels > 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow(model, [x], loss_fn, step_size=Interrupted(0.1), include=["up"], significance=None)
    assert_untouched(model, before)
    arch_again = trace(model, x)
    SplittingOperator(model, arch_again, [x], loss_fn).dense("up")
    assert_untouched(model, before)


@pytest.mark.parametrize("style", STYLES)
def test_attributes_hooks_and_flags_follow_the_originals(style: str) -> None:
    """New parameters are to the user what the old ones were."""
    model, x = tcn(style)
    names = [n for n, _ in model.named_parameters()]
    v = model.up.parametrizations.weight.original1 if style == "new" else model.up.weight_v
    v.mark, seen = "mine", []
    v.register_hook(seen.append)
    arch = trace(model, x)
    split_neurons(model, halves(arch), arch=arch)
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(tcn(style)[0].state_dict())
    new = model.up.parametrizations.weight.original1 if style == "new" else model.up.weight_v
    assert model.up.weight.shape == new.shape == (14, 5, 4)  # before any forward pass
    assert new is not v
    assert new.mark == "mine"
    model(x).sum().backward()
    assert len(seen) == 1
    if style == "old":
        remove_weight_norm(model.up)
        assert isinstance(model.up.weight, nn.Parameter)
    else:
        parametrize.remove_parametrizations(model.up, "weight")
    assert model.up.weight.shape == (14, 5, 4)


def test_directions_keep_their_memory_format() -> None:
    """Channels last, if they were."""
    norm = parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Conv2d(2, 4, 3)), nn.Tanh(), norm(nn.Conv2d(4, 3, 3)), nn.Flatten())
    model, x = model.to(memory_format=torch.channels_last), torch.randn(2, 2, 6, 6)
    assert not model[2].parametrizations.weight.original1.is_contiguous()
    arch = trace(model, x)
    split_neurons(model, halves(arch), arch=arch)
    v = model[2].parametrizations.weight.original1
    assert v.shape == (3, 5, 3, 3)
    assert v.is_contiguous(memory_format=torch.channels_last)


def test_copies_and_cached_weights() -> None:
    """A grown layer can be copied, and ``parametrize.cached()`` does not remember the narrow weight."""
    model, x = tcn()
    with parametrize.cached():
        expected = model(x)
        arch = trace(model, x)
        split_neurons(model, halves(arch), arch=arch)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin.first.parametrizations.weight.original0.add_(1)
    assert not torch.equal(twin(x), model(x))


# measuring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_splitting_matrices_are_those_of_the_effective_weights(style: str) -> None:
    """Equal to those of the network without parametrizations."""
    model, x = tcn(style)
    plain = plain_of(model)
    y = torch.randn(4, 2)

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        return (m(batch) - y).square().mean()

    arch, other = trace(model, x), trace(plain, x)
    assert arch.widths == other.widths
    first, second = (
        SplittingOperator(model, arch, [x], loss_fn),
        SplittingOperator(plain, other, [x], loss_fn),
    )
    for group in arch.groups:
        found, expected = first.dense(group), second.dense(group.name)
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_growth_is_that_of_the_plain_network() -> None:
    """The same neurons, gains and losses, and the same function afterwards."""
    model, x = tcn()
    plain = plain_of(model)
    batches = [(torch.randn(4, 3, 10), torch.randn(4, 2)) for _ in range(3)]

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        return (m(batch[0]) - batch[1]).square().mean()

    options: Any = {"significance": None, "strategy": TopK(count=3), "step_size": 0.1}
    found, expected = (grow(m, batches, loss_fn, **options) for m in (model, plain))
    assert [(s.group, s.neuron, s.weights) for s in found.splits] == [
        (s.group, s.neuron, s.weights) for s in expected.splits
    ]
    assert len(found.splits) == 3
    assert found.loss_after == pytest.approx(expected.loss_after, rel=1e-12)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
    assert loss_fn(model, batches[0]).item() == pytest.approx(loss_fn(plain, batches[0]).item(), rel=1e-12)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_parameters_are_counted_as_the_model_stores_them(dim: int | None) -> None:
    """Norms and directions, before and after, and what one more neuron adds."""
    model, x = tcn("new", dim)
    arch = trace(model, x)
    batches = [torch.randn(4, 3, 10)]

    def count() -> int:
        return sum(p.numel() for p in model.parameters())

    before = count()
    report = grow(
        *(model, batches, lambda m, b: m(b).square().mean()),
        strategy=TopK(count=1),
        significance=None,
        include=["up"],
    )
    assert (report.cost_before.params, report.cost_after.params) == (before, count())
    assert arch.group("up").params == count() - before > 0


def test_what_a_parametrization_has_of_its_own_is_counted_and_stays() -> None:
    """A factor that is trained."""

    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor([2.0, 1.0]))

        def forward(self, w: Tensor) -> Tensor:
            return w * self.factor.prod()

        def right_inverse(self, w: Tensor) -> Tensor:
            return w / self.factor.prod()

    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", Times())
    factor = model[2].parametrizations.weight[0].factor
    before = sum(p.numel() for p in model.parameters())
    report = grow(model, [x], lambda m, b: m(b).square().mean(), significance=None)
    assert report.cost_before.params == before
    assert report.cost_after.params == sum(p.numel() for p in model.parameters()) > before
    assert model(x).square().mean().item() == pytest.approx(report.loss_after, rel=1e-12)
    assert model[2].parametrizations.weight[0].factor is factor
    model(x).sum().backward()
    assert factor.grad is not None


# optimizers and checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_optimizer_state_follows_norms_and_directions(style: str) -> None:
    """Adam's moments go with the rows and columns of g and v; training goes on."""
    model, x = tcn(style)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    state = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    arch = trace(model, x)
    still = torch.zeros(2, arch.group("up").dim)
    carry_state(optimizer, split_neurons(model, [Split("up", 1, (2.0, -1.0), still)], arch=arch))
    named = dict(model.named_parameters())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in named.values()}
    inside = "parametrizations.weight.original" if style == "new" else "weight_"
    g, v = (f"{inside}{key}" for key in (("0", "1") if style == "new" else ("g", "v")))
    # "up" makes them along axis 1 of (in, out, width), over which its norms are not taken.
    old, new = state[f"up.{v}"]["exp_avg"], optimizer.state[named[f"up.{v}"]]["exp_avg"]
    torch.testing.assert_close(new[:, 1], 2 * old[:, 1])
    torch.testing.assert_close(new[:, 2], -old[:, 1])
    torch.testing.assert_close(new[:, 3:], old[:, 2:])
    assert torch.equal(optimizer.state[named[f"up.{g}"]]["exp_avg"], state[f"up.{g}"]["exp_avg"])
    old, new = (
        s[f"head.{v}"]["exp_avg_sq"] for s in (state, {f"head.{v}": optimizer.state[named[f"head.{v}"]]})
    )
    torch.testing.assert_close(new, old[:, [0, 1, 1, 2, 3]])
    before = model(x).square().mean().item()
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert model(x).square().mean().item() < before


def test_the_sign_of_a_direction_that_turns_round() -> None:
    """A norm over what is read: an offspring of negative weight has the opposite derivative in its norm."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), parametrizations.weight_norm(nn.Linear(4, 2), dim=1))
    x = torch.randn(5, 3)
    g = model[2].parametrizations.weight.original0
    model(x).square().sum().backward()
    optimizer, old = torch.optim.SGD([g], lr=0.0, momentum=1.0), g.grad.clone()
    optimizer.step()
    arch = trace(model, x)
    split = Split("0", 1, (2.0, -1.0), torch.zeros(2, arch.groups[0].dim))
    carry_state(optimizer, split_neurons(model, [split], arch=arch))
    model.zero_grad()
    model(x).square().sum().backward()
    g = model[2].parametrizations.weight.original0
    torch.testing.assert_close(g.grad, old[:, [0, 1, 1, 2, 3]] * torch.tensor([1.0, 1, -1, 1, 1]))
    torch.testing.assert_close(optimizer.state[g]["momentum_buffer"], g.grad)


@pytest.mark.parametrize("style", STYLES)
def test_grown_checkpoints_fit_seed_sized_modules(style: str) -> None:
    """The originals in the state dict say how wide a layer is; growing on from there is the same."""
    model, x = tcn(style)
    for _ in range(2):
        arch = trace(model, x)
        split_neurons(model, halves(arch), arch=arch)
    fresh = Tcn(STYLES[style])
    kinds = {path: type(m) for path, m in fresh.named_modules()}
    assert sorted(fit_to_state_dict(fresh, model.state_dict())) == ["deep", "first", "head", "inner", "up"]
    fresh.load_state_dict(model.state_dict())
    assert {path: type(m) for path, m in fresh.named_modules()} == kinds
    assert torch.equal(fresh(x), model(x))
    assert fresh.deep.groups == model.deep.groups == 8
    for one in (fresh, model):
        arch = trace(one, x)
        split_neurons(one, halves(arch, 0.1), arch=arch)
    assert torch.equal(fresh(x), model(x))


def test_a_checkpoint_of_the_old_style_fits_the_new_one() -> None:
    """Which torch loads, too."""
    model, x = tcn("old")
    arch = trace(model, x)
    split_neurons(model, halves(arch), arch=arch)
    fresh = Tcn(parametrizations.weight_norm)
    fit_to_state_dict(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=1e-14)


def test_grown_checkpoints_of_a_users_parametrization() -> None:
    """What the weight's shape is, its parametrization says."""
    model, x = positive(), torch.randn(6, 3)
    split_neurons(model, halves(trace(model, x)), arch=trace(model, x))
    fresh = positive()
    assert fit_to_state_dict(fresh, model.state_dict()) == ["0", "2", "4"]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


# in a Trainer ---------------------------------------------------------------------------------------


class Normed(Classifier):
    """Every layer under weight norm."""

    def __init__(self, style: str = "new") -> None:
        super().__init__()
        for place in (0, 5, 7):
            STYLES[style](self.net[place])


class Saving(pl.Callback):
    """A checkpoint after each epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        trainer.save_checkpoint(folder / f"epoch={trainer.current_epoch}.ckpt")


def _fitted(
    folder: Path, style: str, *others: pl.Callback, resume: Path | None = None
) -> tuple[Normed, Any, pl.Trainer]:
    torch.set_default_dtype(torch.float32)
    pl.seed_everything(0 if resume is None else 7, verbose=False)
    module, callback = Normed(style), two_splits()
    t = trainer(folder, callback, *others)
    t.fit(module, DataLoader(images(), 16), ckpt_path=resume)
    return module, callback, t


@pytest.mark.parametrize("style", STYLES)
def test_a_fit_grows_and_resumes(tmp_path: Path, style: str) -> None:
    """Growth, checkpoint, resume, growth: the same bits and moments as without the interruption."""
    module, callback, t = _fitted(tmp_path, style, Saving())
    assert [e["num_splits"] for e in callback.history] == [2, 2, 2]
    held = {id(p) for p in t.optimizers[0].param_groups[0]["params"]}
    assert held == {id(p) for p in module.parameters()}
    state = t.optimizers[0].state
    assert all(state[p]["exp_avg"].shape == p.shape for p in module.parameters())
    # a moment that a growth had started anew would be some steps younger
    assert {float(state[p]["step"]) for p in module.parameters()} == {12.0}
    for epoch in (0, 1, 2):
        again, other, t2 = _fitted(tmp_path / str(epoch), style, resume=tmp_path / f"epoch={epoch}.ckpt")
        assert_same(other.history, callback.history)
        assert_same(dict(again.state_dict()), dict(module.state_dict()))
        assert_same(t2.optimizers[0].state_dict(), t.optimizers[0].state_dict())


def test_other_growers_look_at_the_effective_weights(tmp_path: Path) -> None:
    """Before training starts, too, when they say whether they apply."""
    torch.set_default_dtype(torch.float32)
    for grower in (GradMax(), Mixed([SteepestSplitting(), Folding(clusters=2, samples=16)])):
        module, callback = Normed(), two_splits(grower=grower)
        trainer(tmp_path, callback).fit(module, DataLoader(images(), 16))
        assert [e["num_splits"] for e in callback.history] == [2, 2, 2]


def test_averages_of_the_weights_grow_along(tmp_path: Path) -> None:
    """Their norms and directions, too."""
    average = EMAWeightAveraging(decay=0.5)
    module, callback, _ = _fitted(tmp_path, "new", average)
    assert [e["num_splits"] for e in callback.history] == [2, 2, 2]
    shapes = {n: p.shape for n, p in module.named_parameters()}
    assert shapes == {n: p.shape for n, p in average._average_model.module.named_parameters()}
    assert average._average_model.module.net(torch.randn(4, 1, 6, 6)).isfinite().all()


class Adversaries(Normed):
    """Two networks without biases, each with its optimizer; images of width 2 between them."""

    def __init__(self) -> None:
        super().__init__()
        make = parametrizations.weight_norm
        self.net = nn.Sequential(
            *(make(nn.Linear(36, 5, bias=False)), nn.Tanh(), make(nn.Linear(5, 2, bias=False)), nn.Tanh()),
            *(make(nn.Linear(2, 4, bias=False)), nn.Tanh(), make(nn.Linear(4, 3, bias=False))),
        )
        self.automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.net[:3], self.net[3:])]


def test_between_networks_that_different_optimizers_train_nothing_grows(tmp_path: Path) -> None:
    """Whose layers these are, their originals say."""
    torch.set_default_dtype(torch.float32)
    module, callback = Adversaries(), two_splits(loss_fn=lambda m, batch: m.loss(batch))
    trainer(tmp_path, callback).fit(module, DataLoader(images(), 16))
    assert list(callback.barred) == ["net.2"]
    assert sum(e["num_splits"] for e in callback.history) == 6
    assert module.net[4].in_features == 2


def test_a_teacher_that_nobody_trains_grows_along(tmp_path: Path) -> None:
    """A training loop that averages name by name finds the same shapes."""

    class Taught(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.mse_loss(self.net(batch[0]), self.teacher(batch[0]).detach())
            loss = loss + F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            for p, q in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
                q.data.lerp_(p.data, 0.1)

    torch.set_default_dtype(torch.float32)
    module, callback = Taught(), two_splits()
    trainer(tmp_path, callback).fit(module, DataLoader(images(), 16))
    assert [e["num_splits"] for e in callback.history] == [2, 2, 2]
    assert module.teacher[5].out_features == module.net[5].out_features
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert module.teacher[5].parametrizations.weight.original0.shape[0] == module.net[5].out_features


# layers that are unlike others ----------------------------------------------------------------------


def test_weight_normed_attention_changes_its_class_under_the_parametrization() -> None:
    """Its heads grow by another class; the computed weights stay properties of that."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            parametrizations.weight_norm(self.attention, "in_proj_weight")
            parametrizations.weight_norm(self.attention.out_proj, "weight")
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.attention(x, x, x, need_weights=False)[0]))

    model, x = Attending(), torch.randn(2, 4, 6)
    assert deviation(model, x) < 1e-12
    assert type(model.attention).__name__.startswith("Parametrized")
    assert parametrize.is_parametrized(model.attention, "in_proj_weight")
    fresh = Attending()
    fit_to_state_dict(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("style", STYLES)
def test_weight_normed_recurrence(style: str) -> None:
    """As in AWD-LSTM's predecessors: the recurrent weights under a norm."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(3, 5, batch_first=True)
            for name in ("weight_ih_l0", "weight_hh_l0"):
                STYLES[style](self.cell, name)
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.cell(x)[0]))

    model, x = Recurrent(), torch.randn(2, 4, 3)
    assert deviation(model, x) < 1e-12
    assert model.cell.hidden_size > 5


def test_a_parametrized_tensor_that_no_rule_covers() -> None:
    """A scale of each channel, positive by its parametrization, grows with the neurons that it meets."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
            self.scale = nn.Parameter(torch.rand(5) + 0.5)
            parametrize.register_parametrization(self, "scale", Exp())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.first(x) * self.scale))

    model, x = Scaled(), torch.randn(4, 3)
    assert deviation(model, x) < 1e-12
    assert model.parametrizations.scale.original.shape == (10,)
