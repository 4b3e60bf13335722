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

from headrace.helpers.tiers import open_files
from headrace.storage.blockio.direct_file import DirectProbe
from headrace.storage.blockio.direct_rates import DirectRates, WayRates
from headrace.storage.build import open_stack
from headrace.storage.config import DirectMode, TiersConfig
from headrace.storage.core.errors import InputError, MachineError, TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Lease, Medium
from headrace.storage.stack import TierStack
from headrace.storage.tiers import ssd_slab as ssd_slab_module
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2
KEY = BlobKey("test", 0, "x", 0, 1, 0)


def test_the_file_is_allocated_whole(ssd_slab: SsdSlab) -> None:
    found = os.stat(ssd_slab.path)
    assert found.st_size == 16 * MIB
    assert found.st_blocks * 512 >= 16 * MIB
    assert ssd_slab.direct_why
    assert ssd_slab.lease("rank0", 4096).direct == ssd_slab.direct


def test_more_than_the_drive_has_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        SsdSlab(tmp_path, 2**60)
    for part in (
        f"{2**30:.2f} GiB wanted",
        "GiB there by free space",
        str(tmp_path),
        "tiers.ssd.budget_gib",
        "tiers.ssd.path",
    ):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"file/tiers cannot be used .*tiers\.ssd\.path"):
        SsdSlab(tmp_path / "file" / "tiers", MIB)


def test_a_drive_that_fills_up_meanwhile_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(fd: int, offset: int, num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(MachineError, match="No space left on device"):
        SsdSlab(tmp_path / "t", MIB)
    assert list((tmp_path / "t").iterdir()) == []


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
        SsdSlab(small_file_system, 4 * MIB)
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
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Lease, Medium
from headrace.storage.transfer_log import TransferLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
lease = Lease(1, "rank0", Medium.ssd, sys.argv[1], 0, 8 << 20)
stack = open_stack([lease], TiersConfig(), device=torch.device("cpu"), log=TransferLog())
stack.prepare_store(BlobKey("test", 0, "x", 0, 1, 0), torch.ones(1 << 20), Medium.ssd)
try:
    stack.complete_store(BlobKey("test", 0, "x", 0, 1, 0))
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
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


def test_several_folders_share_the_quota_in_stripes(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folders = [tmp_path / name for name in "abc"]
    with SsdSlab(folders, 29 * MIB) as slab:
        assert [os.stat(path).st_size for path in slab.paths] == [12 * MIB, 9 * MIB, 8 * MIB]
        assert slab.folders == tuple(str(folder) for folder in folders)
        assert [list(folder.iterdir()) for folder in folders] == [[], [], []], "the files have no names"
        lease = slab.lease("rank0", 29 * MIB)
        assert (lease.paths, lease.stripe_bytes, lease.direct) == (slab.paths, 4 * MIB, slab.direct)
        stack = open_stack([lease], TiersConfig(), device=torch.device("cpu"), log=TransferLog())
        tensors = {BlobKey("test", layer, "x", 0, 1, 0): torch.randn(layer * MIB + 7) for layer in range(3)}
        for key, tensor in tensors.items():
            stack.prepare_store(key, tensor, Medium.ssd)
            stack.complete_store(key)
        for key, tensor in tensors.items():
            stack.prepare_load(key)
            assert torch.equal(stack.complete_load(key), tensor)
        stack.close()
        assert slab.record()["paths"] == list(slab.paths)
        # One file system under all three: said once.
        assert [str(found.message) for found in recwarn if "on one file system" in str(found.message)] != []
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]


def test_one_file_has_no_stripes(ssd_slab: SsdSlab) -> None:
    assert (ssd_slab.paths, ssd_slab.stripe_bytes) == ((ssd_slab.path,), 0)


@pytest.mark.parametrize("fault", ["create", "allocate"])
@pytest.mark.filterwarnings("ignore:tiers.ssd.path")
def test_a_failure_in_the_second_folder_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    real, calls = os.posix_fallocate, []

    def second_fails(fd: int, offset: int, num_bytes: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(122, "Disk quota exceeded")
        real(fd, offset, num_bytes)

    if fault == "allocate":
        monkeypatch.setattr(os, "posix_fallocate", second_fails)
    else:
        (tmp_path / "b").write_text("a file, not a folder")
    with pytest.raises(MachineError, match=r"Disk quota exceeded|b cannot be used"):
        SsdSlab([tmp_path / "a", tmp_path / "b"], 16 * MIB)
    assert list((tmp_path / "a").iterdir()) == []
    assert open_files(tmp_path) == []


def test_folders_on_one_file_system_share_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_slab_module, "_free_bytes", lambda folder: 12 * MIB)
    with pytest.raises(MachineError, match=rf"free space of {tmp_path / 'a'}, {tmp_path / 'b'}; lower"):
        SsdSlab([tmp_path / "a", tmp_path / "b"], 16 * MIB)
    # Each on its own file system, each half of the quota fits.
    devices = iter((1, 2))
    real = ssd_slab_module.Place
    monkeypatch.setattr(ssd_slab_module, "Place", lambda folder, size, device: real(folder, size, next(devices)))
    SsdSlab([tmp_path / "a", tmp_path / "b"], 16 * MIB).close()


@pytest.mark.parametrize("folders", [[], ["t", "t"]])
def test_no_folder_or_one_twice_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"tiers\.ssd\.path="):
        SsdSlab(folders, MIB)
    assert list(tmp_path.iterdir()) == []


