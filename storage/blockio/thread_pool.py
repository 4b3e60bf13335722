"""Threads that move bytes: some look for loads first, some for stores first.

One queue would let a burst of stores delay the load that backward waits for; two separate pools would leave half of
the threads idle in forward. So each thread prefers one queue and helps out at the other.

A job is cut into parts so that several threads share one large blob. The bytes of the jobs that wait are bounded:
`submit` blocks the caller instead of letting queues, and the tensors that they hold, grow.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from enum import StrEnum

from headrace.storage.core.errors import TransferFailed

STALLED_JOIN_S = 1.0
WINDOW_BYTES = 256 * 1024**2


class Urgency(StrEnum):
    """Which queue a job waits in."""

    load = "load"
    store = "store"


class Job:
    """`num_parts` calls of `run_part(part)`, spread over threads; done when all have returned or one has failed.

    Args:
        run_part: called once per part, on any thread; after an error the parts that have not begun are skipped.
        num_bytes: what it moves; counts against the window.
        on_done: called once with the job, on the thread that ends it, before waiters wake. What it raises becomes the
            job's error.
        helpable: asked before a thread of the other preference helps out; a job that would only make it wait (for the
            GPU to compute the bytes) says no.
    """

    def __init__(
        self,
        run_part: Callable[[int], None],
        num_parts: int,
        *,
        num_bytes: int = 0,
        on_done: Callable[[Job], None] | None = None,
        helpable: Callable[[], bool] | None = None,
    ) -> None:
        self.submit_s = self.start_s = self.end_s = time.perf_counter()
        self.error: BaseException | None = None
        self._run_part: Callable[[int], None] | None = run_part
        self._on_done = on_done
        self._helpable = helpable
        self.num_parts, self.num_bytes = num_parts, num_bytes
        self._next_part = 0
        self._parts_left = num_parts
        self._lock = threading.Lock()
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> BaseException | None:
        """Block until the job has ended, or the time is up (ask `done`); returns its error."""
        self._done.wait(timeout_s)
        return self.error

    def cancel(self, why: BaseException) -> None:
        """Skip the parts that have not begun; the job ends with `why` unless it has ended already."""
        with self._lock:
            if self._parts_left and self.error is None:
                self.error = why

    def take_part(self) -> int | None:
        """The next part to run, or None when all are taken. Called under the pool's lock."""
        if self._next_part >= self.num_parts:
            return None
        if self._next_part == 0:
            self.start_s = time.perf_counter()
        self._next_part += 1
        return self._next_part - 1

    @property
    def helpable(self) -> bool:
        """Whether a thread that prefers the other queue may take a part."""
        return self._helpable is None or self._helpable()

    @property
    def exhausted(self) -> bool:
        """Whether every part is taken."""
        return self._next_part >= self.num_parts

    def run(self, part: int) -> None:
        """Run one taken part, and end the job with the last one. Never raises."""
        run_part = self._run_part
        if self.error is None and run_part is not None:
            try:
                run_part(part)
            except BaseException as error:
                self.cancel(error)
        with self._lock:
            self._parts_left -= 1
            last = self._parts_left == 0
        if last:
            self.finish()

    def finish(self) -> None:
        """End the job: call `on_done`, then wake the waiters."""
        self.end_s = time.perf_counter()
        try:
            if self._on_done is not None:
                self._on_done(self)
        except BaseException as error:
            self.error = self.error or error
        finally:
            # A job outlives its parts in the block table; the tensor that the closure holds must not.
            self._run_part = self._on_done = self._helpable = None
            self._done.set()


def _other(urgency: Urgency) -> Urgency:
    return Urgency.store if urgency is Urgency.load else Urgency.load


class _Queues:
    """What the threads of one process share. Holds no reference to the pool, so that the pool can be collected."""

    def __init__(self, window_bytes: int) -> None:
        self.pid = os.getpid()
        self.waiting: dict[Urgency, deque[Job]] = {urgency: deque() for urgency in Urgency}
        self.lock = threading.RLock()  # a pool may be collected, and shut, inside of it
        self.room = threading.Condition(self.lock)
        self.work_there = {urgency: threading.Condition(self.lock) for urgency in Urgency}
        # Sleeping threads that were not woken; threads that were woken and have not looked yet.
        self.idle = dict.fromkeys(Urgency, 0)
        self.coming = 0
        self.window_bytes = window_bytes
        self.waiting_bytes = dict.fromkeys(Urgency, 0)
        self.progress_s = time.perf_counter()
        self.closed = False
        self.threads: list[threading.Thread] = []

    def take(self, first: Urgency) -> tuple[Job, int] | None:
        """The next part for a thread that prefers `first`; blocks; None when the pool is closed and empty."""
        second = _other(first)
        with self.lock:
            while True:
                for urgency in (first, second):
                    queue = self.waiting[urgency]
                    if queue and (urgency is first or self.closed or queue[0].helpable):
                        job = queue[0]
                        part = job.take_part()
                        assert part is not None
                        if job.exhausted:
                            queue.popleft()
                            self.waiting_bytes[urgency] -= job.num_bytes
                            self.room.notify_all()
                        if queue and not self.coming:
                            self._call(urgency, 1)
                        return job, part
                if self.closed:
                    return None
                # GPU completion wakes no helper thread; threads that prefer this queue will take the job.
                self.idle[first] += 1
                self.work_there[first].wait()
                self.coming -= 1

    def is_full(self, urgency: Urgency, num_bytes: int) -> bool:
        """Whether the window has no room for so many bytes. A job larger than the window enters an empty queue."""
        queue = self.waiting[urgency]
        return bool(queue) and self.waiting_bytes[urgency] + num_bytes > self.window_bytes

    def put(self, job: Job, urgency: Urgency) -> None:
        """Queue a job and call a thread for every part. Under the lock.

        Calling all of them would cost more than the copy of a small block: they fight for the interpreter and find
        nothing.
        """
        self.waiting[urgency].append(job)
        self.waiting_bytes[urgency] += job.num_bytes
        self._call(urgency, job.num_parts)

    def _call(self, urgency: Urgency, num_threads: int) -> None:
        """Wake threads for the queue's first job: those that prefer it, then helpers."""
        left = num_threads - self._wake(urgency, num_threads)
        if left and self.waiting[urgency][0].helpable:
            self._wake(_other(urgency), left)

    def _wake(self, urgency: Urgency, most: int) -> int:
        woken = min(most, self.idle[urgency])
        self.idle[urgency] -= woken
        self.coming += woken
        self.work_there[urgency].notify(woken)
        return woken

    def work(self, first: Urgency) -> None:
        """Body of one thread."""
        while (taken := self.take(first)) is not None:
            job, part = taken
            job.run(part)
            self.progress_s = time.perf_counter()
            # The names would keep the last job, and its tensor, until the next one comes.
            del job, taken

    def shut(self, join_s: float | None = None) -> None:
        """Fail what waits, let what runs end, join the threads: for `join_s` together, where one may never end."""
        if os.getpid() != self.pid:
            return
        with self.lock:
            self.closed = True
            for queue in self.waiting.values():
                for job in queue:
                    job.cancel(TransferFailed("the tiers were closed before this transfer began"))
            for condition in self.work_there.values():
                condition.notify_all()
        until_s = None if join_s is None else time.monotonic() + join_s
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(None if until_s is None else max(0.0, until_s - time.monotonic()))


