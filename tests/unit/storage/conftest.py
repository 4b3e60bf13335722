"""Slabs and leases in temporary folders, and a GPU's streams played by threads."""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.stack import TierStack
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer import DeviceCopies, Fence
from headrace.storage.transfer_log import TransferLog

MIB = 1024**2


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of drives go to the test's folder, not to the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def resident_pages() -> Callable[[Path], int]:
    """Counts the pages of a file that are in the page cache, by mincore(2)."""

    def count(path: Path) -> int:
        size = path.stat().st_size
        libc = ctypes.CDLL(None, use_errno=True)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as view:
            pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
            address = ctypes.c_char.from_buffer(view)
            try:
                failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(size), pages)
            finally:
                del address
            assert failed == 0, os.strerror(ctypes.get_errno())
            return sum(page & 1 for page in pages)

    return count


@pytest.fixture
def host_slab() -> Iterator[HostSlab]:
    with HostSlab(8 * MIB, run_id="test") as slab:
        yield slab


@pytest.fixture
def ssd_slab(tmp_path: Path) -> Iterator[SsdSlab]:
    with SsdSlab(tmp_path / "tiers", 16 * MIB) as slab:
        yield slab


@pytest.fixture
def log() -> TransferLog:
    return TransferLog(rank=3)


@pytest.fixture
def stack(host_slab: HostSlab, ssd_slab: SsdSlab, log: TransferLog) -> Iterator[TierStack]:
    """4 MiB of host memory and 12 MiB of drive, on CPU."""
    leases = [host_slab.lease("rank0", 4 * MIB), ssd_slab.lease("rank0", 12 * MIB)]
    opened = open_stack(leases, TiersConfig(), device=torch.device("cpu"), log=log)
    yield opened
    opened.close()


@pytest.fixture
def mount_tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options, for as long as the test lasts."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"tmpfs{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class PlayedEvent:
    """An event of a played stream."""

    def __init__(self) -> None:
        self._fired = threading.Event()
        self.time_s = 0.0

    def fire(self) -> None:
        self.time_s = time.perf_counter()
        self._fired.set()

    def query(self) -> bool:
        return self._fired.is_set()

    def synchronize(self) -> None:
        assert self._fired.wait(600), "a played stream stands still"


class PlayedStream:
    """Runs what it is given in order, on a thread of its own, like a CUDA stream."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def launch(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def record(self) -> PlayedEvent:
        event = PlayedEvent()
        self.launch(event.fire)
        return event

    def wait(self, fence: Fence | None) -> None:
        if fence is not None:
            self.launch(fence.end.synchronize)

    def synchronize(self) -> None:
        self.record().synchronize()

    def end(self) -> None:
        self._work.put(None)
        self._thread.join(120)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class PlayedGpu(DeviceCopies):
    """DeviceCopies whose device is CPU memory and whose streams are threads: the order of CUDA without CUDA."""

    asynchronous = True

    def __init__(self, *, copy_s: float = 0.0) -> None:
        super().__init__(torch.device("cpu"))
        self.copy_s = copy_s
        self.compute, self.outward, self.inward = PlayedStream(), PlayedStream(), PlayedStream()
        self.registered: list[int] = []

    def fence(self) -> Fence:
        event: Any = self.compute.record()
        return Fence(event, event)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        view, content = target.numpy(), source.numpy()
        self.compute.launch(lambda: np.copyto(view, content))

    def to_host(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        return self._copy(self.outward, target, source, after)

    def to_device(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]) -> Fence:
        return self._copy(self.inward, target, source, after)

    def wait(self, fence: Fence | None) -> tuple[float, float] | None:
        if fence is None:
            return None
        fence.end.synchronize()
        begin: Any = fence.begin
        end: Any = fence.end
        return begin.time_s, end.time_s

    def order_caller_after(self, fence: Fence | None) -> None:
        self.compute.wait(fence)

    def stalled_s(self) -> float:
        return 0.0

    def register(self, memory: torch.Tensor, tier: str) -> None:
        self.registered.append(memory.numel())

    def unregister(self, memory: torch.Tensor) -> None:
        self.outward.synchronize()
        self.inward.synchronize()
        self.registered.remove(memory.numel())

    def end(self) -> None:
        for stream in (self.compute, self.outward, self.inward):
            stream.end()

    def _copy(
        self, stream: PlayedStream, target: torch.Tensor, source: torch.Tensor, after: Sequence[Fence | None]
    ) -> Fence:
        for earlier in after:
            stream.wait(earlier)
        begin: Any = stream.record()

        def copy() -> None:
            time.sleep(self.copy_s)
            np.copyto(target.numpy(), source.numpy())

        stream.launch(copy)
        end: Any = stream.record()
        return Fence(begin, end)


@pytest.fixture
def played_gpu() -> Iterator[PlayedGpu]:
    gpu = PlayedGpu()
    yield gpu
    gpu.end()
