"""Opens a rank's tiers from its leases."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from headrace.storage.blockio.direct_file import DirectFile
from headrace.storage.blockio.thread_pool import IoThreads
from headrace.storage.config import SsdEngine, TiersConfig
from headrace.storage.core.records import Lease, Medium
from headrace.storage.integrity import Checksum
from headrace.storage.stack import TierStack
from headrace.storage.tier import Tier
from headrace.storage.tiers.engines import EngineChoice, choose_engine
from headrace.storage.tiers.gds import GdsTier
from headrace.storage.tiers.host import HostTier
from headrace.storage.tiers.ssd import PART_BYTES, SsdTier
from headrace.storage.transfer import CudaCopies, DeviceCopies, StagingRing, open_copies
from headrace.storage.transfer_log import TransferLog


def open_stack(leases: Sequence[Lease], config: TiersConfig, *, device: torch.device, log: TransferLog) -> TierStack:
    """The tier stack of one rank. A medium without a lease, or with an empty one, is off.

    Args:
        leases: at most one per medium.
        device: where the rank's tensors live: cpu or cuda.
        log: told about every move.

    Raises:
        MachineError: a lease cannot be mapped, or the engine asked for is required and not real.
    """
    copies = open_copies(device)
    checksum = Checksum.xxh3_64 if config.checksum else Checksum.none
    facts = {}
    with ExitStack() as undo:
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
        threads = IoThreads(config.ssd.num_threads)
        stack = TierStack(tiers, copies=copies, threads=threads, log=log, facts=facts)
        undo.pop_all()
    return stack


def _open_ssd(lease: Lease, choice: EngineChoice, config: TiersConfig, copies: DeviceCopies) -> Tier:
    if choice.got is SsdEngine.gds:
        assert isinstance(copies, CudaCopies)
        return GdsTier(lease, copies, Checksum.xor_64 if config.checksum else Checksum.none)
    file = DirectFile(lease.path, direct=lease.direct)
    ring = StagingRing(2 * config.ssd.num_threads, PART_BYTES, copies)
    checksum = Checksum.xxh3_64 if config.checksum else Checksum.none
    return SsdTier(file, lease.offset_bytes, lease.num_bytes, ring, copies, checksum)
