"""The folder of checkpoints: names, manifest, commit, verification, retention. Plain files; no torch.

    checkpoints/
      step_000010/              committed: COMMITTED names the digest of manifest.json, which names every other file
      step_000020.tmp/          being written, or left by a run that was killed; never read, removed by the next writer
      step_000020.attempt1.tmp/ the same of a group that was started again: never the folder of the group before it
      step_000020.damaged/      failed its verification at a resume and was put aside

A checkpoint becomes valid in this order: data files, fsync; manifest, fsync; folder fsync; rename; parent fsync;
COMMITTED, fsync. Only after the last of these may an older checkpoint be removed. There is no pointer file: the newest
committed folder is the newest checkpoint.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from headrace.storage.core.durable import sync_folder, write_durably
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import open_regular, parse_json, read_regular

MANIFEST_FILE, MARKER_FILE = "manifest.json", "COMMITTED"
TEMPORARY, DAMAGED = ".tmp", ".damaged"
SCHEMA_VERSION = 2
_NAME = re.compile(r"step_(\d+)")
_TEMPORARY_NAME = re.compile(r"step_\d+(\.attempt\d+)?\.tmp")
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: path below its folder, bytes, XXH3 (64 bit, hex)."""

    path: str
    num_bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Args:
        step: optimizer steps done, which is also the data position: the next step reads the rows of this number.
        tokens_seen: by all ranks since the start of the run.
        world_size: ranks that wrote it; any number may read it.
        global_batch: rows per step; another one at resume means that rows are repeated or left out.
        seed: of data order and initial weights.
        model: fields of the ModelConfig.
        files: every file but the manifest and the marker.
        facts: further JSON-able values, for people.
    """

    step: int
    tokens_seen: int
    world_size: int
    global_batch: int
    seed: int
    model: Mapping[str, Any]
    files: tuple[FileEntry, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Damage:
    """Why a checkpoint cannot be used: the file, and what is wrong with it."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class CheckpointFolder:
    """`run_dir/checkpoints`. Methods that write are for one process at a time (rank 0).

    Args:
        attempt: of the group that writes.
    """

    def __init__(self, root: Path, attempt: int = 0) -> None:
        self.root, self._attempt = root, attempt

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of `step` is, once committed."""
        return self.root / f"step_{step:06d}"

    def temporary_of(self, step: int) -> Path:
        """Where it is while it is written."""
        attempt = f".attempt{self._attempt}" if self._attempt else ""
        return self.root / (self.path_of(step).name + attempt + TEMPORARY)

    def committed_steps(self) -> list[int]:
        """Steps with a commit marker, newest first. Their content has not been verified."""
        steps = [int(found[1]) for entry in self._entries() if (found := _NAME.fullmatch(entry.name))]
        return sorted((step for step in steps if (self.path_of(step) / MARKER_FILE).is_file()), reverse=True)

    def start(self, step: int) -> Path:
        """An empty temporary folder for `step`; leftovers of dead writers are removed.

        Raises:
            OSError: the folder cannot be made.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self.remove_temporaries()
        folder = self.temporary_of(step)
        folder.mkdir()
        return folder

    def commit(self, manifest: Manifest) -> Path:
        """Make the temporary folder of `manifest.step`, whose data files are on the disk, the checkpoint of that step.

        Raises:
            OSError: it did not reach the disk; the older checkpoints are as they were.
        """
        text = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(manifest)}, indent=1)
        return self.adopt(manifest, text.encode())

    def adopt(self, manifest: Manifest, content: bytes) -> Path:
        """`commit` of a checkpoint that was written elsewhere: with the bytes of its own manifest.json.

        Raises:
            OSError: as `commit`.
        """
        temporary, final = self.temporary_of(manifest.step), self.path_of(manifest.step)
        write_durably(temporary / MANIFEST_FILE, content)
        for folder in sorted({(temporary / entry.path).parent for entry in manifest.files} | {temporary}):
            sync_folder(folder)
        if (final / MARKER_FILE).exists():
            raise FileExistsError(errno.EEXIST, "a committed checkpoint of this step is there", str(final))
        _remove(final)  # renamed by a writer that died before its marker
        temporary.rename(final)
        sync_folder(self.root)
        try:
            write_durably(final / MARKER_FILE, _digest(final / MANIFEST_FILE).encode())
            sync_folder(final)
        except OSError:
            (final / MARKER_FILE).unlink(missing_ok=True)
            raise
        return final

    def abandon(self, step: int) -> None:
        """Remove what a failed attempt to save `step` left; a committed checkpoint stays. Never raises."""
        shutil.rmtree(self.temporary_of(step), ignore_errors=True)
        if not (self.path_of(step) / MARKER_FILE).exists():
            shutil.rmtree(self.path_of(step), ignore_errors=True)

    def read_manifest(self, step: int) -> Manifest | Damage:
        """The manifest of a committed step, or what is wrong with it or its marker."""
        folder = self.path_of(step)
        marker, manifest = folder / MARKER_FILE, folder / MANIFEST_FILE
        try:
            committed, content = read_regular(marker), read_regular(manifest)
        except OSError as error:
            return Damage(str(error.filename or folder), error.strerror or "unreadable")
        found = parse_manifest(committed, content, str(folder))
        if isinstance(found, Manifest) and found.step != step:
            return Damage(str(manifest), f"is that of step {found.step}")
        return found

    def verify(self, manifest: Manifest, files: Iterable[FileEntry] | None = None) -> list[Damage]:
        """Read the files of a checkpoint, or some of them, and compare sizes and digests. Empty means whole."""
        folder = self.path_of(manifest.step)
        entries = manifest.files if files is None else files
        return [damage for entry in entries if (damage := verify_file(folder / entry.path, entry)) is not None]

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that no reader takes it and its step can be written again."""
        name = self.path_of(step).name + DAMAGED
        taken = {entry.name for entry in self._entries()}
        target = self.root / next(n for n in (name, *(f"{name}{i}" for i in range(2, 1000))) if n not in taken)
        self.path_of(step).rename(target)
        return target

    def retain(self, keep: int) -> list[int]:
        """Remove committed checkpoints beyond the `keep` newest. Steps removed.

        Call after a commit. The newest is never removed, whatever `keep` is, and damaged ones are the user's to remove.
        """
        steps = self.committed_steps()
        removed = steps[max(1, keep) :]
        for step in removed:
            # Without its marker a half-removed folder is no checkpoint.
            (self.path_of(step) / MARKER_FILE).unlink(missing_ok=True)
            _remove(self.path_of(step))
        return removed

    def remove_temporaries(self) -> None:
        """Remove what unfinished writers left."""
        for entry in self._entries():
            if _TEMPORARY_NAME.fullmatch(entry.name):
                _remove(entry)

    def _entries(self) -> Sequence[Path]:
        return sorted(self.root.iterdir()) if self.root.is_dir() else []


def parse_manifest(committed: bytes, content: bytes, folder: str) -> Manifest | Damage:
    """The manifest of a checkpoint, or what is wrong with it or its marker.

    Args:
        committed, content: of the marker and of manifest.json. folder: path or URL of the checkpoint.
    """
    marker, manifest = f"{folder}/{MARKER_FILE}", f"{folder}/{MANIFEST_FILE}"
    try:
        wanted, found = committed.decode().strip(), xxhash.xxh3_64(content).hexdigest()
    except UnicodeDecodeError:
        return Damage(marker, "is not text")
    if not wanted:
        return Damage(marker, "is empty")
    if wanted != found:
        return Damage(manifest, f"digest {found}, the commit marker says {wanted}")
    try:
        values = parse_json(content)
        if values.pop("schema_version") != SCHEMA_VERSION:
            return Damage(manifest, f"schema_version is not {SCHEMA_VERSION}: written by another release")
        files = tuple(FileEntry(**entry) for entry in values.pop("files"))
        found_manifest = Manifest(files=files, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Damage(manifest, f"is not a manifest ({type(error).__name__}: {error})")
    if not _is_sane(found_manifest):
        return Damage(manifest, "is not a manifest: a value of another type, or no files")
    outside = next((entry.path for entry in files if not _is_below(entry.path)), None)
    return found_manifest if outside is None else Damage(manifest, f"names a file outside of the checkpoint: {outside}")


def _is_sane(manifest: Manifest) -> bool:
    numbers = ("step", "tokens_seen", "world_size", "global_batch", "seed")
    return (
        bool(manifest.files)
        and all(type(getattr(manifest, name)) is int for name in numbers)
        and isinstance(manifest.model, dict)
        and isinstance(manifest.facts, dict)
        and all((type(e.path), type(e.num_bytes), type(e.xxh3)) == (str, int, str) for e in manifest.files)
    )


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def step_of(name: str) -> int | None:
    """The step of a committed checkpoint's folder name; None of another name."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def newest_good(
    folder: CheckpointFolder,
    verify: Callable[[Manifest], list[Damage]] | None = None,
    on_damage: Callable[[int, list[Damage]], None] | None = None,
) -> Manifest | None:
    """The newest committed checkpoint that is whole; damaged ones are reported and passed over.

    Args:
        verify: compares the files with the manifest; None reads all of them here.
    """
    for step in folder.committed_steps():
        manifest = folder.read_manifest(step)
        problems = [manifest] if isinstance(manifest, Damage) else (verify or folder.verify)(manifest)
        if isinstance(manifest, Manifest) and not problems:
            return manifest
        if on_damage is not None:
            on_damage(step, problems)
    return None


