"""SIGTERM ends the benchmark between two passes, with files and processes cleaned up, by exit code 128 + 15.

A handler that raises would strike anywhere. In a finalizer the interpreter swallows its exception, and the benchmark
goes on; between two steps of a clean-up another error takes its place. So the handler only notes the signal, and the
benchmark checks for it at points where no work is incomplete.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_told = threading.Event()


@contextmanager
def clean_end_on_sigterm() -> Iterator[None]:
    """Within, a SIGTERM waits for `end_if_told`; a second one ends the process at once.

    Does nothing off the main thread, where Python allows no handlers.

    Raises:
        SystemExit: a SIGTERM came, whatever else the block raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        try:
            end_if_told()
        finally:
            _told.clear()


def end_if_told() -> None:
    """Leave by SystemExit where a SIGTERM has come. Called before every pass: a pass takes about a second at most."""
    if _told.is_set():
        raise SystemExit(128 + signal.SIGTERM)


def _note(number: int, frame: FrameType | None) -> None:
    _told.set()
    signal.signal(number, signal.SIG_DFL)
