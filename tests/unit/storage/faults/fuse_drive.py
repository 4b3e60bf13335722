"""A file system of one file that errs on demand: a FUSE server that speaks the kernel's protocol itself.

    python fuse_drive.py MOUNT_POINT NUM_BYTES MODE_FILE

The mode file is read at every read and write of `slab`: `ok`; `eio` (all fail), `eio 3` (the next three fail); `flip`
(a read has one wrong bit); `short` (a read or write moves half); `hang` (no answer while it says so). Killed, the
server leaves a mount whose every call ends in ENOTCONN: a network file system that is gone.

Protocol: include/uapi/linux/fuse.h, version 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
import threading
import time
from pathlib import Path

LOOKUP, FORGET, GETATTR, OPEN, READ, WRITE, STATFS, RELEASE = 1, 2, 3, 14, 15, 16, 17, 18
FSYNC, FLUSH, INIT, OPENDIR, RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET = 20, 25, 26, 27, 29, 36, 38, 42
SILENT = {FORGET, BATCH_FORGET, INTERRUPT}

MAX_WRITE = 1024**2
HAS_MAX_PAGES = 1 << 22
PAST_THE_PAGE_CACHE = 1  # FOPEN_DIRECT_IO
ROOT, SLAB = 1, 2


class FuseDrive:
    """Answers the kernel's requests over /dev/fuse, each on a thread of its own."""

    def __init__(self, fd: int, num_bytes: int, mode_file: Path) -> None:
        self._fd = fd
        self._content = bytearray(num_bytes)
        self._mode_file = mode_file
        self._mode = ""
        self._eio_left = 0
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Until the file system is unmounted."""
        while True:
            try:
                request = os.read(self._fd, MAX_WRITE + 64 * 1024)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return  # ENODEV: unmounted
            threading.Thread(target=self._answer, args=(request,), daemon=True).start()

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        if opcode in SILENT:
            return
        try:
            answer, code = self._reply(opcode, node, request[40:]), 0
        except OSError as error:
            answer, code = b"", error.errno or errno.EIO
        os.write(self._fd, struct.pack("<IiQ", 16 + len(answer), -code, unique) + answer)

    def _reply(self, opcode: int, node: int, body: bytes) -> bytes:
        if opcode == INIT:
            major, minor, read_ahead, _ = struct.unpack_from("<IIII", body)
            assert (major, minor >= 31) == (7, True)
            sizes = struct.pack("<HHIIHHI", 16, 12, MAX_WRITE, 1, MAX_WRITE // 4096, 0, 0)
            return struct.pack("<IIII", 7, 31, read_ahead, HAS_MAX_PAGES) + sizes + bytes(28)
        if opcode == LOOKUP:
            if body.rstrip(b"\0") != b"slab":
                raise OSError(errno.ENOENT, "no such file")
            return struct.pack("<QQQQII", SLAB, 0, 60, 60, 0, 0) + self._attributes(SLAB)
        if opcode == GETATTR:
            return struct.pack("<QII", 60, 0, 0) + self._attributes(node)
        if opcode in (OPEN, OPENDIR):
            return struct.pack("<QII", 0, PAST_THE_PAGE_CACHE, 0)
        if opcode in (READ, WRITE):
            return self._transfer(opcode, body)
        if opcode == STATFS:
            return struct.pack("<QQQQQIII", 2**20, 2**20, 2**20, 10, 10, 4096, 255, 4096) + bytes(28)
        if opcode in (FLUSH, FSYNC, RELEASE, RELEASEDIR, DESTROY):
            return b""
        raise OSError(errno.ENOSYS, "not served")

    def _transfer(self, opcode: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        mode = self._meet()
        if mode == "short" and size > 4096:
            size = size // 2
        if opcode == WRITE:
            self._content[offset : offset + size] = body[40 : 40 + size]
            return struct.pack("<II", size, 0)
        answer = bytearray(self._content[offset : offset + size])
        if mode == "flip" and answer:
            answer[len(answer) // 2] ^= 1
        return bytes(answer)

    def _meet(self) -> str:
        while (mode := self._mode_file.read_text()) == "hang":
            time.sleep(0.02)
        with self._lock:
            if mode != self._mode:
                self._mode = mode
                self._eio_left = int(mode.split()[1]) if mode.startswith("eio ") else 0
            failed = mode == "eio" or self._eio_left > 0
            self._eio_left -= self._eio_left > 0
        if failed:
            raise OSError(errno.EIO, "as asked for")
        return mode

    def _attributes(self, node: int) -> bytes:
        size = len(self._content) if node == SLAB else 0
        mode = stat.S_IFREG | 0o600 if node == SLAB else stat.S_IFDIR | 0o700
        times = (0, 0, 0)
        return struct.pack(
            "<QQQQQQIIIIIIIIII", node, size, size // 512, *times, *times, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0
        )


def main(mount_point: str, num_bytes: str, mode_file: str) -> int:
    """Mount, say so on a line, serve."""
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        print(f"/dev/fuse: {error.strerror}", flush=True)
        return 1
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"headrace-test", mount_point.encode(), b"fuse", 0, options.encode()) != 0:
        print(f"mount: {os.strerror(ctypes.get_errno())}", flush=True)
        return 1
    print("mounted", flush=True)
    FuseDrive(fd, int(num_bytes), Path(mode_file)).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
