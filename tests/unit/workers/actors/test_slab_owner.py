"""Owners of slabs: even leases, and the return of what dead ranks held."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.storage.core.errors import MachineError
from headrace.storage.core.owners import Owner, owner_of, this_process
from headrace.storage.core.records import Medium
from headrace.workers.actors.slab_owner import HostMemory, SlabOwner, SsdStorage

PAGE = 4096


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    found = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    yield found
    for child in found:
        child.kill()
        child.wait()


@pytest.fixture(params=["host", "ssd"])
def owner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SlabOwner]:
    found = HostMemory(8 * PAGE, "test") if request.param == "host" else SsdStorage(8 * PAGE, str(tmp_path), "test")
    path = Path(found.open())
    assert path.stat().st_size == 8 * PAGE
    yield found
    found.close()
    assert not path.exists()


def homes(children: list[subprocess.Popen[bytes]]) -> list[tuple[str, Owner]]:
    return [(f"rank{rank}", owner_of(child.pid)) for rank, child in enumerate(children)]


def test_ranks_get_even_parts_that_do_not_overlap(owner: SlabOwner, children) -> None:
    leases = owner.lend(homes(children))
    assert [(lease.offset_bytes, lease.num_bytes) for lease in leases.values()] == [(0, 4 * PAGE), (4 * PAGE, 4 * PAGE)]
    assert {lease.medium for lease in leases.values()} <= {Medium.host, Medium.ssd}


def test_leases_of_killed_ranks_come_back_and_a_stopped_one_is_killed(owner: SlabOwner, children) -> None:
    held = homes(children)
    owner.lend(held)
    children[0].kill()
    children[0].wait()
    children[1].send_signal(signal.SIGSTOP)
    assert sorted(owner.end([process for _, process in held])) == ["rank0", "rank1"]
    assert owner.holders() == []
    assert children[1].wait() == -signal.SIGKILL


def test_a_process_that_took_over_a_dead_ranks_id_is_left_alone(owner: SlabOwner, children) -> None:
    alive = owner_of(children[0].pid)
    before = Owner(alive.host, alive.boot_id, alive.pid, alive.start_ticks - 1)
    owner.end([before])
    assert children[0].poll() is None


def test_an_empty_slab_lends_nothing() -> None:
    owner = HostMemory(0, "test")
    owner.open()
    assert owner.lend([("rank0", this_process())]) == {}
    owner.close()


def test_too_much_is_refused_when_it_is_opened() -> None:
    with pytest.raises(MachineError, match="budget_gib"):
        HostMemory(1 << 50, "test").open()


OWNER = """
import sys, time
from headrace.workers.actors.slab_owner import HostMemory, SsdStorage
owner = HostMemory(4096, "killed") if sys.argv[1] == "host" else SsdStorage(4096, sys.argv[2], "killed")
print(owner.open(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("medium", ["host", "ssd"])
def test_the_slab_of_a_killed_owner_is_gone_soon(medium: str, tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, medium, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    path = Path(owner.stdout.readline().strip())
    assert path.exists()
    owner.kill()
    owner.wait()
    until_s = time.monotonic() + 20
    while path.exists() and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not path.exists()
