"""Bytes lie where RAID 0 would put them, by brute force; errors name the member; a failure closes the others."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.helpers.tiers import open_files
from headrace.storage.blockio.direct_file import BlockFile, DirectFile
from headrace.storage.blockio.striped_file import StripedFile, open_block_file
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.records import Lease, Medium
from headrace.storage.core.stripes import file_bytes, locate

BLOCK = 4096


class MemoryFile(BlockFile):
    """Bytes in memory; fails at one offset."""

    def __init__(self, path: str, num_bytes: int) -> None:
        super().__init__(path)
        self.content = bytearray(num_bytes)
        self.bad_offset: int | None = None
        self.closed = 0

    def read_some(self, view: memoryview, offset_bytes: int) -> int:
        count = max(0, min(len(view), len(self.content) - offset_bytes))
        view[:count] = self.content[offset_bytes : offset_bytes + count]
        return count

    def write_some(self, view: memoryview, offset_bytes: int) -> int:
        if offset_bytes == self.bad_offset:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.content[offset_bytes : offset_bytes + len(view)] = view
        return len(view)

    def resident_bytes(self, offset_bytes: int, num_bytes: int) -> int | None:
        return num_bytes if offset_bytes + num_bytes <= len(self.content) else None

    def close(self) -> None:
        self.closed += 1


def brute_force(total: int, num_files: int, stripe: int) -> list[list[int]]:
    """Addresses in the order in which each file holds them, dealt byte by byte."""
    files: list[list[int]] = [[] for _ in range(num_files)]
    for address in range(total):
        files[(address // stripe) % num_files].append(address)
    return files


@given(total=st.integers(0, 200), num_files=st.integers(1, 5), stripe=st.integers(1, 17))
def test_the_mapping_is_what_dealing_byte_by_byte_gives(total: int, num_files: int, stripe: int) -> None:
    dealt = brute_force(total, num_files, stripe)
    assert file_bytes(total, num_files, stripe) == [len(addresses) for addresses in dealt]
    for index, addresses in enumerate(dealt):
        for offset, address in enumerate(addresses):
            assert locate(address, num_files, stripe) == (index, offset)


@given(seed=st.integers(0, 2**32), num_files=st.integers(2, 4), stripe_blocks=st.integers(1, 3))
def test_reads_and_writes_are_those_of_one_long_file(seed: int, num_files: int, stripe_blocks: int) -> None:
    chance, total, stripe = random.Random(seed), 24 * BLOCK, stripe_blocks * BLOCK
    sizes = file_bytes(total, num_files, stripe)
    members = [MemoryFile(f"/drive{index}", size) for index, size in enumerate(sizes)]
    file, flat = StripedFile(members, stripe), bytearray(total)
    written = 0
    for _ in range(12):
        begin = chance.randrange(24)
        length = chance.randint(1, 24 - begin)
        data = bytearray(chance.randbytes(length * BLOCK))
        file.write(memoryview(data), begin * BLOCK, "x")
        flat[begin * BLOCK : (begin + length) * BLOCK] = data
        written += len(data)
        assert file.resident_bytes(begin * BLOCK, len(data)) == len(data)
    back = memoryview(bytearray(total))
    file.read(back, 0, "x")
    assert bytes(back) == bytes(flat)
    record = file.record()
    assert (record["written_bytes"], record["read_bytes"]) == (written, total)
    for member, addresses in zip(members, brute_force(total // BLOCK, num_files, stripe_blocks), strict=True):
        expected = b"".join(bytes(flat[block * BLOCK : (block + 1) * BLOCK]) for block in addresses)
        assert bytes(member.content) == expected


def test_one_call_moves_to_the_end_of_a_stripe() -> None:
    file = StripedFile([MemoryFile("/a", 4 * BLOCK), MemoryFile("/b", 4 * BLOCK)], 2 * BLOCK)
    assert file.write_some(memoryview(bytearray(b"x" * 4 * BLOCK)), BLOCK) == BLOCK
    view = memoryview(bytearray(4 * BLOCK))
    assert file.read_some(view, BLOCK) == BLOCK
    assert bytes(view[: BLOCK + 1]) == b"x" * BLOCK + b"\0"


def test_errors_name_the_member_and_its_offset() -> None:
    first, second = MemoryFile("/a", 4 * BLOCK), MemoryFile("/b", 4 * BLOCK)
    file = StripedFile([first, second], BLOCK)
    second.bad_offset = BLOCK
    with pytest.raises(TransferFailed, match=r"s0: write of /b at offset 4096 failed: No space left on device; free"):
        file.write(memoryview(bytearray(4 * BLOCK)), 0, "s0")
    assert file.where(3 * BLOCK) == "/b at offset 4096"
    assert file.record()["last_error"]["path"] == "/b"
    del second.content[3 * BLOCK :]
    with pytest.raises(TransferFailed, match=r"s0: read of /b at offset 12288 failed: the file ends after 0 of"):
        file.read(memoryview(bytearray(2 * BLOCK)), 6 * BLOCK, "s0")
    assert file.resident_bytes(0, 8 * BLOCK) is None


def test_retries_of_all_members_add_up() -> None:
    members = [MemoryFile("/a", BLOCK), MemoryFile("/b", BLOCK)]
    file = StripedFile(members, BLOCK)
    for member, retries in zip(members, (2, 3), strict=True):
        member.traffic.retries = retries
    assert file.num_retries == 5
    assert file.record()["paths"] == ["/a", "/b"]
    assert file.record()["stripe_bytes"] == BLOCK
    file.close()
    assert [member.closed for member in members] == [1, 1]


def lease(*paths: Path) -> Lease:
    path, *more = map(str, paths)
    stripe_bytes = BLOCK if more else 0
    return Lease(1, "rank0", Medium.ssd, path, 0, 6 * BLOCK, more_paths=tuple(more), stripe_bytes=stripe_bytes)


def test_open_takes_one_or_several(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(bytes(4 * BLOCK))
    one = open_block_file(lease(paths[0]))
    assert isinstance(one, DirectFile)
    one.close()
    several = open_block_file(lease(*paths))
    several.write(memoryview(bytearray(os.urandom(6 * BLOCK))), 0, "x")
    assert several.resident_bytes(0, 6 * BLOCK) == 6 * BLOCK
    assert several.direct is False
    several.close()
    several.close()
    with pytest.raises(TransferFailed, match="d cannot be opened: No such file or directory; its owner has ended"):
        open_block_file(lease(*paths, tmp_path / "d"))
    assert open_files(tmp_path) == []
