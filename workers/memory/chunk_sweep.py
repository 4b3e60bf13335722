"""The sweep by chunk: a chunk of tokens passes through all layers before the next chunk starts.

    stage 1    the chunks in order, without gradients: every layer leaves its keys and values, nothing else stays
    stage 2    the chunks in reverse: forward again, then backward. Attention adds to the gradients of all keys and
               values that the chunk has seen; those of its own are complete, because all later chunks are done

The last chunk needs no stage 1. Activation memory is that of one chunk, whatever the length; keys, values and their
gradients wait where the plan says (kv_blocks.py). The gradient is that of the whole row: nothing is cut off (SeCO,
ACL Findings 2025; OOMB, ICLR 2026). Gradients of parameters are added up in fp32 over the chunks and handed to
autograd by the first chunk, which comes last: FSDP2 reduces every block's gradients once. The final norm hands over
with every chunk, as embedding and head do: FSDP2 reduces the three together, and in bf16 what several backwards have
added up is of another dtype than the gradients of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from headrace.kernels.api import Packing
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import InputError
from headrace.workers.memory.by_layer import OnLosses, head_counted
from headrace.workers.memory.chunk_keys import ChunkKeys, chunk_program
from headrace.workers.memory.chunk_plan import CarriedBytes
from headrace.workers.memory.chunk_record import NoRecords, PassParts, PassRecords
from headrace.workers.memory.chunk_states import ChunkStates, with_states
from headrace.workers.memory.flow import Carry
from headrace.workers.memory.kv_blocks import KvBlocks
from headrace.workers.memory.layer_sweep import PlannedBlock
from headrace.workers.memory.meter import Meter
from headrace.workers.memory.opaque import Forward
from headrace.workers.memory.plan import MemoryPlan, check_plan, keep_layer
from headrace.workers.memory.policy import MemoryHandle, program_of, replace_forward
from headrace.workers.memory.schedule import Schedule
from headrace.workers.memory.shelf import Shelf
from headrace.workers.memory.sparse_keys import SparseKeys
from headrace.workers.model.program import Draw, MixRule, Program, RowPart, Shared
from headrace.workers.model.skeleton import Skeleton, Span, chunk_skeleton

if TYPE_CHECKING:
    from headrace.storage.stack import TierStack
    from headrace.workers.data.batch import TokenBatch
    from headrace.workers.model.decoder import Decoder


class ChunkHandle(MemoryHandle):
    """A plan of the sweep by chunk at work on a list of blocks. Made by apply_chunks.

    Args:
        plans: by the tokens of a row; those of other lengths follow that of None.
        keys / states: of all layers with attention, and of those with a scan.
        carries: sums of parameter gradients, of every block.
    """

    def __init__(
        self,
        plans: Mapping[int | None, MemoryPlan],
        shelf: Shelf,
        keys: ChunkKeys,
        states: ChunkStates,
        carries: Sequence[Carry],
    ) -> None:
        super().__init__(plans[None], shelf)
        self._plans, self._keys, self._states, self._carries = plans, keys, states, carries
        self.is_open = False

    @property
    def chunk(self) -> RowPart:
        """The chunk at hand."""
        return self._keys.chunk

    @property
    def kv_memory(self) -> str:
        """How keys and values in HBM are allocated; empty before the first pass."""
        return self._keys.memory

    @property
    def packing(self) -> Packing | None:
        """Documents of the tokens up to the chunk's end."""
        return self._keys.packing

    @property
    def parts(self) -> PassParts:
        """What the state of the pass is made of."""
        return PassParts(self._keys, self._states, self._carries)

    def plan_of(self, num_tokens: int) -> MemoryPlan:
        """The plan of rows of so many tokens."""
        return self._plans.get(num_tokens, self.plan)

    def open(self, num_tokens: int, step: int, micro_batch: int = 0, *, seed: int = 0, row: int = 0) -> MemoryPlan:
        """Open the pass of a micro-batch of such rows, as MemoryHandle.begin; returns its plan."""
        self.begin(step, micro_batch, seed=seed, row=row)
        plan = self.plan_of(num_tokens)
        self._keys.begin(plan, step, micro_batch)
        self._states.begin(plan, step, micro_batch)
        self.is_open = True
        return plan

    def enter(self, chunk: RowPart, packing: Packing | None, *, hands_over: bool) -> None:
        """The next chunk begins.

        Args:
            packing: documents of the tokens up to its end, where a row holds several.
            hands_over: its backward is the last one of the pass and hands over the gradients of the parameters.
        """
        self._keys.enter(chunk, packing)
        self._states.enter(chunk)
        for carry in self._carries:
            carry.is_last = hands_over

    @contextmanager
    def dense(self) -> Iterator[None]:
        with self._keys.dense():
            yield

    def take_page_counts(self) -> tuple[int, int]:
        return self._keys.take_page_counts()

    def end(self) -> None:
        super().end()
        self._keys.drop_all()
        self._states.drop_all()
        self.is_open = False

    def abort(self) -> None:
        self.is_open = False
        for carry in self._carries:
            carry.drop()
        with CleanUps() as closing:
            closing.callback(super().abort)
            closing.callback(self._keys.drop_all)
            closing.callback(self._states.drop_all)

    def remove(self) -> None:
        self.abort()
        self.restore_blocks()
        self._keys.free()
        self._states.free()


