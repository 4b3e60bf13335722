"""The sweep by layer: one autograd.Function per block that runs the block's program and keeps what the plan says.

    forward    token segments (norms, projections, MLP) run in tiles of tokens, attention over the whole sequence; every
               skeletal tensor is placed as soon as it is made, everything else is dropped with its tile
    backward   1. what attention needs and nothing holds is made again
               2. the token segments behind attention, tile by tile: what the tile lacks is made again, then gradients
               3. attention's gradient from q, k, v, out and LSE
               4. the token segments before attention, tile by tile

The course (course.py) says what runs, and what runs again, on which tokens. Gradients of parameters are added up over
the tiles in fp32 and handed to autograd once, so FSDP2 reduces every block's gradients once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from headrace.workers.memory.course import Course, Rerun, Restored, Tile, Work, course_of
from headrace.workers.memory.flow import Carry, Flow
from headrace.workers.memory.footprint import Footprint, footprint
from headrace.workers.memory.held import Held
from headrace.workers.memory.plan import Cuts, LayerPlan, Residence, input_layer
from headrace.workers.memory.schedule import Schedule
from headrace.workers.memory.shelf import Shelf
from headrace.workers.memory.weight_queue import Product
from headrace.workers.model.claims import check_tensors
from headrace.workers.model.param_sums import ParamSums
from headrace.workers.model.program import Draw, LinearRule, Mixing, PointwiseRule, Program, Rule, Shared, Tensors
from headrace.workers.model.scan import ScanRule
from headrace.workers.model.skeleton import Segment, Span, TensorSpec

# Shapes of inputs for which a block remembers its course: more than a plan has lengths of rows or chunks.
MOST_SHAPES = 32


@dataclass(frozen=True, kw_only=True)
class PlannedBlock:
    """One block and what is fixed for all its calls.

    Args:
        layer: index of the block.
        schedule: of the program's skeleton; programs that share a skeleton share it.
        plan / cuts: the block's layer plan, and where tokens are cut.
        carry: where several calls add up their gradients; None: every call hands over its own.
    """

    block: nn.Module
    layer: int
    program: Program
    schedule: Schedule
    plan: LayerPlan
    cuts: Cuts
    shelf: Shelf
    carry: Carry | None = None

    def run(self, x: torch.Tensor, shared: Shared) -> torch.Tensor:
        """The block's output, (B, T, H), with a gradient for x and for the block's parameters."""
        call = BlockCall(self, shared)
        params = call.parameters()
        return _Block.apply(call, params, x, *params.values())

    def course(self, x: torch.Tensor) -> tuple[Course, Footprint]:
        """What the block does with an input (B, T, H), and its bytes on the device meanwhile."""
        key = (x.shape, x.dtype, x.device.type)
        found = self._courses.get(key)
        if found is None:
            if len(self._courses) == MOST_SHAPES:
                self._courses.clear()
            batch_size, num_tokens, _ = x.shape
            found = self._courses[key] = (
                course_of(self.schedule, self.plan, self.cuts, num_tokens),
                footprint(
                    *(self.schedule, self.plan, self.cuts),
                    batch_size=batch_size,
                    num_tokens=num_tokens,
                    itemsize=x.itemsize,
                    casts_products=not x.is_cuda,
                    splits=self.shelf.weights is not None,
                ),
            )
        return found

    @cached_property
    def parameters(self) -> Callable[[], Tensors]:
        """See Program.reader."""
        return self.program.reader(self.block)

    @cached_property
    def _courses(self) -> dict[tuple[object, ...], tuple[Course, Footprint]]:
        return {}

    def pass_through(self, x: torch.Tensor, shared: Shared, *, to_keys: bool = False) -> torch.Tensor:
        """The block's output, without a gradient; nothing is held for one.

        Args:
            to_keys: stop when attention has received its keys and values, a scan its tokens; what comes back is x.
        """
        return BlockCall(self._passing, shared).forward(x, to_keys=to_keys)

    @cached_property
    def _passing(self) -> PlannedBlock:
        return replace(self, plan=input_layer(self.schedule.skeleton, Residence.hbm))


class BlockCall:
    """One call of one block, and its backward: the steps of its course (course.py), one after another.

    Args:
        shared: rope tables and packing of the pass.
    """

    def __init__(self, planned: PlannedBlock, shared: Shared) -> None:
        self.layer, self._shelf, self._planned = planned.layer, planned.shelf, planned
        self._rules, self.parameters = planned.program.rule_of, planned.parameters
        self._schedule = planned.schedule
        self._owner, self._turn = planned.shelf.take_turn()
        self._queue = planned.shelf.weights if self._schedule.has_products else None
        self.carry = planned.carry if self._queue is None else self._queue.carry(planned.layer, self.parameters)
        draw = Draw(self._owner.seed, self._owner.step, planned.layer, self._owner.row, shared.draw.token)
        self._shared = Shared(shared.rope, shared.packing, draw)

    def forward(self, x: torch.Tensor, params: Tensors | None = None, *, to_keys: bool = False) -> torch.Tensor:
        """(B, T, H) to (B, T, H), without autograd. `to_keys`: see PlannedBlock.pass_through."""
        self._num_tokens, self._like = x.shape[1], x.new_empty(x.shape[0], 0)
        self._all = (0, self._num_tokens)
        self._course, self._footprint = self._planned.course(x)
        self._held = Held(self.layer, self._course.together, self._schedule, self._shelf, self._owner, x)
        self._tables = [self._shelf.claim(table) for table in self._shared.rope]
        self._params = self.parameters() if params is None else params
        with self._shelf.at_work(self._footprint.forward):
            y = self._forward(x, to_keys)
        del self._params
        self._held.claim()
        self._shelf.count_sources(self._owner, self._turn)
        return y

    def backward(self, grad: torch.Tensor, wanted: Iterable[str]) -> tuple[torch.Tensor, ParamSums]:
        """The gradient of x, and those of the parameters that want one."""
        self._held.release()
        self._shelf.prefetch(self._owner, self._turn)
        self._params = self.parameters()
        with self._shelf.at_work(self._backward_bytes):
            found = self._backward(grad, wanted)
        del self._params
        if self._queue is not None:
            self._queue.claim(self.layer)
        for hold in self._tables:
            if hold is not None:
                hold.release()
        return found

    @property
    def _backward_bytes(self) -> int:
        """That backward takes beside what the meter knows: of a split one, the sums of earlier micro-batches."""
        if self._queue is None or self.carry is None or self.carry.sums is None:
            return self._footprint.backward
        return self._footprint.split if self._queue.is_open else self._footprint.beside_sums

    def _forward(self, x: torch.Tensor, to_keys: bool) -> torch.Tensor:
        skeleton, every = self._schedule.skeleton, self._all
        whole = {skeleton.root.name: x}
        self._held.put(every, self._course.root, whole)
        for index, work in enumerate(self._course.works):
            is_last = to_keys and index == self._schedule.last_mix
            if work.mixes:
                rule = cast(Mixing, self._rules[work.segments[0]])
                rule.receive(whole)
                if is_last:
                    return x
                made = self._mix(rule, whole, self._course.queries, is_forward=True)
            else:
                made = self._forward_group(work, whole, to_keys=is_last)
                if is_last:
                    return x
            if work.placing is not None:
                made |= self._held.put(every, work.placing, made)
            whole |= made
            del made  # what nothing reads goes before the next group runs
            for name in work.done:
                del whole[name]
        return whole[skeleton.result]

    def _backward(self, grad: torch.Tensor, wanted: Iterable[str]) -> tuple[torch.Tensor, ParamSums]:
        skeleton, works = self._schedule.skeleton, self._course.works
        if self.carry is None:
            num_tiles = max(len(work.tiles) for work in works) * skeleton.head_groups
            sums = ParamSums(self._params, wanted, num_tiles=num_tiles)
        else:
            sums = self.carry.add_to(self._params, wanted)
        grads: Tensors = {skeleton.result: grad}
        for work in reversed(works):
            for restored in work.restored:
                self._restore(restored)
            if work.mixes:
                rule = cast(Mixing, self._rules[work.segments[0]])
                values = {name: self._held.get(name, self._all) for name in rule.segment.needs}
                grads |= rule.backward(values, grads.pop(rule.segment.made[0]), self._shared)
                del values
            else:
                self._backward_group(work, grads, sums)
            for name in work.used:
                self._held.drop(name)
        return grads[skeleton.root.name], sums

    def _check(self, segment: Segment, specs: Iterable[TensorSpec], tensors: Tensors, span: Span) -> None:
        """Refuse tensors on a span, or their gradients, that are not as the skeleton says."""
        check_tensors(segment, specs, tensors, self._like, span[1] - span[0], self.layer)

    def _scans(self, work: Work) -> dict[str, ScanRule]:
        """Of a group, by the names of their states."""
        return {rule.state.name: rule for rule in (self._rules[s] for s in work.scans) if isinstance(rule, ScanRule)}

    def _forward_group(self, work: Work, whole: Tensors, *, to_keys: bool) -> Tensors:
        """Run a group in tiles. Returns the crossing tensors whole; other skeletal ones are placed tile by tile.

        Args:
            to_keys: up to its last scan.
        """
        made: Tensors = {}
        scans = self._scans(work)
        states = {name: rule.first_state(self._like) for name, rule in scans.items()}
        for tile in work.tiles:
            values = {name: _of_span(whole[name], tile.span, self._num_tokens) for name in work.reads} | states
            for step in tile.steps[: work.num_to_keys] if to_keys else tile.steps:
                rule = self._rules[step.segment]
                if isinstance(rule, ScanRule):
                    results, states[rule.state.name] = rule.advance(values, tile.span, self._shared)
                else:
                    results = rule.run(self._params, values, tile.span, self._shared)
                    self._check(step.segment, step.segment.makes, results, tile.span)
                for name in step.crossing:
                    self._write(made, name, tile.span, results[name], room=self._held.room(name))
                values |= results
                if step.placing is not None:
                    values |= self._held.put(tile.span, step.placing, results)
                del results  # what shares a blob lies in other memory now
                for name in step.done:
                    del values[name]
        for name, rule in scans.items():
            rule.leave(states[name])
        return made

    def _mix(self, rule: Rule, values: Tensors, spans: Iterable[Span], *, is_forward: bool = False) -> Tensors:
        """Attention's output and LSE for these queries; other rows of the results are undefined."""
        made: Tensors = {}
        q = rule.segment.reads[0]
        for span in spans:
            parts = {**values, q: _of_span(values[q], span, self._num_tokens)}
            results = rule.run(self._params, parts, span, self._shared)
            self._check(rule.segment, rule.segment.makes, results, span)
            for name, tensor in results.items():
                self._write(made, name, span, tensor, room=self._held.room(name) if is_forward else None)
        return made

    def _restore(self, restored: Restored) -> None:
        """Make what attention's gradient and the earlier groups need of a group, and nothing holds."""
        held = self._held
        if not restored.mixes:
            for rerun in restored.reruns:
                self._rerun(rerun)
            return
        ((segment, _),) = restored.reruns[0].segments
        values = {name: held.get(name, self._all) for name in segment.reads}
        made = self._mix(self._rules[segment], values, [rerun.span for rerun in restored.reruns])
        for rerun in restored.reruns:
            ((_, names),) = rerun.segments
            for name in names:
                held.add(name, rerun.span, _of_span(made[name], rerun.span, self._num_tokens))
        del values
        for name in restored.spent:
            held.drop(name)

    def _rerun(self, rerun: Rerun) -> None:
        values: Tensors = {}
        for segment, names in rerun.segments:
            reads = {n: values[n] if n in values else self._held.get(n, rerun.span) for n in segment.reads}
            values |= self._rules[segment].run(self._params, reads, rerun.span, self._shared)
            for name in names:
                self._held.add(name, rerun.span, values[name])

    def _backward_group(self, work: Work, grads: Tensors, sums: ParamSums) -> None:
        """From the gradients of what a group makes, in `grads`, to those of what it reads from outside, whole."""
        given = {name: grads.pop(name) for name in work.crossing if name in grads}
        there, scans = frozenset(grads), self._scans(work)
        states = {name: rule.last_gradient(self._like) for name, rule in scans.items()}
        for tile in reversed(work.tiles) if scans else work.tiles:
            flow = Flow({n: _of_span(tensor, tile.span, self._num_tokens) for n, tensor in given.items()} | states)
            self._backward_tile(tile, flow, sums)
            states = {name: flow.grads.pop(name) for name in scans}
            self._gather(grads, there, tile.span, flow.grads)
            del flow  # the next tile runs without them
            for name in work.inner:
                self._held.drop(name, tile.span)
        for name, rule in scans.items():
            rule.leave_gradient(states[name])

    def _gather(self, outside: Tensors, there: frozenset[str], tile: Span, parts: Tensors) -> None:
        for name, part in parts.items():
            if name in there:
                _of_span(outside[name], tile, self._num_tokens).add_(part)
            else:
                self._write(outside, name, tile, part)

    def _backward_tile(self, tile: Tile, flow: Flow, sums: ParamSums) -> None:
        """One tile: make again what it lacks, then go back through the segments."""
        values = self._values_again(tile.again)
        for step in reversed(tile.steps):
            self._segment_back(self._rules[step.segment], flow, values, (tile.span, sums))
            for name in step.segment.made:
                values.pop(name, None)

    # Functions of their own, so that no variable keeps a tensor of a segment alive while the next one runs.
    def _values_again(self, again: Rerun) -> _Values:
        """What the tile lacks."""
        values = _Values(self._held, again.span)
        for segment, names in again.segments:
            reads = {name: values[name] for name in segment.reads}
            made = self._rules[segment].run(self._params, reads, again.span, self._shared)
            for name in names:
                values[name] = made[name]
        return values

    def _segment_back(self, rule: Rule, flow: Flow, values: Tensors, at: tuple[Span, ParamSums]) -> None:
        """The gradients of what a segment reads, from those of what it made."""
        segment, (tile, sums) = rule.segment, at
        own = flow.take(segment.graded)
        if isinstance(rule, LinearRule):
            rows = rule.rows(own)
            if segment.needs and self._queue is not None and self._queue.is_open:
                # A gradient that goes on as that of what the segment adds may be written to.
                is_kept = segment.adds is None or segment.made[0] not in flow.fresh
                self._weight_later(rule, rule.input(values), rows, tile, is_kept=is_kept)
            elif segment.needs:
                rule.grad_weight(self._params, rule.input(values), rows, sums, (tile, self._shared))
            found = rule.of_inputs(rule.grad_input(self._params, rows, tile, self._shared), tile)
        elif isinstance(rule, PointwiseRule):
            found = rule.backward(self._params, values, own, sums, (tile, self._shared))
        elif isinstance(rule, ScanRule):
            needed = {name: values[name] for name in segment.needs}
            found = rule.backward(needed, own, tile, self._shared)
            tensors = self._schedule.skeleton.tensors
            self._check(segment, [tensors[name] for name in segment.reads], found, tile)
        else:
            raise TypeError(f"segment {segment.name}: a {type(rule).__name__} has no gradient on a tile")
        if segment.adds is not None:
            flow.add(segment.adds, own[segment.made[0]], is_fresh=segment.made[0] in flow.fresh)
        for name, part in found.items():
            flow.add(name, part, is_fresh=True)

    def _weight_later(self, rule: LinearRule, x: torch.Tensor, rows: Tensors, tile: Span, *, is_kept: bool) -> None:
        """The gradients of a linear segment's weights wait for their pass W. `is_kept`: nobody writes to `rows`."""
        assert self._queue is not None
        own = rows if is_kept else {name: part.clone() for name, part in rows.items()}
        # Rope tables and packing are not needed, and would wait too.
        self._queue.put(Product(self.layer, rule, x, own, (tile, Shared(draw=self._shared.draw))))

    def _write(
        self, whole: Tensors, name: str, span: Span, part: torch.Tensor, room: torch.Tensor | None = None
    ) -> None:
        """Write rows of a whole tensor: into the room, where there is one."""
        if room is not None:
            assert room.dtype is part.dtype, f"{name} is {part.dtype}, its room {room.dtype}"
            whole[name] = room
        elif span == self._all:
            whole[name] = part
            return
        elif name not in whole:
            whole[name] = part.new_empty(part.shape[0], self._num_tokens, part.shape[2])
        whole[name][:, slice(*span)] = part


