"""A prepared folder: token rows, their tokenizer, and what is known about them. No torch."""

from __future__ import annotations

import hashlib
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import parse_json, read_regular
from headrace.storage.remote.folder import open_remote
from headrace.workers.data.config import bucket_problem, words_of
from headrace.workers.data.rows import HEADER_BYTES, SUMS_FILE, names_of, npy_header, sum_of_row, token_dtype
from headrace.workers.data.tokenizer_files import TOKENIZER_FILE, is_companion

SCHEMA_VERSION = 4
META_FILE = "meta.json"
# In place of META_FILE in the local mirror of remote data: its rows are not all there, so it is no prepared folder.
MIRROR_FILE = "mirror.json"
# A row is far longer than its documents from this many on.
_SHORT_DOCUMENTS = 64
_BLOCK_BYTES = 32 << 20
# Of meta.json: not there where there is nothing to say, so that an older release reads what it understands.
_NOT_ALWAYS = ("buckets", "num_prompts", "num_responses")
_REPAIR = "prepare it again with `headrace data prepare` into an empty folder"


@dataclass(frozen=True)
class Bucket:
    """What meta.json says of the rows of one length; num_tokens is without padding."""

    seq_len: int
    num_rows: int
    num_tokens: int


@dataclass(frozen=True)
class RowArrays:
    """The two files of the rows of one length.

    Args:
        tokens_path / flags_path: (num_rows, seq_len + 1) each; see headrace.workers.data.rows.
        first_row: number of its first row among all rows of the data.
    """

    tokens_path: Path
    flags_path: Path
    seq_len: int
    num_rows: int
    first_row: int
    vocab_size: int

    @property
    def dtypes(self) -> dict[str, np.dtype[np.unsignedinteger]]:
        """Element types of the two files, by file name."""
        return {self.tokens_path.name: token_dtype(self.vocab_size), self.flags_path.name: np.dtype(np.uint8)}


