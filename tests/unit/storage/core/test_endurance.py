"""The count of a drive's written bytes: nothing lost between processes or to a kill; due and over by the formula."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headrace.storage.core import endurance
from headrace.storage.core.endurance import (
    DAY_S,
    TB,
    YEAR_S,
    DriveWear,
    LifeBudget,
    StripedWear,
    Wear,
    cache_folder,
    drive_identity,
)
from headrace.storage.core.locks import locked

NEW_YEAR_S = 1.7e9
# Adds again and again and says so; told by its arguments when to die.
WRITER = """
import os, signal, sys
from headrace.storage.core import endurance
drive, num_bytes, num_adds, dies = endurance.DriveWear("disk:x"), int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
class HalfFile:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def write(self, text): self.file.write(text[:len(text) // 2]); self.file.flush(); die()
if dies == "before": endurance.os.replace = die
if dies == "after":
    replace = os.replace
    endurance.os.replace = lambda *words: (replace(*words), die())
if dies == "half": endurance.open = lambda *words: HalfFile(open(*words))
for _ in range(num_adds):
    drive.add(num_bytes)
    print("added", flush=True)
"""


class Clock:
    """Unix seconds that a test moves."""

    def __init__(self) -> None:
        self.now_s = NEW_YEAR_S

    def __call__(self) -> float:
        return self.now_s


def writer(num_bytes: int, num_adds: int, dies: str = "never") -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WRITER, str(num_bytes), str(num_adds), dies]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def written() -> int:
    return DriveWear("disk:x").wear.written_bytes


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_budget_grows_by_the_day_and_ends_at_the_rating() -> None:
    budget = LifeBudget(600 * TB, 5 * YEAR_S)
    per_day = 600 * TB / (5 * 365)
    assert per_day == pytest.approx(0.33 * TB, rel=0.01)
    assert budget.due_bytes(0.0) == pytest.approx(30 * per_day)
    assert budget.due_bytes(-9 * DAY_S) == budget.due_bytes(0.0)  # a clock that went back
    assert budget.due_bytes(100 * DAY_S) == pytest.approx(130 * per_day)
    assert budget.due_bytes(4.9 * YEAR_S) < 600 * TB
    assert budget.due_bytes(5 * YEAR_S) == budget.due_bytes(50 * YEAR_S) == 600 * TB
    assert LifeBudget(TB, 10 * DAY_S).due_bytes(0.0) == TB  # shorter than the grace


@pytest.mark.parametrize("seed", range(6))
def test_any_course_of_runs_adds_up(seed: int) -> None:
    """Against a plain sum: several objects, time in both directions, two drives; over when more than the line."""
    draw, clock = random.Random(seed), Clock()
    rated, lifetime_s = draw.uniform(1e6, 1e9), draw.uniform(0.05, 8) * YEAR_S
    budget = LifeBudget(rated, lifetime_s)
    drives = [[DriveWear(name, clock=clock) for _ in range(2)] for name in ("disk:a", "disk:b")]
    sums = [0, 0]
    for _ in range(60):
        clock.now_s += draw.choice((-0.1, 1.0, 1.0)) * draw.expovariate(1 / (10 * DAY_S))
        which, num_bytes = draw.randrange(2), draw.randrange(int(rated / 20))
        sums[which] += num_bytes
        wear = draw.choice(drives[which]).add(num_bytes)
        assert wear.written_bytes == sums[which]
        assert wear.first_use_unix_s == NEW_YEAR_S
        days = (clock.now_s - NEW_YEAR_S) / DAY_S
        line = rated * min(1.0, (max(0.0, days) + 30) / (lifetime_s / DAY_S))
        assert (wear.budget_used(budget, clock.now_s) > 1.0) == (sums[which] > line)
        assert wear.life_used(budget) == pytest.approx(sums[which] / rated)
    assert [DriveWear(name).wear.written_bytes for name in ("disk:a", "disk:b")] == sums


def test_nothing_is_unwritten() -> None:
    with pytest.raises(ValueError, match="num_bytes=-1"):
        DriveWear("disk:x").add(-1)


def test_processes_that_add_at_once_lose_nothing() -> None:
    writers = [writer(num_bytes, 300) for num_bytes in (1, 1000)]
    mine = DriveWear("disk:x")
    for _ in range(300):
        mine.add(1_000_000)
    assert [process.wait(600) for process in writers] == [0, 0]
    assert [process.stdout.read().count("added") for process in writers if process.stdout] == [300, 300]
    assert written() == 300 * 1_001_001


def test_mutant_a_count_without_a_lock_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's add falls between the read and the write of this one."""

    @contextmanager
    def unlocked(path: Path, timeout_s: float) -> Iterator[None]:
        yield

    def meanwhile(self: DriveWear) -> Wear:
        there = read(self)
        monkeypatch.setattr(DriveWear, "_read", read)
        DriveWear("disk:x").add(5)
        return there

    read, drive = DriveWear._read, DriveWear("disk:x")
    monkeypatch.setattr(DriveWear, "_read", meanwhile)
    monkeypatch.setattr(endurance, "locked", unlocked)
    drive.add(3)
    assert written() == 3  # and not 8


@pytest.mark.parametrize(("dies", "counted"), [("before", False), ("half", False), ("after", True)])
def test_a_kill_inside_of_add_loses_at_most_that_add(dies: str, counted: bool) -> None:
    DriveWear("disk:x").add(7)
    process = writer(100, 1, dies)
    assert process.wait(600) == -signal.SIGKILL
    with no_warning():
        assert written() == 7 + 100 * counted
        assert (
            DriveWear("disk:x").add(1).written_bytes == 8 + 100 * counted
        )  # the lock is free, the rest in the way of nobody


def test_kills_at_any_moment_lose_at_most_one_add_each() -> None:
    draw, least, most = random.Random(3), 0, 0
    for _ in range(6):
        process = writer(10, 100_000)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.03))
        process.kill()
        done = 1 + process.stdout.read().count("added")
        least, most = least + 10 * done, most + 10 * (done + 1)
        with no_warning():
            assert least <= written() <= most


