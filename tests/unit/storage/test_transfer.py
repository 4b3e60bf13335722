"""The staging ring on CPU; on a GPU also streams, fences and page locks."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from headrace.helpers.tiers import has_id
from headrace.platform.doctor.rates import pinned_buffer
from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.errors import ErrorId, MachineError
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Medium
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer import CpuCopies, CudaCopies, StagingRing, open_copies
from headrace.storage.transfer_log import TransferLog

CPU = torch.device("cpu")
MIB = 1024**2


def test_buffers_are_page_aligned_apart_and_returned() -> None:
    ring = StagingRing(2, 8192, CpuCopies(CPU))
    with ring.borrow() as first, ring.borrow() as second:
        assert {first.data_ptr() % 4096, second.data_ptr() % 4096} == {0}
        assert abs(first.data_ptr() - second.data_ptr()) == 8192
        taken = threading.Event()

        def third() -> None:
            with ring.borrow():
                taken.set()

        thread = threading.Thread(target=third)
        thread.start()
        assert not taken.wait(0.05), "the ring does not grow"
    assert taken.wait(600)
    thread.join()
    ring.close()


def test_a_buffer_comes_back_after_an_error() -> None:
    ring = StagingRing(1, 4096, CpuCopies(CPU))
    with pytest.raises(ZeroDivisionError), ring.borrow():
        raise ZeroDivisionError
    with ring.borrow() as buffer:
        assert buffer.numel() == 4096


def test_devices() -> None:
    assert isinstance(open_copies(CPU), CpuCopies)
    with pytest.raises(ValueError, match="meta"):
        open_copies(torch.device("meta"))


class RefusingRuntime:
    """CUDA that refuses every page lock and, as the real one, lets the next launch report that."""

    error = 0

    def cudaHostRegister(self, *_: int) -> int:
        self.error = 2
        return 2

    def launch(self, *_: object, **__: object) -> torch.Tensor:
        error, self.error = self.error, 0
        if error:
            raise RuntimeError(f"CUDA error: {error}")
        return torch.empty(1)


def test_a_refused_page_lock_is_not_reported_by_a_later_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, copies = RefusingRuntime(), object.__new__(CudaCopies)
    copies.device = torch.device("cuda", 0)
    memory = torch.empty(4096, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", runtime.launch)
    with pytest.raises(MachineError, check=has_id(ErrorId.machine_lacks)):
        copies.register(memory, "host")
    runtime.launch()
    with pytest.raises(RuntimeError, match="cudaHostRegister"), pinned_buffer(4096):
        pass
    runtime.launch()


@pytest.mark.gpu
def test_cuda_round_trip_over_both_tiers(host_slab: HostSlab, ssd_slab: SsdSlab) -> None:
    device = torch.device("cuda", 0)
    leases = [host_slab.lease("rank0", 4 * MIB), ssd_slab.lease("rank0", 12 * MIB)]
    log = TransferLog()
    stack = open_stack(leases, TiersConfig(), device=device, log=log)
    for step in range(3):
        tensors = {}
        for layer, medium in enumerate((Medium.host, Medium.ssd)):
            key = BlobKey("test", layer, "x", 0, 1, step)
            tensors[key] = torch.randn(300_001, device=device).bfloat16()
            stack.prepare_store(key, tensors[key], medium)
        for key in tensors:
            stack.complete_store(key)
        for key, tensor in tensors.items():
            stack.prepare_load(key)
            assert torch.equal(stack.complete_load(key), tensor)
            stack.discard(key)
    torch.cuda.synchronize()
    stack.stats()
    assert len(log.records) == 12
    assert stack.record()["tiers"]["host"]["page_locked"]
    assert stack.record()["ssd_engine"]["got"] in ("ring", "gds")
    stack.close()


@pytest.mark.gpu
def test_cuda_copies_wait_for_kernels_and_the_host_does_not(host_slab: HostSlab) -> None:
    device = torch.device("cuda", 0)
    stack = open_stack([host_slab.lease("rank0", 4 * MIB)], TiersConfig(), device=device, log=TransferLog())
    source = torch.zeros(500_000, device=device)
    torch.cuda.synchronize()
    begin_s = time.perf_counter()
    torch.cuda._sleep(400_000_000)
    source.add_(1)
    key = BlobKey("test", 0, "x", 0, 1, 0)
    stack.prepare_store(key, source, Medium.host)
    stack.complete_store(key)
    source.zero_()
    host_s = time.perf_counter() - begin_s
    stack.prepare_load(key)
    assert torch.equal(stack.complete_load(key), torch.ones(500_000, device=device))
    torch.cuda.synchronize()
    assert host_s < 0.5 * (time.perf_counter() - begin_s)
    stack.close()


@pytest.mark.gpu
def test_cuda_registration_is_undone() -> None:
    copies = CudaCopies(torch.device("cuda", 0))
    memory = StagingRing(2, MIB, copies)
    memory.close()
    again = StagingRing(2, MIB, copies)
    again.close()
