"""Whether a file is faster with O_DIRECT or through the page cache: measured on the file itself.

There is no rule to know it by: the same switch makes local NVMe 2.1 to 2.6 times faster and Lustre 1.9 to 5.5 times
slower (NeMo-Curator, pull request 2327).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

from headrace.storage.blockio.direct_file import DirectFile
from headrace.storage.core.anonymous import anonymous_memory

# What one rank keeps in flight: two threads per direction, each with a part of 4 MiB.
NUM_THREADS = 4
PART_BYTES = 4 * 1024**2
SHARE_BYTES = NUM_THREADS * PART_BYTES
MAX_BYTES = 64 * 1024**2
# One share for each way. A smaller file is over before a difference shows.
MIN_BYTES = 2 * SHARE_BYTES
BUDGET_S = 0.2
# The page cache also costs memory and memory bandwidth: it has to be faster by so much, which noise is not.
CLEARLY = 1.5


@dataclass
class WayRates:
    """The best rates seen on one way, in GB/s; writes include fsync."""

    write_gbps: float = 0.0
    read_gbps: float = 0.0

    def see(self, num_bytes: int, write_s: float, read_s: float) -> None:
        """Keep the better one: what disturbs a measurement only makes it slower."""
        self.write_gbps = max(self.write_gbps, num_bytes / write_s / 1e9)
        self.read_gbps = max(self.read_gbps, num_bytes / read_s / 1e9)

    def cost(self, *, reads: bool) -> float:
        """Seconds per GB that is written once and, with `reads`, read once."""
        return 1 / self.write_gbps + (1 / self.read_gbps if reads else 0.0)


@dataclass
class DirectRates:
    """Both ways on one file.

    Args:
        reads_compared: False where the kernel did not let go of the pages, so that a buffered read shows memory.
    """

    direct: WayRates = field(default_factory=WayRates)
    buffered: WayRates = field(default_factory=WayRates)
    reads_compared: bool = True

    @property
    def take_direct(self) -> bool:
        """Unless the page cache is clearly faster over a write and a read."""
        reads = self.reads_compared
        return self.direct.cost(reads=reads) <= CLEARLY * self.buffered.cost(reads=reads)

    @property
    def why(self) -> str:
        """The numbers in one line."""
        direct, cached = self.direct, self.buffered
        text = (
            f"O_DIRECT {direct.write_gbps:.2f} GB/s write, {direct.read_gbps:.2f} read; through the page cache "
            f"{cached.write_gbps:.2f} write with fsync, {cached.read_gbps:.2f} read"
        )
        return (
            text
            if self.reads_compared
            else f"{text} (from memory: its pages stay in the cache, so only the write rates are compared)"
        )


def measure_direct(path: str, num_bytes: int) -> DirectRates:
    """Write, sync and read parts of a file both ways in turn: at most 64 MiB, and no new round after 0.2 s.

    Overwrites the file's beginning. Both ways get blocks of their own, so that each pays for what a first write costs.

    Args:
        num_bytes: of the file, at least 32 MiB.

    Raises:
        TransferFailed: the file cannot be opened, or a transfer failed.
        OSError: fsync failed.
    """
    rates, begin_s = DirectRates(), time.perf_counter()
    blocks = [anonymous_memory(PART_BYTES) for _ in range(NUM_THREADS)]  # as a staging ring has them
    random = os.urandom(PART_BYTES)  # a drive that compresses must not shine
    for block in blocks:
        block[:] = random
    with (
        closing(DirectFile(path, direct=True)) as direct,
        closing(DirectFile(path, direct=False)) as buffered,
        ThreadPoolExecutor(NUM_THREADS) as pool,
    ):
        for index in range(min(num_bytes, MAX_BYTES) // MIN_BYTES):
            ways = [(direct, rates.direct), (buffered, rates.buffered)]
            for turn, (file, seen) in enumerate(ways if index % 2 == 0 else reversed(ways)):
                base = (2 * index + turn) * SHARE_BYTES
                write_s = _timed(pool, file.write, blocks, base) + _sync(file)
                file.forget_pages()
                if not file.direct and (file.resident_bytes(base, SHARE_BYTES) or 0) > SHARE_BYTES // 2:
                    rates.reads_compared = False
                seen.see(SHARE_BYTES, write_s, _timed(pool, file.read, blocks, base))
            if time.perf_counter() - begin_s > BUDGET_S:
                break
        buffered.forget_pages()
    return rates


def _timed(
    pool: ThreadPoolExecutor, move: Callable[[memoryview, int, str], None], blocks: list[memoryview], base: int
) -> float:
    begin_s = time.perf_counter()
    futures = [
        pool.submit(move, block, base + index * len(block), "rate of the drive") for index, block in enumerate(blocks)
    ]
    for future in futures:
        future.result()
    return time.perf_counter() - begin_s


def _sync(file: DirectFile) -> float:
    begin_s = time.perf_counter()
    file.sync()
    return time.perf_counter() - begin_s
