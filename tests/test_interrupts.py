"""Ctrl-C at any instruction: real signals, sent from a trace function before the n-th one of Python."""

from __future__ import annotations

import copy
import dis
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from types import CodeType, FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from lightning_split import Every, SplittingCallback, TopK, grow, trace
from lightning_split.interrupts import give_way, uninterrupted
from lightning_split.measuring import undisturbed
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Python's own handler; a shell lets what it starts in the background ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _interrupted(number: int, run: Callable[[], Any]) -> int:
    """Send SIGINT before the number-th instruction that Python carries out in a call.

    Or before the next one at which Python itself looks for signals: others, those that leave an ``except``
    among them, are not made to be interrupted. And outside of a weak reference's callback or a finaliser, as
    Python drops what is raised there.

    Returns:
        How many instructions there were up to the last that can be interrupted.
    """
    count, last, due = 0, 0, False

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count, last, due
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            due = due or count == number
            if (due or not number) and _looks(frame) and not _dropping(frame):
                last = count
                if due:
                    due = False
                    signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return last


@cache
def _instruction_names(code: CodeType) -> list[str]:
    return [dis.opname[number] for number in code.co_code]


def _looks(frame: FrameType) -> bool:
    """Whether Python looks for signals at the instruction that comes next."""
    return _instruction_names(frame.f_code)[frame.f_lasti].startswith(("RESUME", "CALL", "JUMP_BACKWARD"))


def _dropping(frame: FrameType | None) -> bool:
    """Whether the interpreter ignores exceptions of what runs."""
    while frame is not None:
        if frame.f_code.co_name in ("remove", "_remove", "remover", "__del__"):
            return True
        frame = frame.f_back
    return False


def _instructions(run: Callable[[], Any]) -> int:
    return _interrupted(0, run)


def _surroundings() -> list[Any]:
    """What a measurement changes outside of the model."""
    return [
        torch.get_rng_state().tolist(),
        str(np.random.get_state()),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.utils.checkpoint.CheckpointFunction,
        len(_get_current_dispatch_mode_stack()),
        torch._C._len_torch_function_stack(),
        signal.getsignal(signal.SIGINT),
    ]


