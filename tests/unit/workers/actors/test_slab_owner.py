"""Owners of slabs: even leases, and the return of what dead ranks held."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.storage.core.errors import MachineError, TierFull
from headrace.storage.core.owners import Owner, owner_of, this_process
from headrace.storage.core.records import Medium
from headrace.workers.actors.slab_owner import HostMemory, SlabOwner, SsdStorage
from headrace.workers.actors.status import Holder

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
    found = HostMemory(8 * PAGE, "test") if request.param == "host" else SsdStorage(8 * PAGE, [str(tmp_path)])
    path = Path(found.open())
    assert path.stat().st_size == 8 * PAGE
    yield found
    found.close()
    assert not path.exists()


def homes(children: list[subprocess.Popen[bytes]]) -> list[Holder]:
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
    owner = HostMemory(1 << 50, "test")
    with pytest.raises(MachineError, match="budget_gib"):
        owner.open()


def test_a_rank_that_died_before_it_is_lent_to_gets_nothing(owner: SlabOwner, children) -> None:
    held = homes(children)
    children[0].kill()
    children[0].wait()
    assert list(owner.lend(held)) == ["rank1"]
    assert owner.holders() == ["rank1"]


def test_a_lease_asked_for_twice_is_refused_and_nothing_is_lent(owner: SlabOwner) -> None:
    here = this_process()
    first = owner.lend([("rank0", here)])
    assert first["rank0"].num_bytes == 8 * PAGE
    owner._slab.release("rank0")
    owner._slab.lease("rank1", PAGE)
    with pytest.raises(RuntimeError, match="rank1 has a lease already"):
        owner.lend([(f"rank{rank}", here) for rank in (0, 2, 1, 3)])
    assert owner.holders() == ["rank1"]
    with pytest.raises(TierFull):
        owner.lend([("rank0", here), ("rank2", here)])
    assert owner.holders() == ["rank1"], "what was lent before there was no more room is taken back"
