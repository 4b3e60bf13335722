"""How much of a drive's rated life headrace has used, over all runs and processes. No torch.

A drive is warranted for so many terabytes written (TBW). Spread evenly over the years that it is to last, that is a
budget which grows by the day:

    due(t) = rated * min(1, (t - first use + 30 days) / lifetime)

The drive is over budget once more has been written than is due. The 30 days of grace let a run start on a new drive.
Rated TBW is all that counts: no factor for a retention time shorter than the vendor's, which no vendor warrants.

An example: 600 TBW over 5 years is 0.33 TB a day. Activations at 1 GB/s write 86 TB a day: the whole rating in a week.

Counted is what headrace has written to slab files since this user's first run on the drive; checkpoints, other programs
and the time before are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.storage.core.locks import locked
from headrace.storage.core.outside import parse_json, read_regular

TB = 1e12
DAY_S = 86400.0
YEAR_S = 365 * DAY_S
GRACE_S = 30 * DAY_S
# Another rank holds the lock for a fraction of a millisecond; one that was stopped meanwhile must not stop this one.
LOCK_TIMEOUT_S = 1.0
SYS_BLOCK = Path("/sys/dev/block")
MOUNTS = Path("/proc/self/mountinfo")
# Where the kernel shows what a disk calls itself, below its folder in /sys: NVMe, SCSI and SATA, virtio, MMC.
# The serial number comes first: namespaces of one NVMe drive have a WWID each and wear the same cells.
SERIALS = ("device/serial", "serial", "device/wwid", "wwid", "device/cid")
ARRAY_UUIDS = ("dm/uuid", "md/uuid")


@dataclass(frozen=True)
class LifeBudget:
    """What may be written, of one drive.

    Args:
        rated_bytes: that it is warranted for.
        lifetime_s: how long it is to last.
    """

    rated_bytes: float
    lifetime_s: float

    def due_bytes(self, age_s: float) -> float:
        """Bytes that may have been written `age_s` after the first use."""
        return self.rated_bytes * min(1.0, (max(0.0, age_s) + GRACE_S) / self.lifetime_s)


@dataclass(frozen=True)
class Wear:
    """What is known about one drive.

    Args:
        identity: see drive_identity.
        first_use_unix_s: when headrace first counted it.
        written_bytes: by headrace since then.
    """

    identity: str
    first_use_unix_s: float
    written_bytes: int

    def life_used(self, budget: LifeBudget) -> float:
        """Share of the rating; above 1 beyond it."""
        return self.written_bytes / budget.rated_bytes

    def budget_used(self, budget: LifeBudget, now_unix_s: float) -> float:
        """Share of the budget up to today; above 1 the drive is over budget."""
        return self.written_bytes / budget.due_bytes(now_unix_s - self.first_use_unix_s)


class DriveWear:
    """The count of one drive, kept in XDG_CACHE_HOME/headrace/drives/. Any number of processes may add to it.

    The file is replaced whole, under a lock: a process that is killed at any point loses only what it was adding. Not
    flushed to the disk every time, for that would cost a step milliseconds; `open` leaves a flushed copy, which answers
    for a file that a power cut has damaged. Where the folder cannot be written there is one warning, and what this
    object has counted is kept in memory until it can.

    Args:
        identity: see drive_identity.
        clock: Unix seconds.
    """

    def __init__(self, identity: str, *, clock: Callable[[], float] = time.time) -> None:
        self._identity = identity
        self._path = cache_folder() / f"{_file_name(identity)}.json"
        self._backup = self._path.with_suffix(".backup.json")
        self._uncounted_bytes = 0
        self._warned = False
        self._last = Wear(identity, clock(), 0)
        self.add(0)
        if not self._warned:
            self._copy_for_a_power_cut()

    @property
    def wear(self) -> Wear:
        """As of the last `add`, also by other processes up to then."""
        last = self._last
        return Wear(last.identity, last.first_use_unix_s, last.written_bytes + self._uncounted_bytes)

    def add(self, num_bytes: int) -> Wear:
        """Count bytes that were written, and see what others have counted. Some tenths of a millisecond.

        Raises:
            ValueError: a negative number.
        """
        if num_bytes < 0:
            raise ValueError(f"num_bytes={num_bytes}: nothing is unwritten")
        self._uncounted_bytes += num_bytes
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(self._path.with_suffix(".lock"), LOCK_TIMEOUT_S):
                there = self._read()
                total = Wear(self._identity, there.first_use_unix_s, there.written_bytes + self._uncounted_bytes)
                _replace(self._path, total)
        except OSError as error:
            self._warn(f"bytes written to {self._identity} wait in memory, counted for this run alone: {error}")
        else:
            self._last, self._uncounted_bytes = total, 0
        return self.wear

    def _read(self) -> Wear:
        """What the file says; its copy where it is damaged; a new drive's wear where there is none."""
        damaged = []
        for path in (self._path, self._backup):
            try:
                facts = parse_json(read_regular(path))
                found = Wear(self._identity, float(facts["first_use_unix_s"]), int(facts["written_bytes"]))
                if found.written_bytes < 0:
                    raise ValueError(f"written_bytes={found.written_bytes}")
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError) as error:
                damaged.append(f"{path} is damaged ({type(error).__name__}: {error})")
                continue
            if damaged:
                self._warn(f"{damaged[0]}: the count continues from its copy, {found.written_bytes} bytes")
            return found
        if damaged:
            self._warn(f"{'; '.join(damaged)}: the drive's count starts again at zero")
        # Seen before while the folder could not be written: the first use stays what it was.
        return Wear(self._identity, self._last.first_use_unix_s, 0)

    def _copy_for_a_power_cut(self) -> None:
        try:
            with locked(self._path.with_suffix(".lock"), LOCK_TIMEOUT_S):
                _replace(self._backup, self._read(), flush=True)
        except OSError as error:
            self._warn(f"{self._backup} could not be written: {error}")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{text}. The folder is XDG_CACHE_HOME's, {self._path.parent}", stacklevel=3)


