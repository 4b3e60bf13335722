"""The plan of a run with pipeline stages: one for every rank of the pipeline, and the step that they make together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from headrace.platform.config.schema import RunConfig
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.explain import places, size, to_json
from headrace.platform.planning.priced import wanted_bytes
from headrace.platform.planning.refuse import Refused
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.simulate.engine import Stream
from headrace.platform.planning.simulate.stages import pipeline_of, pipeline_timeline, stage_requests
from headrace.platform.planning.simulate.step import StepTimeline, dims_of
from headrace.platform.planning.solve import slab_bytes_per_node
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.parallel.pipeline.actions import Action, Op, Pipeline, stage_layers
from headrace.workers.telemetry import names


@dataclass(frozen=True)
class PipelinePlan:
    """Plans of all ranks of a pipeline, in their order."""

    config: RunConfig
    requests: Sequence[PlanRequest]
    plans: Sequence[MemoryPlan]

    @cached_property
    def timeline(self) -> StepTimeline:
        """The step that they make. Raises InputError where a rate that it needs is not known; names the key."""
        return pipeline_timeline(pipeline_of(self.config), self.requests, self.plans, dims_of(self.config))

    @cached_property
    def whole(self) -> MemoryPlan:
        """One plan of all blocks, of which each rank takes its own's. What it predicts is the most of a rank."""
        pipeline = pipeline_of(self.config)
        rows = [iter(plan.layers) for plan in self.plans]
        stages = stage_layers(sum(len(plan.layers) for plan in self.plans), pipeline.num_stages)
        layers = tuple(next(rows[pipeline.rank_of(stage)]) for stage, own in enumerate(stages) for _ in own)
        every = [plan.predicted for plan in self.plans]
        shared = set(every[0]).intersection(*every) - {names.EXPOSED_PCT}
        predicted = {name: max(each[name] for each in every) for name in every[0] if name in shared}
        predicted.pop(names.STEP_S, None)
        with suppress(InputError):  # explain says why
            predicted[names.STEP_S] = self.timeline.step_s
        request = self.requests[0]
        tokens, width = request.batch_size * request.seq_len // request.num_sharers, request.model.hidden_size
        sent = max(
            _num_edges(pipeline, rank) * tokens * width * request.itemsize
            + pipeline.vocabulary_bytes(rank, tokens, width, request.itemsize)
            for rank in range(pipeline.num_ranks)
        )
        predicted[names.PIPELINE_SENT_GIB] = sent * request.micro_batches / 2**30
        return replace(self.plans[0], layers=layers, predicted=predicted)

    @property
    def slab_bytes(self) -> dict[Medium, int]:
        """The size of the slabs of one node to open: all ranks get as much as the one that fills them most."""
        every = [slab_bytes_per_node(plan, own) for plan, own in zip(self.plans, self.requests, strict=True)]
        return {tier: max(each[tier] for each in every) for tier in every[0]}

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        request = self.requests[0]
        dims = self.config.parallel
        data = self.timeline.num_ranks // (dims.tensor * dims.ulysses * dims.ring * dims.pipeline)
        tokens = data * request.batch_size * request.micro_batches * request.seq_len
        return tokens / self.timeline.step_s / self.timeline.num_ranks

    @property
    def idle_pct(self) -> float:
        """Mean share of the step in which a rank does not compute."""
        shares = [self.timeline.busy_share(rank, Stream.compute) for rank in range(len(self.plans))]
        return 100 * (1 - sum(shares) / len(shares))

    def explain(self) -> str:
        """Text of at most 120 columns."""
        request, parallel = self.requests[0], self.config.parallel
        lines = [
            f"pipeline {parallel.pipeline_schedule.value}: {request.model.name}, {request.seq_len} tokens x "
            f"{request.batch_size} x {request.micro_batches} micro-batches, on {self.config.cluster.num_ranks} x "
            f"{request.profile.name}",
            "",
            "ranks  blocks  in flight  device peak   host tier     SSD tier      where its tensors wait",
        ]
        rows = [self._row(own, plan) for own, plan in zip(self.requests, self.plans, strict=True)]
        first = 0
        for row, group in groupby(rows):
            last = first + len(list(group)) - 1
            lines.append(f"{first if first == last else f'{first}-{last}':<7}{row}"[:120])
            first = last + 1
        return "\n".join([*lines, "", *self._step_lines()])

    def _step_lines(self) -> list[str]:
        try:
            step_s = self.timeline.step_s
        except InputError as error:
            return [f"step time: not predicted; {error}"]
        return [
            f"step: {step_s:.4g} s, {self.tokens_per_s:.4g} tokens/s per GPU; ranks do not compute for "
            f"{self.idle_pct:.0f} % of it",
            "from a simulated timeline (timeline=FILE.png draws it); the optimizer's update is not in it",
        ]

    @staticmethod
    def _row(request: PlanRequest, plan: MemoryPlan) -> str:
        peaks, skeleton = wanted_bytes(plan, request), request.shape(plan).schedule.skeleton
        tiers = "".join(f"{size(peaks[tier]):<14}" for tier in (Medium.hbm, Medium.host, Medium.ssd))
        waits = [f"{len(list(group))} {places(layer, skeleton)}" for layer, group in groupby(plan.layers)]
        return f"{request.model.num_layers:<8}{request.in_flight:<11}{tiers}{'; '.join(waits)}"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        stages = [to_json(plan, request) for plan, request in zip(self.plans, self.requests, strict=True)]
        return {
            "fits": True,
            "stages": stages,
            "predicted": {"step_s": self.timeline.step_s, "tokens_per_s_per_gpu": self.tokens_per_s},
        }


def plan_pipeline(config: RunConfig, request: PlanRequest) -> PipelinePlan:
    """Solve the plan of every rank. All plans have the same cuts.

    Raises:
        InputError: nothing fits on a rank.
    """
    pipeline = pipeline_of(config)
    requests = stage_requests(pipeline, request)
    plans = [_of_rank(rank, own) for rank, own in enumerate(requests)]
    leanest = max((plan.cuts for plan in plans), key=lambda cuts: (cuts.head_groups, -cuts.token_tile))
    for rank, own in enumerate(requests):
        if plans[rank].cuts != leanest:
            plans[rank] = _of_rank(rank, own.with_cuts(leanest))
    return PipelinePlan(config, requests, plans)


def _of_rank(rank: int, request: PlanRequest) -> MemoryPlan:
    try:
        return solve_plan(request)
    except Refused as error:
        text = f"rank {rank} of the pipeline ({request.model.num_layers} blocks): {error}"
        raise Refused(text, error.answer) from error


def _num_edges(pipeline: Pipeline, rank: int) -> int:
    """Tensors of hidden states that a rank sends to others for one micro-batch, gradients among them."""
    made = (Action(op, stage, 0) for stage in pipeline.stages_of(rank) for op in (Op.forward, Op.backward))
    takers = (pipeline.taker(action) for action in made)
    return sum(taker is not None and pipeline.rank_of(taker.stage) != rank for taker in takers)
