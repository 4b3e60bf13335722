"""No bytes are wrong, whatever the order in which streams get on; and the schedules do find what is wrong."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from headrace.helpers.streams import POISON, AdversarialGpu, open_adversarial_stack
from headrace.storage.core.errors import TierFull, TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Lease, Medium
from headrace.storage.core.states import BlobState
from headrace.storage.open_tier import OpenTier
from headrace.storage.stack import TierStack
from headrace.storage.table import Forward, Row
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.transfer import Fence

BLOCK_BYTES = 3 * 4096
NUM_ROUNDS = 50


@pytest.fixture(scope="module")
def lease() -> Iterator[Lease]:
    """Room for three blocks: slots are used again at once, and blocks are evicted."""
    with HostSlab(3 * BLOCK_BYTES, run_id="streams") as slab:
        yield slab.lease("rank0", 3 * BLOCK_BYTES)


class Program:
    """Stores, replaces, loads and discards blobs at random, on two streams, and remembers what loads should give."""

    def __init__(self, gpu: AdversarialGpu, lease: Lease) -> None:
        self.gpu = gpu
        self.stack = open_adversarial_stack(gpu, lease, 8 * BLOCK_BYTES)
        self.stored: dict[BlobKey, tuple[float, torch.Tensor]] = {}
        self.seen: list[tuple[torch.Tensor, float]] = []
        self.turns = self.num_replaced = self.num_given = 0

    def run(self, num_rounds: int = NUM_ROUNDS) -> int:
        """Returns the number of loads whose bytes were wrong."""
        for _ in range(num_rounds):
            with self.gpu.stream(self.some_stream()):
                if len(self.stored) < 3 or self.gpu.random.random() < 0.4:
                    self.store()
                else:
                    self.load(self.gpu.random.choice(list(self.stored)))
            while self.gpu.random.random() < 0.2:
                self.gpu.step()
            for opened in self.stack._tiers.values():
                if self.gpu.random.random() < 0.3:
                    opened.threads.get_on()  # type: ignore[attr-defined]
        self.stack.close()
        self.gpu.run_dry()
        return sum(not bool((tensor == value).all()) for tensor, value in self.seen)

    def some_stream(self) -> str:
        return self.gpu.random.choice("ab")

    def store(self) -> None:
        """A kernel makes the source late; when the stack has let go of it, the next kernel writes over it."""
        self.turns += 1
        value, source = float(self.turns), torch.zeros(BLOCK_BYTES // 4)
        replaces = bool(self.stored) and self.gpu.random.random() < 0.3
        key = self.gpu.random.choice(list(self.stored)) if replaces else BlobKey("test", self.turns, "x", 0, 1, 0)
        self.gpu.fill(source, value)
        try:
            medium = self.gpu.random.choice((Medium.host, Medium.host, Medium.ssd))
            self.stack.prepare_store(key, source, medium, next_use=self.gpu.random.random())
        except TierFull:
            return
        self.stored[key] = value, source
        self.num_replaced += replaces
        is_seen = self.gpu.random.random() < 0.3 and not self.load(key)  # before its store is complete
        if key in self.stored:
            with self.gpu.stream(self.some_stream()):
                self.stack.complete_store(key)
                if not is_seen:
                    self.write_over(source)

    def load(self, key: BlobKey) -> bool:
        """A kernel looks at the target; then the blob goes, sometimes, and the next kernel writes over the target.

        A source that was forwarded may be looked at on two streams: who writes over it would have to wait for both.

        Returns:
            Whether the bytes went into a buffer of the caller's.
        """
        value, _ = self.stored[key]
        is_forwarded, buffer = self.stack.state(key) is BlobState.storing, None
        if self.gpu.random.random() < 0.4:
            row = self.stack._table.find(key)
            assert row is not None
            buffer = torch.zeros(row.form.shape, dtype=row.form.dtype)
            self.write_over(buffer)  # the buffer's last user comes late
            self.num_given += 1
        self.stack.prepare_load(key, into=buffer)
        with self.gpu.stream(self.some_stream() if buffer is not None else self.gpu.current):
            target = self.stack.complete_load(key)
            copy = torch.zeros_like(target)
            self.gpu.launch(functools.partial(copy.copy_, target))
            self.seen.append((copy, value))
            if self.gpu.random.random() < 0.7:
                del self.stored[key]
                self.stack.discard(key)
                if buffer is not None or not is_forwarded:
                    self.write_over(target)
        return buffer is not None

    def write_over(self, tensor: torch.Tensor) -> None:
        """What the allocator does with memory that is free again."""
        self.gpu.fill(tensor.reshape(-1).view(torch.uint8), POISON)


def num_wrong(
    seed: int, lease: Lease, make: Callable[[int], AdversarialGpu] = AdversarialGpu, num_rounds: int = NUM_ROUNDS
) -> int:
    """Wrong loads of one schedule; a checksum that differs counts as one."""
    try:
        return Program(make(seed), lease).run(num_rounds)
    except TransferFailed:
        return 1


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_no_schedule_of_200_finds_a_wrong_byte(first: int, lease: Lease) -> None:
    assert [seed for seed in range(first, first + 50) if num_wrong(seed, lease)] == []


def test_the_schedules_evict_forward_and_use_slots_again(lease: Lease) -> None:
    """In the mean of ten schedules: no single one has to do everything."""
    found = Counter[str]()
    for seed in range(10):
        program = Program(AdversarialGpu(seed), lease)
        program.run()
        host, ssd = (program.stack.record()["tiers"][medium] for medium in ("host", "ssd"))
        found["evicted"] += host["evicted_blobs"]
        found["forwarded"] += host["forwarded_blobs"] + ssd["forwarded_blobs"]
        found["turnovers"] += host["stored_bytes"] // host["capacity_bytes"]
        found["loads"] += len(program.seen)
        found["replaced"] += program.num_replaced
        found["given"] += program.num_given
    least = {"evicted": 3, "forwarded": 1, "turnovers": 4, "loads": 20, "replaced": 3, "given": 3}
    assert all(found[what] >= 10 * number for what, number in least.items()), found


class StoresDoNotWait(AdversarialGpu):
    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        return super().to_host(target, source, [])


class LoadsDoNotWait(AdversarialGpu):
    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        return super().to_device(target, source, [])


class CallerDoesNotWait(AdversarialGpu):
    def order_caller_after(self, fence: Fence | None) -> None:
        pass


class BuffersAreEarly(AdversarialGpu):
    """A staging buffer goes back to the ring while the copy out of it is still queued."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.inward: list[Fence] = []

    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        self.inward.append(super().to_device(target, source, after))
        return self.inward[-1]

    def wait(self, fence: Fence | None) -> None:
        if fence not in self.inward:
            super().wait(fence)


