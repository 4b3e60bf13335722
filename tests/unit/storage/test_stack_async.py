"""The order of the GPU path, played by threads: who waits for whom, and who does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from headrace.helpers.tiers import FakeFile, Faults
from headrace.storage.blockio.thread_pool import IoThreads
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Direction, LookupResult, Medium
from headrace.storage.core.states import Verb
from headrace.storage.integrity import Checksum
from headrace.storage.stack import TierStack
from headrace.storage.tiers.host import HostTier
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd import SsdTier
from headrace.storage.transfer import StagingRing
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
KEY = BlobKey("test", 0, "x", 0, 1, 0)
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def make_stack(played_gpu: Any, host_slab: HostSlab) -> Iterator[Callable[..., TierStack]]:
    opened: list[TierStack] = []

    def make(log: TransferLog | None = None, faults: Faults | None = None, *, evict: bool = False) -> TierStack:
        host = HostTier(host_slab.lease(f"rank{len(opened)}", MIB), played_gpu, Checksum.xxh3_64)
        ring = StagingRing(4, 16384, played_gpu)
        ssd = SsdTier(FakeFile(MIB, faults or Faults()), 0, MIB, ring, played_gpu, Checksum.xxh3_64)
        threads = {tier.medium: IoThreads(2) for tier in (host, ssd)}
        stack = TierStack([host, ssd], copies=played_gpu, threads=threads, log=log or TransferLog(), evict=evict)
        opened.append(stack)
        return stack

    yield make
    for stack in opened:
        stack.close()


def compute(gpu: Any, tensor: torch.Tensor, value: float, *, wait_for: threading.Event | None = None) -> None:
    """A kernel that fills the tensor, as late as its stream gets to it; the version counter does not see it."""
    view = tensor.numpy()

    def kernel() -> None:
        assert wait_for is None or wait_for.wait(600)
        np.copyto(view, value)

    gpu.compute.launch(kernel)


def result(gpu: Any, tensor: torch.Tensor) -> torch.Tensor:
    gpu.compute.synchronize()
    return tensor


@pytest.mark.parametrize("medium", [Medium.host, Medium.ssd])
def test_a_store_waits_for_the_kernel_that_computes_its_source(
    make_stack: Any, played_gpu: Any, medium: Medium
) -> None:
    stack, source, go = make_stack(), torch.zeros(9000), threading.Event()
    compute(played_gpu, source, 7.0, wait_for=go)
    stack.prepare_store(KEY, source, medium)
    time.sleep(0.05)
    assert stack.lookup(KEY) is LookupResult.pending
    go.set()
    stack.complete_store(KEY)
    stack.prepare_load(KEY)
    assert torch.equal(result(played_gpu, stack.complete_load(KEY)), torch.full((9000,), 7.0))


def test_the_host_does_not_wait_for_a_copy_to_host_memory(make_stack: Any, played_gpu: Any) -> None:
    stack, source, go = make_stack(), torch.zeros(9000), threading.Event()
    compute(played_gpu, source, 7.0, wait_for=go)
    stack.prepare_store(KEY, source, Medium.host)
    stack.complete_store(KEY)  # the kernel has not even begun
    assert stack.lookup(KEY) is LookupResult.pending
    compute(played_gpu, source, 9.0)  # the memory is used again at once: stream order protects the copy
    stack.prepare_load(KEY)
    go.set()
    assert torch.equal(result(played_gpu, stack.complete_load(KEY)), torch.full((9000,), 7.0))
    assert torch.equal(source, torch.full((9000,), 9.0))


def test_a_slot_is_not_written_while_it_is_read(make_stack: Any, played_gpu: Any) -> None:
    stack = make_stack()
    played_gpu.copy_s = 0.02
    for value in range(1, 6):
        source = torch.full((200_000,), float(value))
        stack.prepare_store(KEY, source, Medium.host)
        stack.complete_store(KEY)
        stack.prepare_load(KEY)
        target = stack.complete_load(KEY)
        stack.discard(KEY)  # the copy back may still run; the next store takes the same slot
        compute(played_gpu, source, -1.0)
        assert torch.equal(result(played_gpu, target), torch.full((200_000,), float(value)))


@pytest.mark.parametrize("medium", [Medium.host, Medium.ssd])
def test_discard_in_flight_keeps_the_tensors_until_the_copies_are_over(
    make_stack: Any, played_gpu: Any, medium: Medium
) -> None:
    stack = make_stack()
    played_gpu.copy_s = 0.02
    source = torch.ones(9000)
    stack.prepare_store(KEY, source, medium)
    stack.discard(KEY)
    stack.prepare_store(KEY, source, medium)
    stack.complete_store(KEY)
    stack.prepare_load(KEY)
    stack.discard(KEY)
    played_gpu.compute.synchronize()
    for opened in stack._tiers.values():
        opened.threads.close()
    assert stack.stats()[medium].used_bytes == 0


def test_the_log_tells_when_the_copies_ran(make_stack: Any, played_gpu: Any) -> None:
    log = TransferLog()
    stack, source, go = make_stack(log), torch.ones(9000), threading.Event()
    compute(played_gpu, source, 1.0, wait_for=go)
    stack.prepare_store(KEY, source, Medium.host)
    time.sleep(0.05)
    let_go_s = time.perf_counter()
    go.set()
    stack.complete_store(KEY)
    stack.prepare_load(KEY)
    stack.complete_load(KEY)
    played_gpu.compute.synchronize()
    stack.stats()
    assert [r.direction for r in log.records] == [Direction.store, Direction.load]
    store, load = log.records
    assert store.submit_s < let_go_s <= store.start_s <= store.end_s <= load.start_s <= load.end_s


def test_loads_still_on_their_way_are_logged_at_close(make_stack: Any, played_gpu: Any) -> None:
    log = TransferLog()
    stack = make_stack(log)
    stack.prepare_store(KEY, torch.ones(100), Medium.host)
    stack.complete_store(KEY)
    played_gpu.copy_s = 0.1
    stack.prepare_load(KEY)
    stack.complete_load(KEY)
    stack.close()
    assert log.moved_bytes[Medium.host, Direction.load] == 400


def test_damage_in_host_memory_is_found_by_the_load(make_stack: Any, host_slab: HostSlab, played_gpu: Any) -> None:
    stack = make_stack()
    stack.prepare_store(KEY, torch.ones(100), Medium.host)
    stack.complete_store(KEY)
    while stack.lookup(KEY) is LookupResult.pending:
        time.sleep(0.001)
    with open(host_slab.path, "r+b") as file:
        file.write(b"\x55")
    stack.prepare_load(KEY)
    with pytest.raises(TransferFailed, match="the bytes changed in the tier"):
        stack.complete_load(KEY)


def test_a_failed_write_behind_the_ring_reaches_the_caller(make_stack: Any) -> None:
    stack = make_stack(None, Faults(failed_write=True))
    stack.prepare_store(KEY, torch.ones(100), Medium.ssd)
    with pytest.raises(TransferFailed, match="Input/output error"):
        stack.complete_store(KEY)


def test_loads_do_not_queue_behind_stores_that_wait_for_kernels(make_stack: Any, played_gpu: Any) -> None:
    stack, go = make_stack(), threading.Event()
    stack.prepare_store(KEY, torch.ones(100), Medium.ssd)
    stack.complete_store(KEY)
    late = [torch.zeros(40_000) for _ in range(3)]
    for number, source in enumerate(late):
        compute(played_gpu, source, 1.0, wait_for=go)
        stack.prepare_store(BlobKey("test", 1 + number, "x", 0, 1, 0), source, Medium.ssd)
    stack._copies.fence = lambda: None  # the target's memory is free already, whatever the compute stream does
    stack.prepare_load(KEY)
    giving_up = threading.Timer(60, go.set)
    giving_up.start()
    assert torch.equal(stack.complete_load(KEY), torch.ones(100))
    assert not go.is_set(), "the load waited for the kernels"
    giving_up.cancel()
    go.set()
    for number in range(3):
        stack.complete_store(BlobKey("test", 1 + number, "x", 0, 1, 0))


def test_an_evicted_slot_is_not_written_before_the_copy_out_of_it_is_over(
    make_stack: Callable[..., TierStack], played_gpu: Any
) -> None:
    stack = make_stack(evict=True)
    first, second = (torch.full((MIB,), value, dtype=torch.uint8) for value in (1, 2))
    other = BlobKey("test", 1, "x", 0, 1, 0)
    stack.prepare_store(KEY, first, Medium.host)
    stack.complete_store(KEY)
    while stack.lookup(KEY) is not LookupResult.hit:
        time.sleep(0.001)
    played_gpu.inward.launch(lambda: time.sleep(0.3))  # the copy back waits in its stream
    stack.prepare_load(KEY)
    load = stack._table.row(KEY, Verb.complete_load).load
    assert load is not None
    load.job.wait()
    stack.prepare_store(other, second, Medium.host)
    stack.complete_store(other)
    assert stack.record()["tiers"]["host"]["evicted_blobs"] == 1
    target = stack.complete_load(KEY)
    played_gpu.compute.synchronize()
    assert torch.equal(target, first)
