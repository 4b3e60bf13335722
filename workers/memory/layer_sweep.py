"""The sweep by layer: one autograd.Function per block that runs the block's program and keeps what the plan says.

    forward    token segments (norms, projections, MLP) run in tiles of tokens, attention over the whole sequence; every
               skeletal tensor is placed as soon as it is made, everything else is dropped with its tile
    backward   1. what attention needs and nothing holds is made again
               2. the token segments behind attention, tile by tile: what the tile lacks is made again, then gradients
               3. attention's gradient from q, k, v, out and LSE
               4. the token segments before attention, tile by tile

`rebuild` (rebuild.py) says what runs again, on which tokens. Gradients of parameters are added up over the tiles in
fp32 and handed to autograd once, so FSDP2 reduces every block's gradients once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from headrace.workers.memory.flow import Carry, Flow
from headrace.workers.memory.footprint import footprint
from headrace.workers.memory.held import Held
from headrace.workers.memory.plan import Cuts, LayerPlan, Residence, input_layer
from headrace.workers.memory.rebuild import Rerun, Spans, subtract
from headrace.workers.memory.schedule import Again, Group, Schedule, made_again, outside, tile_reruns, upto_scan
from headrace.workers.memory.shelf import Shelf
from headrace.workers.model.claims import check_tensors
from headrace.workers.model.program import (
    Draw,
    LinearRule,
    ParamSums,
    PointwiseRule,
    Program,
    Rule,
    Shared,
    Tensors,
)
from headrace.workers.model.scan import ScanRule
from headrace.workers.model.skeleton import Reach, Segment, Span


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", _first_equal(self.plan))

    def run(self, x: torch.Tensor, shared: Shared) -> torch.Tensor:
        """The block's output, (B, T, H), with a gradient for x and for the block's parameters."""
        call = BlockCall(self, shared)
        params = call.parameters()
        return _Block.apply(call, tuple(params), x, *params.values())

    def pass_through(self, x: torch.Tensor, shared: Shared, *, to_keys: bool = False) -> torch.Tensor:
        """The block's output, without a gradient; nothing is held for one.

        Args:
            to_keys: stop when attention has received its keys and values, a scan its tokens; what comes back is x.
        """
        only_input = input_layer(self.schedule.skeleton, Residence.hbm)
        return BlockCall(replace(self, plan=only_input), shared).forward(x, to_keys=to_keys)


class BlockCall:
    """One call of one block, and its backward.

    Args:
        shared: rope tables and packing of the pass.
    """

    def __init__(self, planned: PlannedBlock, shared: Shared) -> None:
        self.layer, self._shelf = planned.layer, planned.shelf
        self._program, self.parameters = planned.program, planned.program.reader(planned.block)
        self._schedule, self._plan, self._cuts = planned.schedule, planned.plan, planned.cuts
        self._owner, self._turn = planned.shelf.take_turn()
        self.carry = planned.carry
        draw = Draw(self._owner.seed, self._owner.step, planned.layer, self._owner.row, shared.draw.token)
        self._shared = replace(shared, draw=draw)

    def forward(self, x: torch.Tensor, *, to_keys: bool = False) -> torch.Tensor:
        """(B, T, H) to (B, T, H), without autograd. `to_keys`: see PlannedBlock.pass_through."""
        self._num_tokens, self._like = x.shape[1], x.new_empty(x.shape[0], 0)
        self._footprint = footprint(
            schedule=self._schedule,
            plan=self._plan,
            cuts=self._cuts,
            batch_size=x.shape[0],
            num_tokens=x.shape[1],
            itemsize=x.itemsize,
            casts_products=not x.is_cuda,
        )
        self._held = Held(self.layer, self._plan, self._schedule, self._shelf, self._owner, x)
        self._tables = [self._shelf.claim(table) for table in self._shared.rope]
        with self._shelf.at_work(self._footprint.forward):
            y = self._forward(x, to_keys)
        self._held.claim()
        self._shelf.count_sources(self._owner, self._turn)
        return y

    def backward(self, grad: torch.Tensor, wanted: Iterable[str]) -> tuple[torch.Tensor, ParamSums]:
        """The gradient of x, and those of the parameters that want one."""
        self._held.release()
        self._shelf.prefetch(self._owner, self._turn)
        with self._shelf.at_work(self._footprint.backward):
            found = self._backward(grad, wanted)
        for hold in self._tables:
            if hold is not None:
                hold.release()
        return found

    def _forward(self, x: torch.Tensor, to_keys: bool) -> torch.Tensor:
        self._params = self.parameters()
        skeleton, whole = self._schedule.skeleton, {self._schedule.skeleton.root.name: x}
        self._held.put(self._all, whole)
        for index, group in enumerate(self._schedule.groups):
            is_last = to_keys and index == self._schedule.last_mix
            if group[0].reach is Reach.prefix:
                rule = self._program.mixing(group[0])
                rule.receive(whole)
                if is_last:
                    return x
                made = self._mix(rule, whole, self._cuts.query_tiles(self._num_tokens), is_forward=True)
            else:
                group = upto_scan(group) if is_last else group
                made = self._forward_group(group, self._schedule.crossing[index], whole)
                if is_last:
                    return x
            made |= self._held.put(self._all, {n: made[n] for n in skeleton.skeletal if n in made})
            whole |= made
            del made  # what nothing reads goes before the next group runs
            whole = {name: tensor for name, tensor in whole.items() if name in self._schedule.later[index]}
        del self._params
        return whole[skeleton.result]

    def _backward(self, grad: torch.Tensor, wanted: Iterable[str]) -> tuple[torch.Tensor, ParamSums]:
        self._params = self.parameters()
        tiles, skeleton, groups = self._cuts.tiles(self._num_tokens), self._schedule.skeleton, self._schedule.groups
        if self.carry is None:
            sums = ParamSums(self._params, wanted, num_tiles=len(tiles) * skeleton.head_groups)
        else:
            sums = self.carry.add_to(self._params, wanted)
        agains = made_again(self._schedule, self._plan, self._num_tokens)
        grads: Tensors = {skeleton.result: grad}
        for index in reversed(range(len(groups))):
            group = groups[index]
            self._make_again(agains[index])
            if group[0].reach is Reach.prefix:
                rule = self._program.mixing(group[0])
                values = {name: self._held.get(name, self._all) for name in rule.segment.needs}
                grads |= rule.backward(values, grads.pop(rule.segment.made[0]), self._shared)
                del values
            else:
                grads = self._backward_group(group, grads, tiles, sums)
            for name in self._held.names() - self._schedule.used_before(index):
                self._held.drop(name)
        del self._params
        return grads[skeleton.root.name], sums

    @property
    def _all(self) -> Span:
        return (0, self._num_tokens)

    def _rules(self, group: Group) -> list[Rule]:
        return self._program.rules_of(group)

    def _check(self, segment: Segment, names: Iterable[str], tensors: Tensors, span: Span) -> None:
        """Refuse tensors on a span, or their gradients, that are not as the skeleton says."""
        specs = [self._schedule.skeleton.tensors[name] for name in names]
        check_tensors(segment, specs, tensors, self._like, span[1] - span[0], self.layer)

    def _scans(self, group: Group) -> dict[str, ScanRule]:
        """Of a group, by the names of their states."""
        return {rule.state.name: rule for rule in self._rules(group) if isinstance(rule, ScanRule)}

    def _forward_group(self, group: Group, crossing: Sequence[str], whole: Tensors) -> Tensors:
        """Run a group in tiles. Returns the crossing tensors whole; other skeletal ones are placed tile by tile."""
        made: Tensors = {}
        skeletal, scans = self._schedule.skeleton.skeletal, self._scans(group)
        states = {name: rule.first_state(self._like) for name, rule in scans.items()}
        for tile in self._cuts.tiles(self._num_tokens):
            values = {name: _of_span(whole[name], tile, self._num_tokens) for name in outside(group)} | states
            for rule in self._rules(group):
                if isinstance(rule, ScanRule):
                    results, states[rule.state.name] = rule.advance(values, tile, self._shared)
                else:
                    results = rule.run(self._params, values, tile, self._shared)
                    self._check(rule.segment, rule.segment.made, results, tile)
                for name in [name for name in results if name in crossing]:
                    self._write(made, name, tile, results[name], room=self._held.room(name))
                inner = {n: results[n] for n in skeletal if n in results and n not in crossing}
                values |= results | self._held.put(tile, inner)
                del results, inner  # what shares a blob lies in other memory now
                still_read = self._schedule.still_read[rule.segment]
                values = {name: tensor for name, tensor in values.items() if name in still_read}
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
            self._check(rule.segment, rule.segment.made, results, span)
            for name, tensor in results.items():
                self._write(made, name, span, tensor, room=self._held.room(name) if is_forward else None)
        return made

    def _make_again(self, again: Again) -> None:
        """Make what attention's gradient and the earlier groups need and nothing holds."""
        held = self._held
        for group in self._schedule.groups[:-1]:
            runs = [rerun for rerun in again.runs if rerun.segment in group]
            if runs and group[0].reach is Reach.prefix:
                (rule,) = self._rules(group)
                values = {name: held.get(name, self._all) for name in rule.segment.reads}
                queries = [s for s in self._cuts.query_tiles(self._num_tokens) if _overlaps(s, (r.span for r in runs))]
                for name, tensor in self._mix(rule, values, queries).items():
                    for span in queries:
                        if _lacks(held.spans_of(name), span):
                            held.add(name, span, _of_span(tensor, span, self._num_tokens))
                del values
                for name in again.spent.intersection(rule.segment.reads):
                    held.drop(name)
            elif runs:
                self._rerun_tiles(group, runs, again.kept)

    def _rerun_tiles(self, group: Group, runs: Sequence[Rerun], kept: Collection[str]) -> None:
        for tile in self._cuts.tiles(self._num_tokens):
            due = {run.segment for run in runs if _overlaps(tile, (run.span,))}
            values: Tensors = {}
            for rule in self._rules(group):
                if rule.segment not in due:
                    continue
                reads = {n: values[n] if n in values else self._held.get(n, tile) for n in rule.segment.reads}
                values |= rule.run(self._params, reads, tile, self._shared)
            for name in values.keys() & kept:
                if _lacks(self._held.spans_of(name), tile):
                    self._held.add(name, tile, values[name])

    def _backward_group(self, group: Group, grads: Tensors, tiles: Sequence[Span], sums: ParamSums) -> Tensors:
        """Gradients of what the group reads from outside, whole, added to those that are there already."""
        made = {name for segment in group for name in segment.made}
        outside = {name: tensor for name, tensor in grads.items() if name not in made}
        there, scans = frozenset(outside), self._scans(group)
        states = {name: rule.last_gradient(self._like) for name, rule in scans.items()}
        for tile in reversed(tiles) if scans else tiles:
            of_tile = {n: _of_span(grads[n], tile, self._num_tokens) for n in grads.keys() & made} | states
            parts = self._backward_tile(group, of_tile, tile, sums)
            states = {name: parts.pop(name) for name in scans}
            self._gather(outside, there, tile, parts)
            del parts  # the next tile runs without them
            for name in made & self._held.names():
                self._held.drop(name, tile)
        for name, rule in scans.items():
            rule.leave_gradient(states[name])
        return outside

    def _gather(self, outside: Tensors, there: frozenset[str], tile: Span, parts: Tensors) -> None:
        for name, part in parts.items():
            if name in there:
                _of_span(outside[name], tile, self._num_tokens).add_(part)
            else:
                self._write(outside, name, tile, part)

    def _backward_tile(self, group: Group, grads: Tensors, tile: Span, sums: ParamSums) -> Tensors:
        """One tile: make again what it lacks, then go back through the segments."""
        values, flow = self._values_again(group, tile), Flow(grads)
        for rule in reversed(self._rules(group)):
            self._segment_back(rule, flow, values, (tile, sums))
            for name in rule.segment.made:
                values.pop(name, None)
        return flow.grads

    # Functions of their own, so that no variable keeps a tensor of a segment alive while the next one runs.
    def _values_again(self, group: Group, tile: Span) -> _Values:
        """What the tile lacks."""
        reruns = tile_reruns(self._schedule, self._plan, group, self._num_tokens, tile)
        values = _Values(self._held, tile)
        for rule in self._rules(group):
            if rule.segment in reruns:
                reads = {name: values[name] for name in rule.segment.reads}
                for name, tensor in rule.run(self._params, reads, tile, self._shared).items():
                    if _lacks(self._held.spans_of(name), tile):
                        values[name] = tensor
        return values

    def _segment_back(self, rule: Rule, flow: Flow, values: Tensors, at: tuple[Span, ParamSums]) -> None:
        """The gradients of what a segment reads, from those of what it made."""
        segment, (tile, sums) = rule.segment, at
        own = flow.take(segment.made)
        if isinstance(rule, LinearRule):
            if segment.needs:
                rule.grad_weight(self._params, rule.input(values), own, sums, (tile, self._shared))
            whole = rule.grad_input(self._params, own, tile, self._shared)
            for name, part in rule.of_inputs(whole).items():
                flow.add(name, part, is_fresh=True)
            if segment.adds is not None:
                flow.add(segment.adds, own[segment.made[0]], is_fresh=segment.made[0] in flow.fresh)
        elif isinstance(rule, PointwiseRule):
            reads = rule.backward(self._params, values, own, sums, (tile, self._shared))
            for name, part in reads.items():
                flow.add(name, part, is_fresh=True)
        elif isinstance(rule, ScanRule):
            needed = {name: values[name] for name in segment.needs}
            found = rule.backward(needed, own, tile, self._shared)
            self._check(segment, segment.reads, found, tile)
            for name, part in found.items():
                flow.add(name, part, is_fresh=True)

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
    """apply(call, x, *params), the parameters in the order of the program's names."""

    @staticmethod
    def forward(ctx: Any, call: BlockCall, names: tuple[str, ...], x: torch.Tensor, *params: torch.Tensor) -> Any:
        ctx.call, ctx.names = call, names
        return call.forward(x.detach())

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


@lru_cache(maxsize=1024)
def _first_equal(plan: LayerPlan) -> LayerPlan:
    """One object for equal plans: what is looked up by plan is then found without comparing them."""
    return plan


def _of_span(tensor: torch.Tensor, span: Span, num_tokens: int) -> torch.Tensor:
    return tensor if span == (0, num_tokens) else tensor[:, slice(*span)]


def _overlaps(span: Span, others: Iterable[Span]) -> bool:
    return any(begin < span[1] and span[0] < end for begin, end in others)


def _lacks(held: Spans, span: Span) -> bool:
    return not held or bool(subtract((span,), held))
