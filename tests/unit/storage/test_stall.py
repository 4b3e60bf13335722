"""A drive that does not answer is an error after tiers.ssd.timeout_s; one that is only slow is waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.records import Medium
from headrace.storage.stack import TierStack
from headrace.storage.testing import FakeTier, Faults, open_fake_stack

STALL_S = 0.4
TENSOR = torch.arange(40_000, dtype=torch.float32)


def key_of(number: int) -> BlockKey:
    return BlockKey(0, number, "x")


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


def close_in_time(stack: TierStack) -> None:
    begin_s = time.monotonic()
    stack.close()
    assert time.monotonic() - begin_s < 5.0


def test_a_store_that_does_not_move_fails_by_name(tier: FakeTier, answer: threading.Event) -> None:
    stack = open_fake_stack([tier], stall_s=STALL_S)
    answer.clear()
    begin_s = time.monotonic()
    stack.prepare_store(key_of(0), TENSOR, Medium.ssd)
    with pytest.raises(TransferFailed, match=r"s0\.m0\.l0\.x\.c0: ssd tier: nothing has moved.*tiers\.ssd\.timeout_s"):
        stack.complete_store(key_of(0))
    assert STALL_S <= time.monotonic() - begin_s < STALL_S + 2.0
    close_in_time(stack)


def test_once_a_drive_has_failed_nobody_waits_for_it_again(tier: FakeTier, answer: threading.Event) -> None:
    stack = open_fake_stack([tier], stall_s=STALL_S)
    answer.clear()
    for number in range(3):
        stack.prepare_store(key_of(number), TENSOR, Medium.ssd)
    for number in range(3):
        begin_s = time.monotonic()
        with pytest.raises(TransferFailed, match="nothing has moved"):
            stack.complete_store(key_of(number))
    assert time.monotonic() - begin_s < STALL_S / 2, "the last one"
    close_in_time(stack)


def test_a_load_that_does_not_move_fails_by_name(tier: FakeTier, answer: threading.Event) -> None:
    stack = open_fake_stack([tier], stall_s=STALL_S)
    stack.prepare_store(key_of(0), TENSOR, Medium.ssd)
    stack.complete_store(key_of(0))
    answer.clear()
    stack.prepare_load(key_of(0))
    with pytest.raises(TransferFailed, match="nothing has moved"):
        stack.complete_load(key_of(0))
    close_in_time(stack)


def test_a_full_queue_before_a_drive_that_hangs_does_not_hold_the_caller_for_ever(
    tier: FakeTier, answer: threading.Event
) -> None:
    stack = open_fake_stack([tier], num_threads=1, max_waiting=1, stall_s=STALL_S)
    answer.clear()

    def store_six() -> None:
        for number in range(6):
            stack.prepare_store(key_of(number), TENSOR, Medium.ssd)

    with pytest.raises(TransferFailed, match="nothing has moved"):
        store_six()
    close_in_time(stack)


def test_a_slow_drive_is_waited_for() -> None:
    # Ten parts of 0.15 s on two threads: together longer than the limit, but something always moves.
    stack = open_fake_stack([FakeTier(16 * 1024**2, Faults(delay_s=0.15))], num_threads=1, stall_s=STALL_S)
    begin_s = time.monotonic()
    stack.prepare_store(key_of(0), TENSOR, Medium.ssd)
    stack.complete_store(key_of(0))
    assert time.monotonic() - begin_s > STALL_S
    stack.prepare_load(key_of(0))
    assert torch.equal(stack.complete_load(key_of(0)), TENSOR)
    stack.close()


def test_a_wait_for_the_next_job_after_a_pause_is_not_a_stall(tier: FakeTier) -> None:
    stack = open_fake_stack([tier], stall_s=STALL_S)
    stack.prepare_store(key_of(0), TENSOR, Medium.ssd)
    stack.complete_store(key_of(0))
    time.sleep(2 * STALL_S)
    stack.prepare_load(key_of(0))
    assert torch.equal(stack.complete_load(key_of(0)), TENSOR)
    stack.close()
