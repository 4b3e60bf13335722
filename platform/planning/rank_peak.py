"""Most bytes on the device of a pipeline's rank in a step: its action list, block call by block call. No torch.

What the rank holds follows from the list (workers/parallel/pipeline/moments.py), what a block takes at work from its
layer plan (footprint.py), and what is on its way to a tier or back from the calls before and behind (shelf.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from headrace.platform.planning.cost import is_tied
from headrace.platform.planning.predict import BlockCost, StepCost, device_peak_bytes
from headrace.platform.planning.request import PlanRequest
from headrace.workers.memory.footprint import Footprint
from headrace.workers.memory.head_bytes import WIDE_BYTES, tied_head_bytes
from headrace.workers.memory.plan import MemoryPlan, Residence, input_layer
from headrace.workers.parallel.pipeline.actions import Op
from headrace.workers.parallel.pipeline.moments import CALLING, Moment, Pass, RankPasses


def solver_cost(request: PlanRequest) -> StepCost:
    """The cost with which a solver's linear prices make the peak: of a pipeline's rank with the right one of one plan.

    The prices count a rank's blocks as if all were alike, and nothing that is there beside them. What they lack or have
    too much with blocks that hold their inputs alone is added to the fixed bytes.
    """
    cost = request.cost()
    if request.passes is None:
        return cost
    layer, number = input_layer(request.skeleton(), Residence.hbm), request.model.num_layers
    plan = MemoryPlan("inputs", (layer,) * number, cuts=request.cuts(), prefetch_layers=request.prefetch_layers)
    priced = device_peak_bytes([request.shape().cost(layer)] * number, request.prefetch_layers, cost)
    gap = rank_peak_bytes(plan, request, request.passes) - priced
    return replace(cost, fixed_bytes=cost.fixed_bytes + gap)


def rank_peak_bytes(plan: MemoryPlan, request: PlanRequest, passes: RankPasses) -> int:
    """Under a plan of the rank's blocks, which may differ from block to block."""
    step = _Step(plan, request, passes)
    return step.fixed_bytes + max(step.held_bytes(each) + step.work_bytes(each) for each in passes.moments)


@dataclass(frozen=True)
class _Stage:
    """A stage's blocks, in order; the final norm is one more.

    Args:
        feet: of the blocks.
        sums: bytes of the sums of gradients of each, where those of several micro-batches are added up.
    """

    feet: tuple[Footprint, ...]
    sums: tuple[int, ...]
    norm: BlockCost | None

    @cached_property
    def held(self) -> list[int]:
        """What the blocks before each one hold of a micro-batch, and all of them."""
        held = [foot.held for foot in self.feet] + ([] if self.norm is None else [self.norm.held])
        return list(accumulate(held, initial=0))

    @cached_property
    def away(self) -> list[int]:
        """Bytes that each block sends to tiers."""
        return [sum(foot.away.values()) for foot in self.feet] + ([] if self.norm is None else [0])

    def calls(self, op: Op, *, is_summed: bool) -> Iterator[int]:
        """Bytes of the stage's micro-batch at work at every block call of a pass, in the order of the calls."""
        norm, number = self.norm, len(self.feet)
        if op is Op.forward:
            yield from (self.held[k] + foot.forward for k, foot in enumerate(self.feet))
            if norm is not None:
                yield self.held[number] + norm.forward
            return
        if norm is not None:
            yield self.held[number] + norm.backward
        left = 0  # by the blocks behind, in the queue or as new sums
        for k in reversed(range(number)):
            foot = self.feet[k]
            if op is Op.input_grad:
                own, more = foot.split, foot.queued
            else:
                own, more = (foot.beside_sums, 0) if is_summed else (foot.backward, self.sums[k])
            yield self.held[k] + own + left
            left += more


