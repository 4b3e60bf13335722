"""The plan of a run with pipeline stages: one for every rank of the pipeline, and the step that they make together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from headrace.storage.core.records import Medium
from headrace.workers.memory.plan import MemoryPlan


@dataclass(frozen=True)
class PipelinePlan:
    """Plans of all ranks of a pipeline, in their order, and their timeline."""

    config: RunConfig
    requests: Sequence[PlanRequest]
    plans: Sequence[MemoryPlan]
    timeline: StepTimeline

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
            f"{request.batch_size} x {request.micro_batches} micro-batches, on {self.timeline.num_ranks} x "
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
        lines += [
            "",
            f"step: {self.timeline.step_s:.4g} s, {self.tokens_per_s:.4g} tokens/s per GPU; ranks do not compute for "
            f"{self.idle_pct:.0f} % of it",
            "from a simulated timeline (timeline=FILE.png draws it); the optimizer's update is not in it",
        ]
        return "\n".join(lines)

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
    """Solve the plan of every rank and simulate the step.

    Raises:
        InputError: nothing fits on a rank, or a rate that the timeline needs is not known.
    """
    pipeline = pipeline_of(config)
    requests = stage_requests(pipeline, request)
    plans = []
    for rank, own in enumerate(requests):
        try:
            plans.append(solve_plan(own))
        except Refused as error:
            text = f"rank {rank} of the pipeline ({own.model.num_layers} blocks): {error}"
            raise Refused(text, error.answer) from error
    return PipelinePlan(config, requests, plans, pipeline_timeline(pipeline, requests, plans, dims_of(config)))
