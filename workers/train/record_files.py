"""The files of the records of a half-done step: of one rank, newest first. JSON and safetensors; nothing is unpickled.

    ranks/rank0/record-3.safetensors    tensors of the pass that are in no tier, and gradients that wait
    ranks/rank0/record-3.json           everything else, the digest of the file beside it, and its own

A record serves a process that follows on a machine that still runs, so nothing is synced to the disk. What is not whole
after a power failure has another digest.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file

from headrace.storage.core.outside import parse_json, read_regular
from headrace.workers.train.checkpoint_folder import FileEntry, verify_file
from headrace.workers.train.state_files import SUFFIX, bytes_of, header_of

_NAME = re.compile(r"record-(\d+)\.(json|part|safetensors)")


class RecordDamaged(ValueError):
    """A record is not as it was written: names the file."""


@dataclass(frozen=True)
class Record:
    """One record as read: `body` is what was given to `write`."""

    number: int
    body: dict[str, Any]
    tensors: FileEntry


class RecordFiles:
    """The records of one rank.

    Args:
        folder: of the rank; made at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def numbers(self) -> list[int]:
        """Of all records that are there, the newest last."""
        return sorted(number for path, number in self._there() if path.suffix == ".json")

    def write(self, number: int, body: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Add a record; it is there when its JSON file is. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        entry = self._write_tensors(f"record-{number}{SUFFIX}", tensors)
        text = json.dumps({"tensors": asdict(entry), "body": body})
        path = self._path(number)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"xxh3": _digest(text), "record": text}))
        partial.rename(path)

    def read(self, number: int) -> Record:
        """A record, its tensors not yet.

        Raises:
            RecordDamaged: its file is not as it was written.
        """
        path = self._path(number)
        try:
            outer = parse_json(read_regular(path))
            if _digest(outer["record"]) != outer["xxh3"]:
                raise ValueError("another digest than it names")
            found = parse_json(outer["record"])
            return Record(number, found["body"], FileEntry(**found["tensors"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecordDamaged(f"{path}: {error}") from error

    def tensors(self, record: Record) -> dict[str, torch.Tensor]:
        """Its tensors, on the CPU, compared with their digest.

        Raises:
            RecordDamaged: the file is not as it was written.
        """
        path = self._folder / record.tensors.path
        if (damage := verify_file(path, record.tensors)) is not None:
            raise RecordDamaged(str(damage))
        # Copied into memory of the allocator: products that are added to a sum may depend on how it is aligned.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}

    def remove(self, *, but: int | None = None) -> None:
        """Remove all records, or all but one. Raises OSError."""
        for path, number in self._there():
            if number != but:
                path.unlink(missing_ok=True)

    def _there(self) -> list[tuple[Path, int]]:
        paths = list(self._folder.iterdir()) if self._folder.is_dir() else []
        return [(path, int(match[1])) for path in paths if (match := _NAME.fullmatch(path.name))]

    def _path(self, number: int) -> Path:
        return self._folder / f"record-{number}.json"

    def _write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
        digest, num_bytes = xxhash.xxh3_64(), 0
        # Wide dtypes first: every tensor then begins at a multiple of its element.
        ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
        header = memoryview(header_of([(name, tensor.dtype, tensor.shape) for name, tensor in ordered], {}))
        with open(self._folder / name, "wb") as file:
            for part in itertools.chain([header], (bytes_of(tensor) for _, tensor in ordered)):
                file.write(part)
                digest.update(part)
                num_bytes += len(part)
        return FileEntry(name, num_bytes, digest.hexdigest())


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
