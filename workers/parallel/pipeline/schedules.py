"""Action lists of all ranks from one simulated timeline. No torch.

1f1b and interleaved fix the order of a rank's forward and backward passes. zbv and v_half choose at every moment among
the passes that can start, by their places in a building block that repeats, and no rank holds more forwards than its
bytes allow. The vocabulary's passes go where the timeline has room for them, their group actions in one order for all
ranks. The planner prices this same timeline.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

from headrace.workers.parallel.config import INTERLEAVED, V_HALF, ZBV, Vocabulary
from headrace.workers.parallel.pipeline.actions import V_SCHEDULES, Action, Op, Pipeline

# zbv, v_half: slots from a stage's forward (backward) to that of the next, on the way there and back (Qi et al. 2024,
# arXiv 2405.15362). Their sum over PERIOD is the time, and with it the memory, that a micro-batch is in flight.
HOPS = {ZBV: (4, 2, 4, 2), V_HALF: (2, 1, 2, 1)}
# Slots of the building block: forward, I and W of two stages.
PERIOD = 6
# Slots that W comes after its I: it fills gaps, and no rank waits for it.
WEIGHT_GRAD_LATER = 8
# Micro-batches whose T a rank puts off: each holds its hidden states.
VOCABULARY_BACKLOG = 2


@dataclass(frozen=True)
class Durations:
    """Seconds of every pass, by stage where it has one.

    Args:
        forward / input_grad / weight_grad: by stage. B takes input_grad + weight_grad.
        send: from one rank to the next, of a stage's output or its gradient.
        vocabulary: of E, X, S, C, T, D and d; 0 where not named.
    """

    forward: Sequence[float]
    input_grad: Sequence[float]
    weight_grad: Sequence[float]
    send: float = 0.0
    vocabulary: dict[Op, float] = field(default_factory=dict)

    @classmethod
    def even(
        cls, pipeline: Pipeline, forward: float, input_grad: float, weight_grad: float, **rest: float
    ) -> Durations:
        """Stages that are alike. `rest`: by the name of an Op, or `send`."""
        send = rest.pop("send", 0.0)
        rows = [(value,) * pipeline.num_stages for value in (forward, input_grad, weight_grad)]
        return cls(rows[0], rows[1], rows[2], send, {Op[name]: value for name, value in rest.items()})

    def of(self, action: Action) -> float:
        """Seconds of an action."""
        op, stage, _ = action
        if op is Op.forward:
            return self.forward[stage]
        if op is Op.backward:
            return self.input_grad[stage] + self.weight_grad[stage]
        if op is Op.input_grad:
            return self.input_grad[stage]
        return self.weight_grad[stage] if op is Op.weight_grad else self.vocabulary.get(op, 0.0)


@dataclass(frozen=True)
class Timeline:
    """What every rank does, in order, and when.

    Args:
        lists: the action lists, by rank.
        starts / ends: seconds of every action, in the same places.
    """

    pipeline: Pipeline
    lists: tuple[tuple[Action, ...], ...]
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max(ends[-1] for ends in self.ends)


def in_flight(actions: Sequence[Action]) -> int:
    """Most forwards of a stage that a rank holds at once: each from its start to the end of its B or W."""
    held = peak = 0
    for action in actions:
        held += (action.op is Op.forward) - (action.op in (Op.backward, Op.weight_grad))
        peak = max(peak, held)
    return peak


def simulate(pipeline: Pipeline, durations: Durations) -> Timeline:
    """The timeline of a pipeline whose passes take so long. Pure: the same on every rank."""
    return _Simulation(pipeline, durations).run()


def fixed_order(pipeline: Pipeline, rank: int) -> list[Action]:
    """Forward and backward passes of a rank under 1f1b and interleaved (Narayanan et al. 2021, figures 3 and 4).

    After a warm-up of forwards one forward and one backward take turns. Interleaved handles groups of at least p
    micro-batches, as even as they can be, stage by stage.
    """
    m, p, chunks = pipeline.num_micro_batches, pipeline.num_ranks, pipeline.chunks
    stages, num_groups = pipeline.stages_of(rank), max(1, m // p)
    ends = [m * (group + 1) // num_groups for group in range(num_groups)]
    groups = list(zip([0, *ends], ends, strict=False))
    forwards = [Action(Op.forward, s, i) for begin, end in groups for s in stages for i in range(begin, end)]
    backwards = [
        Action(Op.backward, s, i) for begin, end in groups for s in reversed(stages) for i in range(begin, end)
    ]
    warm_up = p - 1 - rank
    if pipeline.schedule is INTERLEAVED:
        warm_up = 2 * warm_up + (chunks - 1) * max(end - begin for begin, end in groups)
    warm_up = min(warm_up + pipeline.extra, len(forwards))
    order = forwards[:warm_up]
    for number, forward in enumerate(forwards[warm_up:]):
        order += [forward, backwards[number]]
    return order + backwards[len(forwards) - warm_up :]


def group_order(pipeline: Pipeline, ahead: int) -> list[Action]:
    """The one order in which all ranks post group actions.

    Args:
        ahead: micro-batches that are between the first stage's forward and its backward at most: look-ups come so much
            earlier than the scores, and gradients of look-ups so much later, so that neither is waited for.
    """
    order: list[Action] = []
    if not pipeline.is_shared:
        return order
    m, behind = pipeline.num_micro_batches, _vocabulary_grads(pipeline)
    for i in range(-ahead, m + ahead):
        if 0 <= i + ahead < m:
            order.append(Action(Op.lookup, -1, i + ahead))
        if 0 <= i < m:
            order += [Action(op, -1, i) for op in (Op.hidden, Op.scores, Op.rescale)]
            order += [Action(Op.vocabulary_grad, -1, j) for j in behind.get(i, ())]
        if 0 <= i - ahead < m:
            order.append(Action(Op.embedding_grad, -1, i - ahead))
    return order


def _vocabulary_grads(pipeline: Pipeline) -> dict[int, list[int]]:
    """vocab_1: the micro-batches whose T is posted behind the scores of a micro-batch.

    Behind those of the next one, so that no rank waits for two barriers in a row; but where the last stage has its
    backward before the next forward, behind its own.
    """
    m, last = pipeline.num_micro_batches, pipeline.num_stages - 1
    found: dict[int, list[int]] = {}
    if pipeline.vocabulary is Vocabulary.vocab_1:
        is_fixed = pipeline.schedule not in V_SCHEDULES
        order = fixed_order(pipeline, pipeline.rank_of(last)) if is_fixed else []
        place = {action: at for at, action in enumerate(order) if action.stage == last}
        for i in range(m):
            is_next = i + 1 < m and (
                not is_fixed or place[Action(Op.forward, last, i + 1)] < place[pipeline.backward(last, i)]
            )
            found.setdefault(i + is_next, []).append(i)
    return found


@lru_cache(maxsize=64)
def building_block(pipeline: Pipeline) -> tuple[dict[tuple[Op, int], int], ...]:
    """Of zbv and v_half: the slot of every rank's F and B (or I) of micro-batch 0, by op and stage.

    Micro-batch i comes PERIOD i slots later. No two passes of a rank have the same slot; of such blocks the one with
    the earliest last backward. The vocabulary's passes get whole periods between the last forward and its backward.
    """
    p, hops = pipeline.num_ranks, HOPS[pipeline.schedule]

    def rows(gaps: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
        """(forward, forward, backward, backward) of every rank, `gaps` slots where the direction turns."""
        turn = hops[0] * (p - 1) + 1 + gaps[0]
        top = turn + hops[1] * (p - 1) + 1 + gaps[1] + PERIOD * pipeline.extra
        back = top + hops[2] * (p - 1) + 1 + gaps[2]
        return [
            (hops[0] * r, turn + hops[1] * (p - 1 - r), top + hops[2] * r, back + hops[3] * (p - 1 - r))
            for r in range(p)
        ]

    blocks = sorted((rows(gaps) for gaps in product(range(PERIOD), repeat=3)), key=lambda block: block[0][3])
    block = next(block for block in blocks if all(len({slot % PERIOD for slot in row}) == 4 for row in block))
    return tuple(
        {
            (Op.forward, rank): row[0],
            (Op.forward, 2 * p - 1 - rank): row[1],
            (Op.backward, 2 * p - 1 - rank): row[2],
            (Op.backward, rank): row[3],
        }
        for rank, row in enumerate(block)
    )


class _Rank:
    """A rank at a moment of the simulation."""

    def __init__(self, pipeline: Pipeline, rank: int) -> None:
        self.pipeline, self.rank = pipeline, rank
        self.is_fixed = pipeline.schedule not in V_SCHEDULES
        self.passes = deque(fixed_order(pipeline, rank) if self.is_fixed else ())
        self.next_forward = dict.fromkeys(pipeline.stages_of(rank), 0)
        self.next_backward = dict.fromkeys(pipeline.stages_of(rank), 0)
        self.weight_grads: deque[Action] = deque()
        self.held_of = dict.fromkeys(pipeline.stages_of(rank), 0)
        self.most = most_held(pipeline)
        # Second stages may always go on: were all room full of first stages, ranks would wait for each other. With
        # vocab_1 the backward of a micro-batch waits for the forward of the next one, which needs its room too.
        self.reserved = 2 if pipeline.vocabulary is Vocabulary.vocab_1 else 1
        self.next_group = 0
        self.put_off: deque[Action] = deque()
        self.free_s = 0.0
        self.actions: list[Action] = []
        self.starts: list[float] = []
        self.ends: list[float] = []

    @property
    def held(self) -> int:
        """Forwards whose tensors the rank holds."""
        return sum(self.held_of.values())

    def choices(self) -> Iterator[Action]:
        """Passes that the rank may start now as far as its own state goes, the best first."""
        if len(self.put_off) > VOCABULARY_BACKLOG:
            yield self.put_off[0]
        if self.is_fixed:
            if self.passes:
                yield self.passes[0]
        else:
            yield from self._by_place()
        if self.put_off:
            yield self.put_off[0]

    def _by_place(self) -> Iterator[Action]:
        m, (first, second) = self.pipeline.num_micro_batches, self.pipeline.stages_of(self.rank)
        places = building_block(self.pipeline)[self.rank]
        found = []
        for stage in (first, second):
            if (i := self.next_backward[stage]) < self.next_forward[stage]:
                found.append((places[Op.backward, stage] + PERIOD * i, self.pipeline.backward(stage, i)))
            room = self.most if stage == second else self.most - self.reserved
            if (i := self.next_forward[stage]) < m and self.held < self.most and self.held_of[stage] < room:
                found.append((places[Op.forward, stage] + PERIOD * i, Action(Op.forward, stage, i)))
        for action in list(self.weight_grads)[:1]:
            later = PERIOD * action.micro_batch + WEIGHT_GRAD_LATER
            found.append((places[Op.backward, action.stage] + later, action))
        yield from (action for _, action in sorted(found))

    def book(self, action: Action, start_s: float, end_s: float) -> None:
        """Put a started action on the list."""
        self.actions.append(action)
        self.starts.append(start_s)
        self.ends.append(end_s)
        self.free_s = end_s
        op, stage, i = action
        if op is Op.forward:
            self.next_forward[stage] = i + 1
            self.held_of[stage] += 1
        elif op in (Op.backward, Op.input_grad):
            self.next_backward[stage] = i + 1
            self.held_of[stage] -= op is Op.backward
            if op is Op.input_grad:
                self.weight_grads.append(Action(Op.weight_grad, stage, i))
        elif op is Op.weight_grad:
            self.weight_grads.popleft()
            self.held_of[stage] -= 1
        if self.passes and action == self.passes[0]:
            self.passes.popleft()
        elif op in self.pipeline.group_ops:
            self.next_group += 1
        elif self.put_off and action == self.put_off[0]:
            self.put_off.popleft()
        if op is Op.rescale and self.pipeline.vocabulary is Vocabulary.vocab_2:
            self.put_off.append(Action(Op.vocabulary_grad, -1, i))
        elif op is Op.embedding_grad:
            self.put_off.append(Action(Op.rows_grad, -1, i))


def most_held(pipeline: Pipeline) -> int:
    """Forwards that a rank of zbv or v_half holds at most: as many bytes as 1f1b's first rank, or half of them."""
    p, extra = pipeline.num_ranks, pipeline.extra
    return (2 * p if pipeline.schedule is ZBV else max(2, p)) + 2 * extra


