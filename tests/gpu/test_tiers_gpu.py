"""The tiers on CUDA: page locks of leases, streams that race, copies beside compute, allocations, changes in place."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from headrace.storage.build import open_stack
from headrace.storage.config import SsdEngine, SsdTierConfig, TiersConfig
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Lease, LookupResult, Medium
from headrace.storage.stack import TierStack
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer import CudaCopies
from headrace.storage.transfer_log import TransferLog

pytestmark = pytest.mark.gpu

MIB = 1024**2
SLAB_BYTES = 64 * MIB
ODD_SIZES = (1, 7, 4095, 4096, 4097, MIB + 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 13_000_003)
# A rank that maps and page-locks its lease, says so, and is killed.
HOLDER = """
import json, sys, time, torch
from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.records import Lease, Medium
from headrace.storage.transfer_log import TransferLog
facts = json.loads(sys.stdin.readline())
lease = Lease(**{**facts, "medium": Medium.host, "more_paths": tuple(facts["more_paths"])})
stack = open_stack([lease], TiersConfig(), device=torch.device("cuda", 0), log=TransferLog())
print("locked" if stack.record()["tiers"]["host"]["page_locked"] else "not locked", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes about slab files go to the test's folder, not to the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def host_slab() -> Iterator[HostSlab]:
    with HostSlab(SLAB_BYTES, run_id="gpu") as slab:
        yield slab


@pytest.fixture
def open_tiers(host_slab: HostSlab, tmp_path: Path, device: torch.device) -> Iterator[Callable[[SsdEngine], TierStack]]:
    """Opens a stack over 32 MiB of host memory and 64 MiB of drive; closed after the test."""
    stacks: list[TierStack] = []
    with SsdSlab(tmp_path / "tiers", SLAB_BYTES) as ssd_slab:

        def opened(engine: SsdEngine) -> TierStack:
            leases = [host_slab.lease("rank0", SLAB_BYTES // 2), ssd_slab.lease("rank0", SLAB_BYTES)]
            config = TiersConfig(ssd=SsdTierConfig(engine=engine, required=engine is not SsdEngine.auto))
            stacks.append(open_stack(leases, config, device=device, log=TransferLog()))
            return stacks[-1]

        yield opened
        for stack in stacks:
            stack.close()


def mapped(lease: Lease) -> torch.Tensor:
    """The lease's range of host memory as a tensor, (num_bytes,) uint8."""
    fd = os.open(lease.path, os.O_RDWR)
    try:
        memory = mmap.mmap(fd, lease.num_bytes, offset=lease.offset_bytes)
    finally:
        os.close(fd)
    return torch.frombuffer(memory, dtype=torch.uint8)


def random_bytes(num_bytes: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device, generator=generator)


def test_a_leased_range_is_page_locked_copied_both_ways_and_let_go(host_slab: HostSlab, device: torch.device) -> None:
    host_slab.lease("rank0", MIB)
    lease = host_slab.lease("rank1", 8 * MIB)
    assert lease.offset_bytes > 0, "a range inside of the slab, not its start"
    memory, copies = mapped(lease), CudaCopies(device)
    assert not memory.is_pinned()
    copies.register(memory, "host")
    assert memory.is_pinned()
    sent, back = random_bytes(lease.num_bytes, device), torch.zeros(lease.num_bytes, dtype=torch.uint8, device=device)
    out = copies.to_host(memory, sent, [copies.fence()])
    copies.wait(out)
    assert torch.equal(memory, sent.cpu())
    copies.wait(copies.to_device(back, memory, [copies.fence(), out]))
    assert torch.equal(back, sent)
    copies.unregister(memory)
    assert not memory.is_pinned()

    assert host_slab.release("rank1")
    again = host_slab.lease("rank2", 8 * MIB)
    assert (again.offset_bytes, again.num_bytes) == (lease.offset_bytes, lease.num_bytes)
    copies.register(memory, "host")  # the same pages, by their next holder
    copies.unregister(memory)


def test_the_page_locked_lease_of_a_killed_process_comes_back(host_slab: HostSlab, device: torch.device) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        lease = host_slab.lease("rank0", SLAB_BYTES, pid=child.pid)
        child.stdin.write(json.dumps({**asdict(lease), "medium": lease.medium.value}) + "\n")
        assert child.stdout.readline().strip() == "locked"
        assert host_slab.reclaim() == []
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    finally:
        child.kill()
        child.wait(30)
    assert host_slab.reclaim() == ["rank0"]
    stack = open_stack([host_slab.lease("rank1", SLAB_BYTES)], TiersConfig(), device=device, log=TransferLog())
    assert stack.record()["tiers"]["host"]["page_locked"]
    stack.close()


@pytest.mark.parametrize(
    ("medium", "engine"),
    [
        pytest.param(Medium.host, SsdEngine.ring, id="host"),
        pytest.param(Medium.ssd, SsdEngine.ring, id="ring"),
        pytest.param(Medium.ssd, SsdEngine.gds, id="gds", marks=pytest.mark.gds),
    ],
)
def test_odd_sizes_keep_their_bits_while_the_compute_stream_races(
    medium: Medium, engine: SsdEngine, open_tiers: Callable[[SsdEngine], TierStack], device: torch.device
) -> None:
    """The bytes are computed late, and overwritten as soon as complete_store has returned."""
    stack = open_tiers(engine)
    assert stack.record()["ssd_engine"]["got"] == engine.value
    for number, num_bytes in enumerate(ODD_SIZES):
        expected = random_bytes(num_bytes, device, seed=number)
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        torch.cuda._sleep(20_000_000)
        source.copy_(expected)
        key = BlobKey("test", number, "odd", 0, 1, 0)
        stack.prepare_store(key, source, medium)
        stack.complete_store(key)
        source.fill_(171)
        stack.prepare_load(key)
        torch.cuda._sleep(20_000_000)
        loaded = stack.complete_load(key)
        assert torch.equal(loaded, expected), f"{num_bytes} bytes"
        assert bool((source == 171).all())
        stack.discard(key)
        del loaded


def test_stores_in_flight_do_not_delay_the_compute_stream(device: torch.device) -> None:
    """Serial copies would add their whole time: at least a third of the products' here."""
    num_bytes, num_blocks = 256 * MIB, 4
    # A discarded block's slot is free a moment after its copy: twice the room, so that the next step need not wait.
    room_bytes = 2 * num_bytes * num_blocks
    with HostSlab(room_bytes, run_id="gpu") as slab:
        lease = slab.lease("rank0", room_bytes)
        stack = open_stack([lease], TiersConfig(checksum=False), device=device, log=TransferLog())
        sources = [random_bytes(num_bytes, device, seed=index) for index in range(num_blocks)]
        a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)

        def products_ms(step: int | None) -> float:
            torch.cuda.synchronize(device)
            for index, source in enumerate(sources if step is not None else []):
                stack.prepare_store(BlobKey("test", index, "x", 0, 1, step or 0), source, Medium.host)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(20):
                torch.mm(a, b, out=out)
            end.record()
            end.synchronize()
            for index in range(num_blocks if step is not None else 0):
                stack.complete_store(BlobKey("test", index, "x", 0, 1, step or 0))
                stack.discard(BlobKey("test", index, "x", 0, 1, step or 0))
            return begin.elapsed_time(end)

        def copies_ms() -> float:
            torch.cuda.synchronize(device)
            begin_s = time.perf_counter()
            for index, source in enumerate(sources):
                stack.prepare_store(BlobKey("test", index, "x", 0, 1, 99), source, Medium.host)
            for index in range(num_blocks):
                stack.complete_store(BlobKey("test", index, "x", 0, 1, 99))
            torch.cuda.synchronize(device)
            return 1e3 * (time.perf_counter() - begin_s)

        products_ms(None)
        products_ms(0)
        alone = min(products_ms(None) for _ in range(3))
        beside = min(products_ms(step) for step in range(1, 4))
        serial = alone + copies_ms()
        stack.close()
    assert serial > 1.3 * alone, f"copies of {serial - alone:.1f} ms beside products of {alone:.1f} ms tell nothing"
    assert beside < alone + 0.3 * (serial - alone), f"{alone:.2f} ms alone, {beside:.2f} beside, {serial:.2f} in series"


def test_the_probe_of_gpudirect_storage_is_on_record(
    open_tiers: Callable[[SsdEngine], TierStack], record_property: Callable[[str, object], None]
) -> None:
    found = open_tiers(SsdEngine.auto).record()["ssd_engine"]
    record_property("ssd_engine", json.dumps(found))
    print(found)
    assert found["wanted"] == "auto"
    if found["got"] == "gds":
        assert "counters of nvidia-fs" in found["why"]
    else:
        assert found["got"] == "ring"
        assert "GPUDirect Storage does not work here: " in found["why"]


@pytest.mark.gds
def test_with_the_driver_gpudirect_storage_is_real(open_tiers: Callable[[SsdEngine], TierStack]) -> None:
    assert open_tiers(SsdEngine.gds).record()["ssd_engine"]["got"] == "gds"


def test_steps_after_the_first_ones_allocate_nothing_on_the_device(
    open_tiers: Callable[[SsdEngine], TierStack], device: torch.device
) -> None:
    stack = open_tiers(SsdEngine.ring)

    def step(number: int) -> None:
        keys = []
        for layer in range(4):
            source = torch.full((2 * MIB + 3,), (number + layer) % 251, dtype=torch.uint8, device=device)
            key = BlobKey("test", layer, "x", 0, 1, number)
            stack.prepare_store(key, source, Medium.host if layer % 2 else Medium.ssd)
            keys.append(key)
        for key in keys:
            stack.complete_store(key)
        for layer, key in reversed(list(enumerate(keys))):
            stack.prepare_load(key)
            assert bool((stack.complete_load(key) == (number + layer) % 251).all())
            stack.discard(key)

    for number in range(3):
        step(number)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_stats(device)["num_device_alloc"]
    for number in range(3, 23):
        step(number)
    torch.cuda.synchronize(device)
    assert torch.cuda.memory_stats(device)["num_device_alloc"] == before


@pytest.mark.parametrize("medium", [Medium.host, Medium.ssd])
def test_a_change_in_place_on_the_way_out_is_an_error(
    medium: Medium, open_tiers: Callable[[SsdEngine], TierStack], device: torch.device
) -> None:
    stack = open_tiers(SsdEngine.ring)
    source, key = random_bytes(3 * MIB, device), BlobKey("test", 0, "x", 0, 1, 0)
    stack.prepare_store(key, source, medium)
    source.add_(1)
    with pytest.raises(TransferFailed, match="changed in place"):
        stack.complete_store(key)
    assert stack.lookup(key) is LookupResult.miss
    with pytest.raises(TransferFailed):
        stack.prepare_load(key)
    stack.discard(key)
