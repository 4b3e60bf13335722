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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.cleanup import CleanUps, after_error
from headrace.storage.core.errors import InputError
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
    """The six verbs over tiers that are opened at the first store, when the size of a layer input is known.

    A tier without a budget gets room for the layer inputs that the plan sends to it in one pass; when longer inputs
    come and the tiers are empty, they are opened again, larger. A tier with a budget gets that, once.

    Args:
        plan: how many layer inputs go where.
        config: budgets, SSD folder and engine, checksums.
    """

    def __init__(self, plan: MemoryPlan, config: TiersConfig) -> None:
        self.log = TransferLog()
        self._num_inputs = {m: _num_inputs(plan, m) for m in (Medium.host, Medium.ssd)}
        self._config = config
        self._stack: TierStack | None = None
        self._slot_bytes = 0
        self._stored: set[BlobKey] = set()
        self._close_when_empty = False
        self._closing = CleanUps()
        self._at_exit = weakref.finalize(self, self._closing.close)

    def prepare_store(
        self, key: BlobKey, tensor: torch.Tensor, medium: Medium, *, next_use: float | None = None
    ) -> None:
        """As TierStack. Opens the tiers where they are not, or are too small and empty."""
        slot_bytes = round_up(tensor.nbytes, PAGE_BYTES)
        if self._stack is None or (slot_bytes > self._slot_bytes and not self._stored):
            self._open(slot_bytes, tensor.device)
        self._open_stack.prepare_store(key, tensor, medium, next_use=next_use)
        self._stored.add(key)

    def complete_store(self, key: BlobKey) -> None:
        """As TierStack."""
        self._open_stack.complete_store(key)

    def state(self, key: BlobKey) -> BlobState:
        """As TierStack."""
        return BlobState.absent if self._stack is None else self._stack.state(key)

    def prepare_load(self, key: BlobKey, *, into: torch.Tensor | None = None) -> None:
        """As TierStack."""
        self._open_stack.prepare_load(key, into=into)

    def complete_load(self, key: BlobKey) -> torch.Tensor:
        """As TierStack."""
        return self._open_stack.complete_load(key)

    def discard(self, key: BlobKey) -> None:
        """As TierStack; the last blob that leaves closes the tiers where close_when_empty was called."""
        self._open_stack.discard(key)
        self._stored.discard(key)
        if self._close_when_empty and not self._stored:
            self.close()

    def close_when_empty(self) -> None:
        """Close now, or as soon as the last stored tensor was used; at the latest when nobody can use it any more."""
        self._close_when_empty = True
        if not self._stored:
            self.close()

    def close(self) -> None:
        """Give memory and files back; may be called twice."""
        self._stack = None
        self._stored.clear()
        self._closing.close()

    @property
    def _open_stack(self) -> TierStack:
        if self._stack is None:
            raise RuntimeError("the tiers of this spill are closed")
        return self._stack

    def _open(self, slot_bytes: int, device: torch.device) -> None:
        self._stack = None
        self._closing.close()
        run_id = f"spill-{os.getpid()}-{next(_numbers)}"
        leases = []
        for medium, num_inputs in self._num_inputs.items():
            num_bytes = self._capacity(medium, num_inputs * slot_bytes)
            if num_inputs and num_bytes:
                slab = self._slab(medium, num_bytes, run_id)
                self._closing.callback(slab.close)
                leases.append(slab.lease("spill", num_bytes))
        self._stack = open_stack(leases, self._config, device=device, log=self.log)
        self._closing.callback(self._stack.close)
        self._slot_bytes = slot_bytes

    def _capacity(self, medium: Medium, wanted_bytes: int) -> int:
        budget_gib = (self._config.host if medium is Medium.host else self._config.ssd).budget_gib
        return wanted_bytes if budget_gib is None else round(budget_gib * GIB)

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
        tiers: budgets and the SSD's folder, which a plan that uses the SSD needs (`ssd.path`). A budget left out takes
            what one pass needs; set it where several forwards wait for one backward.
        blocks: in forward order; None finds them (find_blocks).

    Yields:
        The handle, for waiting_layers() and abort().

    Raises:
        InputError: no blocks found, the plan has another number of layers, no such preset, no folder for the SSD, or
            the model checkpoints its activations itself.
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


def _num_inputs(plan: MemoryPlan, medium: Medium) -> int:
    return sum(layer.residence("x", 0).medium is medium for layer in plan.layers)


def _check(blocks: Sequence[nn.Module], plan: MemoryPlan, tiers: TiersConfig) -> None:
    if not blocks:
        raise InputError("spill: blocks=[] leaves nothing to apply a plan to")
    if Medium.ssd in plan.media and tiers.ssd.path is None:
        raise InputError(
            f"the plan {plan.name!r} moves layer inputs to the SSD: name a folder on a local drive, "
            "tiers=TiersConfig(ssd=SsdTierConfig(path=...))"
        )
    if any(getattr(block, "gradient_checkpointing", False) for block in blocks):
        raise InputError(
            "the model checkpoints its activations itself, which a plan would do again: call "
            "model.gradient_checkpointing_disable() first"
        )