class _Simulation:
    """A list scheduler: whenever a rank is free and an action can start, the best one does."""

    def __init__(self, pipeline: Pipeline, durations: Durations) -> None:
        self.pipeline, self.durations = pipeline, durations
        self.ranks = [_Rank(pipeline, rank) for rank in range(pipeline.num_ranks)]
        self.groups = group_order(pipeline, self._ahead())
        self.over_s: dict[Action, float] = {}
        self.posted: Counter[Action] = Counter()
        self.last_post_s: dict[Action, float] = {}
        self.heap: list[tuple[float, int]] = []

    def _ahead(self) -> int:
        """See group_order."""
        first = self.ranks[self.pipeline.rank_of(0)]
        if first.is_fixed:
            return in_flight([action for action in first.passes if action.stage == 0])
        return min(self.pipeline.num_micro_batches, first.most - first.reserved)

    def run(self) -> Timeline:
        self.heap = [(0.0, rank) for rank in range(len(self.ranks))]
        while self.heap:
            now_s, rank = heapq.heappop(self.heap)
            if self.ranks[rank].free_s <= now_s:
                self._start(self.ranks[rank], now_s)
        rows = [(tuple(r.actions), tuple(r.starts), tuple(r.ends)) for r in self.ranks]
        lists, starts, ends = zip(*rows, strict=True)
        return Timeline(self.pipeline, lists, starts, ends)

    def _start(self, rank: _Rank, now_s: float) -> None:
        while rank.free_s <= now_s and (action := self._pick(rank, now_s)) is not None:
            end_s = now_s + self.durations.of(action)
            rank.book(action, now_s, end_s)
            if end_s > now_s:
                heapq.heappush(self.heap, (end_s, rank.rank))
            self._tell(rank, action, end_s)

    def _pick(self, rank: _Rank, now_s: float) -> Action | None:
        if rank.next_group < len(self.groups) and self._can_start(rank, action := self.groups[rank.next_group], now_s):
            return action
        return next((action for action in rank.choices() if self._can_start(rank, action, now_s)), None)

    def _can_start(self, rank: _Rank, action: Action, now_s: float) -> bool:
        never = now_s + 1.0
        return all(self.over_s.get(wait, never) <= now_s for wait in self.pipeline.waits(rank.rank, action))

    def _tell(self, rank: _Rank, action: Action, end_s: float) -> None:
        """Note when an action is over, and wake the ranks that may wait for it."""
        op, stage, _ = action
        if op in self.pipeline.group_ops:
            self.posted[action] += 1
            self.last_post_s[action] = max(end_s, self.last_post_s.get(action, 0.0))
            if self.posted[action] == len(self.ranks):
                self.over_s[action] = over_s = self.last_post_s[action]
                for other in range(len(self.ranks)):
                    heapq.heappush(self.heap, (over_s, other))
            return
        self.over_s[action] = end_s
        step = {Op.forward: 1, Op.backward: -1, Op.input_grad: -1}.get(op, 0)
        if step and 0 <= stage + step < self.pipeline.num_stages:
            other = self.pipeline.rank_of(stage + step)
            if other != rank.rank:
                self.over_s[action] = end_s + self.durations.send
                heapq.heappush(self.heap, (end_s + self.durations.send, other))
