"""An event-driven simulation of streams and shared links. No torch.

Each rank has streams, and a stream does one task at a time: of those whose needs are met, the one that was added
first. Tasks on one shared link (the host memory of a node, its drives) divide its rate in equal parts; what a task
cannot take, because its own link is slower, the others get.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Stream(StrEnum):
    """What a rank can do at the same time."""

    compute = "compute"
    h2d = "h2d"
    d2h = "d2h"
    ssd_read = "ssd read"
    ssd_write = "ssd write"
    node_network = "network in the node"
    network = "network"


class What(StrEnum):
    """Kinds of tasks, for pictures."""

    forward = "forward"
    head = "head"
    backward = "backward"
    weight_grad = "weight gradients"
    vocabulary = "vocabulary"
    store = "store"
    load = "load"
    tensor = "tensor parallel"
    context = "context parallel"
    weights = "weights and gradients"
    pipeline = "pipeline"


@dataclass(frozen=True)
class Event:
    """A task that was done. Seconds from the start of the step.

    Args:
        role: number of the rank that stands for all ranks with the same work.
        label: block, chunk or micro-batch, for people.
    """

    role: int
    stream: Stream
    what: What
    label: str
    start_s: float
    end_s: float


@dataclass
class _Task:
    role: int
    stream: Stream
    what: What
    label: str
    amount: float
    rate: float
    link: str | None
    num_missing: int = 0
    followers: list[int] = field(default_factory=list)
    start_s: float = 0.0
    end_s: float | None = None
    left: float = 0.0
    speed: float = 0.0
    since_s: float = 0.0
    version: int = 0


class Simulation:
    """Tasks are added first, then run once.

    Args:
        links: rates of shared links, in the unit of the amounts per second.
    """

    def __init__(self, links: Mapping[str, float] | None = None) -> None:
        self._links = dict(links or {})
        self._tasks: list[_Task] = []
        self._active: dict[str, list[int]] = {name: [] for name in self._links}
        self._ready: dict[tuple[int, Stream], list[int]] = {}
        self._busy: set[tuple[int, Stream]] = set()
        self._heap: list[tuple[float, int, int]] = []

    def add(
        self,
        role: int,
        stream: Stream,
        what: What,
        amount: float,
        *,
        rate: float = 1.0,
        link: str | None = None,
        needs: Iterable[int | None] = (),
        label: str = "",
    ) -> int:
        """Add a task; returns its number, for the needs of later tasks.

        Args:
            amount: bytes; or seconds, with rate 1.
            rate: most per second that the task can take.
            link: shared link that it is on.
            needs: tasks that must be over before; None counts for nothing.
        """
        number = len(self._tasks)
        task = _Task(role, stream, what, label, amount, rate, link if link in self._links else None)
        for need in {need for need in needs if need is not None}:
            self._tasks[need].followers.append(number)
            task.num_missing += 1
        self._tasks.append(task)
        return number

    def run(self) -> list[Event]:
        """What every task did, in the order in which they were added; tasks without work are left out."""
        for number, task in enumerate(self._tasks):
            if not task.num_missing:
                self._offer(number, 0.0)
        while self._heap:
            now_s, number, version = heapq.heappop(self._heap)
            task = self._tasks[number]
            if task.version == version and task.end_s is None:
                self._finish(number, now_s)
        return [
            Event(task.role, task.stream, task.what, task.label, task.start_s, task.end_s)
            for task in self._tasks
            if task.amount > 0 and task.end_s is not None
        ]

    def end_s(self, number: int) -> float:
        """When a task was over."""
        end_s = self._tasks[number].end_s
        assert end_s is not None, "run first"
        return end_s

    def _offer(self, number: int, now_s: float) -> None:
        task = self._tasks[number]
        lane = task.role, task.stream
        if task.amount <= 0:  # takes no turn on a stream
            task.start_s = now_s
            self._finish(number, now_s)
            return
        heapq.heappush(self._ready.setdefault(lane, []), number)
        if lane not in self._busy:
            self._begin(lane, now_s)

    def _begin(self, lane: tuple[int, Stream], now_s: float) -> None:
        number = heapq.heappop(self._ready[lane])
        task = self._tasks[number]
        self._busy.add(lane)
        task.start_s = task.since_s = now_s
        task.left = task.amount
        if task.link is None:
            self._run_at(number, task.rate, now_s)
        else:
            self._active[task.link].append(number)
            self._share(task.link, now_s)

    def _finish(self, number: int, now_s: float) -> None:
        task = self._tasks[number]
        task.end_s = now_s
        if task.amount > 0:
            if task.link is not None:
                self._active[task.link].remove(number)
                self._share(task.link, now_s)
            lane = task.role, task.stream
            self._busy.discard(lane)
        for follower in task.followers:
            self._tasks[follower].num_missing -= 1
            if not self._tasks[follower].num_missing:
                self._offer(follower, now_s)
        if task.amount > 0 and self._ready.get(lane) and lane not in self._busy:
            self._begin(lane, now_s)

    def _share(self, link: str, now_s: float) -> None:
        """Divide the link's rate among its tasks, the slowest of them first."""
        left = self._links[link]
        waiting = sorted(self._active[link], key=lambda number: self._tasks[number].rate)
        for place, number in enumerate(waiting):
            speed = min(self._tasks[number].rate, left / (len(waiting) - place))
            left -= speed
            self._run_at(number, speed, now_s)

    def _run_at(self, number: int, speed: float, now_s: float) -> None:
        task = self._tasks[number]
        if task.speed == speed:
            return
        task.left = max(0.0, task.left - task.speed * (now_s - task.since_s))
        task.since_s, task.speed, task.version = now_s, speed, task.version + 1
        heapq.heappush(self._heap, (now_s + task.left / speed, number, task.version))