@dataclass(frozen=True)
class PreparedData:
    """What meta.json says.

    Args:
        folder: where the files are; of remote data, their local mirror, whose rows are fetched as they are needed.
        seq_len: a row holds seq_len + 1 tokens; the longest one where there are buckets.
        buckets: the rows of every length, ascending; empty: all rows have one length.
        vocab_size: one more than the tokenizer's largest id.
        end_of_document_id: the token that ends every document (and fills the last row).
        num_tokens: without the filling of rows; num_target_tokens: those that count in the loss.
        num_stops: documents at whose end, or behind whose last assistant turn, a stop token is a target.
        num_prompts: that several responses share, as often as rows hold them. num_responses: those responses.
        digest: sha256 of tokens.npy followed by flags.npy, of every length. sums_digest: of rows.sums.
        key: identity of source, tokenizer and settings; names the cache folder.
        source: what was read, for people. source_bytes: UTF-8 bytes of text read.
        tokenizer_digest: sha256 of tokenizer.json.
        companions: sha256 of the tokenizer's other files, by name.
        chat_date: the day that a chat template got as today; empty if none needed it.
        skipped: reason -> number of inputs left out. skipped_examples: reason -> the first of them.
        url: of the remote folder that `folder` mirrors; None where `folder` holds all rows.
    """

    folder: Path
    seq_len: int
    vocab_size: int
    num_rows: int
    num_documents: int
    num_tokens: int
    num_target_tokens: int
    num_stops: int
    end_of_document_id: int
    digest: str
    sums_digest: str
    key: str
    source: str
    source_bytes: int
    tokenizer_digest: str
    companions: dict[str, str] = field(default_factory=dict)
    chat_date: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_examples: dict[str, str] = field(default_factory=dict)
    buckets: tuple[Bucket, ...] = ()
    num_prompts: int = 0
    num_responses: int = 0
    url: str | None = None

    @property
    def where(self) -> str:
        """What `data.prepared` names: the URL of remote data, else the folder. Other machines open this one."""
        return self.url or str(self.folder)

    @property
    def arrays(self) -> tuple[RowArrays, ...]:
        """The rows of every length, in the order of their numbers."""
        found, first = [], 0
        for length, bucket in self._by_name():
            tokens, flags = (self.folder / name for name in names_of(length))
            found.append(RowArrays(tokens, flags, bucket.seq_len, bucket.num_rows, first, self.vocab_size))
            first += bucket.num_rows
        return tuple(found)

    def array_of(self, row: int) -> RowArrays:
        """The files that hold a row."""
        arrays = self.arrays
        return arrays[bisect_right([array.first_row + array.num_rows for array in arrays[:-1]], row)]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the buckets, ascending; empty: all rows have one length."""
        return tuple(bucket.seq_len for bucket in self.buckets)

    @property
    def tokens_path(self) -> Path:
        """The (num_rows, seq_len + 1) token ids of the longest rows."""
        return self.arrays[-1].tokens_path

    @property
    def flags_path(self) -> Path:
        """The (num_rows, seq_len + 1) flags of the longest rows: see headrace.workers.data.rows."""
        return self.arrays[-1].flags_path

    def _by_name(self) -> list[tuple[int | None, Bucket]]:
        if self.buckets:
            return [(bucket.seq_len, bucket) for bucket in self.buckets]
        return [(None, Bucket(self.seq_len, self.num_rows, self.num_tokens))]

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
                f"{self.where}: token ids go up to {self.vocab_size - 1} but model.vocab_size={model_vocab_size}; "
                "use the model's own tokenizer (data.tokenizer=...). Special tokens that only its companion files name "
                "have ids too. For a model without pretrained weights set model.vocab_size=0: it takes the data's size",
                id=ErrorId.other_tokenizer,
            )

    def warn_of_length(self) -> None:
        """Say where rows are far longer than what is in them."""
        if self.buckets:
            self._warn_of_buckets()
            return
        shown = f"{self.where}: data.seq_len={self.seq_len}"
        mean = self.num_tokens // max(1, self.num_documents)
        if self.num_tokens < self.seq_len:
            warnings.warn(
                f"{shown}, and there are only {self.num_tokens} tokens: the row is filled with end tokens, which are "
                f"not trained on. Set data.seq_len={self.num_tokens} or less, or give more data",
                stacklevel=3,
            )
        elif mean * _SHORT_DOCUMENTS < self.seq_len:
            warnings.warn(
                f"{shown}, and documents have {mean} tokens on average: a row packs many of them, and no token attends "
                "to another document. A lower data.seq_len is enough",
                stacklevel=3,
            )

    def _warn_of_buckets(self) -> None:
        if empty := [bucket.seq_len for bucket in self.buckets if not bucket.num_rows]:
            warnings.warn(
                f"{self.where}: data.buckets={words_of(self.lengths)}: no document goes to rows of {words_of(empty)} "
                "tokens; leave such a length out",
                stacklevel=4,
            )
        room = sum(bucket.num_rows * (bucket.seq_len + 1) for bucket in self.buckets)
        if 2 * self.num_tokens < room:
            warnings.warn(
                f"{self.where}: data.buckets={words_of(self.lengths)}: documents fill "
                f"{100 * self.num_tokens // room} % of the rows, the rest is padding; add lengths nearer "
                "to those of the documents",
                stacklevel=4,
            )

    def row_sums(self) -> npt.NDArray[np.uint64]:
        """The sum of every row, (num_rows,).

        Raises:
            InputError: the file is not the one that was prepared.
        """
        path = self.folder / SUMS_FILE
        content = path.read_bytes() if path.is_file() and path.stat().st_size == self.num_rows * 8 else b""
        if hashlib.sha256(content).hexdigest() != self.sums_digest:
            raise InputError(f"{self.where}/{SUMS_FILE}: missing or damaged; {_REPAIR}", id=ErrorId.data_damaged)
        return np.frombuffer(content, dtype="<u8")

    def check_row(self, row: int, tokens: npt.NDArray[Any], flags: npt.NDArray[np.uint8], wanted: int) -> None:
        """Refuse a row that is not what was prepared, or names tokens that no vocabulary has.

        On a GPU such ids end in an assertion that names nothing.

        Args:
            tokens, flags: (seq_len + 1,) as read. wanted: its sum.

        Raises:
            InputError: naming the file and the row.
        """
        if sum_of_row(np.ascontiguousarray(tokens).data, np.ascontiguousarray(flags).data) != wanted:
            raise self.damaged(row)
        if (token := int(tokens.max())) >= self.vocab_size:
            array = self.array_of(row)
            raise InputError(
                f"{self.where}/{array.tokens_path.name} row {row - array.first_row}: token id {token}, but the "
                f"vocabulary has {self.vocab_size}; {_REPAIR}"
            )

    def damaged(self, row: int) -> InputError:
        """The error of a row whose bytes are not those that were prepared."""
        array = self.array_of(row)
        return InputError(
            f"{self.where}: row {row - array.first_row} of {array.tokens_path.name} or {array.flags_path.name} differs "
            f"from the prepared row: it was damaged; {_REPAIR}" + (" and upload it again" if self.url else ""),
            id=ErrorId.data_damaged,
        )

    def content_digest(self) -> str:
        """Read all rows and hash them: equals `digest` unless a byte changed. Remote ones are read where they are."""
        names = [name for array in self.arrays for name in array.dtypes]
        if self.url is not None:
            return _sha256(remote_blocks(self.url, names))
        return _sha256(block for name in names for block in file_blocks(self.folder / name))

    def to_json(self) -> dict[str, Any]:
        """Plain values for meta.json and `--json`; the folder is left out, because it may move."""
        values = asdict(self)
        del values["folder"], values["url"]
        for name in (name for name in _NOT_ALWAYS if not values[name]):
            del values[name]
        return {"schema_version": SCHEMA_VERSION, **values}


def _sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def file_blocks(path: Path) -> Iterator[bytes]:
    """The content of a file, 4 MiB at a time."""
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            yield block


def remote_blocks(url: str, names: Sequence[str]) -> Iterator[bytes]:
    """The contents of remote files, one after the other, in blocks.

    Raises:
        InputError, MachineError: they cannot be read, or were replaced meanwhile.
    """
    remote = open_remote(url)
    for name in names:
        there = remote.info(name)
        for begin in range(0, there.num_bytes, _BLOCK_BYTES):
            yield remote.read_bytes(name, begin, min(begin + _BLOCK_BYTES, there.num_bytes))
        remote.check_unchanged({name: there})


def _read_meta(folder: Path) -> PreparedData:
    path = folder / META_FILE
    if (folder / MIRROR_FILE).is_file():
        raise InputError(f"{folder}: is headrace's local copy of some rows of remote data; give the URL")
    if not path.is_file():
        raise InputError(
            f"{folder}: not a prepared data folder (no {META_FILE}); `headrace data prepare out=...` makes one"
        )
    try:
        content = read_regular(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); {_REPAIR}") from error
    return parse_meta(content, str(path), folder)


def parse_meta(content: bytes, path: str, folder: Path, url: str | None = None) -> PreparedData:
    """What a meta.json says.

    Args:
        path: of the file, for messages. folder, url: of the data.

    Raises:
        InputError: it is none, or of another release.
    """
    try:
        values = parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error}); {_REPAIR}") from error
    version = values.pop("schema_version", None) if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version {version!r}, this version of headrace reads {SCHEMA_VERSION}; {_REPAIR}"
        )
    known = {f.name for f in fields(PreparedData)} - {"folder", "url", "buckets"}
    buckets = values.pop("buckets", [])
    values = {"num_prompts": 0, "num_responses": 0, **values}
    if odd := known.symmetric_difference(values):
        raise InputError(f"{path}: missing or unknown keys {sorted(odd)}; {_REPAIR}")
    kinds = {"int": int, "str": str, "dict[str, int]": dict, "dict[str, str]": dict}
    for item in (item for item in fields(PreparedData) if item.name in known):
        if type(values[item.name]) is not kinds[str(item.type)]:
            raise InputError(f"{path}: {item.name}={repr(values[item.name])[:80]}, {item.type} is wanted; {_REPAIR}")
    for name in ("seq_len", "vocab_size", "num_rows", "num_tokens"):
        if not 1 <= values[name] < 1 << 62:
            raise InputError(f"{path}: {name}={values[name]!r}, a whole number above 0 is expected; {_REPAIR}")
    values["buckets"] = _parse_buckets(buckets, path, values)
    companions = values["companions"]
    if not all(map(is_companion, companions)):
        raise InputError(f"{path}: companions={companions!r}: not files of a tokenizer; {_REPAIR}")
    return PreparedData(folder=folder, url=url, **values)


def _parse_buckets(rows: Any, path: str, values: dict[str, Any]) -> tuple[Bucket, ...]:
    names = [item.name for item in fields(Bucket)]
    fine = isinstance(rows, list) and all(
        isinstance(row, dict) and sorted(row) == sorted(names) and all(type(row[name]) is int for name in names)
        for row in rows
    )
    found = tuple(Bucket(**row) for row in rows) if fine else ()
    is_right = fine and not any(min(row.num_rows, row.num_tokens) < 0 for row in found)
    if found and is_right:
        is_right = bucket_problem([row.seq_len for row in found], values["seq_len"]) is None
        is_right = is_right and sum(row.num_rows for row in found) == values["num_rows"]
        is_right = is_right and sum(row.num_tokens for row in found) == values["num_tokens"]
    if not is_right:
        raise InputError(f"{path}: buckets={repr(rows)[:80]}: not rows that belong to the rest of it; {_REPAIR}")
    return found


def check_array(path: str, num_bytes: int, header: bytes, data: RowArrays) -> None:
    """Refuse an array file that meta.json does not describe.

    Args:
        path: its path or URL. num_bytes: its length. header: its first HEADER_BYTES. data: which rows it shall hold.

    Raises:
        InputError: truncated, overwritten or foreign.
    """
    dtype = data.dtypes[path.rpartition("/")[2]]
    wanted = HEADER_BYTES + data.num_rows * (data.seq_len + 1) * dtype.itemsize
    if num_bytes != wanted:
        raise InputError(
            f"{path}: {num_bytes} bytes, {data.num_rows} rows need {wanted}: truncated or overwritten; {_REPAIR}"
        )
    if header != npy_header(dtype, data.num_rows, data.seq_len + 1):
        raise InputError(f"{path}: its header is not that of ({data.num_rows}, {data.seq_len + 1}) {dtype}; {_REPAIR}")


def open_local(folder: Path) -> PreparedData:
    """Open and check a folder of this machine. Raises InputError where it is not one, or a file is damaged."""
    data = _read_meta(folder)
    for array in data.arrays:
        for path in (array.tokens_path, array.flags_path):
            if not path.is_file():
                raise InputError(f"{path}: missing; {_REPAIR}")
            with open(path, "rb") as file:
                check_array(str(path), path.stat().st_size, file.read(HEADER_BYTES), array)
    for name in (TOKENIZER_FILE, *data.companions):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing; {_REPAIR}")
    return data
