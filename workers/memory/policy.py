"""Applies a MemoryPlan to a list of blocks. The one entry into the memory policies.

Only the instance attribute `block.forward` is replaced: parameter names stay, and hooks (FSDP2's sit on `__call__`)
stay outside of what runs again. Order per block call: release old stores, run, store what leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headrace.storage.core.errors import InputError
from headrace.workers.memory.layer_sweep import PlannedBlock
from headrace.workers.memory.meter import Meter
from headrace.workers.memory.opaque import Forward, kept, recomputed
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence, Sweep, check_plan, keep_layer
from headrace.workers.memory.saved import offloaded
from headrace.workers.memory.schedule import schedule_of
from headrace.workers.memory.shelf import Call, Shelf
from headrace.workers.model.program import Program, Shared
from headrace.workers.model.skeleton import Skeleton, opaque_skeleton

if TYPE_CHECKING:
    from headrace.storage.stack import TierStack
    from headrace.workers.memory.weight_queue import WeightQueue


class MemoryHandle:
    """A plan at work on a list of blocks. Made by apply_memory."""

    def __init__(self, plan: MemoryPlan, shelf: Shelf) -> None:
        self.plan = plan
        self._shelf = shelf
        self._undo: list[Callable[[], None]] = []

    def begin(self, step: int, micro_batch: int = 0, *, seed: int = 0, row: int = 0, stage: int = 0) -> None:
        """Open the pass of one micro-batch; call before its forward.

        Args:
            seed / row: of random masks: the run's seed, and the number of the first row among all rows of the step.
            stage: of a pipeline: each of a rank's stages has passes of its own.

        Raises:
            RuntimeError: the same pass is open and waits for its backward.
        """
        self._shelf.begin(step, micro_batch, seed=seed, row=row, stage=stage)

    def split_backward(self, weights: WeightQueue) -> None:
        """From the next pass on gradients of the blocks' parameters are added up there."""
        self._shelf.weights = weights

    def follow(self, order: Sequence[Call]) -> None:
        """The order of all block calls until `end`, where the passes of several micro-batches are open at once."""
        self._shelf.follow(order)

    def end(self) -> None:
        """Close all open passes; call after backward.

        Raises:
            RuntimeError: tensors are left in the tiers because a backward did not run.
        """
        left = self._shelf.waiting_layers()
        if left:
            raise RuntimeError(
                f"tensors of layers {left} are still stored: their backward pass did not run; "
                "run it before end(), or call abort() to drop them"
            )
        self._shelf.close_passes()

    def abort(self) -> None:
        """Drop what an unfinished pass left in the tiers: the way out after an exception."""
        self._shelf.abort()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Attention reads all there is meanwhile; between passes only. It always does without a choice of pages."""
        yield

    def take_page_counts(self) -> tuple[int, int]:
        """Pages read since the last call, and pages that were there; 0 and 0 without a choice of pages."""
        return 0, 0

    def restore_blocks(self) -> None:
        """Give the blocks their own forward back. A backward that is still to come finds what it left in the tiers."""
        while self._undo:
            self._undo.pop()()

    def remove(self) -> None:
        """Restore the blocks and drop what an unfinished pass left. May be called twice."""
        self._shelf.abort()
        self.restore_blocks()

    def waiting_layers(self) -> list[int]:
        """Layers that have tensors in a tier because their backward has not run."""
        return self._shelf.waiting_layers()


def apply_memory(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    plan: MemoryPlan,
    stack: TierStack | None = None,
    *,
    meter: Meter | None = None,
    norm: nn.Module | None = None,
    bucket_plans: Mapping[int, MemoryPlan] | None = None,
    layers: Sequence[int] | None = None,
) -> MemoryHandle:
    """Make `blocks` obey `plan`, until the handle is removed.

    The layer input is the tensor argument of a block that carries gradient, the first positional one in our own
    decoder; of foreign blocks that run once there may be several. Other arguments (rope tables, masks) stay where they
    are. Without gradients enabled a block runs as ever.

    Args:
        blocks: in forward order, one per entry of plan.layers.
        stack: the rank's tiers; needed where the plan sends layer inputs to host or ssd.
        meter: told about what is in flight and what the blocks hold, which autograd does not know.
        norm: the model's final norm, where it has a program: it runs in tiles and keeps its input.
        bucket_plans: tokens of a row to the plan of micro-batches of such rows; those of other lengths follow `plan`.
            Foreign blocks always follow `plan`.
        layers: numbers of the blocks in the whole model, where they are some of it; None: from 0.

    Raises:
        InputError: the plan has another number of layers, needs a stack and there is none, or one is applied already.
    """
    skeletons = skeletons_of(blocks)
    plans: dict[int | None, MemoryPlan] = {None: plan}
    plans.update((bucket_plans or {}).items())
    for each in plans.values():
        check_plan(each, skeletons)
        if each.sweep is Sweep.by_chunk:
            raise InputError(f"the plan {each.name!r} runs by chunk: workers.memory.sweeps.apply_plan carries it out")
        if each.media and stack is None:
            raise InputError(f"the plan {each.name!r} moves tensors to host or ssd, and no tier is open")
    if any(getattr(block.forward, "is_memory_policy", False) for block in blocks):
        raise InputError("a memory plan is applied to these blocks already; remove() it first")
    shelf = Shelf(stack, plan.prefetch_layers, meter)
    numbers = range(len(blocks)) if layers is None else layers
    handle = MemoryHandle(plan, shelf)

    def planned(
        block: nn.Module, place: int, program: Program, layer_plan: LayerPlan | None = None
    ) -> dict[int | None, PlannedBlock]:
        """The block under every plan, by the length of its rows; `layer_plan` in place of the plans' own."""
        found: dict[int | None, PlannedBlock] = {}
        for length, each in plans.items():
            own = program.grouped(each.cuts.head_groups)
            (skeleton,) = each.cuts.skeletons([own.skeleton])
            found[length] = PlannedBlock(
                block=block,
                layer=numbers[place] if place < len(numbers) else numbers[-1] + 1,
                program=own,
                schedule=schedule_of(skeleton),
                plan=layer_plan or each.layers[place],
                cuts=each.cuts,
                shelf=shelf,
            )
        return found

    for place, (block, layer_plan) in enumerate(zip(blocks, plan.layers, strict=True)):
        program = program_of(block)
        if program is not None:
            forward = _programmed(planned(block, place, program))
        elif plan.media or layer_plan.residence("saved", 0) is Residence.recompute:
            forward = _foreign(block, numbers[place], layer_plan, shelf)
        else:
            continue
        handle._undo.append(replace_forward(block, forward))
    program = None if norm is None else program_of(norm)
    if norm is not None and program is not None:
        forward = _programmed(planned(norm, len(blocks), program, keep_layer(program.skeleton)))
        handle._undo.append(replace_forward(norm, forward))
    return handle


