"""Who goes first, who waits, and how it ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.storage.blockio import thread_pool
from headrace.storage.blockio.thread_pool import IoThreads, Job, Urgency
from headrace.storage.core.errors import TransferFailed


@pytest.fixture
def pool() -> Iterator[IoThreads]:
    threads = IoThreads(1, window_bytes=400)
    yield threads
    threads.close()


class Gate:
    """A part that says when it runs and holds its thread until opened."""

    def __init__(self) -> None:
        self.running, self.open = threading.Event(), threading.Event()

    def __call__(self, part: int) -> None:
        self.running.set()
        assert self.open.wait(600)


@pytest.fixture
def new_threads() -> Callable[[], list[threading.Thread]]:
    """Threads of pools that this test has started; other tests' may still end."""
    before = set(threading.enumerate())
    return lambda: [t for t in threading.enumerate() if t not in before and t.name.startswith("tier-io")]


def wait_until(there: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 600
    while not there():
        assert time.monotonic() < until_s
        time.sleep(1e-3)


def hold_both(pool: IoThreads) -> list[Gate]:
    gates = [Gate(), Gate()]
    for gate, urgency in zip(gates, Urgency, strict=True):
        pool.submit(Job(gate, 1, helpable=lambda: False), urgency)
        assert gate.running.wait(600)
    return gates


def test_every_part_runs_once_and_in_several_threads(pool: IoThreads) -> None:
    parts: list[int] = []
    names = set()
    both = threading.Barrier(2, timeout=600)

    def run(part: int) -> None:
        parts.append(part)
        names.add(threading.current_thread().name)
        if part < 2:
            both.wait()

    job = Job(run, 50)
    pool.submit(job, Urgency.store)
    assert job.wait() is None
    assert sorted(parts) == list(range(50))
    assert len(names) == 2, "the thread that prefers loads helped"
    assert job.submit_s <= job.start_s <= job.end_s


def test_a_job_without_parts_is_done_at_once(pool: IoThreads) -> None:
    seen: list[Job] = []
    job = Job(lambda part: None, 0, on_done=seen.append)
    pool.submit(job, Urgency.load)
    assert job.done
    assert seen == [job]


def test_each_thread_looks_at_its_own_queue_first(pool: IoThreads) -> None:
    gates = hold_both(pool)
    order: list[str] = []
    jobs = []
    for name, urgency in (("s1", Urgency.store), ("s2", Urgency.store), ("l1", Urgency.load), ("l2", Urgency.load)):
        jobs.append(Job(lambda part, name=name: order.append(name), 1))
        pool.submit(jobs[-1], urgency)
    # Only the load-first thread is let go: it takes the loads before the stores, though the stores came first.
    gates[0].open.set()
    for job in jobs:
        job.wait()
    assert order == ["l1", "l2", "s1", "s2"]
    gates[1].open.set()


def test_nobody_helps_a_job_that_would_only_wait(pool: IoThreads) -> None:
    gate = Gate()
    pool.submit(Job(gate, 1, helpable=lambda: False), Urgency.store)
    assert gate.running.wait(600)
    ready = threading.Event()
    ran: list[str] = []
    store = Job(lambda part: ran.append(threading.current_thread().name), 1, helpable=ready.is_set)
    pool.submit(store, Urgency.store)
    load = Job(lambda part: None, 1)
    pool.submit(load, Urgency.load)
    load.wait()
    time.sleep(0.05)
    assert not ran, "the thread that prefers loads stays free for loads"
    gate.open.set()
    store.wait()
    assert "store" in ran[0]


def test_a_job_that_becomes_ready_later_gets_help(pool: IoThreads) -> None:
    ready = threading.Event()
    both = threading.Barrier(2, timeout=600)

    def run(part: int) -> None:
        if part == 0:
            ready.set()
        else:
            both.wait()  # needs the thread that sleeps

    job = Job(run, 3, helpable=ready.is_set)
    pool.submit(job, Urgency.store)
    assert job.wait(600) is None
    assert job.done


def test_a_job_calls_as_many_threads_as_it_has_parts() -> None:
    pool = IoThreads(3)
    pool.submit(Job(lambda part: None, 6), Urgency.store)
    queues = pool._queues
    assert queues is not None
    asleep = dict.fromkeys(Urgency, 3)
    wait_until(lambda: queues.idle == asleep)
    gates = [Gate(), Gate()]
    jobs = [Job(gate, 1) for gate in gates]
    for num_called, (job, gate) in enumerate(zip(jobs, gates, strict=True), start=1):
        pool.submit(job, Urgency.store)
        assert gate.running.wait(600)
        assert queues.idle == {Urgency.store: 3 - num_called, Urgency.load: 3}
    for gate in gates:
        gate.open.set()
    wait_until(lambda: queues.idle == asleep)
    assert queues.coming == 0
    pool.close()


@pytest.fixture
def opened_late(monkeypatch: pytest.MonkeyPatch) -> Callable[[IoThreads, Gate], None]:
    """Opens a gate a second after a caller has found the queue full, by a clock that stands still otherwise."""
    now_s = [0.0]
    times = SimpleNamespace(perf_counter=lambda: now_s[0], monotonic=time.monotonic)
    monkeypatch.setattr(thread_pool, "time", times)

    def late(pool: IoThreads, gate: Gate) -> None:
        queues, full = pool._queues, threading.Event()
        assert queues is not None
        is_full = queues.is_full

        def seen(*args: Any) -> bool:
            if found := is_full(*args):
                full.set()
            return found

        def open_gate() -> None:
            assert full.wait(600)
            now_s[0] += 1.0
            gate.open.set()

        monkeypatch.setattr(queues, "is_full", seen)
        threading.Thread(target=open_gate).start()

    return late


def test_submit_holds_the_caller_back_when_the_queue_is_full(
    opened_late: Callable[[IoThreads, Gate], None], pool: IoThreads
) -> None:
    gates = hold_both(pool)
    for _ in range(4):
        assert pool.submit(Job(lambda part: None, 1, num_bytes=100), Urgency.store) == 0.0
    opened_late(pool, gates[1])
    last = Job(lambda part: None, 1, num_bytes=1)
    assert pool.submit(last, Urgency.store) == 1.0
    gates[0].open.set()
    last.wait()


def test_the_window_counts_bytes_and_not_jobs(opened_late: Callable[[IoThreads, Gate], None], pool: IoThreads) -> None:
    gates = hold_both(pool)
    large = Job(lambda part: None, 1, num_bytes=1000)
    assert pool.submit(large, Urgency.store) == 0.0, "a job larger than the window enters an empty queue"
    for _ in range(400):
        assert pool.submit(Job(lambda part: None, 1, num_bytes=1), Urgency.load) == 0.0
    opened_late(pool, gates[1])
    last = Job(lambda part: None, 1, num_bytes=1)
    assert pool.submit(last, Urgency.store) == 1.0
    gates[0].open.set()
    assert last.wait() is None
    queues = pool._queues
    assert queues is not None
    wait_until(lambda: not any(queues.waiting_bytes.values()))


def test_the_first_error_ends_the_job_and_skips_the_rest(pool: IoThreads) -> None:
    ran: list[int] = []

    def run(part: int) -> None:
        ran.append(part)
        raise TransferFailed(f"part {part}")

    ended: list[BaseException | None] = []
    job = Job(run, 100, on_done=lambda done: ended.append(done.error))
    pool.submit(job, Urgency.store)
    assert isinstance(job.wait(), TransferFailed)
    assert len(ran) <= 2, "at most one part per thread had begun"
    assert ended == [job.error]
    after = Job(lambda part: None, 1)
    pool.submit(after, Urgency.store)
    assert after.wait() is None, "the threads live on"


def test_an_error_of_on_done_is_not_lost(pool: IoThreads) -> None:
    def fail(job: Job) -> None:
        raise RuntimeError("accounts do not add up")

    job = Job(lambda part: None, 1, on_done=fail)
    pool.submit(job, Urgency.store)
    assert "accounts" in str(job.wait())


def test_a_finished_job_holds_nothing(pool: IoThreads) -> None:
    class Payload:
        pass

    payload = Payload()
    alive = threading.Event()
    job = Job(lambda part, held=payload: None, 3)
    weakref.finalize(payload, alive.set)
    del payload
    pool.submit(job, Urgency.store)
    job.wait()
    for _ in range(6000):
        gc.collect()
        if alive.is_set():
            break
        time.sleep(0.01)
    assert alive.is_set()


def test_close_fails_what_waits_and_ends_the_threads(
    new_threads: Callable[[], list[threading.Thread]], pool: IoThreads
) -> None:
    gates = hold_both(pool)
    waiting = Job(lambda part: None, 5)
    pool.submit(waiting, Urgency.store)

    def open_once_it_has_failed() -> None:
        wait_until(lambda: waiting.error is not None)
        for gate in gates:
            gate.open.set()

    threading.Thread(target=open_once_it_has_failed).start()
    pool.close()
    assert isinstance(waiting.wait(), TransferFailed)
    assert not new_threads()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(Job(lambda part: None, 1), Urgency.load)


def test_a_collected_pool_ends_its_threads(new_threads: Callable[[], list[threading.Thread]]) -> None:
    threads = IoThreads(2)
    job = Job(lambda part: None, 1)
    threads.submit(job, Urgency.load)
    job.wait()
    assert len(new_threads()) == 4
    del threads
    gc.collect()
    assert not new_threads()


def test_no_thread_before_the_first_job(new_threads: Callable[[], list[threading.Thread]]) -> None:
    threads = IoThreads(2)
    assert not new_threads()
    threads.close()


def test_a_forked_child_gets_threads_of_its_own(pool: IoThreads) -> None:
    job = Job(lambda part: None, 1)
    pool.submit(job, Urgency.store)
    job.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        mine = Job(lambda part: None, 4)
        pool.submit(mine, Urgency.store)
        mine._done.wait(600)
        ok = mine.done
        pool.close()
        os._exit(0 if ok else 1)
    for _ in range(1400):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_interpreter_ends_with_jobs_in_flight() -> None:
    code = (
        "import time\n"
        "from headrace.storage.blockio.thread_pool import IoThreads, Job, Urgency\n"
        "pool = IoThreads(1)\n"
        "for _ in range(8): pool.submit(Job(lambda part: time.sleep(0.05), 1), Urgency.store)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_at_least_one_thread() -> None:
    with pytest.raises(ValueError, match="num_threads is 0"):
        IoThreads(0)
