"""Owners of slabs: even leases, and the return of what dead ranks held."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.storage.core.errors import MachineError, TierFull
from headrace.storage.core.owners import Owner, owner_of, this_process
from headrace.storage.core.records import Medium
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.numa import NumaNode
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
    found = HostMemory(8 * PAGE, "test") if request.param == "host" else SsdStorage(8 * PAGE, [str(tmp_path)], "test")
    path = Path(found.open())
    assert path.stat().st_size == 8 * PAGE
    yield found
    found.close()
    assert not path.exists()


def homes(children: list[subprocess.Popen[bytes]]) -> list[Holder]:
    return [(f"rank{rank}", owner_of(child.pid), None) for rank, child in enumerate(children)]


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
    assert sorted(owner.end([process for _, process, _ in held])) == ["rank0", "rank1"]
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
    assert owner.lend([("rank0", this_process(), None)]) == {}
    owner.close()


def test_too_much_is_refused_when_it_is_opened() -> None:
    owner = HostMemory(1 << 50, "test")
    with pytest.raises(MachineError, match="budget_gib"):
        owner.open()
    assert owner._janitor is None, "nothing is left to watch"


def test_a_rank_that_died_before_it_is_lent_to_gets_nothing(owner: SlabOwner, children) -> None:
    held = homes(children)
    children[0].kill()
    children[0].wait()
    assert list(owner.lend(held)) == ["rank1"]
    assert owner.holders() == ["rank1"]


def test_a_lease_asked_for_twice_is_refused_and_nothing_is_lent(owner: SlabOwner) -> None:
    here = this_process()
    first = owner.lend([("rank0", here, None)])
    assert first["rank0"].num_bytes == 8 * PAGE
    owner._slab.release("rank0")
    owner._slab.lease("rank1", PAGE)
    with pytest.raises(RuntimeError, match="rank1 has a lease already"):
        owner.lend([(f"rank{rank}", here, None) for rank in (0, 2, 1, 3)])
    assert owner.holders() == ["rank1"]
    with pytest.raises(TierFull):
        owner.lend([("rank0", here, None), ("rank2", here, None)])
    assert owner.holders() == ["rank1"], "what was lent before there was no more room is taken back"


class TwoNodes(SlabOwner):
    """A host slab on two nodes, whatever machine this is."""

    def __init__(self, num_pages: int) -> None:
        nodes = [NumaNode(node, frozenset()) for node in (0, 1)]
        super().__init__(lambda: HostSlab(num_pages * PAGE, run_id="numa", nodes=nodes), [])


@pytest.mark.parametrize(
    ("nodes", "offsets"),
    [
        ([0, 1, 0, 1], [0, 12, 6, 18]),
        ([1, None], [12, 0]),
        ([None, 1, 1, None], [0, 12, 18, 6]),
        ([1, 1], [12, 0]),
        ([0, 1, 1], [0, 8, 16]),  # node 1 has no room for both, and 12 to 20 would leave none at all
        ([1, 1, 0], [8, 16, 0]),
        ([1], [0]),
    ],
)
def test_ranks_get_memory_of_their_node(nodes: list[int | None], offsets: list[int]) -> None:
    owner = TwoNodes(24)
    owner.open()
    try:
        leases = owner.lend([(f"rank{rank}", this_process(), node) for rank, node in enumerate(nodes)])
        assert [leases[f"rank{rank}"].offset_bytes // PAGE for rank in range(len(nodes))] == offsets
        assert {lease.num_bytes for lease in leases.values()} == {24 // len(nodes) * PAGE}
        record = owner.record()
        assert (record["medium"], [region["node"] for region in record["numa_regions"]]) == ("host", [0, 1])
        json.dumps(record)
    finally:
        owner.close()


OWNER = """
import sys, time
from headrace.workers.actors.slab_owner import HostMemory, SsdStorage
owner = HostMemory(4096, "killed") if sys.argv[1] == "host" else SsdStorage(4096, [sys.argv[2]], "killed")
print(owner.open(), flush=True)
time.sleep(60)
"""


SEVERAL = """
import sys, time
from pathlib import Path
from headrace.storage.tiers.sweep import create_slab_file, slab_name
from headrace.workers.actors.slab_owner import SlabOwner
folders = [Path(folder) for folder in sys.argv[1:]]
def make():
    for folder in folders:
        create_slab_file(folder / slab_name("killed"))
    print("made", flush=True)
    time.sleep(60)
SlabOwner(make, folders).open()
"""


def test_what_a_killed_owner_had_begun_in_several_folders_is_gone_soon(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    owner = subprocess.Popen([sys.executable, "-c", SEVERAL, *map(str, folders)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "made\n"
    assert all(len(list(folder.iterdir())) == 1 for folder in folders)
    owner.kill()
    owner.wait()
    until_s = time.monotonic() + 20
    while any(list(folder.iterdir()) for folder in folders) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]


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
