"""Family trees of neurons, against trees kept by hand."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_split.lineage import Lineage

GROUPS = ("conv1", "conv2")


@st.composite
def histories(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[str, dict[int, int]]]]:
    """Seed widths, and growths as (group, neuron -> number of offspring)."""
    widths = {group: draw(st.integers(1, 4)) for group in GROUPS}
    now, growths = dict(widths), []
    for _ in range(draw(st.integers(0, 5))):
        group = draw(st.sampled_from(GROUPS))
        neurons = st.integers(0, now[group] - 1)
        offspring = draw(st.dictionaries(neurons, st.integers(2, 4), max_size=3))
        now[group] += sum(offspring.values()) - len(offspring)
        growths.append((group, offspring))
    return widths, growths


def grown(widths: dict[str, int], growths: list[tuple[str, dict[int, int]]]) -> Lineage:
    lineage = Lineage.start(widths)
    for number, (group, offspring) in enumerate(growths, 1):
        lineage.record(group, offspring, growth=number)
    return lineage


@settings(deadline=None, max_examples=100)
@given(history=histories())
def test_ancestors_and_generations_follow_every_split(
    history: tuple[dict[str, int], list[tuple[str, dict[int, int]]]],
) -> None:
    """Offspring stand where their parent stood, with its ancestor and one generation more."""
    widths, growths = history
    expected = {group: [(seed, 0) for seed in range(width)] for group, width in widths.items()}
    for group, offspring in growths:
        row = []
        for neuron, (seed, generation) in enumerate(expected[group]):
            count = offspring.get(neuron, 0)
            row += [(seed, generation + 1)] * count if count else [(seed, generation)]
        expected[group] = row
    lineage = grown(widths, growths)
    assert lineage.widths == {group: len(row) for group, row in expected.items()}
    for group, row in expected.items():
        found = [(lineage.ancestor(group, i), lineage.generation(group, i)) for i in range(len(row))]
        assert found == row
        # Runs in order and complete: the seed neurons can be read off the grown network.
        assert [seed for seed, _ in found] == sorted(seed for seed, _ in found)
        assert {seed for seed, _ in found} == set(range(widths[group]))


@settings(deadline=None, max_examples=50)
@given(history=histories())
def test_a_round_trip_through_a_file_changes_nothing(
    history: tuple[dict[str, int], list[tuple[str, dict[int, int]]]],
) -> None:
    """The plain dict passes the strict loader, and a restored lineage goes on as the first."""
    lineage = grown(*history)
    file = io.BytesIO()
    torch.save(lineage.to_dict(), file)
    file.seek(0)
    restored = Lineage.from_dict(torch.load(file, weights_only=True))
    assert restored.to_dict() == lineage.to_dict()
    for tree in (lineage, restored):
        tree.record("conv1", {0: 2}, growth=99)
    assert restored.to_dict() == lineage.to_dict()


def test_a_small_family_tree_by_hand() -> None:
    """Ids, parents and births of two growths, all offspring with new ids."""
    lineage = Lineage.start({"fc": 3})
    lineage.record("fc", {1: 2}, growth=1)
    lineage.record("fc", {2: 3, 0: 2}, growth=2)
    assert lineage.to_dict() == {
        "fc": {
            # 0 1 2 -> 0 (3 4) 2 -> (5 6) 3 (7 8 9) 2
            "current": [5, 6, 3, 7, 8, 9, 2],
            "parent": [-1, -1, -1, 1, 1, 0, 0, 4, 4, 4],
            "born": [0, 0, 0, 1, 1, 2, 2, 2, 2, 2],
        }
    }
    assert [lineage.ancestor("fc", i) for i in range(7)] == [0, 0, 1, 1, 1, 1, 2]
    assert [lineage.generation("fc", i) for i in range(7)] == [1, 1, 1, 2, 2, 2, 0]


def test_the_saved_dict_is_a_copy() -> None:
    """A later growth does not change what was saved, nor the other way round."""
    lineage = Lineage.start({"fc": 2})
    saved = lineage.to_dict()
    lineage.record("fc", {0: 2}, growth=1)
    assert saved["fc"]["current"] == [0, 1]
    restored = Lineage.from_dict(saved)
    restored.record("fc", {0: 2}, growth=1)
    assert saved["fc"] == {"current": [0, 1], "parent": [-1, -1], "born": [0, 0]}


def test_groups_are_independent_and_may_come_later() -> None:
    """A growth touches its own group only; a new group starts with the width it is given."""
    lineage = Lineage.start({"a": 2, "b": 3})
    before = lineage.to_dict()["b"]
    lineage.record("a", {0: 2}, growth=1)
    assert lineage.to_dict()["b"] == before
    lineage.record("c", {1: 2}, growth=2, width=2)
    assert lineage.widths == {"a": 3, "b": 3, "c": 3}
    assert [lineage.ancestor("c", i) for i in range(3)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("group", "offspring", "message"),
    [
        ("fc", {0: 2, 3: 2}, "Group 'fc' has 3 neurons; neuron 3 cannot become 2 offspring"),
        ("fc", {-1: 2}, "neuron -1 cannot become 2 offspring"),
        ("fc", {0: 1}, "neuron 0 cannot become 1 offspring"),
        ("head", {0: 2}, "Group 'head' has 0 neurons; neuron 0 cannot become 2 offspring"),
    ],
)
def test_impossible_growths_are_refused_and_change_nothing(
    group: str, offspring: dict[int, int], message: str
) -> None:
    """One sentence; the tree stays as it was, without a half-made group."""
    lineage = Lineage.start({"fc": 3})
    before = lineage.to_dict()
    with pytest.raises(ValueError, match=message):
        lineage.record(group, offspring, growth=1)
    assert lineage.to_dict() == before


@pytest.mark.parametrize(("group", "neuron"), [("fc", 2), ("fc", -1), ("head", 0)])
def test_unknown_neurons_have_no_ancestor(group: str, neuron: int) -> None:
    """Neither a negative index nor an unknown group is taken for something else."""
    lineage = Lineage.start({"fc": 2})
    for question in (lineage.ancestor, lineage.generation):
        with pytest.raises(ValueError, match=f"There is no neuron {neuron} in group '{group}'"):
            question(group, neuron)


def test_new_neurons_have_no_ancestors_and_their_neighbour_lives_on() -> None:
    """(1, 0) keeps the neuron and its id; (½, ½, 0) splits it and adds one; both survive a round trip."""
    lineage = Lineage.start({"conv1": 3})
    lineage.record("conv1", {1: 2, 2: 3}, growth=1, new={1: [1], 2: [2]})
    lineage = Lineage.from_dict(lineage.to_dict())
    assert lineage.widths == {"conv1": 6}
    assert [lineage.ancestor("conv1", i) for i in range(6)] == [0, 1, 3, 2, 2, 6]
    assert [lineage.generation("conv1", i) for i in range(6)] == [0, 0, 0, 1, 1, 0]
    lineage.record("conv1", {2: 2}, growth=2)
    assert [lineage.ancestor("conv1", i) for i in (2, 3)] == [3, 3]
    assert lineage.generation("conv1", 3) == 1
