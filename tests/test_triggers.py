"""When to grow: exact sequences of what is due."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_split.triggers import Every, Plateau, Trigger


def due_epochs(
    trigger: Trigger, values: Sequence[float | None], start: int = 0, fire: bool = True
) -> list[int]:
    """Epochs after whose value a growth is due; each growth happens at once if ``fire``."""
    found = []
    for epoch, value in enumerate(values, start):
        trigger.observe(value, epoch=epoch, step=10 * epoch)
        if trigger.due(epoch=epoch, step=10 * epoch):
            found.append(epoch)
            if fire:
                trigger.fired(epoch=epoch, step=10 * epoch)
    return found


def test_a_plateau_is_due_after_patience_values_without_improvement() -> None:
    """The first value is the best so far; patience counts those after the last improvement."""
    assert due_epochs(Plateau(patience=3), [3.0, 2.0, 1.0, 1.0, 1.0, 1.0]) == [5]
    assert due_epochs(Plateau(patience=3), [3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]) == []
    assert due_epochs(Plateau(patience=1), [1.0, 1.0, 2.0, 0.5]) == [1]


def test_due_stays_due_until_a_growth() -> None:
    """A callback that could not grow at once is told again."""
    assert due_epochs(Plateau(patience=2), [1.0] * 6, fire=False) == [2, 3, 4, 5]


def test_the_bump_after_a_growth_is_forgiven() -> None:
    """The best value starts anew, so a worse loss after the growth is not held against it."""
    values = [1.0, 1.0, 1.0, 9.0, 8.0, 7.0, 7.0, 7.0, 7.0, 7.0]
    assert due_epochs(Plateau(patience=2), values) == [2, 7]


def test_mode_max_is_the_mirror_image() -> None:
    """A metric and its negative are due at the same epochs."""
    values = [0.1, 0.5, 0.5, 0.4, 0.6, 0.6, 0.6, 0.9, 0.9, 0.9]
    negative = [-value for value in values]
    rising = due_epochs(Plateau("val_acc", mode="max", patience=2), values)
    assert rising == due_epochs(Plateau("val_acc", mode="min", patience=2), negative) == [3, 6, 9]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("abs", [3]), ("rel", [])],
)
def test_min_delta_is_absolute_or_a_share_of_the_best(mode: str, expected: list[int]) -> None:
    """Steps of a few hundredths near 1 are below 0.1 in absolute terms, but above 1 % of it."""
    min_delta = {"abs": 0.1, "rel": 0.01}[mode]
    trigger = Plateau(patience=3, min_delta=min_delta, min_delta_mode=mode)  # type: ignore[arg-type]
    assert due_epochs(trigger, [1.0, 0.95, 0.92, 0.905]) == expected


def test_relative_min_delta_uses_the_size_of_the_best() -> None:
    """A negative metric improves downwards from it, by a share of its magnitude."""
    assert due_epochs(Plateau(patience=2, min_delta=0.1, min_delta_mode="rel"), [-10, -10.5, -11.5]) == []
    assert due_epochs(Plateau(patience=2, min_delta=0.1, min_delta_mode="rel"), [-10, -10.5, -10.9]) == [2]


def test_an_improvement_must_exceed_min_delta() -> None:
    """Slow progress is measured from the best value, not from the last one."""
    slow = [1.0 - 0.04 * i for i in range(8)]
    assert due_epochs(Plateau(patience=3, min_delta=0.1), slow) == []
    assert due_epochs(Plateau(patience=2, min_delta=0.1), slow) == [2, 5]


def test_cooldown_and_warmup_values_are_not_looked_at() -> None:
    """Growth comes patience + 1 values after the warm-up, and after each cooldown."""
    flat = [1.0] * 16
    assert due_epochs(Plateau(patience=2), flat) == [2, 5, 8, 11, 14]
    assert due_epochs(Plateau(patience=2, warmup=3), flat) == [5, 8, 11, 14]
    assert due_epochs(Plateau(patience=2, cooldown=4), flat) == [2, 9]
    assert due_epochs(Plateau(patience=2, warmup=1, cooldown=2), flat) == [3, 8, 13]
    # A dip while resting is not remembered as the best.
    assert due_epochs(Plateau(patience=2, warmup=1), [0.0, 3.0, 2.0, 1.0, 1.0, 1.0]) == [5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_values_that_are_not_finite_are_no_improvement(mode: str, bad: float) -> None:
    """They count towards patience and never become the best."""
    trigger = Plateau(mode=mode, patience=3)  # type: ignore[arg-type]
    assert due_epochs(trigger, [bad, bad, bad]) == [2]
    sign = 1.0 if mode == "min" else -1.0
    values = [sign * 2.0, bad, bad, sign * 1.0, bad, sign * 1.0, bad]
    assert due_epochs(Plateau(mode=mode, patience=3), values) == [6]  # type: ignore[arg-type]


def test_an_epoch_without_a_value_does_not_count() -> None:
    """A metric that is logged every other epoch gives the same decisions, only later."""
    sparse = [1.0, None, 1.0, None, None, 1.0, None, 1.0]
    assert due_epochs(Plateau(patience=2), sparse) == [5]
    assert due_epochs(Plateau(patience=1, warmup=1), [None, 1.0, 1.0, 1.0]) == [3]


def test_smoothing_is_an_exponential_average_since_the_last_growth() -> None:
    """Weights fall by the half with age and sum to one; NaN is skipped; a growth starts the average anew."""
    trigger = Plateau(patience=1, smoothing=0.5)
    averages = []
    for epoch, value in enumerate([4.0, 0.0, math.nan, 1.0]):
        trigger.observe(value, epoch=epoch, step=epoch)
        averages.append(trigger.state_dict()["average"])
    assert averages == pytest.approx([4, 4 / 3, 4 / 3, (4 / 4 + 1) / (1 + 1 / 2 + 1 / 4)])
    trigger.fired(epoch=4, step=4)
    trigger.observe(10.0, epoch=5, step=5)
    assert trigger.state_dict()["average"] == trigger.state_dict()["best"] == 10.0


def test_the_average_settles_while_resting() -> None:
    """Values of the warm-up do not count, but the first one that counts is not the raw next value."""
    trigger = Plateau(patience=1, smoothing=0.5, warmup=2)
    for value in (4.0, 0.0, 1.0):
        trigger.observe(value, epoch=0, step=0)
    assert trigger.state_dict()["best"] == pytest.approx((4 / 4 + 1) / (1 + 1 / 2 + 1 / 4))


def test_a_trigger_of_ones_own_needs_no_more_than_due() -> None:
    """Attributes with an underscore are its state; another trigger's state is refused."""

    class AtEpochs(Trigger):
        def __init__(self, *epochs: int) -> None:
            self.epochs = epochs
            self._done = 0

        def due(self, *, epoch: int, step: int) -> bool:
            return self._done < len(self.epochs) and epoch >= self.epochs[self._done]

        def fired(self, *, epoch: int, step: int) -> None:
            self._done += 1

    trigger = AtEpochs(1, 4)
    assert due_epochs(trigger, [None] * 6) == [1, 4]
    again = AtEpochs(1, 4, 5)
    again.load_state_dict(trigger.state_dict())
    assert due_epochs(again, [None] * 3, start=4) == [5]
    with pytest.raises(ValueError, match="is not one of AtEpochs"):
        again.load_state_dict(Every(1).state_dict())


