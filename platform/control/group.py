"""A group of ranks, however it was started: heartbeats, reports, stop, stacks. No Ray, no torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from headrace.storage.core.errors import HeadraceError
from headrace.workers.actors.status import RankHome, RankStatus
from headrace.workers.job import NewPlan, TrainJob
from headrace.workers.telemetry.records import RankEvent


class RankLost(HeadraceError):
    """A rank's process ended without a word, or did not come up."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


@dataclass
class Answers:
    """What came back of some calls: values and ends of processes, by ticket. Calls still under way are in neither."""

    values: dict[Hashable, Any] = field(default_factory=dict)
    lost: dict[Hashable, str] = field(default_factory=dict)


class Transport(Protocol):
    """Calls to ranks that never block the caller."""

    @property
    def num_ranks(self) -> int:
        """Size of the group."""

    def send(self, rank: int, method: str, *args: Any) -> Hashable:
        """Call a method of the rank's RankShell; returns a ticket for the answer."""

    def collect(self, tickets: Iterable[Hashable], timeout_s: float) -> Answers:
        """Answers that are there; waits for all of them until the time is up."""

    def kill(self) -> None:
        """End every rank at once, and return when they are gone."""


class Backend(Protocol):
    """Starts groups, and owns what outlives them: placement, slabs."""

    facts: dict[str, Any]

    def start_group(self, job: TrainJob, attempt: int) -> Transport:
        """Start all ranks.

        Raises:
            RankLost: one did not come up; nothing of the group is left.
            MachineError: the machine or the cluster is too small.
        """

    def lost_owners(self) -> list[RankEvent]:
        """Owners of slabs that have ended since the last call: `owner_lost`. The run continues. Does not block."""

    def missing_room(self) -> str | None:
        """Why no group can be started now, for people; None where one can. Takes seconds at most."""

    def close(self) -> None:
        """Give everything back."""


def ask_all(ranks: Transport, method: str, timeout_s: float) -> list[Any]:
    """Call a method of every rank; its values by rank. Raises RankLost as `answers_of` does."""
    return answers_of(ranks, [ranks.send(rank, method) for rank in range(ranks.num_ranks)], timeout_s)


def answers_of(ranks: Transport, tickets: Sequence[Hashable], timeout_s: float) -> list[Any]:
    """Wait for one call to each rank.

    Args:
        tickets: by rank.

    Raises:
        RankLost: the process of a rank ended, or did not answer in time.
    """
    answers = ranks.collect(tickets, timeout_s)
    for rank, ticket in enumerate(tickets):
        if ticket not in answers.values:
            why = answers.lost.get(ticket, f"no answer within {timeout_s:g} s (cluster.start_timeout_s)")
            raise RankLost(rank, f"rank {rank} did not start: {why}")
    return [answers.values[ticket] for ticket in tickets]


@dataclass(frozen=True)
class Heartbeats:
    """One round: answers by rank, and ranks whose process is gone."""

    statuses: Mapping[int, RankStatus]
    lost: Mapping[int, str]


class Group:
    """Polls every rank, with one open request each: a rank that hangs does not delay the others."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._asked: dict[int, Hashable] = {}

    @property
    def num_ranks(self) -> int:
        """Size of the group."""
        return self._transport.num_ranks

    def poll(self, timeout_s: float) -> Heartbeats:
        """One round of heartbeats; waits for the slowest rank until the time is up."""
        for rank in range(self.num_ranks):
            if rank not in self._asked:
                self._asked[rank] = self._transport.send(rank, "poll")
        answers = self._transport.collect(self._asked.values(), timeout_s)
        statuses, lost = {}, {}
        for rank, ticket in list(self._asked.items()):
            if ticket in answers.values:
                statuses[rank] = answers.values[ticket]
                del self._asked[rank]
            elif ticket in answers.lost:
                lost[rank] = answers.lost[ticket]
                del self._asked[rank]
        return Heartbeats(statuses, lost)

    def homes(self, timeout_s: float) -> list[RankHome]:
        """Processes of the ranks. Raises RankLost where one has gone."""
        return ask_all(self._transport, "home", timeout_s)

    def request_stop(self) -> None:
        """Ask all ranks to save and end."""
        for rank in range(self.num_ranks):
            self._transport.send(rank, "request_stop")

    def change_plan(self, new: NewPlan) -> None:
        """Tell all ranks the plan that they change to when all of them have it."""
        for rank in range(self.num_ranks):
            self._transport.send(rank, "change_plan", new)

    def stacks(self, ranks: Iterable[int], timeout_s: float) -> dict[int, str]:
        """Stack of every thread of those of the ranks that answer in time."""
        asked = {rank: self._transport.send(rank, "stacks") for rank in ranks}
        answers = self._transport.collect(asked.values(), timeout_s)
        return {rank: answers.values[ticket] for rank, ticket in asked.items() if ticket in answers.values}

    def kill(self) -> None:
        """End every rank at once: survivors would sit in a collective until its timeout."""
        self._transport.kill()
