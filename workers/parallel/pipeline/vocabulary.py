"""A vocabulary whose rows all ranks of a pipeline share: its passes E, X, S, C, T, D and d (arXiv 2411.05288).

    E  every rank looks up what it has rows of; the sum goes to the first stage
    X  the last stage's normed output, to all ranks
    S  statistics of the rank's scores, to all ranks          vocab_2: and their mean row
    C  the loss of all rows                                   vocab_2: the gradient of X, summed on the last stage
    T  gradients of the head's rows; scores are made again    vocab_1: and the gradient of X, as in C above
    D  the gradient of what E looked up, to all ranks
    d  gradients of the embedding's rows

Posting never blocks: a pass waits for what an earlier one has posted, not for its own. The rows are DTensors over
the pipeline and what shards them. They are gathered over the latter once in a step, and reduced once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from headrace.kernels.loss.checks import check_labels
from headrace.kernels.loss.options import IGNORED_TARGET
from headrace.kernels.loss.rows import (
    Rows,
    RowStatistics,
    hidden_part,
    labels_of,
    merged,
    row_gradients,
    row_statistics,
)
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.head_bytes import head_transient_bytes
from headrace.workers.memory.meter import Hold, Meter
from headrace.workers.model.decoder import Decoder
from headrace.workers.parallel.collectives import PIPELINE, Traffic, post_all_gather
from headrace.workers.parallel.config import Vocabulary
from headrace.workers.parallel.dims import Axis
from headrace.workers.parallel.meshes import REPLICATE_AXIS
from headrace.workers.parallel.pipeline.actions import Action, Op, Pipeline
from headrace.workers.parallel.pipeline.messages import Lines

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def share_rows(model: Decoder, mesh: DeviceMesh) -> None:
    """Embedding and head become rows of this rank: DTensors over a mesh (pipeline, ..., shard). In place."""
    for name in (EMBEDDING, HEAD)[: 1 if model.lm_head is None else 2]:
        param, owner = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
        cut = distribute_tensor(param.data, mesh, _placements(mesh), src_data_rank=None)
        owner.register_parameter("weight", nn.Parameter(cut, param.requires_grad))


def shared_rows(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of `share_rows`: FSDP2 leaves them alone."""
    return {
        p
        for p in model.parameters()
        if isinstance(p, DTensor) and Axis.pipeline in (p.device_mesh.mesh_dim_names or ())
    }


def _placements(mesh: DeviceMesh, shard: Placement | None = None, copies: Placement | None = None) -> list[Placement]:
    """By axis. The pipeline's ranks have consecutive rows.

    Args:
        shard / copies: over the ranks that share a rank's rows, and over those that have the same ones.
    """
    of_axis = {Axis.pipeline.value: Shard(0), REPLICATE_AXIS: copies or Replicate()}
    return [of_axis.get(name, shard or Shard(0)) for name in mesh.mesh_dim_names or ()]


