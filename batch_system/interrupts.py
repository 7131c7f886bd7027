"""Ctrl-C while a program starts.

Python raises KeyboardInterrupt in whatever the main thread executes at that moment, and some code
prints that exception and loses it: the import system when it frees a lock, and pydantic while it
makes a schema. A service would start as if nobody had pressed Ctrl-C: 3 of 700 did (measured).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


def end_at_once() -> None:
    """Let SIGINT end this process at once, until one of the functions below. An ignored SIGINT, as
    of a background job of a shell script, stays ignored.
    """
    _replace(signal.default_int_handler, signal.SIG_DFL)


def raise_in_commands() -> None:
    """Let SIGINT raise KeyboardInterrupt again, so that a command can tidy up."""
    _replace(signal.SIG_DFL, signal.default_int_handler)


@contextlib.contextmanager
def passed_to(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle SIGINT like this within the block, if it would end the process at once."""
    is_replaced = _replace(signal.SIG_DFL, handler)
    try:
        yield
    finally:
        if is_replaced:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _replace(before: object, after: Callable[[int, FrameType | None], object] | int) -> bool:
    """Set the handler of SIGINT, if it is `before`. Returns whether it did; only the main thread
    can.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not before:
        return False
    signal.signal(signal.SIGINT, after)
    return True