def test_a_folder_that_cannot_be_written_counts_this_run_alone_and_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.warns(UserWarning, match=r"for this run alone: .*XDG_CACHE_HOME"):
        drive = DriveWear("disk:x")
    with no_warning():
        assert drive.add(5).written_bytes == 5
        assert drive.add(5).written_bytes == 10
    blocked.unlink()
    assert drive.add(1).written_bytes == 11  # there is room again: what was kept is counted
    assert written() == 11


def test_a_lock_that_nobody_lets_go_of_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endurance, "LOCK_TIMEOUT_S", 0.02)
    drive = DriveWear("disk:x")
    drive.add(1)
    with locked(drive._path.with_suffix(".lock"), 1.0):
        with pytest.warns(UserWarning, match="another process holds"):
            assert drive.add(2).written_bytes == 3
        assert json.loads(drive._path.read_text())["written_bytes"] == 1
    assert drive.add(4).written_bytes == 7
    assert written() == 7


@pytest.mark.parametrize("text", ["", '{"first_use_unix_s": 1', "[]", '{"first_use_unix_s": 1, "written_bytes": -4}'])
def test_a_damaged_file_is_answered_for_by_its_copy(text: str) -> None:
    DriveWear("disk:x").add(40)
    drive = DriveWear("disk:x")  # leaves the copy
    drive.add(2)
    drive._path.write_text(text)
    with pytest.warns(UserWarning, match=r"disk-x.*\.json is damaged.*continues from its copy, 40 bytes"):
        assert written() == 40
    drive._path.write_text(text)
    drive._backup.write_text(text)
    with pytest.warns(UserWarning, match="the drive's count starts again at zero"):
        assert written() == 0


