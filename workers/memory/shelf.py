"""Blobs on their way out in forward and back in backward: the order of stores, releases and loads.

forward   a blob is handed to its tier when its block has made it; its source is released when the block after the
          next one starts, so a copy has two blocks of compute to hide behind
backward  every store is completed first; then loads start in the order of use, for the block at work and for
          `prefetch_layers` blocks ahead; a blob's slot is given back as soon as its block has the bytes
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.records import Medium
from headrace.workers.memory.meter import Hold, Meter
from headrace.workers.memory.schedule import STORES_IN_FLIGHT

if TYPE_CHECKING:
    from headrace.storage.stack import TierStack


class BlobState(StrEnum):
    """Where a blob of the shelf stands."""

    storing = "storing"
    stored = "stored"
    loading = "loading"
    spent = "spent"


@dataclass
class Blob:
    """One span of one tensor that left the device.

    Args:
        turn: number of the block call that made it; orders releases and loads.
        use: place among the blobs of its call in the order in which backward uses them.
        source: the tensor while it is being copied out, with its version counter at that moment.
        hold: the meter's claim on the source, or on the bytes of a load under way.
    """

    key: BlockKey
    turn: int
    use: int
    num_bytes: int
    source: torch.Tensor | None
    source_version: int
    hold: Hold | None
    state: BlobState = BlobState.storing


@dataclass
class Pass:
    """One forward pass and its backward: one micro-batch of one step."""

    step: int
    micro_batch: int
    turn: int = 0
    puts: dict[tuple[int, str], int] = field(default_factory=dict)
    waiting: list[Blob] = field(default_factory=list)


class Shelf:
    """Keeps the order above for one rank.

    Args:
        stack: the rank's tiers; None where the plan moves nothing.
        prefetch_layers: for how many block calls ahead of the one in backward the loads start.
        meter: counts what is in flight on the device; None counts nothing.
    """

    def __init__(self, stack: TierStack | None, prefetch_layers: int, meter: Meter | None) -> None:
        self._stack = stack
        self._prefetch_layers = prefetch_layers
        self._meter = meter
        self._passes: dict[tuple[int, int], Pass] = {}
        self._current: Pass | None = None

    def begin(self, step: int, micro_batch: int) -> None:
        """Open a pass. Raises RuntimeError where the same pass is open and still waits for its backward."""
        self._passes = {name: p for name, p in self._passes.items() if p.waiting}
        if (step, micro_batch) in self._passes:
            raise RuntimeError(
                f"step {step}, micro-batch {micro_batch} began twice: layers {self.waiting_layers()} of it still wait "
                "for their backward pass; run it, or call abort()"
            )
        self._current = self._passes[step, micro_batch] = Pass(step, micro_batch)

    def waiting_layers(self) -> list[int]:
        """Layers that have a blob in a tier, each once, in forward order."""
        return list(dict.fromkeys(blob.key.layer for p in self._passes.values() for blob in p.waiting))

    def claim(self, tensor: torch.Tensor) -> Hold | None:
        """The meter's claim on a tensor that stays on the device."""
        return None if self._meter is None else self._meter.hold(tensor)

    @contextmanager
    def at_work(self, num_bytes: int) -> Iterator[None]:
        """Tell the meter what a block takes while it is at work."""
        hold = None if self._meter is None else self._meter.work(num_bytes)
        try:
            yield
        finally:
            if hold is not None:
                hold.release()

    def close_passes(self) -> None:
        """Forget the finished passes; the caller has made sure that none waits."""
        self._passes.clear()
        self._current = None

    def take_turn(self) -> tuple[Pass, int]:
        """Say that one more block starts its forward; release the stores that have had their time.

        Returns:
            The pass and the number of the block call in it.

        Raises:
            RuntimeError: no pass is open.
        """
        if self._current is None:
            raise RuntimeError(
                "a block ran forward with gradients outside of a pass: call MemoryHandle.begin(step, micro_batch) first"
            )
        current = self._current
        current.turn += 1
        for blob in current.waiting:
            if current.turn - blob.turn >= STORES_IN_FLIGHT:
                self._finish_store(blob)
        return current, current.turn

    def put(self, layer: int, name: str, tensor: torch.Tensor, medium: Medium, *, use: int = 0) -> Blob:
        """Start moving a tensor of block `layer`, whose turn it is, to `medium`; it must not be changed any more."""
        current = self._current
        assert current is not None, "take_turn comes first"
        assert self._stack is not None, "apply_memory asks for a stack where a plan moves anything"
        number = current.puts.get((layer, name), 0)
        current.puts[layer, name] = number + 1
        source = tensor.detach().contiguous()
        key = BlockKey(current.step, layer, name, number, current.micro_batch)
        # Backward takes the block calls in reverse.
        self._stack.prepare_store(key, source, medium, next_use=-current.turn)
        blob = Blob(key, current.turn, use, source.nbytes, source, source._version, None)
        current.waiting.append(blob)
        return blob

    def count_sources(self, owner: Pass, turn: int) -> None:
        """Tell the meter what block call `turn` left on its way out, now that the block itself no longer counts it."""
        for blob in owner.waiting:
            if blob.turn == turn and blob.source is not None and blob.hold is None and self._meter is not None:
                blob.hold = self._meter.hold(blob.source)

    def prefetch(self, owner: Pass, turn: int) -> None:
        """Start the loads of block call `turn` and of the calls before it, in the order of use.

        The meter is told about those before it; the call at work counts its own.
        """
        by_use = sorted(owner.waiting, key=lambda blob: (-blob.turn, blob.use))
        for blob in by_use:
            if blob.turn == turn:
                self._finish_store(blob)
                self._release(blob)
                self._start_load(blob, is_counted=False)
        for blob in reversed(owner.waiting):
            self._finish_store(blob)
        for blob in by_use:
            if turn - self._prefetch_layers <= blob.turn < turn:
                self._start_load(blob, is_counted=True)

    def take(self, owner: Pass, blob: Blob) -> torch.Tensor:
        """The blob's tensor, back on the device; its slot is free already.

        Raises:
            RuntimeError: it was taken before, or the pass was aborted.
        """
        assert self._stack is not None
        if blob.state is BlobState.spent:
            key = blob.key
            raise RuntimeError(
                f"{key.kind} of layer {key.layer} (step {key.step}, micro-batch {key.micro_batch}) is gone: it serves "
                "one backward pass, and that has run or was aborted; run forward again"
            )
        self._finish_store(blob)
        self._start_load(blob, is_counted=False)
        tensor = self._stack.complete_load(blob.key)
        self._forget(owner, blob)
        self._stack.discard(blob.key)
        return tensor

    def abort(self) -> None:
        """Drop everything that is stored or in flight. No transfer is completed: one that failed would fail again.

        Raises:
            RuntimeError: the tiers are closed. All the same nothing waits here any more.
        """
        with CleanUps() as closing:
            closing.callback(self.close_passes)
            for owner in self._passes.values():
                for blob in list(owner.waiting):
                    assert self._stack is not None
                    closing.callback(self._stack.discard, blob.key)
                    self._forget(owner, blob)

    def _finish_store(self, blob: Blob) -> None:
        if blob.state is not BlobState.storing:
            return
        source = blob.source
        assert self._stack is not None
        assert source is not None
        self._stack.complete_store(blob.key)
        if source._version != blob.source_version:
            raise RuntimeError(
                f"{blob.key.kind} of layer {blob.key.layer} was modified in place while it was copied to its tier; "
                "a block must not change its input"
            )
        blob.state = BlobState.stored
        blob.source = None
        self._release(blob)

    def _start_load(self, blob: Blob, *, is_counted: bool) -> None:
        if blob.state is not BlobState.stored:
            return
        assert self._stack is not None
        blob.hold = self._meter.reserve(blob.num_bytes) if self._meter is not None and is_counted else None
        self._stack.prepare_load(blob.key)
        blob.state = BlobState.loading

    def _forget(self, owner: Pass, blob: Blob) -> None:
        blob.state = BlobState.spent
        blob.source = None
        self._release(blob)
        owner.waiting.remove(blob)

    @staticmethod
    def _release(blob: Blob) -> None:
        if blob.hold is not None:
            blob.hold.release()
            blob.hold = None