class _Values(Tensors):
    """Values of one tile: made here, or held."""

    def __init__(self, held: Held, tile: Span) -> None:
        super().__init__()
        self._held, self._tile = held, tile

    def __missing__(self, name: str) -> torch.Tensor:
        self[name] = tensor = self._held.get(name, self._tile)
        return tensor


class _Block(torch.autograd.Function):
    """apply(call, params by name, x, *params)."""

    @staticmethod
    def forward(ctx: Any, call: BlockCall, named: Tensors, x: torch.Tensor, *params: torch.Tensor) -> Any:
        ctx.call, ctx.names = call, tuple(named)
        return call.forward(x.detach(), named)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        call, ctx.call = ctx.call, None
        if call is None:
            raise RuntimeError("the tensors of a block serve one backward pass, and that has run; run forward again")
        wanted = [name for name, needs in zip(ctx.names, ctx.needs_input_grad[3:], strict=True) if needs]
        dx, sums = call.backward(grad, wanted)
        carry = call.carry
        grads = [sums.take(name) for name in ctx.names] if carry is None else carry.take(ctx.names)
        return None, None, dx, *grads


def _of_span(tensor: torch.Tensor, span: Span, num_tokens: int) -> torch.Tensor:
    return tensor if span == (0, num_tokens) else tensor[:, slice(*span)]