class _Step:
    """A rank under a plan."""

    def __init__(self, plan: MemoryPlan, request: PlanRequest, passes: RankPasses) -> None:
        self.request, self.passes, self.prefetch_layers = request, passes, plan.prefetch_layers
        # Without the look-up no block at work waits for the gradient of a tied head: it is counted where it is.
        self.cost: StepCost = replace(request, has_lookup=False).cost()
        self.stages = list(self._stages(plan))
        tokens = -(-request.batch_size * request.seq_len // request.num_sharers)
        self.hidden_bytes = tokens * request.model.hidden_size * request.itemsize

    def _stages(self, plan: MemoryPlan) -> Iterator[_Stage]:
        skeletons, begin = self.request.skeletons(), 0
        for at, count in enumerate(self.passes.counts):
            layers = range(begin, begin := begin + count)
            shapes = (replace(self.request.shape(plan, layer), cuts=plan.cuts) for layer in layers)
            feet = tuple(shape.footprint(plan.layers[layer]) for layer, shape in zip(layers, shapes, strict=True))
            wide = max(WIDE_BYTES, self.request.itemsize) * self.passes.splits
            sums = tuple(wide * sum(s.trained for s in skeletons[layer].segments) for layer in layers)
            yield _Stage(feet, sums, self.cost.norm if at == self.passes.last else None)

    @property
    def fixed_bytes(self) -> int:
        """What does not follow from the list."""
        cost, passes = self.cost, self.passes
        tables = self.request.in_flight * len(passes.counts) * (cost.table_bytes + cost.token_bytes)
        return cost.fixed_bytes - tables - sum(sum(stage.sums) for stage in self.stages)

    def _pass_bytes(self, at: int) -> int:
        """Of a pass of a stage, from its forward to its backward, beside what its blocks hold."""
        return self.cost.table_bytes + self.cost.token_bytes * (at == self.passes.first)

    def held_bytes(self, moment: Moment) -> int:
        """Beside the pass at work."""
        cost, passes = self.cost, self.passes
        found = moment.messages * self.hidden_bytes + moment.narrow * self.hidden_bytes
        found += moment.wide * self.hidden_bytes * max(WIDE_BYTES, self.request.itemsize) // self.request.itemsize
        for at, stage in enumerate(self.stages):
            each = stage.held[-1] + self._pass_bytes(at) + cost.head_bytes * (at == passes.last)
            found += moment.open[at] * each + moment.queued[at] * sum(foot.queued for foot in stage.feet)
            found += sum(stage.sums) * moment.summed[at]
        return found

    def work_bytes(self, moment: Moment) -> int:
        """Of the pass at work."""
        (op, at), cost = moment.work, self.cost
        if op in (Op.scores, Op.vocabulary_grad):
            return cost.head_transient_bytes
        if op not in CALLING:
            return 0
        stage, passes = self.stages[at], self.passes
        calls = stage.calls(op, is_summed=moment.summed[at])
        moved = self._moved(moment, len(stage.away))
        found = max(map(sum, zip(calls, moved, strict=True))) + cost.block_transient_bytes
        if at == passes.last and not passes.is_shared:
            if op is Op.forward:
                found = max(found, stage.held[-1] + cost.head_bytes + cost.head_transient_bytes)
            elif passes.first is not None and is_tied(self.request.model, self.request.adapter):
                model = self.request.model
                found += tied_head_bytes(model.vocab_size, model.hidden_size, self.request.itemsize)
        return found + self._pass_bytes(at)

    def _moved(self, moment: Moment, number: int) -> Iterator[int]:
        """Bytes on their way out or back, of other blocks than the one at work, at every block call of a pass."""
        before = [] if moment.before is None else self._away(moment.before)[-1:]
        after = [call for each in moment.after for call in self._away(each)]
        calls = [*before, *self._away(moment.work), *after]
        for place in range(len(before), len(before) + number):
            # Sources of what the call before has sent, and the loads of those behind.
            sent = [num_bytes for is_forward, num_bytes in calls[max(0, place - 1) : place] if is_forward]
            ahead = calls[place + 1 : place + 1 + self.prefetch_layers]
            yield sum(sent) + sum(num_bytes for is_forward, num_bytes in ahead if not is_forward)

    def _away(self, each: Pass) -> list[tuple[bool, int]]:
        """Of the block calls of a pass: whether it is a forward, and the bytes that the block moves."""
        is_forward, away = each.op is Op.forward, self.stages[each.place].away
        return [(is_forward, num_bytes) for num_bytes in (away if is_forward else reversed(away))]
