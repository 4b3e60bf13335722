"""A process is told from another with the same id, and a dead one from a living one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time

import pytest

from headrace.storage.core.owners import owner_of, start_ticks, this_process


def test_this_process_is_alive() -> None:
    me = this_process()
    assert me.pid == os.getpid()
    assert me.is_alive()
    assert me.tag == f"{me.pid}-{me.start_ticks}"


def test_a_reused_id_and_another_boot_are_other_processes() -> None:
    me = this_process()
    assert not dataclasses.replace(me, start_ticks=me.start_ticks - 1).is_alive()
    assert not dataclasses.replace(me, boot_id="another").is_alive()


def test_a_killed_child_is_dead_before_it_is_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        owner = owner_of(child.pid)
        assert owner.is_alive()
        child.kill()
        for _ in range(60_000):
            if not owner.is_alive():
                break
            time.sleep(0.01)
        assert not owner.is_alive(), "a zombie counts as dead"
        assert start_ticks(child.pid) is None
    finally:
        child.wait()
    with pytest.raises(ProcessLookupError, match=str(child.pid)):
        owner_of(child.pid)
