"""The timeline of one step: of one rank for every role, whatever the number of ranks. No torch.

Ranks that differ in their place on the axes data, ring, ulysses and tensor have the same work, so one stands for all.
The optimizer's update is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.simulate.blocks import Part, Rank, shared_rates
from headrace.platform.planning.simulate.by_chunk import add_chunks
from headrace.platform.planning.simulate.engine import Event, Simulation, Stream, What
from headrace.platform.planning.simulate.network import Network
from headrace.workers.memory.plan import MemoryPlan, Sweep
from headrace.workers.parallel.dims import ParallelDims

if TYPE_CHECKING:
    from headrace.platform.config.schema import RunConfig


@dataclass(frozen=True)
class StepTimeline:
    """What one rank of every role does in a step.

    Args:
        roles: names of the roles, for people.
        events: of the part of the step that was simulated.
        step_s: seconds of the whole step.
        num_ranks: that the roles stand for.
        note: what the events leave out, for people; empty: nothing.
    """

    roles: tuple[str, ...]
    events: Sequence[Event]
    step_s: float
    num_ranks: int
    note: str = ""

    @property
    def shown_s(self) -> float:
        """Seconds that the events cover."""
        return max((event.end_s for event in self.events), default=0.0)

    def busy(self, role: int, stream: Stream) -> float:
        """Seconds that a stream works."""
        return sum(e.end_s - e.start_s for e in self.events if e.role == role and e.stream is stream)

    def busy_share(self, role: int, stream: Stream) -> float:
        """Share of the events' time that a stream works."""
        return self.busy(role, stream) / self.shown_s if self.events else 0.0


def dims_of(config: RunConfig) -> ParallelDims:
    """The degrees of a configuration that passed its rules, built or not."""
    parallel, names = config.parallel, ("tensor", "ulysses", "ring", "pipeline")
    degrees = {name: getattr(parallel, name) for name in names}
    data = parallel.data or config.cluster.num_ranks // math.prod(degrees.values())
    return ParallelDims(data, parallel.fsdp or data * parallel.ulysses * parallel.ring, **degrees)


def step_timeline(plan: MemoryPlan, request: PlanRequest, config: RunConfig) -> StepTimeline:
    """The timeline of a run's plan. Raises InputError as simulate_step."""
    network = Network(dims_of(config), request.ranks_per_node, request.profile)
    return simulate_step(Part(request, plan, network))


def simulate_step(part: Part) -> StepTimeline:
    """The timeline of a run without pipeline stages.

    With several micro-batches the first and the last are simulated; those between are like the first.

    Raises:
        InputError: a rate that the plan or its degrees need is not known; names the key.
    """
    request = part.request
    simulation = Simulation(shared_rates(request, 0, request.ranks_per_node))
    rank = Rank(simulation, 0, part)
    number = request.micro_batches
    ends = []
    for place in range(min(2, number)):
        label = "" if number == 1 else f"micro-batch {place * (number - 1)}"
        if part.plan.sweep is Sweep.by_chunk:
            ends.append(add_chunks(rank, label))
            continue
        layers = range(rank.num_layers)
        rank.forward(layers, label)
        rank.compute(What.head, rank.head_s, label, [rank.last])
        ends.append(rank.backward(layers, label, ends=place == min(2, number) - 1))
    events, over = simulation.run(), simulation.end_s
    first_s = over(ends[0]) if ends[0] is not None else 0.0
    whole_s = max((event.end_s for event in events), default=0.0)
    note = "" if number <= 2 else f"{number - 2} more micro-batches, each like the first, are not shown"
    return StepTimeline(
        ("every rank",), events, whole_s + max(0, number - 2) * first_s, part.network.dims.world_size, note
    )
