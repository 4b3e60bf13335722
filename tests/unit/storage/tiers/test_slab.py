"""Leases: who has what, and what becomes of it when they die."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.storage.core.errors import TierFull
from headrace.storage.core.owners import this_process
from headrace.storage.core.records import Medium
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.slab import LEASE_ALIGNMENT, Slab
from headrace.storage.tiers.ssd_slab import SsdSlab

MIB = 1024**2


@pytest.fixture(params=["host", "ssd"])
def make_slab(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Slab]:
    def make(num_bytes: int) -> Slab:
        slab: Slab
        if request.param == "host":
            slab = HostSlab(num_bytes, run_id="lease")
        else:
            slab = SsdSlab(tmp_path / "tiers", num_bytes)
        request.addfinalizer(slab.close)
        return slab

    return make


def test_leases_share_the_slab_without_overlap(make_slab: Callable[[int], Slab]) -> None:
    slab = make_slab(4 * MIB)
    first, second = slab.lease("rank0", MIB), slab.lease("rank1", MIB + 1)
    assert (first.medium, first.path, first.holder) == (slab.medium, slab.path, "rank0")
    assert (first.offset_bytes, first.num_bytes) == (0, MIB)
    assert (second.offset_bytes, second.num_bytes) == (MIB, MIB + LEASE_ALIGNMENT)
    assert first.lease_id != second.lease_id
    assert slab.holders == ["rank0", "rank1"]
    assert slab.free_bytes == 2 * MIB - LEASE_ALIGNMENT


def test_too_much_names_the_key(make_slab: Callable[[int], Slab]) -> None:
    slab = make_slab(MIB)
    slab.lease("rank0", MIB)
    with pytest.raises(
        TierFull, match=rf"rank1 needs 4096 bytes, 0 of {MIB} .* raise tiers\.{slab.medium.value}\.budget_gib"
    ):
        slab.lease("rank1", 4096)
    with pytest.raises(RuntimeError, match="rank0 has a lease already"):
        slab.lease("rank0", 4096)


def test_release_gives_the_range_to_the_next(make_slab: Callable[[int], Slab]) -> None:
    slab = make_slab(MIB)
    slab.lease("rank0", MIB)
    assert slab.release("rank0")
    assert not slab.release("rank0")
    assert slab.lease("rank1", MIB).offset_bytes == 0


def test_an_empty_slab_gives_empty_leases(make_slab: Callable[[int], Slab]) -> None:
    slab = make_slab(0)
    assert slab.lease("rank0", 0).num_bytes == 0
    with pytest.raises(TierFull):
        slab.lease("rank1", 1)


def test_the_lease_of_a_killed_process_comes_back(make_slab: Callable[[int], Slab]) -> None:
    slab = make_slab(MIB)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        slab.lease("rank0", MIB, pid=child.pid)
        assert slab.reclaim() == []
        with pytest.raises(TierFull):
            slab.lease("rank1", MIB)
        child.kill()
        child.wait()
        assert slab.lease("rank1", MIB).offset_bytes == 0, "a lease looks for the dead first"
        assert slab.holders == ["rank1"]
    finally:
        child.kill()
        child.wait()
    with pytest.raises(ProcessLookupError):
        slab.lease("rank2", 0, pid=child.pid)
    assert "rank2" not in slab.holders


def test_a_dead_ranks_range_comes_back_and_its_neighbours_bytes_stay(make_slab: Callable[[int], Slab]) -> None:
    slab = make_slab(3 * MIB)
    children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    try:
        leases = [slab.lease(f"rank{i}", MIB, pid=child.pid) for i, child in enumerate(children)]
        with open(slab.path, "r+b") as file:
            file.seek(leases[1].offset_bytes)
            file.write(b"\x07" * MIB)
        children[1].send_signal(signal.SIGSTOP)
        children[0].kill()
        children[0].wait()
        again = slab.lease("rank2", MIB)
        assert slab.holders == ["rank1", "rank2"], "a stopped process holds what it has"
        assert again.offset_bytes == leases[0].offset_bytes
        with open(slab.path, "r+b") as file:
            file.seek(again.offset_bytes)
            file.write(b"\xff" * again.num_bytes)
            file.seek(leases[1].offset_bytes)
            assert file.read(MIB) == b"\x07" * MIB
        with pytest.raises(TierFull):
            slab.lease("rank3", 2 * MIB)
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_another_process_under_the_same_id_is_not_taken_for_the_holder(make_slab: Callable[[int], Slab]) -> None:
    slab = make_slab(MIB)
    here = this_process()
    before = dataclasses.replace(here, start_ticks=here.start_ticks - 1)
    with pytest.raises(ProcessLookupError, match=f"process {here.pid} of rank0 does not run"):
        slab.lease("rank0", MIB, process=before)
    assert slab.holders == []
    slab.lease("rank0", MIB, process=here)
    slab._processes["rank0"] = before  # as if the holder had died and its id had come round
    assert slab.reclaim() == ["rank0"]


def test_close_lets_go_of_the_file_and_may_be_called_twice(make_slab: Callable[[int], Slab]) -> None:
    with make_slab(MIB) as slab:
        assert os.stat(slab.path).st_nlink == 0, "no name: the kernel frees it with the last process that has it open"
    assert not Path(slab.path).exists()
    slab.close()


OWNER = """
import sys, time
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
kept = [HostSlab(32 << 20, run_id="killed"), SsdSlab(sys.argv[1], 32 << 20)]
print(*(slab.path for slab in kept), flush=True)
time.sleep(60)
"""


def test_the_slabs_of_a_killed_owner_go_with_the_last_who_uses_them(mount_tmpfs: Callable[[str], Path]) -> None:
    """On a file system of their own, so that the blocks that come back can be counted."""
    folder = mount_tmpfs("size=64m")
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner:
        paths = owner.stdout.readline().split()
        assert list(folder.iterdir()) == []
        held = [os.open(path, os.O_RDWR) for path in paths]
        owner.kill()
        owner.wait()
    assert os.statvfs(folder).f_bfree * 4096 <= 32 * MIB
    for fd in held:
        assert os.pwrite(fd, b"x", 0) == 1, "who has it open goes on"
        os.close(fd)
    space = os.statvfs(folder)
    assert space.f_bfree == space.f_blocks


def test_media() -> None:
    with HostSlab(0, run_id="m") as slab:
        assert slab.medium is Medium.host
        assert slab.holders == []