def test_every_counts_epochs_from_the_last_growth() -> None:
    """Not at the start; a growth that came late moves the next one."""
    trigger = Every(3)
    assert [e for e in range(6) if trigger.due(epoch=e, step=0)] == [3, 4, 5]
    trigger.fired(epoch=5, step=77)
    assert [e for e in range(5, 12) if trigger.due(epoch=e, step=0)] == [8, 9, 10, 11]
    assert due_epochs(Every(1), [None] * 4) == [1, 2, 3]


def test_every_counts_steps_and_tolerates_missed_calls() -> None:
    """With the unit step the epoch plays no part; being asked late is no harm."""
    trigger = Every(100, "step")
    assert not trigger.due(epoch=50, step=0)
    assert not trigger.due(epoch=50, step=99)
    assert trigger.due(epoch=0, step=130)
    trigger.fired(epoch=0, step=130)
    assert not trigger.due(epoch=9, step=229)
    assert trigger.due(epoch=9, step=230)


plateaus = st.builds(
    Plateau,
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(1, 3),
    min_delta=st.sampled_from([0.0, 0.5]),
    min_delta_mode=st.sampled_from(["abs", "rel"]),
    cooldown=st.integers(0, 2),
    warmup=st.integers(0, 2),
    smoothing=st.sampled_from([0.0, 0.5]),
)
everies = st.builds(Every, st.integers(1, 4), st.sampled_from(["epoch", "step"]))


