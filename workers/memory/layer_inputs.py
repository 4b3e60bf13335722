"""The inputs of decoder blocks on their way out in forward and back in backward.

One rule for the whole sweep, so that the bytes moved are a formula (plan.planned_transfer_bytes):

    forward   a block's input is handed to its tier before the block runs; its source is released when the block after
              the next one starts, so a copy has two blocks of compute to hide behind and at most two are in flight
    backward  every store is completed first; then loads start in reverse order, `prefetch_layers` blocks ahead; a
              block's slot is given back as soon as the block has its input
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from headrace.storage.core.cleanup import CleanUps, after_error
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.records import Medium
from headrace.workers.memory.meter import Hold, Meter

if TYPE_CHECKING:
    from headrace.storage.stack import TierStack

STORES_IN_FLIGHT = 2


class InputState(StrEnum):
    """Where a stored layer input stands."""

    storing = "storing"
    stored = "stored"
    loading = "loading"
    spent = "spent"


@dataclass
class StoredInput:
    """One layer input that left the device.

    Args:
        turn: how many blocks had run in this pass when it was stored; orders releases and prefetches.
        source: the tensor while it is being copied out, with its version counter at that moment.
        hold: the meter's claim on the source, or on the bytes of a load under way.
    """

    key: BlockKey
    turn: int
    num_bytes: int
    source: torch.Tensor | None
    source_version: int
    hold: Hold | None
    state: InputState = InputState.storing


@dataclass
class Pass:
    """One forward pass and its backward: one micro-batch of one step."""

    step: int
    micro_batch: int
    turn: int = 0
    calls: dict[int, int] = field(default_factory=dict)
    waiting: list[StoredInput] = field(default_factory=list)


class LayerInputs:
    """Keeps the order above for one rank.

    Args:
        stack: the rank's tiers; None where the plan moves nothing.
        prefetch_layers: how many blocks ahead of the backward pass a load starts.
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
        """Layers whose input is still in a tier."""
        return [item.key.layer for p in self._passes.values() for item in p.waiting]

    def close_passes(self) -> None:
        """Forget the finished passes; the caller has made sure that none waits."""
        self._passes.clear()
        self._current = None

    def take_turn(self) -> Pass:
        """Say that one more block starts its forward; release the stores that have had their time.

        Raises:
            RuntimeError: no pass is open.
        """
        if self._current is None:
            raise RuntimeError(
                "a block ran forward with gradients outside of a pass: call MemoryHandle.begin(step, micro_batch) first"
            )
        current = self._current
        current.turn += 1
        for item in current.waiting:
            if current.turn - item.turn >= STORES_IN_FLIGHT:
                self._finish_store(item)
        return current

    def store(self, layer: int, x: torch.Tensor, medium: Medium) -> StoredInput:
        """Start moving the input of block `layer`, whose turn it is, to `medium`."""
        current = self._current
        assert current is not None, "take_turn comes first"
        assert self._stack is not None, "apply_memory asks for a stack where a plan moves anything"
        call = current.calls.get(layer, 0)
        current.calls[layer] = call + 1
        source = x.detach().contiguous()
        # A block that is called again in one pass (shared weights) leaves one blob per call.
        key = BlockKey(current.step, layer, "layer_input", call, current.micro_batch)
        hold = self._meter.hold(source) if self._meter is not None else None
        try:
            # Backward takes the inputs in reverse.
            self._stack.prepare_store(key, source, medium, next_use=-current.turn)
        except BaseException as error:
            if hold is not None:
                after_error(error, hold.release)
            raise
        item = StoredInput(key, current.turn, source.nbytes, source, source._version, hold)
        current.waiting.append(item)
        return item

    def prefetch(self, owner: Pass, turn: int) -> None:
        """Start the loads that backward will want after block number `turn` of the pass, nearest first."""
        for item in reversed(owner.waiting):
            self._finish_store(item)
        for item in reversed(owner.waiting):
            if turn - self._prefetch_layers <= item.turn < turn:
                self._start_load(item)

    @contextmanager
    def loaded(self, owner: Pass, item: StoredInput) -> Iterator[torch.Tensor]:
        """The stored input, back on the device for as long as the context lasts; its slot is free already.

        Raises:
            RuntimeError: it was taken before, or the pass was aborted.
        """
        assert self._stack is not None
        if item.state is InputState.spent:
            raise RuntimeError(
                f"the input of layer {item.key.layer} (step {item.key.step}, micro-batch {item.key.micro_batch}) is "
                "gone: it serves one backward pass, and that has run or was aborted; run forward again"
            )
        self._finish_store(item)
        self._start_load(item)
        self.prefetch(owner, item.turn)
        tensor = self._stack.complete_load(item.key)
        self._forget(owner, item)
        self._stack.discard(item.key)
        hold = self._meter.hold(tensor) if self._meter is not None else None
        try:
            yield tensor
        finally:
            if hold is not None:
                hold.release()

    def abort(self) -> None:
        """Drop everything that is stored or in flight. No transfer is completed: one that failed would fail again.

        Raises:
            RuntimeError: the tiers are closed. All the same nothing waits here any more.
        """
        with CleanUps() as closing:
            closing.callback(self.close_passes)
            for owner in self._passes.values():
                for item in list(owner.waiting):
                    assert self._stack is not None
                    closing.callback(self._stack.discard, item.key)
                    self._forget(owner, item)

    def _finish_store(self, item: StoredInput) -> None:
        if item.state is not InputState.storing:
            return
        source = item.source
        assert self._stack is not None
        assert source is not None
        self._stack.complete_store(item.key)
        if source._version != item.source_version:
            raise RuntimeError(
                f"the input of layer {item.key.layer} was modified in place while it was copied to its tier; "
                "a block must not change its input"
            )
        item.state = InputState.stored
        item.source = None
        self._release(item)

    def _start_load(self, item: StoredInput) -> None:
        if item.state is not InputState.stored:
            return
        assert self._stack is not None
        item.hold = self._meter.reserve(item.num_bytes) if self._meter is not None else None
        self._stack.prepare_load(item.key)
        item.state = InputState.loading

    def _forget(self, owner: Pass, item: StoredInput) -> None:
        item.state = InputState.spent
        item.source = None
        self._release(item)
        owner.waiting.remove(item)

    @staticmethod
    def _release(item: StoredInput) -> None:
        if item.hold is not None:
            item.hold.release()
            item.hold = None