class StripedWear:
    """Several folders as one tier: bytes are spread evenly over them, and each drive's share is counted.

    Args:
        folders: of the slab files, one or more; two on one drive count as that drive.
        clock: Unix seconds.
    """

    def __init__(self, folders: Sequence[Path], *, clock: Callable[[], float] = time.time) -> None:
        if not folders:
            raise ValueError("a drive's wear needs a folder on it")
        self._clock = clock
        identities = [drive_identity(folder) for folder in folders]
        self._num_folders = len(folders)
        self._rests = dict.fromkeys(identities, 0)
        self._weights = {identity: identities.count(identity) for identity in self._rests}
        self._drives = {identity: DriveWear(identity, clock=clock) for identity in self._rests}

    @property
    def wears(self) -> tuple[Wear, ...]:
        """Of each drive, in the order of the folders."""
        return tuple(drive.wear for drive in self._drives.values())

    def add(self, num_bytes: int) -> tuple[Wear, ...]:
        """Count bytes that were written to all of them together. Returns the wear of each drive."""
        for identity, drive in self._drives.items():
            # What does not divide is carried on, so that no byte is lost over many steps.
            owed = self._rests[identity] + num_bytes * self._weights[identity]
            share, self._rests[identity] = divmod(owed, self._num_folders)
            drive.add(share)
        return self.wears

    def budget(self, rated_tbw: float, lifetime_years: float) -> LifeBudget:
        """Each drive's part of a rating that is given for all of them."""
        return LifeBudget(rated_tbw * TB / len(self._drives), lifetime_years * YEAR_S)


def drive_identity(folder: Path) -> str:
    """The drive below a folder, by a name that stays the same over boots, mounts and partitions.

    In this order: what the disk calls itself (serial number or WWID), also through a partition and through a device
    mapper over one disk; the UUID of an array or of a volume over several disks; host and device name. A file system
    without a block device (tmpfs, overlay, network) has no drive to identify: host and folder are used instead.

    Args:
        folder: need not exist yet; its nearest existing parent is used.
    """
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    host = socket.gethostname()
    block = _block_device(there)
    if block is None:
        return f"folder:{host}:{folder.resolve()}"
    disk = _disk_below(block)
    for kind, names in (("disk", SERIALS), ("array", ARRAY_UUIDS)):
        for name in names:
            text = _words(disk / name)
            if text:
                # Serial numbers are unique among the drives of one model.
                return " ".join(filter(None, (f"{kind}:{text}", _words(disk / "device" / "model"))))
    return f"device:{host}:{disk.name}"


def cache_folder() -> Path:
    """Where the counts are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "headrace" / "drives"


def _block_device(path: Path) -> Path | None:
    """The folder in /sys of the device that a file system is on."""
    device = path.stat().st_dev
    found = SYS_BLOCK / f"{os.major(device)}:{os.minor(device)}"
    if not found.exists():
        # btrfs gives every subvolume a number of its own; the mount names the device.
        source = _mount_source(path.resolve())
        if source is None or not source.is_block_device():
            return None
        device = source.stat().st_rdev
        found = SYS_BLOCK / f"{os.major(device)}:{os.minor(device)}"
    return found.resolve() if found.exists() else None


def _mount_source(path: Path) -> Path | None:
    """The device of the mount that a path is in; None where its source is no file of /dev."""
    best, source = Path("/"), ""
    for line in MOUNTS.read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split()[4]))
        # Later mounts cover earlier ones at the same place.
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, source = point, after.split()[1]
    return Path(source) if source.startswith("/dev/") else None


def _disk_below(block: Path) -> Path:
    """The whole disk of a partition, and the one disk of a device-mapper volume."""
    while True:
        slaves = sorted((block / "slaves").glob("*")) if (block / "slaves").is_dir() else []
        if (block / "partition").exists():
            block = block.parent
        elif len(slaves) == 1:
            block = slaves[0].resolve()
        else:
            return block


def _words(path: Path) -> str:
    try:
        return " ".join(path.read_text(errors="replace").replace("\0", " ").split())
    except OSError:
        return ""


def _file_name(identity: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9]+", "-", identity).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _replace(path: Path, wear: Wear, *, flush: bool = False) -> None:
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        file.write(json.dumps(asdict(wear)).encode())
        if flush:
            file.flush()
            os.fsync(file.fileno())
    os.replace(unfinished, path)
