"""Every fault ends in the named error, through the same stack as the real tiers; none ends in zeros."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from headrace.helpers.tiers import FakeTier, Faults, open_fake_stack
from headrace.storage.core.errors import TierFull, TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import LookupResult, Medium
from headrace.storage.integrity import Checksum
from headrace.storage.stack import TierStack
from headrace.storage.tier import Blob

MIB = 1024**2
KEY, NEXT = BlobKey("test", 5, "layer_input", 0, 1, 2), BlobKey("test", 6, "layer_input", 0, 1, 2)


@pytest.fixture
def tier() -> FakeTier:
    return FakeTier(MIB)


@pytest.fixture
def stack(tier: FakeTier) -> Iterator[TierStack]:
    opened = open_fake_stack([tier])
    yield opened
    opened.close()


def store(stack: TierStack, key: BlobKey = KEY) -> torch.Tensor:
    tensor = torch.randn(50_000)
    stack.prepare_store(key, tensor, Medium.ssd)
    stack.complete_store(key)
    return tensor


def load(stack: TierStack, key: BlobKey = KEY) -> torch.Tensor:
    stack.prepare_load(key)
    return stack.complete_load(key)


@pytest.mark.parametrize(
    ("fault", "reason"), [("full", "No space left on device"), ("failed_write", "Input/output error")]
)
def test_a_store_that_fails(stack: TierStack, tier: FakeTier, fault: str, reason: str) -> None:
    setattr(tier.faults, fault, True)
    with pytest.raises(TransferFailed, match=rf"{KEY}: write of /fake/slab at offset \d+ failed: {reason}"):
        store(stack)
    assert stack.lookup(KEY) is LookupResult.miss
    with pytest.raises(TransferFailed, match=reason):
        stack.prepare_load(KEY)
    stack.discard(KEY)
    setattr(tier.faults, fault, False)
    assert torch.equal(store(stack, NEXT), load(stack, NEXT)), "the stack goes on"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("failed_read", r"read of /fake/slab at offset \d+ failed: Input/output error"),
        ("short_read", r"read of /fake/slab at offset \d+ failed: the file ends after"),
        ("bit_flip", r"xxh3_64 checksum is [0-9a-f]{16} where [0-9a-f]{16} was stored"),
    ],
)
def test_a_load_that_fails(stack: TierStack, tier: FakeTier, fault: str, reason: str) -> None:
    store(stack)
    setattr(tier.faults, fault, True)
    with pytest.raises(TransferFailed, match=f"{KEY}.*{reason}"):
        load(stack)
    assert stack.lookup(KEY) is LookupResult.miss
    setattr(tier.faults, fault, False)
    with pytest.raises(TransferFailed):
        stack.prepare_load(KEY)
    stack.discard(KEY)
    assert stack.stats()[Medium.ssd].used_bytes == 0
    tensor = store(stack, NEXT)
    assert torch.equal(load(stack, NEXT), tensor)


def test_an_error_that_passes_is_tried_again(stack: TierStack, tier: FakeTier) -> None:
    tier.faults.eio_calls = 2
    tensor = store(stack)
    tier.faults.eio_calls = 2
    assert torch.equal(load(stack), tensor)
    assert tier.file.num_retries == 4
    assert stack.record()["tiers"]["ssd"]["retries"] == 4
    tier.faults.eio_calls = 1000
    with pytest.raises(TransferFailed, match="Input/output error in each of 3 tries"):
        store(stack, NEXT)


def test_a_torn_write_is_found_at_the_load(stack: TierStack, tier: FakeTier) -> None:
    tier.faults.torn_write = True
    store(stack)
    with pytest.raises(TransferFailed, match=r"xxh3_64 checksum is .* the bytes changed in the tier"):
        load(stack)


def test_a_call_that_hangs_goes_on_when_it_is_let(stack: TierStack, tier: FakeTier) -> None:
    tier.faults.hang = threading.Event()
    tensor = torch.randn(50_000)
    stack.prepare_store(KEY, tensor, Medium.ssd)
    time.sleep(0.05)
    assert stack.lookup(KEY) is LookupResult.pending
    assert tier.file.num_calls == 0
    tier.faults.hang.set()
    stack.complete_store(KEY)
    assert torch.equal(load(stack), tensor)


def test_a_drive_that_does_not_answer_is_a_named_error() -> None:
    hang = threading.Event()
    stack = open_fake_stack([FakeTier(MIB, Faults(hang=hang))], stall_s=0.2)
    try:
        with pytest.raises(TransferFailed, match=rf"{KEY}: ssd tier: no byte has moved for .* does not answer"):
            store(stack)
        stack.close()  # does not wait for it
    finally:
        hang.set()


def test_without_checksums_a_flipped_bit_passes() -> None:
    """The negative of the test above: it is the checksum that finds it."""
    stack = open_fake_stack([FakeTier(MIB, Faults(bit_flip=True), checksum=Checksum.none)])
    assert not torch.equal(store(stack), load(stack))
    stack.close()


@pytest.mark.parametrize("faults", [Faults(bytes_per_call=5000), Faults(busy_calls=5), Faults(delay_s=0.01)])
def test_slow_is_not_wrong(faults: Faults) -> None:
    tier = FakeTier(MIB, faults)
    stack = open_fake_stack([tier])
    assert torch.equal(store(stack), load(stack))
    assert tier.file.num_calls >= 2 * tier.num_parts(Blob("s0", 0, 200_000))
    stack.close()


def test_a_full_table_is_tier_full() -> None:
    stack = open_fake_stack([FakeTier(100_000)])
    with pytest.raises(TierFull, match=r"ssd tier is full: .* needs 200000 bytes, 98304 of"):
        store(stack)
    stack.close()


def test_two_media(stack: TierStack) -> None:
    both = open_fake_stack([FakeTier(MIB, medium=Medium.host), FakeTier(MIB)])
    for medium in (Medium.host, Medium.ssd):
        both.prepare_store(KEY, torch.ones(3), medium)
        both.complete_store(KEY)
        assert torch.equal(load(both), torch.ones(3))
        both.discard(KEY)
    both.close()


def test_a_worker_that_breaks_is_a_transfer_that_failed(
    stack: TierStack, tier: FakeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ValueError("not an I/O error at all")

    monkeypatch.setattr(tier, "store_part", broken)
    with pytest.raises(TransferFailed, match=f"{KEY}: ValueError: not an I/O error at all") as caught:
        store(stack)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_slot_ends_in_zeros_and_not_in_another_blobs_bytes(stack: TierStack, tier: FakeTier) -> None:
    stack.prepare_store(KEY, torch.full((8192,), 255, dtype=torch.uint8), Medium.ssd)
    stack.complete_store(KEY)
    stack.prepare_store(NEXT, torch.full((100,), 7, dtype=torch.uint8), Medium.ssd)
    stack.complete_store(NEXT)
    assert bytes(tier.file._content[8192 : 8192 + 4096]) == bytes([7] * 100) + bytes(3996)
