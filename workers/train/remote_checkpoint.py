"""Checkpoints of a run that was copied to an object store, fetched into a local run folder. No torch.

A fetched checkpoint goes through the folder's own commit protocol: every file is on the disk and has the manifest's
digest before the rename, and the marker comes last. What an interrupted fetch left is no checkpoint to any reader; the
next fetch of that step continues with the complete files.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from headrace.storage.core.errors import InputError
from headrace.storage.remote.cache import cache_errors, cache_folder, check_room, locked
from headrace.storage.remote.errors import RemoteMissing
from headrace.storage.remote.folder import RemoteFile, RemoteFolder, open_remote
from headrace.workers.train.checkpoint_folder import (
    MANIFEST_FILE,
    MARKER_FILE,
    CheckpointFolder,
    Damage,
    Manifest,
    parse_manifest,
    step_of,
    verify_file,
)

CHECKPOINTS = "checkpoints"


def fetch_checkpoint(url: str, run_dir: Path, step: int | None = None) -> tuple[Manifest, list[Damage]]:
    """Bring a checkpoint of a remote run into `run_dir`, unless it is there already, and whole.

    Args:
        url: of the remote run folder.
        run_dir: a local run folder; made where it is not there.
        step: which one; None takes the newest that is whole, as a local resume does.

    Returns:
        Its manifest, and what is wrong with the newer ones that were passed over.

    Raises:
        InputError: there is none, the one asked for is damaged, or access is denied; names URLs. MachineError: the
            store cannot be reached, or there is no room here.
    """
    remote, folder = open_remote(url), CheckpointFolder(run_dir / CHECKPOINTS)
    files = _list(remote)
    there = sorted((found for found in map(_committed, files) if found is not None), reverse=True)
    if step is not None and step not in there:
        raise InputError(f"{url}/{CHECKPOINTS}: no committed checkpoint of step {step}; there is {there or 'none'}")
    damages: list[Damage] = []
    with locked(run_dir), cache_errors(run_dir):
        for candidate in there if step is None else [step]:
            found = _fetch_step(remote, files, folder, candidate)
            if isinstance(found, Manifest):
                return found, damages
            damages.extend(found)
    why = "; ".join(str(damage) for damage in damages) or "no committed checkpoint there"
    raise InputError(f"{url}/{CHECKPOINTS}: {why}; give the folder of a run that saved one")


def fetch_to_cache(url: str, step: int | None = None) -> tuple[Path, int]:
    """fetch_checkpoint into the cache, for those who only read it. Warns about newer damaged ones.

    Returns:
        The local run folder, and the step.

    Raises:
        InputError, MachineError: see fetch_checkpoint.
    """
    url = url.rstrip("/")
    run_dir = cache_folder("runs", url.rpartition("/")[2], url)
    manifest, damages = fetch_checkpoint(url, run_dir, step)
    warn_of(damages, manifest.step)
    return run_dir, manifest.step


def warn_of(damages: list[Damage], step: int) -> None:
    """Say which checkpoints were passed over."""
    if damages:
        words = "; ".join(str(damage) for damage in damages)
        warnings.warn(f"newer checkpoints are damaged ({words}): using step {step}", stacklevel=3)


def _list(remote: RemoteFolder) -> dict[str, RemoteFile]:
    try:
        return remote.files(CHECKPOINTS)
    except RemoteMissing as error:
        raise RemoteMissing(f"{error}. Wanted is a run folder with {CHECKPOINTS}/ in it") from error


def _committed(name: str) -> int | None:
    """The step whose marker this file is."""
    parts = PurePosixPath(name).parts
    is_marker = len(parts) == 3 and parts[0] == CHECKPOINTS and parts[2] == MARKER_FILE
    return step_of(parts[1]) if is_marker else None


def _fetch_step(
    remote: RemoteFolder, files: Mapping[str, RemoteFile], folder: CheckpointFolder, step: int
) -> Manifest | list[Damage]:
    prefix = f"{CHECKPOINTS}/{folder.path_of(step).name}"
    url = remote.url_of(prefix)
    if f"{prefix}/{MANIFEST_FILE}" not in files:
        return [Damage(f"{url}/{MANIFEST_FILE}", "is missing")]
    content = remote.read(f"{prefix}/{MANIFEST_FILE}")
    manifest = parse_manifest(remote.read(f"{prefix}/{MARKER_FILE}"), content, url)
    if isinstance(manifest, Damage):
        return [manifest]
    if manifest.step != step:
        return [Damage(f"{url}/{MANIFEST_FILE}", f"is that of step {manifest.step}")]
    # Before anything is fetched: what is missing or cut short.
    if problems := _misfits(manifest, files, prefix, url):
        return problems
    if _is_here(folder, manifest):
        return manifest
    temporary = folder.temporary_of(step)
    temporary.mkdir(parents=True, exist_ok=True)
    wanted = [entry for entry in manifest.files if verify_file(temporary / entry.path, entry) is not None]
    check_room(temporary, sum(entry.num_bytes for entry in wanted))
    for entry in wanted:
        name, target = f"{prefix}/{entry.path}", temporary / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        remote.fetch(name, target, files[name])
        if (damage := verify_file(target, entry)) is not None:
            shutil.rmtree(temporary)
            return [Damage(remote.url_of(name), damage.problem)]
    folder.adopt(manifest, content)
    return manifest


def _misfits(manifest: Manifest, files: Mapping[str, RemoteFile], prefix: str, url: str) -> list[Damage]:
    found = []
    for entry in manifest.files:
        there = files.get(f"{prefix}/{entry.path}")
        if there is None:
            found.append(Damage(f"{url}/{entry.path}", "is missing"))
        elif there.num_bytes != entry.num_bytes:
            found.append(Damage(f"{url}/{entry.path}", f"{there.num_bytes} bytes, the manifest says {entry.num_bytes}"))
    return found


def _is_here(folder: CheckpointFolder, manifest: Manifest) -> bool:
    """Whether the local folder holds this very checkpoint; one of that step that is damaged is put aside."""
    if manifest.step not in folder.committed_steps():
        return False
    if folder.read_manifest(manifest.step) == manifest and not folder.verify(manifest):
        return True
    folder.set_aside(manifest.step)
    return False
