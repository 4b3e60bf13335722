"""The sweep by layer over a pipeline: this rank's stages, run as its action list says.

    F   takes the output of the stage before (the first stage: the tokens), sends its own on
    B   takes the gradient of its output (the last stage: of the loss), sends that of its input back
    I   as B, but the products for the weights' gradients of the blocks wait in the queue
    W   runs them

A vocabulary that all ranks share has passes of its own: see vocabulary.py.

The blocks keep their names and numbers of the whole model. FSDP2 gathers their weights once in a step and reduces their
gradients in the rank's last backward; of a schedule with passes W, behind the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from headrace.workers.memory.by_layer import head_counted
from headrace.workers.memory.shelf import Call
from headrace.workers.memory.weight_queue import WeightQueue
from headrace.workers.model.decoder import Decoder, StagePass
from headrace.workers.parallel.collectives import Traffic
from headrace.workers.parallel.pipeline.actions import V_SCHEDULES, Action, Op, Pipeline, stage_layers
from headrace.workers.parallel.pipeline.check import check_lists
from headrace.workers.parallel.pipeline.messages import Lines, Messages
from headrace.workers.parallel.pipeline.schedules import Durations, in_flight, simulate
from headrace.workers.parallel.pipeline.vocabulary import SharedVocabulary, share_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from headrace.workers.data.batch import TokenBatch
    from headrace.workers.memory.meter import Meter
    from headrace.workers.memory.policy import MemoryHandle


Enter = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PipelineRank:
    """One rank's part of a model.

    Args:
        rank: its place in the pipeline.
    """

    pipeline: Pipeline
    rank: int
    num_layers: int

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The numbers of its blocks, in the order of the model."""
        return tuple(layer for stage in self.pipeline.stages_of(self.rank) for layer in self.of_stage(stage))

    def of_stage(self, stage: int) -> range:
        """The numbers of a stage's blocks."""
        return stage_layers(self.num_layers, self.pipeline.num_stages)[stage]

    @property
    def has_first(self) -> bool:
        """Whether it looks tokens up."""
        return self.rank == self.pipeline.rank_of(0)

    @property
    def has_last(self) -> bool:
        """Whether it has norm, head and loss."""
        return self.rank == self.pipeline.rank_of(self.pipeline.num_stages - 1)

    def has_copy(self, model: Decoder) -> bool:
        """Whether its head is a copy of the first rank's embedding: their gradients are parts of one."""
        is_whole = not self.pipeline.is_shared
        return is_whole and model.config.tie_embeddings and self.has_last and not self.has_first

    def cut(self, model: Decoder, mesh: DeviceMesh | None) -> None:
        """Leave the rank's blocks and ends in a model, under the names that they have in the whole.

        Args:
            mesh: of parameters that all stages share: Meshes.stages.
        """
        blocks = dict(model.blocks.named_children())
        model.blocks = nn.ModuleList()
        for layer in self.layers:
            model.blocks.add_module(str(layer), blocks[str(layer)])
        if not self.has_last:
            del model.norm
        if self.pipeline.is_shared:
            assert mesh is not None, "ranks that share tensors by degree have no such mesh, and are refused"
            share_rows(model, mesh)
            return
        if not self.has_last:
            model.lm_head = None
        if not self.has_first and not self.has_copy(model):
            del model.embed_tokens


@lru_cache(maxsize=16)
def action_lists(pipeline: Pipeline) -> tuple[tuple[Action, ...], ...]:
    """The checked lists of all ranks, from a timeline of even stages: backward takes twice as long as forward."""
    lists = simulate(pipeline, Durations.even(pipeline, 1.0, 1.0, 1.0)).lists
    check_lists(pipeline, lists)
    return lists


