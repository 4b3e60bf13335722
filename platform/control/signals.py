"""Ctrl-C, SIGTERM, SIGHUP: the first one asks the run to save and stop, the second one ends it. No Ray.

A terminal that closes sends SIGHUP to what runs in it.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Counts signals for as long as the block runs. Outside the main thread there are none to catch."""

    def __init__(self) -> None:
        self._num_signals = 0
        self._before: dict[signal.Signals, Any] = {}

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._num_signals > 0

    def take_over(self) -> None:
        """Catch the signals, also where someone else has done so since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: the run outlives its terminal
            before = signal.signal(number, self._on_signal)
            self._before.setdefault(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # after SIGHUP nobody reads the terminal
            print(f"{name}: saving a checkpoint and stopping; once more to end at once", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        """Take over."""
        self.take_over()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Give the handlers back."""
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
