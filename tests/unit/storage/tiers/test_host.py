"""One slab, several processes; refusals in words."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headrace.storage.core.errors import MachineError
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.records import Medium
from headrace.storage.integrity import Checksum
from headrace.storage.tiers import host
from headrace.storage.tiers.host import HostSlab, HostTier
from headrace.storage.tiers.memory_limits import MemoryLimit
from headrace.storage.transfer import CpuCopies

MIB = 1024**2
CPU = torch.device("cpu")

WRITER = """
import mmap, os, sys
path, offset, num_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_RDWR)
with mmap.mmap(fd, num_bytes, offset=offset) as view:
    assert view[:5] == b"hello", view[:5]
    view[:5] = b"world"
"""


def slab_bytes(slab: HostSlab) -> bytes:
    with open(slab.path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("kind", ["shm", "memfd"])
def test_another_process_sees_the_lease(kind: str, tmp_path: Path) -> None:
    shm = host.SHM if kind == "shm" else tmp_path / "absent"
    with HostSlab(4 * MIB, run_id="two", shm=shm) as slab:
        assert slab.is_memfd == (kind == "memfd")
        slab.lease("rank0", MIB)
        lease = slab.lease("rank1", MIB)
        with open(slab.path, "r+b") as file:
            file.seek(lease.offset_bytes)
            file.write(b"hello")
        command = [sys.executable, "-c", WRITER, lease.path, str(lease.offset_bytes), str(lease.num_bytes)]
        subprocess.run(command, check=True, timeout=60)
        found = slab_bytes(slab)
        assert found[MIB : MIB + 5] == b"world"
        assert not any(found[:MIB]), "the other lease is untouched"


def test_the_slab_is_resident_before_the_first_step() -> None:
    with HostSlab(3 * MIB + 5, run_id="touch") as slab:
        found = os.stat(slab.path)
        assert found.st_size == slab.num_bytes
        assert found.st_blocks * 512 >= slab.num_bytes


def test_a_small_shared_memory_file_system_gives_way_to_a_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_free_bytes", lambda folder: MIB)
    with HostSlab(2 * MIB, run_id="x") as slab:
        assert slab.is_memfd
    with HostSlab(MIB, run_id="x") as slab:
        assert not slab.is_memfd


def test_too_little_memory_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(host.SHM.iterdir())
    monkeypatch.setattr(host, "available_memory", lambda: MemoryLimit(MIB, "control group limit (/x/memory.max)"))
    with pytest.raises(MachineError) as caught:
        HostSlab(1024 * MIB, run_id="x")
    for part in ("host tier: 1.00 GiB wanted", "0.00 GiB there", "/x/memory.max", "tiers.host.budget_gib"):
        assert part in str(caught.value)
    assert set(host.SHM.iterdir()) <= before


def test_a_slab_that_cannot_be_filled_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(host.SHM.iterdir())

    def no_room(fd: int, offset: int, num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(MachineError, match="No space left on device"):
        HostSlab(MIB, run_id="x")
    assert set(host.SHM.iterdir()) <= before


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

    key = BlockKey(0, 0, "x")
    stack.prepare_store(key, torch.arange(1000), Medium.host)
    stack.complete_store(key)
    with open(host_slab.path, "r+b") as file:
        file.seek(80)
        file.write(b"\xff")
    stack.prepare_load(key)
    with pytest.raises(TransferFailed, match=r"s0.m0.l0.x.c0 in host memory: xxh3_64 checksum is"):
        stack.complete_load(key)
    stack.discard(key)