def apply_chunks(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    plan: MemoryPlan,
    stack: TierStack | None = None,
    *,
    meter: Meter | None = None,
    norm: nn.Module,
    bucket_plans: Mapping[int, MemoryPlan] | None = None,
) -> ChunkHandle:
    """Make `blocks` obey a plan of the sweep by chunk, until the handle is removed. Arguments as apply_memory.

    Raises:
        InputError: the plan does not fit the blocks, or needs a stack and there is none, or a block shows no attention.
    """
    programs = [program_of(block) for block in blocks]
    if any(program is None for program in programs):
        raise InputError(f"the plan {plan.name!r} runs by chunk, and a foreign block does not show its attention")
    of_blocks = [program for program in programs if program is not None]
    plans: dict[int | None, MemoryPlan] = {None: plan}
    plans.update((bucket_plans or {}).items())
    for each in plans.values():
        check_plan(each, [chunk_skeleton(program.skeleton) for program in of_blocks])
        if each.media and stack is None:
            raise InputError(f"the plan {each.name!r} moves tensors to host or ssd, and no tier is open")
    shelf = Shelf(stack, plan.prefetch_layers, meter)
    windows = [_window(program) for program in of_blocks]
    if plan.pages is not None and any(window is not None for window in windows):
        raise InputError(
            f"the plan {plan.name!r} chooses pages, and model.sliding_window={max(w for w in windows if w)} bounds "
            "what attention reads already; choose memory=chunk_host"
        )
    if plan.pages is not None and any(_scans(program) for program in of_blocks):
        raise InputError(
            f"the plan {plan.name!r} chooses pages, and a layer that scans has none; choose memory=chunk_host"
        )
    kind = ChunkKeys if plan.pages is None else SparseKeys
    keys = kind(windows, KvBlocks("kv", stack, meter), KvBlocks("dkv", stack, meter), meter)
    states = ChunkStates(stack, meter)
    carries = [Carry() for _ in blocks]
    handle = ChunkHandle(plans, shelf, keys, states, carries)
    schedules: dict[Skeleton, Schedule] = {}
    norm_program = program_of(norm)
    assert norm_program is not None, "the decoder's norm has a program"
    for layer, module in enumerate((*blocks, norm)):
        is_norm = layer == len(blocks)
        program = norm_program
        if not is_norm:
            program = with_states(chunk_program(of_blocks[layer], keys, layer), states, layer)
        planned = {
            length: PlannedBlock(
                block=module,
                layer=layer,
                program=program,
                schedule=schedules.setdefault(program.skeleton, Schedule(program.skeleton)),
                plan=keep_layer(program.skeleton) if is_norm else each.layers[layer],
                cuts=each.cuts,
                shelf=shelf,
                carry=None if is_norm else carries[layer],
            )
            for length, each in plans.items()
        }
        is_last_block = layer == len(blocks) - 1
        forward = _of_norm(planned, handle) if is_norm else _of_block(planned, handle, keys, is_last=is_last_block)
        handle._undo.append(replace_forward(module, forward))
    return handle


