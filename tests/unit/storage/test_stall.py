"""A drive that does not answer is an error after tiers.ssd.timeout_s; one that is only slow is waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from headrace.helpers import tiers as testing
from headrace.helpers.tiers import FakeTier, Faults, open_fake_stack
from headrace.storage.blockio import thread_pool
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Medium
from headrace.storage.stack import TierStack

STALL_S, LONG_S = 0.4, 600.0
TENSOR = torch.arange(40_000, dtype=torch.float32)


def key_of(number: int) -> BlobKey:
    return BlobKey("test", number, "x", 0, 1, 0)


@pytest.fixture(autouse=True)
def short_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that hang are soon left behind."""
    monkeypatch.setattr(thread_pool, "STALLED_JOIN_S", 0.05)


@pytest.fixture
def answer() -> Iterator[threading.Event]:
    """The drive answers while it is set."""
    event = threading.Event()
    event.set()
    yield event
    event.set()


@pytest.fixture
def tier(answer: threading.Event) -> FakeTier:
    return FakeTier(16 * 1024**2, Faults(hang=answer))


class Clock:
    """A clock that stands still unless it is moved; `sleep` moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The only clock of the threads' progress and of a slow drive: a busy machine changes nothing."""
    made = Clock()
    times = SimpleNamespace(perf_counter=lambda: made.now_s, monotonic=time.monotonic, sleep=made.sleep)
    for module in (thread_pool, testing):
        monkeypatch.setattr(module, "time", times)
    return made


def limit(stack: TierStack, stall_s: float) -> None:
    for opened in stack._tiers.values():
        opened.threads.stall_s = stall_s


def test_a_store_that_does_not_move_fails_by_name(tier: FakeTier, answer: threading.Event) -> None:
    stack = open_fake_stack([tier], stall_s=STALL_S)
    answer.clear()
    begin_s = time.monotonic()
    stack.prepare_store(key_of(0), TENSOR, Medium.ssd)
    with pytest.raises(
        TransferFailed, match=r"s0\.m0\.l0\.x\.t0-1\.test: ssd tier: no byte has moved.*tiers\.ssd\.timeout_s"
    ):
        stack.complete_store(key_of(0))
    assert time.monotonic() - begin_s >= STALL_S
    stack.close()  # the drive still hangs


def test_once_a_drive_has_failed_nobody_waits_for_it_again(tier: FakeTier, answer: threading.Event) -> None:
    stack = open_fake_stack([tier], stall_s=STALL_S)
    answer.clear()
    for number in range(3):
        stack.prepare_store(key_of(number), TENSOR, Medium.ssd)
    for number in range(3):
        with pytest.raises(TransferFailed, match="no byte has moved"):
            stack.complete_store(key_of(number))
        limit(stack, LONG_S)  # a second wait would last until the test is ended
    stack.close()


def test_a_load_that_does_not_move_fails_by_name(tier: FakeTier, answer: threading.Event) -> None:
    stack = open_fake_stack([tier], stall_s=LONG_S)
    stack.prepare_store(key_of(0), TENSOR, Medium.ssd)
    stack.complete_store(key_of(0))
    answer.clear()
    limit(stack, STALL_S)
    stack.prepare_load(key_of(0))
    with pytest.raises(TransferFailed, match="no byte has moved"):
        stack.complete_load(key_of(0))
    stack.close()


def test_a_full_queue_before_a_drive_that_hangs_does_not_hold_the_caller_for_ever(
    tier: FakeTier, answer: threading.Event
) -> None:
    stack = open_fake_stack([tier], num_threads=1, window_bytes=TENSOR.nbytes, stall_s=STALL_S)
    answer.clear()

    def store_six() -> None:
        for number in range(6):
            stack.prepare_store(key_of(number), TENSOR, Medium.ssd)

    with pytest.raises(TransferFailed, match="no byte has moved"):
        store_six()
    stack.close()


def test_a_slow_drive_is_waited_for(clock: Clock) -> None:
    # Its calls together take longer than the limit, but something always moves.
    drive = FakeTier(16 * 1024**2, Faults(delay_s=0.3 * STALL_S))
    stack = open_fake_stack([drive], num_threads=1, stall_s=STALL_S)
    for number in range(4):
        stack.prepare_store(key_of(number), TENSOR, Medium.ssd)
    for number in range(4):
        stack.complete_store(key_of(number))
    assert clock.now_s > STALL_S
    stack.prepare_load(key_of(0))
    assert torch.equal(stack.complete_load(key_of(0)), TENSOR)
    stack.close()


def test_a_wait_for_the_next_job_after_a_pause_is_not_a_stall(tier: FakeTier, clock: Clock) -> None:
    stack = open_fake_stack([tier], stall_s=STALL_S)
    stack.prepare_store(key_of(0), TENSOR, Medium.ssd)
    stack.complete_store(key_of(0))
    clock.sleep(2 * STALL_S)
    stack.prepare_load(key_of(0))
    assert torch.equal(stack.complete_load(key_of(0)), TENSOR)
    stack.close()
