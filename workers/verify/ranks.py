"""Ranks that share the rows or the blocks of a verification: this process is rank 0, the others are started here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.ports import free_port
from headrace.workers.data.batch import TokenBatch
from headrace.workers.job import RankContext
from headrace.workers.model.config import ModelConfig
from headrace.workers.parallel.collectives import Traffic
from headrace.workers.parallel.config import RingLayout
from headrace.workers.parallel.context import TokenIndex
from headrace.workers.parallel.dims import TOKEN_AXES, Axis, ParallelDims, resolve_dims
from headrace.workers.parallel.meshes import Meshes
from headrace.workers.parallel.pipeline.actions import resolve_pipeline
from headrace.workers.parallel.pipeline.by_stage import PipelineRank
from headrace.workers.parallel.pipeline.messages import Lines
from headrace.workers.parallel.process_group import gathered, process_group
from headrace.workers.parallel.ulysses import ContextGroup
from headrace.workers.verify.config import VerifyConfig
from headrace.workers.verify.steps import StepGradients

# Longer than any comparison: the others wait while rank 0 runs the oracle.
TIMEOUT_S = 7 * 86400.0
OTHER_RANK = "headrace.workers.verify.other_rank"


@dataclass(frozen=True)
class Sharing:
    """This rank among those that share a verification.

    Args:
        context: those that share its rows.
        part: its place in a pipeline of `num_layers` blocks; None without one.
        lines: to the others of the pipeline.
    """

    dims: ParallelDims
    meshes: Meshes
    context: ContextGroup | None
    part: PipelineRank | None
    lines: Lines | None
    window: int | None

    @classmethod
    def of(cls, config: VerifyConfig, device: torch.device, model: ModelConfig) -> Sharing | None:
        """Needs the process group of `other_ranks`; None for a single rank."""
        if config.num_ranks == 1:
            return None
        parallel = config.parallel
        dims = resolve_dims(parallel, config.num_ranks)
        meshes, part, lines = Meshes.build(dims, device.type), None, None
        if dims.pipeline > 1:
            place = dims.coordinate(dist.get_rank())[Axis.pipeline]
            part = PipelineRank(resolve_pipeline(parallel, config.micro_batches), place, model.num_layers)
            lines = Lines.of(dims, dist.get_rank())
        return cls(dims, meshes, ContextGroup.of(meshes, Traffic()), part, lines, model.sliding_window)

    def split(self, batch: TokenBatch) -> TokenBatch:
        """This rank's part of a micro-batch."""
        return TokenIndex.of(self.dims, dist.get_rank(), RingLayout.auto, self.window).split(batch)

    def add_up(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        total = value.clone()
        self.meshes.add_up(total, *TOKEN_AXES, Axis.pipeline)
        return total

    def of_all_stages(self, step: StepGradients) -> StepGradients:
        """A step with the gradients of all stages: each rank has those of its own."""
        if self.part is None:
            return step
        grads: dict[str, torch.Tensor] = {}
        for rank, named in enumerate(gathered({name: grad.shape for name, grad in step.grads.items()})):
            for name, shape in named.items():
                if name not in grads:
                    like = next(iter(step.grads.values()))
                    grads[name] = step.grads[name] if rank == dist.get_rank() else like.new_empty(shape)
                    dist.broadcast(grads[name], src=rank)
        return StepGradients(step.loss, grads)


@contextmanager
def other_ranks(config: VerifyConfig, device: torch.device) -> Iterator[None]:
    """Start the other ranks and be rank 0 of their group, for as long as the block runs; nothing for a single rank."""
    if config.num_ranks == 1:
        yield
        return
    port = free_port()
    with CleanUps() as closing:
        for rank in range(1, config.num_ranks):
            words = [sys.executable, "-m", OTHER_RANK, str(rank), str(port), json.dumps(asdict(config))]
            child = subprocess.Popen(words, stdin=subprocess.DEVNULL)
            closing.callback(_end, child)
        with member(0, port, config, device):
            yield


def _end(child: subprocess.Popen[bytes]) -> None:
    """Give a rank that has done its part a moment to end by itself; it is no use when rank 0 has failed."""
    try:
        child.wait(timeout=10.0)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@contextmanager
def member(rank: int, port: int, config: VerifyConfig, device: torch.device) -> Iterator[None]:
    """Be a rank of the group, with its share of this process's cores, for as long as the block runs."""
    count, was = config.num_ranks, torch.get_num_threads()
    context = RankContext(
        rank, count, rank, count, master_port=port, device=device.type, collective_timeout_s=TIMEOUT_S
    )
    torch.set_num_threads(max(1, was // count))
    try:
        with process_group(context, device):
            yield
    finally:
        torch.set_num_threads(was)
