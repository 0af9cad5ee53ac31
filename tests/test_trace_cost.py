"""What tracing costs, counted in calls instead of seconds: it grows linearly with depth."""

import gc
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning_split import trace
from lightning_split.surgery import Split, Surgery
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Residual(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, inner, 1)
        self.norm = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.b = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.depthwise(self.norm(self.a(x)))))


def residual(depth: int, width: int = 6) -> nn.Module:
    """One residual stream, on which every block's output meets all others."""
    blocks = (Residual(4, width) for _ in range(depth))
    return nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def plain(depth: int, width: int = 6) -> nn.Module:
    layers = [nn.Sequential(nn.Linear(3 if i == 0 else width, width), nn.ReLU()) for i in range(depth)]
    return nn.Sequential(nn.Flatten(2), nn.Linear(16, 3), *layers, nn.Linear(width, 2))


def attention(depth: int, width: int = 6) -> nn.Module:
    blocks = (nn.TransformerEncoderLayer(8, 2, width, batch_first=True) for _ in range(depth))
    return nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), *blocks, nn.Linear(8, 2))


def python_calls(work: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's, and resumptions of generators."""
    found = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # collections run finalizers whenever they please
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return found


def operators(work: Callable[[], object]) -> int:
    """Operators that reach torch's dispatcher, over outlines or values."""
    found = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal found
            found += 1
            return func(*args, **(kwargs or {}))

    with Counter():
        work()
    return found


def assert_linear(cost: Callable[[int], int], depths: tuple[int, int, int], rel: float = 0.1) -> None:
    """Each further block costs the same."""
    cost(2)  # fills the caches of torch
    costs = [cost(depth) for depth in depths]
    first, second = (
        (b - a) / (n - m)
        for (a, b), (m, n) in zip(itertools.pairwise(costs), itertools.pairwise(depths), strict=True)
    )
    assert first > 0
    assert second == pytest.approx(first, rel=rel), costs


@pytest.mark.parametrize("network", [residual, plain, attention])
def test_operators_grow_linearly_with_depth(network: Callable[[int], nn.Module]) -> None:
    """All passes over the model together, whatever comes before a block."""
    x = torch.zeros(2, 3, 4, 4)
    assert_linear(lambda depth: operators(partial(trace, network(depth), x)), (4, 8, 16), rel=0.01)


def test_the_time_of_python_grows_linearly_with_depth() -> None:
    """Labels, groups and trials, however many blocks meet on one stream."""
    x = torch.zeros(2, 3, 4, 4)
    assert_linear(lambda depth: python_calls(partial(trace, residual(depth), x)), (4, 8, 16))


def test_splitting_every_neuron_costs_linearly_many_calls() -> None:
    """The trial that multiplies all neurons: no walk over all splits for each layer, or for each split."""

    def cost(depth: int) -> int:
        model = plain(depth, width=20)
        arch = trace(model, torch.zeros(1, 3, 4, 4))
        still = torch.zeros(())
        splits = [
            Split(group.name, i, (0.5, 0.5), still.expand(2, group.dim))
            for group in arch.groups
            for i in range(group.width)
        ]
        return python_calls(partial(Surgery, model, splits, arch, hollow=True))

    assert_linear(cost, (10, 20, 40))
