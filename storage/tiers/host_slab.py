"""Host memory as its owner has it: one shared slab per node, touched before the first step. No torch."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headrace.storage.core.errors import MachineError
from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Medium
from headrace.storage.tiers.huge_pages import ON, memfd_setting, mount_setting
from headrace.storage.tiers.memory_limits import SHM, UNBOUNDED, MemoryLimit, available_memory
from headrace.storage.tiers.numa import NumaNode, Region, cut, memory_nodes, nodes_of
from headrace.storage.tiers.slab import LEASE_ALIGNMENT, Slab
from headrace.storage.tiers.sweep import create_slab_file, promised_bytes, promising, slab_name, sweep_folder
from headrace.storage.tiers.touch import Touched, touch

GIB = 1024**3


@dataclass(frozen=True)
class FileChoice:
    """What the slab's file is to be, and why.

    Args:
        huge: the setting under which memory in the file comes, for example "advise".
    """

    is_memfd: bool
    why: str
    huge: str


class HostSlab(Slab):
    """The node's host memory for offloaded blobs.

    A file of /dev/shm where that is large enough (its default cap is half of memory), else a memfd, which has no such
    cap and which processes of the same user open as /proc/PID/fd/N; a memfd too where that alone gets huge pages. Every
    page is touched at start, by all cores: the memory is there before the first step, or the start fails. On a machine
    with several NUMA nodes the slab has an equal part on each. Slabs of dead runs are removed first.

    `why` says which file it is and for what reason, `numa_why` what became of the nodes, `touched` how the pages came.

    Args:
        num_bytes: rounded up to whole pages; 0 makes an empty slab.
        run_id: goes into the file's name.
        shm: the shared-memory file system.
        nodes: that have memory; None asks the machine.
        memory_grows: the machine gets memory as it uses it: what is free now does not limit the slab.

    Raises:
        MachineError: the machine, or a control group, has less memory than asked for.
    """

    def __init__(
        self,
        num_bytes: int,
        *,
        run_id: str,
        shm: Path = SHM,
        nodes: Sequence[NumaNode] | None = None,
        memory_grows: bool = False,
    ) -> None:
        sweep_folder(shm)
        num_bytes = round_up(num_bytes, LEASE_ALIGNMENT)
        nodes = memory_nodes() if nodes is None else tuple(nodes)
        # Beside a memfd lies a file of holes with this name until all is touched: what it promises to run with.
        file = shm / slab_name(run_id)
        with promising(shm):
            limit = available_memory(shm=shm, grows=memory_grows)
            if num_bytes > limit.available_bytes:
                raise MachineError(_message(num_bytes, limit))
            choice = choose_file(num_bytes, shm)
            fds, files = _create(choice, num_bytes, file)
        path = f"/proc/{os.getpid()}/fd/{fds[0]}" if choice.is_memfd else str(file)
        super().__init__(Medium.host, num_bytes, path, fds=fds, files=files)
        self.is_memfd, self.why = choice.is_memfd, choice.why
        self._fd = fds[0]
        self._huge = choice.huge
        self.regions = cut(num_bytes, nodes, LEASE_ALIGNMENT)
        try:
            os.truncate(self._fd, num_bytes)
            keep = functools.partial(_keep_promise, self._fd, fds[-1]) if choice.is_memfd else None
            self.touched: Touched = touch(self._fd, num_bytes, self.regions, huge=choice.huge in ON, after_piece=keep)
        except OSError as error:
            self.close()
            limit = replace(limit, source=f"{path}: {error.strerror}")
            raise MachineError(_message(num_bytes, limit)) from error
        if choice.is_memfd:
            file.unlink(missing_ok=True)
        self.numa_why = _numa_why(nodes, self.regions, self.touched)

    def record(self) -> dict[str, Any]:
        """Which file and why, how its pages came, and where they are."""
        regions = [
            {"node": r.node.node, "begin": r.begin, "end": r.end, "sampled_pages": self._sample(r.begin, r.end)}
            for r in self.regions
        ]
        return super().record() | {
            "is_memfd": self.is_memfd,
            "why": self.why,
            "huge_setting": self._huge,
            "huge_bytes": self.touched.huge_bytes,
            "touch_how": self.touched.how,
            "touch_s": self.touched.wall_s,
            "touch_gib_per_s": self.num_bytes / GIB / self.touched.wall_s if self.touched.wall_s else None,
            "num_threads": self.touched.num_threads,
            "numa_why": self.numa_why,
            "numa_regions": regions,
        }

    def _region_of(self, numa_node: int | None) -> tuple[int, int] | None:
        return next(((r.begin, r.end) for r in self.regions if r.node.node == numa_node), None)

    def _node_of(self, offset_bytes: int, num_bytes: int) -> int | None:
        found = self._sample(offset_bytes, offset_bytes + num_bytes)
        return max(found, key=lambda node: found[node]) if found else None

    def _sample(self, begin: int, end: int) -> dict[int, int]:
        try:
            return dict(nodes_of(self._fd, begin, end))
        except OSError:
            return {}  # numa_why says that the kernel does not tell


def choose_file(num_bytes: int, shm: Path) -> FileChoice:
    """A file of `shm` where there is room, unless huge pages are to be had in a memfd alone; else a memfd."""
    memfd = memfd_setting()
    if not shm.is_dir():
        return FileChoice(True, f"a memfd: there is no {shm}", memfd)
    if not os.access(shm, os.W_OK | os.X_OK):
        return FileChoice(True, f"a memfd: {shm} is not writable", memfd)
    there = _free_bytes(shm) - promised_bytes(shm)
    if there < num_bytes:
        room = f"{max(0, there) / GIB:.2f} GiB are free in {shm}"
        return FileChoice(True, f"a memfd: {room}, {num_bytes / GIB:.2f} GiB wanted", memfd)
    mounted = mount_setting(shm)
    if memfd in ON and mounted not in ON:
        why = f"a memfd: it gets huge pages (shmem_enabled: {memfd}), {shm} does not (huge={mounted})"
        return FileChoice(True, why, memfd)
    return FileChoice(False, f"a file of {shm}, which has room", mounted)


def _create(choice: FileChoice, num_bytes: int, file: Path) -> tuple[list[int], list[Path]]:
    """Descriptors (the slab's first) and files of a slab. `file` has its whole size at once: a promise to others."""
    fds: list[int] = []
    try:
        if choice.is_memfd:
            fds.append(os.memfd_create(file.name, os.MFD_CLOEXEC))
        if not choice.is_memfd or os.access(file.parent, os.W_OK | os.X_OK):
            fds.append(create_slab_file(file))
            os.truncate(fds[-1], num_bytes)
    except OSError as error:
        for fd in fds:
            os.close(fd)
        file.unlink(missing_ok=True)
        raise MachineError(
            f"host tier: {file} of {num_bytes} bytes cannot be made ({error.strerror}); lower tiers.host.budget_gib, "
            f"raise the limit on file sizes (ulimit -f), or free files of {file.parent}"
        ) from error
    return fds, [file] if len(fds) > choice.is_memfd else []


def _keep_promise(memfd: int, holes: int) -> None:
    """What is touched is no longer promised: the file of holes shrinks by as much."""
    if memfd != holes:
        found = os.fstat(memfd)
        os.truncate(holes, max(0, found.st_size - 512 * found.st_blocks))


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _numa_why(nodes: Sequence[NumaNode], regions: Sequence[Region], touched: Touched) -> str:
    if not regions:
        return f"nothing is bound: the slab is on {len(nodes) or 'an unknown number of'} node(s) with memory"
    names = ", ".join(str(region.node.node) for region in regions)
    if touched.refused:
        return (
            f"node(s) {names} were asked for and the kernel refused ({touched.refused}): cores of each node touch its "
            "part, which puts it there where the node has cores. In a container, allow mbind and move_pages "
            "(CAP_SYS_NICE, or a seccomp profile with them)"
        )
    return f"one part on each of the nodes {names}, preferred (a node that is short lends from the others)"


def _message(wanted: int, limit: MemoryLimit) -> str:
    there = "" if limit.available_bytes >= UNBOUNDED else f", {limit.available_bytes / GIB:.2f} GiB there"
    return (
        f"host tier: {wanted / GIB:.2f} GiB wanted{there} by {limit.source}; lower tiers.host.budget_gib "
        "(0 switches the tier off), give the container more memory, or close other programs. Where the machine's "
        "memory grows as it is used (some virtual machines): tiers.host.memory_grows=true"
    )