def _window(program: Program) -> int | None:
    return next((rule.window for rule in program.rules if isinstance(rule, MixRule)), None)


def _scans(program: Program) -> bool:
    return not any(isinstance(rule, MixRule) for rule in program.rules)


Planned = Mapping[int | None, PlannedBlock]


def _of_block(planned: Planned, handle: ChunkHandle, keys: ChunkKeys, *, is_last: bool) -> Forward:
    """The forward of a block on the chunk at hand; outside of a pass it runs as ever."""
    original, layer = planned[None].block.forward, planned[None].layer

    def forward(x: torch.Tensor, rope: Any = (), packing: Any = None, cache: Any = None) -> torch.Tensor:
        if not handle.is_open:
            return original(x, rope, packing, cache)
        shared = Shared(rope, handle.packing, Draw(token=handle.chunk.span[0]))
        own = planned.get(handle.chunk.num_tokens, planned[None])
        if torch.is_grad_enabled():
            return own.run(x, shared)
        y = own.pass_through(x, shared, to_keys=is_last and handle.chunk.is_for_keys)
        keys.leave(layer)
        return y

    return forward


def _of_norm(planned: Planned, handle: ChunkHandle) -> Forward:
    original = planned[None].block.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not handle.is_open or not torch.is_grad_enabled():
            return original(x)
        return planned.get(handle.chunk.num_tokens, planned[None]).run(x, Shared())

    return forward


OnChunk = Callable[[int, int, int], None]  # stage 1 or 2, number of the chunk in it from 1, how many it has


def no_chunk(stage: int, number: int, total: int) -> None:
    """Nobody is told."""


