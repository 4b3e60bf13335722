"""Opens a rank's tiers from its leases."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from headrace.storage.blockio.striped_file import open_block_file
from headrace.storage.blockio.thread_pool import WINDOW_BYTES, IoThreads
from headrace.storage.config import SsdEngine, TiersConfig
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Direction, Lease, Medium
from headrace.storage.integrity import Checksum
from headrace.storage.stack import TierStack
from headrace.storage.tier import Tier
from headrace.storage.tiers.engines import EngineChoice, choose_engine
from headrace.storage.tiers.gds import GdsTier
from headrace.storage.tiers.host import HostTier
from headrace.storage.tiers.ssd import SsdTier
from headrace.storage.tiers.ssd_slab import PART_BYTES
from headrace.storage.transfer import CudaCopies, DeviceCopies, StagingRing, open_copies
from headrace.storage.transfer_log import TransferLog

# Per direction, at most. More threads do not copy faster: they fill the memory channels that one rank may have.
HOST_THREADS = 2
# The part of a tier that may wait in a queue, per direction.
WINDOW_SHARE = 1 / 8


def open_stack(leases: Sequence[Lease], config: TiersConfig, *, device: torch.device, log: TransferLog) -> TierStack:
    """The tier stack of one rank. A medium without a lease, or with an empty one, is off.

    Args:
        leases: at most one per medium.
        device: where the rank's tensors are: cpu or cuda.
        log: gets every transfer.

    Raises:
        MachineError: a lease cannot be mapped, or the requested engine is required and does not work.
    """
    copies = open_copies(device)
    checksum = Checksum.xxh3_64 if config.checksum else Checksum.none
    facts: dict[str, Any] = {}
    with CleanUps() as undo:
        tiers: list[Tier] = []
        for lease in leases:
            if lease.num_bytes == 0:
                continue
            if lease.medium is Medium.host:
                tier: Tier = HostTier(lease, copies, checksum)
            else:
                choice = choose_engine(lease, config.ssd, copies)
                if choice.wanted not in (choice.got, SsdEngine.auto):
                    became = f"tiers.ssd.engine={choice.wanted.value} became {choice.got.value}: {choice.why}"
                    warnings.warn(became, stacklevel=2)
                facts["ssd_engine"] = choice.record()
                tier = _open_ssd(lease, choice, config, copies)
            undo.callback(tier.close)
            tiers.append(tier)
        threads = {tier.medium: _threads(tier, config, leases, copies) for tier in tiers}
        stack = TierStack(tiers, copies=copies, threads=threads, log=log, evict=_may_evict(tiers, config), facts=facts)
        undo.pop_all()
    return stack


def _may_evict(tiers: Sequence[Tier], config: TiersConfig) -> bool:
    if config.host.evict and any(isinstance(tier, GdsTier) for tier in tiers):
        raise InputError(
            "tiers.host.evict=true: evicted blobs go from host memory to the drive, which engine gds does not do; set "
            "tiers.ssd.engine=ring"
        )
    return config.host.evict


def _threads(tier: Tier, config: TiersConfig, leases: Sequence[Lease], copies: DeviceCopies) -> IoThreads:
    # A step does not fill the window of a large tier. If it did, the caller would wait, and soon the GPU too.
    window_bytes = max(WINDOW_BYTES, round(tier.capacity_bytes * WINDOW_SHARE))
    if tier.medium is Medium.host:
        # On CPU they copy, and help out with the other direction: more than cores take the caches from each other.
        most = HOST_THREADS if copies.asynchronous else len(os.sched_getaffinity(0)) // len(Direction)
        return IoThreads(max(1, min(HOST_THREADS, most)), window_bytes=window_bytes, name="host-io")
    num_drives = max(len(lease.paths) for lease in leases if lease.medium is Medium.ssd)
    num_threads = config.ssd.num_threads * num_drives
    return IoThreads(num_threads, window_bytes=window_bytes, stall_s=config.ssd.timeout_s, name="ssd-io")


def _open_ssd(lease: Lease, choice: EngineChoice, config: TiersConfig, copies: DeviceCopies) -> Tier:
    if choice.got is SsdEngine.gds:
        assert isinstance(copies, CudaCopies)
        return GdsTier(lease, copies, Checksum.xor_64 if config.checksum else Checksum.none)
    file = open_block_file(lease)
    # A buffer for every thread, so that none waits for another; a part never crosses a stripe.
    num_buffers = 2 * config.ssd.num_threads * len(lease.paths)
    ring = StagingRing(num_buffers, lease.stripe_bytes or PART_BYTES, copies)
    checksum = Checksum.xxh3_64 if config.checksum else Checksum.none
    return SsdTier(file, lease.offset_bytes, lease.num_bytes, ring, copies, checksum)
