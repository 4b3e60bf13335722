"""The tightest of the machine's and the control groups' limits, both versions, from files."""

from __future__ import annotations

import fcntl
import os
import resource
from pathlib import Path

import pytest

from headrace.storage.core.owners import this_process
from headrace.storage.tiers.memory_limits import UNBOUNDED, available_memory, locked_memory_limit, locked_memory_remedy
from headrace.storage.tiers.sweep import promising, slab_name

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
    assert available_memory(proc=proc, cgroups=groups, shm=proc / "shm").available_bytes == 8 * GIB


def test_memory_that_grows_is_bounded_by_control_groups_alone(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/job\n")
    asked = {"proc": proc, "cgroups": groups, "shm": proc / "shm"}
    assert available_memory(**asked, grows=True).available_bytes == UNBOUNDED
    group(groups / "job", str(100 * GIB), GIB, "", version=2)
    assert available_memory(**asked, grows=True).available_bytes == 99 * GIB
    assert available_memory(**asked).available_bytes == 8 * GIB


def test_version_2_parents_count_and_page_cache_is_given_back(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/job/step\n")
    group(groups / "job/step", "max", GIB, "", version=2)
    group(groups / "job", str(4 * GIB), 3 * GIB, f"anon 1\ninactive_file {GIB}\n", version=2)
    limit = available_memory(proc=proc, cgroups=groups, shm=proc / "shm")
    assert limit.available_bytes == 2 * GIB
    assert "job/memory.max" in limit.source


def test_version_1_with_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "5:cpu:/x\n4:memory:/docker/abc\n")
    group(groups / "memory", str(3 * GIB), 2 * GIB, f"total_inactive_file {GIB // 2}\n", version=1)
    limit = available_memory(proc=proc, cgroups=groups, shm=proc / "shm")
    assert limit.available_bytes == 3 * GIB // 2
    assert "memory.limit_in_bytes" in limit.source


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/job\n")
    group(groups / "job", str(GIB), 2 * GIB, "inactive_file 0\n", version=2)
    assert available_memory(proc=proc, cgroups=groups, shm=proc / "shm").available_bytes == 0


def test_this_machine_has_an_answer() -> None:
    assert available_memory().available_bytes > 0


def test_what_living_slabs_have_promised_is_taken(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/\n")
    shm = tmp_path / "shm"
    shm.mkdir()
    own = slab_name("own")
    names = {"living": own, "dead": own.replace(this_process().tag, "999999999-1"), "foreign": f"{own}.txt"}
    for size_gib, name in enumerate(names.values(), start=1):
        (shm / name).touch()
        os.truncate(shm / name, size_gib * GIB)
    limit = available_memory(proc=proc, cgroups=groups, shm=shm)
    assert limit.available_bytes == 7 * GIB, "the dead promise nothing, and other files are not slabs"
    assert limit.source.startswith("free memory (MemAvailable), less 1.00 GiB promised")
    os.truncate(shm / own, 9 * GIB)
    assert available_memory(proc=proc, cgroups=groups, shm=shm).available_bytes == 0


def test_two_owners_do_not_promise_at_once(tmp_path: Path) -> None:
    with promising(tmp_path):
        fd = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    with promising(tmp_path / "absent"):
        pass


def test_the_limit_of_locked_memory_is_named_where_it_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (GIB, resource.RLIM_INFINITY))
    assert locked_memory_limit() == GIB
    assert "which is 1.000 GiB (`ulimit -l unlimited`" in locked_memory_remedy(2 * GIB)
    assert "is not the reason" in locked_memory_remedy(GIB)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert locked_memory_limit() is None
    assert "is not the reason" in locked_memory_remedy(1 << 50)
