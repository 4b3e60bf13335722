"""A run folder belongs to one process at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from headrace.helpers.tiers import has_id
from headrace.platform.tracking import run_owner
from headrace.platform.tracking.run_owner import OWNER_FILE, check_unused, own_run_folder, owner_of_run
from headrace.storage.core.errors import ErrorId, InputError

HOLD = """
import sys
from pathlib import Path
from headrace.platform.tracking.run_owner import own_run_folder
with own_run_folder(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""
Holding = Callable[[Path], AbstractContextManager[subprocess.Popen[str]]]


@pytest.fixture
def holding() -> Holding:
    """Another process that owns a folder."""

    @contextmanager
    def hold(folder: Path) -> Iterator[subprocess.Popen[str]]:
        words = [sys.executable, "-c", HOLD, str(folder)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "mine\n"
                yield process
            finally:
                process.kill()

    return hold


def commit(folder: Path, step: int) -> None:
    """What a run with one checkpoint leaves."""
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMITTED").write_text("x")
    (folder / "config.yaml").write_text("run: {}\n")


def test_the_second_process_is_told_of_the_first_until_that_one_ends(holding: Holding, tmp_path: Path) -> None:
    run = tmp_path / "run"
    commit(run, 4)
    with holding(run) as first:
        for enter in (lambda: own_run_folder(run).__enter__(), lambda: check_unused(run)):
            with pytest.raises(InputError, check=has_id(ErrorId.run_folder_in_use)) as refused:
                enter()
            assert f"process {first.pid} on " in str(refused.value)
            assert "--resume" not in str(refused.value)
        owner = owner_of_run(run)
        assert owner is not None
        assert owner.process.pid == first.pid
        first.kill()
        first.wait()
        assert owner_of_run(run) is None
        with own_run_folder(run):
            assert json.loads((run / OWNER_FILE).read_text())["process"]["pid"] != first.pid
    assert not (run / OWNER_FILE).exists()


def test_a_reader_that_asks_does_not_turn_a_writer_away(tmp_path: Path) -> None:
    path = tmp_path / OWNER_FILE
    with path.open("w") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        with pytest.raises(InputError, check=has_id(ErrorId.run_folder_in_use)), own_run_folder(tmp_path):
            pass
        waits = iter([lambda: None, lambda: fcntl.flock(reader, fcntl.LOCK_UN)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_owner.time, "sleep", lambda _: next(waits)())
            with own_run_folder(tmp_path):
                pass


def test_a_file_that_its_owner_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, swaps = run_owner._lock, iter([True])

    def lock_late(fd: int, kind: int) -> bool | None:
        if next(swaps, False):
            (tmp_path / OWNER_FILE).unlink()
        return take(fd, kind)

    monkeypatch.setattr(run_owner, "_lock", lock_late)
    with own_run_folder(tmp_path):
        monkeypatch.undo()
        assert owner_of_run(tmp_path) is not None


def test_without_locks_the_file_says_who_owns_the_folder(
    holding: Holding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, kind: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    with holding(tmp_path) as first:
        monkeypatch.setattr(run_owner.fcntl, "flock", refuse)
        with pytest.raises(InputError, check=has_id(ErrorId.run_folder_in_use)), own_run_folder(tmp_path):
            pass
        first.kill()
        first.wait()
        assert owner_of_run(tmp_path) is None
        with own_run_folder(tmp_path):
            assert owner_of_run(tmp_path) is not None


def test_going_on_is_advised_only_where_it_would_work(tmp_path: Path) -> None:
    notes, run = tmp_path / "notes", tmp_path / "run"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    commit(run, 4)
    for folder, advised in ((notes, False), (run, True)):
        for enter in (lambda at=folder: own_run_folder(at, new=True).__enter__(), lambda at=folder: check_unused(at)):
            with pytest.raises(InputError, check=has_id(ErrorId.run_folder_used)) as refused:
                enter()
            assert ("--resume" in str(refused.value)) == advised
        assert not (folder / OWNER_FILE).exists()


def test_a_folder_that_was_made_and_stayed_empty_is_removed(tmp_path: Path) -> None:
    with own_run_folder(tmp_path / "a" / "b", new=True):
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [OWNER_FILE]
    assert list(tmp_path.iterdir()) == []
    with own_run_folder(tmp_path / "a"):
        (tmp_path / "a" / "x").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "caf\udce9", "x/" + "y" * 300])
def test_a_path_that_can_be_no_folder_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, check=has_id(ErrorId.run_folder_unusable)), own_run_folder(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_file_system_is_refused(mount_tmpfs: Callable[[str], Path]) -> None:
    disk = mount_tmpfs("ro")
    for folder in (disk, disk / "run"):
        with pytest.raises(InputError, check=has_id(ErrorId.run_folder_unusable)) as refused, own_run_folder(folder):
            pass
        assert "Read-only" in str(refused.value)
