"""What can be known about GPUDirect Storage without a GPU: the counters, the probe's refusals, the calls made."""

from __future__ import annotations

import itertools
import os
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.storage.blockio.thread_pool import IoThreads
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Direction, Lease, Medium
from headrace.storage.integrity import Checksum
from headrace.storage.stack import TierStack
from headrace.storage.tier import Blob, Move
from headrace.storage.tiers import gds
from headrace.storage.tiers.gds import GdsTier, count_writes, probe_gds
from headrace.storage.transfer import CpuCopies
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
STATS = """GDS Version: 1.11.1.6
NVFS statistics(ver: 4.0)
NVFS Driver(version: 2.20.5)
IO stats: {state}, peer IO stats: Enabled

Reads : n=11 ok=11 err=0 readMiB=1 io_state_err=0
Writes : n={writes} ok=3 err=0 writeMiB=3 io_state_err=0 pg-cache=0
"""


def test_counters() -> None:
    assert count_writes(STATS.format(state="Enabled", writes=42)) == 42
    assert count_writes(STATS.format(state="Disabled", writes=42)) is None
    assert count_writes("") is None


class Future:
    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def check_bytes_done(self) -> int:
        return self.num_bytes


class PlayedCuFile:
    """KvikIO's file, over a real one; what it does besides is set by the test."""

    counted: Path | None = None
    fault: str = ""
    opened_in: list[str] = []  # noqa: RUF012
    mode = "AUTO"

    def __init__(self, path: str, flags: str) -> None:
        assert flags == "r+"
        self.opened_in.append(self.mode)
        if self.fault == "open":
            raise RuntimeError("cuFileHandleRegister failed: 5030")
        self.file = open(path, "r+b")  # noqa: SIM115

    def raw_write_async(self, data: torch.Tensor, stream: int, num_bytes: int, offset: int) -> Future:
        if self.fault == "write":
            raise RuntimeError("cuFile write: No space left on device")
        os.pwrite(self.file.fileno(), data[:num_bytes].numpy().tobytes(), offset)
        if self.counted is not None:
            self.counted.write_text(STATS.format(state="Enabled", writes=100))
        return Future(num_bytes - (self.fault == "short"))

    def raw_read_async(self, data: torch.Tensor, stream: int, num_bytes: int, offset: int) -> Future:
        data.copy_(torch.frombuffer(bytearray(os.pread(self.file.fileno(), num_bytes, offset)), dtype=torch.uint8))
        if self.fault == "flip":
            data[5] ^= 4
        return Future(num_bytes)

    def close(self) -> None:
        self.file.close()


class PlayedCuda:
    device = torch.device("cpu")

    def fence(self) -> None:
        return None

    @contextmanager
    def thread_stream(self, after: Sequence[Any]) -> Iterator[Any]:
        yield types.SimpleNamespace(cuda_stream=0)


class PlayedCopies(CpuCopies):
    """What a whole stack needs besides."""

    thread_stream = PlayedCuda.thread_stream


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[PlayedCuFile]:
    """A kvikio package that records how it is used, and an nvidia-fs whose counters move with it."""
    file = type("File", (PlayedCuFile,), {"opened_in": [], "counted": tmp_path / "stats"})
    package, defaults = types.ModuleType("kvikio"), types.ModuleType("kvikio.defaults")
    package.CuFile, package.defaults = file, defaults  # type: ignore[attr-defined]
    package.CompatMode = types.SimpleNamespace(OFF="OFF", AUTO="AUTO")  # type: ignore[attr-defined]
    defaults.set = lambda name, value: setattr(file, "mode", value)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvikio", package)
    monkeypatch.setitem(sys.modules, "kvikio.defaults", defaults)
    (tmp_path / "stats").write_text(STATS.format(state="Enabled", writes=1))
    monkeypatch.setattr(gds, "NVIDIA_FS_STATS", tmp_path / "stats")
    return file


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    path = tmp_path / "slab"
    path.write_bytes(bytes(4 * MIB))
    return Lease(1, "rank0", Medium.ssd, str(path), MIB, 3 * MIB, direct=True)


def test_real_means_that_the_driver_counted(kvikio: type[PlayedCuFile], lease: Lease) -> None:
    assert probe_gds(lease, PlayedCuda()) is None  # type: ignore[arg-type]
    assert kvikio.opened_in == ["OFF", "AUTO"], "first where KvikIO must refuse to fall back"
    assert Path(lease.path).read_bytes() == bytes(4 * MIB), "what lay in the range is there again"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("driver", "nvidia-fs driver is not loaded"),
        ("counters off", "rw_stats_enabled"),
        ("counters still", "cuFile went through host memory"),
        ("open", "5030"),
        ("flip", "came back different"),
        ("write", "the probe's transfer failed: cuFile write"),
    ],
)
def test_what_is_not_real_is_told_why(
    kvikio: type[PlayedCuFile], lease: Lease, tmp_path: Path, change: str, reason: str
) -> None:
    if change == "driver":
        (tmp_path / "stats").unlink()
    elif change == "counters off":
        (tmp_path / "stats").write_text(STATS.format(state="Disabled", writes=1))
    elif change == "counters still":
        kvikio.counted = None
    else:
        kvikio.fault = change
    why = probe_gds(lease, PlayedCuda())  # type: ignore[arg-type]
    assert why is not None
    assert reason in why