@dataclass
class _Posted:
    """A tensor on its way."""

    tensor: torch.Tensor
    work: dist.Work | None
    hold: Hold | None = None

    def wait(self) -> torch.Tensor:
        """The tensor, there."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.tensor


@dataclass
class _MicroBatch:
    """What its passes leave each other. `at`: by the pass that posts it, or hands it over to be posted."""

    number: int
    tokens: torch.Tensor
    labels: torch.Tensor
    posted: dict[Op, _Posted] = field(default_factory=dict)
    own: RowStatistics | None = None
    mean: _Posted | None = None
    lse: torch.Tensor | None = None


class SharedVocabulary:
    """The passes of one rank. All ranks post alike, in the order of their action lists.

    Args:
        model: after share_rows.
        meter: counts hidden states and their gradients while they are here; None counts nothing.
        loss_tile, dtype, device: as for ByStage.
    """

    def __init__(
        self,
        model: Decoder,
        pipeline: Pipeline,
        lines: Lines,
        *,
        traffic: Traffic,
        meter: Meter | None,
        loss_tile: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model, self._lines, self._traffic, self._meter = model, lines, traffic, meter
        self._loss_tile, self._dtype, self._device = loss_tile, dtype, device
        self._is_last_rank = lines.rank == pipeline.rank_of(pipeline.num_stages - 1)
        self._first, self._last = (lines.ranks[pipeline.rank_of(stage)] for stage in (0, pipeline.num_stages - 1))
        self._is_vocab_1 = pipeline.vocabulary is Vocabulary.vocab_1
        self._head = EMBEDDING if model.lm_head is None else HEAD
        self._first_row = lines.rank * -(-model.config.vocab_size // pipeline.num_ranks)
        self._rows: dict[str, Rows] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._open: dict[int, _MicroBatch] = {}
        self._leaving: deque[_Posted] = deque()
        self.losses: list[torch.Tensor] = []

    def begin(self, batches: Sequence[TokenBatch], divisor: float, *, with_gradients: bool = True) -> None:
        """A step begins: gather the rows.

        Args:
            divisor: of the sum of token losses that gradients are of.
        """
        self._divisor, self._with_gradients = divisor, with_gradients
        self.losses = [torch.zeros((), device=self._device) for _ in batches]
        wide = torch.float64 if self._dtype is torch.float64 else torch.float32
        for name in dict.fromkeys((EMBEDDING, self._head)):
            param = self._model.get_parameter(name).detach().to(self._dtype)
            assert isinstance(param, DTensor), "share_rows comes first"
            weight = param.redistribute(placements=_placements(param.device_mesh, shard=Replicate())).to_local()
            self._rows[name] = Rows(weight, self._first_row, self._loss_tile, self._model.operators.kernels)
            if with_gradients and self._model.get_parameter(name).requires_grad:
                self._sums[name] = torch.zeros(weight.shape, dtype=wide, device=self._device)
        for i, batch in enumerate(batches):
            labels = labels_of(batch.targets, IGNORED_TARGET)
            check_labels(batch.targets, IGNORED_TARGET, self._model.config.vocab_size)
            tokens = batch.tokens.to(self._device, non_blocking=True)
            self._open[i] = _MicroBatch(i, tokens, labels.to(self._device, non_blocking=True))

    @torch.no_grad()
    def run(self, action: Action) -> None:
        """One of the passes of the module."""
        passes = {
            Op.lookup: self._look_up,
            Op.hidden: self._broadcast_hidden,
            Op.scores: self._score,
            Op.rescale: self._merge,
            Op.vocabulary_grad: self._rows_back,
            Op.embedding_grad: self._broadcast_gradient,
            Op.rows_grad: self._embedding_back,
        }
        passes[action.op](self._open[action.micro_batch])
        self._let_go()

    def looked_up(self, micro_batch: int) -> torch.Tensor:
        """What the first stage takes, (B, T, H), on its rank."""
        return self._open[micro_batch].posted.pop(Op.lookup).wait()

    def put_output(self, micro_batch: int, normed: torch.Tensor) -> None:
        """What leaves the last stage, (B, T, H), on its rank."""
        self._open[micro_batch].posted[Op.hidden] = self._held(normed.contiguous())

    def output_gradient(self, micro_batch: int) -> torch.Tensor:
        """The gradient of what leaves the last stage, on its rank."""
        own = self._open[micro_batch]
        done = own.posted.pop(Op.vocabulary_grad if self._is_vocab_1 else Op.rescale)
        grad = done.wait().mul_(1.0 / self._divisor).to(self._dtype).view(*own.tokens.shape, -1)
        self._release(done)
        return grad

    def put_input_gradient(self, micro_batch: int, grad: torch.Tensor) -> None:
        """The gradient of what the first stage took, on its rank."""
        self._open[micro_batch].posted[Op.embedding_grad] = self._held(grad)

    def end(self) -> None:
        """The step is over: what was posted is there, and the parameters have their gradients."""
        while self._leaving:
            self._release(self._leaving.popleft())
        for name, total in self._sums.items():
            param = self._model.get_parameter(name)
            assert isinstance(param, DTensor)
            mesh = param.device_mesh
            parts = DTensor.from_local(
                total.mul_(1.0 / self._divisor).to(param.dtype),
                mesh,
                _placements(mesh, shard=Partial(), copies=Partial()),
                run_check=False,
                shape=param.shape,
                stride=param.stride(),
            )
            param.grad = parts.redistribute(placements=_placements(mesh))
        self.drop()

    def drop(self) -> None:
        """Forget an unfinished step."""
        self._rows, self._sums, self._open = {}, {}, {}
        self._leaving.clear()

    def _look_up(self, own: _MicroBatch) -> None:
        rows = self._rows[EMBEDDING]
        inside, places = rows.of_labels(own.tokens.reshape(-1))
        if len(rows.weight):
            found = F.embedding(places, rows.weight).masked_fill_(~inside[:, None], 0.0)
        else:
            found = rows.weight.new_zeros(len(places), rows.weight.shape[1])
        posted = self._reduce(found.view(*own.tokens.shape, -1), self._first)
        if posted is not None:
            own.posted[Op.lookup] = posted

    def _broadcast_hidden(self, own: _MicroBatch) -> None:
        self._broadcast(own, Op.hidden, self._last)

    def _score(self, own: _MicroBatch) -> None:
        rows, hidden = self._rows[self._head], own.posted[Op.hidden].wait().flatten(0, 1)
        self._count_tile(rows, len(hidden))
        with_mean = self._with_gradients and not self._is_vocab_1
        own.own, mean = row_statistics(rows, hidden, own.labels, with_mean=with_mean)
        own.mean = None if mean is None else self._held(mean)
        stacked = torch.stack(own.own)
        self._traffic.add(PIPELINE, stacked.nbytes)
        every, work = post_all_gather(stacked, self._lines.every)
        own.posted[Op.scores] = _Posted(every, work)
        self._leaving.append(_Posted(stacked, work))

    def _merge(self, own: _MicroBatch) -> None:
        every = own.posted.pop(Op.scores).wait()
        own.lse, losses = merged([RowStatistics(*each) for each in every])
        if self._is_last_rank:
            total = losses.masked_fill(own.labels < 0, 0.0).sum(dtype=torch.float64)
            self.losses[own.number] = total.to(losses.dtype)
        mean, own.mean = own.mean, None
        if mean is not None:
            assert own.own is not None
            part = hidden_part(self._rows[self._head], mean.tensor, own.own, own.lse, own.labels)
            posted = self._reduce(part, self._last)
            if posted is not None:
                own.posted[Op.rescale] = posted

    def _rows_back(self, own: _MicroBatch) -> None:
        assert own.lse is not None
        held = own.posted.pop(Op.hidden)
        self._count_tile(self._rows[self._head], len(own.labels))
        d_hidden = row_gradients(
            self._rows[self._head],
            held.wait().flatten(0, 1),
            own.labels,
            own.lse,
            d_rows=self._sums.get(self._head),
            with_hidden=self._is_vocab_1,
        )
        self._release(held)
        if d_hidden is not None and (posted := self._reduce(d_hidden, self._last)) is not None:
            own.posted[Op.vocabulary_grad] = posted

    def _broadcast_gradient(self, own: _MicroBatch) -> None:
        self._broadcast(own, Op.embedding_grad, self._first)

    def _embedding_back(self, own: _MicroBatch) -> None:
        held = own.posted.pop(Op.embedding_grad)
        grad, total, rows = held.wait().flatten(0, 1), self._sums.get(EMBEDDING), self._rows[EMBEDDING]
        if total is not None and len(total):
            inside, places = rows.of_labels(own.tokens.reshape(-1))
            if (pad := self._model.embed_tokens.padding_idx) is not None:
                inside = inside & (own.tokens.reshape(-1) != pad)
            # Sums are of gradients times the divisor, as those of the head are.
            wide = grad.to(total.dtype).masked_fill(~inside[:, None], 0.0).mul_(self._divisor)
            total += torch.ops.aten.embedding_dense_backward(wide, places.where(inside, 0), len(total), -1, False)
        self._release(held)

    def _reduce(self, tensor: torch.Tensor, to: int) -> _Posted | None:
        """Post a sum over the ranks; what comes of it, on rank `to` of the run."""
        self._traffic.add(PIPELINE, tensor.nbytes)
        posted = self._held(tensor, dist.reduce(tensor, to, group=self._lines.every, async_op=True))
        if to == dist.get_rank():
            return posted
        self._leaving.append(posted)
        return None

    def _broadcast(self, own: _MicroBatch, op: Op, source: int) -> None:
        """Post what a rank has handed over here."""
        if source != dist.get_rank():
            width = self._model.config.hidden_size
            buffer = torch.empty(*own.tokens.shape, width, dtype=self._dtype, device=self._device)
            own.posted[op] = self._held(buffer)
        else:
            self._traffic.add(PIPELINE, own.posted[op].tensor.nbytes)
        own.posted[op].work = dist.broadcast(own.posted[op].tensor, source, group=self._lines.every, async_op=True)

    def _count_tile(self, rows: Rows, num_tokens: int) -> None:
        """Tell the meter what scores take while they are there."""
        if self._meter is not None:
            num_bytes = head_transient_bytes(
                *rows.weight.shape,
                num_tokens=num_tokens,
                loss_tile=rows.tile,
                itemsize=self._dtype.itemsize,
                casts_products=True,
                is_frozen=True,
            )
            self._meter.reserve(num_bytes).release()

    def _held(self, tensor: torch.Tensor, work: dist.Work | None = None) -> _Posted:
        return _Posted(tensor, work, None if self._meter is None else self._meter.hold(tensor))

    def _release(self, posted: _Posted) -> None:
        posted.wait()
        if posted.hold is not None:
            posted.hold.release()

    def _let_go(self) -> None:
        """Forget what the others have taken."""
        while self._leaving and ((work := self._leaving[0].work) is None or work.is_completed()):
            self._release(self._leaving.popleft())
