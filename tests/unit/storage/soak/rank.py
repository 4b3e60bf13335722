"""One rank of test_ranks_killed: stores, loads and discards blocks whose every byte it knows, until it is killed.

A program of its own: the job comes pickled through stdin, one byte per event goes to stdout, and what goes wrong is a
traceback. Importing it runs nothing.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.errors import TierFull
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Lease, Medium
from headrace.storage.transfer_log import TransferLog

STORING, STORED, LOADING, LOADED, CYCLE = b"S", b"s", b"L", b"l", b"."
KIB = 1024


@dataclass
class Job:
    """What a rank is to do.

    Args:
        leases: of host and ssd.
        seed: of the contents and of the order of events; no two processes have the same.
        cycles: blocks to store, load, compare and discard.
        checksum: without it only the comparison of bytes finds what is wrong.
    """

    leases: list[Lease]
    seed: int
    cycles: int
    checksum: bool = True


class Work:
    """Up to seven blocks at a time, of random sizes, loaded in random order."""

    def __init__(self, job: Job, mark: Callable[[bytes], object]) -> None:
        config = TiersConfig(checksum=job.checksum)
        self.stack = open_stack(job.leases, config, device=torch.device("cpu"), log=TransferLog())
        self.job, self.mark = job, mark
        self.random = random.Random(job.seed)
        self.live: dict[BlobKey, int] = {}  # bytes by key, oldest first
        self.open_stores: set[BlobKey] = set()

    def run(self) -> None:
        """All cycles; nothing is left in the tiers afterwards."""
        for cycle in range(self.job.cycles):
            self.store(
                BlobKey("test", 0, "x", 0, 1, cycle), self.num_bytes(), self.random.choice((Medium.host, Medium.ssd))
            )
            while len(self.live) > self.random.randrange(8):
                self.check(self.random.choice(list(self.live)))
        while self.live:
            self.check(next(iter(self.live)))
        left = {medium.value: stats.used_bytes for medium, stats in self.stack.stats().items()}
        assert left == {"host": 0, "ssd": 0}, left
        self.stack.close()

    def num_bytes(self) -> int:
        """Mostly small and odd; some empty, some of several blocks of the drive, some a good part of the lease."""
        kind = self.random.random()
        if kind < 0.05:
            return self.random.choice((0, 1, 4096))
        return self.random.randint(1, 500 * KIB if kind > 0.9 else 64 * KIB)

    def store(self, key: BlobKey, num_bytes: int, medium: Medium) -> None:
        """Where the tier is full, the oldest blocks are loaded, compared and discarded first."""
        tensor = self.contents(key, num_bytes)
        self.mark(STORING)
        while True:
            try:
                self.stack.prepare_store(key, tensor, medium)
                break
            except TierFull:
                if not self.live:
                    raise
                self.check(next(iter(self.live)))
        if self.random.random() < 0.7:
            self.stack.complete_store(key)
        else:
            self.open_stores.add(key)
        self.live[key] = num_bytes
        self.mark(STORED)

    def check(self, key: BlobKey) -> None:
        """Load, compare every byte, discard. A store that is still open is completed before the load, or after it."""
        num_bytes = self.live.pop(key)
        completes = [self.stack.complete_store] if key in self.open_stores else []
        self.open_stores.discard(key)
        if completes and self.random.random() < 0.5:
            completes.pop()(key)
        self.mark(LOADING)
        self.stack.prepare_load(key)
        found = self.stack.complete_load(key)
        self.mark(LOADED)
        wrong = (found != self.contents(key, num_bytes)).nonzero()
        assert len(wrong) == 0, f"block {key} of {num_bytes} bytes: {len(wrong)} wrong, first at {int(wrong[0])}"
        for complete in completes:
            complete(key)
        self.stack.discard(key)
        self.mark(CYCLE)

    def contents(self, key: BlobKey, num_bytes: int) -> torch.Tensor:
        """The bytes of a block, from the seed and the key alone. Shape (num_bytes,), uint8."""
        drawn = np.random.default_rng((self.job.seed, key.step)).integers(0, 256, num_bytes, dtype=np.uint8)
        return torch.from_numpy(drawn)


def main() -> None:
    """The job in stdin, events on stdout."""
    job = pickle.loads(sys.stdin.buffer.read())
    Work(Job(**job), lambda event: os.write(1, event)).run()


if __name__ == "__main__":
    main()
