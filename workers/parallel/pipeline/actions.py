"""What the ranks of a pipeline do, as actions, and what each action waits for. No torch.

    F  forward of a stage             B  backward: both gradients       I  gradient of the input       W  of the weights
    E  look-up of tokens, summed for the first stage                    X  broadcast of the last stage's normed output
    S  scores against the rank's rows of the vocabulary; posts their maximum and sum
    C  the loss of all rows (vocab_2: posts the gradient of the hidden states)
    T  gradient of the rank's rows (vocab_1: posts the gradient of the hidden states too)
    D  broadcast of the gradient of the looked-up rows                  d  the rank's part of it

A stage is a run of blocks. With several stages per rank (chunks), interleaved gives rank r the stages r, r + p, ...;
zbv and v_half give it r and 2 p - 1 - r, so the first and the last stage are on rank 0.
(Narayanan et al. 2021, arXiv 2104.04473; Qi et al. 2024, arXiv 2401.10241 and 2405.15362; Yeung et al. 2024, arXiv
2411.05288.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from headrace.storage.core.errors import InputError
from headrace.workers.parallel.config import (
    INTERLEAVED,
    ONE_F_ONE_B,
    V_HALF,
    ZBV,
    ParallelConfig,
    PipelineSchedule,
    Vocabulary,
)

V_SCHEDULES = (ZBV, V_HALF)
# Micro-batches that a rank holds beside those of the plain schedule.
EXTRA_IN_FLIGHT = {Vocabulary.last_stage: 0, Vocabulary.vocab_2: 1, Vocabulary.vocab_1: 2}


class Op(StrEnum):
    """Kinds of actions; see the module."""

    forward = "F"
    backward = "B"
    input_grad = "I"
    weight_grad = "W"
    lookup = "E"
    hidden = "X"
    scores = "S"
    rescale = "C"
    vocabulary_grad = "T"
    embedding_grad = "D"
    rows_grad = "d"


class Action(NamedTuple):
    """One entry of a rank's list. `stage` is -1 for the vocabulary's actions, which every rank has."""

    op: Op
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        where = "" if self.stage < 0 else f" of stage {self.stage}"
        return f"{self.op.value}{where}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Pipeline:
    """The shape of a pipeline.

    Args:
        num_ranks: p.
        num_micro_batches: m, of one step; at least p.
        chunks: stages of one rank: 1 for 1f1b, at least 2 for interleaved, 2 for zbv and v_half.
        vocabulary: not auto.

    Raises:
        InputError: numbers that the schedule does not take; names the key.
    """

    schedule: PipelineSchedule
    num_ranks: int
    num_micro_batches: int
    chunks: int = 1
    vocabulary: Vocabulary = Vocabulary.last_stage

    def __post_init__(self) -> None:
        if self.vocabulary is Vocabulary.auto:
            raise InputError("parallel.vocabulary=auto: resolve it first, with resolve_pipeline")
        if self.num_ranks < 1:
            raise InputError(f"parallel.pipeline={self.num_ranks}: at least 1")
        if problem := chunks_problem(self.schedule, self.chunks):
            raise InputError(problem)
        if problem := filling_problem("train.micro_batches", self.num_micro_batches, self.num_ranks):
            raise InputError(problem)

    @property
    def num_stages(self) -> int:
        """Stages of all ranks."""
        return self.num_ranks * self.chunks

    @property
    def is_shared(self) -> bool:
        """Whether every rank has rows of the vocabulary."""
        return self.vocabulary is not Vocabulary.last_stage

    @property
    def extra(self) -> int:
        """Micro-batches in flight that the vocabulary's passes add."""
        return EXTRA_IN_FLIGHT[self.vocabulary]

    @cached_property
    def group_ops(self) -> frozenset[Op]:
        """Actions that all ranks take part in; posting never blocks, the wait stands at the consumer."""
        ops = {Op.lookup, Op.hidden, Op.scores, Op.rescale, Op.embedding_grad}
        return frozenset(ops | {Op.vocabulary_grad} if self.vocabulary is Vocabulary.vocab_1 else ops)

    def rank_of(self, stage: int) -> int:
        """The rank that has a stage."""
        if self.schedule in V_SCHEDULES:
            return min(stage, 2 * self.num_ranks - 1 - stage)
        return stage % self.num_ranks

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in the order of the model."""
        if self.schedule in V_SCHEDULES:
            return [rank, 2 * self.num_ranks - 1 - rank]
        return [rank + chunk * self.num_ranks for chunk in range(self.chunks)]

    def is_split(self, micro_batch: int) -> bool:
        """Whether I and W take the place of B.

        A stage's first and last backward are whole.
        """
        return self.schedule in V_SCHEDULES and 0 < micro_batch < self.num_micro_batches - 1

    def backward(self, stage: int, micro_batch: int) -> Action:
        """The action that makes the gradient of a stage's input."""
        return Action(Op.input_grad if self.is_split(micro_batch) else Op.backward, stage, micro_batch)

    def actions(self, rank: int) -> Iterator[Action]:
        """All actions of a rank, in no order that a schedule has."""
        for i in range(self.num_micro_batches):
            for stage in self.stages_of(rank):
                yield Action(Op.forward, stage, i)
                yield self.backward(stage, i)
                if self.is_split(i):
                    yield Action(Op.weight_grad, stage, i)
            if self.is_shared:
                yield from (Action(op, -1, i) for op in (*self.group_ops, Op.rows_grad))
                if Op.vocabulary_grad not in self.group_ops:
                    yield Action(Op.vocabulary_grad, -1, i)

    def taker(self, action: Action) -> Action | None:
        """The pass of the next stage, or of the one before, that takes what a pass makes; None where none does."""
        op, stage, i = action
        if op is Op.forward and stage + 1 < self.num_stages:
            return Action(Op.forward, stage + 1, i)
        return self.backward(stage - 1, i) if op in (Op.backward, Op.input_grad) and stage else None

    def vocabulary_bytes(self, rank: int, num_tokens: int, width: int, itemsize: int) -> int:
        """What a rank gives to group actions for one micro-batch; 0 without a shared vocabulary.

            E  n H e    X, D  n H e on their source    S  3 n numbers    C (vocab_2) or T (vocab_1)  n H numbers

        Args:
            num_tokens: n. width: H. itemsize: e; numbers are fp32, for fp64 fp64.
        """
        if not self.is_shared:
            return 0
        wide, own = max(4, itemsize), 1 + (rank == self.rank_of(0)) + (rank == self.rank_of(self.num_stages - 1))
        return num_tokens * (own * width * itemsize + (3 + width) * wide)

    def waits(self, rank: int, action: Action) -> tuple[Action, ...]:
        """What must be over before a rank starts an action; a group action is over when every rank has posted it."""
        op, stage, i = action
        last = self.num_stages - 1
        if op is Op.forward:
            if stage:
                return (Action(Op.forward, stage - 1, i),)
            return (Action(Op.lookup, -1, i),) if self.is_shared else ()
        if op is Op.backward or op is Op.input_grad:
            own = Action(Op.forward, stage, i)
            if stage < last:
                return own, self.backward(stage + 1, i)
            if not self.is_shared:
                return (own,)
            done = Op.vocabulary_grad if self.vocabulary is Vocabulary.vocab_1 else Op.rescale
            return own, Action(done, -1, i)
        if op is Op.hidden:
            return (Action(Op.forward, last, i),) if rank == self.rank_of(last) else ()
        if op is Op.embedding_grad:
            return (self.backward(0, i),) if rank == self.rank_of(0) else ()
        return (Action(Op.input_grad, stage, i),) if op is Op.weight_grad else _AFTER[op](i)