def require_checkpoint(folder: CheckpointFolder, step: int | None) -> None:
    """Look whether a committed checkpoint is there, of `step` where that is given; none is verified.

    Raises:
        InputError: there is none.
    """
    there = folder.committed_steps()
    if not there:
        raise InputError(
            f"{folder.root}: no committed checkpoint there; give the folder of a run that saved one",
            id=ErrorId.checkpoint_missing,
        )
    if step is not None and step not in there:
        raise InputError(
            f"{folder.root}: no committed checkpoint of step {step}; there is {there}", id=ErrorId.checkpoint_missing
        )


def good_checkpoint(folder: CheckpointFolder, step: int | None) -> tuple[Manifest, list[Damage]]:
    """A whole checkpoint to read from: the newest one, or exactly `step`; and what is wrong with newer ones.

    Raises:
        InputError: there is none, or the one asked for is damaged; names the files.
    """
    damages: list[Damage] = []
    require_checkpoint(folder, step)
    if step is None:
        manifest = newest_good(folder, on_damage=lambda _, problems: damages.extend(problems))
        if manifest is None:
            why = "; ".join(str(damage) for damage in damages)
            raise InputError(f"{folder.root}: {why}; give the folder of a run that saved one")
        return manifest, damages
    found = folder.read_manifest(step)
    problems = [found] if isinstance(found, Damage) else folder.verify(found)
    if isinstance(found, Damage) or problems:
        raise InputError(f"checkpoint of step {step} is damaged: " + "; ".join(str(p) for p in problems))
    return found, damages


def describe_files(folder: Path, names: Iterable[str]) -> list[FileEntry]:
    """Sizes and digests of files below `folder`, read back from the disk."""
    return [FileEntry(name, (folder / name).stat().st_size, _digest(folder / name)) for name in names]


def verify_file(path: Path, entry: FileEntry) -> Damage | None:
    """Read one file and compare its size and digest with the manifest's. None means whole."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes != entry.num_bytes:
            return Damage(str(path), f"{num_bytes} bytes, the manifest says {entry.num_bytes}")
        found = _digest(path)
    except OSError as error:
        return Damage(str(path), error.strerror or "unreadable")
    return None if found == entry.xxh3 else Damage(str(path), f"digest {found}, the manifest says {entry.xxh3}")


def _digest(path: Path) -> str:
    state = xxhash.xxh3_64()
    with open_regular(path) as file:
        while chunk := file.read(_READ_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
