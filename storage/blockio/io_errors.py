"""What an error number of a read or a write means: whether to try again, and what a user can do about it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Retries:
    """How often a call is made before its error counts, and how long to wait between the calls.

    Args:
        num_tries: at most, the first one included.
        first_wait_s: before the second try.
        growth: each wait is this much longer than the one before.
    """

    num_tries: int
    first_wait_s: float = 0.0
    growth: float = 1.0

    def wait_s(self, tries: int) -> float:
        """How long to wait after `tries` calls that failed."""
        return self.first_wait_s * self.growth ** (tries - 1)


ONCE = Retries(1)
# The device has no room in its queue, or a signal came: nothing is wrong. Half a second in all.
BUSY = Retries(9, 0.002, 2.0)
# The kernel and the drive have tried several times already: what is left to hope for is a path that comes back.
BROKEN = Retries(3, 0.05, 4.0)

_RETRIES = {
    errno.EAGAIN: BUSY,
    errno.EINTR: BUSY,
    errno.EIO: BROKEN,
    errno.EREMOTEIO: BROKEN,
    errno.ETIMEDOUT: BROKEN,
}

_ANOTHER_DRIVE = "set tiers.ssd.path to another drive"
_DRIVE_FAILS = f"the drive fails: see dmesg and `smartctl -a`, and {_ANOTHER_DRIVE}"
_DRIVE_GONE = f"the drive is gone: see dmesg, and {_ANOTHER_DRIVE}"
_MOUNT_GONE = "the mount is gone: mount it again, or set tiers.ssd.path to a local drive"
_FULL = "free space there, or lower tiers.ssd.budget_gib"

_REMEDIES = {
    errno.EAGAIN: "the drive is overloaded: lower tiers.ssd.num_threads, or give the run a drive of its own",
    errno.EIO: _DRIVE_FAILS,
    errno.EREMOTEIO: _DRIVE_FAILS,
    errno.ETIMEDOUT: _DRIVE_FAILS,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: f"the quota of this user or project is used up: {_FULL}",
    errno.EROFS: (
        "the file system is read-only; the kernel remounts it so after an error of the drive: see dmesg, and "
        f"{_ANOTHER_DRIVE}"
    ),
    errno.ENODEV: _DRIVE_GONE,
    errno.ENXIO: _DRIVE_GONE,
    errno.ESTALE: _MOUNT_GONE,
    errno.ENOTCONN: _MOUNT_GONE,
    errno.EFBIG: "raise the limit on file sizes (`ulimit -f`), or lower tiers.ssd.budget_gib",
    errno.EINVAL: "the drive may need blocks larger than 4096 bytes for O_DIRECT: set tiers.ssd.direct=off",
    errno.ENOENT: "its owner has ended, or the file was removed: start the run again",
    errno.EACCES: "let this user read and write it, or set tiers.ssd.path to a folder that it owns",
    errno.EPERM: "let this user read and write it, or set tiers.ssd.path to a folder that it owns",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.EBADF: "the file was closed while it was in use",
}


def retries_of(error: OSError) -> Retries:
    """What another try is worth; errors that are not listed are final."""
    return _RETRIES.get(error.errno or 0, ONCE)


def explain(error: OSError, tries: int = 1) -> str:
    """Reason and remedy in one line, after `tries` calls that ended so."""
    reason = error.strerror or str(error) or (os.strerror(error.errno) if error.errno else type(error).__name__)
    if tries > 1:
        reason += f" in each of {tries} tries"
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{reason}; {remedy}" if remedy else reason


def name_of(error: OSError) -> str:
    """EIO, ENOSPC, ..."""
    return errno.errorcode.get(error.errno or 0, str(error.errno))
