"""The first signal asks, the second ends."""

from __future__ import annotations

import os
import signal

import pytest

from headrace.platform.control.signals import StopSignals


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
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the other handler ran"))
        stop.take_over()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
    assert signal.getsignal(signal.SIGTERM) is before
