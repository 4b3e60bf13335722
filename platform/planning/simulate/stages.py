"""A pipeline's ranks as the planner sees them, and their timeline. No torch.

Each rank has blocks of its own, holds several micro-batches at once, and may have another plan than its neighbours. The
order of its passes is that of the action lists that ranks run (workers/parallel/pipeline).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.simulate.blocks import Part, Rank, Task, shared_rates
from headrace.platform.planning.simulate.engine import Simulation, What
from headrace.platform.planning.simulate.network import GRADIENT_BYTES, Network
from headrace.platform.planning.simulate.step import StepTimeline
from headrace.workers.memory.plan import MemoryPlan, Sweep
from headrace.workers.parallel.config import Vocabulary
from headrace.workers.parallel.dims import ParallelDims
from headrace.workers.parallel.pipeline.actions import V_SCHEDULES, Action, Op, Pipeline, resolve_pipeline, stage_layers
from headrace.workers.parallel.pipeline.check import check_lists
from headrace.workers.parallel.pipeline.moments import rank_passes
from headrace.workers.parallel.pipeline.schedules import Durations, simulate

if TYPE_CHECKING:
    from headrace.platform.config.schema import RunConfig


def pipeline_of(config: RunConfig) -> Pipeline:
    """The shape of a run's pipeline, with the defaults of its schedule. Raises InputError as Pipeline."""
    return resolve_pipeline(config.parallel, config.train.micro_batches)


