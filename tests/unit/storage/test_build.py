"""Leases in, stack out; engines asked for and found; ranks that die."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headrace.storage.build import open_stack
from headrace.storage.config import SsdEngine, SsdTierConfig, TiersConfig
from headrace.storage.core.errors import MachineError, TierFull, TransferFailed
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.records import Lease, Medium
from headrace.storage.tiers.host import HostSlab
from headrace.storage.tiers.ssd import SsdSlab
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
CPU = torch.device("cpu")
KEY = BlockKey(0, 0, "x")


def test_no_lease_means_off(host_slab: HostSlab) -> None:
    for leases in ([], [host_slab.lease("rank0", 0)]):
        stack = open_stack(leases, TiersConfig(), device=CPU, log=TransferLog())
        with pytest.raises(TierFull, match=r"raise tiers\.host\.budget_gib above 0"):
            stack.prepare_store(KEY, torch.ones(1), Medium.host)
        assert stack.stats() == {}
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
    with pytest.raises(
        MachineError, match=f"engine {engine.value} is wanted and required, posix is there: the device is cpu"
    ):
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


RANK = """
import pickle, sys, torch
from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.errors import TierFull
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.records import Medium
from headrace.storage.transfer_log import TransferLog
leases, seed, cycles = pickle.loads(bytes.fromhex(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
stack = open_stack(leases, TiersConfig(), device=torch.device("cpu"), log=TransferLog())
for cycle in range(cycles):
    held = []
    for layer in range(4):
        key = BlockKey(cycle, layer, "x")
        tensor = torch.full((20_000 + layer,), seed * 1_000_000 + cycle * 4 + layer, dtype=torch.int64)
        stack.prepare_store(key, tensor, Medium.host if layer % 2 else Medium.ssd)
        held.append((key, tensor))
    for key, _ in held:
        stack.complete_store(key)
    for key, tensor in reversed(held):
        stack.prepare_load(key)
        assert torch.equal(stack.complete_load(key), tensor), key
        stack.discard(key)
    if cycle == 0:
        print("running", flush=True)
stack.close()
print("done", flush=True)
"""


class Node:
    """Two slabs and ranks that come and go."""

    def __init__(self, host: HostSlab, ssd: SsdSlab, cycles: int) -> None:
        self.host, self.ssd, self.cycles = host, ssd, cycles
        self.starts = 0
        self.ranks: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str) -> None:
        import pickle

        for slab in (self.host, self.ssd):
            slab.release(name)
        leases = [slab.lease(name, MIB) for slab in (self.host, self.ssd)]
        self.starts += 1
        command = [sys.executable, "-c", RANK, pickle.dumps(leases).hex(), str(self.starts), str(self.cycles)]
        self.ranks[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.ranks[name].stdout.readline() == "running\n", self.ranks[name].communicate()[1]

    def end_all(self) -> None:
        for rank in self.ranks.values():
            rank.kill()
            rank.communicate()


def kill_and_restart(host: HostSlab, ssd: SsdSlab, *, cycles: int, kills: int) -> None:
    node, chance = Node(host, ssd, cycles), random.Random(3)
    names = ["rank0", "rank1", "rank2"]
    try:
        for name in names:
            node.start(name)
        for _ in range(kills):
            name = chance.choice(names)
            victim = node.ranks[name]
            victim.kill()
            error = victim.communicate()[1]
            assert "AssertionError" not in error, error
            node.start(name)
        for name in names:
            output, error = node.ranks[name].communicate(timeout=600)
            assert output.endswith("done\n"), error
            assert host.release(name)
            assert ssd.release(name)
    finally:
        node.end_all()
    assert (host.free_bytes, ssd.free_bytes) == (host.num_bytes, ssd.num_bytes), "leases leaked"
    assert not host.holders
    assert not ssd.holders


@pytest.mark.slow
def test_ranks_killed_at_random_leak_nothing(tmp_path: Path) -> None:
    with HostSlab(3 * MIB, run_id="kill") as host, SsdSlab(tmp_path / "t", 3 * MIB, run_id="kill") as ssd:
        kill_and_restart(host, ssd, cycles=60, kills=2)


@pytest.mark.soak
def test_10_000_cycles_of_three_ranks_killed_at_random(tmp_path: Path) -> None:
    with HostSlab(3 * MIB, run_id="kill") as host, SsdSlab(tmp_path / "t", 3 * MIB, run_id="kill") as ssd:
        kill_and_restart(host, ssd, cycles=3_400, kills=30)