def without_direct(*folders: Path) -> Callable[[Path], DirectProbe]:
    def probe(folder: Path) -> DirectProbe:
        return DirectProbe(folder not in folders, "refused" if folder in folders else "a block went through")

    return probe


def test_the_mode_decides_how_the_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SsdSlab(tmp_path, MIB, direct=DirectMode.off) as slab:
        assert (slab.direct, slab.direct_why) == (False, "tiers.ssd.direct=off")
    monkeypatch.setattr(ssd_slab_module, "probe_direct", without_direct(tmp_path))
    with SsdSlab(tmp_path, 64 * MIB) as slab:
        assert (slab.direct, slab.direct_why) == (False, "refused")
    with pytest.raises(MachineError, match=rf"direct=on, and {tmp_path} does not take it \(refused\); .*direct=off"):
        SsdSlab(tmp_path, MIB, direct=DirectMode.on)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(ssd_slab_module, "probe_direct", without_direct())
    with SsdSlab(tmp_path, MIB, direct=DirectMode.on) as slab:
        assert slab.direct


@pytest.mark.parametrize("direct", [True, False])
def test_auto_takes_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    monkeypatch.setattr(ssd_slab_module, "probe_direct", without_direct())
    asked: list[tuple[str, int]] = []

    def measured(path: str, num_bytes: int) -> DirectRates:
        asked.append((path, num_bytes))
        fast, slow = WayRates(2.0, 2.0), WayRates(1.0, 1.0)
        return DirectRates(fast, slow) if direct else DirectRates(slow, fast)

    monkeypatch.setattr(ssd_slab_module, "measure_direct", measured)
    with SsdSlab(tmp_path, 48 * MIB) as slab:
        assert asked == [(slab.path, 48 * MIB)]
        assert slab.direct is direct
        assert slab.direct_why.startswith("O_DIRECT 2.00 GB/s" if direct else "O_DIRECT 1.00 GB/s")
    with SsdSlab(tmp_path, 31 * MIB) as slab:
        assert (slab.direct, slab.direct_why) == (True, "a block went through")
    assert len(asked) == 1, "too small to measure"


def test_all_drives_are_opened_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    devices = iter((1, 2, 1, 2))
    real = ssd_slab_module.Place
    monkeypatch.setattr(ssd_slab_module, "Place", lambda folder, size, device: real(folder, size, next(devices)))
    monkeypatch.setattr(ssd_slab_module, "probe_direct", without_direct(second))
    with SsdSlab([first, second], 16 * MIB) as slab:
        assert not slab.direct
        assert slab.direct_why == (
            f"all drives go through the page cache, because {second} should; "
            f"{first}: a block went through; {second}: refused"
        )
    monkeypatch.setattr(ssd_slab_module, "probe_direct", without_direct())
    with SsdSlab([first, second], 16 * MIB) as slab:
        assert slab.direct


def test_a_drive_that_fails_while_it_is_measured_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str, num_bytes: int) -> DirectRates:
        raise TransferFailed("rate of the drive: write of /x at offset 0 failed: Input/output error")

    monkeypatch.setattr(ssd_slab_module, "probe_direct", without_direct())
    monkeypatch.setattr(ssd_slab_module, "measure_direct", broken)
    with pytest.raises(MachineError, match=rf"{tmp_path} fails its first transfers: rate of the drive: .*Input/output"):
        SsdSlab(tmp_path, 64 * MIB)
    assert list(tmp_path.iterdir()) == []
