"""Whole or an error; nothing in the page cache; nothing left by the probe."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.storage.blockio.direct_file import BlockFile, DirectFile, probe_direct
from headrace.storage.core.errors import TransferFailed

BLOCK = 4096


class ScriptedFile(BlockFile):
    """Answers with the scripted counts and errors, over real bytes."""

    def __init__(self, content: bytearray, script: list[int | OSError]) -> None:
        super().__init__("/scripted")
        self.content, self.script, self.calls = content, script, []

    def _next(self, wanted: int, offset: int) -> int:
        self.calls.append((offset, wanted))
        answer = self.script.pop(0) if self.script else wanted
        if isinstance(answer, OSError):
            raise answer
        return min(answer, wanted)

    def read_some(self, view: memoryview, offset_bytes: int) -> int:
        count = self._next(len(view), offset_bytes)
        view[:count] = self.content[offset_bytes : offset_bytes + count]
        return count

    def write_some(self, view: memoryview, offset_bytes: int) -> int:
        count = self._next(len(view), offset_bytes)
        self.content[offset_bytes : offset_bytes + count] = view[:count]
        return count

    def close(self) -> None:
        pass


def test_short_transfers_go_on_from_the_last_whole_block() -> None:
    data = os.urandom(4 * BLOCK)
    file = ScriptedFile(bytearray(8 * BLOCK), [BLOCK + 7, 100, 2 * BLOCK])
    file.write(memoryview(bytearray(data)), 2 * BLOCK, "x")
    assert bytes(file.content[2 * BLOCK : 6 * BLOCK]) == data
    assert [offset for offset, _ in file.calls] == [2 * BLOCK, 3 * BLOCK, 3 * BLOCK, 5 * BLOCK]

    back = memoryview(bytearray(4 * BLOCK))
    file.script = [1, BLOCK, 3 * BLOCK - 1, BLOCK]
    file.read(back, 2 * BLOCK, "x")
    assert bytes(back) == data


def test_end_of_file_is_an_error_and_not_zeros() -> None:
    file = ScriptedFile(bytearray(4 * BLOCK), [BLOCK, 0])
    with pytest.raises(
        TransferFailed, match=r"x: read of /scripted at offset 12288 failed: the file ends after 4096 of"
    ):
        file.read(memoryview(bytearray(3 * BLOCK)), 2 * BLOCK, "x")


def test_no_progress_ends() -> None:
    file = ScriptedFile(bytearray(BLOCK), [0] * 100)
    with pytest.raises(TransferFailed, match="write of /scripted at offset 0 failed: only 0 of 4096"):
        file.write(memoryview(bytearray(BLOCK)), 0, "x")


FINAL = [
    (errno.ENOSPC, r"tiers\.ssd\.budget_gib"),
    (errno.EDQUOT, r"quota of this user .* tiers\.ssd\.budget_gib"),
    (errno.EROFS, "read-only.*dmesg"),
    (errno.ENODEV, "the drive is gone.*dmesg"),
    (errno.ENXIO, "the drive is gone.*dmesg"),
    (errno.ESTALE, "the mount is gone"),
    (errno.ENOTCONN, "the mount is gone"),
    (errno.EBADF, "closed while it was in use"),
    (errno.EFBIG, "ulimit -f"),
    (errno.EINVAL, r"tiers\.ssd\.direct=off"),
]


@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize(("code", "remedy"), FINAL)
def test_errors_name_path_offset_key_reason_and_remedy_at_once(code: int, remedy: str, verb: str) -> None:
    file = ScriptedFile(bytearray(4 * BLOCK), [BLOCK, OSError(code, os.strerror(code))])
    reason = f"s0.x: {verb} of /scripted at offset 8192 failed: {os.strerror(code)}; .*{remedy}"
    with pytest.raises(TransferFailed, match=reason) as caught:
        getattr(file, verb)(memoryview(bytearray(2 * BLOCK)), BLOCK, "s0.x")
    assert len(file.calls) == 2
    assert file.num_retries == 0
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_without_a_number_is_told_too() -> None:
    file = ScriptedFile(bytearray(BLOCK), [OSError("odd")])
    with pytest.raises(TransferFailed, match=r"failed: odd$"):
        file.read(memoryview(bytearray(BLOCK)), 0, "x")
    assert len(file.calls) == 1


@pytest.mark.parametrize(
    ("code", "verb"), [(errno.EIO, "read"), (errno.EIO, "write"), (errno.ETIMEDOUT, "read"), (errno.EREMOTEIO, "write")]
)
def test_a_broken_transfer_is_tried_three_times(code: int, verb: str) -> None:
    data = os.urandom(2 * BLOCK)
    passing = [OSError(code, os.strerror(code))] * 2
    file = ScriptedFile(bytearray(data), [BLOCK, *passing])
    view = memoryview(bytearray(2 * BLOCK if verb == "read" else data))
    getattr(file, verb)(view, 0, "x")
    assert bytes(view) == bytes(file.content) == data
    assert [offset for offset, _ in file.calls] == [0, BLOCK, BLOCK, BLOCK]
    assert file.num_retries == 2
    last = {"errno": errno.errorcode[code], "verb": verb, "path": "/scripted", "offset_bytes": BLOCK}
    assert file.record()["last_error"] == last

    file.script = [OSError(code, os.strerror(code))] * 100
    with pytest.raises(TransferFailed, match=f"{os.strerror(code)} in each of 3 tries; the drive fails.*smartctl"):
        getattr(file, verb)(view, 0, "x")
    assert file.num_retries == 4
    assert len(file.script) == 97


def test_the_record_counts_what_came_to_its_end() -> None:
    file = ScriptedFile(bytearray(4 * BLOCK), [])
    file.write(memoryview(bytearray(3 * BLOCK)), 0, "x")
    file.read(memoryview(bytearray(BLOCK)), 0, "x")
    file.script = [BLOCK, OSError(errno.ENOSPC, "full")]
    with pytest.raises(TransferFailed):
        file.write(memoryview(bytearray(2 * BLOCK)), 0, "x")
    last = {"errno": "ENOSPC", "verb": "write", "path": "/scripted", "offset_bytes": BLOCK}
    assert file.record() == {
        "paths": ["/scripted"],
        "direct": None,
        "retries": 0,
        "last_error": last,
        "written_bytes": 3 * BLOCK,
        "read_bytes": BLOCK,
    }
    assert file.resident_bytes(0, BLOCK) is None


def test_a_file_that_was_closed_says_so(tmp_path: Path) -> None:
    path = tmp_path / "slab"
    path.write_bytes(bytes(BLOCK))
    file = DirectFile(str(path), direct=False)
    assert file.resident_bytes(0, BLOCK) == BLOCK
    file.close()
    with pytest.raises(TransferFailed, match="Bad file descriptor; the file was closed"):
        file.read(memoryview(bytearray(BLOCK)), 0, "x")
    assert file.resident_bytes(0, BLOCK) is None


def test_a_busy_device_is_asked_again_and_not_for_ever() -> None:
    busy = OSError(errno.EAGAIN, "busy")
    data = os.urandom(BLOCK)
    file = ScriptedFile(bytearray(BLOCK), [busy, busy])
    file.write(memoryview(bytearray(data)), 0, "x")
    assert bytes(file.content) == data
    assert file.num_retries == 2
    file.script = [busy] * 100
    with pytest.raises(TransferFailed, match="busy in each of 9 tries; the drive is overloaded"):
        file.read(memoryview(bytearray(BLOCK)), 0, "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TransferFailed, match=r"gone\.slab cannot be opened: No such file"):
        DirectFile(str(tmp_path / "gone.slab"), direct=False)


def test_direct_transfers_leave_no_page_in_the_cache(tmp_path: Path, resident_pages: Callable[[Path], int]) -> None:
    probe = probe_direct(tmp_path)
    if not probe.direct:
        pytest.skip(f"{tmp_path}: {probe.why}")
    size = 8 * 1024**2
    path = tmp_path / "slab"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, size)
    os.close(fd)
    data = os.urandom(size)
    with mmap.mmap(-1, size) as buffer:
        buffer[:] = data
        direct = DirectFile(str(path), direct=True)
        direct.write(memoryview(buffer), 0, "x")
        assert resident_pages(path) == direct.resident_bytes(0, size) == 0
        buffer[:] = bytes(size)
        direct.read(memoryview(buffer), 0, "x")
        direct.close()
        assert buffer[:] == data
        assert resident_pages(path) == 0

        buffered = DirectFile(str(path), direct=False)
        buffered.write(memoryview(buffer), 0, "x")
        assert resident_pages(path) == size // mmap.PAGESIZE, "the counter sees cached pages"
        assert buffered.resident_bytes(0, size) == size
        assert buffered.resident_bytes(BLOCK, 2 * BLOCK) == 2 * BLOCK
        buffered.close()


def test_unaligned_direct_transfer_is_an_error(tmp_path: Path) -> None:
    if not probe_direct(tmp_path).direct:
        pytest.skip("no O_DIRECT here")
    path = tmp_path / "slab"
    path.write_bytes(bytes(2 * BLOCK))
    file = DirectFile(str(path), direct=True)
    with mmap.mmap(-1, BLOCK) as buffer, pytest.raises(TransferFailed, match="Invalid argument"):
        file.write(memoryview(buffer), 1, "x")
    file.close()
    file.close()


def test_the_probe_leaves_nothing(tmp_path: Path) -> None:
    assert probe_direct(tmp_path).why
    assert list(tmp_path.iterdir()) == []


def test_the_probe_sees_a_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    probe = probe_direct(tmp_path)
    assert not probe.direct
    assert "refused: Invalid argument" in probe.why
