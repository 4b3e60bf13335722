"""The shelf on a GPU that is played by a scheduler which looks for trouble: every block gets its own input back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from headrace.helpers.streams import POISON, AdversarialGpu, open_adversarial_stack
from headrace.storage.core.records import Lease, Medium
from headrace.storage.core.states import BlobState
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.transfer import Fence
from headrace.workers.memory.shelf import Blob, Shelf

NUM_LAYERS, BLOCK_BYTES = 6, 8192


@pytest.fixture(scope="module")
def lease() -> Iterator[Lease]:
    with HostSlab(NUM_LAYERS * BLOCK_BYTES, run_id="streams") as slab:
        yield slab.lease("rank0", NUM_LAYERS * BLOCK_BYTES)


class StoresDoNotWait(AdversarialGpu):
    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        return super().to_host(target, source, [])


def num_wrong(seed: int, lease: Lease, make: Callable[[int], AdversarialGpu] = AdversarialGpu) -> int:
    """Blocks that got other bytes back than they had sent away, in three steps, each on a stream of its own."""
    gpu = make(seed)
    stack = open_adversarial_stack(gpu, lease, NUM_LAYERS * BLOCK_BYTES, evict=False)
    shelf, seen = Shelf(stack, 2, None), []
    for step in range(3):
        with gpu.stream("abc"[step]):
            shelf.begin(step, 0)
            sources, blobs = forward(gpu, shelf, step)
            for layer in reversed(range(NUM_LAYERS)):
                owner = shelf._passes[step, 0, 0]
                shelf.prefetch(owner, blobs[layer].turn)
                x = shelf.take(owner, blobs[layer])
                seen.append((torch.zeros_like(x), step * NUM_LAYERS + layer))
                gpu.launch(lambda copy=seen[-1][0], x=x: copy.copy_(x))
                if x.data_ptr() != sources[layer].data_ptr():  # forwarded ones are still on their way out
                    gpu.fill(x.view(torch.uint8), POISON)
                write_over(gpu, shelf, sources, blobs)
    assert stack.record()["tiers"]["host"]["forwarded_blobs"] == 3
    assert stack.record()["tiers"]["ssd"]["forwarded_blobs"] == 3
    stack.close()
    gpu.run_dry()
    return sum(not bool((copy == value).all()) for copy, value in seen)


def forward(gpu: AdversarialGpu, shelf: Shelf, step: int) -> tuple[list[torch.Tensor], list[Blob]]:
    sources: list[torch.Tensor] = []
    blobs: list[Blob] = []
    for layer in range(NUM_LAYERS):
        shelf.take_turn()
        write_over(gpu, shelf, sources, blobs)
        sources.append(torch.zeros(BLOCK_BYTES // 4))
        gpu.fill(sources[-1], step * NUM_LAYERS + layer)
        blobs.append(shelf.put(layer, "x", (0, 1), sources[-1], Medium.ssd if layer % 3 == 2 else Medium.host))
    return sources, blobs


def write_over(gpu: AdversarialGpu, shelf: Shelf, sources: list[torch.Tensor], blobs: list[Blob]) -> None:
    """The next kernel writes into the sources that were let go of."""
    for source, blob in zip(sources, blobs, strict=True):
        if shelf._open_stack.state(blob.key) not in (BlobState.storing, BlobState.forwarding):
            gpu.fill(source.view(torch.uint8), POISON)


def test_no_schedule_of_100_gives_a_block_other_bytes(lease: Lease) -> None:
    assert [seed for seed in range(100) if num_wrong(seed, lease)] == []


def test_a_device_that_does_not_wait_is_found(lease: Lease) -> None:
    assert sum(num_wrong(seed, lease, StoresDoNotWait) > 0 for seed in range(16)) >= 15