def most_in_flight(pipeline: Pipeline) -> int:
    """Micro-batches of all of a rank's blocks that a rank holds at most."""
    return max(-(-in_flight(actions) // pipeline.chunks) for actions in action_lists(pipeline))


class ByStage:
    """The stages of one rank. All ranks call alike.

    Args:
        model: cut, with the plan applied, sharded.
        handle: of that plan.
        meter, loss_tile: as for ByLayer.
        dtype: of what is computed, and of what stages hand on.
        on_pass: called with the number of its micro-batch, and how many there are, when a pass of a step begins.
    """

    def __init__(
        self,
        model: Decoder,
        handle: MemoryHandle,
        meter: Meter | None,
        part: PipelineRank,
        lines: Lines,
        *,
        traffic: Traffic,
        loss_tile: int,
        dtype: torch.dtype,
        device: torch.device,
        on_pass: Callable[[int, int], None] = lambda micro_batch, num_micro_batches: None,
    ) -> None:
        self._model, self._handle, self._meter = model, handle, meter
        self._weights = WeightQueue(meter)
        if part.pipeline.schedule in V_SCHEDULES:
            handle.split_backward(self._weights)
        self._part, self._lines, self._traffic = part, lines, traffic
        self._loss_tile, self._dtype, self._device, self._on_pass = loss_tile, dtype, device, on_pass
        self._vocabulary: SharedVocabulary | None = None
        if part.pipeline.is_shared:
            self._vocabulary = SharedVocabulary(
                *(model, part.pipeline, lines),
                traffic=traffic,
                meter=meter,
                loss_tile=loss_tile,
                dtype=dtype,
                device=device,
            )

    def forward_backward(
        self, batches: Sequence[TokenBatch], divisor: float, *, step: int, seed: int = 0, rows: Sequence[int] = ()
    ) -> list[torch.Tensor]:
        """Add the gradients of sum of token losses / divisor to the parameters', over all micro-batches of a step.

        Args:
            seed / rows: of random masks, by micro-batch; see MemoryHandle.begin.

        Returns:
            The sum of token losses of every micro-batch; 0 on ranks without the last stage.

        Raises:
            InputError: fewer micro-batches than ranks. Others as Sweeping.
        """
        pipeline = replace(self._part.pipeline, num_micro_batches=len(batches))
        lists = action_lists(pipeline)
        own = lists[self._part.rank]
        losses = [torch.zeros((), device=self._device) for _ in batches]
        messages = self._messages(pipeline, lists, batches, self._meter)
        open_passes: dict[tuple[int, int], _Open] = {}
        splits = pipeline.schedule in V_SCHEDULES
        last_backward = -1 if splits else max(at for at, action in enumerate(own) if action.op is Op.backward)
        self._sync(False)
        if self._vocabulary is not None:
            self._vocabulary.begin(batches, divisor)
        self._handle.follow([call for action in own for call in self._calls(action)])
        with self._meter or nullcontext():
            for at, action in enumerate(own):
                op, stage, i = action
                self._on_pass(i, len(batches))
                if stage < 0:
                    assert self._vocabulary is not None
                    self._vocabulary.run(action)
                elif op is Op.forward:
                    self._handle.begin(step, i, seed=seed, row=rows[i] if rows else 0, stage=stage)
                    made = open_passes[stage, i] = self._forward(action, batches[i], divisor, messages)
                    if made.loss is not None:
                        losses[i] = made.loss
                elif op is Op.weight_grad:
                    self._weights.run(stage, i)
                else:
                    self._sync(at == last_backward)
                    with self._weights.input_gradient(stage, i) if op is Op.input_grad else nullcontext():
                        self._backward(action, open_passes.pop((stage, i)), batches[i], messages)
        messages.close()
        if splits:
            self._weights.end()
            self._reduce()
        self._handle.end()
        if self._vocabulary is not None:
            self._vocabulary.end()
            return self._vocabulary.losses
        self._add_up_tied()
        return losses

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch) -> torch.Tensor:
        """The sum of token losses; 0 on ranks without the last stage. No gradient, no tier."""
        pipeline = self._part.pipeline
        ranks = range(pipeline.num_ranks)
        lists = [[Action(Op.forward, stage, 0) for stage in pipeline.stages_of(rank)] for rank in ranks]
        messages, found = self._messages(pipeline, lists, [batch], None), torch.zeros((), device=self._device)
        if self._vocabulary is not None:
            self._vocabulary.begin([batch], 1.0, with_gradients=False)
            self._vocabulary.run(Action(Op.lookup, -1, 0))
        for action in lists[self._part.rank]:
            out = self._run(action, batch, messages)
            if self._is_last(action.stage):
                found = out
            messages.send(action, out)
        messages.close()
        if self._vocabulary is None:
            return found
        if self._part.has_last:
            self._vocabulary.put_output(0, found)
        for op in (Op.hidden, Op.scores, Op.rescale):
            self._vocabulary.run(Action(op, -1, 0))
        self._vocabulary.end()
        return self._vocabulary.losses[0]

    def facts(self) -> dict[str, str]:
        """See Sweeping."""
        part = self._part
        stages = ", ".join(str(stage) for stage in part.pipeline.stages_of(part.rank))
        return {"pipeline": f"{part.pipeline.schedule.value}, rank {part.rank}, stages {stages}, blocks {part.layers}"}

    def close(self) -> None:
        """Drop what an unfinished pass left in the tiers and give the blocks their own forward back."""
        self._handle.remove()
        self._weights.drop()
        if self._vocabulary is not None:
            self._vocabulary.drop()

    def _calls(self, action: Action) -> Iterator[Call]:
        """The block calls of a pass, in their order; the final norm runs as one more block."""
        op, stage, i = action
        if op not in (Op.forward, Op.backward, Op.input_grad):
            return
        turns = range(1, 1 + len(self._part.of_stage(stage)) + self._is_last(stage))
        is_backward = op is not Op.forward
        yield from (Call(i, stage, turn, is_backward) for turn in (reversed(turns) if is_backward else turns))

    def _is_last(self, stage: int) -> bool:
        return stage == self._part.pipeline.num_stages - 1

    def _messages(
        self,
        pipeline: Pipeline,
        lists: Sequence[Sequence[Action]],
        batches: Sequence[TokenBatch],
        meter: Meter | None,
    ) -> Messages:
        hidden, shards = self._model.config.hidden_size, self._model.shards
        num_tensor = 1 if shards is None else shards.group.size()  # each of them has its own tokens between blocks

        def buffer(i: int) -> torch.Tensor:
            batch_size, num_tokens = batches[i].tokens.shape
            shape = batch_size, num_tokens // num_tensor, hidden
            return torch.empty(shape, dtype=self._dtype, device=self._device)

        return Messages(pipeline, lists, self._lines, buffer=buffer, traffic=self._traffic, meter=meter)

    def _run(self, action: Action, batch: TokenBatch, messages: Messages, enter: Enter | None = None) -> torch.Tensor:
        """A stage forward. `enter`: what it takes passes through this."""
        stage, is_shared = action.stage, self._vocabulary is not None

        def hidden() -> torch.Tensor:
            taken = self._input(action, messages)
            return taken if enter is None else enter(taken)

        device, blocks = self._device, [self._model.blocks.get_submodule(str(n)) for n in self._part.of_stage(stage)]
        packing = replace(batch.packing, cu_seqlens=batch.packing.cu_seqlens.to(device, non_blocking=True))
        found: torch.Tensor = self._model(
            batch.tokens.to(device, non_blocking=True),
            batch.targets.to(device, non_blocking=True),
            packing=packing,
            loss_tile=self._loss_tile,
            stage=StagePass(
                hidden if stage or is_shared else None,
                blocks,
                self._is_last(stage) and not is_shared,
                has_norm=self._is_last(stage),
            ),
        )
        return found

    def _input(self, action: Action, messages: Messages) -> torch.Tensor:
        """What a stage takes that does not look the tokens up itself, (B, T, H)."""
        if action.stage:
            return messages.receive(Action(Op.forward, action.stage - 1, action.micro_batch))
        assert self._vocabulary is not None
        return self._vocabulary.looked_up(action.micro_batch)

    def _forward(self, action: Action, batch: TokenBatch, divisor: float, messages: Messages) -> _Open:
        stage, inlet, outlet, loss = action.stage, _Inlet(), _Outlet(), None
        out = self._run(action, batch, messages, partial(_Enter.apply, inlet, inlet.anchor))
        messages.send(action, out.detach())
        if self._is_last(stage) and self._vocabulary is not None:
            self._vocabulary.put_output(action.micro_batch, out.detach())
        elif self._is_last(stage):
            loss, out = out.detach(), out / divisor
        if loss is None:
            out = _Leave.apply(outlet, out)
        # What leaves a stage is needed by the next one only: the graph is kept, not its result.
        return _Open(torch.autograd.graph.get_gradient_edge(out), inlet, outlet, loss)

    def _backward(self, action: Action, made: _Open, batch: TokenBatch, messages: Messages) -> None:
        _, stage, i = action
        counted: Any = nullcontext()
        if self._is_last(stage) and self._vocabulary is not None:
            made.outlet.grad = self._vocabulary.output_gradient(i)
        elif self._is_last(stage):
            num_tokens = batch.tokens.numel()
            sizes = {"num_tokens": num_tokens, "loss_tile": self._loss_tile, "itemsize": self._dtype.itemsize}
            counted = head_counted(self._meter, self._model, **sizes, has_lookup=self._part.has_first)
        else:
            made.outlet.grad = messages.receive(self._part.pipeline.backward(stage + 1, i))
        dtype = self._dtype if made.loss is None else made.loss.dtype
        with counted:
            torch.autograd.backward([made.edge], [torch.ones((), dtype=dtype, device=self._device)])
        if stage or self._vocabulary is not None:
            assert made.inlet.grad is not None, "a stage has parameters, and its input reaches its output"
            messages.send(action, made.inlet.grad)
        if not stage and self._vocabulary is not None and made.inlet.grad is not None:
            self._vocabulary.put_input_gradient(i, made.inlet.grad)

    def _sync(self, is_last: bool) -> None:
        """Whether the next backward is the one that reduces the gradients and gives the gathered weights back."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(is_last)
            self._model.set_is_last_backward(is_last)
            self._model.set_reshard_after_backward(is_last)

    def _reduce(self) -> None:
        """What the last backward does elsewhere, by one without a block: reduce the gradients that are there."""
        self._sync(True)
        hidden = torch.zeros(1, 1, self._model.config.hidden_size, device=self._device, requires_grad=True)
        shards = self._model.shards
        tokens = torch.zeros(1, 1 if shards is None else shards.group.size(), dtype=torch.int64, device=self._device)
        self._model(tokens, stage=StagePass(lambda: hidden, (), has_head=False)).backward(torch.zeros_like(hidden))

    def _add_up_tied(self) -> None:
        """The gradient of a tied weight is the sum of the look-up's, on the first rank, and the head's, on the last."""
        part, model = self._part, self._model
        is_apart = model.config.tie_embeddings and part.pipeline.rank_of(0) != part.pipeline.rank_of(
            part.pipeline.num_stages - 1
        )
        if is_apart and (part.has_first or part.has_last) and model.embed_tokens.weight.grad is not None:
            grad = model.embed_tokens.weight.grad
            dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=self._lines.ends)


@dataclass
class _Open:
    """A forward whose backward has not run.

    Args:
        loss: the sum of token losses, of the last stage.
    """

    edge: Any
    inlet: _Inlet
    outlet: _Outlet
    loss: torch.Tensor | None


class _Inlet:
    """Where the gradient of a stage's input comes out."""

    def __init__(self) -> None:
        self.anchor = torch.empty(0, requires_grad=True)
        self.grad: torch.Tensor | None = None


class _Outlet:
    """Where the gradient of a stage's output is put. Autograd takes it from there, so nothing else keeps it."""

    def __init__(self) -> None:
        self.grad: torch.Tensor | None = None


class _Leave(torch.autograd.Function):
    """apply(outlet, x): the end of a graph, a scalar, from which the gradient of x that is in the outlet goes back."""

    @staticmethod
    def forward(ctx: Any, outlet: _Outlet, x: torch.Tensor) -> torch.Tensor:
        ctx.outlet = outlet
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        found, ctx.outlet.grad = ctx.outlet.grad, None
        return None, found


class _Enter(torch.autograd.Function):
    """apply(inlet, anchor, x): x with a gradient, which the graph does not keep, as it would keep a leaf."""

    @staticmethod
    def forward(ctx: Any, inlet: _Inlet, anchor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.inlet = inlet
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        ctx.inlet.grad = grad.contiguous()
        return None, None, None