def program_of(block: nn.Module) -> Program | None:
    """The block's program; None where it is a foreign one."""
    return getattr(block, "program", None)


def skeletons_of(blocks: Sequence[nn.Module] | nn.ModuleList) -> list[Skeleton]:
    """The skeleton of every block, that of an opaque one for foreign blocks."""
    programs = [program_of(block) for block in blocks]
    return [opaque_skeleton() if program is None else program.skeleton for program in programs]


def _programmed(planned: Mapping[int | None, PlannedBlock]) -> Forward:
    """The forward of a block that runs its program under the plan of its rows' length, or under that of None.

    Without gradients it runs as ever.
    """
    original = planned[None].block.forward

    def forward(x: torch.Tensor, rope: Any = (), packing: Any = None, cache: Any = None) -> torch.Tensor:
        if not torch.is_grad_enabled() or cache is not None:
            return original(x, rope, packing, cache) if rope else original(x)
        return planned.get(x.shape[1], planned[None]).run(x, Shared(rope, packing))

    return forward


def _foreign(block: nn.Module, layer: int, plan: LayerPlan, shelf: Shelf) -> Forward:
    """The forward of a block of which only the input and, as one, what autograd saves are known."""
    x, saved = plan.residence("x", 0), plan.residence("saved", 0)
    if saved is Residence.recompute:
        return recomputed(block, layer, x, shelf)
    if not plan.moves:
        return kept(block, shelf)
    return offloaded(block, layer, {"x": x.medium, "saved": saved.medium}, shelf)


def replace_forward(block: nn.Module, forward: Forward) -> Callable[[], None]:
    """Put a forward of the plan in place of the block's own; what comes back undoes it."""
    own = block.__dict__.get("forward")
    forward.is_memory_policy = True  # type: ignore[attr-defined]
    block.__dict__["forward"] = forward

    def undo() -> None:
        if own is None:
            block.__dict__.pop("forward", None)
        else:
            block.__dict__["forward"] = own

    return undo