def test_without_the_package_it_is_not_real(monkeypatch: pytest.MonkeyPatch, lease: Lease, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    (tmp_path / "stats").write_text("")
    monkeypatch.setattr(gds, "NVIDIA_FS_STATS", tmp_path / "stats")
    why = probe_gds(lease, PlayedCuda())  # type: ignore[arg-type]
    assert why is not None
    assert "KvikIO cannot open" in why


def one_part(tier: GdsTier, data: torch.Tensor) -> Move:
    return Move(Blob("s0.x", 8192, data.numel()), data, None)


def test_parts_go_to_their_place_and_come_back(kvikio: type[PlayedCuFile], lease: Lease) -> None:
    tier = GdsTier(lease, PlayedCuda(), Checksum.xor_64)  # type: ignore[arg-type]
    move = one_part(tier, torch.randint(0, 256, (10_001,), dtype=torch.uint8))
    tier.store_part(move, 0)
    content = Path(lease.path).read_bytes()
    assert content[MIB + 8192 : MIB + 8192 + 10_001] == move.data.numpy().tobytes()
    back = Move(move.blob, torch.zeros_like(move.data), None)
    tier.load_part(back, 0)
    assert torch.equal(back.data, move.data)
    kvikio.fault = "flip"
    with pytest.raises(TransferFailed, match=r"s0\.x in .*xor_64 checksum"):
        tier.load_part(back, 0)
    tier.close()
    tier.close()


@pytest.mark.parametrize("num_drives", [1, 3])
def test_loads_into_rows_of_a_larger_tensor(kvikio: type[PlayedCuFile], tmp_path: Path, num_drives: int) -> None:
    """The rows begin at any byte, the blobs cross stripes, and nothing beside the rows is written."""
    paths = [tmp_path / f"slab{number}" for number in range(num_drives)]
    for path in paths:
        path.write_bytes(bytes(2 * MIB))
    others, stripe_bytes = tuple(str(path) for path in paths[1:]), 16384 if num_drives > 1 else 0
    lease = Lease(1, "rank0", Medium.ssd, str(paths[0]), 8192, MIB, more_paths=others, stripe_bytes=stripe_bytes)
    copies = PlayedCopies(torch.device("cpu"))
    tier, log = GdsTier(lease, copies, Checksum.xor_64), TransferLog()  # type: ignore[arg-type]
    stack = TierStack([tier], copies=copies, threads={Medium.ssd: IoThreads(2)}, log=log)
    values = torch.randint(-128, 128, (1, 900, 137), dtype=torch.int8)
    bounds = [0, 1, 334, 667, 900]
    keys = [BlobKey("test", 0, "x", begin, end) for begin, end in itertools.pairwise(bounds)]
    for key in keys:
        stack.prepare_store(key, values[:, key.begin : key.end], Medium.ssd)
        stack.complete_store(key)
    whole = torch.full_like(values, 99)
    for key in reversed(keys):
        rows = whole[:, key.begin : key.end]
        stack.prepare_load(key, into=rows)
        assert stack.complete_load(key).data_ptr() == rows.data_ptr()
        assert torch.equal(whole[:, key.begin :], values[:, key.begin :])
        assert bool((whole[:, : key.begin] == 99).all())
    assert log.moved_bytes[Medium.ssd, Direction.load] == values.nbytes
    kvikio.fault = "flip"
    stack.prepare_load(keys[1], into=torch.empty_like(values[:, 1:334]))
    with pytest.raises(TransferFailed, match=rf"{keys[1]} in .*xor_64 checksum"):
        stack.complete_load(keys[1])
    stack.close()


@pytest.mark.parametrize(
    ("fault", "reason"), [("write", "No space left on device"), ("short", "moved 10000 of 10001 bytes")]
)
def test_a_failed_or_short_call_is_named(kvikio: type[PlayedCuFile], lease: Lease, fault: str, reason: str) -> None:
    tier = GdsTier(lease, PlayedCuda(), Checksum.none)  # type: ignore[arg-type]
    kvikio.fault = fault
    with pytest.raises(
        TransferFailed, match=rf"s0\.x: raw_write_async of {lease.path} at offset {MIB + 8192}.*{reason}"
    ):
        tier.store_part(one_part(tier, torch.ones(10_001, dtype=torch.uint8)), 0)
    tier.close()
