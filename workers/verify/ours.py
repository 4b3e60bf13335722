"""headrace's side: the decoder under a memory plan, its tiers opened small for the check."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.records import Lease, Medium
from headrace.storage.stack import TierStack
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan, planned_transfer_bytes, preset_plan
from headrace.workers.memory.policy import MemoryHandle, apply_memory
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.hf import hf_name, load_config, load_weights
from headrace.workers.verify.config import VerifyConfig
from headrace.workers.verify.steps import StepGradients, deterministic, run_steps

_HOLDER = "verify"
# Slots and leases are cut in pages.
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class OurRun:
    """Every step's loss and gradients, and the bytes that moved, by "direction/tier"."""

    steps: list[StepGradients]
    moved_bytes: dict[str, int]


def our_steps(
    config: VerifyConfig,
    steps: Sequence[Sequence[TokenBatch]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory: MemoryPreset,
) -> OurRun:
    """Load the folder into our decoder and run every step under the plan of `memory`.

    Raises:
        InputError: config.json or the weights cannot be used.
        MachineError: no room for the tiers.
    """
    model = load_decoder(config, dtype=dtype, device=device)
    plan = preset_plan(memory, len(model.blocks))
    input_bytes = config.batch * config.seq_len * model.config.hidden_size * dtype.itemsize
    log = TransferLog()
    with deterministic(), _open_tiers(plan, input_bytes, device, log) as stack, CleanUps() as closing:
        handle = apply_memory(list(model.blocks), plan, stack)
        closing.callback(handle.remove)
        results = run_decoder(model, handle, steps, config)
    moved = {f"{way.value}/{tier.value}": count for (tier, way), count in sorted(log.moved_bytes.items(), key=str)}
    return OurRun(results, moved)


def load_decoder(config: VerifyConfig, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Our decoder with the folder's weights, in evaluation mode. Raises InputError as load_config and load_weights."""
    model = Decoder(load_config(config.hf), dtype=dtype, device=device)
    load_weights(model, Path(config.hf))
    return model.eval()


def run_decoder(
    model: Decoder, handle: MemoryHandle, steps: Sequence[Sequence[TokenBatch]], config: VerifyConfig
) -> list[StepGradients]:
    """Run every step as the training engine does: sums of token losses, divided by the count of the whole step."""
    device = next(model.parameters()).device

    def backward(index: int, batches: Sequence[TokenBatch]) -> float:
        num_targets = max(1, sum(batch.num_targets for batch in batches))
        total = torch.zeros((), dtype=torch.float64, device=device)
        for micro_batch, batch in enumerate(batches):
            handle.begin(index, micro_batch)
            packing = replace(batch.packing, cu_seqlens=batch.packing.cu_seqlens.to(device))
            loss = model(batch.tokens.to(device), batch.targets.to(device), packing=packing, loss_tile=config.loss_tile)
            (loss / num_targets).backward()
            handle.end()
            total += loss.detach().double()
        return float(total / num_targets)

    named = [(hf_name(name), param) for name, param in model.named_parameters()]
    return run_steps(named, backward, steps, config.lr)


@contextmanager
def _open_tiers(
    plan: MemoryPlan, input_bytes: int, device: torch.device, log: TransferLog
) -> Iterator[TierStack | None]:
    """Slabs of just the size that one pass of the plan needs; None where nothing moves."""
    slot_bytes = -(-input_bytes // _PAGE_BYTES) * _PAGE_BYTES
    wanted = planned_transfer_bytes(plan, slot_bytes)
    run_id = f"verify{os.getpid()}"
    with CleanUps() as undo:
        leases: list[Lease] = []
        if wanted[Medium.host]:
            host = HostSlab(wanted[Medium.host], run_id=run_id)
            undo.callback(host.close)
            leases.append(host.lease(_HOLDER, wanted[Medium.host]))
        if wanted[Medium.ssd]:
            ssd = SsdSlab(tempfile.gettempdir(), wanted[Medium.ssd])
            undo.callback(ssd.close)
            leases.append(ssd.lease(_HOLDER, wanted[Medium.ssd]))
        if not leases:
            yield None
            return
        stack = open_stack(leases, TiersConfig(), device=device, log=log)
        undo.callback(stack.close)
        yield stack
