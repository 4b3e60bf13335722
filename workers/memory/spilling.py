"""A memory plan on any model, for people who keep their own training loop.

    from headrace.workers.memory import spill

    with spill(model, "offload_host"):
        for batch in batches:
            model(batch).backward()
            ...

Every forward of the first block opens a pass of its own, so nothing has to be told about steps or micro-batches.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.cleanup import CleanUps, after_error
from headrace.storage.core.errors import InputError, TierFull
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.ledger import PAGE_BYTES, round_up
from headrace.storage.core.records import Medium
from headrace.storage.core.states import BlobState
from headrace.storage.stack import TierStack
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.slab import Slab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.memory.policy import MemoryHandle, apply_memory, skeletons_of
from headrace.workers.memory.presets import preset_plan

GIB = 1024**3
_numbers = itertools.count()


class SpillTiers:
    """The six verbs over tiers that are opened at the first store and grow.

    A tier without a budget starts with room for a blob of the first one's size for every layer that sends anything to
    it. What does not fit opens more room beside it; once nothing is stored, all of it gives way to one tier with room
    for the most that was ever stored. A tier with a budget has that, once.

    Args:
        plan: how many layers send anything where.
        config: budgets, SSD folder and engine, checksums.
    """

    def __init__(self, plan: MemoryPlan, config: TiersConfig) -> None:
        self.log = TransferLog()
        self._num_layers = {m: _num_layers(plan, m) for m in plan.media}
        self._config = config
        self._stacks: list[TierStack] = []
        self._stored: dict[BlobKey, tuple[TierStack, Medium, int]] = {}
        self._first_room, self._room, self._used, self._most = (dict.fromkeys(Medium, 0) for _ in range(4))
        self._close_when_empty = False
        self._closing = CleanUps()
        self._at_exit = weakref.finalize(self, self._closing.close)

    def prepare_store(
        self, key: BlobKey, tensor: torch.Tensor, medium: Medium, *, next_use: float | None = None
    ) -> None:
        """As TierStack. Opens room where there is none for the blob."""
        num_bytes = round_up(tensor.nbytes, PAGE_BYTES)
        if not self._stored and any(self._most[m] > self._first_room[m] for m in Medium):
            self.close()
        if not self._stacks:
            wanted = {m: max(self._most[m], number * num_bytes) for m, number in self._num_layers.items()}
            self._open(wanted, tensor.device)
            self._first_room = dict(self._room)
        for stack in self._stacks:
            try:
                stack.prepare_store(key, tensor, medium, next_use=next_use)
                break
            except TierFull:
                if self._budget_gib(medium) is not None:
                    raise
        else:
            stack = self._open({medium: max(num_bytes, self._room[medium])}, tensor.device)
            stack.prepare_store(key, tensor, medium, next_use=next_use)
        self._stored[key] = stack, medium, num_bytes
        self._used[medium] += num_bytes
        self._most[medium] = max(self._most[medium], self._used[medium])

    def complete_store(self, key: BlobKey) -> None:
        """As TierStack."""
        self._stack_of(key).complete_store(key)

    def state(self, key: BlobKey) -> BlobState:
        """As TierStack."""
        return self._stored[key][0].state(key) if key in self._stored else BlobState.absent

    def prepare_load(self, key: BlobKey, *, into: torch.Tensor | None = None) -> None:
        """As TierStack."""
        self._stack_of(key).prepare_load(key, into=into)

    def complete_load(self, key: BlobKey) -> torch.Tensor:
        """As TierStack."""
        return self._stack_of(key).complete_load(key)

    def discard(self, key: BlobKey) -> None:
        """As TierStack; the last blob that leaves closes the tiers where close_when_empty was called."""
        self._stack_of(key).discard(key)
        _, medium, num_bytes = self._stored.pop(key)
        self._used[medium] -= num_bytes
        if self._close_when_empty and not self._stored:
            self.close()

    def close_when_empty(self) -> None:
        """Close now, or as soon as the last stored tensor was used; at the latest when nobody can use it any more."""
        self._close_when_empty = True
        if not self._stored:
            self.close()

    def close(self) -> None:
        """Give memory and files back; may be called twice."""
        self._stacks.clear()
        self._stored.clear()
        self._room, self._used = dict.fromkeys(Medium, 0), dict.fromkeys(Medium, 0)
        self._closing.close()

    def _stack_of(self, key: BlobKey) -> TierStack:
        if key not in self._stored:
            raise RuntimeError("the tiers of this spill are closed")
        return self._stored[key][0]

    def _open(self, wanted: Mapping[Medium, int], device: torch.device) -> TierStack:
        run_id = f"spill-{os.getpid()}-{next(_numbers)}"
        leases = []
        for medium, wanted_bytes in wanted.items():
            budget_gib = self._budget_gib(medium)
            num_bytes = wanted_bytes if budget_gib is None else round(budget_gib * GIB)
            if num_bytes:
                slab = self._slab(medium, num_bytes, run_id)
                self._closing.callback(slab.close)
                leases.append(slab.lease("spill", num_bytes))
                self._room[medium] += num_bytes
        stack = open_stack(leases, self._config, device=device, log=self.log)
        self._closing.callback(stack.close)
        self._stacks.append(stack)
        return stack

    def _budget_gib(self, medium: Medium) -> float | None:
        return (self._config.host if medium is Medium.host else self._config.ssd).budget_gib

    def _slab(self, medium: Medium, num_bytes: int, run_id: str) -> Slab:
        if medium is Medium.host:
            return HostSlab(num_bytes, run_id=run_id)
        ssd = self._config.ssd
        return SsdSlab(ssd.folders, num_bytes, direct=ssd.direct)


@contextmanager
def spill(
    model: nn.Module,
    plan: MemoryPlan | MemoryPreset | str,
    *,
    tiers: TiersConfig | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> Iterator[MemoryHandle]:
    """Make a model's blocks obey a memory plan inside; any number of forward and backward passes, also evaluation.

    Losses and gradients are bit for bit those without it. A backward may also come after the end of the context: the
    tiers stay open until it has used what they hold.

    Args:
        model: any module, transformers' included.
        plan: a plan with one entry per block (`headrace plan --json` solves one: MemoryPlan.from_dict), or the name of
            a preset that treats every block alike.
        tiers: budgets and the SSD's folder, which a plan that uses the SSD needs (`ssd.path`). A tier without
            a budget grows to what is stored at a time.
        blocks: in forward order; None finds them (find_blocks).

    Yields:
        The handle, for waiting_layers() and abort().

    Raises:
        InputError: no blocks found, the plan has another number of layers, no such preset, no folder for the SSD,
            a block inside another one, or the model checkpoints its activations itself.
        MachineError: at the first forward, where a tier cannot be opened. TierFull, TransferFailed: as TierStack.
    """
    blocks = find_blocks(model) if blocks is None else list(blocks)
    if not isinstance(plan, MemoryPlan):
        plan = preset_plan(plan, skeletons_of(blocks))
    tiers = TiersConfig() if tiers is None else tiers
    _check(blocks, plan, tiers)
    stack = SpillTiers(plan, tiers)
    handle = apply_memory(blocks, plan, stack)  # type: ignore[arg-type]
    passes = itertools.count()

    @torch.compiler.disable
    def open_pass(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            handle.begin(next(passes))

    hook = blocks[0].register_forward_pre_hook(open_pass)
    try:
        yield handle
    except BaseException as error:
        after_error(error, handle.abort, stack.close)
        raise
    finally:
        hook.remove()
        handle.restore_blocks()
    stack.close_when_empty()


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The run of equal modules with the most parameters: consecutive children of one class in a ModuleList, or at
    least two of them in a Sequential.

    Raises:
        InputError: there is none.
    """
    runs = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            least = 1 if isinstance(module, nn.ModuleList) else 2
            by_class = itertools.groupby(module.children(), key=type)
            runs += [run for _, group in by_class if len(run := list(group)) >= least]
    sizes = [sum(p.numel() for block in run for p in block.parameters()) for run in runs]
    if not any(sizes):
        raise InputError(
            f"{type(model).__name__} has no list of blocks (a ModuleList, or a Sequential of modules of one class); "
            "name them: spill(model, plan, blocks=[...])"
        )
    return runs[sizes.index(max(sizes))]


def _num_layers(plan: MemoryPlan, medium: Medium) -> int:
    return sum(
        any(s.residence.medium is medium for row in layer.stretches.values() for s in row) for layer in plan.layers
    )


def _check(blocks: Sequence[nn.Module], plan: MemoryPlan, tiers: TiersConfig) -> None:
    if not blocks:
        raise InputError("spill: blocks=[] leaves nothing to apply a plan to")
    numbers = {block: number for number, block in enumerate(blocks)}
    for outer, block in enumerate(blocks):
        if inner := [numbers[module] for module in block.modules() if numbers.get(module, outer) != outer]:
            raise InputError(f"spill: block {inner[0]} is a part of block {outer}: name the one or the other")
    if Medium.ssd in plan.media and tiers.ssd.path is None:
        raise InputError(
            f"the plan {plan.name!r} moves tensors to the SSD: name a folder on a local drive, "
            "tiers=TiersConfig(ssd=SsdTierConfig(path=...))"
        )
    if any(getattr(block, "gradient_checkpointing", False) for block in blocks):
        raise InputError(
            "the model checkpoints its activations itself, which a plan would do again: call "
            "model.gradient_checkpointing_disable() first"
        )
