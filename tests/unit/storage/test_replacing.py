"""A store over a blob: the old bytes until the new ones are whole, or after an error; given buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from headrace.helpers.tiers import FakeTier, Faults, open_fake_stack
from headrace.storage.build import open_stack
from headrace.storage.config import HostTierConfig, TiersConfig
from headrace.storage.core.errors import TierFull, TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import LookupResult, Medium
from headrace.storage.core.states import BlobState
from headrace.storage.stack import TierStack
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
KEY = BlobKey("kv_grad", 1, "k", 0, 4096)
BOTH = pytest.mark.parametrize("medium", [Medium.host, Medium.ssd], ids=lambda m: m.value)
OLD, NEW = torch.arange(5000.0), -torch.arange(9000.0)


def store(stack: TierStack, value: torch.Tensor, medium: Medium = Medium.ssd, key: BlobKey = KEY) -> None:
    stack.prepare_store(key, value, medium)
    stack.complete_store(key)


def load(stack: TierStack, key: BlobKey = KEY) -> torch.Tensor:
    stack.prepare_load(key)
    return stack.complete_load(key)


@BOTH
def test_an_accumulator_is_loaded_added_to_and_stored_again(stack: TierStack, medium: Medium) -> None:
    store(stack, torch.zeros(1000), medium)
    used_bytes = stack.stats()[medium].used_bytes
    for _ in range(50):
        store(stack, load(stack) + 1, medium)
    assert torch.equal(load(stack), torch.full((1000,), 50.0))
    assert stack.stats()[medium].used_bytes == used_bytes
    stack.discard(KEY)
    assert stack.stats()[medium].used_bytes == 0


def test_sizes_dtypes_and_tiers_may_differ(stack: TierStack) -> None:
    values = [OLD, NEW, torch.empty(0), torch.arange(7), torch.zeros(300_000, dtype=torch.uint8)]
    for number, value in enumerate(values):
        medium = (Medium.host, Medium.ssd)[number % 2]
        store(stack, value, medium)
        assert torch.equal(load(stack), value)
        other = stack.stats()[(Medium.ssd, Medium.host)[number % 2]]
        assert other.used_bytes == 0, "the old slot, of the other tier, is free again"


@pytest.fixture
def gated() -> tuple[TierStack, FakeTier, threading.Event]:
    """A drive that holds OLD and does not answer until the event is set."""
    tier, gate = FakeTier(MIB), threading.Event()
    stack = open_fake_stack([tier])
    store(stack, OLD)
    tier.faults.hang = gate
    return stack, tier, gate


def test_the_new_bytes_are_the_answer_at_once_and_the_old_slot_stays_until_they_are_whole(gated: Any) -> None:
    stack, _, gate = gated
    stack.prepare_store(KEY, NEW, Medium.ssd)
    assert stack.lookup(KEY) is LookupResult.pending
    assert load(stack).data_ptr() == NEW.data_ptr()
    assert stack.stats()[Medium.ssd].used_bytes >= OLD.nbytes + NEW.nbytes
    gate.set()
    stack.complete_store(KEY)
    assert stack.stats()[Medium.ssd].used_bytes < OLD.nbytes + NEW.nbytes
    assert torch.equal(load(stack), NEW)
    stack.close()


@pytest.mark.parametrize("when", ["write", "changed"])
def test_an_error_leaves_the_old_bytes(gated: Any, when: str) -> None:
    stack, tier, gate = gated
    value = NEW.clone()
    stack.prepare_store(KEY, value, Medium.ssd)
    tier.faults.failed_write = when == "write"
    if when == "changed":
        value.zero_()
    gate.set()
    with pytest.raises(TransferFailed, match=str(KEY)):
        stack.complete_store(KEY)
    tier.faults.failed_write = False
    assert (stack.state(KEY), stack.lookup(KEY)) == (BlobState.stored, LookupResult.hit)
    assert torch.equal(load(stack), OLD)
    store(stack, NEW)
    assert torch.equal(load(stack), NEW)
    stack.discard(KEY)
    assert stack.stats()[Medium.ssd].used_bytes == 0
    stack.close()


def test_no_room_for_both_leaves_the_old_bytes() -> None:
    stack = open_fake_stack([FakeTier(40960)])
    store(stack, OLD)
    with pytest.raises(TierFull, match=f"{KEY} needs {NEW.nbytes} bytes"):
        stack.prepare_store(KEY, NEW, Medium.ssd)
    assert torch.equal(load(stack), OLD)
    stack.close()


@pytest.mark.parametrize("when", ["in flight", "whole"])
def test_discard_gives_both_slots_back(gated: Any, when: str) -> None:
    stack, _, gate = gated
    stack.prepare_store(KEY, NEW, Medium.ssd)
    if when == "whole":
        gate.set()
        stack.complete_store(KEY)
    stack.discard(KEY)
    gate.set()
    for opened in stack._tiers.values():
        opened.threads.close()
    assert stack.stats()[Medium.ssd].used_bytes == 0
    stack.close()


def test_while_a_load_is_open_nothing_is_replaced(stack: TierStack) -> None:
    store(stack, OLD)
    stack.prepare_load(KEY)
    with pytest.raises(RuntimeError, match=f"{KEY} is loading: prepare_store"):
        stack.prepare_store(KEY, NEW, Medium.ssd)
    assert torch.equal(stack.complete_load(KEY), OLD)


@pytest.mark.parametrize("fails", [False, True])
def test_an_old_blob_may_be_evicted_to_make_room_for_the_new_one(
    host_slab: HostSlab, ssd_slab: SsdSlab, fails: bool
) -> None:
    leases = [host_slab.lease("rank0", 4 * MIB), ssd_slab.lease("rank0", 8 * MIB)]
    config = TiersConfig(host=HostTierConfig(evict=True))
    stack = open_stack(leases, config, device=torch.device("cpu"), log=TransferLog())
    old, new = torch.full((3 * MIB,), 1, dtype=torch.uint8), torch.full((2 * MIB,), 2, dtype=torch.uint8)
    store(stack, old, Medium.host)
    stack.prepare_store(KEY, new, Medium.host)
    assert stack.record()["tiers"]["host"]["evicted_blobs"] == 1
    assert stack.stats()[Medium.ssd].used_bytes == 3 * MIB
    if fails:
        new.zero_()
        with pytest.raises(TransferFailed, match="changed in place"):
            stack.complete_store(KEY)
    else:
        stack.complete_store(KEY)
    assert torch.equal(load(stack), old if fails else new)
    assert stack.stats()[Medium.ssd].used_bytes == (3 * MIB if fails else 0)
    stack.discard(KEY)
    assert all(s.used_bytes == 0 for s in stack.stats().values())
    stack.close()


@BOTH
def test_a_load_goes_into_the_given_rows(stack: TierStack, medium: Medium) -> None:
    whole = torch.zeros(1, 3000, 333)
    for begin in (0, 1000, 2000):
        store(stack, torch.full((1, 1000, 333), 1.0 + begin), medium, KEY._replace(begin=begin))
    for begin in (2000, 0, 1000):
        key, rows = KEY._replace(begin=begin), whole[:, begin : begin + 1000]
        stack.prepare_load(key, into=rows)
        assert stack.complete_load(key).data_ptr() == rows.data_ptr()
    assert torch.equal(whole, torch.arange(1.0, 3000, 1000).repeat_interleave(1000)[None, :, None].expand(1, 3000, 333))


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: torch.empty(5001), r"\(5001,\) torch.float32 on cpu \(20004 bytes\)"),
        (lambda: torch.empty(50, 100), r"\(50, 100\)"),
        (lambda: torch.empty(5000, dtype=torch.int32), "torch.int32"),
        (lambda: torch.empty(10_000)[::2], "a strided one"),
        (lambda: torch.empty(5000, device="meta"), "on meta"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(
    stack: TierStack, wrong: Callable[[], torch.Tensor], told: str, is_stored: bool
) -> None:
    stack.prepare_store(KEY, OLD, Medium.ssd)
    if is_stored:
        stack.complete_store(KEY)
    with pytest.raises(ValueError, match=rf"{KEY}.*\(5000,\) torch.float32 on cpu \(20000 bytes\); given is .*{told}"):
        stack.prepare_load(KEY, into=wrong())
    assert torch.equal(load(stack), OLD), "nothing changed"


def test_a_forwarded_load_fills_the_given_buffer_and_moves_nothing() -> None:
    log = TransferLog()
    stack = open_fake_stack([FakeTier(MIB)], log=log)
    stack.prepare_store(KEY, OLD, Medium.ssd)
    into = torch.empty_like(OLD)
    stack.prepare_load(KEY, into=into)
    found = stack.complete_load(KEY)
    assert found.data_ptr() == into.data_ptr() != OLD.data_ptr()
    assert torch.equal(into, OLD)
    stack.complete_store(KEY)
    assert [record.direction.value for record in log.records] == ["store"]
    assert log.forwarded_bytes[Medium.ssd] == OLD.nbytes
    stack.close()


@pytest.mark.parametrize("fault", ["bit_flip", "short_read", "failed_read"])
def test_a_bad_read_into_a_buffer_is_an_error(fault: str) -> None:
    tier = FakeTier(MIB)
    stack = open_fake_stack([tier])
    store(stack, OLD)
    setattr(tier.faults, fault, True)
    stack.prepare_load(KEY, into=torch.empty_like(OLD))
    with pytest.raises(TransferFailed, match=str(KEY)):
        stack.complete_load(KEY)
    assert stack.state(KEY) is BlobState.failed
    stack.close()


def test_discard_waits_for_the_load_into_a_callers_buffer() -> None:
    stack = open_fake_stack([FakeTier(MIB, Faults(delay_s=0.05))])
    store(stack, OLD)
    into = torch.empty_like(OLD)
    stack.prepare_load(KEY, into=into)
    stack.discard(KEY)
    into.fill_(-1)
    for opened in stack._tiers.values():
        opened.threads.close()
    assert bool((into == -1).all()), "a thread wrote to the buffer after discard"
    stack.close()
