"""The slab file: whole from the start, or refused in words; its tier: errors with a name."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.errors import MachineError, TransferFailed
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.records import Lease, Medium
from headrace.storage.stack import TierStack
from headrace.storage.tiers.ssd import SsdSlab
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
KEY = BlockKey(0, 0, "x")


def test_the_file_is_allocated_whole(ssd_slab: SsdSlab) -> None:
    found = os.stat(ssd_slab.path)
    assert found.st_size == 16 * MIB
    assert found.st_blocks * 512 >= 16 * MIB
    assert ssd_slab.direct_why
    assert ssd_slab.lease("rank0", 4096).direct == ssd_slab.direct


def test_more_than_the_drive_has_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        SsdSlab(tmp_path, 2**60, run_id="x")
    for part in (
        f"{2**30:.2f} GiB wanted",
        "GiB there by free space",
        str(tmp_path),
        "tiers.ssd.budget_gib",
        "tiers.ssd.path",
    ):
        assert part in str(caught.value)
    assert not list(tmp_path.glob("*.slab"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"file/tiers cannot be used .*tiers\.ssd\.path"):
        SsdSlab(tmp_path / "file" / "tiers", MIB, run_id="x")


def test_a_drive_that_fills_up_meanwhile_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(fd: int, offset: int, num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(MachineError, match="No space left on device"):
        SsdSlab(tmp_path / "t", MIB, run_id="x")
    assert list((tmp_path / "t").iterdir()) == []
    assert list((tmp_path / "cache/headrace/slabs").iterdir()) == []


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mounting needs root: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def stack_over(path: Path, num_bytes: int) -> TierStack:
    lease = Lease(1, "rank0", Medium.ssd, str(path), 0, num_bytes)
    return open_stack([lease], TiersConfig(), device=torch.device("cpu"), log=TransferLog())


def test_a_full_small_file_system_refuses_the_slab(small_file_system: Path) -> None:
    with pytest.raises(MachineError, match=r"0\.00 GiB there"):
        SsdSlab(small_file_system, 4 * MIB, run_id="x")
    assert list(small_file_system.iterdir()) == []


def test_a_full_file_system_in_a_step_is_a_named_error(small_file_system: Path) -> None:
    sparse = small_file_system / "sparse.slab"
    with sparse.open("wb") as file:
        file.truncate(8 * MIB)
    stack = stack_over(sparse, 8 * MIB)
    stack.prepare_store(KEY, torch.ones(MIB), Medium.ssd)
    with pytest.raises(
        TransferFailed, match=rf"{KEY}: write of {sparse} at offset \d+ failed: No space left on device"
    ):
        stack.complete_store(KEY)
    with pytest.raises(TransferFailed, match="No space left"):
        stack.prepare_load(KEY)
    stack.discard(KEY)
    assert stack.stats()[Medium.ssd].used_bytes == 0
    stack.close()


def test_a_file_cut_short_is_an_error_and_not_zeros(ssd_slab: SsdSlab) -> None:
    lease = ssd_slab.lease("rank0", 8 * MIB)
    stack = open_stack([lease], TiersConfig(checksum=False), device=torch.device("cpu"), log=TransferLog())
    stack.prepare_store(KEY, torch.ones(MIB), Medium.ssd)
    stack.complete_store(KEY)
    os.truncate(ssd_slab.path, MIB)
    stack.prepare_load(KEY)
    with pytest.raises(TransferFailed, match=rf"{KEY}: read of .* failed: the file ends after"):
        stack.complete_load(KEY)
    stack.close()


def test_bytes_changed_on_the_drive_are_found(stack: TierStack, ssd_slab: SsdSlab) -> None:
    stack.prepare_store(KEY, torch.zeros(3 * MIB, dtype=torch.uint8), Medium.ssd)
    stack.complete_store(KEY)
    with open(ssd_slab.path, "r+b") as file:
        file.seek(2 * MIB)
        file.write(b"\x01")
        os.fsync(file.fileno())
    stack.prepare_load(KEY)
    with pytest.raises(TransferFailed, match="the bytes changed in the tier"):
        stack.complete_load(KEY)
    stack.discard(KEY)


LIMITED = """
import resource, signal, sys, torch
from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.records import Lease, Medium
from headrace.storage.transfer_log import TransferLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
lease = Lease(1, "rank0", Medium.ssd, sys.argv[1], 0, 8 << 20)
stack = open_stack([lease], TiersConfig(), device=torch.device("cpu"), log=TransferLog())
stack.prepare_store(BlockKey(0, 0, "x"), torch.ones(1 << 20), Medium.ssd)
try:
    stack.complete_store(BlockKey(0, 0, "x"))
except TransferFailed as error:
    print(error)
stack.close()
"""


def test_a_file_size_limit_is_a_named_error(tmp_path: Path) -> None:
    assert resource.RLIMIT_FSIZE is not None
    path = tmp_path / "sparse.slab"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert f"{KEY}: write of {path} at offset" in done.stdout, done.stdout + done.stderr
    assert "failed: File too large" in done.stdout


def test_direct_stores_and_loads_leave_no_page_in_the_cache(
    stack: TierStack, ssd_slab: SsdSlab, resident_pages: Callable[[Path], int]
) -> None:
    if not ssd_slab.direct:
        pytest.skip(ssd_slab.direct_why)
    tensor = torch.randn(MIB + 13)
    stack.prepare_store(KEY, tensor, Medium.ssd)
    stack.complete_store(KEY)
    stack.prepare_load(KEY)
    assert torch.equal(stack.complete_load(KEY), tensor)
    assert resident_pages(Path(ssd_slab.path)) == 0
