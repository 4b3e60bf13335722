"""Copies between the device and host memory. The only file of the layer that synchronises with a GPU.

On CUDA a copy runs on a side stream, and order is kept by events both ways:

    in    the side stream waits for the caller's stream, so the bytes are computed (or the target's memory is free)
    out   the caller's stream waits for the side stream before it reuses a source or reads a target

so that neither the host nor the compute stream waits longer than the bytes need. On CPU a copy is a memcpy of the
thread that asks for it, and fences are None.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headrace.storage.core.anonymous import anonymous_memory
from headrace.storage.core.errors import MachineError
from headrace.storage.tiers.memory_limits import locked_memory_remedy
from headrace.storage.tiers.touch import cores_near
from headrace.storage.warm_memory import WARM_BYTES, WarmMemory

GIB = 1024**3


@dataclass(frozen=True)
class Fence:
    """A stretch of work on a CUDA stream: from `begin` to `end`."""

    begin: torch.cuda.Event
    end: torch.cuda.Event

    @property
    def passed(self) -> bool:
        """Whether the work is over."""
        return self.end.query()


class DeviceCopies(ABC):
    """Moves flat uint8 tensors between one device and host memory.

    Args:
        device: of the caller's tensors.
    """

    asynchronous: bool

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def target(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Memory for a load, uninitialised. Called on the caller's thread."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy on the device, on the caller's current stream and thread."""
        target.copy_(source)

    def near_cores(self) -> frozenset[int] | None:
        """Cores on the device's NUMA node, of those that this process may use; None: any."""
        return None

    @abstractmethod
    def fence(self) -> Fence | None:
        """What the caller's current stream has queued so far. Called on the caller's thread."""

    @abstractmethod
    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence | None:
        """Copy device bytes to host bytes of the same length, after the fences. Any thread."""

    @abstractmethod
    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence | None:
        """Copy host bytes to device bytes of the same length, after the fences. Any thread."""

    @abstractmethod
    def wait(self, fence: Fence | None) -> tuple[float, float] | None:
        """Block this thread until the fence has passed; begin and end of its work on time.perf_counter, if known."""

    @abstractmethod
    def order_caller_after(self, fence: Fence | None) -> None:
        """Make the caller's current stream wait for the fence, but not the host. Called on the caller's thread."""

    @abstractmethod
    def stalled_s(self) -> float:
        """Seconds so far that the caller's stream stood still in `order_caller_after`."""

    @abstractmethod
    def register(self, memory: torch.Tensor, tier: str) -> None:
        """Page-lock host memory for DMA, once. Nothing to do on CPU or for zero bytes.

        Raises:
            MachineError: the driver refused.
        """

    @abstractmethod
    def unregister(self, memory: torch.Tensor) -> None:
        """Undo `register`, before the memory is unmapped."""


def clear_last_error(device: torch.device) -> None:
    """Take back the error that a refused call left in the CUDA runtime; the next kernel launch would report it.

    torch has no cudaGetLastError. Its check behind a launch reads the error and resets it, so one small kernel does.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device).add_(1)


def open_copies(device: torch.device) -> DeviceCopies:
    """The copies of a device: cpu or cuda."""
    if device.type == "cuda":
        return CudaCopies(device)
    if device.type == "cpu":
        return CpuCopies(device)
    raise ValueError(f"device {device}: tiers serve cpu and cuda")


class CpuCopies(DeviceCopies):
    """The device is host memory too: one memcpy, without the interpreter lock, on the calling thread."""

    asynchronous = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._warm = WarmMemory()

    def target(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Memory whose pages are there, where a tensor of that size has been freed before."""
        num_bytes = shape.numel() * dtype.itemsize
        if num_bytes < WARM_BYTES:
            return super().target(shape, dtype)
        return self._warm.take(num_bytes).view(dtype).view(shape)

    def fence(self) -> None:
        """None: a CPU tensor is computed when its operator has returned."""

    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> None:
        """One memcpy; torch's own copy would start a team of OpenMP threads per worker thread."""
        np.copyto(target.numpy(), source.numpy())

    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> None:
        """One memcpy."""
        np.copyto(target.numpy(), source.numpy())

    def wait(self, fence: Fence | None) -> None:
        """Nothing is in flight."""

    def order_caller_after(self, fence: Fence | None) -> None:
        """Nothing is in flight."""

    def stalled_s(self) -> float:
        """0: the caller of a CPU tier waits in the verbs, where the stack meters it."""
        return 0.0

    def register(self, memory: torch.Tensor, tier: str) -> None:
        """Nothing to do."""

    def unregister(self, memory: torch.Tensor) -> None:
        """Nothing to do."""


