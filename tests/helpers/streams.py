"""A GPU that is played on one thread by a scheduler which looks for trouble: the order of streams, without CUDA.

Kernels and copies are queued on streams and run late, in an order that a seed decides: some streams crawl. The host
makes the device get on only where it waits. What a copy should have waited for and did not is then seen as wrong bytes.

    gpu = AdversarialGpu(seed)
    stack = open_adversarial_stack(gpu, host_lease, num_bytes)
    with gpu.stream("b"):
        gpu.fill(source, 1.0)  # a kernel; runs when the scheduler likes
        stack.prepare_store(key, source, Medium.host)
    ...
    gpu.run_dry()
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from headrace.helpers.tiers import FakeFile, Faults
from headrace.storage.blockio.thread_pool import Job, Urgency
from headrace.storage.core.records import Lease, Medium
from headrace.storage.integrity import Checksum
from headrace.storage.stack import TierStack
from headrace.storage.tiers.host import HostTier
from headrace.storage.tiers.ssd import SsdTier
from headrace.storage.transfer import DeviceCopies, Fence, StagingRing
from headrace.storage.transfer_log import TransferLog

POISON = 0xA5
OUT, IN = "outward copies", "inward copies"
# How much slower than the others a stream may be.
CRAWL = 0.01


class PlayedEvent:
    """An event of a played stream."""

    def __init__(self, gpu: AdversarialGpu) -> None:
        self._gpu = gpu
        self.fired = False

    def fire(self) -> None:
        """The stream has come here."""
        self.fired = True

    def query(self) -> bool:
        """Whether it has fired."""
        return self.fired

    def synchronize(self) -> None:
        """Let the device get on until it has."""
        self._gpu.run_until(lambda: self.fired)


class AdversarialGpu(DeviceCopies):
    """DeviceCopies whose device is CPU memory.

    Args:
        seed: decides the schedule.
    """

    asynchronous = True

    def __init__(self, seed: int) -> None:
        super().__init__(torch.device("cpu"))
        self.random = random.Random(seed)
        self._streams: dict[str, deque[tuple[Callable[[], object] | None, PlayedEvent | None]]] = {}
        self._speed: dict[str, float] = {}
        self._current = "a"

    @property
    def current(self) -> str:
        """The caller's stream."""
        return self._current

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """Make a stream the caller's current one."""
        before, self._current = self._current, name
        try:
            yield
        finally:
            self._current = before

    def launch(self, kernel: Callable[[], object], *, on: str | None = None) -> None:
        """Queue a kernel on a stream, the current one where none is named."""
        self._queue(on or self._current).append((kernel, None))

    def fill(self, tensor: torch.Tensor, value: float) -> None:
        """Queue a kernel that fills a tensor; its version counter does not see it."""
        self.launch(functools.partial(tensor.numpy().fill, value))

    def record(self, *, on: str | None = None) -> Fence:
        """An event on a stream."""
        event: Any = PlayedEvent(self)
        self._queue(on or self._current).append((event.fire, None))
        return Fence(event, event)

    def step(self) -> bool:
        """Run the next entry of one stream that can go on; False where none can."""
        ready = [name for name, queue in self._streams.items() if queue and (not queue[0][1] or queue[0][1].fired)]
        if not ready:
            return False
        if self.random.random() < 0.05:  # who crawls changes
            self._speed = {name: self.random.choice((1.0, CRAWL)) for name in self._speed}
        (name,) = self.random.choices(ready, [self._speed[it] for it in ready])
        work, _ = self._streams[name].popleft()
        if work is not None:
            work()
        return True

    def run_until(self, over: Callable[[], bool]) -> None:
        """Run the device until something is over."""
        while not over():
            assert self.step(), "the streams wait for each other"

    def run_dry(self) -> None:
        """Run all that is queued."""
        while self.step():
            pass
        assert not any(self._streams.values()), "the streams wait for each other"

    def target(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Memory that a kernel of the current stream still writes to: its last user."""
        target = torch.empty(shape, dtype=dtype)
        self.fill(target.view(-1).view(torch.uint8), POISON)
        return target

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See DeviceCopies. A kernel like any other."""
        self.launch(functools.partial(np.copyto, target.numpy(), source.numpy()))

    def fence(self) -> Fence:
        """See DeviceCopies."""
        return self.record()

    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        """See DeviceCopies."""
        return self._copy(OUT, target, source, after)

    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        """See DeviceCopies."""
        return self._copy(IN, target, source, after)

    def wait(self, fence: Fence | None) -> tuple[float, float] | None:
        """See DeviceCopies. The played clock stands still."""
        if fence is not None:
            fence.end.synchronize()
        return None

    def order_caller_after(self, fence: Fence | None) -> None:
        """See DeviceCopies."""
        self._wait_on(self._current, fence)

    def stalled_s(self) -> float:
        """0: the clock stands still."""
        return 0.0

    def register(self, memory: torch.Tensor, tier: str) -> None:
        """Nothing to do."""

    def unregister(self, memory: torch.Tensor) -> None:
        """Let the copies end."""
        self.run_dry()

    def _queue(self, name: str) -> deque[tuple[Callable[[], object] | None, PlayedEvent | None]]:
        if name not in self._streams:
            self._streams[name], self._speed[name] = deque(), self.random.choice((1.0, CRAWL))
        return self._streams[name]

    def _wait_on(self, name: str, fence: Fence | None) -> None:
        if fence is not None:
            self._queue(name).append((None, fence.end))  # type: ignore[arg-type]

    def _copy(self, name: str, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        for earlier in after:
            self._wait_on(name, earlier)
        self.launch(functools.partial(np.copyto, target.numpy(), source.numpy()), on=name)
        return self.record(on=name)


class PlayedThreads:
    """Replaces IoThreads: parts run on the caller's thread, in a wait or when the scheduler chooses."""

    stalled = False

    def __init__(self, gpu: AdversarialGpu) -> None:
        self._gpu = gpu
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job, urgency: Urgency) -> float:
        """Queue a job; sometimes a part runs at once."""
        if job.exhausted:
            job.finish()
        else:
            self._jobs.append(job)
        while self._jobs and self._gpu.random.random() < 0.3:
            self._run_part()
        return 0.0

    def wait(self, job: Job, busy: Callable[[], bool] = lambda: False) -> BaseException | None:
        """Run parts until the job is done."""
        while not job.done:
            self._run_part()
        return job.error

    def get_on(self) -> None:
        """Run a part, as real threads do at any time."""
        if self._jobs:
            self._run_part()

    def close(self) -> None:
        """Run what is queued."""
        while self._jobs:
            self._run_part()

    def _run_part(self) -> None:
        part = self._jobs[0].take_part()
        job = self._jobs.popleft() if self._jobs[0].exhausted else self._jobs[0]
        assert part is not None
        job.run(part)


def open_adversarial_stack(
    gpu: AdversarialGpu, host: Lease, ssd_bytes: int, *, part_bytes: int = 4096, evict: bool = True
) -> TierStack:
    """A real TierStack with the real host tier and ring over a played GPU; the drive is memory. Small staging ring.

    Args:
        host: the lease of the host tier.
        ssd_bytes: capacity of the drive.
        part_bytes: of a staging buffer.
    """
    ring = StagingRing(2, part_bytes, gpu)
    tiers = [
        HostTier(host, gpu, Checksum.xxh3_64),
        SsdTier(FakeFile(ssd_bytes, Faults()), 0, ssd_bytes, ring, gpu, Checksum.xxh3_64),
    ]
    threads: Any = {medium: PlayedThreads(gpu) for medium in (Medium.host, Medium.ssd)}
    return TierStack(tiers, copies=gpu, threads=threads, log=TransferLog(), evict=evict)
