"""The same ranks in plain processes of this machine, without Ray: for tests, and to measure the cost of Ray."""

from __future__ import annotations

import itertools
import multiprocessing.connection
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Hashable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.group import Answers, ask_all
from headrace.platform.control.placement import inline_device
from headrace.platform.control.starting import Slabs, contexts_of, holders_of, start_all
from headrace.storage.core.cleanup import after_error
from headrace.storage.core.ports import free_port
from headrace.workers.actors.slab_owner import HostMemory, SlabOwner, SsdStorage
from headrace.workers.job import TrainJob
from headrace.workers.telemetry.records import RankEvent
from headrace.workers.train.config import DeviceKind


class InlineRanks:
    """A group of child processes, each behind a socket.

    Args:
        owners: take their leases back when the group is killed.
    """

    def __init__(self, num_ranks: int, owners: Sequence[SlabOwner]) -> None:
        self._owners = owners
        self._tickets = itertools.count()
        self._children: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection[Any, Any]] = []
        self._asked: dict[Hashable, int] = {}
        self._early: dict[Hashable, Any] = {}
        self._closed: set[int] = set()
        for rank in range(num_ranks):
            ours, theirs = socket.socketpair()
            with theirs:
                words = [sys.executable, "-m", "headrace.workers.actors.pipe", str(rank), str(theirs.fileno())]
                # A session of its own: Ctrl-C is for the driver alone.
                child = subprocess.Popen(
                    words, pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL
                )
            self._children.append(child)
            self._connections.append(Connection(ours.detach()))

    @property
    def num_ranks(self) -> int:
        """Size of the group."""
        return len(self._children)

    def send(self, rank: int, method: str, *args: Any) -> Hashable:
        """See Transport."""
        ticket = next(self._tickets)
        self._asked[ticket] = rank
        try:
            self._connections[rank].send((ticket, method, args))
        except OSError:
            self._closed.add(rank)
        return ticket

    def collect(self, tickets: Iterable[Hashable], timeout_s: float) -> Answers:
        """See Transport. An exception of the method is raised here."""
        answers, waiting = Answers(), set(tickets)
        until_s = time.monotonic() + timeout_s
        while True:
            for ticket in list(waiting):
                rank = self._asked[ticket]
                if ticket in self._early:
                    value, error = self._early.pop(ticket)
                    if error is not None:
                        raise error
                    answers.values[ticket] = value
                elif rank in self._closed:
                    answers.lost[ticket] = self._cause_of_death(rank)
                else:
                    continue
                waiting.discard(ticket)
                del self._asked[ticket]
            left_s = until_s - time.monotonic()
            if not waiting or left_s < 0:
                return answers
            self._receive({self._asked[ticket] for ticket in waiting}, left_s)

    def kill(self) -> None:
        """See Transport."""
        for child in self._children:
            child.kill()
        for child, connection in zip(self._children, self._connections, strict=True):
            child.wait()
            connection.close()
        for owner in self._owners:
            owner.end(())

    def _receive(self, ranks: set[int], timeout_s: float) -> None:
        by_connection = {self._connections[rank]: rank for rank in ranks}
        for ready in multiprocessing.connection.wait(list(by_connection), timeout_s):
            rank = by_connection[ready]  # type: ignore[index]
            try:
                ticket, value, error = self._connections[rank].recv()
            except (EOFError, OSError):
                self._closed.add(rank)
            else:
                if ticket in self._asked:
                    self._early[ticket] = (value, error)

    def _cause_of_death(self, rank: int) -> str:
        try:
            code = self._children[rank].wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "its process hung up"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"


class InlineBackend:
    """Groups of child processes; the driver itself owns the slabs.

    Raises:
        MachineError: too few GPUs, too little memory or disk for the slabs.
    """

    def __init__(self, cluster: ClusterConfig, device: DeviceKind, slabs: Slabs, *, run: str) -> None:
        self._cluster, self._num_ranks = cluster, cluster.num_ranks
        self._start_timeout_s = cluster.start_timeout_s
        self._device = inline_device(device, _num_gpus(device), self._num_ranks)
        self._owners: list[SlabOwner] = []
        self.facts: dict[str, Any] = {"launcher": "inline", "num_ranks": self._num_ranks, "dashboard_url": None}
        try:
            if slabs.host_bytes:
                self._own(HostMemory(slabs.host_bytes, run, slabs.memory_grows))
            if slabs.ssd_bytes:
                self._own(SsdStorage(slabs.ssd_bytes, slabs.ssd_folders, slabs.direct))
        except BaseException as error:
            after_error(error, self.close)
            raise

    def start_group(self, job: TrainJob, attempt: int) -> InlineRanks:
        """See Backend."""
        ranks = InlineRanks(self._num_ranks, self._owners)
        try:
            homes = ask_all(ranks, "home", self._start_timeout_s)
            leases = [owner.lend(holders_of(homes)) for owner in self._owners]
            master = ("127.0.0.1", free_port())
            contexts = contexts_of(
                self._cluster, [self._num_ranks], leases, master, device=self._device, attempt=attempt
            )
            start_all(ranks, job, contexts, self._start_timeout_s)
        except BaseException as error:
            after_error(error, ranks.kill)
            raise
        return ranks

    def lost_owners(self) -> list[RankEvent]:
        """See Backend. The owners are in this process."""
        return []

    def missing_room(self) -> str | None:
        """See Backend. This machine is there."""
        return None

    def close(self) -> None:
        """See Backend."""
        for owner in self._owners:
            owner.close()

    def _own(self, owner: SlabOwner) -> None:
        owner.open()
        self._owners.append(owner)
        self.facts["slabs"] = [{"node": "127.0.0.1"} | each.record() for each in self._owners]


def _num_gpus(device: DeviceKind) -> int:
    if device is DeviceKind.cpu:
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
