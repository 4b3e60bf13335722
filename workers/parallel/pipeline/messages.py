"""What stages of a pipeline hand to each other: outputs to the next one, their gradients back.

Posting never blocks. Receives are posted in the order in which the other rank sends, at least one ahead of the pass at
work; a send's tensor is kept until a later message from its receiver shows that it was taken.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from headrace.workers.memory.meter import Hold, Meter
from headrace.workers.parallel.collectives import PIPELINE, Traffic
from headrace.workers.parallel.dims import Axis, ParallelDims
from headrace.workers.parallel.pipeline.actions import Action, Pipeline

Lists = Sequence[Sequence[Action]]


@dataclass(frozen=True)
class Lines:
    """The groups over which the ranks of one pipeline reach each other. Made by all ranks of the run alike.

    Messages to higher ranks have another communicator than those to lower ranks: NCCL takes what two ranks send each
    other on one of them in turn, and both would wait for the other's receive.

    Args:
        ranks: of the whole run, by the place in the pipeline.
        rank: this one's place.
        every: all of them, for the passes of a shared vocabulary.
        ends: the first and the last rank; None on others.
    """

    ranks: tuple[int, ...]
    rank: int
    up: dist.ProcessGroup
    down: dist.ProcessGroup
    every: dist.ProcessGroup
    ends: dist.ProcessGroup | None

    @classmethod
    def of(cls, dims: ParallelDims, rank: int) -> Lines:
        """Needs the process group of the run."""
        apart = dims.world_size // dims.pipeline  # it is the outermost axis
        pipelines = [[first + apart * place for place in range(dims.pipeline)] for first in range(apart)]
        up, down, every, ends = (
            dist.new_subgroups_by_enumeration(groups)[0]
            for groups in (pipelines, pipelines, pipelines, [[ranks[0], ranks[-1]] for ranks in pipelines])
        )
        assert up is not None, "every rank has a pipeline"
        assert down is not None
        assert every is not None
        return cls(tuple(pipelines[rank % apart]), dims.coordinate(rank)[Axis.pipeline], up, down, every, ends)

    def group(self, source: int, to: int) -> dist.ProcessGroup:
        """That of messages between two places."""
        return self.up if source < to else self.down


class Messages:
    """Those of one rank in one step.

    Args:
        lists: action lists of all ranks.
        buffer: makes the tensor that a micro-batch's output, or its gradient, is received in.
        traffic: counts what is sent.
        meter: counts what is received and no pass has taken, and what is sent and not let go; None counts nothing.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        lists: Lists,
        lines: Lines,
        *,
        buffer: Callable[[int], torch.Tensor],
        traffic: Traffic,
        meter: Meter | None,
    ) -> None:
        self._pipeline, self._lines, self._buffer, self._traffic = pipeline, lines, buffer, traffic
        self._meter = meter
        self._places = [{action: at for at, action in enumerate(actions)} for actions in lists]
        self._expected = {
            source: deque(action for action in actions if self._rank_that_takes(action) == lines.rank)
            for source, actions in enumerate(lists)
            if source != lines.rank
        }
        self._here: dict[Action, tuple[torch.Tensor, Hold | None]] = {}
        self._coming: dict[Action, tuple[dist.Work, torch.Tensor, Hold | None]] = {}
        self._leaving: defaultdict[int, deque[tuple[Action, dist.Work, torch.Tensor, Hold | None]]]
        self._leaving = defaultdict(deque)
        for source in self._expected:
            self._post(source)

    def send(self, action: Action, tensor: torch.Tensor) -> None:
        """Hand on what a pass has made, if another one takes it."""
        to = self._rank_that_takes(action)
        if to is None:
            return
        if to == self._lines.rank:
            self._here[action] = tensor, self._held(tensor)
            return
        tensor = tensor.contiguous()
        self._traffic.add(PIPELINE, tensor.nbytes)
        work = dist.isend(tensor, self._lines.ranks[to], self._lines.group(self._lines.rank, to))
        taker = self._pipeline.taker(action)
        assert work is not None
        assert taker is not None
        self._leaving[to].append((taker, work, tensor, self._held(tensor)))

    def receive(self, action: Action) -> torch.Tensor:
        """What another pass has made."""
        source = self._pipeline.rank_of(action.stage)
        if source == self._lines.rank:
            return self._here.pop(action)[0]
        while action not in self._coming:
            self._post(source)
        work, tensor, _ = self._coming.pop(action)
        work.wait()
        self._let_go(source, self._places[source][action])
        self._post(source)
        return tensor

    def close(self) -> None:
        """Wait until all is taken: nothing of the step is under way."""
        for rank in self._leaving:
            self._let_go(rank, len(self._places[rank]))

    def _rank_that_takes(self, action: Action) -> int | None:
        taker = self._pipeline.taker(action)
        return None if taker is None else self._pipeline.rank_of(taker.stage)

    def _post(self, source: int) -> None:
        """Post the next receive from a rank, if there is one more."""
        if not self._expected[source]:
            return
        action = self._expected[source].popleft()
        tensor, lines = self._buffer(action.micro_batch), self._lines
        work = dist.irecv(tensor, lines.ranks[source], lines.group(source, lines.rank))
        assert work is not None
        self._coming[action] = work, tensor, self._held(tensor)

    def _held(self, tensor: torch.Tensor) -> Hold | None:
        return None if self._meter is None else self._meter.hold(tensor)

    def _let_go(self, rank: int, place: int) -> None:
        """Forget what a rank took before it came to a place of its list."""
        leaving = self._leaving[rank]
        while leaving and self._places[rank][leaving[0][0]] < place:
            leaving.popleft()[1].wait()