def test_striped_folders_share_the_bytes_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three folders, two of them on one drive: two drives, which wear by 2 : 1, to the byte."""
    names = {tmp_path / "a": "disk:one", tmp_path / "b": "disk:two", tmp_path / "c": "disk:one"}
    monkeypatch.setattr(endurance, "drive_identity", lambda folder: names[folder])
    striped = StripedWear(list(names))
    for _ in range(10):
        wears = striped.add(100)
    assert [(wear.identity, wear.written_bytes) for wear in wears] == [("disk:one", 666), ("disk:two", 333)]
    striped.add(200)
    assert [wear.written_bytes for wear in striped.wears] == [800, 400]
    assert striped.budget(600.0, 5.0) == LifeBudget(300 * TB, 5 * YEAR_S)


# A machine as /sys shows it: device number -> folder of the disk or partition, and the files in it.
DISKS: dict[str, tuple[str, dict[str, str]]] = {
    "whole NVMe": ("nvme0n1", {"nvme0n1/device/serial": "S5G  1\n", "nvme0n1/device/model": "980 PRO \n"}),
    "partition": ("nvme0n1/nvme0n1p2", {"nvme0n1/nvme0n1p2/partition": "2", "nvme0n1/device/serial": "S5G  1\n"}),
    "SATA": ("sda", {"sda/device/wwid": "naa.5002538\n"}),
    "volume over several": ("dm-1", {"dm-1/dm/uuid": "LVM-abc\n", "dm-1/slaves/x/a": "", "dm-1/slaves/y/a": ""}),
    "nameless": ("vdb", {"vdb/size": "8"}),
}
IDENTITIES = {
    "whole NVMe": "disk:S5G 1 980 PRO",
    "partition": "disk:S5G 1",
    "SATA": "disk:naa.5002538",
    "volume over several": "array:LVM-abc",
    "nameless": "device:HOST:vdb",
}


def make_sys(folder: Path, device: int, block: str, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / "devices" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "devices" / name).write_text(text)
    numbers = folder / "dev"
    numbers.mkdir()
    (numbers / f"{os.major(device)}:{os.minor(device)}").symlink_to(folder / "devices" / block)
    return numbers


@pytest.mark.parametrize("kind", DISKS)
def test_a_drive_is_known_by_what_it_calls_itself(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, files = DISKS[kind]
    monkeypatch.setattr(endurance.socket, "gethostname", lambda: "HOST")
    monkeypatch.setattr(endurance, "SYS_BLOCK", make_sys(tmp_path, tmp_path.stat().st_dev, block, files))
    assert drive_identity(tmp_path / "not" / "made" / "yet") == IDENTITIES[kind]


def test_a_volume_over_one_disk_is_that_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"dm-0/dm/uuid": "CRYPT-x", "nvme0n1/p1/partition": "1", "nvme0n1/device/serial": "S1"}
    monkeypatch.setattr(endurance, "SYS_BLOCK", make_sys(tmp_path, tmp_path.stat().st_dev, "dm-0", files))
    (tmp_path / "devices/dm-0/slaves").mkdir()
    (tmp_path / "devices/dm-0/slaves/p1").symlink_to(tmp_path / "devices/nvme0n1/p1")
    assert drive_identity(tmp_path) == "disk:S1"


def test_a_mount_names_the_device_where_the_file_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """btrfs: st_dev is a subvolume's. The mount with the longest path counts, spaces in it are written \\040."""
    inside = tmp_path / "my data" / "tiers"
    inside.mkdir(parents=True)
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"1 0 0:9 / / rw - overlay overlay rw\n"
        f"2 1 0:50 / {tmp_path}/my\\040data rw shared:1 - btrfs /dev/fake rw\n"
        f"3 1 0:51 / {tmp_path}/my\\040data/other rw - btrfs /dev/no rw\n"
    )
    real_stat = Path.stat
    fake = os.stat_result((stat.S_IFBLK | 0o600, 1, 1, 1, 0, 0, 0, 0, 0, 0), {"st_rdev": os.makedev(259, 3)})

    def found(path: Path, **options: bool) -> os.stat_result:
        return fake if str(path) == "/dev/fake" else real_stat(path, **options)

    monkeypatch.setattr(Path, "stat", found)
    monkeypatch.setattr(endurance, "MOUNTS", mounts)
    files = {"nvme1n1/p3/partition": "3", "nvme1n1/device/serial": "S2"}
    monkeypatch.setattr(endurance, "SYS_BLOCK", make_sys(tmp_path, os.makedev(259, 3), "nvme1n1/p3", files))
    assert drive_identity(inside) == "disk:S2"
    mounts.write_text("1 0 0:9 / / rw - overlay overlay rw\n")
    assert drive_identity(inside) == f"folder:{endurance.socket.gethostname()}:{inside.resolve()}"


def test_memory_has_no_drive_and_this_folder_has_the_same_one_always(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    assert drive_identity(shm).startswith("folder:")
    assert drive_identity(shm) != drive_identity(shm / "..")
    assert drive_identity(tmp_path) == drive_identity(tmp_path)


def test_an_add_costs_little(benchmark_s: Callable[[Callable[[], object]], float]) -> None:
    drive = DriveWear("disk:x")
    assert benchmark_s(lambda: drive.add(1)) < 0.01  # 0.2 ms on a machine of one's own
    assert {path.suffix for path in cache_folder().iterdir()} == {".json", ".lock"}


@pytest.fixture
def benchmark_s() -> Callable[[Callable[[], object]], float]:
    """Median of the CPU seconds of a call."""

    def median_s(work: Callable[[], object]) -> float:
        times = []
        for _ in range(50):
            begin_s = time.thread_time()
            work()
            times.append(time.thread_time() - begin_s)
        return sorted(times)[25]

    return median_s
