"""Ctrl-C while something is half done: taken in, and delivered where nothing is.

Python raises ``KeyboardInterrupt`` between any two instructions of the main thread, also between those that
put things back: while a random state is being restored, or a context manager of torch is being left. No
arrangement of ``finally`` covers all of them. So inside :class:`uninterrupted` the signal is only noted, and
its handler is called at the next :func:`give_way`, or at the end.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import ContextDecorator
from types import FrameType
from typing import Any

__all__ = ["give_way", "uninterrupted"]


class uninterrupted(ContextDecorator):  # noqa: N801  # reads as suppress and nullcontext do
    """Inside, the first SIGINT waits for :func:`give_way` or for the end; one more does not wait.

    For ``with`` and as a decorator. Contexts can be nested; the end of the outermost one counts. The handler
    that was there (Python's own raises ``KeyboardInterrupt``) is called then, and is in its place again
    afterwards. Nothing happens in other threads, where no signal is handled, and where SIGINT has no handler
    in Python.
    """

    def __enter__(self) -> None:
        """Take signals in."""
        if _in_main_thread():
            _enter()

    def __exit__(self, *error: object) -> None:
        """Deliver what has come."""
        if _in_main_thread():
            _leave()


def give_way() -> None:
    """To be called where nothing is half done: deliver a signal that came in the meantime."""
    if _state.waits and _in_main_thread():
        _deliver()


class _State:
    """Of the process; only its main thread writes here."""

    depth = 0  # of nested contexts
    waits = False  # a signal has come that was not delivered
    handler: Any = None  # that of the outside


_state = _State()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _enter() -> None:
    if _state.depth == 0:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and handler is not _note:
            _state.handler, _state.waits = handler, False
            signal.signal(signal.SIGINT, _note)
    _state.depth += 1  # a signal in between is noted already


def _leave() -> None:
    _state.depth -= 1
    if _state.depth == 0:
        if signal.getsignal(signal.SIGINT) is _note:  # else somebody inside has installed another
            signal.signal(signal.SIGINT, _state.handler)
        if _state.waits:
            _deliver()


def _note(number: int, frame: FrameType | None) -> None:
    """The handler inside."""
    if _state.waits:
        _state.handler(number, frame)  # pressed again: at once, come what may
    _state.waits = True


def _deliver() -> None:
    _state.waits = False
    _state.handler(signal.SIGINT, sys._getframe())
