"""Both ways of asking agree with each other and with what was just read; asking brings no page in."""

from __future__ import annotations

import errno
import mmap
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.storage.blockio import page_cache
from headrace.storage.blockio.page_cache import by_cachestat, by_mincore, resident_bytes

PAGE = mmap.PAGESIZE
PAGES = 256


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[Path]:
    """A file of 256 pages on the drive, none of them in memory."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGES * PAGE))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if resident_bytes(path, 0, PAGES * PAGE):
        pytest.skip("this file system does not let go of its pages")
    return path


def counters() -> list:
    try:
        with open("/proc/self/exe", "rb") as file:
            by_cachestat(file.fileno(), 0, PAGE)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return [by_mincore]
    return [by_cachestat, by_mincore]


def test_they_agree_on_every_range(cold: Path) -> None:
    chance = random.Random(5)
    fd = os.open(cold, os.O_RDONLY)
    # Without read-ahead a read brings in what it reads and no more.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    there = {page for page in chance.sample(range(PAGES), 40) if os.pread(fd, 1, page * PAGE)}
    for count in counters():
        for _ in range(200):
            begin = chance.randrange(PAGES)
            end = chance.randint(begin + 1, PAGES)
            expected = sum(begin <= page < end for page in there) * PAGE
            assert count(fd, begin * PAGE, end * PAGE) == expected
    assert resident_bytes(fd, 0, PAGES * PAGE) == 40 * PAGE, "asking has brought none in"
    os.close(fd)


def test_a_range_may_end_in_a_page_and_past_the_file(cold: Path) -> None:
    with cold.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 1, (PAGES - 1) * PAGE)
        for count in counters():
            assert count(file.fileno(), (PAGES - 1) * PAGE, (PAGES - 1) * PAGE + 7) == PAGE
    assert resident_bytes(cold, 0, 2**50) == PAGE
    assert resident_bytes(str(cold), PAGES * PAGE, PAGE) == 0
    assert resident_bytes(cold, (PAGES - 1) * PAGE, 0) == 0


def test_a_huge_sparse_file_is_cheap(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 * 1024**4)
        os.pwrite(file.fileno(), bytes(3 * PAGE), 5 * 1024**4)
    if page_cache.counter() is by_cachestat:
        begin_s = time.process_time()
        assert resident_bytes(path, 0, 8 * 1024**4) == 3 * PAGE
        assert time.process_time() - begin_s < 0.5
    with path.open("rb") as file:
        window = page_cache.WINDOW_BYTES
        begin = 5 * 1024**4 - window - 3 * PAGE
        assert by_mincore(file.fileno(), begin, begin + 2 * window) == 3 * PAGE, "two windows and a shifted start"


def test_where_one_is_missing_the_other_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(fd: int, begin: int, end: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    def lying(fd: int, begin: int, end: int) -> int:
        return 0

    choose = page_cache.counter.__wrapped__
    monkeypatch.setattr(page_cache, "by_cachestat", missing)
    assert choose() is by_mincore
    monkeypatch.setattr(page_cache, "by_cachestat", lying)
    assert choose() is by_mincore
    monkeypatch.setattr(page_cache, "by_mincore", missing)
    with pytest.raises(OSError, match="neither cachestat nor mincore"):
        choose()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        resident_bytes(tmp_path / "gone", 0, PAGE)
