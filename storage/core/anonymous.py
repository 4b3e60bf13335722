"""Memory of this process alone, in huge pages if the kernel has them. No torch."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

HUGE_BYTES = 2 * 1024**2


def anonymous_memory(num_bytes: int, *, share_with_children: bool = True) -> memoryview:
    """(num_bytes,) bytes of zeros that begin on a 2 MiB boundary; unmapped with the last view.

    Huge pages save faults and make transfers fast: a drive gets a buffer as a list of its contiguous pieces,
    and one request takes only so many. 4 MiB in scattered pages of 4 KiB become several requests, in huge pages one.

    Args:
        share_with_children: False keeps the memory from forked children: what a transfer under way writes must land
            in its parent's pages.
    """
    memory = mmap.mmap(-1, num_bytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    if not share_with_children:
        memory.madvise(mmap.MADV_DONTFORK)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    begin = -start % HUGE_BYTES
    return memoryview(memory)[begin : begin + num_bytes]
