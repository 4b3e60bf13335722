"""The tightest of the machine's and the control groups' limits, both versions, from files."""

from __future__ import annotations

import fcntl
import os
import resource
from pathlib import Path

import pytest

from headrace.storage.tiers import host_slab
from headrace.storage.tiers.memory_limits import (
    MEMFD_NAME,
    UNBOUNDED,
    available_memory,
    locked_memory_limit,
    locked_memory_remedy,
    reserved_bytes,
)

MIB = 1024**2
GIB = 1024**3


def machine(tmp_path: Path, cgroup: str) -> tuple[Path, Path]:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    (proc / "self/cgroup").write_text(cgroup)
    return proc, groups


def group(folder: Path, limit: str, usage: int, stat: str, *, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


def test_without_groups_the_machine_decides(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/\n")
    assert available_memory(proc=proc, cgroups=groups).available_bytes == 8 * GIB


def test_memory_that_grows_is_bounded_by_control_groups_alone(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/job\n")
    asked = {"proc": proc, "cgroups": groups}
    assert available_memory(**asked, grows=True).available_bytes == UNBOUNDED
    group(groups / "job", str(100 * GIB), GIB, "", version=2)
    assert available_memory(**asked, grows=True).available_bytes == 99 * GIB
    assert available_memory(**asked).available_bytes == 8 * GIB


def test_version_2_parents_count_and_page_cache_is_given_back(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/job/step\n")
    group(groups / "job/step", "max", GIB, "", version=2)
    group(groups / "job", str(4 * GIB), 3 * GIB, f"anon 1\ninactive_file {GIB}\n", version=2)
    limit = available_memory(proc=proc, cgroups=groups)
    assert limit.available_bytes == 2 * GIB
    assert "job/memory.max" in limit.source


def test_version_1_with_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "5:cpu:/x\n4:memory:/docker/abc\n")
    group(groups / "memory", str(3 * GIB), 2 * GIB, f"total_inactive_file {GIB // 2}\n", version=1)
    limit = available_memory(proc=proc, cgroups=groups)
    assert limit.available_bytes == 3 * GIB // 2
    assert "memory.limit_in_bytes" in limit.source


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/job\n")
    group(groups / "job", str(GIB), 2 * GIB, "inactive_file 0\n", version=2)
    assert available_memory(proc=proc, cgroups=groups).available_bytes == 0


def test_this_machine_has_an_answer() -> None:
    assert available_memory().available_bytes > 0


def test_what_slabs_have_reserved_and_not_allocated_is_taken(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/\n")
    for pid in ("71", "72"):  # one slab that two processes have open counts once
        (proc / pid).symlink_to(f"/proc/{os.getpid()}")
    before = reserved_bytes(proc=proc)  # by a slab of another test that nobody has collected yet
    slab, other = os.memfd_create(f"{MEMFD_NAME}run"), os.memfd_create("headrace-other")
    try:
        os.truncate(slab, GIB)
        os.truncate(other, GIB)
        assert reserved_bytes(proc=proc) == before + GIB
        limit = available_memory(proc=proc, cgroups=groups)
        assert limit.available_bytes == 7 * GIB - before
        assert limit.source.startswith("free memory (MemAvailable), less 1.")
        assert limit.source.endswith("GiB reserved for host slabs that are not allocated yet")
        os.truncate(slab, MIB)
        os.posix_fallocate(slab, 0, MIB)
        assert reserved_bytes(proc=proc) == before
    finally:
        os.close(slab)
        os.close(other)


def test_two_owners_do_not_look_for_memory_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_slab, "SHM", tmp_path)
    with host_slab._one_at_a_time():
        fd = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    monkeypatch.setattr(host_slab, "SHM", tmp_path / "absent")
    with host_slab._one_at_a_time():
        pass


def test_the_limit_of_locked_memory_is_named_where_it_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (GIB, resource.RLIM_INFINITY))
    assert locked_memory_limit() == GIB
    assert "which is 1.000 GiB (`ulimit -l unlimited`" in locked_memory_remedy(2 * GIB)
    assert "is not the reason" in locked_memory_remedy(GIB)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert locked_memory_limit() is None
    assert "is not the reason" in locked_memory_remedy(1 << 50)
