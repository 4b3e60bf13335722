"""The guard over figures that the test gives, and over a control group of this machine that is really full."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.storage.core.errors import ErrorId
from headrace.storage.tiers.memory_limits import MemoryLimit
from headrace.workers.actors.memory_guard import (
    END_BELOW_BYTES,
    SAVE_BELOW_BYTES,
    MemoryGuard,
    cause_of_death,
    cause_path,
    num_oom_kills,
)
from headrace.workers.actors.status import FailureKind

GROUPS = Path("/sys/fs/cgroup")
MIB = 1024**2
# Fills a control group at 200 MiB/s, with the guard at work or without it.
FILL = """
import pathlib, sys, time
from headrace.storage.tiers.memory_limits import memory_left
from headrace.workers.actors.memory_guard import MemoryGuard
with open(sys.argv[1], "w") as procs:
    procs.write("0")
held = []
def fill():
    while True:
        held.append(bytearray(4 << 20))
        time.sleep(0.02)
if sys.argv[2] == "guarded":
    with MemoryGuard(memory_left, pathlib.Path(sys.argv[3])):
        fill()
fill()
"""


class Ended(Exception):
    """In place of the end of the process."""


def end(code: int) -> None:
    raise Ended(code)


@pytest.mark.parametrize(
    ("left_bytes", "is_low"),
    [(1 << 40, False), (SAVE_BELOW_BYTES, False), (SAVE_BELOW_BYTES - 1, True), (END_BELOW_BYTES, True)],
)
def test_the_rank_is_asked_to_save_while_there_is_room_for_it(tmp_path: Path, left_bytes: int, is_low: bool) -> None:
    guard = MemoryGuard(lambda: MemoryLimit(left_bytes, "limit x"), tmp_path / "cause", end=end)  # type: ignore[arg-type]
    guard.look()
    assert guard.is_low is is_low
    if is_low:
        error = guard.saved(7)
        assert error.id is ErrorId.host_memory_low
        for part in (" MiB left by limit x", "saved step 7", "tiers.host.budget_gib"):
            assert part in str(error)
    assert cause_of_death(tmp_path / "cause") is None


def test_the_process_ends_with_a_cause_where_there_is_no_room(tmp_path: Path, capsys) -> None:
    limit = MemoryLimit(END_BELOW_BYTES - 1, "control group limit (/x/memory.max)")
    guard = MemoryGuard(lambda: limit, tmp_path / "cause", end=end)  # type: ignore[arg-type]
    with pytest.raises(Ended, match="1"):
        guard.look()
    failure = cause_of_death(tmp_path / "cause")
    assert (failure.id, failure.kind) == (ErrorId.host_memory_low, FailureKind.final)
    for text in (failure.message, capsys.readouterr().err):
        assert "/x/memory.max" in text
        assert "without a checkpoint" in text


def test_the_cause_of_the_attempt_before_is_not_taken_for_this_one_s(tmp_path: Path) -> None:
    (tmp_path / "cause").write_text("old")
    with MemoryGuard(lambda: MemoryLimit(1 << 40, ""), tmp_path / "cause"):
        assert cause_of_death(tmp_path / "cause") is None
    assert cause_path(tmp_path, 0, 1) != cause_path(tmp_path, 0, 2) != cause_path(tmp_path, 1, 2)


def test_kills_of_the_kernel_are_counted(tmp_path: Path) -> None:
    assert num_oom_kills(tmp_path) == 0
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 12\n")
    assert num_oom_kills(tmp_path) == 12


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A memory control group of 768 MiB."""
    v1 = (GROUPS / "memory").is_dir()
    folder = (GROUPS / "memory" if v1 else GROUPS) / f"headrace-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(768 * MIB))
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    yield folder
    folder.rmdir()


@pytest.mark.parametrize(("mode", "code"), [("guarded", 1), ("mutant: not guarded", -9)])
def test_it_is_faster_than_the_kernel(small_group: Path, tmp_path: Path, mode: str, code: int) -> None:
    words = [sys.executable, "-c", FILL, str(small_group / "cgroup.procs"), mode, str(tmp_path / "cause")]
    child = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert child.returncode == code, child.stderr
    failure = cause_of_death(tmp_path / "cause")
    assert (failure is None) == (code == -9)
    if failure is not None:
        assert str(small_group) in failure.message
