"""Blobs on their way out in forward and back in backward: the order of stores, releases and loads.

forward   a blob is handed to its tier when its block has made it; its source is released when the block after the
          next one starts, so a copy has two blocks of compute to hide behind
backward  loads start in the order of use, for the block at work and for `prefetch_layers` blocks ahead; before the
          loads ahead start, the stores of blocks still further ahead are completed; a blob whose store is not complete
          is forwarded: its source is the answer and no byte moves; a blob's slot is given back as soon as its block has
          the bytes

Where several passes are open at once (a pipeline), the order of all block calls of a step is told before it: loads for
the next pass's backward then start in the block calls before it, whatever pass these belong to.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Medium
from headrace.storage.core.states import BlobState
from headrace.workers.memory.meter import Hold, Meter
from headrace.workers.memory.schedule import STORES_IN_FLIGHT
from headrace.workers.model.skeleton import Span

if TYPE_CHECKING:
    from headrace.storage.stack import TierStack
    from headrace.workers.memory.weight_queue import WeightQueue


# Gives the buffer that a load goes into; None: the stack takes new memory. Called when the load starts. The argument
# says whether the blob's block is at work.
Into = Callable[[bool], torch.Tensor | None]


class Call(NamedTuple):
    """A block call of a step, by its pass and its number in it."""

    micro_batch: int
    stage: int
    turn: int
    is_backward: bool


@dataclass(eq=False)
class Blob:
    """One span of one tensor that left the device. The stack knows its state.

    Args:
        turn: number of the block call that made it, in its pass; orders releases and loads.
        call: the same among the block calls of all passes.
        use: place among the blobs of its call in the order in which backward uses them.
        source: the tensor while it is being copied out.
        into: see Into.
        hold: the meter's claim on the source, or on the bytes of a load under way.
    """

    key: BlobKey
    turn: int
    call: int
    use: int
    num_bytes: int
    source: torch.Tensor | None
    into: Into | None
    hold: Hold | None = None


@dataclass
class Pass:
    """One forward pass and its backward: one micro-batch of one step, of a pipeline in one stage.

    Args:
        seed / row: as MemoryHandle.begin says.
        turn: block calls so far.
        waiting: blobs that backward has not taken, in forward order.
        of_turn: the same ones by the call that made them, so that a call need not look through all of them.
        leaving: blobs of which the source may still be here, in forward order.
    """

    step: int
    micro_batch: int
    stage: int = 0
    seed: int = 0
    row: int = 0
    turn: int = 0
    waiting: dict[BlobKey, Blob] = field(default_factory=dict)
    of_turn: defaultdict[int, list[Blob]] = field(default_factory=lambda: defaultdict(list))
    leaving: deque[Blob] = field(default_factory=deque)


class Ticket:
    """The right of one graph to take a blob back. Where the graph is dropped unused, the blob is discarded."""

    def __init__(self, shelf: Shelf, owner: Pass, blob: Blob) -> None:
        self._shelf, self._owner, self._blob = shelf, owner, blob

    def take(self) -> tuple[torch.Tensor, Hold | None]:
        """The blob's tensor, and the meter's claim on it. Raises as Shelf.take."""
        tensor = self._shelf.take(self._owner, self._blob)
        return tensor, self._shelf.claim(tensor)

    def __del__(self) -> None:
        # The garbage collector may call this on any thread: the shelf discards the blob when its own thread comes.
        self._shelf.dropped.append((self._owner, self._blob))


class Shelf:
    """Keeps the order above for one rank.

    Args:
        stack: the rank's tiers; None where the plan moves nothing.
        prefetch_layers: for how many block calls ahead of the one in backward the loads start.
        meter: counts what is in flight on the device; None counts nothing.

    Attributes:
        weights: where gradients of weights wait, in a pipeline that computes them in passes of their own.
        dropped: blobs whose ticket is gone; those that were not taken are discarded when the next block starts.
    """

    def __init__(self, stack: TierStack | None, prefetch_layers: int, meter: Meter | None) -> None:
        self._stack = stack
        self._prefetch_layers = prefetch_layers
        self._meter = meter
        self._passes: dict[tuple[int, int, int], Pass] = {}
        self._num_calls = 0
        self._current: Pass | None = None
        self.weights: WeightQueue | None = None
        self._order: Sequence[Call] = ()
        self._places: dict[Call, int] = {}
        self.dropped: deque[tuple[Pass, Blob]] = deque()

    def begin(self, step: int, micro_batch: int, *, seed: int = 0, row: int = 0, stage: int = 0) -> None:
        """Open a pass. Raises RuntimeError where the same pass is open and still waits for its backward."""
        self._discard_dropped()
        self._passes = {name: p for name, p in self._passes.items() if p.waiting}
        if (step, micro_batch, stage) in self._passes:
            raise RuntimeError(
                f"step {step}, micro-batch {micro_batch} began twice: layers {self.waiting_layers()} of it still wait "
                "for their backward pass; run it, or call abort()"
            )
        self._current = self._passes[step, micro_batch, stage] = Pass(step, micro_batch, stage, seed, row)

    def follow(self, order: Sequence[Call]) -> None:
        """Know the order of all block calls until close_passes; none: a pass's backward follows its forward."""
        self._order, self._places = order, {call: place for place, call in enumerate(order)}

    def waiting_layers(self) -> list[int]:
        """Layers that have a blob in a tier, each once, in forward order."""
        return list(dict.fromkeys(blob.key.layer for p in self._passes.values() for blob in p.waiting.values()))

    @property
    def is_metered(self) -> bool:
        """Whether somebody counts what is claimed."""
        return self._meter is not None

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
        self.follow(())

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
        self._discard_dropped()
        current = self._current
        current.turn += 1
        self._finish_old_stores()
        if self._order:
            for each, ahead in self._backward_ahead(current, current.turn, is_backward=False):
                if each is not current:
                    self._load_ahead(each, ahead)
        return current, current.turn

    def put(
        self,
        layer: int,
        name: str,
        span: Span,
        tensor: torch.Tensor,
        medium: Medium,
        *,
        use: int = 0,
        into: Into | None = None,
    ) -> Blob:
        """Start moving a span of a tensor of block `layer`, whose turn it is; it must not be changed any more."""
        current = self._current
        assert current is not None, "take_turn comes first"
        assert self._stack is not None, "apply_memory asks for a stack where a plan moves anything"
        source = tensor.detach().contiguous()
        # A block may be called again in one pass, with other tensors of the same names: the call is the owner.
        owner = f"call{current.turn}"
        key = BlobKey(owner, layer, name, span[0], span[1], current.step, current.micro_batch)
        # Without an order: backward takes the block calls in reverse.
        call = Call(current.micro_batch, current.stage, current.turn, is_backward=True)
        self._stack.prepare_store(key, source, medium, next_use=self._places.get(call, -current.turn))
        blob = Blob(key, current.turn, self._num_calls, use, source.nbytes, source, into)
        current.waiting[key] = blob
        current.of_turn[blob.turn].append(blob)
        current.leaving.append(blob)
        return blob

    def put_for_graph(
        self, layer: int, name: str, span: Span, tensor: torch.Tensor, medium: Medium, *, use: int = 0
    ) -> Ticket:
        """As put, for a tensor that one graph uses."""
        assert self._current is not None, "take_turn comes first"
        return Ticket(self, self._current, self.put(layer, name, span, tensor, medium, use=use))

    def count_sources(self, owner: Pass, turn: int) -> None:
        """Tell the meter what block call `turn` left on its way out, now that the block itself no longer counts it."""
        for blob in owner.of_turn.get(turn, ()):
            if blob.source is not None and blob.hold is None and self._meter is not None:
                blob.hold = self._meter.hold(blob.source)

    def prefetch(self, owner: Pass, turn: int) -> None:
        """Start the loads of block call `turn` and of the calls before it, in the order of use.

        The meter is told about those before it; the call at work counts its own.
        """
        self._finish_old_stores(but=owner)
        for blob in self._by_use(owner, turn):
            self._release(blob)
            self._start_load(blob, at_work=True)
        first = turn - self._prefetch_layers
        for blob in reversed(owner.leaving):
            if not first <= blob.turn <= turn:
                self._finish_store(blob)
        owner.leaving = deque(blob for blob in owner.leaving if blob.source is not None)
        for each, ahead in self._backward_ahead(owner, turn, is_backward=True):
            self._load_ahead(each, ahead)

    def _backward_ahead(self, owner: Pass, turn: int, *, is_backward: bool) -> list[tuple[Pass, int]]:
        """Of the `prefetch_layers` block calls behind one those in backward, in their order."""
        if not self._order:
            ahead = range(turn - 1, max(0, turn - 1 - self._prefetch_layers), -1) if is_backward else ()
            return [(owner, turn) for turn in ahead]
        begin, found = 1 + self._places[Call(owner.micro_batch, owner.stage, turn, is_backward)], []
        for call in self._order[begin : begin + self._prefetch_layers]:
            each = self._passes.get((owner.step, call.micro_batch, call.stage))
            if call.is_backward and each is not None:
                found.append((each, call.turn))
        return found

    def _load_ahead(self, owner: Pass, turn: int) -> None:
        for blob in self._by_use(owner, turn):
            self._start_load(blob, at_work=False)

    @staticmethod
    def _by_use(owner: Pass, turn: int) -> list[Blob]:
        return sorted(owner.of_turn.get(turn, ()), key=lambda blob: blob.use)

    def take(self, owner: Pass, blob: Blob) -> torch.Tensor:
        """The blob's tensor, back on the device. Its slot is free now.

        Raises:
            RuntimeError: it was taken before, or the pass was aborted.
        """
        stack = self._open_stack
        if owner.waiting.get(blob.key) is not blob:
            key = blob.key
            raise RuntimeError(
                f"{key.name} of layer {key.layer} (step {key.step}, micro-batch {key.micro_batch}) is gone: it serves "
                "one backward pass, and that has run or was aborted; run forward again"
            )
        self._start_load(blob, at_work=True)
        tensor = stack.complete_load(blob.key)
        if stack.state(blob.key) is BlobState.storing:
            stack.complete_store(blob.key)  # raises if the write failed, and lets go of the source
        self._forget(owner, blob)
        stack.discard(blob.key)
        return tensor

    def abort(self) -> None:
        """Drop everything that is stored or in flight. No transfer is completed: one that failed would fail again.

        Raises:
            RuntimeError: the tiers are closed. All the same nothing waits here any more.
        """
        with CleanUps() as closing:
            closing.callback(self.close_passes)
            for owner in self._passes.values():
                for blob in list(owner.waiting.values()):
                    closing.callback(self._open_stack.discard, blob.key)
                    self._forget(owner, blob)

    @property
    def _open_stack(self) -> TierStack:
        assert self._stack is not None, "there is no blob without a stack"
        return self._stack

    def _discard_dropped(self) -> None:
        while self.dropped:
            owner, blob = self.dropped.popleft()
            if owner.waiting.get(blob.key) is blob:
                self._forget(owner, blob)
                self._open_stack.discard(blob.key)

    def _finish_old_stores(self, but: Pass | None = None) -> None:
        """One more block call has begun: release what has had its time, of all passes but one."""
        self._num_calls += 1
        for each in self._passes.values():
            while each is not but and each.leaving and self._num_calls - each.leaving[0].call >= STORES_IN_FLIGHT:
                self._finish_store(each.leaving.popleft())

    def _finish_store(self, blob: Blob) -> None:
        if blob.source is not None and self._open_stack.state(blob.key) is BlobState.storing:
            self._open_stack.complete_store(blob.key)
            blob.source = None
            self._release(blob)

    def _start_load(self, blob: Blob, *, at_work: bool) -> None:
        state = self._open_stack.state(blob.key)
        if state is BlobState.storing:
            self._open_stack.prepare_load(blob.key)
        elif state is BlobState.stored:
            if self._meter is not None and not at_work:
                blob.hold = self._meter.reserve(blob.num_bytes)
            into = None if blob.into is None else blob.into(at_work)
            self._open_stack.prepare_load(blob.key, into=into)

    def _forget(self, owner: Pass, blob: Blob) -> None:
        blob.source = blob.into = None
        self._release(blob)
        if owner.waiting.pop(blob.key, None) is not None:
            owner.of_turn[blob.turn].remove(blob)

    @staticmethod
    def _release(blob: Blob) -> None:
        if blob.hold is not None:
            blob.hold.release()
            blob.hold = None
