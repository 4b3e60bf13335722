"""The drive and the memory of the host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.platform.doctor import host_rates


def test_disk_rates_move_the_whole_file_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"pwrite": 0, "preadv": 0}
    pwrite, preadv = os.pwrite, os.preadv

    def count_write(handle: int, block: bytes, offset: int) -> int:
        done = pwrite(handle, block, offset)
        moved["pwrite"] += done if done > 4096 else 0  # the probe's own block does not count
        return done

    def count_read(handle: int, blocks: list[bytearray], offset: int) -> int:
        done = preadv(handle, blocks, offset)
        moved["preadv"] += done if done > 4096 else 0
        return done

    monkeypatch.setattr(os, "pwrite", count_write)
    monkeypatch.setattr(os, "preadv", count_read)
    (row,) = host_rates.disk_rates(str(tmp_path), num_bytes=(8 << 20) + 5, block_bytes=1 << 20)
    assert row["bytes"] == 8 << 20
    assert moved == {"pwrite": 8 << 20, "preadv": 8 << 20}
    assert row["direct_why"]
    assert list(tmp_path.iterdir()) == []


def test_a_short_transfer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, block, offset: pwrite(handle, block, offset) - 1)
    with pytest.raises(OSError, match="moved 1048575 of 1048576 bytes at offset"):
        host_rates.disk_rates(str(tmp_path), num_bytes=4 << 20, block_bytes=1 << 20)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_room_or_access_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="bytes free"):
        host_rates.disk_rates(str(tmp_path), num_bytes=4 << 20, block_bytes=1 << 40)
    with pytest.raises(FileNotFoundError):
        host_rates.disk_rates(str(tmp_path / "nowhere"))


def test_the_row_of_memory() -> None:
    (row,) = host_rates.host_memory()
    assert 0 < row["available_gib"] <= row["mem_total_gib"]
    assert row["num_cores"] == len(os.sched_getaffinity(0))


def test_memory_info_is_in_bytes() -> None:
    assert host_rates.memory_info()["MemTotal"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
