"""States of scans from chunk to chunk, and their gradients on the way back.

The state before a chunk is what a scan needs of all earlier tokens. Stage 1 hands it from chunk to chunk and keeps it
where the plan places keys and values of the chunk's first token; stage 2 takes it from there. The gradient of a state
goes from every chunk to the one before it, and is on the device: one per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from headrace.storage.core.cleanup import CleanUps
from headrace.workers.memory.chunk_plan import LOADS_AHEAD
from headrace.workers.memory.kv_blocks import KvBlocks, StateShape
from headrace.workers.memory.meter import Hold, Meter
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.model.program import Program, RowPart
from headrace.workers.model.scan import ScanRule
from headrace.workers.model.segments import TensorSpec
from headrace.workers.model.skeleton import Span

if TYPE_CHECKING:
    from headrace.storage.stack import TierStack


@dataclass
class _Kind:
    """States of one kind, of all layers that have it, in order."""

    blocks: KvBlocks
    layers: list[int] = field(default_factory=list)
    shape: StateShape | None = None


class ChunkStates:
    """States of all layers before every chunk, and the gradients of those behind the chunk at hand.

    Args:
        stack: the rank's tiers; None where no state moves.
        meter: counts what is on the device; None counts nothing.
    """

    def __init__(self, stack: TierStack | None, meter: Meter | None) -> None:
        self._stack, self._meter = stack, meter
        self._plan: MemoryPlan | None = None
        self._pass = (0, 0)
        self._kinds: dict[TensorSpec, _Kind] = {}
        # The newest state of a scan that has been written: the number of its block.
        self._written: dict[tuple[TensorSpec, int], int] = {}
        self._gradients: dict[tuple[TensorSpec, int], tuple[torch.Tensor, Hold | None]] = {}
        self._chunk, self._number = RowPart((0, 0), 0), 0

    def add(self, spec: TensorSpec, layer: int) -> None:
        """A layer has such a state."""
        kind = self._kinds.setdefault(spec, _Kind(KvBlocks(spec.name, self._stack, self._meter)))
        kind.layers.append(layer)

    def begin(self, plan: MemoryPlan, step: int, micro_batch: int) -> None:
        """Start a pass; the states of the one before are gone."""
        self._plan, self._pass = plan, (step, micro_batch)
        self._written.clear()
        for kind in self._kinds.values():
            kind.shape = None

    def enter(self, chunk: RowPart) -> None:
        """The next chunk begins."""
        assert self._plan is not None, "begin comes first"
        self._chunk = chunk
        self._number = self._plan.cuts.chunk_spans(chunk.num_tokens).index(chunk.span)
        for kind in self._kinds.values():
            kind.blocks.settle()

    def before(self, spec: TensorSpec, layer: int, zero: torch.Tensor) -> torch.Tensor:
        """(B, 1, width): the state before the chunk. `zero`: that before the first one."""
        kind = self._kind(spec, zero)
        if self._number == 0:
            return zero
        following = kind.layers[kind.layers.index(layer) + 1 :][:LOADS_AHEAD]
        for place in ((other, self._number - 1) for other in (layer, *following)):
            kind.blocks.want(place)
        return kind.blocks.get((layer, self._number - 1))[0]

    def leave(self, spec: TensorSpec, layer: int, state: torch.Tensor) -> None:
        """The state behind the chunk, (B, 1, width), unless it has been written: then stage 2 is here."""
        kind = self._kinds[spec]
        assert kind.shape is not None, "before comes first"
        if self._number == kind.shape.num_blocks or self._written.get((spec, layer), -1) >= self._number:
            return
        self._written[spec, layer] = self._number
        if self._number > 0:
            kind.blocks.put((layer, self._number - 1), changed=True)
        kind.blocks.new((layer, self._number))[0] = state

    def gradient(self, spec: TensorSpec, layer: int) -> torch.Tensor | None:
        """The gradient of the state behind the chunk, (B, 1, width); None: no later chunk."""
        grad, hold = self._gradients.pop((spec, layer), (None, None))
        if hold is not None:
            hold.release()
        return grad

    def leave_gradient(self, spec: TensorSpec, layer: int, grad: torch.Tensor) -> None:
        """The gradient of the state before the chunk; the state itself is finished."""
        if self._number == 0:
            return
        blocks, place = self._kinds[spec].blocks, (layer, self._number - 1)
        blocks.drop(place)
        self._keep_gradient(spec, layer, grad)
        if layer in self._kinds[spec].layers[:LOADS_AHEAD] and self._number > 1:
            blocks.want((layer, self._number - 2))

    def kinds(self) -> list[KvBlocks]:
        """The blocks of every kind of state, always in the same order."""
        return [kind.blocks for kind in self._kinds.values()]

    def shapes(self) -> list[tuple[int, torch.dtype] | None]:
        """Rows and dtype of every kind; None where no chunk has met it."""
        found = [kind.shape for kind in self._kinds.values()]
        return [None if shape is None else (shape.batch_size, shape.dtype) for shape in found]

    def gradients(self) -> dict[tuple[int, int], torch.Tensor]:
        """Gradients of the states before the chunk that has just been done, by number of the kind and layer."""
        numbers = {spec: number for number, spec in enumerate(self._kinds)}
        return {(numbers[spec], layer): grad for (spec, layer), (grad, _) in self._gradients.items()}

    def reopen(
        self,
        shapes: Sequence[tuple[int, torch.dtype] | None],
        gradients: Mapping[tuple[int, int], torch.Tensor],
        num_tokens: int,
        device: torch.device,
    ) -> None:
        """Go on with a pass that another process has begun: all states are written; blocks are restored next.

        Raises:
            ValueError: there are other kinds.
        """
        for (spec, kind), shape in zip(self._kinds.items(), shapes, strict=True):
            if shape is not None:
                self._open(kind, StateShape(self._spans(num_tokens), shape[0], spec.width, shape[1], device))
                self._written.update(((spec, layer), len(self._spans(num_tokens))) for layer in kind.layers)
        specs = list(self._kinds)
        for (number, layer), grad in gradients.items():
            if number >= len(specs):
                raise ValueError(f"a gradient of the state {number}, and there are {len(specs)}")
            self._keep_gradient(specs[number], layer, grad)

    def drop_all(self) -> None:
        """Every state is finished."""
        for _, hold in self._gradients.values():
            if hold is not None:
                hold.release()
        self._gradients.clear()
        with CleanUps() as closing:
            for kind in self._kinds.values():
                closing.callback(kind.blocks.drop_all)

    def free(self) -> None:
        """Give the memory back that passes share."""
        for kind in self._kinds.values():
            kind.blocks.free()

    def _kind(self, spec: TensorSpec, zero: torch.Tensor) -> _Kind:
        kind = self._kinds[spec]
        if kind.shape is None:
            chunks = self._spans(self._chunk.num_tokens)
            self._open(kind, StateShape(chunks, len(zero), spec.width, zero.dtype, zero.device))
        return kind

    def _open(self, kind: _Kind, shape: StateShape) -> None:
        assert self._plan is not None, "begin comes first"
        kind.shape = shape
        kind.blocks.begin(shape, self._plan.kv, *self._pass)

    def _spans(self, num_tokens: int) -> tuple[Span, ...]:
        assert self._plan is not None, "begin comes first"
        return tuple(self._plan.cuts.chunk_spans(num_tokens))

    def _keep_gradient(self, spec: TensorSpec, layer: int, grad: torch.Tensor) -> None:
        self._gradients[spec, layer] = grad, None if self._meter is None else self._meter.hold(grad)


@dataclass(frozen=True, kw_only=True)
class ChunkScan(ScanRule):
    """A scan over a chunk: its state comes from the chunk before, the gradient of its state from the one behind."""

    states: ChunkStates
    layer: int

    def first_state(self, like: torch.Tensor) -> torch.Tensor:
        return self.states.before(self.state, self.layer, super().first_state(like))

    def leave(self, state: torch.Tensor) -> None:
        self.states.leave(self.state, self.layer, state)

    def last_gradient(self, like: torch.Tensor) -> torch.Tensor:
        grad = self.states.gradient(self.state, self.layer)
        return super().last_gradient(like) if grad is None else grad

    def leave_gradient(self, grad: torch.Tensor) -> None:
        self.states.leave_gradient(self.state, self.layer, grad)


def with_states(program: Program, states: ChunkStates, layer: int) -> Program:
    """The same block on a chunk: its scans go on from the chunk before."""
    rules = []
    for rule in program.rules:
        if isinstance(rule, ScanRule):
            states.add(rule.state, layer)
            rule = ChunkScan(rule.segment, rule.function, rule.gradient, states=states, layer=layer)
        rules.append(rule)
    return replace(program, rules=tuple(rules))
