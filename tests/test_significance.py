"""Significance: what passes, how many fresh batches are drawn, and what selection sees."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_split import SelectionStrategy, TopK, grow
from lightning_split.ranks import Ranks
from lightning_split.selection import Candidate
from lightning_split.significance import DrawnBatches, FreshBatches, GainTest, passing
from scipy import stats
from torch import Tensor, nn


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-3.0, 8.0), min_size=1, max_size=12),
    st.integers(8, 64),
    st.sampled_from((0.01, 0.2)),
    st.integers(1, 3),
)
def test_what_passes_is_what_scipys_adjustment_says(
    ratios: list[float], count: int, level: float, alternatives: int
) -> None:
    """Student's p-values, times the alternatives, adjusted by Benjamini and Hochberg, at most the level."""
    gains = np.array(ratios)
    errors = np.full_like(gains, 0.5)
    p = np.minimum(1, alternatives * stats.t.sf(gains / errors, count - 1))
    p[gains <= 0] = 1
    expected = stats.false_discovery_control(p, method="bh") <= level
    assert passing(gains, errors, count, level, alternatives).tolist() == expected.tolist()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_few_of_those_that_pass_are_false(share: float) -> None:
    """Simulated gains, some of them truly zero: the share of those among what passes is at most the level."""
    rng = np.random.default_rng(0)
    true = rng.random(200) < share
    passed, false, repeats = 0, 0, 200
    for _ in range(repeats):
        samples = rng.standard_normal((16, 200)) + 1.2 * true
        mean, error = samples.mean(0), samples.std(0, ddof=1) / 4
        found = passing(mean, error, 16, 0.05)
        passed += int((found & true).sum())
        false += int((found & ~true).sum()) / max(1, int(found.sum()))
    assert false / repeats <= 0.05
    assert passed / (repeats * true.sum()) > 0.6


def test_what_an_epoch_has_left_unseen_bounds_the_error() -> None:
    """In an epoch that ends few that pass do so in vain, more pass, and all seen is all known."""
    rng = np.random.default_rng(1)
    epoch, false, passed, endless = 40, 0.0, 0, 0
    for _ in range(200):
        samples = rng.standard_normal((epoch, 100)) + 0.5
        samples -= samples.mean(0) * (np.arange(100) % 2)  # half of them have no gain over this very epoch
        fresh = FreshBatches(DrawnBatches(list(samples[:32]), lambda skip: [], 32, epoch))
        assert len(list(fresh.looks())) == 2
        assert fresh.unseen == pytest.approx(8 / 40)
        seen = samples[:32]
        offered = [
            Candidate("a", i, gain=float(m), standard_error=float(e))
            for i, (m, e) in enumerate(zip(seen.mean(0), seen.std(0, ddof=1) / 32**0.5, strict=True))
        ]
        found = np.array(GainTest(list, 0.1, fresh).passed(offered, 32))
        false += found[1::2].sum() / max(1, found.sum())
        passed += int(found[::2].sum())
        endless += int(np.array(GainTest(list, 0.05).passed(offered, 32))[::2].sum())
    assert false / 200 <= 0.05
    assert passed > 1.2 * endless
    known = FreshBatches(DrawnBatches(list(range(16)), lambda skip: [], 20, 20))
    assert [len(look) for look in known.looks()] == [16]
    assert known.unseen == 0.0  # it turned out that there were no more
    assert GainTest(list, 0.01, known).passed(_candidates([1e-6, -1e-6]), 16) == [True, False]


def test_an_error_of_zero_leaves_no_doubt() -> None:
    """Equal batches: positive gains pass, zero and negative ones do not."""
    found = passing(np.array([1e-3, 0.0, -1e-3]), np.zeros(3), 8, 0.01)
    assert found.tolist() == [True, False, False]
    assert passing(np.zeros(0), np.zeros(0), 8, 0.01).tolist() == []


class _Counting:
    """A source that knows how much was drawn from it."""

    def __init__(self, size: int) -> None:
        self.drawn, self._size = 0, size

    def __iter__(self) -> Iterator[int]:
        for i in range(self._size):
            self.drawn += 1
            yield i


def test_a_gain_has_to_show_close_by_too() -> None:
    """What was measured far away passes only if noise would show as much near the step once in twenty."""
    least = float(stats.t.isf(0.05, 15))
    near = [None, (1.01 * least, 1.0), (0.99 * least, 1.0), (-3.0, 1.0), (1e-9, 0.0), (0.0, 0.0)]
    offered = [Candidate("g", i, 9.0, standard_error=1.0, nearby=n) for i, n in enumerate(near)]
    test = GainTest(TopK(count=9).select, 0.01)
    assert test.passed(offered, 16) == [True, True, False, False, True, False]
    assert test.passed([dataclasses.replace(c, gain=1.0) for c in offered], 16) == [False] * 6
    assert test.passed([], 16) == []
    fresh = FreshBatches(DrawnBatches([torch.zeros(1)] * 16, lambda n: [], 16, population=20))
    list(fresh.looks())  # of twenty batches sixteen were seen
    test = GainTest(TopK(count=9).select, 0.01, fresh)
    for share, enough in ((1.01, True), (0.99, False)):
        once_more = share * least * 0.2**0.5, 1.0
        assert test.passed([dataclasses.replace(offered[1], nearby=once_more)], 16) == [enough]
    displaced = dataclasses.replace(offered[1], displacements=torch.ones(2, 3))
    assert displaced.at(2.0).nearby == pytest.approx((4.04 * least, 4.0))


