"""Host memory that is used again: a fresh page costs a fault, an order of magnitude slower than the copy into it.

The C library gives large tensors back to the system when they are freed, so every load of a CPU tier would land on
fresh pages. CUDA has its caching allocator for this; the CPU gets one here, for load targets alone.
"""

from __future__ import annotations

import mmap
import threading
import weakref

import numpy as np
import numpy.typing as npt
import torch

from headrace.storage.core.anonymous import anonymous_memory
from headrace.storage.core.ledger import round_up

# Below this the C library keeps freed memory itself.
WARM_BYTES = 1024**2

Pages = npt.NDArray[np.uint8]


class WarmMemory:
    """Hands out host memory and takes it back by itself when the last tensor on it is gone.

    Memory that waits is never more than what was handed out at once at most. Thread-safe: a tensor may die anywhere.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a tensor may die, and come back here, inside of `take`
        self._waiting: list[Pages] = []
        self._waiting_bytes = self._out_bytes = self._most_out_bytes = 0

    @property
    def waiting_bytes(self) -> int:
        """Bytes that are not in use now."""
        return self._waiting_bytes

    def take(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised memory, (num_bytes,) uint8, whose storage has exactly these bytes."""
        size = round_up(num_bytes, mmap.PAGESIZE)
        with self._lock:
            found = next((i for i, pages in enumerate(self._waiting) if pages.nbytes == size), None)
            if found is None:
                pages = np.frombuffer(anonymous_memory(size), dtype=np.uint8)
            else:
                pages = self._waiting.pop(found)
                self._waiting_bytes -= size
            self._out_bytes += size
            self._most_out_bytes = max(self._most_out_bytes, self._out_bytes)
        # torch holds this view for as long as a tensor uses the storage; its end is the memory's return.
        view = pages[:num_bytes]
        weakref.finalize(view, self._give_back, pages).atexit = False
        return torch.from_numpy(view)

    def _give_back(self, pages: Pages) -> None:
        with self._lock:
            self._out_bytes -= pages.nbytes
            self._waiting.append(pages)
            self._waiting_bytes += pages.nbytes
            while self._waiting_bytes > self._most_out_bytes:
                self._waiting_bytes -= self._waiting.pop(0).nbytes
