"""The commit protocol on plain files: what counts as a checkpoint, what is found damaged, what is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from headrace.storage.core.errors import InputError
from headrace.workers.train import checkpoint_folder
from headrace.workers.train.checkpoint_folder import (
    MANIFEST_FILE,
    MARKER_FILE,
    CheckpointFolder,
    Manifest,
    describe_files,
    good_checkpoint,
    newest_good,
)

NAMES = ("state/a.bin", "rng.pt")


def write(folder: CheckpointFolder, step: int, *, commit: bool = True) -> Manifest:
    temporary = folder.start(step)
    (temporary / "state").mkdir()
    for name in NAMES:
        (temporary / name).write_bytes(name.encode() * (step + 1) * 50)
    manifest = Manifest(
        step=step,
        tokens_seen=step * 64,
        world_size=1,
        global_batch=4,
        seed=0,
        model={"name": "m"},
        files=tuple(describe_files(temporary, NAMES)),
        facts={"data_digest": "d"},
    )
    if commit:
        folder.commit(manifest)
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


def test_a_committed_checkpoint_comes_back_as_written(folder: CheckpointFolder) -> None:
    written = write(folder, 10)
    assert folder.committed_steps() == [10]
    assert newest_good(folder) == written
    assert good_checkpoint(folder, 10) == (written, [])


def test_no_folder_is_no_checkpoint(folder: CheckpointFolder) -> None:
    assert folder.committed_steps() == []
    assert newest_good(folder) is None
    with pytest.raises(InputError, match="no committed checkpoint"):
        good_checkpoint(folder, None)


def test_only_the_marker_makes_it_valid(folder: CheckpointFolder) -> None:
    older = write(folder, 10)
    write(folder, 20, commit=False)
    assert newest_good(folder) == older
    folder.temporary_of(20).rename(folder.path_of(20))  # killed between the rename and the marker
    assert folder.committed_steps() == [10]
    newer = write(folder, 20)
    assert newest_good(folder) == newer


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "truncated shard": ("state/a.bin", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "flipped bit": ("state/a.bin", flip_bit),
    "missing file": ("rng.pt", Path.unlink),
    "empty file": ("rng.pt", lambda path: path.write_bytes(b"")),
    "missing manifest": (MANIFEST_FILE, Path.unlink),
    "flipped bit in the manifest": (MANIFEST_FILE, flip_bit),
    "empty manifest": (MANIFEST_FILE, lambda path: path.write_bytes(b"")),
    "empty marker": (MARKER_FILE, lambda path: path.write_bytes(b"")),
    "marker that is no text": (MARKER_FILE, lambda path: path.write_bytes(b"\xff\xfe")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_named_and_the_previous_one_used(folder: CheckpointFolder, damage: str) -> None:
    older = write(folder, 10)
    write(folder, 20)
    name, break_it = DAMAGES[damage]
    break_it(folder.path_of(20) / name)
    found = []
    assert newest_good(folder, on_damage=lambda step, problems: found.append((step, problems))) == older
    [(step, problems)] = found
    assert step == 20
    assert len(problems) == 1
    assert name in str(problems[0])
    with pytest.raises(InputError, match="20 is damaged"):
        good_checkpoint(folder, 20)


def test_a_manifest_of_another_release_is_refused(folder: CheckpointFolder) -> None:
    write(folder, 10)
    path = folder.path_of(10) / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    (folder.path_of(10) / MARKER_FILE).write_text(checkpoint_folder._digest(path))
    with pytest.raises(InputError, match="another release"):
        good_checkpoint(folder, 10)


def test_retention_keeps_the_newest_committed_ones(folder: CheckpointFolder) -> None:
    for step in (10, 20, 30, 40):
        write(folder, step)
    assert folder.retain(2) == [20, 10]
    assert folder.committed_steps() == [40, 30]
    assert folder.retain(0) == [30]
    assert folder.committed_steps() == [40]


def test_damaged_ones_are_kept_however_often_a_step_is_damaged(folder: CheckpointFolder) -> None:
    for _ in range(2):
        write(folder, 20)
        folder.set_aside(20)
    for step in (30, 40, 50):
        write(folder, step)
    folder.retain(2)
    there = sorted(path.name for path in folder.root.iterdir())
    assert there == ["step_000020.damaged", "step_000020.damaged2", "step_000040", "step_000050"]


def test_start_removes_what_dead_writers_left(folder: CheckpointFolder) -> None:
    write(folder, 10, commit=False)
    CheckpointFolder(folder.root, attempt=3).temporary_of(15).mkdir()
    unrelated = folder.root / "notes.tmp"
    unrelated.write_text("mine")
    folder.start(20)
    assert sorted(path.name for path in folder.root.iterdir()) == ["notes.tmp", "step_000020.tmp"]


def test_a_committed_step_is_not_replaced(folder: CheckpointFolder) -> None:
    older = write(folder, 10)
    with pytest.raises(FileExistsError):
        write(folder, 10)
    folder.abandon(10)
    assert newest_good(folder) == older
    assert not folder.temporary_of(10).exists()


@pytest.mark.parametrize("failing_call", range(1, 9))
def test_a_failing_disk_leaves_the_older_checkpoint_and_no_trace(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    """The disk fails at the n-th fsync of a commit, wherever that is."""
    older = write(folder, 10)
    manifest = write(folder, 20, commit=False)
    calls, real = [0], os.fsync

    def fsync(fd: int) -> None:
        calls[0] += 1
        if calls[0] == failing_call:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr("os.fsync", fsync)
    if failing_call > 6:
        folder.commit(manifest)
        assert calls[0] == 6  # manifest, two folders of it, the parent, the marker, its folder
        return
    with pytest.raises(OSError, match="No space"):
        folder.commit(manifest)
    folder.abandon(20)
    assert newest_good(folder) == older
    assert [path.name for path in folder.root.iterdir()] == ["step_000010"]
