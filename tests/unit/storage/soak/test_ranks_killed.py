"""Three ranks that are killed at random moments and replaced: no wrong byte, nothing left behind.

The owners of the slabs live in the test's process. Each rank is a process of its own (rank.py) that leases with its
process id, and knows every byte it stores. That a process is dead is read from a descriptor of it (pidfd), not from
what the owners believe.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.owners import Owner, owner_of, this_process
from headrace.storage.core.records import Lease, Medium
from headrace.workers.actors.slab_owner import HostMemory, SlabOwner, SsdStorage

pytestmark = pytest.mark.filterwarnings("ignore:.*are on one file system:UserWarning")

KIB = 1024
RANK = Path(__file__).with_name("rank.py")
LEASE_KIB = (768, 1280)
# With two ranks of the largest lease there, the rest is in at most three holes, and one of them takes a third.
SLAB_BYTES = (2 + 3) * LEASE_KIB[1] * KIB
DEADLINE_S = 30.0


def load_rank() -> ModuleType:
    spec = importlib.util.spec_from_file_location("headrace_soak_rank", RANK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@dataclass(eq=False)
class Rank:
    """A process, and what it was lent.

    Args:
        pidfd: becomes readable when the last thread of the process is gone; None once that was seen.
        cycles: of its job; `done` of them have been reported.
        event: the last byte it wrote.
        ended: it closed its end of the pipe.
    """

    name: str
    process: subprocess.Popen[bytes]
    identity: Owner
    pidfd: int | None
    leases: list[Lease] = field(default_factory=list)
    cycles: int = 0
    done: int = 0
    event: bytes = b""
    ended: bool = False

    def is_dead(self) -> bool:
        return self.pidfd is None or bool(select.select([self.pidfd], [], [], 0)[0])

    def begin(self, seed: int, cycles: int, *, checksum: bool) -> None:
        """Send the job."""
        self.cycles = cycles
        job = {"leases": self.leases, "seed": seed, "cycles": cycles, "checksum": checksum}
        assert self.process.stdin is not None
        self.process.stdin.write(pickle.dumps(job))
        self.process.stdin.close()

    def read(self) -> None:
        """Take in the events that are there."""
        assert self.process.stdout is not None
        while not self.ended and select.select([self.process.stdout], [], [], 0)[0]:
            events = os.read(self.process.stdout.fileno(), 1 << 16)
            self.ended = not events
            self.done += events.count(b".")
            self.event = events[-1:] or self.event

    def bury(self) -> int:
        """After its end: the exit code. Events that were under way count."""
        code = self.process.wait(DEADLINE_S)
        assert self.is_dead()
        self.read()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.pidfd is not None
        self.process.stdin.close()
        self.process.stdout.close()
        os.close(self.pidfd)
        self.pidfd = None
        return code


class Node:
    """Two owners of slabs, and ranks that come and go.

    Args:
        command: of a rank.
    """

    def __init__(self, folder: Path, seed: int, command: Sequence[str] = (sys.executable, str(RANK))) -> None:
        self.random = random.Random(seed)
        self.folder, self.command = folder, list(command)
        drives = [folder / "drive0", folder / "drive1"]
        self.owners: dict[Medium, SlabOwner] = {
            Medium.host: HostMemory(SLAB_BYTES, f"soak{os.getpid()}"),
            Medium.ssd: SsdStorage(SLAB_BYTES, [str(drive) for drive in drives]),
        }
        for owner in self.owners.values():
            owner.open()
        self.files = [Path(path) for owner in self.owners.values() for path in owner._slab.paths]
        self.started: list[Rank] = []
        self.kills = {"store": 0, "load": 0, "any": 0}
        self.refused_leases = 0

    def running(self) -> list[Rank]:
        """Those not yet buried, oldest first."""
        return [rank for rank in self.started if rank.pidfd is not None]

    def spawn(self, name: str) -> Rank:
        """A process that waits for its job, and has no lease yet."""
        with (self.folder / f"errors-{len(self.started)}").open("wb") as errors:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        rank = Rank(name, process, owner_of(process.pid), os.pidfd_open(process.pid))
        self.started.append(rank)
        return rank

    def start(self, name: str, cycles: int) -> None:
        """A rank in a place where nobody was killed."""
        rank = self.spawn(name)
        self.lend(rank)
        self.begin(rank, cycles)

    def begin(self, rank: Rank, cycles: int) -> None:
        """Send the job, with contents that no other process writes."""
        rank.begin(len(self.started), cycles, checksum=self.random.random() < 0.5)

    def lend(self, rank: Rank) -> None:
        """Parts of random size of both slabs. Asks until the last holder of that name is dead."""
        for medium, owner in self.owners.items():
            num_bytes = self.random.randint(*LEASE_KIB) * KIB
            until_s = time.monotonic() + DEADLINE_S
            while not any(held.medium is medium for held in rank.leases):
                try:
                    # `lend` of an owner gives equal parts to all ranks at once; a successor comes alone.
                    lease = owner._slab.lease(rank.name, num_bytes, pid=rank.process.pid)
                except RuntimeError:
                    assert rank.name in owner.holders()
                    assert time.monotonic() < until_s, f"the lease of the dead {rank.name} did not come back"
                    self.refused_leases += 1
                    continue
                self.check_free(lease)
                rank.leases.append(lease)

    def check_free(self, lease: Lease) -> None:
        """Nobody who was ever lent a byte of this range is alive."""
        for other in self.started:
            lent = [held for held in other.leases if held.medium is lease.medium and _overlap(held, lease)]
            assert not lent or other.is_dead(), f"{lease} was lent while {other.name} lives, which holds {lent}"

    def take_back(self, medium: Medium, processes: Sequence[Owner] = ()) -> list[str]:
        """Have an owner end processes and take back the leases of the dead; only theirs may come."""
        back = self.owners[medium].end(processes)
        for name in back:
            holder = next(rank for rank in reversed(self.started) if rank.name == name and rank.leases)
            assert holder.is_dead(), f"the {medium.value} lease of {name} came back while it lives"
        return back

    def replace(self, rank: Rank, moment: str) -> bool:
        """SIGKILL, and a successor that does what was left; False where the rank ended by itself before.

        Args:
            moment: "store" or "load": stopped inside these verbs, then killed; or "any".
        """
        if moment != "any" and not self._stop_inside(rank, {"store": b"S", "load": b"L"}[moment]):
            return False
        if moment != "any":
            assert all(rank.name not in self.take_back(medium) for medium in self.owners), "a stopped rank lives"
        successor = self.spawn(rank.name)
        how = self.random.choice(("asked at once", "taken back", "ended by an owner"))
        if how == "ended by an owner":
            self.take_back(self.random.choice(list(self.owners)), [rank.identity])
        else:
            os.kill(rank.process.pid, signal.SIGKILL)
        if how == "taken back":
            self._until_back(rank)
        self.lend(successor)
        code = rank.bury()
        assert code in (0, -signal.SIGKILL), self.errors()
        self.kills[moment] += code == -signal.SIGKILL
        self.begin(successor, rank.cycles - rank.done)
        return code == -signal.SIGKILL

    def errors(self) -> str:
        """What all ranks had to say on stderr."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("errors-*")))

    def end_ranks(self) -> None:
        """Also after a failure: no process is left."""
        for rank in self.running():
            rank.process.kill()
            rank.bury()

    def close(self) -> None:
        """No file is left."""
        for owner in self.owners.values():
            owner.close()

    def _stop_inside(self, rank: Rank, wanted: bytes) -> bool:
        until_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < until_s:
            os.kill(rank.process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, rank.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            rank.read()
            if rank.ended:
                return False
            if rank.event == wanted:
                return True
            os.kill(rank.process.pid, signal.SIGCONT)
            time.sleep(self.random.uniform(0, 0.003))
        raise AssertionError(f"{rank.name} was never seen inside {wanted!r}\n{self.errors()}")

    def _until_back(self, rank: Rank) -> None:
        until_s = time.monotonic() + DEADLINE_S
        for medium, owner in self.owners.items():
            while rank.name not in self.take_back(medium):
                assert rank.name in owner.holders()
                assert time.monotonic() < until_s, f"the {medium.value} lease of the dead {rank.name} did not come back"


def _overlap(a: Lease, b: Lease) -> bool:
    return a.offset_bytes < b.offset_bytes + b.num_bytes and b.offset_bytes < a.offset_bytes + a.num_bytes


def run_and_kill(node: Node, cycles: int, kills: int) -> None:
    """Three ranks share the cycles; each killed one is replaced by one that does what it left.

    Where all have ended before the last kill was due (this process slept, they did not), one does more cycles.
    """
    kill_at = sorted(node.random.sample(range(cycles // 10, cycles * 3 // 4), kills))
    moments = [("store", "load", "any")[kill % 3] for kill in range(kills)]
    shares = [cycles // 3 + (number < cycles % 3) for number in range(3)]
    for number, share in enumerate(shares):
        node.start(f"rank{number}", share)
    while node.running():
        select.select([rank.process.stdout for rank in node.running()], [], [], 0.5)
        for rank in node.running():
            rank.read()
            if rank.ended:
                assert rank.bury() == 0, node.errors()
                assert rank.done == rank.cycles
        if kill_at and not node.running():
            node.start("rank0", shares[0])
            cycles += shares[0]
        while kill_at and node.running() and sum(rank.done for rank in node.started) >= kill_at[0]:
            moment = moments[len(kill_at) - 1]
            ranks = [rank for rank in node.running() if rank.event or moment == "any"]  # "any" may be before the first
            time.sleep(node.random.uniform(0, 0.005))
            if not ranks or not node.replace(node.random.choice(ranks), moment):
                break
            del kill_at[0]
    assert sum(rank.done for rank in node.started) == cycles
    assert not kill_at, "too few were killed"


def check_nothing_is_left(node: Node) -> None:
    """All bytes can be lent again to a single holder."""
    assert node.errors() == ""
    for owner in node.owners.values():
        owner.end([])
        assert owner.holders() == []
        lease = owner.lend([("after", this_process())])["after"]
        assert (lease.offset_bytes, lease.num_bytes) == (0, SLAB_BYTES)


@pytest.fixture
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    """Leaves no process, no file and no descriptor behind, whatever the test did."""
    gc.collect()  # what earlier tests left to the collector would go meanwhile, and hide a leak
    here = psutil.Process()
    processes, files = here.children(recursive=True), here.num_fds()
    opened = Node(tmp_path, seed=11, command=getattr(request, "param", (sys.executable, str(RANK))))
    assert all(path.exists() for path in opened.files)
    with_owners = here.num_fds()
    yield opened
    opened.end_ranks()
    more = here.num_fds() - with_owners
    opened.close()
    assert more == 0, f"{more} descriptors more than before the ranks"
    assert here.num_fds() == files
    assert here.children(recursive=True) == processes
    assert not any(path.exists() for path in opened.files)
    assert list(tmp_path.glob("drive*/*")) == []


@pytest.mark.slow
def test_ranks_killed_at_random_leave_nothing_and_read_no_wrong_byte(node: Node) -> None:
    run_and_kill(node, cycles=120, kills=3)
    check_nothing_is_left(node)
    assert node.kills == {"store": 1, "load": 1, "any": 1}


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_10_000_cycles_of_ranks_killed_at_random(node: Node) -> None:
    run_and_kill(node, cycles=10_000, kills=45)
    check_nothing_is_left(node)
    assert node.kills == {"store": 15, "load": 15, "any": 15}
    assert node.refused_leases > 0, "no successor asked before the killed one was gone"


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("medium", [Medium.host, Medium.ssd])
def test_a_rank_that_shares_its_range_finds_wrong_bytes(tmp_path: Path, medium: Medium, checksum: bool) -> None:
    """What the soak would see, had a range two users."""
    program, key = load_rank(), BlobKey("test", 0, "x", 0, 1, 0)
    owners: list[SlabOwner] = [HostMemory(SLAB_BYTES, "shared"), SsdStorage(SLAB_BYTES, [str(tmp_path)])]
    try:
        for owner in owners:
            owner.open()
        leases = [owner.lend([("rank0", this_process())])["rank0"] for owner in owners]
        first, second = (program.Work(program.Job(leases, seed, 1, checksum), lambda event: None) for seed in (1, 2))
        first.store(key, 5_000, medium)
        if key in first.open_stores:
            first.stack.complete_store(key)
            first.open_stores.clear()
        second.store(key, 1, medium)
        second.check(key)
        with pytest.raises(
            TransferFailed if checksum else AssertionError, match="checksum" if checksum else "first at"
        ):
            first.check(key)
        for work in (first, second):
            work.stack.close()
    finally:
        for owner in owners:
            owner.close()


SLEEPER = (sys.executable, "-c", "import time; time.sleep(60)")


@pytest.mark.parametrize("node", [SLEEPER], indirect=True)
def test_a_range_lent_while_its_holder_lives_is_found(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soak's own watch, with an owner that takes everybody for dead."""
    first, second = node.spawn("rank0"), node.spawn("rank0")
    node.lend(first)
    monkeypatch.setattr(Owner, "is_alive", lambda self: False)
    with pytest.raises(AssertionError, match="was lent while rank0 lives"):
        node.lend(second)
    with pytest.raises(AssertionError, match="came back while it lives"):
        node.take_back(Medium.ssd)
