"""Opens prepared data, wherever it is. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headrace.storage.core.errors import InputError
from headrace.storage.remote.folder import is_remote
from headrace.workers.data.config import words_of
from headrace.workers.data.mirror import open_remote_rows
from headrace.workers.data.prepared import PreparedData, open_local


def open_prepared(
    folder: str | Path, *, seq_len: int | None = None, buckets: Sequence[int] = (), vocab_size: int | None = None
) -> PreparedData:
    """Open and check a prepared folder (sizes and headers; `content_digest` checks the bytes).

    Args:
        folder: written by `headrace data prepare` or by a run's own preparation; or the URL of a copy of one, such as
            s3://bucket/folder, whose rows are fetched as they are needed.
        seq_len / buckets: of the run; where seq_len is None any are accepted.
        vocab_size: rows of the model's embedding; None accepts any.

    Raises:
        InputError: not a prepared folder, another sequence length or vocabulary, a truncated or foreign file.
            Of a URL also: nothing there, access denied, s3fs not installed.
        MachineError: the store of a URL cannot be reached, or there is no room for its mirror.
    """
    if isinstance(folder, str) and is_remote(folder):
        data = open_remote_rows(folder)
    else:
        data = open_local(Path(folder).expanduser().resolve())
    if seq_len is not None and (seq_len, tuple(buckets)) != (data.seq_len, data.lengths):
        there, wanted = _rows_of(data.seq_len, data.lengths), _rows_of(seq_len, buckets)
        if data.lengths and not buckets:
            wanted += " and no data.buckets"
        raise InputError(f"{data.where}: rows of {there}, the run has {wanted}; set that, or prepare the source again")
    if vocab_size is not None:
        data.check_vocab(vocab_size)
    return data


def _rows_of(seq_len: int, buckets: Sequence[int]) -> str:
    return f"data.seq_len={seq_len}" + (f" data.buckets={words_of(buckets)}" if buckets else "")
