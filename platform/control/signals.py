"""Ctrl-C, SIGTERM, SIGHUP: after the first one a run saves and stops, the second one ends it. No Ray.

A terminal that closes sends SIGHUP to what runs in it. Before there is anything to save, the first signal ends the run.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Python runs a handler between two of its own instructions. A call into a library that does not come back holds it up.
PATIENCE_S = 3.0
EXIT_INTERRUPTED = 130


class StopSignals:
    """Counts signals for as long as the block runs. Outside the main thread there are none to catch."""

    def __init__(self) -> None:
        self._num_signals = 0
        self._heard_s = 0.0
        self._somebody_asks = False
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def requested(self) -> bool:
        """Whether a signal has come. Before the first call no loop checks for it: a signal ends the run at once."""
        self._somebody_asks = True
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
        self._heard_s = time.monotonic()
        if number == signal.SIGHUP:
            leave_terminal()
        if self._num_signals > 1 or not self._somebody_asks:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        print(f"{name}: saving a checkpoint and stopping; once more to end at once", file=sys.stderr, flush=True)

    def _watch(self, reader: int) -> None:
        """End the process where the main thread does not come back to hear a signal that would end it."""
        while number := os.read(reader, 1):
            ends = not self._somebody_asks or self._num_signals > 0
            if number[0] not in SIGNALS or not ends:
                continue
            came_s = time.monotonic()
            time.sleep(PATIENCE_S)
            if self._pipe is not None and self._heard_s < came_s - 1.0:
                os.write(2, b"interrupted in a call that does not return; ending at once\n")
                os._exit(EXIT_INTERRUPTED)

    def __enter__(self) -> Self:
        """Take over."""
        if threading.current_thread() is threading.main_thread():
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            self._pipe = reader, writer
            threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        self.take_over()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Give the handlers back."""
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            (_, writer), self._pipe = self._pipe, None
            os.close(writer)  # the watching thread reads the end, and ends


def leave_terminal() -> None:
    """Write to nowhere instead of a terminal that has gone; files and pipes stay."""
    for number in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
