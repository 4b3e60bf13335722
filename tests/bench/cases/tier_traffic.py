"""Our side: blocks of one size through the verbs of a tier stack, a window of them in flight."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

import numpy as np
import torch

from headrace.bench.tier_rounds import Pass
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import LookupResult, Medium
from headrace.storage.stack import TierStack


def random_bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    """(num_bytes,) uint8 that no drive compresses, the same in every run."""
    words = np.random.default_rng(3).integers(0, 2**64, num_bytes // 8 + 1, dtype=np.uint64)
    return torch.from_numpy(words.view(np.uint8)[:num_bytes]).to(device)


class TierTraffic:
    """One tier of a stack, used as the training step uses it: `in_flight` blocks between prepare and complete.

    Block i of a pass is a slice of one large tensor of random bytes, another slice in every pass: a store that did
    nothing would be found by the next load.

    Args:
        source: (n,) uint8 on the stack's device; at least as long as a pass.
    """

    def __init__(self, stack: TierStack, medium: Medium, source: torch.Tensor, in_flight: int) -> None:
        self._stack = stack
        self._medium = medium
        self._source = source
        self._in_flight = in_flight
        self._block_bytes = self._num_blocks = 0
        self._stored: list[BlobKey] = []
        self._pass = 0
        self.moved_bytes = 0

    def use_blocks(self, block_bytes: int, num_blocks: int) -> None:
        """Set the shape of the passes; what is stored is forgotten."""
        self._forget()
        self._block_bytes, self._num_blocks = block_bytes, num_blocks

    def store_pass(self) -> Pass:
        """Store every block; over when all of them are whole in the tier."""
        self._forget()
        self._pass += 1
        window: deque[BlobKey] = deque()
        with self._clock() as clock:
            for index in range(self._num_blocks):
                if len(window) == self._in_flight:
                    self._stack.complete_store(window.popleft())
                key = self._key(index)
                self._stack.prepare_store(key, self._block(index), self._medium)
                window.append(key)
                self._stored.append(key)
            while window:
                self._stack.complete_store(window.popleft())
            self._settle()
        return clock[0]

    def load_pass(self, *, check_all: bool = False) -> Pass:
        """Load every block back, each dropped as soon as it is there; compare the first and the last one.

        Args:
            check_all: compare every block, within the time.

        Raises:
            TransferFailed: a block differs from what was stored, so that no rate of this run means anything.
        """
        window: deque[int] = deque()
        sample: dict[int, torch.Tensor] = {}
        with self._clock() as clock:
            for index in range(self._num_blocks):
                if len(window) == self._in_flight:
                    self._land(window.popleft(), sample, check_all=check_all)
                self._stack.prepare_load(self._stored[index])
                window.append(index)
            while window:
                self._land(window.popleft(), sample, check_all=check_all)
            self._settle()
        for index, tensor in sample.items():
            self._compare(index, tensor)
        return clock[0]

    def flow(self, stop: Event) -> None:
        """Both directions at once until `stop`: a block is stored, a window later loaded, and its slot given back.

        `moved_bytes` counts what is over. On CUDA the calling thread's current stream is the one that copies follow.
        """
        self._forget()
        self._pass += 1
        storing: deque[int] = deque()
        loading: deque[int] = deque()
        events: deque[torch.cuda.Event] = deque()
        index = 0
        while not stop.is_set() or storing or loading:
            if not stop.is_set():
                self._stack.prepare_store(self._key(index), self._block(index), self._medium)
                storing.append(index)
                index += 1
            if storing and (len(storing) > self._in_flight or stop.is_set()):
                self._stack.complete_store(self._key(storing[0]))
                self._stack.prepare_load(self._key(storing[0]))
                loading.append(storing.popleft())
            if loading and (len(loading) > self._in_flight or (stop.is_set() and not storing)):
                done = loading.popleft()
                tensor = self._stack.complete_load(self._key(done))
                self._stack.discard(self._key(done))
                self._pace(events)
                self.moved_bytes += 2 * tensor.nbytes

    def blocks_of_flow(self) -> int:
        """How many slots `flow` uses at most, with those that are still being given back."""
        return 3 * self._in_flight + 4

    def close(self) -> None:
        """Close the stack."""
        self._stack.close()

    def _key(self, index: int) -> BlobKey:
        return BlobKey("bench", 0, "x", index, index + 1, self._pass)

    def _block(self, index: int) -> torch.Tensor:
        begin = (index + self._pass) % self._num_blocks * self._block_bytes
        return self._source[begin : begin + self._block_bytes]

    def _land(self, index: int, sample: dict[int, torch.Tensor], *, check_all: bool) -> None:
        tensor = self._stack.complete_load(self._stored[index])
        if check_all:
            self._compare(index, tensor)
        elif index in (0, self._num_blocks - 1):
            sample[index] = tensor

    def _compare(self, index: int, tensor: torch.Tensor) -> None:
        if not torch.equal(tensor, self._block(index)):
            name = self._medium.value
            raise TransferFailed(f"{self._stored[index]} came back from the {name} tier with other bytes than it took")

    def _forget(self) -> None:
        for key in self._stored:
            self._stack.discard(key)
        self._stored.clear()

    def _settle(self) -> None:
        """Wait for what the verbs leave behind on CUDA: copies on side streams, threads that still sum the bytes."""
        if self._source.is_cuda:
            # The verbs have ordered this stream after every copy; a blocking event costs no processor time.
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(self._source.device))
            event.synchronize()
            while any(self._stack.lookup(key) is LookupResult.pending for key in self._stored):
                time.sleep(1e-4)

    def _pace(self, events: deque[torch.cuda.Event]) -> None:
        """Keep the host at most two windows ahead of the GPU, so that bytes are counted when they have moved."""
        if not self._source.is_cuda:
            return
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._source.device))
        events.append(event)
        if len(events) > 2 * self._in_flight:
            events.popleft().synchronize()

    @contextmanager
    def _clock(self) -> Iterator[list[Pass]]:
        """Measures the block; its pass is in the list afterwards."""
        found: list[Pass] = []
        if self._source.is_cuda:
            torch.cuda.synchronize(self._source.device)
        begin_cpu_s, begin_s = time.process_time(), time.perf_counter()
        yield found
        wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
        found.append(Pass(self._num_blocks * self._block_bytes, wall_s, cpu_s))
