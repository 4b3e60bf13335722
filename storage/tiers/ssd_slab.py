"""The node's bytes on its drives: preallocated slab files, their quota, and how they are to be opened."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.storage.blockio.direct_file import probe_direct
from headrace.storage.blockio.direct_rates import MIN_BYTES, measure_direct
from headrace.storage.config import DirectMode
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import InputError, MachineError, TransferFailed
from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Medium
from headrace.storage.core.stripes import file_bytes
from headrace.storage.core.unnamed import open_unnamed, path_of
from headrace.storage.tiers.slab import LEASE_ALIGNMENT, Slab

GIB = 1024**3
PART_BYTES = 4 * 1024**2
# A part of a blob is then one drive's, and neighbouring parts are different drives'.
STRIPE_BYTES = PART_BYTES


@dataclass(frozen=True)
class Place:
    """One slab file to be: its folder, its size, and the file system it lies on (st_dev)."""

    folder: Path
    num_bytes: int
    device: int


class SsdSlab(Slab):
    """The node's range for offloaded blobs: a file per folder, allocated whole at start, its blocks reused every step.

    Whether the files are opened with O_DIRECT is measured where it is not told; `direct` and `direct_why` hold the
    answer. All files are opened alike. They have no names: their blocks are free again when the slab and all who use
    it are closed or dead.

    Args:
        folders: one per drive; made if they are not there.
        num_bytes: the quota over all folders; rounded up to whole blocks.
        direct: see DirectMode.

    Raises:
        InputError: no folder, or the same one twice.
        MachineError: a folder cannot be written, its file system has less room than requested, the drive fails its
            first transfers, or O_DIRECT is wanted and refused. Nothing is left behind, in no folder.
    """

    def __init__(
        self,
        folders: Path | str | Sequence[Path | str],
        num_bytes: int,
        *,
        direct: DirectMode = DirectMode.auto,
    ) -> None:
        num_bytes = round_up(num_bytes, LEASE_ALIGNMENT)
        places = _prepare(_listed(folders), num_bytes)
        _check_room(places)
        with CleanUps() as undo:
            fds = [_create(place, undo) for place in places]
            chosen, why = _choose_direct(places, fds, direct)
            super().__init__(
                Medium.ssd,
                num_bytes,
                fds,
                direct=chosen,
                direct_why=why,
                folders=tuple(str(place.folder) for place in places),
                stripe_bytes=STRIPE_BYTES if len(fds) > 1 else 0,
            )
            undo.pop_all()

    def record(self) -> dict[str, Any]:
        """JSON-able: the files, and how they are opened and why."""
        return {
            **super().record(),
            "stripe_bytes": self.stripe_bytes,
            "direct": self.direct,
            "direct_why": self.direct_why,
        }


def _listed(folders: Path | str | Sequence[Path | str]) -> list[Path]:
    each = [folders] if isinstance(folders, Path | str) else list(folders)
    found = [Path(folder).absolute() for folder in each]
    if not found or len(set(found)) < len(found):
        given = ":".join(str(folder) for folder in found)
        raise InputError(f"tiers.ssd.path={given!r} must name at least one folder, and each folder only once")
    return found


def _prepare(folders: list[Path], num_bytes: int) -> list[Place]:
    places = []
    for folder, size in zip(folders, file_bytes(num_bytes, len(folders), STRIPE_BYTES), strict=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            places.append(Place(folder, size, folder.stat().st_dev))
        except OSError as error:
            raise _unusable(folder, error) from error
    return places


def _check_room(places: list[Place]) -> None:
    """Folders on one file system share its free space, and bring no bandwidth: worth a warning."""
    together: dict[int, list[Place]] = defaultdict(list)
    for place in places:
        together[place.device].append(place)
    for group in together.values():
        wanted = sum(place.num_bytes for place in group)
        there = _free_bytes(group[0].folder)
        if wanted > there:
            raise MachineError(_no_room(group, wanted, there, "free space"))
        if len(group) > 1:
            warnings.warn(
                f"tiers.ssd.path: {_names(group)} are on one file system, so their drives' rates do not add up; give "
                "one folder of it, or mount each drive",
                stacklevel=3,
            )


def _create(place: Place, undo: CleanUps) -> int:
    """The descriptor of a new file whose blocks are all there."""
    try:
        fd = open_unnamed(place.folder)
    except OSError as error:
        raise _unusable(place.folder, error) from error
    undo.callback(os.close, fd)
    try:
        if place.num_bytes:
            os.posix_fallocate(fd, 0, place.num_bytes)
        return fd
    except OSError as error:
        there = _free_bytes(place.folder)
        raise MachineError(_no_room([place], place.num_bytes, there, f"{error.strerror}, free space")) from error


def _choose_direct(places: list[Place], fds: list[int], mode: DirectMode) -> tuple[bool, str]:
    """Direct only if every file system takes it, and is not clearly faster without it."""
    if mode is DirectMode.off:
        return False, "tiers.ssd.direct=off"
    answers: dict[int, tuple[bool, str]] = {}
    for place, fd in zip(places, fds, strict=True):
        if place.device not in answers:
            answers[place.device] = _ask(place, fd, mode)
    if len(answers) == 1:
        return next(iter(answers.values()))
    told = {place.device: place.folder for place in reversed(places)}
    why = "; ".join(f"{told[device]}: {reason}" for device, (_, reason) in answers.items())
    against = [str(told[device]) for device, (direct, _) in answers.items() if not direct]
    if against and len(against) < len(answers):
        why = f"all drives go through the page cache, because {', '.join(against)} should; {why}"
    return not against, why


def _ask(place: Place, fd: int, mode: DirectMode) -> tuple[bool, str]:
    try:
        probe = probe_direct(place.folder)
    except OSError as error:
        raise _unusable(place.folder, error) from error
    if mode is DirectMode.on and not probe.direct:
        raise MachineError(
            f"ssd tier: tiers.ssd.direct=on, and {place.folder} does not take it ({probe.why}); set "
            "tiers.ssd.direct=off to go through the page cache, or tiers.ssd.path to a local drive"
        )
    if mode is DirectMode.on or not probe.direct or place.num_bytes < MIN_BYTES:
        return probe.direct, probe.why
    try:
        rates = measure_direct(path_of(fd), place.num_bytes)
    except (TransferFailed, OSError) as error:
        raise MachineError(f"ssd tier: {place.folder} fails its first transfers: {error}") from error
    return rates.take_direct, rates.why


def _free_bytes(folder: Path) -> int:
    try:
        space = os.statvfs(folder)
    except OSError as error:
        raise _unusable(folder, error) from error
    return space.f_bavail * space.f_frsize


def _names(places: list[Place]) -> str:
    return ", ".join(str(place.folder) for place in places)


def _unusable(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"ssd tier: {folder} cannot be used ({error.strerror}); set tiers.ssd.path to a writable folder on a local "
        "drive"
    )


def _no_room(places: list[Place], wanted: int, there: int, source: str) -> str:
    return (
        f"ssd tier: {wanted / GIB:.2f} GiB wanted, {there / GIB:.2f} GiB there by {source} of {_names(places)}; lower "
        "tiers.ssd.budget_gib (0 switches the tier off) or set tiers.ssd.path to a larger drive"
    )