def _state(model: nn.Module) -> list[Any]:
    return [
        [
            sorted(set(vars(m)) - {"_parameters", "_buffers"}),
            (type(m), m.training),
            {name: id(t) for name, t in m.named_parameters(recurse=False)},
            {name: id(t) for name, t in m.named_buffers(recurse=False)},
            [list(vars(m)[name]) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")],
            [t.tolist() for t in m.state_dict().values()],
            [(id(p.grad), p.requires_grad) for p in m.parameters()],
            getattr(m, "seen", None),
        ]
        for m in model.modules()
    ]


class _Counting(nn.Module):
    """Writes to what it owns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.seen = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        return self.norm(x)


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_at_any_instruction_of_a_measurement_leaves_no_trace(stride: int) -> None:
    """Before every single instruction of a measurement, those of contextlib and torch included."""
    torch.manual_seed(0)
    model = _Counting().train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    expected = _state(model), _surroundings()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def measure() -> None:
        with undisturbed(model, train=True, seed=3):
            np.random.rand(), random.random(), torch.rand(2)
            model(x).sum().backward()

    count = _instructions(measure)
    assert count > 3000
    for number in range(1, count, stride):
        with pytest.raises(KeyboardInterrupt):
            _interrupted(number, measure)
        assert (_state(model), _surroundings()) == expected, f"a signal at instruction {number} of {count}"


@pytest.mark.parametrize("points", [6, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("activation", "normed", "last"), [(nn.Tanh, (), 1000), (nn.ReLU, (), 1000), (nn.Tanh, (0, 3), 4000)]
)
def test_a_signal_at_any_instruction_of_a_growth_takes_it_back(
    points: int, activation: type[nn.Module], normed: tuple[int, ...], last: int
) -> None:
    """At instructions spread over the whole of it; in the last few it may be complete."""
    torch.manual_seed(0)
    batches = [(torch.randn(16, 5), torch.randn(16, 2)) for _ in range(6)]
    original = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), activation(), nn.Linear(4, 2)).train()
    for place in normed:
        weight_norm(original[place])
    options = {"strategy": TopK(count=2), "confirm_batches": batches[2:], "significance": None}

    def growth(model: nn.Module) -> Callable[[], Any]:
        return lambda: grow(model, batches[:2], lambda m, b: (m(b[0]) - b[1]).square().mean(), **options)

    expected = _surroundings()
    for _ in range(2):  # the first fills caches
        model = copy.deepcopy(original)
        count = _instructions(growth(model))
    grown = model[0].out_features
    assert grown > 4
    for number in np.linspace(1, count - last, points, dtype=int).tolist():
        model = copy.deepcopy(original)
        before = _state(model)
        with pytest.raises(KeyboardInterrupt):
            _interrupted(number, growth(model))
        assert (_state(model), _surroundings()) == (before, expected), f"instruction {number} of {count}"
    ends = set()
    for number in range(count - last + 100, count, last // (8 if points < 100 else 16)):
        model = copy.deepcopy(original)
        with suppress(KeyboardInterrupt):
            _interrupted(number, growth(model))
        ends.add(model[0].out_features)
        assert model[0].out_features == model[1].num_features == model[3].in_features
        assert _surroundings() == expected, f"instruction {number} of {count}"
    assert ends <= {4, grown}


@pytest.mark.parametrize(("points", "stride"), [(3, 177), pytest.param(200, 31, marks=pytest.mark.slow)])
def test_a_signal_while_weights_are_plain_waits_until_they_are_computed_again(
    points: int, stride: int
) -> None:
    """At instructions spread over the whole of a trace, and close to each other where it begins and ends."""
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 5)
    for place in (0, 2):
        weight_norm(model[place])
    for _ in range(2):
        count = _instructions(lambda: trace(model, x))
    before = _state(model), _surroundings()
    whole = np.linspace(1, count, points, dtype=int).tolist()
    for number in [*whole, *range(1, 3000, stride), *range(count - 2000, count, stride)]:
        with suppress(KeyboardInterrupt):
            _interrupted(number, lambda: trace(model, x))
        assert (_state(model), _surroundings()) == before, f"a signal at instruction {number} of {count}"


@pytest.mark.parametrize("where", ["instruction", "end"])
def test_a_signal_waits_for_a_place_or_the_end(where: str) -> None:
    """Nested contexts wait for the outermost; the handler of the outside is called, once, and is back."""
    calls: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with uninterrupted():
            with uninterrupted():
                give_way()
                signal.raise_signal(signal.SIGINT)
                assert calls == []
                if where == "instruction":
                    give_way()
                    assert calls == [signal.SIGINT]
                    give_way()
            assert len(calls) == (where == "instruction")
        assert calls == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
        signal.raise_signal(signal.SIGINT)
        assert len(calls) == 2
        with uninterrupted():
            give_way()
        assert len(calls) == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_does_not_wait_and_none_is_left_over() -> None:
    """Pressed twice, it comes out at once, and the next measurement knows nothing of it."""
    reached = []

    @uninterrupted()
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert reached == [1]
    with uninterrupted():
        give_way()


def test_an_error_inside_comes_out_and_a_signal_before_it_comes_first() -> None:
    """The error is then the context of what the signal raises."""

    @uninterrupted()
    def fails(*signals: int) -> None:
        for number in signals:
            signal.raise_signal(number)
        _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fails()
    with pytest.raises(KeyboardInterrupt) as raised:
        fails(signal.SIGINT)
    assert isinstance(raised.value.__context__, ZeroDivisionError)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_without_a_handler_in_python_is_left_alone(handler: signal.Handlers) -> None:
    """Ignored it stays, or ends the process."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with uninterrupted():
            give_way()
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_and_a_handler_from_inside_are_left_alone() -> None:
    """Threads cannot set handlers; who sets one inside wants it to stay."""
    before, seen = signal.getsignal(signal.SIGINT), []

    def elsewhere() -> None:
        with uninterrupted():
            give_way()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
    try:
        with uninterrupted():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class _StopError(BaseException):
    """What a Trainer does not take for an orderly end."""


class _Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean() + 0 * torch.rand(())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class _Pressed(SplittingCallback):
    """Sends a signal before the number-th instruction of the hook in which the growth is due."""

    def __init__(self, number: int) -> None:
        super().__init__(
            strategy=TopK(count=1), trigger=Every(1), num_batches=2, confirm_batches=2, verbose=False
        )
        self.number = number

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        hook = super().on_train_epoch_start
        if trainer.current_epoch == 1:
            self.before = _fit_state(trainer)
            self.count = _interrupted(self.number, lambda: hook(trainer, pl_module))


def _fit_state(trainer: pl.Trainer) -> list[Any]:
    optimizer, module = trainer.optimizers[0], trainer.lightning_module
    loader = trainer.fit_loop._combined_loader.flattened[0]
    return [
        [s[:3] + s[4:] for s in _state(module)],
        [id(p) for group in optimizer.param_groups for p in group["params"]],
        [t.tolist() for p in module.parameters() for t in optimizer.state[p].values()],
        loader.generator.get_state().tolist(),
        _surroundings(),
    ]


@pytest.mark.parametrize("points", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_signal_during_a_trainer_s_growth_takes_all_of_it_back_or_nothing(points: int) -> None:
    """Module, optimizer, loader and random state; a growth that is complete is in the history."""
    data = TensorDataset(torch.randn(96, 5), torch.randn(96, 2))

    def fitted(number: int) -> tuple[_Pressed, pl.Trainer]:
        torch.manual_seed(0)
        pressed = _Pressed(number)
        trainer = pl.Trainer(
            max_epochs=2, callbacks=[pressed], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(2))
        with suppress(_StopError):
            trainer.fit(_Module(), loader)
        return pressed, trainer

    def stop(number: int, frame: FrameType | None) -> None:
        raise _StopError

    handler = signal.signal(signal.SIGINT, stop)
    try:
        assert fitted(0)[0].history
        count = fitted(0)[0].count
        complete = []
        for number in [*np.linspace(1, count - 2000, points, dtype=int).tolist(), count - 600]:
            pressed, trainer = fitted(number)
            after = _fit_state(trainer)
            held = {id(p) for p in trainer.lightning_module.parameters()}
            assert set(after[1]) == held, f"instruction {number} of {count}"
            assert after[3:] == pressed.before[3:], f"instruction {number} of {count}"
            complete.append(bool(pressed.history))
            if not complete[-1]:
                assert after == pressed.before, f"instruction {number} of {count}"
    finally:
        signal.signal(signal.SIGINT, handler)
    assert complete == sorted(complete)
    assert not complete[0]
    assert complete[-1]
