from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from headrace.bench.tier_rounds import Pass, take_turns
from headrace.bench.tier_sigterm import clean_end_on_sigterm, end_if_told


def told() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def within(block: Callable[[], object]) -> None:
    with clean_end_on_sigterm():
        block()


def code_of(block: Callable[[], object]) -> object:
    with pytest.raises(SystemExit) as end:
        within(block)
    return end.value.code


def test_the_signal_waits_until_it_is_asked_for() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def passes() -> None:
        end_if_told()
        told()
        seen.append("the pass goes on")
        end_if_told()
        seen.append("the next pass")

    assert code_of(passes) == 143
    assert seen == ["the pass goes on"]
    assert signal.getsignal(signal.SIGTERM) is before
    end_if_told()  # what was told is over


def test_a_signal_after_the_last_pass_counts() -> None:
    assert code_of(told) == 143


def test_an_error_on_the_way_out_does_not_replace_the_end() -> None:
    def fail() -> None:
        raise BufferError("cannot close exported pointers exist")

    def told_and_fail() -> None:
        told()
        fail()

    assert code_of(told_and_fail) == 143
    with pytest.raises(BufferError):
        within(fail)


def test_a_signal_in_a_finalizer_is_not_swallowed() -> None:
    class Dies:
        def __del__(self) -> None:
            told()

    num_passes = 0

    def one_pass() -> Pass:
        nonlocal num_passes
        num_passes += 1
        Dies()
        return Pass(1, 1.0)

    assert code_of(lambda: take_turns({"": (one_pass, 3)}, None)) == 143
    assert num_passes == 1


def test_a_second_signal_ends_the_process_where_it_stands() -> None:
    text = (
        "import os, signal\n"
        "from headrace.bench.tier_sigterm import clean_end_on_sigterm\n"
        "with clean_end_on_sigterm():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('goes on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('never', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "goes on\n")


def test_off_the_main_thread_the_signal_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def run() -> None:
        with clean_end_on_sigterm():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
