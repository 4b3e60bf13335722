"""The owner's side of host memory: reserved at once, allocated by the ranks, refused in words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headrace.storage.core.errors import MachineError
from headrace.storage.integrity import Checksum
from headrace.storage.tiers import host_slab
from headrace.storage.tiers.host import HostTier
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.memory_limits import MemoryLimit, reserved_bytes
from headrace.storage.transfer import CpuCopies

MIB = 1024**2
PAGE = 4096

WRITER = """
import mmap, os, sys
path, offset, num_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_RDWR)
with mmap.mmap(fd, num_bytes, offset=offset) as view:
    assert view[:5] == b"hello", view[:5]
    view[:5] = b"world"
"""


def test_another_process_sees_the_lease() -> None:
    with HostSlab(4 * MIB, run_id="two") as slab:
        slab.lease("rank0", MIB)
        lease = slab.lease("rank1", MIB)
        with open(slab.path, "r+b") as file:
            file.seek(lease.offset_bytes)
            file.write(b"hello")
        command = [sys.executable, "-c", WRITER, lease.path, str(lease.offset_bytes), str(lease.num_bytes)]
        subprocess.run(command, check=True, timeout=600)
        found = Path(slab.path).read_bytes()
        assert found[MIB : MIB + 5] == b"world"
        assert not any(found[:MIB]), "the other lease is untouched"


def test_the_slab_is_reserved_by_its_owner_and_allocated_by_its_ranks() -> None:
    before = reserved_bytes()
    with HostSlab(32 * MIB + 5, run_id="x") as slab:
        assert os.stat(slab.path).st_size == slab.num_bytes == 32 * MIB + PAGE
        assert "headrace-slab-x" in os.readlink(slab.path)
        assert os.stat(slab.path).st_blocks == 0
        tier = HostTier(slab.lease("rank0", 16 * MIB), CpuCopies(torch.device("cpu")), Checksum.none)
        assert 512 * os.stat(slab.path).st_blocks >= 16 * MIB
        assert tier.record()["touched"]["num_threads"] == len(os.sched_getaffinity(0))
        tier.close()
        # Other processes may have slabs of their own under way: ours is at least what is missing.
        assert reserved_bytes() >= 16 * MIB
    assert before >= 0


@pytest.mark.parametrize("run_id", ["x" * 500, "läuft/" * 60, ""])
def test_any_run_has_a_slab(run_id: str) -> None:
    HostSlab(PAGE, run_id=run_id).close()


def test_too_little_memory_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = MemoryLimit(MIB, "control group limit (/x/memory.max)")
    monkeypatch.setattr(host_slab, "available_memory", lambda grows: limit)
    with pytest.raises(MachineError) as caught:
        HostSlab(1024 * MIB, run_id="x")
    for part in ("host tier: 1.00 GiB wanted", "0.00 GiB there", "/x/memory.max", "tiers.host.budget_gib"):
        assert part in str(caught.value)


def test_a_machine_whose_memory_grows_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    real = host_slab.available_memory
    little = MemoryLimit(MIB, "free memory (MemAvailable)")
    monkeypatch.setattr(host_slab, "available_memory", lambda grows: real(grows=True) if grows else little)
    with pytest.raises(MachineError, match=r"tiers\.host\.memory_grows=true"):
        HostSlab(4 * MIB, run_id="x")
    with HostSlab(4 * MIB, run_id="x", memory_grows=True) as slab:
        assert slab.num_bytes == 4 * MIB


def test_far_too_much_is_refused() -> None:
    with pytest.raises(MachineError, match=r"4294967296\.00 GiB wanted"):
        HostSlab(1 << 62, run_id="x")


def test_a_limit_on_file_sizes_is_told_in_words() -> None:
    code = (
        "import resource\n"
        "from headrace.storage.core.errors import MachineError\n"
        "from headrace.storage.tiers.host_slab import HostSlab\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n    HostSlab(4 << 20, run_id='x')\n"
        "except MachineError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert "ulimit -f" in done.stdout