@pytest.mark.parametrize(
    ("size", "sizes"), [(3, [3]), (16, [16]), (20, [16, 4]), (64, [16, 16, 32]), (1000, [16, 16, 32])]
)
def test_looks_double_and_draw_no_further_than_they_must(size: int, sizes: list[int]) -> None:
    """Of a source of unknown length at most 64 batches; each look as long as all before; none twice."""
    source = _Counting(size)
    fresh = FreshBatches(source)
    assert fresh.first(8) == list(range(min(8, size)))
    assert source.drawn <= 8
    looks = fresh.looks()
    assert next(looks) == list(range(sizes[0]))
    assert source.drawn <= 16
    rest = list(looks)
    assert [sizes[0], *map(len, rest)] == sizes
    assert [b for look in rest for b in look] == list(range(sizes[0], sum(sizes)))


def test_the_level_is_split_over_as_many_looks_as_there_can_be() -> None:
    """One look up to 16 batches, two up to 32 …; three if the length is unknown. As their batches count."""
    counted = [FreshBatches(list(range(n))).num_looks for n in (1, 16, 17, 32, 64, 200)]
    assert counted == [1, 1, 2, 2, 3, 5]
    assert FreshBatches(iter(range(1000))).num_looks == 3
    for size, shares in [(16, [1]), (32, [1 / 3, 2 / 3]), (20, [1 / 3, 2 / 3]), (64, [1 / 7, 2 / 7, 4 / 7])]:
        fresh = FreshBatches(range(size))
        assert [fresh.share for _ in fresh.looks()] == pytest.approx(shares)
    fresh = FreshBatches(iter(range(20)))  # where it ends early, the last look has all that is left
    assert [fresh.share for _ in fresh.looks()] == pytest.approx([1 / 7, 6 / 7])
    drawn = DrawnBatches([0, 1], lambda skip: list(range(2 + skip, min(2 + skip + 3, 9))), 40)
    assert (len(drawn), list(drawn)) == (40, list(range(9)))
    assert list(DrawnBatches([0, 1], lambda skip: [0] * 10, 2)) == [0, 1]


def test_all_processes_take_equally_many_batches() -> None:
    """A process that has more leaves the rest, because results are put together batch by batch."""

    class Shorter(Ranks):
        def gather_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.cat([t, torch.tensor([5])]) for name, t in tensors.items()}

    assert [len(look) for look in FreshBatches(range(12), Shorter()).looks()] == [5]


def _candidates(gains: Sequence[float]) -> list[Candidate]:
    return [
        Candidate("a", i, gain=g, standard_error=0.1, weights=(0.5, 0.5), displacements=torch.zeros(2, 1))
        for i, g in enumerate(gains)
    ]


def test_a_share_of_the_neurons_is_a_share_of_all_of_them() -> None:
    """What did not pass is not chosen, but counts; and no strategy can choose it all the same."""
    offered = _candidates([1.0, 0.9, 0.1, 0.05, -1.0, -1.0])
    test = GainTest(TopK(fraction=0.5).select, 0.01)
    passed = test.passed(offered, 16)
    assert passed == [True, True, False, False, False, False]
    assert [c.neuron for c in test.choose(offered, passed)] == [0, 1]
    assert not test.settled(offered, 16)  # it would take a third
    assert GainTest(TopK(count=2).select, 0.01).settled(offered, 16)
    assert [c.neuron for c in GainTest(list, 0.01).choose(offered, passed)] == [0, 1]
    for level, count in ((None, 16), (0.01, 7)):
        untested = GainTest(TopK(fraction=0.5).select, level)
        assert all(untested.passed(offered, count))
        assert not untested.settled(offered, count)


class _Everything(SelectionStrategy):
    def select(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [c for c in candidates if c.gain > 0]


@pytest.mark.parametrize("noise", [False, True])
def test_growth_splits_only_what_helps_on_other_data(noise: bool) -> None:
    """Targets that are noise: about half of the gains look positive and none passes. Real ones pass soon."""
    teacher = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    student = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 1))
    nn.init.zeros_(student[2].bias)
    student[2].weight.data *= 0.01
    xs = [torch.randn(32, 3) for _ in range(68)]
    batches = [(x, torch.randn(32, 1) if noise else teacher(2 * x).detach()) for x in xs]
    drawn = _Counting(64)
    reports = [
        grow(
            copy.deepcopy(student),
            batches[:4],
            lambda m, b: (m(b[0]) - b[1]).square().mean(),
            strategy=_Everything(),
            confirm_batches=(batches[4 + i] for i in drawn),
            significance=level,
        )
        for level in (None, 0.01)
    ]
    assert [r.num_fresh for r in reports] == [64, 64 if noise else drawn.drawn - 64]
    if noise:
        assert len(reports[0].splits) >= 4
        assert not reports[1].splits
        assert "On 64 fresh batches 0 of 12 candidates" in str(reports[1])
    else:
        assert len(reports[1].splits) >= 8
        assert reports[1].num_fresh < 64