@settings(deadline=None, max_examples=100)
@given(
    trigger=st.one_of(plateaus, everies),
    values=st.lists(st.floats(-3, 3) | st.sampled_from([math.nan, math.inf]), max_size=20),
    cut=st.integers(0, 20),
)
def test_a_restored_trigger_goes_on_as_if_never_stopped(
    trigger: Trigger, values: list[float], cut: int
) -> None:
    """Saved to and read from a file in mid-run, it takes the same decisions."""
    fresh = type(trigger)(**{k: v for k, v in vars(trigger).items() if not k.startswith("_")})
    resumed = type(trigger)(**{k: v for k, v in vars(trigger).items() if not k.startswith("_")})
    expected = due_epochs(fresh, values)
    found = due_epochs(trigger, values[:cut])
    file = io.BytesIO()
    torch.save(trigger.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert found + due_epochs(resumed, values[cut:], start=len(values[:cut])) == expected
    assert resumed.state_dict() == pytest.approx(fresh.state_dict(), nan_ok=True)


def test_states_are_plain_numbers() -> None:
    """Also when the metric was a tensor, as Lightning's are."""
    trigger = Plateau(smoothing=0.5)
    for epoch in range(3):
        trigger.observe(torch.tensor(1.5), epoch=epoch, step=epoch)  # type: ignore[arg-type]
    assert trigger.state_dict() == {
        **{"best": 1.5, "average": 1.5, "weight": 0.875, "stale": 2, "resting": 0}
    }
    kinds = {type(value) for value in trigger.state_dict().values()}
    assert kinds == {float, int}
    assert Every(2).state_dict() == {"last": 0}


@pytest.mark.parametrize(
    ("trigger", "other"), [(Plateau(), Every(1)), (Every(1), Plateau())], ids=["plateau", "every"]
)
def test_the_state_of_another_trigger_is_refused(trigger: Trigger, other: Trigger) -> None:
    """Resuming with another trigger is one sentence, and changes nothing."""
    before = trigger.state_dict()
    with pytest.raises(ValueError, match=f"is not one of {type(trigger).__name__}; resume with the"):
        trigger.load_state_dict(other.state_dict())
    assert trigger.state_dict() == before


def test_repr_is_the_log_line() -> None:
    """The repr of a built-in trigger builds its equal."""
    for trigger in (
        Plateau("val_acc", "max", 5, 0.1, "rel", 1, 2, 0.5),
        Plateau(),
        Every(7, "step"),
        Every(2),
    ):
        assert vars(eval(repr(trigger))) == vars(trigger)
    assert Plateau().monitor == "train_loss"
    assert Every(1).monitor is None


def test_defaults_are_those_of_the_design() -> None:
    """min_delta = 1e-3 is absolute, as in Lightning's EarlyStopping."""
    assert repr(Plateau()) == (
        "Plateau(monitor='train_loss', mode='min', patience=3, min_delta=0.001, "
        "min_delta_mode='abs', cooldown=0, warmup=0, smoothing=0.0, interval='epoch')"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plateau(mode="down"), "mode must be 'min' or 'max', got 'down'"),
        (lambda: Plateau(min_delta_mode="share"), "min_delta_mode must be 'abs' or 'rel'"),
        (lambda: Plateau(patience=0), "patience must be at least 1, got 0"),
        (lambda: Plateau(cooldown=-1), "cooldown must be at least 0, got -1"),
        (lambda: Plateau(warmup=-1), "warmup must be at least 0, got -1"),
        (lambda: Plateau(min_delta=-1e-3), "min_delta must be at least 0 and finite"),
        (lambda: Plateau(min_delta=math.nan), "min_delta must be at least 0 and finite"),
        (lambda: Plateau(smoothing=1.0), "smoothing must be at least 0 and below 1, got 1.0"),
        (lambda: Every(0), "n must be at least 1, got 0"),
        (lambda: Every(1, "batch"), "unit must be 'epoch' or 'step', got 'batch'"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], Trigger], message: str) -> None:
    """Options out of range are refused when the trigger is made."""
    with pytest.raises(ValueError, match=message):
        make()
