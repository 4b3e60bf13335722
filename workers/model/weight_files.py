"""The safetensors files of a model folder: which tensors they hold, read from their headers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import open_regular, parse_json, read_regular
from headrace.storage.remote.folder import is_remote
from headrace.workers.model.hf_config import load_config

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class WeightEntry:
    """One tensor in one safetensors file, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def check_model_folder(folder: Path | str) -> None:
    """Look whether a folder holds a model that can be read: its config.json and the headers of its weights.

    The files of a URL are looked at when they are fetched.

    Raises:
        InputError: see load_config and read_headers.
    """
    if not (isinstance(folder, str) and is_remote(folder)):
        load_config(folder)
        read_headers(Path(folder))


def read_headers(folder: Path) -> dict[str, WeightEntry]:
    """Every tensor of a folder by its name there, with its file, shape and dtype.

    Raises:
        InputError: no safetensors, a file missing, cut short or unreadable; names the file and the tensor.
    """
    entries: dict[str, WeightEntry] = {}
    index = folder / INDEX_FILE
    if not index.is_file():
        single = folder / WEIGHTS_FILE
        if not single.is_file():
            old = "; it has pytorch_model.bin: convert it to safetensors" if list(folder.glob("*.bin")) else ""
            raise InputError(
                f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there{old or '; fetch the folder again'}",
                id=ErrorId.model_folder_wrong,
            )
        return read_header(single)
    try:
        weight_map = parse_json(read_regular(index))["weight_map"]
        files = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in files):
            raise ValueError("a file outside of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: is not an index of safetensors files ({error!r}); fetch it again") from error
    for name in files:
        path = folder / name
        if not path.is_file():
            tensor = next(tensor for tensor, file in weight_map.items() if file == name)
            raise InputError(f"{path}: missing; {INDEX_FILE} says that it holds {tensor}; fetch it again")
        for tensor, entry in read_header(path).items():
            if weight_map.get(tensor, name) != name:
                raise InputError(f"{path}: tensor {tensor} is here, {INDEX_FILE} says {weight_map[tensor]}")
            entries[tensor] = entry
    return entries


def read_header(path: Path) -> dict[str, WeightEntry]:
    """Every tensor of one file by its name there; the header is checked against the file's length.

    Raises:
        InputError: names the first tensor whose bytes are not all there.
    """
    size = path.stat().st_size
    try:
        with open_regular(path) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > size - 8:
                raise ValueError("its header is incomplete")
            header = parse_json(file.read(header_bytes))
        header.pop("__metadata__", None)
        placed = [(int(e["data_offsets"][1]), n, tuple(e["shape"]), str(e["dtype"])) for n, e in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is not a whole safetensors file ({error}); fetch it again") from error
    for end, name, _, dtype in sorted(placed):
        if 8 + header_bytes + end > size:
            raise InputError(
                f"{path}: tensor {name} ends at byte {8 + header_bytes + end}, the file has {size}: it is cut short; "
                "fetch it again"
            )
        if dtype not in _DTYPES:
            raise InputError(f"{path}: tensor {name} is {dtype}; supported are weights in {', '.join(_DTYPES)}")
    return {name: WeightEntry(path, shape, dtype) for _, name, shape, dtype in placed}
