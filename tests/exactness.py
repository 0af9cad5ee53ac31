"""What must hold whenever neurons are split: at displacement zero the function stays the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning_split import split_neurons, trace
from lightning_split.architecture import Architecture
from lightning_split.surgery import Split
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def randomise(model: nn.Module, x: Tensor, seed: int = 0) -> None:
    """Random parameters at a scale that neither fades nor explodes, random BatchNorm statistics, no dropout.

    Zero-initialised heads and scales would hide every mistake behind them.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.ndim > 1 else 1
            p.copy_(noise(p) * (2 / fan) ** 0.5 if fan > 1 else 0.7 + 0.3 * noise(p))
        for m in model.modules():
            if "Dropout" in type(m).__name__ or type(m).__name__ == "StochasticDepth":
                m.p = 0.0
            if getattr(m, "bias", None) is not None and isinstance(m.bias, nn.Parameter):
                m.bias.copy_(0.3 * noise(m.bias))
        _set_statistics(model, x, norms, noise)
    model.train()


def _set_statistics(
    model: nn.Module, x: Tensor, norms: Sequence[nn.Module], noise: Callable[[Tensor], Tensor]
) -> None:
    """Statistics near those of what each BatchNorm really reads in eval mode, so that rounding stays small.

    Layer by layer, with what the layers before make of theirs: statistics of a pass in training mode let
    each layer's error multiply those before it (the outputs of EfficientNet-B7 reached 3e10). And no channel
    is divided by a spread that is small beside its layer's values, as those of two samples on small maps are.
    """

    def measure(m: Any, args: tuple[Any, ...]) -> None:
        if m.running_mean is None:
            return
        rows = args[0].movedim(1, 0).flatten(1)
        var, mean = torch.var_mean(rows, 1, correction=0)
        var = var.clamp_min(max(0.3 * float(rows.square().mean()), 1e-3))
        m.running_mean.copy_(mean + 0.3 * var.sqrt() * noise(mean))
        m.running_var.copy_(var * (1 + 0.3 * noise(var)).clamp(0.5, 1.5))

    hooks = [m.register_forward_pre_hook(measure) for m in norms]
    try:
        model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()


def outputs(model: nn.Module, x: Tensor, train: bool) -> list[Tensor]:
    """All outputs of a copy, so that the statistics of the model stay."""
    with torch.no_grad():
        out = copy.deepcopy(model).train(train)(x)
    return [out] if isinstance(out, Tensor) else [t for t in out if t is not None]


def splits(arch: Architecture, rng: np.random.Generator, kind: str) -> list[Split]:
    """Splits of up to two neurons of each group that must not change the function.

    ``copies`` have unequal weights, two or three offspring and no displacement. ``ghosts`` have weight zero
    and may stand anywhere: this shows if the offspring are told apart in the right places.
    """
    found = []
    for group in arch.groups:
        for neuron in rng.choice(group.width, min(2, group.width), replace=False):
            m = int(rng.integers(2, 4))
            weights: tuple[float, ...] = ((2.0, -1.0), (1.5, -1.0, 0.5))[m - 2]
            moved = torch.zeros(m, group.dim)
            if kind == "ghosts":
                alive = int(rng.integers(m))
                weights = tuple(float(i == alive) for i in range(m))
                moved = torch.from_numpy(0.5 * rng.standard_normal((m, group.dim)))
                moved[alive] = 0.0
            found.append(Split(group.name, int(neuron), weights, moved))
    return found


def deviation(model: nn.Module, x: Tensor, seed: int = 0) -> float:
    """The largest change of an output, relative to the largest output, after all groups were split twice.

    In eval and in train mode. The model itself grows: there is no second copy of a large one.
    """
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 0.0  # so that passes in train mode leave the statistics as they are

    def outputs_now(train: bool) -> list[Tensor]:
        with torch.no_grad():
            return [t for t in tree_leaves(model.train(train)(x)) if isinstance(t, Tensor)]

    rng = np.random.default_rng(seed)
    expected = {train: outputs_now(train) for train in (False, True)}
    assert all(t.isfinite().all() and t.abs().max() > 1e-6 for ts in expected.values() for t in ts)
    worst = 0.0
    for kind in ("copies", "ghosts"):
        arch = trace(model, x)
        split_neurons(model, splits(arch, rng, kind), arch=arch)
        for train in (False, True):
            for a, b in zip(expected[train], outputs_now(train), strict=True):
                worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return worst


def assert_splits_exactly(model: nn.Module, x: Tensor, *, rounds: int = 1, seed: int = 0) -> Architecture:
    """Split neurons of all groups at once, again and again; outputs stay in eval and in train mode."""
    rng = np.random.default_rng(seed)
    expected = {train: outputs(model, x, train) for train in (False, True)}
    assert all(t.isfinite().all() and t.abs().max() > 1e-6 for ts in expected.values() for t in ts)
    first = None
    for _ in range(rounds):
        arch = trace(model, x)
        first = first or arch
        for kind in ("copies", "ghosts"):
            grown = copy.deepcopy(model)
            split_neurons(grown, splits(arch, rng, kind), arch=arch)
            for train in (False, True):
                for a, b in zip(expected[train], outputs(grown, x, train), strict=True):
                    message = f"{kind}, {train=}: %s"
                    torch.testing.assert_close(
                        b, a, rtol=0, atol=1e-9 * float(a.abs().max()), msg=message.__mod__
                    )
            if rounds > 1:
                arch, model = trace(grown, x), grown
    assert first is not None
    return first


def moved_by_rounding(model: nn.Module, x: Tensor) -> float:
    """How far relative changes of the input by 1e-15 move the outputs, in the worse of both modes.

    No split can be held to less: what is left of its exactness is rounding, which goes the same ways.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    worst = 0.0
    for train in (False, True):
        before, after = outputs(model, x, train), outputs(model, x * (1 + 1e-15 * noise), train)
        for a, b in zip(before, after, strict=True):
            worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return worst


def depends_on_every_group(
    model: nn.Module, x: Tensor, arch: Architecture, visible: float = 1e-8
) -> list[str]:
    """The groups whose displacement does not show in the outputs: there the test above proves nothing."""
    silent = []
    (expected,) = outputs(model, x, False)
    for group in arch.groups:
        grown = copy.deepcopy(model)
        moved = torch.ones(2, group.dim) * 0.1
        split = Split(group.name, (group.width - 1) // 2, (0.5, 0.5), moved)
        split_neurons(grown, [split], arch=arch)
        (new,) = outputs(grown, x, False)
        if float((new - expected).abs().max()) < visible * float(expected.abs().max()):
            silent.append(group.name)
    return silent
