"""What a rank of a pipeline holds at every pass of its action list, in numbers. No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from headrace.workers.parallel.config import Vocabulary
from headrace.workers.parallel.pipeline.actions import V_SCHEDULES, Action, Op, Pipeline, stage_layers

Lists = Sequence[Sequence[Action]]
# Passes that call blocks.
CALLING = (Op.forward, Op.backward, Op.input_grad)


class Pass(NamedTuple):
    """A kind of pass, and the place of its stage among those of the rank; -1 for the vocabulary's passes."""

    op: Op
    place: int


class Moment(NamedTuple):
    """A rank while a pass is at work. Of numbers by stage, in the order of the model.

    Args:
        open: forwards whose gradients of inputs are not computed, beside that of the pass at work.
        queued: gradients of weights that wait.
        summed: stages that have had a backward: the sums of their gradients are there.
        messages: hidden states and their gradients that are received and not taken, or sent and not let go.
        narrow / wide: what the passes of a shared vocabulary hold, in tensors of hidden states: in the compute dtype
            (what E makes until the first stage takes it, X until T, D until d), and in the dtype of sums (what S or T
            makes until it is posted; on the last stage's rank until that stage's backward takes it, on others one that
            is on its way there).
        before / after: the pass with block calls before, and the next ones.
    """

    work: Pass
    open: tuple[int, ...]
    queued: tuple[int, ...]
    summed: tuple[bool, ...]
    messages: int
    narrow: int
    wide: int
    before: Pass | None
    after: tuple[Pass, ...]


@dataclass(frozen=True)
class RankPasses:
    """The passes of one rank in a step.

    Args:
        counts: blocks of each of its stages, in the order of the model.
        first / last: places among them of the model's first and last stage; None: another rank has it.
        is_shared: whether the rank has rows of a vocabulary that all ranks share.
        splits: whether gradients of weights come in passes of their own.
        moments: each once.
    """

    counts: tuple[int, ...]
    first: int | None
    last: int | None
    is_shared: bool
    splits: bool
    moments: tuple[Moment, ...]

    @cached_property
    def shares(self) -> tuple[tuple[float, float], ...]:
        """Micro-batches of all of its blocks that are open, and that wait in the queue, at all moments."""
        found = {
            ((sum(each.open) + (each.work.op in CALLING)) / len(self.counts), sum(each.queued) / len(self.counts))
            for each in self.moments
        }
        return tuple(sorted(found))

    @property
    def in_flight(self) -> int:
        """Micro-batches of all of its blocks that it holds at most between forward and backward."""
        return math.ceil(max(num_open for num_open, _ in self.shares))


def rank_passes(pipeline: Pipeline, lists: Lists, rank: int, num_layers: int) -> RankPasses:
    """Those of a rank, from the lists of all of them."""
    stages, layers = pipeline.stages_of(rank), stage_layers(num_layers, pipeline.num_stages)
    place = {stage: at for at, stage in enumerate(stages)}
    last, mail = pipeline.num_stages - 1, _Mail(pipeline, lists, rank)
    calls = [Pass(action.op, place[action.stage]) for action in lists[rank] if action.op in CALLING]
    num_open, num_queued, summed = [0] * len(stages), [0] * len(stages), [False] * len(stages)
    narrow, wide = _vocabulary_changes(pipeline, rank)
    num_narrow, at_call, num_wide = 0, 0, int(pipeline.is_shared and last not in place)
    found: dict[Moment, None] = {}
    for action in lists[rank]:
        op, stage, _ = action
        at, calling = place.get(stage, -1), op in CALLING
        mail.take(action)
        num_narrow += narrow.get((op, stage), 0)
        num_wide += wide.get((op, stage), 0)
        if calling and op is not Op.forward:
            num_open[at] -= 1
        before, after = (tuple(calls[max(0, at_call - 1) : at_call]), tuple(calls[at_call + calling :][:2]))
        counts = tuple(num_open), tuple(num_queued), tuple(summed)
        moment = Moment(
            Pass(op, at), *counts, mail.num_held, num_narrow, num_wide, before[0] if before else None, after
        )
        found[moment] = None
        at_call += calling
        if op is Op.forward:
            num_open[at] += 1
        elif calling:
            summed[at] = pipeline.schedule in V_SCHEDULES
        num_queued[at] += (op is Op.input_grad) - (op is Op.weight_grad)
        mail.send(action)
    return RankPasses(
        counts=tuple(len(layers[stage]) for stage in stages),
        first=place.get(0),
        last=place.get(last),
        is_shared=pipeline.is_shared,
        splits=pipeline.schedule in V_SCHEDULES,
        moments=tuple(found),
    )


