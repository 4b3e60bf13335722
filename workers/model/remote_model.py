"""A Hugging Face folder in an object store, copied into the local cache once per machine. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from headrace.storage.core.errors import InputError
from headrace.storage.remote.cache import cache_errors, cache_folder, locked
from headrace.storage.remote.folder import is_remote, open_remote

# The configurations, the tokenizer's files, the index and the weights; weights in other formats stay where they are.
_WANTED = ("*.json", "*.safetensors", "*.jinja")
_CONFIG = "config.json"


def local_model(folder: Path | str, wanted: Sequence[str] = _WANTED) -> Path:
    """The local folder of a model: itself, or the copy of what a URL names, fetched where it is not there yet.

    Args:
        wanted: patterns of the names of files to fetch.

    The copy's name holds the versions of the remote files: a model that was replaced is fetched anew. Every file
    appears whole, and several processes may ask at once.

    Raises:
        InputError: nothing there, or access denied. MachineError: the store cannot be reached, or no room here.
    """
    if not (isinstance(folder, str) and is_remote(folder)):
        return Path(folder)
    remote = open_remote(folder)
    files = {name: there for name, there in remote.files().items() if any(fnmatch(name, p) for p in wanted)}
    files = {name: there for name, there in files.items() if "/" not in name}
    if _CONFIG not in files:
        raise InputError(f"{remote.url_of(_CONFIG)}: missing; give the URL of a Hugging Face model folder")
    identity = sorted((name, there.num_bytes, there.version) for name, there in files.items())
    local = cache_folder("models", remote.name, remote.url, *identity)
    with locked(local), cache_errors(local):
        local.mkdir(parents=True, exist_ok=True)
        remote.fetch_all(files, local)
    return local
