"""What host memory and the link to a GPU can do: plain copies between buffers that are warm."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from headrace.bench.tier_rounds import Pass
from headrace.storage.core.records import Direction


class PlainCopy:
    """One large copy in host memory: the better of numpy with one thread and torch with all of them.

    Args:
        source: (n,) uint8 in host memory.
    """

    def __init__(self, source: torch.Tensor) -> None:
        self._source = source
        self._target = source.clone()

    def move(self, num_bytes: int) -> Pass:
        """Copy the first `num_bytes` into memory whose pages are there."""
        source, target = self._source[:num_bytes], self._target[:num_bytes]
        before = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            with_all = _timed(num_bytes, lambda: target.copy_(source))
        finally:
            torch.set_num_threads(before)
        with_one = _timed(num_bytes, lambda: np.copyto(target.numpy(), source.numpy()))
        return max(with_all, with_one, key=lambda one: one.gbps)


class PinnedCopy:
    """cudaMemcpyAsync between device memory and page-locked host memory, block by block on a side stream.

    Args:
        source: (n,) uint8 on the device; a second tensor and page-locked host memory of the same size are made.
        in_flight: blocks between launch and end.
    """

    def __init__(self, source: torch.Tensor, in_flight: int) -> None:
        self._device = source
        self._target = torch.empty_like(source)
        self._host = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=True)
        self._in_flight = in_flight
        self._stream = torch.cuda.Stream(source.device)

    def move(self, direction: Direction, block_bytes: int, num_bytes: int) -> Pass:
        """Copy `num_bytes` out to the host (store) or in (load)."""
        pair = (self._host, self._device) if direction is Direction.store else (self._target, self._host)
        torch.cuda.synchronize(self._device.device)
        # The waits spin, because that is faster; the processor time of spinning says nothing.
        return replace(_timed(num_bytes, lambda: self._copy(*pair, block_bytes, num_bytes)), cpu_s=None)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, block_bytes: int, num_bytes: int) -> None:
        events: deque[torch.cuda.Event] = deque()
        with torch.cuda.stream(self._stream):
            for begin in range(0, num_bytes, block_bytes):
                if len(events) == self._in_flight:
                    events.popleft().synchronize()
                end = begin + block_bytes
                target[begin:end].copy_(source[begin:end], non_blocking=True)
                event = torch.cuda.Event()
                event.record(self._stream)
                events.append(event)
        self._stream.synchronize()


def _timed(num_bytes: int, copy: Callable[[], object]) -> Pass:
    begin_cpu_s, begin_s = time.process_time(), time.perf_counter()
    copy()
    return Pass(num_bytes, time.perf_counter() - begin_s, time.process_time() - begin_cpu_s)
