"""Memory for transfers: where it begins, what is in it, who has it."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from headrace.storage.core.anonymous import HUGE_BYTES, anonymous_memory

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.mark.parametrize("num_bytes", [1, 4096, HUGE_BYTES, 5 * HUGE_BYTES + 7])
def test_zeros_on_a_boundary(num_bytes: int) -> None:
    memory = anonymous_memory(num_bytes)
    assert len(memory) == num_bytes
    assert address_of(memory) % HUGE_BYTES == 0
    assert not any(memory[:4096])
    memory[-1] = 7
    assert memory[num_bytes - 1] == 7


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="huge pages are switched off")
def test_it_is_in_huge_pages() -> None:
    memory = anonymous_memory(8 * HUGE_BYTES)
    np.frombuffer(memory, dtype=np.uint8)[:] = 1
    start, huge = address_of(memory), 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split(maxsplit=1)[0]
        if not name.endswith(":"):
            first, last = (int(part, 16) for part in name.split("-"))
            inside = first <= start < last
        elif inside and name == "AnonHugePages:":
            huge += int(line.split()[1]) * 1024
    assert huge >= 4 * HUGE_BYTES


def test_it_goes_with_its_last_view() -> None:
    gc.collect()
    before = psutil.Process().memory_info().vms
    memory = anonymous_memory(256 * HUGE_BYTES)
    part = memory[:10]
    del memory
    gc.collect()
    assert psutil.Process().memory_info().vms >= before + 256 * HUGE_BYTES
    del part
    gc.collect()
    assert psutil.Process().memory_info().vms < before + 128 * HUGE_BYTES


@pytest.mark.parametrize("share", [True, False])
def test_a_forked_child_has_it_only_where_that_is_wanted(share: bool) -> None:
    memory = anonymous_memory(4096, share_with_children=share)
    memory[0] = 5
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # the fault is expected, a traceback in the log of the tests is not
        os._exit(memory[0])
    _, status = os.waitpid(child, 0)
    if share:
        assert os.WEXITSTATUS(status) == 5
    else:
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGSEGV
