"""A lease of the host slab, mapped by a rank; refusals in words."""

from __future__ import annotations

import dataclasses
import errno
import mmap
import os
import resource
from pathlib import Path

import pytest
import torch

from headrace.storage.core.errors import MachineError
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Medium
from headrace.storage.integrity import Checksum
from headrace.storage.tiers.host import HostTier
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.transfer import CpuCopies

MIB = 1024**2
CPU = torch.device("cpu")


def test_a_lease_of_a_closed_slab_is_refused() -> None:
    with HostSlab(MIB, run_id="x") as slab:
        lease = slab.lease("rank0", MIB)
    with pytest.raises(MachineError, match="its owner has ended"):
        HostTier(lease, CpuCopies(CPU), Checksum.none)


def test_a_lease_beyond_the_file_is_refused() -> None:
    with HostSlab(MIB, run_id="x") as slab:
        lease = dataclasses.replace(slab.lease("rank0", MIB), offset_bytes=16 * MIB)
        with pytest.raises(MachineError, match="cannot be mapped"):
            HostTier(lease, CpuCopies(CPU), Checksum.none)


def test_a_tier_outlives_the_owner() -> None:
    slab = HostSlab(MIB, run_id="x")
    tier = HostTier(slab.lease("rank0", MIB), CpuCopies(CPU), Checksum.none)
    slab.close()
    assert tier._range(0, 4096).sum() == 0
    tier.close()
    tier.close()


def test_the_pages_are_mapped_before_the_first_step() -> None:
    with HostSlab(32 * MIB, run_id="x") as slab:
        tier = HostTier(slab.lease("rank0", 32 * MIB), CpuCopies(CPU), Checksum.none)
        memory = tier._range(0, 32 * MIB)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        memory.fill_(1)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        tier.close()
    assert faults < 32 * MIB // mmap.PAGESIZE // 10


def test_pages_that_cannot_be_allocated_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, num_bytes: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("headrace.storage.tiers.touch.populate", refuse)
    with HostSlab(MIB, run_id="x") as slab:
        lease = slab.lease("rank0", MIB)
        code = errno.ENOSPC
        with pytest.raises(
            MachineError, match=r"cannot be mapped and allocated \(No space left on device\); lower tiers"
        ):
            HostTier(lease, CpuCopies(CPU), Checksum.none)
        code = errno.EINVAL  # an old kernel
        with open(lease.path, "r+b") as file:
            file.write(b"left by a rank before this one")
        tier = HostTier(lease, CpuCopies(CPU), Checksum.none)
        assert "posix_fallocate" in tier.record()["touched"]["how"]
        assert Path(lease.path).read_bytes().startswith(b"left by a rank before this one")
        tier.close()


def test_memory_is_registered_once_and_given_back(played_gpu) -> None:
    with HostSlab(2 * MIB, run_id="x") as slab:
        tier = HostTier(slab.lease("rank0", MIB), played_gpu, Checksum.xxh3_64)
        assert played_gpu.registered == [MIB]
        assert tier.record()["page_locked"]
        tier.close()
        tier.close()
        assert played_gpu.registered == []
        HostTier(slab.lease("rank1", 0), played_gpu, Checksum.xxh3_64).close()


def test_bytes_changed_by_another_process_are_found(stack, host_slab: HostSlab) -> None:
    from headrace.storage.core.errors import TransferFailed

    key = BlobKey("test", 0, "x", 0, 1, 0)
    stack.prepare_store(key, torch.arange(1000), Medium.host)
    stack.complete_store(key)
    with open(host_slab.path, "r+b") as file:
        file.seek(80)
        file.write(b"\xff")
    stack.prepare_load(key)
    with pytest.raises(TransferFailed, match=r"s0.m0.l0.x.t0-1.test in host memory: xxh3_64 checksum is"):
        stack.complete_load(key)
    stack.discard(key)


def test_what_a_copy_gets_wrong_on_its_way_in_is_found(stack, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.storage.core.errors import TransferFailed

    def damage(copies: CpuCopies, target: torch.Tensor, source: torch.Tensor, after: object) -> None:
        target.copy_(source)
        target[5] ^= 1

    monkeypatch.setattr(CpuCopies, "to_host", damage)
    key = BlobKey("test", 0, "x", 0, 1, 0)
    stack.prepare_store(key, torch.arange(1000), Medium.host)
    stack.complete_store(key)
    stack.prepare_load(key)
    with pytest.raises(TransferFailed, match="in host memory: xxh3_64 checksum is"):
        stack.complete_load(key)
    stack.discard(key)
