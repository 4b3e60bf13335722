"""Ends a rank whose driver is out of reach: another group may have taken its place, and needs its GPU. No Ray."""

from __future__ import annotations

import os
import sys
import threading

TICK_S = 0.25
EXIT_CUT_OFF = 4


class CutOffGuard:
    """Ends the process when nobody has called `heard` for so long.

    It counts its own waits and reads no clock: a process that was stopped, or sat in a call that lets no other thread
    run, could not have been heard meanwhile.

    Args:
        timeout_s: twice `cluster.heartbeat_timeout_s`: by then the driver has given the rank up.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._num_ticks = timeout_s, 0
        threading.Thread(target=self._watch, name="cut off", daemon=True).start()

    def heard(self) -> None:
        """The driver has asked for something."""
        self._num_ticks = 0

    def _watch(self) -> None:
        never = threading.Event()
        while self._num_ticks * TICK_S < self._timeout_s:
            never.wait(TICK_S)
            self._num_ticks += 1
        words = (
            f"the driver has not polled this rank for {self._timeout_s:g} s (2 x cluster.heartbeat_timeout_s): it is "
            "cut off, and ends, so that it holds no device while another group takes its place"
        )
        print(words, file=sys.stderr, flush=True)
        os._exit(EXIT_CUT_OFF)
