"""File systems that break under a running stack: each ends in the named error or the documented policy.

The errors are seen where a training step sees them: at complete_store, prepare_load and complete_load of a stack that
open_stack has opened. Afterwards nothing is leaked: the slot is free, the stack closes, its descriptors are gone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.helpers.tiers import open_files
from headrace.storage.build import open_stack
from headrace.storage.config import DirectMode, SsdTierConfig, TiersConfig
from headrace.storage.core.errors import MachineError, TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import LookupResult, Medium
from headrace.storage.stack import TierStack
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
KEY, NEXT = BlobKey("test", 1, "layer_input", 0, 1, 7), BlobKey("test", 2, "layer_input", 0, 1, 7)
MakeDrive = Callable[..., Any]


@contextmanager
def running(slab: SsdSlab, *, checksum: bool = True) -> Iterator[TierStack]:
    """A stack over the whole slab, which must close without a thread or a descriptor left."""
    folder = Path(slab.folders[0])
    before = open_files(folder)
    lease = slab.lease("rank0", slab.num_bytes)
    config = TiersConfig(checksum=checksum, ssd=SsdTierConfig(timeout_s=20.0))
    stack = open_stack([lease], config, device=torch.device("cpu"), log=TransferLog())
    try:
        yield stack
    finally:
        stack.close()
        slab.release("rank0")
    assert set(open_files(folder)) <= set(before), "a descriptor leaked"


def store(stack: TierStack, key: BlobKey, num_mib: int = 6) -> torch.Tensor:
    tensor = torch.randint(0, 256, (num_mib * MIB,), dtype=torch.uint8)
    stack.prepare_store(key, tensor, Medium.ssd)
    stack.complete_store(key)
    return tensor


def load(stack: TierStack, key: BlobKey) -> torch.Tensor:
    stack.prepare_load(key)
    return stack.complete_load(key)


def check_goes_on(stack: TierStack, key: BlobKey) -> None:
    """A failed block is a miss, and its slot comes back."""
    assert stack.lookup(key) is LookupResult.miss
    with pytest.raises(TransferFailed, match=str(key)):
        stack.prepare_load(key)
    stack.discard(key)


def used_bytes(stack: TierStack) -> int:
    return stack.stats()[Medium.ssd].used_bytes


def test_a_small_file_system_refuses_the_slab(make_drive: MakeDrive, tmp_path: Path) -> None:
    small = make_drive(24).folder
    with pytest.raises(MachineError, match=r"0\.04 GiB wanted, 0\.0\d GiB there by free space of .*budget_gib"):
        SsdSlab(small, 40 * MIB)
    with pytest.raises(MachineError, match=rf"free space of {small / 'in'}"):
        SsdSlab([tmp_path / "large", small / "in"], 80 * MIB)
    assert list((tmp_path / "large").iterdir()) == list((small / "in").iterdir()) == []


def test_a_file_system_that_turns_read_only(make_drive: MakeDrive, tmp_path: Path) -> None:
    drive = make_drive(48)
    slab = SsdSlab(drive.folder, 24 * MIB, direct=DirectMode.on)
    with running(slab) as stack:
        kept = store(stack, KEY)
        drive.fail_file_system()
        with pytest.raises(
            TransferFailed,
            match=rf"{NEXT}: write of the slab file in {drive.folder} at offset \d+ failed: Read-only file sys.*dmesg",
        ):
            store(stack, NEXT)
        check_goes_on(stack, NEXT)
        assert torch.equal(load(stack, KEY), kept), "what was stored before is still there"
        assert stack.record()["tiers"]["ssd"]["last_error"]["errno"] == "EROFS"
        stack.discard(KEY)
        assert used_bytes(stack) == 0
    slab.close()
    with pytest.raises(MachineError, match=r"cannot be used \(Read-only file system\); set tiers\.ssd\.path"):
        SsdSlab(drive.folder, MIB)


def test_a_mount_that_is_taken_away_lazily_serves_the_run_on(make_drive: MakeDrive) -> None:
    """Policy: open files outlive the mount, for ranks that start afterwards too."""
    drive = make_drive(48)
    with SsdSlab(drive.folder, 24 * MIB, direct=DirectMode.on) as slab:
        with running(slab) as stack:
            kept = store(stack, KEY)
            drive.unmount_lazily()
            also = store(stack, NEXT)
            assert torch.equal(load(stack, KEY), kept)
            assert torch.equal(load(stack, NEXT), also)
            assert stack.record()["tiers"]["ssd"]["last_error"] is None
        slab.release("rank0")
        with running(slab) as stack:
            kept = store(stack, KEY)
            assert torch.equal(load(stack, KEY), kept)
        slab.release("rank0")


def test_a_rank_that_starts_after_the_owner_has_ended_is_told(tmp_path: Path) -> None:
    slab = SsdSlab(tmp_path / "t", 24 * MIB)
    slab.close()
    with pytest.raises(
        TransferFailed, match=rf"the slab file in {tmp_path / 't'} cannot be opened: .*start the run again"
    ):
        with running(slab):
            pass


def test_a_slab_file_that_is_cut_short(tmp_path: Path) -> None:
    with SsdSlab(tmp_path / "t", 24 * MIB) as slab, running(slab) as stack:
        store(stack, KEY)
        os.truncate(slab.path, 2 * MIB)
        with pytest.raises(
            TransferFailed,
            match=rf"{KEY}: read of the slab file in {slab.folders[0]} at offset \d+ failed: the file ends",
        ):
            load(stack, KEY)
        also = store(stack, NEXT)  # its writes make the file longer again
        assert torch.equal(load(stack, NEXT), also)
        check_goes_on(stack, KEY)


def test_a_hole_is_not_taken_for_zeros(tmp_path: Path) -> None:
    """A file cut short and then written behind the cut reads as zeros in between: the checksum finds them."""
    with SsdSlab(tmp_path / "t", 24 * MIB) as slab, running(slab) as stack:
        store(stack, KEY)
        os.truncate(slab.path, 2 * MIB)
        store(stack, NEXT)
        assert os.stat(slab.path).st_size > 6 * MIB
        with pytest.raises(
            TransferFailed, match=rf"{KEY} in the slab file in {slab.folders[0]} at offset \d+: .*the bytes changed"
        ):
            load(stack, KEY)
        check_goes_on(stack, KEY)


def test_a_drive_that_loses_its_bytes(make_drive: MakeDrive) -> None:
    drive = make_drive(48)
    with SsdSlab(drive.folder, 24 * MIB, direct=DirectMode.on) as slab, running(slab) as stack:
        store(stack, KEY)
        drive.lose_bytes()
        with pytest.raises(
            TransferFailed,
            match=rf"{KEY}: read of .* in {drive.folder} at offset \d+ failed: Input/output error in each of 3 .*dmesg",
        ):
            load(stack, KEY)
        check_goes_on(stack, KEY)
        record = stack.record()["tiers"]["ssd"]
        assert record["retries"] >= 2
        assert record["last_error"]["errno"] == "EIO"
        assert used_bytes(stack) == 0


def test_one_drive_of_two_that_loses_its_bytes_is_named(make_drive: MakeDrive) -> None:
    drives = [make_drive(48), make_drive(48)]
    folders = [drive.folder for drive in drives]
    with SsdSlab(folders, 48 * MIB, direct=DirectMode.on) as slab, running(slab) as stack:
        kept = store(stack, KEY, 16)
        assert torch.equal(load(stack, KEY), kept)
        drives[1].lose_bytes()
        with pytest.raises(
            TransferFailed,
            match=rf"{KEY}: read of the slab file in {slab.folders[1]} at offset \d+ failed: Input/output",
        ):
            load(stack, KEY)
        check_goes_on(stack, KEY)
        both = stack.record()["tiers"]["ssd"]["each"]
        assert [one["written_bytes"] for one in both] == [8 * MIB, 8 * MIB]


def fill_until_it_fails(stack: TierStack, keys: list[BlobKey]) -> tuple[dict[BlobKey, torch.Tensor], str]:
    kept: dict[BlobKey, torch.Tensor] = {}
    for key in keys:
        try:
            kept[key] = store(stack, key)
        except TransferFailed as error:
            check_goes_on(stack, key)
            return kept, str(error)
    return kept, ""


def test_a_thin_drive_that_runs_full(make_drive: MakeDrive, make_tmpfs: Callable[[int], Path]) -> None:
    """The file system has reserved the blocks, the drive below it has not: writes fail, as EIO or ENOSPC."""
    drive = make_drive(96, folder=make_tmpfs(32))
    with SsdSlab(drive.folder, 64 * MIB, direct=DirectMode.on) as slab, running(slab) as stack:
        kept, reason = fill_until_it_fails(stack, [BlobKey("test", layer, "x", 0, 1, 7) for layer in range(10)])
        assert 1 <= len(kept) < 9
        failed = f"write of the slab file in {slab.folders[0]} at offset"
        assert failed in reason
        assert os.strerror(errno.EIO) in reason or os.strerror(errno.ENOSPC) in reason
        for key, tensor in kept.items():
            assert torch.equal(load(stack, key), tensor)
            stack.discard(key)
        assert used_bytes(stack) == 0


def test_a_buffered_write_that_fails_later_is_found_at_the_load(
    make_drive: MakeDrive, make_tmpfs: Callable[[int], Path]
) -> None:
    """Policy: a buffered store reports memory's success; should the drive fail it later, the load says so."""
    drive = make_drive(96, folder=make_tmpfs(32))
    with SsdSlab(drive.folder, 64 * MIB, direct=DirectMode.off) as slab, running(slab) as stack:
        keys = [BlobKey("test", layer, "x", 0, 1, 7) for layer in range(10)]
        kept, reason = fill_until_it_fails(stack, keys)
        assert reason == ""
        fd = os.open(slab.path, os.O_RDWR)
        with pytest.raises(OSError, match=r"Input/output error|No space left"):
            os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        reasons = []
        for key, tensor in kept.items():
            try:
                assert torch.equal(load(stack, key), tensor), "never wrong bytes"
            except TransferFailed as error:
                reasons.append(str(error))
        assert 1 <= len(reasons) < 10
        assert all("the bytes changed in the tier" in reason or "failed: Input/output" in reason for reason in reasons)


def test_the_fixtures_leave_nothing_behind(tmp_path: Path) -> None:
    """Of this test session: its folder is in the name of every image and mount."""
    assert str(tmp_path.parent) not in Path("/proc/self/mounts").read_text()
    images = [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    assert not [image for image in images if str(tmp_path.parent) in image]