class IoThreads:
    """Threads for loads and stores, started at the first job of each process.

    A forked child has none of its parent's threads and must not wait for its jobs: the first `submit` there starts
    afresh. Closed at interpreter exit at the latest.

    Args:
        num_threads: per preference: half of the threads look for loads first, half for stores first.
        window_bytes: of the jobs of one kind that wait; `submit` blocks where one more would exceed it.
        stall_s: `submit` and `wait` give up when no thread has finished anything for so long; None waits for ever.
        name: of the threads, as debuggers show it.
    """

    def __init__(
        self, num_threads: int, *, window_bytes: int = WINDOW_BYTES, stall_s: float | None = None, name: str = "tier-io"
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}: at least one per direction")
        self.num_threads = num_threads
        self.stall_s = stall_s
        self.stalled = False
        self._window_bytes = window_bytes
        self._name = name
        self._queues: _Queues | None = None
        self._closed = False

    def submit(self, job: Job, urgency: Urgency) -> float:
        """Queue a job; returns the seconds that the caller was held back because the queue was full.

        Raises:
            RuntimeError: the pool is closed.
            TransferFailed: the queue is full and has not moved for `stall_s`.
        """
        if self._closed:
            raise RuntimeError("the I/O threads are closed")
        if job.exhausted:
            job.finish()
            return 0.0
        queues = self._started()
        begin_s = time.perf_counter()
        with queues.lock:
            while queues.is_full(urgency, job.num_bytes):
                queues.room.wait(0.0 if self.stalled else self.stall_s)
                if queues.is_full(urgency, job.num_bytes):
                    self._check_progress(queues, begin_s)
            queues.put(job, urgency)
        return time.perf_counter() - begin_s

    def wait(self, job: Job, busy: Callable[[], bool] = lambda: False) -> BaseException | None:
        """Block until the job has ended; returns its error.

        Args:
            busy: asked when no byte has moved for `stall_s`: whether the job rightly waits, for a GPU that computes its
                bytes.

        Raises:
            TransferFailed: no byte has moved for `stall_s`.
        """
        begin_s = time.perf_counter()
        while not job.done:
            job.wait(0.0 if self.stalled else self.stall_s)
            if not job.done and self._queues is not None:
                if busy():
                    begin_s = time.perf_counter()
                self._check_progress(self._queues, begin_s)
        return job.error

    def close(self) -> None:
        """Fail the jobs that wait, finish the parts that run, end the threads. May be called twice.

        A thread that sits in a system call that does not return is left behind: it ends with the process.
        """
        self._closed = True
        if self._queues is not None:
            self._queues.shut(STALLED_JOIN_S if self.stalled else None)
            self._queues = None

    def _check_progress(self, queues: _Queues, since_s: float) -> None:
        if self.stall_s is None:
            return
        still_s = time.perf_counter() - max(since_s, queues.progress_s)
        # A caller after the first error gets it at once: a pass that is dropped completes every block.
        if self.stalled or still_s >= self.stall_s:
            self.stalled = True
            raise TransferFailed(f"no byte has moved for {still_s:.0f} s: the drive does not answer")

    def _started(self) -> _Queues:
        queues = self._queues
        if queues is not None and queues.pid == os.getpid():
            return queues
        queues = self._queues = _Queues(self._window_bytes)
        for urgency in Urgency:
            for index in range(self.num_threads):
                # Daemon threads, because the interpreter joins the others before it runs the exit hook below.
                thread = threading.Thread(
                    target=queues.work, args=(urgency,), name=f"{self._name}-{urgency.value}-{index}", daemon=True
                )
                queues.threads.append(thread)
                thread.start()
        weakref.finalize(self, queues.shut)
        return queues
