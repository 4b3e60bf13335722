"""The tensors of a checkpoint: one safetensors file a rank, which holds numbers and can hold nothing else.

torch.distributed.checkpoint plans which rank writes and reads which part. Its own files are pickles: a person who gives
such a file decides what the reader executes. Here a rank streams its shards into a safetensors file, one tensor in
memory at a time; the offset of each shard is JSON in the file's header, where torch's HuggingFaceStorageReader looks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from headrace.storage.core.errors import ErrorId, InputError

SUFFIX = ".safetensors"
_SHARDING = "DCP_SHARDING_INFO"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
}


def state_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank_{rank:05d}{SUFFIX}"


class StateWriter(FileSystemWriter):
    """Writes this rank's part of a planned save into one safetensors file, which may hold no tensor at all.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder)
        self._file = folder / state_file(rank)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Header first: all sizes are known from the plan. On the disk when this returns."""
        items = [item for item in plan.items if math.prod(_chunk(item).sizes)]
        with open(self._file, "wb") as file:
            file.write(_header(items))
            for item in items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor), "a checkpoint holds tensors only"
                file.write(bytes_of(tensor))
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing to write: the headers of the files say all."""


class StateReader(HuggingFaceStorageReader):
    """Reads the files of a StateWriter. Headers are read once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder
        self._known: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """Names, shapes and parts of all tensors.

        Raises:
            InputError: the files are no safetensors, or their parts do not make whole tensors.
        """
        if self._known is None:
            self._known = self._read_headers()
        return self._known

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor. Raises InputError as read_metadata."""
        stored: Mapping[str, Any] = self.read_metadata().state_dict_metadata
        return {name: tuple(entry.size) for name, entry in stored.items()}

    def _read_headers(self) -> Metadata:
        for path in self._folder.glob(f"*{SUFFIX}"):
            if not path.is_file():
                raise self._refuse(f"{path.name} is not a regular file")
        try:
            metadata = super().read_metadata()
            whole = all(map(_is_whole, metadata.state_dict_metadata.values()))
        # The headers come from outside: they may cause any kind of error, also the library's own kinds.
        except Exception as error:
            raise self._refuse(f"{type(error).__name__}: {error}") from error
        if not whole:
            raise self._refuse("the parts of a tensor do not cover the whole tensor")
        return metadata

    def _refuse(self, why: str) -> InputError:
        return InputError(
            f"{self._folder}: not the state of a headrace checkpoint ({why}); take another checkpoint of the run",
            id=ErrorId.checkpoint_damaged,
        )


def _chunk(item: WriteItem) -> Any:
    assert item.tensor_data is not None, "a checkpoint holds tensors only"
    return item.tensor_data.chunk


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as a file has them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(items: list[WriteItem]) -> bytes:
    offsets = {item.index.fqn: {"saved_offsets": list(_chunk(item).offsets)} for item in items}
    assert len(offsets) == len(items), "a rank holds one part of a tensor"
    parts = [(item.index.fqn, item.tensor_data.properties.dtype, _chunk(item).sizes) for item in items]  # type: ignore[union-attr]
    return header_of(parts, {_SHARDING: json.dumps(offsets)})


def header_of(parts: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a safetensors file: https://github.com/huggingface/safetensors#format.

    Args:
        parts: name, dtype and shape of every tensor, in the order of their bytes behind the header.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, dtype, shape in parts:
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(entries).encode()
    content = content.ljust(-(-len(content) // 8) * 8)
    return len(content).to_bytes(8, "little") + content


def _is_whole(entry: Any) -> bool:
    assert isinstance(entry, TensorStorageMetadata), "the reader knows no other kind"
    inside = all(min(chunk.offsets, default=0) >= 0 for chunk in entry.chunks)
    return inside and sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size)
