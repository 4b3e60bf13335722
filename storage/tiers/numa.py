"""NUMA nodes: which have memory, which part of a slab is on which, and where the kernel says that pages are. No torch.

Two system calls have no wrapper in the C library that every machine has, so they are called by number.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")
PROC = Path("/proc")
# mbind(2) and move_pages(2).
SYSCALLS = {"x86_64": (237, 279), "aarch64": (235, 239)}
MPOL_PREFERRED = 1
BITS_PER_WORD = 8 * ctypes.sizeof(ctypes.c_ulong)
SAMPLES = 64


@dataclass(frozen=True)
class NumaNode:
    """A node whose memory this process may use. `cores` are those of the node that it may run on; may be none."""

    node: int
    cores: frozenset[int]


@dataclass(frozen=True)
class Region:
    """Bytes [begin, end) of a slab that are wanted on one node."""

    node: NumaNode
    begin: int
    end: int


def parse_list(text: str) -> frozenset[int]:
    """The numbers of a kernel list such as "0-3,8"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def cores_by_node(*, sys: Path = SYS) -> dict[int, frozenset[int]]:
    """Cores of every node, also of nodes without memory; empty where the kernel knows no nodes."""
    return {
        int(path.parent.name.removeprefix("node")): parse_list(path.read_text())
        for path in sorted((sys / "devices/system/node").glob("node*/cpulist"))
    }


def memory_nodes(*, sys: Path = SYS, proc: Path = PROC) -> tuple[NumaNode, ...]:
    """Nodes that have memory which the control groups of this process allow, by number."""
    try:
        there = parse_list((sys / "devices/system/node/has_memory").read_text())
        status = (proc / "self/status").read_text()
    except OSError:
        return ()
    facts = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "Mems_allowed_list" in facts:
        there &= parse_list(facts["Mems_allowed_list"])
    cores, allowed = cores_by_node(sys=sys), parse_list(facts.get("Cpus_allowed_list", ""))
    return tuple(NumaNode(node, cores.get(node, frozenset()) & allowed) for node in sorted(there))


def cut(num_bytes: int, nodes: Sequence[NumaNode], alignment: int) -> tuple[Region, ...]:
    """One region per node, equal to within a page. None where there is nothing to choose between.

    Args:
        num_bytes: of the slab, a multiple of `alignment`.
        alignment: of every border.
    """
    if len(nodes) < 2 or num_bytes < len(nodes) * alignment:
        return ()
    pages = num_bytes // alignment
    borders = [i * pages // len(nodes) * alignment for i in range(len(nodes) + 1)]
    return tuple(Region(node, *borders[i : i + 2]) for i, node in enumerate(nodes))


def prefer_node(address: int, num_bytes: int, node: int) -> None:
    """Ask for the pages of a mapping from one node. For a shared file it holds for all processes that touch it.

    MPOL_PREFERRED and not MPOL_BIND: a node that is short then lends from the others, where the kernel would kill
    processes otherwise. Where the pages are is asked afterwards (`nodes_of`), not assumed.

    Raises:
        OSError: the kernel or a seccomp filter refuses.
    """
    mask = (ctypes.c_ulong * (node // BITS_PER_WORD + 1))()
    mask[node // BITS_PER_WORD] = 1 << node % BITS_PER_WORD
    # The kernel takes the highest bit to be one below the number that it is given.
    _call(0, address, num_bytes, MPOL_PREFERRED, ctypes.addressof(mask), len(mask) * BITS_PER_WORD + 1, 0)


def nodes_of(fd: int, begin: int, end: int) -> Counter[int]:
    """On which nodes sampled pages of a file in memory lie, as the kernel says: pages by node.

    Args:
        begin / end: bytes of the file, whole pages that have been touched.

    Raises:
        OSError: the kernel or a seccomp filter refuses.
    """
    num_pages = (end - begin) // mmap.PAGESIZE
    if num_pages <= 0:
        return Counter()
    count = min(SAMPLES, num_pages)
    with mmap.mmap(fd, end - begin, offset=begin) as memory:
        offsets = [i * num_pages // count * mmap.PAGESIZE for i in range(count)]
        for offset in offsets:
            memory[offset]  # the kernel tells of mapped pages only
        start = ctypes.c_char.from_buffer(memory)
        pages = (ctypes.c_void_p * count)(*(ctypes.addressof(start) + offset for offset in offsets))
        found = (ctypes.c_int * count)()
        try:
            _call(1, 0, count, ctypes.addressof(pages), 0, ctypes.addressof(found), 0)
        finally:
            del start  # the mapping cannot be closed while a buffer of it is alive
    return Counter(node for node in found if node >= 0)


def _call(which: int, *args: int) -> None:
    numbers = SYSCALLS.get(platform.machine())
    if numbers is None:
        raise OSError(0, f"no system call numbers for {platform.machine()} are known here")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.syscall(*(ctypes.c_long(value) for value in (numbers[which], *args))) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