class ByChunk:
    """A chunk of tokens passes through all layers before the next chunk starts. Arguments as ByLayer.

    Args:
        on_chunk: called when a chunk begins.
        records: keep the states of half-done passes, for another process.
    """

    def __init__(
        self,
        model: Decoder,
        handle: ChunkHandle,
        meter: Meter | None,
        *,
        loss_tile: int,
        itemsize: int,
        on_chunk: OnChunk = no_chunk,
        records: PassRecords | None = None,
    ) -> None:
        self._model, self._handle, self._meter = model, handle, meter
        self._on_chunk, self._records = on_chunk, records or NoRecords()
        self._loss_tile, self._itemsize = loss_tile, itemsize
        self._gathered = [b for b in model.blocks[: handle.plan.gathered_layers] if isinstance(b, FSDPModule)]
        for block in self._gathered:
            block.set_reshard_after_forward(False)
        # The block at work counts its own.
        programs = [program for block in model.blocks if (program := program_of(block)) is not None]
        self._sums = CarriedBytes.of((program.skeleton for program in programs), itemsize)

    def forward_backward(
        self,
        batch: TokenBatch,
        divisor: float,
        *,
        step: int,
        micro_batch: int,
        seed: int = 0,
        row: int = 0,
        is_last: bool = True,
    ) -> torch.Tensor:
        """See Sweeping. The sum is fp64."""
        seq_len = batch.seq_len
        chunks = self._handle.open(seq_len, step, micro_batch, seed=seed, row=row).cuts.chunk_spans(seq_len)
        with self._meter or nullcontext():
            num_done, total = self._begin_pass(batch, chunks)
            sums = None if self._meter is None else self._meter.reserve(self._sums.beside_block)
            for number, span in list(enumerate(reversed(chunks), 1))[num_done:]:
                self._on_chunk(2, number, len(chunks))
                hands_over = span[0] == 0
                self._set_sync(is_last and hands_over, hands_over)
                loss = self._forward(batch, span, hands_over=hands_over)
                num_tokens = batch.tokens.numel() * (span[1] - span[0]) // seq_len
                sizes = (num_tokens, self._loss_tile, self._itemsize)
                self._records.before_backward()
                with head_counted(self._meter, self._model, *sizes, beside=self._sums.own):
                    (loss / divisor).backward()
                total += loss.detach()
                if not hands_over:
                    self._chunk_done(number, total)
            if sums is not None:
                sums.release()
        self._handle.end()
        return total

    def _begin_pass(self, batch: TokenBatch, chunks: Sequence[Span]) -> tuple[int, torch.Tensor]:
        """Stage 1, or what another process has done: chunks of stage 2 that are done, and the sum of their losses."""
        found, device = self._records.take(), self._model.head_weight.device
        if found is not None:
            self._handle.parts.restore(found, batch.seq_len, device)
            return found.num_done, found.tensors["total"].to(device)
        with torch.no_grad():
            for number, span in enumerate(chunks[:-1], 1):
                self._on_chunk(1, number, len(chunks) - 1)
                self._forward(batch, span, is_for_keys=True)
        total = torch.zeros((), dtype=torch.float64, device=device)
        self._chunk_done(0, total)
        return 0, total

    def _chunk_done(self, num_done: int, total: torch.Tensor) -> None:
        self._records.chunk_done(num_done, lambda: self._handle.parts.state(num_done, total))

    def evaluate(self, batch: TokenBatch, on_losses: OnLosses | None = None) -> torch.Tensor:
        """See Sweeping. The sum is fp64."""
        seq_len = batch.seq_len
        chunks = self._handle.open(seq_len, step=0).cuts.chunk_spans(seq_len)
        total = torch.zeros((), dtype=torch.float64, device=self._model.head_weight.device)
        with torch.no_grad():
            for number, span in enumerate(chunks, 1):
                self._on_chunk(1, number, len(chunks))
                found = self._forward(batch, span, each=on_losses is not None)
                if on_losses is not None:
                    on_losses(span, found)
                total += found.sum(dtype=torch.float64)
        self._handle.end()
        # No backward gives these back, and the next step has other weights.
        for block in self._gathered:
            block.reshard()
        return total

    def facts(self) -> dict[str, str]:
        """See Sweeping."""
        return {"kv_memory": self._handle.kv_memory}

    def close(self) -> None:
        """Drop what an unfinished pass left in the tiers and give the blocks their own forward back."""
        self._handle.remove()
        for block in self._gathered:
            block.set_reshard_after_forward(True)

    def _forward(
        self,
        batch: TokenBatch,
        span: Span,
        *,
        is_for_keys: bool = False,
        hands_over: bool = False,
        each: bool = False,
    ) -> torch.Tensor:
        batch_size, seq_len = len(batch.tokens), batch.seq_len
        device = self._model.head_weight.device
        part = RowPart(span, seq_len, is_for_keys)
        so_far = None
        if not batch.packing.is_one_per_row(batch_size, seq_len):
            so_far = batch.packing.first(batch_size, seq_len, span[1])
            so_far = replace(so_far, cu_seqlens=so_far.cu_seqlens.to(device, non_blocking=True))
        self._handle.enter(part, so_far, hands_over=hands_over)
        tokens, targets, packing = batch.part(span)
        tokens, targets = (rows.to(device, non_blocking=True) for rows in (tokens, targets))
        return self._model(tokens, targets, packing=packing, loss_tile=self._loss_tile, part=part, each=each)

    def _set_sync(self, sync: bool, ends_pass: bool) -> None:
        """Gradients are reduced once per step, and gathered weights are given back once per pass."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(sync)
        for block in self._gathered:
            block.set_reshard_after_backward(ends_pass)