_AFTER = {
    Op.lookup: lambda i: (),
    Op.scores: lambda i: (Action(Op.hidden, -1, i),),
    Op.rescale: lambda i: (Action(Op.scores, -1, i),),
    Op.vocabulary_grad: lambda i: (Action(Op.rescale, -1, i),),
    Op.rows_grad: lambda i: (Action(Op.embedding_grad, -1, i),),
}


def chunks_problem(schedule: PipelineSchedule, chunks: int) -> str | None:
    """Why a schedule does not take so many stages per rank; None where it does."""
    key, name = f"parallel.pipeline_chunks={chunks}", f"parallel.pipeline_schedule={schedule.value}"
    if schedule is ONE_F_ONE_B and chunks != 1:
        return f"{key}: {name} has one stage per rank; leave parallel.pipeline_chunks out, or choose interleaved"
    if schedule is INTERLEAVED and chunks < 2:
        return f"{key}: {name} has at least 2 stages per rank; set parallel.pipeline_chunks=2, or choose 1f1b"
    if schedule in V_SCHEDULES and chunks != 2:
        return f"{key}: {name} has 2 stages per rank; leave parallel.pipeline_chunks out"
    return None


def filling_problem(key: str, num_micro_batches: int, num_ranks: int) -> str | None:
    """Why so few micro-batches, which `key` says, do not fill a pipeline; None where they do."""
    if num_micro_batches >= num_ranks:
        return None
    return f"{key}={num_micro_batches}: parallel.pipeline={num_ranks} needs at least as many; set {key}={num_ranks}"


def resolve_pipeline(parallel: ParallelConfig, num_micro_batches: int) -> Pipeline:
    """The shape of a run's pipeline, with the defaults of its schedule. Raises InputError as Pipeline."""
    schedule, chunks = parallel.pipeline_schedule, parallel.pipeline_chunks
    vocabulary = Vocabulary.last_stage if parallel.vocabulary is Vocabulary.auto else parallel.vocabulary
    return Pipeline(schedule, parallel.pipeline, num_micro_batches, chunks or default_chunks(schedule), vocabulary)


def training_problem(parallel: ParallelConfig) -> str | None:
    """Why training does not take the degrees of a pipeline that `plan` knows; None where it does."""
    if parallel.tensor > 1 and parallel.vocabulary not in (Vocabulary.auto, Vocabulary.last_stage):
        return (
            f"parallel.vocabulary={parallel.vocabulary.value}: with parallel.tensor={parallel.tensor} training has the "
            "head on the last stage (only `plan` supports others); set parallel.vocabulary=last_stage"
        )
    return None


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """The blocks of every stage: as even as they can be. The last stages have one less, as the last holds the head."""
    counts = [num_layers // num_stages + (stage < num_layers % num_stages) for stage in range(num_stages)]
    return [range(sum(counts[:stage]), sum(counts[: stage + 1])) for stage in range(num_stages)]


def default_chunks(schedule: PipelineSchedule) -> int:
    """Stages per rank where none are named."""
    return 1 if schedule is ONE_F_ONE_B else 2
