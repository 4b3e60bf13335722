"""A prepared folder: token rows, their tokenizer, and what is known about them. No torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.storage.core.errors import InputError
from headrace.workers.data.rows import FLAGS_FILE, HEADER_BYTES, TOKENS_FILE, npy_header, token_dtype

SCHEMA_VERSION = 1
META_FILE, TOKENIZER_FILE = "meta.json", "tokenizer.json"
_REPAIR = "prepare it again with `headrace data prepare` into an empty folder"


@dataclass(frozen=True)
class PreparedData:
    """What meta.json says.

    Args:
        folder: where the files are.
        seq_len: a row holds seq_len + 1 tokens.
        vocab_size: one more than the tokenizer's largest id.
        end_of_document_id: the token that ends every document (and fills the last row).
        num_tokens: without the filling of the last row; num_target_tokens: those that count in the loss.
        digest: sha256 of tokens.npy followed by flags.npy.
        key: identity of source, tokenizer and settings; names the cache folder.
        source: what was read, for people. source_bytes: UTF-8 bytes of text read.
        tokenizer_digest: sha256 of tokenizer.json.
        skipped: reason -> number of inputs left out. skipped_examples: reason -> the first of them.
    """

    folder: Path
    seq_len: int
    vocab_size: int
    num_rows: int
    num_documents: int
    num_tokens: int
    num_target_tokens: int
    end_of_document_id: int
    digest: str
    key: str
    source: str
    source_bytes: int
    tokenizer_digest: str
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_examples: dict[str, str] = field(default_factory=dict)

    @property
    def tokens_path(self) -> Path:
        """The (num_rows, seq_len + 1) token ids."""
        return self.folder / TOKENS_FILE

    @property
    def flags_path(self) -> Path:
        """The (num_rows, seq_len + 1) flags: see headrace.workers.data.rows."""
        return self.folder / FLAGS_FILE

    @property
    def tokenizer_path(self) -> Path:
        """The Hugging Face tokenizer.json that made the rows."""
        return self.folder / TOKENIZER_FILE

    def check_vocab(self, model_vocab_size: int) -> None:
        """Refuse a model whose embedding has fewer rows than the tokenizer has ids.

        Raises:
            InputError: naming both sizes.
        """
        if model_vocab_size < self.vocab_size:
            raise InputError(
                f"{self.folder}: token ids go up to {self.vocab_size - 1} but model.vocab_size={model_vocab_size}; "
                "take the model's own tokenizer (data.tokenizer=...), or model.vocab_size=0 to follow the data"
            )

    def check_rows(self, rows: npt.NDArray[np.int64], tokens: npt.NDArray[np.integer[Any]]) -> None:
        """Refuse rows whose ids are beyond the vocabulary: on a GPU they end in an assertion that names nothing.

        Args:
            rows: (B,) row numbers. tokens: (B, seq_len + 1) ids as read.

        Raises:
            InputError: naming the file, the row and the id.
        """
        largest = tokens.max(axis=1)
        for row, token in zip(rows, largest, strict=True):
            if token >= self.vocab_size:
                raise InputError(
                    f"{self.tokens_path} row {row}: token id {token}, but the vocabulary has {self.vocab_size}; "
                    f"{_REPAIR}"
                )

    def content_digest(self) -> str:
        """Read both files and hash them: equals `digest` unless a byte changed on the disk."""
        digest = hashlib.sha256()
        for path in (self.tokens_path, self.flags_path):
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain values for meta.json and `--json`; the folder is left out, because it may move."""
        values = asdict(self)
        del values["folder"]
        return {"schema_version": SCHEMA_VERSION, **values}


def _read_meta(folder: Path) -> PreparedData:
    path = folder / META_FILE
    if not path.is_file():
        raise InputError(
            f"{folder}: not a prepared data folder (no {META_FILE}); `headrace data prepare out=...` makes one"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {_REPAIR}") from error
    version = values.pop("schema_version", None) if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version {version!r}, this headrace reads {SCHEMA_VERSION}; {_REPAIR}")
    known = {f.name for f in fields(PreparedData)} - {"folder"}
    if odd := known.symmetric_difference(values):
        raise InputError(f"{path}: missing or unknown keys {sorted(odd)}; {_REPAIR}")
    for name in ("seq_len", "vocab_size", "num_rows", "num_tokens"):
        if type(values[name]) is not int or values[name] < 1:
            raise InputError(f"{path}: {name}={values[name]!r}, a whole number above 0 is wanted; {_REPAIR}")
    return PreparedData(folder=folder, **values)


def _check_array(path: Path, data: PreparedData, dtype: np.dtype[np.unsignedinteger]) -> None:
    if not path.is_file():
        raise InputError(f"{path}: missing; {_REPAIR}")
    wanted = HEADER_BYTES + data.num_rows * (data.seq_len + 1) * dtype.itemsize
    there = path.stat().st_size
    if there != wanted:
        raise InputError(
            f"{path}: {there} bytes, {data.num_rows} rows need {wanted}: truncated or overwritten; {_REPAIR}"
        )
    with open(path, "rb") as file:
        if file.read(HEADER_BYTES) != npy_header(dtype, data.num_rows, data.seq_len + 1):
            raise InputError(
                f"{path}: its header is not that of ({data.num_rows}, {data.seq_len + 1}) {dtype}; {_REPAIR}"
            )


def open_prepared(folder: str | Path, *, seq_len: int | None = None, vocab_size: int | None = None) -> PreparedData:
    """Open and check a prepared folder (sizes and headers; `content_digest` checks the bytes).

    Args:
        folder: written by `headrace data prepare` or by a run's own preparation.
        seq_len: what the run wants; None accepts any.
        vocab_size: rows of the model's embedding; None accepts any.

    Raises:
        InputError: not a prepared folder, another sequence length or vocabulary, a truncated or foreign file.
    """
    data = _read_meta(Path(folder).expanduser().resolve())
    _check_array(data.tokens_path, data, token_dtype(data.vocab_size))
    _check_array(data.flags_path, data, np.dtype(np.uint8))
    if not data.tokenizer_path.is_file():
        raise InputError(f"{data.tokenizer_path}: missing; {_REPAIR}")
    if seq_len is not None and seq_len != data.seq_len:
        raise InputError(
            f"{data.folder}: rows of data.seq_len={data.seq_len}, the run wants data.seq_len={seq_len}; set that, or "
            "prepare the source again"
        )
    if vocab_size is not None:
        data.check_vocab(vocab_size)
    return data