def _vocabulary_changes(pipeline: Pipeline, rank: int) -> tuple[dict[tuple[Op, int], int], ...]:
    """By which an action of a rank, as (op, stage), changes the numbers of narrow and of wide tensors; see Moment."""
    if not pipeline.is_shared:
        return {}, {}
    last_stage = pipeline.num_stages - 1
    first, last = (int(rank == pipeline.rank_of(stage)) for stage in (0, last_stage))
    narrow = {
        (Op.lookup, -1): first,
        (Op.forward, 0): -1,
        (Op.hidden, -1): 1,
        (Op.vocabulary_grad, -1): -1,
        (Op.embedding_grad, -1): 1,
        (Op.rows_grad, -1): -1,
    }
    if pipeline.vocabulary is Vocabulary.vocab_1:
        wide = {(Op.vocabulary_grad, -1): last}
    else:
        wide = {(Op.scores, -1): 1, (Op.rescale, -1): last - 1}
    return narrow, wide | {(op, last_stage): -1 for op in (Op.backward, Op.input_grad)}


class _Mail:
    """Counts the tensors that messages.py holds for a rank, by its rules.

    Attributes:
        num_held: now; what a pass has taken is not among them.
    """

    def __init__(self, pipeline: Pipeline, lists: Lists, rank: int) -> None:
        self._pipeline, self._rank = pipeline, rank
        self._places = [{action: at for at, action in enumerate(actions)} for actions in lists]
        self._expected = {
            source: deque(action for action in actions if self._to(action) == rank)
            for source, actions in enumerate(lists)
            if source != rank
        }
        self._coming: set[Action] = set()
        self._leaving: dict[int, deque[Action]] = {source: deque() for source in self._expected}
        self._num_here = 0
        for source in self._expected:
            self._post(source)

    @property
    def num_held(self) -> int:
        return len(self._coming) + self._num_here + sum(map(len, self._leaving.values()))

    def take(self, action: Action) -> None:
        """A pass begins: it takes what another one has made for it."""
        made = self._maker(action)
        if made is None:
            return
        source = self._pipeline.rank_of(made.stage)
        if source == self._rank:
            self._num_here -= 1
            return
        while made not in self._coming:
            self._post(source)
        self._coming.remove(made)
        leaving, place = self._leaving[source], self._places[source]
        while leaving and place[leaving[0]] < place[made]:
            leaving.popleft()
        self._post(source)

    def send(self, action: Action) -> None:
        """A pass is over: it hands on what it has made."""
        taker, to = self._pipeline.taker(action), self._to(action)
        if to == self._rank:
            self._num_here += 1
        elif to is not None and taker is not None:
            self._leaving[to].append(taker)

    def _to(self, action: Action) -> int | None:
        taker = self._pipeline.taker(action)
        return None if taker is None else self._pipeline.rank_of(taker.stage)

    def _maker(self, action: Action) -> Action | None:
        op, stage, i = action
        if op is Op.forward and stage:
            return Action(Op.forward, stage - 1, i)
        is_back = op in (Op.backward, Op.input_grad) and stage + 1 < self._pipeline.num_stages
        return self._pipeline.backward(stage + 1, i) if is_back else None

    def _post(self, source: int) -> None:
        if self._expected[source]:
            self._coming.add(self._expected[source].popleft())
