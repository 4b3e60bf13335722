"""A rank that nobody polls ends by itself; one that is polled, or could not be heard, does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from headrace.workers.actors.cut_off import EXIT_CUT_OFF

RANK = """
import sys, time
from headrace.workers.actors.cut_off import CutOffGuard
guard = CutOffGuard(float(sys.argv[1]))
print("up", flush=True)
for line in sys.stdin:
    guard.heard()
    print("heard", flush=True)
time.sleep(600)
"""


def begin(timeout_s: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", RANK, str(timeout_s)]
    pipe = subprocess.PIPE
    rank = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "up\n"
    return rank


def test_a_rank_ends_when_it_is_not_polled_and_says_why() -> None:
    with begin(2.0) as rank:
        begun_s = time.monotonic()
        while time.monotonic() < begun_s + 3.0:
            rank.stdin.write("poll\n")
            assert rank.stdout.readline() == "heard\n"
            time.sleep(0.05)
        last_s = time.monotonic()
        assert rank.wait(600) == EXIT_CUT_OFF
        assert time.monotonic() - last_s >= 1.7
        assert "2 x cluster.heartbeat_timeout_s" in rank.stderr.read()


def test_a_process_that_was_stopped_could_not_be_heard_meanwhile() -> None:
    with begin(2.0) as rank:
        rank.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        rank.send_signal(signal.SIGCONT)
        rank.stdin.write("poll\n")
        assert rank.stdout.readline() == "heard\n"
        rank.kill()