@pytest.mark.parametrize("fault", [StoresDoNotWait, LoadsDoNotWait, CallerDoesNotWait, BuffersAreEarly])
def test_a_device_that_does_not_wait_is_found(fault: type[AdversarialGpu], lease: Lease) -> None:
    assert sum(num_wrong(seed, lease, fault) > 0 for seed in range(16)) >= 15


def forget_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source goes back to the caller while the copy out of it, for a forwarded load, is still queued."""
    right = TierStack._complete_forward

    def complete_forward(self: TierStack, row: Row, forward: Forward) -> torch.Tensor:
        found = right(self, row, forward)
        assert row.store is not None
        row.store.read = None
        return found

    monkeypatch.setattr(TierStack, "_complete_forward", complete_forward)


def forget_the_buffers_last_user(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TierStack._complete_forward
    monkeypatch.setattr(
        TierStack, "_complete_forward", lambda self, row, forward: right(self, row, forward._replace(ready=None))
    )


def forget_the_freed_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenTier, "fences_in", lambda self, slot: [])


def forget_the_stores_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Row, "launched", lambda self, move: None)


def free_the_old_slot_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced blob's slot goes back with the fences forgotten."""
    right = Row.drop

    def drop(self: Row) -> None:
        self.copies = []
        right(self)

    monkeypatch.setattr(Row, "drop", drop)


@pytest.mark.parametrize(
    ("fault", "least"),
    [
        (forget_the_freed_range, 15),
        (forget_the_stores_copy, 15),
        (free_the_old_slot_early, 15),
        (forget_reads, 8),
        (forget_the_buffers_last_user, 10),
    ],
)
def test_a_stack_that_forgets_a_fence_is_found(
    fault: Callable[[pytest.MonkeyPatch], None], least: int, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By schedules of 600 rounds; most need a tenth of them."""
    fault(monkeypatch)
    found = [any(num_wrong(seed, lease, num_rounds=rounds) for rounds in (60, 600)) for seed in range(16)]
    assert sum(found) >= least
