"""Checks of the drive that run folders and slab files lie on."""

from __future__ import annotations

from headrace.platform.children import PartResult
from headrace.platform.doctor.check import GIB, Check, fail, passed, warn

ANOTHER_FOLDER = "a folder on a local drive: tiers.ssd.path=DIR, run.dir=DIR (`headrace doctor dir=DIR` looks there)"


def check_free_disk(folder: str, free_bytes: int | None) -> Check:
    """Free space below the folder; None where it cannot be read."""
    if free_bytes is None:
        return fail("free disk", f"{folder} is no folder that can be read", f"choose {ANOTHER_FOLDER}")
    found = f"{free_bytes / GIB:.1f} GiB below {folder}"
    if free_bytes < GIB:
        return fail("free disk", found, f"make room, or choose {ANOTHER_FOLDER}")
    if free_bytes < 20 * GIB:
        return warn(
            "free disk", found, f"checkpoints and slab files may not fit: make room, or choose {ANOTHER_FOLDER}"
        )
    return passed("free disk", found)


def check_disk(part: PartResult, *, has_gpu: bool) -> Check:
    """O_DIRECT and its rates: what the ssd tier can move."""
    row = part.find(what="disk")
    if row is None:
        if part.failure and part.failure.startswith("not done"):
            return warn(
                "disk",
                f"256 MiB written and read: {part.failure}",
                f"too slow for the ssd tier: choose {ANOTHER_FOLDER}",
            )
        return fail("disk", f"could not be measured: {part.failure}", f"choose {ANOTHER_FOLDER}")
    found = f"write {row['write_gbps']:.2f}, read {row['read_gbps']:.2f} GB/s"
    if not row["direct"]:
        return warn("disk", f"{found}, without O_DIRECT (the file system refuses it)", f"choose {ANOTHER_FOLDER}")
    slowest = min(row["write_gbps"], row["read_gbps"])
    wanted = 1.0 if has_gpu else 0.1
    if slowest < wanted:
        return warn(
            "disk",
            f"{found} with O_DIRECT, below {wanted} GB/s",
            f"the ssd tier will be exposed: choose {ANOTHER_FOLDER}",
        )
    return passed("disk", f"{found} with O_DIRECT")


def check_gds(part: PartResult | None) -> Check:
    """Whether GPUDirect Storage is real on this drive; `part` is None on a machine without a GPU."""
    if part is None:
        return passed("gds", "not needed without a GPU: the ssd tier uses its engine `posix`")
    row = part.find(what="engine")
    if row is None:
        return fail("gds", f"no engine could be chosen: {part.failure}", f"choose {ANOTHER_FOLDER}")
    if not row["real"]:
        return warn(
            "gds",
            f"does not work here, the ssd tier will use its engine `{row['got']}`: {row['why']}",
            "nothing breaks; for GDS: modprobe nvidia-fs, ext4 or xfs on NVMe, and /run/udev mounted into a container",
        )
    return passed("gds", str(row["why"]))
