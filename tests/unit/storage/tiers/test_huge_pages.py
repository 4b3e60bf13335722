"""The kernel's settings for huge pages in memfds, and a lease allocated on the cores of its rank's device."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import pytest

from headrace.storage.tiers import touch as touch_module
from headrace.storage.tiers.huge_pages import memfd_setting
from headrace.storage.tiers.touch import Touched, cores_near, parse_list, touch

MIB = 1024**2
PAGE = mmap.PAGESIZE


def settings(folder: Path, overall: str, own: str | None) -> Path:
    path = folder / "kernel/mm/transparent_hugepage"
    path.mkdir(parents=True)
    words = "always within_size advise never deny force"
    (path / "shmem_enabled").write_text(words.replace(overall, f"[{overall}]"))
    (path / "hpage_pmd_size").write_text("2097152\n")
    if own is not None:
        (path / "hugepages-2048kB").mkdir()
        (path / "hugepages-2048kB/shmem_enabled").write_text(
            f"always inherit {words}".replace(f" {own} ", f" [{own}] ")
        )
    return folder


@pytest.mark.parametrize(
    ("overall", "own", "memfd"),
    [
        ("advise", None, "advise"),
        ("never", "inherit", "never"),
        ("always", "inherit", "always"),
        ("never", "advise", "advise"),
        ("advise", "never", "never"),
        ("deny", "advise", "deny"),
    ],
)
def test_huge_pages_of_memfds(overall: str, own: str | None, memfd: str, tmp_path: Path) -> None:
    assert memfd_setting(sys=settings(tmp_path, overall, own)) == memfd


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    assert memfd_setting(sys=tmp_path / "none") == "absent"


def test_lists_of_the_kernel() -> None:
    assert parse_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_list("\n") == set()


def test_cores_near_a_device_are_those_that_this_process_may_use(tmp_path: Path) -> None:
    own = sorted(os.sched_getaffinity(0))
    folder = tmp_path / "bus/pci/devices/0000:3b:00.0"
    folder.mkdir(parents=True)
    (folder / "local_cpulist").write_text(f"{own[0]},5000-5003\n")
    assert cores_near("0000:3B:00.0", sys=tmp_path) == {own[0]}
    (folder / "local_cpulist").write_text("5000-5003\n")
    assert cores_near("0000:3b:00.0", sys=tmp_path) is None
    assert cores_near("0000:99:00.0", sys=tmp_path) is None


def touched(num_bytes: int, cores: frozenset[int] | None = None) -> tuple[Touched, int]:
    """A memfd of which the second half is touched; also the bytes that it has then."""
    fd = os.memfd_create("touch")
    try:
        os.truncate(fd, 2 * num_bytes)
        with mmap.mmap(fd, num_bytes, offset=num_bytes) as memory:
            start = ctypes.c_char.from_buffer(memory)
            try:
                return touch(fd, num_bytes, ctypes.addressof(start), num_bytes, cores), 512 * os.fstat(fd).st_blocks
            finally:
                del start
    finally:
        os.close(fd)


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_every_page_of_the_range_is_there_and_no_other(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "old":

        def unknown(address: int, num_bytes: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        monkeypatch.setattr(touch_module, "populate", unknown)
    monkeypatch.setattr(touch_module, "PIECE_BYTES", MIB)
    found, num_bytes = touched(4 * MIB)
    assert num_bytes in range(4 * MIB, 6 * MIB), "huge pages may reach over the edge"
    assert ("MADV_POPULATE_WRITE" in found.how) == (kernel == "new")
    assert found.num_threads == len(os.sched_getaffinity(0))


def test_threads_touch_on_the_cores_that_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    own = frozenset(os.sched_getaffinity(0))
    core = frozenset({min(own)})
    seen: list[set[int]] = []
    monkeypatch.setattr(touch_module, "populate", lambda address, num_bytes: seen.append(os.sched_getaffinity(0)))
    monkeypatch.setattr(touch_module, "PIECE_BYTES", PAGE)
    found, _ = touched(4 * PAGE, core)
    assert seen == [core] * 4
    assert found.num_threads == 1
    assert os.sched_getaffinity(0) == own, "the caller's own thread is left alone"