def stage_requests(pipeline: Pipeline, request: PlanRequest) -> list[PlanRequest]:
    """What the planner is asked for every rank of a pipeline.

    With a shared vocabulary every rank has a part of its rows. Else the first rank has the look-up and the last one the
    head; the bytes of the first are then those of tied embeddings.
    """
    model, layers = request.model, stage_layers(request.model.num_layers, pipeline.num_stages)
    even = Durations.even(pipeline, 1.0, 1.0, 1.0)
    lists = simulate(pipeline, even).lists
    ends = {pipeline.rank_of(0), pipeline.rank_of(pipeline.num_stages - 1)}
    found = []
    for rank in range(pipeline.num_ranks):
        has_head = pipeline.is_shared or rank == pipeline.rank_of(pipeline.num_stages - 1)
        own = replace(model, num_layers=sum(len(layers[stage]) for stage in pipeline.stages_of(rank)))
        if pipeline.is_shared:
            own = replace(own, vocab_size=-(-model.vocab_size // pipeline.num_ranks))
        elif len(ends) > 1:
            # One table at an end, none between.
            own = replace(own, tie_embeddings=True, vocab_size=model.vocab_size if rank in ends else 1)
        found.append(
            replace(
                request,
                model=own,
                passes=rank_passes(pipeline, lists, rank, model.num_layers),
                has_lookup=pipeline.is_shared or rank == pipeline.rank_of(0),
                has_head=has_head,
                sweep=Sweep.by_layer,
                # These would change the stages of all ranks, or the degrees would not make up the ranks.
                pinned=(*request.pinned, "model.num_layers", "train.micro_batches", "cluster"),
            )
        )
    return found


def pipeline_timeline(
    pipeline: Pipeline, requests: Sequence[PlanRequest], plans: Sequence[MemoryPlan], dims: ParallelDims
) -> StepTimeline:
    """The timeline of a pipeline's ranks under their plans.

    Raises:
        InputError: a rate that a plan or a degree needs is not known; names the key.
    """
    network = Network(dims, requests[0].ranks_per_node, requests[0].profile)
    per_stage = network.dims.world_size // pipeline.num_ranks
    nodes = [rank * per_stage // network.ranks_per_node for rank in range(pipeline.num_ranks)]
    of_role = min(per_stage, network.ranks_per_node)
    links: dict[str, float] = {}
    for node in nodes:
        links |= shared_rates(requests[0], node, of_role)
    simulation = Simulation(links)
    ranks = [
        Rank(simulation, number, Part(request, plan, network), node=node, gathers_once=True)
        for number, (request, plan, node) in enumerate(zip(requests, plans, nodes, strict=True))
    ]
    work = _Work(pipeline, ranks)
    lists = simulate(pipeline, work.durations).lists
    check_lists(pipeline, lists)
    work.add(lists)
    events = simulation.run()
    step_s = max((event.end_s for event in events), default=0.0)
    return StepTimeline(tuple(f"stage {r}" for r in range(len(ranks))), events, step_s, network.dims.world_size)


@dataclass(frozen=True)
class _Work:
    """Turns actions into tasks."""

    pipeline: Pipeline
    ranks: Sequence[Rank]

    def layers(self, stage: int) -> range:
        """Places of a stage's blocks on its rank."""
        pipeline, counts = self.pipeline, self.counts
        own = pipeline.stages_of(pipeline.rank_of(stage))
        before = sum(counts[other] for other in own if other < stage)
        return range(before, before + counts[stage])

    @cached_property
    def counts(self) -> list[int]:
        """Blocks of every stage."""
        num_layers = sum(rank.num_layers for rank in self.ranks)
        return [len(layers) for layers in stage_layers(num_layers, self.pipeline.num_stages)]

    @cached_property
    def head_s(self) -> list[float]:
        """Seconds of head and loss of every rank, forward and backward."""
        return [rank.head_s for rank in self.ranks]

    @cached_property
    def hidden_bytes(self) -> float:
        """Of the hidden states of a micro-batch that a stage sends on, of one rank."""
        rank = self.ranks[0]
        request, dims = rank.part.request, rank.part.network.dims
        tokens = rank.part.batch_tokens / (dims.ring * dims.ulysses)
        return tokens * request.model.hidden_size * request.itemsize

    @property
    def wide_bytes(self) -> float:
        """Of their gradient in fp32, as it is summed over the ranks of the vocabulary."""
        return self.hidden_bytes * GRADIENT_BYTES / self.ranks[0].part.request.itemsize

    @cached_property
    def durations(self) -> Durations:
        """Seconds of the passes, for the order of the lists: compute and what stands between blocks."""
        rows: list[list[float]] = [[], [], []]
        for stage in range(self.pipeline.num_stages):
            rank = self.ranks[self.pipeline.rank_of(stage)]
            for row, seconds in zip(rows, rank.pass_seconds(self.layers(stage)), strict=True):
                row.append(seconds)
        vocabulary = {}
        if self.pipeline.is_shared:
            s, t = self._vocabulary_shares
            vocabulary = {Op.scores: s * self.head_s[0], Op.vocabulary_grad: t * self.head_s[0]}
        else:
            last = self.pipeline.num_stages - 1
            rows[1][last] += self.head_s[self.pipeline.rank_of(last)]
        dims = self.ranks[0].part.network.dims
        _, rate = self.ranks[0].part.network.stages()
        return Durations(rows[0], rows[1], rows[2], send=self.hidden_bytes / dims.tensor / rate, vocabulary=vocabulary)

    @property
    def _vocabulary_shares(self) -> tuple[float, float]:
        """Products of S and of T, of the three of a head: vocab_2 makes the hidden states' gradient in S.

        T makes the scores again, which are not held from S to T.
        """
        return (2 / 3, 2 / 3) if self.pipeline.vocabulary is Vocabulary.vocab_2 else (1 / 3, 1.0)

    def add(self, lists: Sequence[Sequence[Action]]) -> None:
        """Add the tasks of all ranks; an action comes after all that it waits for."""
        over: dict[Action, list[Task]] = {}
        posted: dict[Action, list[list[Task]]] = {}
        at = [0] * len(lists)
        while any(at[rank] < len(actions) for rank, actions in enumerate(lists)):
            for rank, actions in enumerate(lists):
                while at[rank] < len(actions):
                    action = actions[at[rank]]
                    waits = self.pipeline.waits(rank, action)
                    if not all(wait in over for wait in waits):
                        break
                    tasks = self._task(rank, action, [task for wait in waits for task in over[wait]])
                    if action.op in self.pipeline.group_ops:
                        posted.setdefault(action, []).append(tasks)
                        if len(posted[action]) == len(lists):
                            over[action] = [task for row in posted[action] for task in row]
                    else:
                        over[action] = tasks
                    at[rank] += 1
        for own in self.ranks if self.pipeline.schedule in V_SCHEDULES else ():
            own.weights(own.num_layers, GRADIENT_BYTES, "gradients", [own.last])

    def _task(self, rank: int, action: Action, needs: list[Task]) -> list[Task]:
        pipeline, own, (op, stage, i) = self.pipeline, self.ranks[rank], action
        label, last = f"micro-batch {i}", pipeline.num_stages - 1
        dims = own.part.network.dims
        if op is Op.forward:
            done = own.forward(self.layers(stage), label, needs)
            is_local = stage == last or pipeline.rank_of(stage + 1) == rank
            return [done if is_local else own.send(self.hidden_bytes / dims.tensor, label, [done])]
        if op in (Op.backward, Op.input_grad):
            if stage == last and not pipeline.is_shared:
                own.compute(What.head, self.head_s[rank], label, [own.last, *needs])
            # Where gradients of weights come in passes of their own, gradients are reduced behind all of them.
            ends = i == pipeline.num_micro_batches - 1 and pipeline.schedule not in V_SCHEDULES
            done = own.backward(self.layers(stage), label, needs, splits=op is Op.input_grad, ends=ends)
            is_local = stage == 0 or pipeline.rank_of(stage - 1) == rank
            return [done if is_local else own.send(self.hidden_bytes / dims.tensor, label, [done])]
        if op is Op.weight_grad:
            return [own.weight_grads(self.layers(stage), label)]
        if op in (Op.scores, Op.vocabulary_grad):
            share = self._vocabulary_shares[op is Op.vocabulary_grad]
            done = own.compute(What.vocabulary, share * self.head_s[rank], label, [own.last, *needs])
            sends = op is Op.vocabulary_grad and op in pipeline.group_ops
            return [own.send(self.wide_bytes, label, [done]) if sends else done]
        # E, X, D: one payload of hidden states from where it is; C: with vocab_2 their gradient in fp32; d: no work.
        source = {
            Op.lookup: True,
            Op.hidden: rank == pipeline.rank_of(last),
            Op.embedding_grad: rank == pipeline.rank_of(0),
        }
        if op is Op.rescale and pipeline.vocabulary is Vocabulary.vocab_2:
            return [own.send(self.wide_bytes, label, needs)]
        return [own.send(self.hidden_bytes, label, needs)] if source.get(op) else list(needs)
