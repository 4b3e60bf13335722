"""A full slab of host memory: the blocks needed last go on to the drive, and come back bit-equal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from headrace.storage.build import open_stack
from headrace.storage.config import HostTierConfig, TiersConfig
from headrace.storage.core.errors import TierFull, TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Medium
from headrace.storage.core.states import BlobState
from headrace.storage.stack import TierStack
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
EVICTING = TiersConfig(host=HostTierConfig(evict=True))


def open_tiers(host_slab: HostSlab, ssd_slab: SsdSlab, config: TiersConfig = EVICTING) -> TierStack:
    leases = [host_slab.lease("rank0", 4 * MIB), ssd_slab.lease("rank0", 8 * MIB)]
    return open_stack(leases, config, device=torch.device("cpu"), log=TransferLog())


@pytest.fixture
def stack(host_slab: HostSlab, ssd_slab: SsdSlab) -> Iterator[TierStack]:
    opened = open_tiers(host_slab, ssd_slab)
    yield opened
    opened.close()


def key_of(number: int) -> BlobKey:
    return BlobKey("test", number, "layer_input", 0, 1, 0)


def content(number: int, num_bytes: int = MIB) -> torch.Tensor:
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def store(stack: TierStack, number: int, next_use: float | None = None, num_bytes: int = MIB) -> None:
    stack.prepare_store(key_of(number), content(number, num_bytes), Medium.host, next_use=next_use)
    stack.complete_store(key_of(number))


def load(stack: TierStack, number: int, num_bytes: int = MIB) -> None:
    stack.prepare_load(key_of(number))
    assert torch.equal(stack.complete_load(key_of(number)), content(number, num_bytes)), number
    stack.discard(key_of(number))


def test_backward_order_sends_the_first_blocks_on(stack: TierStack) -> None:
    for number in range(10):
        store(stack, number, next_use=-number)
    stats = stack.stats()
    assert stats[Medium.host].used_bytes == 4 * MIB
    assert stats[Medium.ssd].used_bytes == stats[Medium.ssd].stored_bytes == 6 * MIB
    assert stack.record()["tiers"]["host"]["evicted_blobs"] == 6
    for number in reversed(range(10)):
        load(stack, number)
    # The six that backward wanted last came from the drive, the others from memory.
    assert stack.stats()[Medium.ssd].loaded_bytes == 6 * MIB
    assert stack.stats()[Medium.host].loaded_bytes == 4 * MIB
    assert stack.stats()[Medium.host].used_bytes == stack.stats()[Medium.ssd].used_bytes == 0


def test_a_block_that_is_being_loaded_stays(stack: TierStack) -> None:
    for number in range(4):
        store(stack, number, next_use=-number)
    stack.prepare_load(key_of(0))
    assert torch.equal(stack.complete_load(key_of(0)), content(0))
    stack.prepare_load(key_of(1))  # needed last but one, and pinned until it is complete
    store(stack, 4, next_use=-4)
    assert torch.equal(stack.complete_load(key_of(1)), content(1))
    for number in (4, 3, 2):
        load(stack, number)


def test_stores_in_flight_are_waited_for_and_then_evicted(stack: TierStack) -> None:
    for number in range(7):
        stack.prepare_store(key_of(number), content(number), Medium.host, next_use=-number)
    for number in range(7):
        stack.complete_store(key_of(number))
    for number in reversed(range(7)):
        load(stack, number)


def test_unequal_sizes(stack: TierStack) -> None:
    sizes = [MIB + 1, 4096, 2 * MIB, 3, 3 * MIB, MIB // 2, 4 * MIB]
    for number, num_bytes in enumerate(sizes):
        store(stack, number, next_use=-number, num_bytes=num_bytes)
    for number, num_bytes in reversed(list(enumerate(sizes))):
        load(stack, number, num_bytes)


def test_without_the_key_a_full_slab_is_an_error(host_slab: HostSlab, ssd_slab: SsdSlab) -> None:
    stack = open_tiers(host_slab, ssd_slab, TiersConfig())
    for number in range(4):
        store(stack, number)
    with pytest.raises(TierFull, match=r"host tier is full.*tiers\.host\.budget_gib"):
        store(stack, 4)
    stack.close()


def test_a_full_drive_is_an_error_and_loses_nothing(stack: TierStack) -> None:
    for number in range(12):
        store(stack, number, next_use=-number)
    with pytest.raises(TierFull, match=r"ssd tier is full.*tiers\.ssd\.budget_gib"):
        store(stack, 12, next_use=-12)
    for number in reversed(range(12)):
        load(stack, number)


def test_a_block_too_large_for_host_memory_is_an_error(stack: TierStack) -> None:
    store(stack, 0)
    with pytest.raises(TierFull, match="host tier is full"):
        store(stack, 1, num_bytes=5 * MIB)
    load(stack, 0)


def test_bytes_that_changed_in_host_memory_are_found_before_they_move(stack: TierStack, host_slab: HostSlab) -> None:
    for number in range(4):
        store(stack, number, next_use=-number)
    with open(host_slab.path, "r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(TransferFailed, match=r"s0\.m0\.l0\.layer_input.*checksum"):
        store(stack, 4, next_use=-4)
    assert stack.state(key_of(0)) is BlobState.stored
    for number in (3, 2, 1):
        load(stack, number)


def test_evicted_blobs_may_be_stored_again(stack: TierStack) -> None:
    for step in range(3):
        for number in range(6):
            key = replace_step(number, step)
            stack.prepare_store(key, content(number), Medium.host, next_use=-number)
            stack.complete_store(key)
        for number in reversed(range(6)):
            key = replace_step(number, step)
            stack.prepare_load(key)
            assert torch.equal(stack.complete_load(key), content(number))
            stack.discard(key)
    assert stack.record()["tiers"]["host"]["evicted_blobs"] == 6


def replace_step(number: int, step: int) -> BlobKey:
    return key_of(number)._replace(step=step)
