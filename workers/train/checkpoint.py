"""Distributed checkpoints: every rank writes its shards, one manifest commits them, any number of ranks reads them.

torch.distributed.checkpoint plans who writes and reads which part (resharded when another number of ranks loads them);
the files are safetensors (workers/train/state_files.py) and JSON, so that reading a checkpoint executes nothing; commit
protocol and verification: workers/train/checkpoint_folder.py.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from headrace.storage.core.durable import sync_file, write_durably
from headrace.storage.core.errors import ErrorId, HeadraceError, InputError, MachineError
from headrace.storage.core.outside import parse_json, read_regular
from headrace.workers.data.tokenizer_files import read_tokenizer_files
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, ModelConfig
from headrace.workers.parallel.process_group import gathered
from headrace.workers.train.checkpoint_folder import (
    CheckpointFolder,
    Damage,
    FileEntry,
    Manifest,
    describe_files,
    newest_good,
)
from headrace.workers.train.group_mark import GroupMark
from headrace.workers.train.model_state import STATE_FOLDER, TRUNK_DIGEST, model_to_dict
from headrace.workers.train.rng import restore_rng_state, rng_state
from headrace.workers.train.state_files import StateReader, StateWriter, state_file

GIB = 1024**3


class CheckpointFailed(HeadraceError):
    """A checkpoint did not reach the disk. Nothing of it is left, and the older ones are as they were."""


class CheckpointDiskFull(CheckpointFailed, MachineError):
    """There was no room for it: names the file, the room there and the remedy. Exit code 2."""


@dataclass(frozen=True)
class _Failure:
    """Why one rank could not do its part."""

    text: str
    disk_full: bool


@dataclass(frozen=True)
class Position:
    """Where a run is, as the manifest says it; see Manifest."""

    step: int
    tokens_seen: int
    global_batch: int
    seed: int


class Checkpointer:
    """Saves and restores one run. Every method is called by all ranks at once, and ends alike on all of them.

    Args:
        run_dir: on a file system that all ranks see.
        keep: committed checkpoints to keep.
        model: written into the manifest.
        device: of this rank; whose generator states are saved.
        tokenizer: tokenizer.json; it and its companions are copied into every checkpoint, so that it can be used alone.
        adapter: what is trained; written into the manifest.
        trunk: digest of the folder that holds the frozen weights, on rank 0; None where the checkpoint holds them.
        in_stages: whether ranks hold different tensors: stages of a pipeline.
        attempt: of the group; from here on, groups of the run that started before commit nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        model: ModelConfig,
        device: torch.device,
        tokenizer: Path | None = None,
        adapter: AdapterConfig = NO_ADAPTER,
        trunk: str | None = None,
        in_stages: bool = False,
        attempt: int = 0,
    ) -> None:
        self.folder = CheckpointFolder(run_dir / "checkpoints", attempt)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._mark = GroupMark(run_dir, attempt) if self.rank == 0 else None
        self._keep, self._device, self._tokenizer = keep, device, tokenizer
        self._model, self._trunk, self._in_stages = model_to_dict(model, adapter, trunk), trunk, in_stages

    def save(self, tensors: Mapping[str, torch.Tensor], position: Position, facts: Mapping[str, Any]) -> Path:
        """Write and commit the state at `position`, then remove what is beyond `keep`.

        Args:
            tensors: the live (sharded) tensors by name; read until this returns.
            facts: JSON-able, for people.

        Raises:
            CheckpointFailed: on every rank, when one of them could not write. CheckpointDiskFull: for lack of room.
        """
        temporary = self.folder.temporary_of(position.step)
        state, own = temporary / STATE_FOLDER, temporary / _rng_file(self.rank)
        try:
            with self._together("make", temporary):
                if self._mark is not None:
                    self._mark.check()
                    self.folder.start(position.step)
                    _check_room(temporary, tensors)
            with self._together("write", state / state_file(self.rank)):
                dcp.save(dict(tensors), storage_writer=StateWriter(state, self.rank))
            with self._together("write, or read back,", own):
                entries = self._write_own_files(temporary)
            all_entries = gathered(entries)
            with self._together("commit", temporary):
                if self._mark is not None:
                    self._mark.check()
                    files = tuple(entry for per_rank in all_entries for entry in per_rank)
                    self.folder.commit(self._manifest(position, files, facts))
        except CheckpointFailed:
            if self._mark is not None and self._mark.is_newest():
                self.folder.abandon(position.step)
            raise
        if self.rank == 0:
            self._retain()
        return self.folder.path_of(position.step)

    def newest(self, *, start_over: bool = False) -> tuple[Manifest | None, list[tuple[int, list[Damage]]]]:
        """The newest committed checkpoint that is whole, and the newer ones that are not.

        The ranks share the reading. Damaged checkpoints are put aside under another name.

        Args:
            start_over: return None where all are damaged, in place of an error.

        Raises:
            InputError: all are damaged, and stay as they are.
        """
        damaged: list[tuple[int, list[Damage]]] = []

        def verify(manifest: Manifest) -> list[Damage]:
            mine = self.folder.verify(manifest, manifest.files[self.rank :: self.world_size])
            return [damage for per_rank in gathered(mine) for damage in per_rank]

        manifest = newest_good(self.folder, verify, lambda step, problems: damaged.append((step, problems)))
        if manifest is None and damaged and not start_over:
            words = "; ".join(str(problem) for _, problems in damaged for problem in problems)
            raise InputError(
                f"{self.folder.root}: no checkpoint is complete ({words}). Put a good copy there, or start again at "
                "step 0: headrace train --resume RUN --start-over (the damaged ones are kept beside the new ones)",
                id=ErrorId.checkpoint_damaged,
            )
        with self._together("put a damaged checkpoint aside in", self.folder.root):
            if self.rank == 0:
                for step, _ in damaged:
                    self.folder.set_aside(step)
        return manifest, damaged

    def load(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Fill `tensors` in place from a verified checkpoint, and restore the generators.

        Returns:
            Whether there was a generator state for every rank: not when more ranks read than wrote.

        Raises:
            InputError: names or shapes differ; names the tensor and both shapes. A file is not what it should be.
        """
        folder = self.folder.path_of(manifest.step)
        said = manifest.model.get(TRUNK_DIGEST)
        if gathered(said != self._trunk)[0]:
            raise InputError(
                f"{folder}: was trained on frozen weights of digest {said}; "
                f"model.init_from={manifest.model['init_from']} holds others now: put the folder of the run back"
            )
        reader = StateReader(folder / STATE_FOLDER)
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for others in gathered(wanted) if self._in_stages else ():
            wanted |= others
        check_shapes(reader.shapes(), wanted, folder)
        try:
            dcp.load(dict(tensors), storage_reader=reader)
        except CheckpointException as error:
            raise InputError(
                f"{folder} was written by another release of torch or headrace: {_cause(error)}"
            ) from error
        found: list[bool | str] = gathered(self._restore_generators(folder / _rng_file(self.rank)))
        if wrong := [text for text in found if isinstance(text, str)]:
            raise InputError(wrong[0], id=ErrorId.checkpoint_damaged)
        return all(found)

    def _restore_generators(self, path: Path) -> bool | str:
        """Whether this rank has a file of them; or what is wrong with it."""
        if not path.is_file():
            return False
        try:
            restore_rng_state(parse_json(read_regular(path)), self._device)
        except (OSError, ValueError) as error:
            return f"{path}: {error}; take another checkpoint of the run"
        return True

    def _retain(self) -> None:
        try:
            self.folder.retain(self._keep)
        except OSError as error:
            warnings.warn(f"{self.folder.root}: an old checkpoint could not be removed: {error}", stacklevel=2)

    def _write_own_files(self, temporary: Path) -> list[FileEntry]:
        names = [_rng_file(self.rank)]
        write_durably(temporary / names[0], json.dumps(rng_state(self._device)).encode())
        if self.rank == 0 and self._tokenizer is not None:
            tokenizer = read_tokenizer_files(self._tokenizer)
            tokenizer.save(temporary)
            for name in tokenizer.contents:
                sync_file(temporary / name)
            names.extend(tokenizer.contents)
        names.append(f"{STATE_FOLDER}/{state_file(self.rank)}")
        return describe_files(temporary, names)

    def _manifest(self, position: Position, files: tuple[FileEntry, ...], facts: Mapping[str, Any]) -> Manifest:
        return Manifest(**asdict(position), world_size=self.world_size, model=self._model, files=files, facts=facts)

    @contextmanager
    def _together(self, verb: str, path: Path) -> Iterator[None]:
        """Run a phase on all ranks; when it fails on one, all of them raise CheckpointFailed with its words.

        Args:
            verb, path: what this rank does to which file, for the message.
        """
        error: BaseException | None = None
        try:
            yield
        # CheckpointException is torch's and, unlike its name, no Exception.
        except (Exception, CheckpointException) as caught:
            error = caught
        mine = None if error is None else _Failure(f"could not {verb} {path}: {_cause(error)}", _is_disk_full(error))
        said: list[_Failure | None] = gathered(mine)
        failed = {rank: failure for rank, failure in enumerate(said) if failure is not None}
        if not failed:
            return
        words = "; ".join(f"rank {rank} {failure.text}" for rank, failure in failed.items())
        if not any(failure.disk_full for failure in failed.values()):
            raise CheckpointFailed(words) from error
        raise CheckpointDiskFull(
            f"{words}. The disk is full, the older checkpoints are unchanged: free some room, lower "
            "checkpoint.keep, or give a run.dir on another disk"
        ) from error


def check_shapes(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        InputError: names the first tensor that differs, and both shapes.
    """
    remedy = "resume with the model of the run (its config.yaml), or give another run.dir"
    for name, shape in wanted.items():
        if name not in stored:
            raise InputError(f"{folder}: tensor {name} of shape {shape} is not in the checkpoint; {remedy}")
        if stored[name] != shape:
            raise InputError(f"{folder}: tensor {name} has shape {stored[name]}, the model needs {shape}; {remedy}")
    extra = sorted(set(stored) - set(wanted))
    if extra:
        raise InputError(f"{folder}: tensor {extra[0]} of shape {stored[extra[0]]} is not in the model; {remedy}")


def _rng_file(rank: int) -> str:
    return f"rng_{rank:05d}.json"


def _check_room(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse to start what cannot be finished; torch's own words for a full disk do not say so.

    Raises:
        OSError: ENOSPC, with the bytes wanted and there.
    """
    wanted = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC,
            f"No space left on device: {wanted} bytes ({wanted / GIB:.3f} GiB) of state, {free} bytes free",
        )


def _is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for lack of room (or of quota, or at a limit of the file's size)."""
    error = _first(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _first(error: BaseException) -> BaseException:
    """The first failure inside of torch's wrapper; any other error as it is."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _cause(error: BaseException) -> str:
    error = _first(error)
    return f"{type(error).__name__}: {error}"
