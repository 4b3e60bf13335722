"""The first signal asks, the second ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from headrace.platform.control.signals import EXIT_INTERRUPTED, StopSignals


@pytest.fixture(autouse=True)
def closing_terminal_signals() -> Iterator[None]:
    """The tests themselves may run under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_asks_second_ends_and_the_handlers_are_given_back(number: signal.Signals, capsys) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
        assert number.name in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_under_nohup_a_closing_terminal_is_not_a_signal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_that_came_later_is_replaced_and_the_first_one_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert not stop.requested()
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the other handler ran"))
        stop.take_over()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
    assert signal.getsignal(signal.SIGTERM) is before


def test_before_anybody_asks_the_first_signal_ends_the_run() -> None:
    with StopSignals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_call_into_a_library_that_does_not_return_does_not_hold_up_ctrl_c() -> None:
    code = """
import ctypes, signal
from headrace.platform.control import signals
signals.PATIENCE_S = 0.2
libc = ctypes.CDLL(None)
with signals.StopSignals():
    print("in", flush=True)
    lock = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)  # for ever, in C, without Python's lock
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as stuck:
        assert stuck.stdout is not None
        stuck.stdout.readline()
        time.sleep(0.2)  # into the call; earlier is well too
        stuck.send_signal(signal.SIGINT)
        assert stuck.wait(600) == EXIT_INTERRUPTED
