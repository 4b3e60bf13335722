"""No bytes are wrong, whatever the order in which streams get on; and the schedules do find what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from headrace.storage.blocks import OpenTier
from headrace.storage.core.errors import TierFull, TransferFailed
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.records import Lease, Medium
from headrace.storage.testing_streams import POISON, AdversarialGpu, open_adversarial_stack
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
    """Stores, loads and discards blocks at random, on two streams, and remembers what every load should give."""

    def __init__(self, gpu: AdversarialGpu, lease: Lease) -> None:
        self.gpu = gpu
        self.stack = open_adversarial_stack(gpu, lease, 8 * BLOCK_BYTES)
        self.stored: dict[BlockKey, tuple[float, torch.Tensor]] = {}
        self.seen: list[tuple[torch.Tensor, float]] = []
        self.turns = 0

    def run(self, num_rounds: int = NUM_ROUNDS) -> int:
        """Returns the number of loads whose bytes were wrong."""
        for _ in range(num_rounds):
            with self.gpu.stream(self.gpu.random.choice("ab")):
                if len(self.stored) < 3 or self.gpu.random.random() < 0.4:
                    self.store()
                else:
                    self.load(self.gpu.random.choice(list(self.stored)))
            while self.gpu.random.random() < 0.2:
                self.gpu.step()
        self.stack.close()
        self.gpu.run_dry()
        return sum(not bool((tensor == value).all()) for tensor, value in self.seen)

    def store(self) -> None:
        """A kernel makes the source late; when the stack has let go of it, the next kernel writes over it."""
        self.turns += 1
        value, source = float(self.turns), torch.zeros(BLOCK_BYTES // 4)
        key = BlockKey(0, self.turns, "x")
        self.gpu.fill(source, value)
        try:
            medium = self.gpu.random.choice((Medium.host, Medium.host, Medium.ssd))
            self.stack.prepare_store(key, source, medium, next_use=self.gpu.random.random())
        except TierFull:
            return
        self.stored[key] = value, source
        if self.gpu.random.random() < 0.2:
            self.load(key)  # before its store is complete
            return
        self.stack.complete_store(key)
        self.write_over(source)

    def load(self, key: BlockKey) -> None:
        """A kernel looks at the target; then the block goes, sometimes, and the next kernel writes over the target.

        A source that was forwarded may be looked at on two streams: who writes over it would have to wait for both.
        """
        value, source = self.stored[key]
        self.stack.prepare_load(key)
        target = self.stack.complete_load(key)
        copy = torch.zeros_like(target)
        self.gpu.launch(lambda: copy.copy_(target))
        self.seen.append((copy, value))
        if self.gpu.random.random() < 0.7:
            del self.stored[key]
            self.stack.discard(key)
            if target.data_ptr() != source.data_ptr():
                self.write_over(target)

    def write_over(self, tensor: torch.Tensor) -> None:
        """What the allocator does with memory that is free again."""
        self.gpu.fill(tensor.view(torch.uint8), POISON)


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
    program = Program(AdversarialGpu(3), lease)
    program.run()
    tiers = program.stack.record()["tiers"]
    assert tiers["host"]["evicted_blocks"] >= 3
    assert tiers["host"]["forwarded_blocks"] + tiers["ssd"]["forwarded_blocks"] >= 1
    assert tiers["host"]["stored_bytes"] >= 4 * tiers["host"]["capacity_bytes"]
    assert len(program.seen) >= 20


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


@pytest.mark.parametrize("fault", ["the freed range forgets its fences", "a load forgets the store's copy"])
def test_a_stack_that_forgets_a_fence_is_found(fault: str, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault.startswith("the freed"):
        monkeypatch.setattr(OpenTier, "fences_in", lambda self, slot: [])
    else:
        monkeypatch.setattr("headrace.storage.blocks.Block.launched", lambda self, move: None)
    assert sum(num_wrong(seed, lease, num_rounds=300) > 0 for seed in range(16)) >= 15
