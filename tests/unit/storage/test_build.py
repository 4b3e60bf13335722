"""Leases in, stack out; engines asked for and found; ranks that die."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.storage.build import open_stack
from headrace.storage.config import DirectMode, HostTierConfig, SsdEngine, SsdTierConfig, TiersConfig
from headrace.storage.core.errors import InputError, MachineError, TierFull, TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Lease, Medium
from headrace.storage.tier import Tier
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd import SsdTier
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
CPU = torch.device("cpu")
KEY = BlobKey("test", 0, "x", 0, 1, 0)


def test_no_lease_means_off(host_slab: HostSlab) -> None:
    for leases in ([], [host_slab.lease("rank0", 0)]):
        stack = open_stack(leases, TiersConfig(), device=CPU, log=TransferLog())
        with pytest.raises(TierFull, match=r"raise tiers\.host\.budget_gib above 0"):
            stack.prepare_store(KEY, torch.ones(1), Medium.host)
        assert stack.stats() == {}
        stack.close()


@pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 1), (2, 1), (4, 2), (64, 2)])
def test_host_copies_on_cpu_leave_no_core_to_two_threads(
    host_slab: HostSlab, monkeypatch: pytest.MonkeyPatch, num_cores: int, num_threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    stack = open_stack([host_slab.lease("rank0", MIB)], TiersConfig(), device=CPU, log=TransferLog())
    assert stack._tiers[Medium.host].threads.num_threads == num_threads  # per direction
    stack.close()


def test_the_record_says_how_bytes_travel(host_slab: HostSlab, ssd_slab: SsdSlab) -> None:
    leases = [host_slab.lease("rank0", MIB), ssd_slab.lease("rank0", MIB)]
    stack = open_stack(leases, TiersConfig(), device=CPU, log=TransferLog())
    record = json.loads(json.dumps(stack.record()))
    assert record["ssd_engine"]["wanted"] == "auto"
    assert record["ssd_engine"]["got"] == "posix"
    assert "device is cpu" in record["ssd_engine"]["why"]
    assert record["tiers"]["host"]["path"] == host_slab.path
    assert record["tiers"]["ssd"]["direct"] == ssd_slab.direct
    assert record["tiers"]["ssd"]["checksum"] == "xxh3_64"
    stack.close()


@pytest.mark.parametrize("engine", [SsdEngine.gds, SsdEngine.ring])
def test_an_engine_that_is_not_there(ssd_slab: SsdSlab, engine: SsdEngine) -> None:
    leases = [ssd_slab.lease("rank0", MIB)]
    config = TiersConfig(ssd=SsdTierConfig(engine=engine, required=True))
    with pytest.raises(MachineError, match=f"engine {engine.value} is required, posix is there: the device is cpu"):
        open_stack(leases, config, device=CPU, log=TransferLog())
    config.ssd.required = False
    with pytest.warns(UserWarning, match=rf"tiers\.ssd\.engine={engine.value} became posix"):
        stack = open_stack(leases, config, device=CPU, log=TransferLog())
    assert stack.record()["ssd_engine"]["wanted"] == engine.value
    stack.close()


def test_posix_may_be_required(ssd_slab: SsdSlab) -> None:
    config = TiersConfig(ssd=SsdTierConfig(engine=SsdEngine.posix, required=True))
    open_stack([ssd_slab.lease("rank0", MIB)], config, device=CPU, log=TransferLog()).close()


def test_checksums_can_be_switched_off(host_slab: HostSlab) -> None:
    stack = open_stack([host_slab.lease("rank0", MIB)], TiersConfig(checksum=False), device=CPU, log=TransferLog())
    stack.prepare_store(KEY, torch.zeros(10), Medium.host)
    stack.complete_store(KEY)
    with open(host_slab.path, "r+b") as file:
        file.write(b"\x01")
    stack.prepare_load(KEY)
    assert stack.complete_load(KEY)[0] != 0
    assert stack.record()["tiers"]["host"]["checksum"] == "none"
    stack.close()


@pytest.mark.parametrize("gib", [1, 8])
def test_the_window_of_the_threads_is_an_eighth_of_the_tier(
    host_slab: HostSlab, ssd_slab: SsdSlab, monkeypatch: pytest.MonkeyPatch, gib: int
) -> None:
    """Else the large blobs of a long sequence would make the caller wait."""
    leases = [host_slab.lease("rank0", MIB), ssd_slab.lease("rank0", MIB)]
    init = Tier.__init__

    def as_if_large(self: Tier, medium: Medium, capacity_bytes: int, *others: Any, **more: Any) -> None:
        init(self, medium, gib * 1024 * MIB, *others, **more)

    monkeypatch.setattr(Tier, "__init__", as_if_large)
    stack = open_stack(leases, TiersConfig(), device=CPU, log=TransferLog())
    found = {opened.threads._window_bytes for opened in stack._tiers.values()}
    assert found == {{1: 256 * MIB, 8: 1024 * MIB}[gib]}
    stack.close()


def test_a_failure_closes_what_was_opened(host_slab: HostSlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.storage.tiers.host import HostTier

    closed: list[HostTier] = []
    real = HostTier.close
    monkeypatch.setattr(HostTier, "close", lambda self: (closed.append(self), real(self)))
    gone = Lease(1, "rank0", Medium.ssd, str(tmp_path / "gone.slab"), 0, MIB)
    with pytest.raises(TransferFailed, match=r"gone\.slab cannot be opened"):
        open_stack([host_slab.lease("rank0", MIB), gone], TiersConfig(), device=CPU, log=TransferLog())
    assert len(closed) == 1


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        open_stack([], TiersConfig(), device=torch.device("meta"), log=TransferLog())


def test_several_drives_make_one_tier(tmp_path: Path) -> None:
    with SsdSlab([tmp_path / "a", tmp_path / "b"], 24 * MIB, direct=DirectMode.on) as slab:
        leases = [slab.lease("rank0", 9 * MIB), slab.lease("rank1", 15 * MIB)]
        stacks = [open_stack([lease], TiersConfig(), device=CPU, log=TransferLog()) for lease in leases]
        # Odd sizes and odd beginnings: parts end at the borders of stripes, wherever the blob begins.
        blobs = {
            BlobKey("test", layer, "x", 0, 1, 0): torch.randint(256, (size,), dtype=torch.uint8)
            for layer, size in enumerate([4096, 1, 5 * MIB + 7, 3 * MIB])
        }
        for stack in stacks:
            for key, blob in blobs.items():
                stack.prepare_store(key, blob, Medium.ssd)
                stack.complete_store(key)
        for stack in stacks:
            for key, blob in blobs.items():
                stack.prepare_load(key)
                assert torch.equal(stack.complete_load(key), blob)
                around = torch.full((blob.numel() + 3,), 9, dtype=torch.uint8)
                stack.prepare_load(key, into=around[1:-2])  # a given buffer may begin at any byte
                assert stack.complete_load(key).data_ptr() == around.data_ptr() + 1
                assert torch.equal(around[1:-2], blob)
                assert around[[0, -2, -1]].tolist() == [9, 9, 9]
            record = stack.record()["tiers"]["ssd"]
            each = record["each"]
            assert [one["path"] for one in each] == [f"the slab file in {folder}" for folder in slab.folders]
            assert min(one["written_bytes"] for one in each) > MIB, "both drives have worked"
            assert sum(one["written_bytes"] for one in each) == record["written_bytes"]
            assert record["proof"].startswith("O_DIRECT: 0 of ")
            stack.close()


def test_eviction_needs_an_engine_that_takes_host_memory(
    host_slab: HostSlab, ssd_slab: SsdSlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DriveOfTheDevice(SsdTier):
        pass

    monkeypatch.setattr("headrace.storage.build.GdsTier", DriveOfTheDevice)
    monkeypatch.setattr("headrace.storage.build.SsdTier", DriveOfTheDevice)
    leases = [host_slab.lease("rank0", MIB), ssd_slab.lease("rank0", MIB)]
    with pytest.raises(InputError, match=r"tiers\.host\.evict=true.*tiers\.ssd\.engine=ring"):
        open_stack(leases, TiersConfig(host=HostTierConfig(evict=True)), device=CPU, log=TransferLog())