class CudaCopies(DeviceCopies):
    """Two side streams, one per direction, shared by all threads of a rank."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(
            torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        )
        self._out = torch.cuda.Stream(self.device)
        self._in = torch.cuda.Stream(self.device)
        self._per_thread = threading.local()
        self._anchor: tuple[torch.cuda.Event, float] | None = None
        self._stalls: list[Fence] = []
        self._stalled_s = 0.0

    def near_cores(self) -> frozenset[int] | None:
        """As the firmware says where the GPU is; None with a torch that does not report its PCI address."""
        found: Any = torch.cuda.get_device_properties(self.device)
        if not hasattr(found, "pci_bus_id"):
            return None
        return cores_near(f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0")

    def fence(self) -> Fence:
        """An event on the caller's stream."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return Fence(event, event)

    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        """cudaMemcpyAsync on the outward stream; the caller keeps `source` alive until the fence has passed."""
        return self._copy(self._out, target, source, after)

    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        """cudaMemcpyAsync on the inward stream."""
        return self._copy(self._in, target, source, after)

    def wait(self, fence: Fence | None) -> tuple[float, float] | None:
        """Sleeps (does not spin) until the event fires."""
        if fence is None:
            return None
        if not fence.passed:
            fence.end.synchronize()
            # A wait that really waited ends when the event fires: from then on this event tells the GPU's time.
            self._anchor = (fence.end, time.perf_counter())
        if self._anchor is None:
            return None
        event, anchor_s = self._anchor
        return anchor_s + event.elapsed_time(fence.begin) / 1e3, anchor_s + event.elapsed_time(fence.end) / 1e3

    def order_caller_after(self, fence: Fence | None) -> None:
        """The wait is bracketed by two timed events, so that the stall is known without a host wait."""
        if fence is None:
            return
        stream = torch.cuda.current_stream(self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        stream.wait_event(fence.end)
        end.record(stream)
        self._stalls.append(Fence(begin, end))
        if len(self._stalls) >= 64:
            self.stalled_s()

    def stalled_s(self) -> float:
        """Adds up the stalls that are over; those still ahead on the stream count next time."""
        waiting = []
        for stall in self._stalls:
            if stall.passed:
                self._stalled_s += stall.begin.elapsed_time(stall.end) / 1e3
            else:
                waiting.append(stall)
        self._stalls = waiting
        return self._stalled_s

    def register(self, memory: torch.Tensor, tier: str) -> None:
        """cudaHostRegister of the whole range."""
        if memory.numel() == 0:
            return
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if code != 0:
            clear_last_error(self.device)
            raise MachineError(
                f"{tier} tier: the CUDA driver refused to page-lock {memory.numel() / GIB:.2f} GiB (cudaError {code}); "
                f"lower tiers.{tier}.budget_gib, or {locked_memory_remedy(memory.numel())}"
            )

    def unregister(self, memory: torch.Tensor) -> None:
        """cudaHostUnregister, after the copies in flight."""
        if memory.numel() == 0:
            return
        self._out.synchronize()
        self._in.synchronize()
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    @contextmanager
    def thread_stream(self, after: Sequence[Fence | None]) -> Iterator[torch.cuda.Stream]:
        """The calling thread's own side stream, current for as long as the context lasts, behind the fences."""
        stream = getattr(self._per_thread, "stream", None)
        if stream is None:
            stream = self._per_thread.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            for earlier in after:
                if earlier is not None:
                    stream.wait_event(earlier.end)
            yield stream

    def _copy(
        self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]
    ) -> Fence:
        fence = Fence(*(torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2)))
        with torch.cuda.stream(stream):
            for earlier in after:
                if earlier is not None:
                    stream.wait_event(earlier.end)
            fence.begin.record(stream)
            target.copy_(source, non_blocking=True)
            fence.end.record(stream)
        return fence


class StagingRing:
    """A fixed number of page-aligned host buffers, page-locked on CUDA; made once, never grown.

    Args:
        num_buffers: at least the number of threads that borrow, so that none waits for another.
        num_bytes: of one buffer, a multiple of the page size.
        copies: page-locks the ring.
    """

    def __init__(self, num_buffers: int, num_bytes: int, copies: DeviceCopies) -> None:
        self.num_bytes = num_bytes
        self._copies = copies
        # Not for forked children, in which the stack refuses to work.
        memory = anonymous_memory(num_buffers * num_bytes, share_with_children=False)
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._memory[:: mmap.PAGESIZE] = 0  # the pages are there before the first transfer
        copies.register(self._memory, "ssd")
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for buffer in self._memory.split(num_bytes):
            self._free.put(buffer)

    @contextmanager
    def borrow(self) -> Iterator[torch.Tensor]:
        """One buffer, (num_bytes,) uint8, for as long as the context lasts; blocks while all are out."""
        buffer = self._free.get()
        try:
            yield buffer
        finally:
            self._free.put(buffer)

    def close(self) -> None:
        """Undo the page lock; the memory goes with the last reference."""
        self._copies.unregister(self._memory)
