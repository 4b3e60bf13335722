"""Several files, one per drive, as one address space: stripes go to the files in turn, as in RAID 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from headrace.storage.blockio.direct_file import BlockFile, DirectFile, Traffic
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.records import Lease
from headrace.storage.core.stripes import file_bytes, locate


class StripedFile(BlockFile):
    """Splits reads and writes at the borders of stripes; errors name the member file and the offset in it.

    A transfer that lies in one stripe is one member's and runs beside those of the others; one that crosses a border is
    done piece by piece, in order.

    Args:
        members: in stripe order; closed with this file.
        stripe_bytes: a multiple of 4096.
    """

    def __init__(self, members: Sequence[BlockFile], stripe_bytes: int) -> None:
        super().__init__(":".join(member.path for member in members))
        self._members = list(members)
        self._stripe_bytes = stripe_bytes
        self.direct = all(member.direct for member in members)

    def read(self, view: memoryview, offset_bytes: int, label: str) -> None:
        """As BlockFile.read, of every member in the range. Raises TransferFailed."""
        for member, offset, piece in self._pieces(view, offset_bytes):
            member.read(piece, offset, label)

    def write(self, view: memoryview, offset_bytes: int, label: str) -> None:
        """As BlockFile.write, to every member in the range. Raises TransferFailed."""
        for member, offset, piece in self._pieces(view, offset_bytes):
            member.write(piece, offset, label)

    def read_some(self, view: memoryview, offset_bytes: int) -> int:
        """Some bytes, at most to the end of the stripe. Raises OSError."""
        member, offset, piece = next(self._pieces(view, offset_bytes))
        return member.read_some(piece, offset)

    def write_some(self, view: memoryview, offset_bytes: int) -> int:
        """Some bytes, at most to the end of the stripe. Raises OSError."""
        member, offset, piece = next(self._pieces(view, offset_bytes))
        return member.write_some(piece, offset)

    @property
    def traffic(self) -> Traffic:
        """Of all members together; the last error is that of the last member that has one."""
        each = [member.traffic for member in self._members]
        errors = [one.last_error for one in each if one.last_error is not None]
        return Traffic(
            sum(one.written_bytes for one in each),
            sum(one.read_bytes for one in each),
            sum(one.retries for one in each),
            errors[-1] if errors else None,
        )

    def record(self) -> dict[str, Any]:
        """As BlockFile.record, with every member's path and the bytes that each has written and read."""
        paths = [member.path for member in self._members]
        each = [
            {
                "path": member.path,
                "written_bytes": member.traffic.written_bytes,
                "read_bytes": member.traffic.read_bytes,
            }
            for member in self._members
        ]
        return {**super().record(), "paths": paths, "stripe_bytes": self._stripe_bytes, "each": each}

    def where(self, offset_bytes: int) -> str:
        """The member file and the offset in it."""
        index, offset = locate(offset_bytes, len(self._members), self._stripe_bytes)
        return self._members[index].where(offset)

    def resident_bytes(self, offset_bytes: int, num_bytes: int) -> int | None:
        """Of all members together; None if it is unknown for one member."""
        total = 0
        for member, begin, length in self._ranges(offset_bytes, num_bytes):
            found = member.resident_bytes(begin, length)
            if found is None:
                return None
            total += found
        return total

    def close(self) -> None:
        """Close every member; may be called twice."""
        for member in self._members:
            member.close()

    def _pieces(self, view: memoryview, offset_bytes: int) -> Iterator[tuple[BlockFile, int, memoryview]]:
        done = 0
        while done < len(view):
            address = offset_bytes + done
            index, offset = locate(address, len(self._members), self._stripe_bytes)
            end = min(len(view), done + self._stripe_bytes - address % self._stripe_bytes)
            yield self._members[index], offset, view[done:end]
            done = end

    def _ranges(self, offset_bytes: int, num_bytes: int) -> Iterator[tuple[BlockFile, int, int]]:
        """The one contiguous range of each member that the addresses touch."""
        begins = file_bytes(offset_bytes, len(self._members), self._stripe_bytes)
        ends = file_bytes(offset_bytes + num_bytes, len(self._members), self._stripe_bytes)
        for member, begin, end in zip(self._members, begins, ends, strict=True):
            if end > begin:
                yield member, begin, end - begin


def open_block_file(lease: Lease) -> BlockFile:
    """The file of a lease: one path is that file itself, several are striped.

    Raises:
        TransferFailed: one of them cannot be opened; the others are closed again.
    """
    opened: list[BlockFile] = []
    with CleanUps() as undo:
        for path, name in zip(lease.paths, lease.names, strict=True):
            opened.append(DirectFile(path, direct=lease.direct, name=name))
            undo.callback(opened[-1].close)
        undo.pop_all()
    return opened[0] if len(opened) == 1 else StripedFile(opened, lease.stripe_bytes)
