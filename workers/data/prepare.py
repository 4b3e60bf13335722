"""Source to prepared folder: find, tokenize, pack, and be able to stop anywhere.

The folder is built under the name `<folder>.partial` and renamed when it is complete. A journal in it says how far the
token files are good and where reading continues, so that a preparation that was killed continues and ends in the same
bytes. Bad input or a full disk removes the partial folder. A lock lets only one process build a folder; others wait
and then use it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import parse_json, read_regular
from headrace.workers.data.config import DataConfig, bucket_problem
from headrace.workers.data.opening import open_prepared
from headrace.workers.data.prepared import META_FILE, SCHEMA_VERSION, Bucket, PreparedData
from headrace.workers.data.readers import Cursor, Piece, ReadTally, read_pieces
from headrace.workers.data.records import texts_of
from headrace.workers.data.row_sorter import RowSorter
from headrace.workers.data.rows import HEADER_BYTES, disk_errors, names_of, token_dtype, write_row_sums
from headrace.workers.data.sources import STDLIB, Source, find_source
from headrace.workers.data.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_FILE,
    TokenizerFiles,
    read_tokenizer_files,
)
from headrace.workers.data.tokenizing import SAMPLE_BYTES, EncodedPiece, RowTokenizer, train_bpe

JOURNAL_FILE = "journal.json"
# Text tokenized in one go: what bounds memory (a few dozen bytes a byte of text), and what a kill loses at most, times
# COMMIT_BYTES over it.
BATCH_BYTES = 4 << 20
COMMIT_BYTES = 32 << 20


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is: bytes of the source, and rows written."""

    done_bytes: int
    total_bytes: int
    num_rows: int


OnProgress = Callable[[PrepareProgress], None]


@dataclass
class _Journal:
    """What is certainly on the disk, and how to go on. Positions and padding are of every length."""

    key: str
    positions: list[int] = field(default_factory=list)
    padding: list[int] = field(default_factory=list)
    lengths: list[int | None] = field(default_factory=lambda: [None])
    token_bytes: int = 0
    num_targets: int = 0
    num_documents: int = 0
    num_stops: int = 0
    num_prompts: int = 0
    num_responses: int = 0
    chat_date: str = ""
    cursor: Cursor = field(default_factory=Cursor)
    tally: ReadTally = field(default_factory=ReadTally)

    def add(self, part: EncodedPiece, writer: RowSorter, *, starts: bool, ends: bool) -> None:
        """Write a piece and count it. Every response is a document."""
        self.num_stops += part.stops
        self.num_documents += len(part.responses) or starts
        if part.ids.size and part.responses:
            self.num_responses += len(part.responses)
            self.num_prompts += writer.add_responses((part.ids, part.flags), part.responses, where=part.where)
            return
        for ids, flags in part.responses or [(part.ids, part.flags)]:
            writer.add(ids, flags, where=part.where, starts=starts, ends=ends)

    def save(self, folder: Path) -> None:
        _write_json(folder / JOURNAL_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path, key: str) -> _Journal | None:
        """The journal of an interrupted preparation of the same thing; None if there is none to continue."""
        try:
            values = parse_json(read_regular(folder / JOURNAL_FILE))
            cursor, tally = Cursor(**values.pop("cursor")), ReadTally(**values.pop("tally"))
            journal = cls(**values, cursor=cursor, tally=tally)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        whole = all(
            (folder / name).is_file() and (folder / name).stat().st_size >= HEADER_BYTES + position * width
            for length, position in zip(journal.lengths, journal.positions, strict=False)
            for name, width in zip(names_of(length), (journal.token_bytes, 1), strict=True)
        )
        return journal if whole and journal.key == key else None


def prepare(config: DataConfig, *, progress: OnProgress | None = None) -> PreparedData:
    """The prepared folder of a run: opened when it exists, made otherwise.

    Args:
        config: with `prepared` set, that folder must exist; without it, a folder below `cache_dir` named by the
            identity of source (names, sizes, times), tokenizer and settings is used, and made when it is not there.
        progress: called after every few mebibytes.

    Raises:
        InputError: bad source, tokenizer or folder, with file and line; a tokenizer that did not make `prepared`.
        MachineError: no room on the disk.
    """
    if config.prepared is not None:
        data = open_prepared(config.prepared, seq_len=config.seq_len, buckets=config.buckets)
        if config.tokenizer is not None:
            _check_tokenizer(data, config.tokenizer)
    else:
        request = _Request.of(config)
        data = _prepare_at(request, Path(config.cache_dir).expanduser().absolute() / request.folder_name, progress)
    data.warn_of_length()
    return data


def prepare_into(config: DataConfig, folder: str | Path, *, progress: OnProgress | None = None) -> PreparedData:
    """Prepare `config.source` into a folder of the caller's choice; one that holds just that already is reused.

    Raises:
        InputError: as `prepare`, and where the folder holds something else.
    """
    data = _prepare_at(_Request.of(config), Path(folder).expanduser().absolute(), progress)
    data.warn_of_length()
    return data


def _check_tokenizer(data: PreparedData, tokenizer: str) -> None:
    digest = read_tokenizer_files(tokenizer).digest
    if digest != data.tokenizer_digest:
        raise InputError(
            f"data.tokenizer={tokenizer}: data.prepared={data.folder} was made with another tokenizer "
            f"({data.tokenizer_digest[:12]}, this one is {digest[:12]}); leave data.tokenizer unset, or prepare again"
        )


@dataclass(frozen=True)
class _Request:
    """What shall be prepared, with its identity."""

    config: DataConfig
    source: Source
    tokenizer: TokenizerFiles | None
    key: str

    @classmethod
    def of(cls, config: DataConfig) -> _Request:
        if config.seq_len < 1:
            raise InputError(f"data.seq_len={config.seq_len}: at least 1 token")
        if problem := bucket_problem(config.buckets, config.seq_len):
            raise InputError(problem)
        if config.max_bytes is not None and config.max_bytes < 1:
            raise InputError(f"data.max_bytes={config.max_bytes}: at least 1 byte, or unset for all")
        source = find_source(config)
        tokenizer = None if config.tokenizer is None else read_tokenizer_files(config.tokenizer)
        bpe = f"bpe {config.bpe_vocab_size} {SAMPLE_BYTES}"
        identity = {
            "schema": SCHEMA_VERSION,
            "source": source.identity(),
            "tokenizer": bpe if tokenizer is None else tokenizer.identity,
            "seq_len": config.seq_len,
            "max_bytes": config.max_bytes,
        }
        if config.buckets:
            identity["buckets"] = list(config.buckets)
        if not config.share_prompts:
            identity["share_prompts"] = False
        return cls(config, source, tokenizer, hashlib.sha256(json.dumps(identity).encode()).hexdigest())

    @property
    def folder_name(self) -> str:
        name = STDLIB if self.config.source == STDLIB else Path(self.config.source).stem or "data"
        return f"{name}-{self.config.seq_len}-{self.key[:16]}"


def _prepare_at(request: _Request, folder: Path, progress: OnProgress | None) -> PreparedData:
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(folder.name + ".lock")):
        if (folder / META_FILE).is_file():
            data = open_prepared(folder, seq_len=request.config.seq_len, buckets=request.config.buckets)
            if data.key != request.key:
                raise InputError(
                    f"{folder}: holds other data already ({data.source}, tokenizer {data.tokenizer_digest[:12]}, or "
                    "the source changed since); choose another folder or remove this one"
                )
            _check_stops(request.config, data.num_stops)
            return data
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: exists and is not a prepared data folder; choose another one or remove it")
        partial = folder.with_name(folder.name + ".partial")
        try:
            with disk_errors(partial):
                _build(request, partial, progress)
                os.rename(partial, folder)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return open_prepared(folder, seq_len=request.config.seq_len, buckets=request.config.buckets)


def _build(request: _Request, partial: Path, progress: OnProgress | None) -> None:
    """Fill the partial folder, going on from its journal where it has one."""
    journal = _Journal.load(partial, request.key)
    if journal is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        files = request.tokenizer or train_bpe(request.source, request.config.bpe_vocab_size)
        files.save(partial)
        journal = _Journal(request.key, lengths=list(request.config.buckets) or [None])
        journal.tally.skipped = dict(request.source.skipped)
    else:
        files = read_tokenizer_files(partial)
    if request.tokenizer is not None:
        files = request.tokenizer  # the same bytes; errors then name the user's own file
    tokenizer = RowTokenizer(files, share_prompts=request.config.share_prompts)
    journal.token_bytes = token_dtype(tokenizer.vocab_size).itemsize
    writer = RowSorter(
        partial,
        seq_len=request.config.seq_len,
        buckets=request.config.buckets,
        vocab_size=tokenizer.vocab_size,
        padding_id=tokenizer.end_id,
        positions=journal.positions,
        padding=journal.padding,
    )
    try:
        journal.save(partial)
        _write_rows(request, writer, journal, tokenizer, progress)
        if not any(writer.positions):
            raise InputError(f"data.source={request.config.source}: no text in it{_left_out(journal.tally)}")
        if journal.num_targets == 0:
            raise InputError(
                f"data.source={request.config.source}: none of its {writer.num_tokens} tokens is a target (chats "
                "without an assistant turn, or documents of one token)"
            )
        _check_stops(request.config, journal.num_stops)
        num_rows = writer.finish()
    finally:
        writer.close()
    if find_source(request.config).identity() != request.source.identity():
        raise InputError(f"data.source={request.config.source}: changed while it was read; prepare it again")
    meta = _meta(request, partial, journal, tokenizer)
    sums_digest = write_row_sums(partial, journal.lengths)
    meta = replace(meta, num_tokens=writer.num_tokens, num_rows=sum(num_rows), sums_digest=sums_digest)
    if request.config.buckets:
        sizes = zip(writer.lengths, num_rows, writer.positions, writer.padding, strict=True)
        buckets = tuple(Bucket(length, rows, position - padding) for length, rows, position, padding in sizes)
        meta = replace(meta, buckets=buckets)
    _write_json(partial / META_FILE, replace(meta, digest=meta.content_digest()).to_json())
    (partial / JOURNAL_FILE).unlink()


def _write_rows(
    request: _Request, writer: RowSorter, journal: _Journal, tokenizer: RowTokenizer, progress: OnProgress | None
) -> None:
    """Read, encode and append to the end of the source; the journal follows."""
    pieces = read_pieces(request.source, start=journal.cursor, tally=journal.tally, max_bytes=request.config.max_bytes)
    committed_bytes = journal.tally.source_bytes
    writer.num_targets = journal.num_targets
    for batch in _batches(pieces):
        for piece, part in zip(batch, tokenizer.encode(batch), strict=True):
            journal.add(part, writer, starts=piece.starts, ends=piece.ends)
        journal.chat_date = journal.chat_date or tokenizer.chat_date
        if tokenizer.built_in_template is not None:
            (writer.folder / CHAT_TEMPLATE_FILE).write_text(tokenizer.built_in_template, encoding="utf-8")
        journal.positions, journal.padding = writer.positions, list(writer.padding)
        journal.num_targets = writer.num_targets
        if batch[-1].after is not None and writer.is_between_documents:
            journal.cursor = batch[-1].after
            if journal.tally.source_bytes - committed_bytes >= COMMIT_BYTES:
                writer.flush()
                journal.save(writer.folder)
                committed_bytes = journal.tally.source_bytes
        if progress is not None:
            done, total = _progress_bytes(request, journal)
            progress(PrepareProgress(done, total, writer.num_rows))


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += sum(map(len, texts_of(piece.content)))
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _progress_bytes(request: _Request, journal: _Journal) -> tuple[int, int]:
    """Bytes done and bytes in all: of the limit where that ends the reading, of the files otherwise."""
    files, total, limit = request.source.files, request.source.num_bytes, request.config.max_bytes
    if limit is not None and limit < total:
        return min(journal.tally.source_bytes, limit), limit
    return sum(file.num_bytes for file in files[: journal.cursor.file]) + journal.cursor.offset, total


def _meta(request: _Request, partial: Path, journal: _Journal, tokenizer: RowTokenizer) -> PreparedData:
    saved = read_tokenizer_files(partial)
    return PreparedData(
        folder=partial,
        seq_len=request.config.seq_len,
        vocab_size=tokenizer.vocab_size,
        num_rows=0,
        num_documents=journal.num_documents,
        num_tokens=0,
        num_target_tokens=journal.num_targets,
        num_stops=journal.num_stops,
        num_prompts=journal.num_prompts,
        num_responses=journal.num_responses,
        end_of_document_id=tokenizer.end_id,
        digest="",
        sums_digest="",
        key=request.key,
        source=f"{request.source.description} ({request.source.format.value})",
        source_bytes=journal.tally.source_bytes,
        tokenizer_digest=saved.digest,
        companions={name: digest for name, digest in saved.digests.items() if name != TOKENIZER_FILE},
        chat_date=journal.chat_date,
        skipped=journal.tally.skipped,
        skipped_examples=journal.tally.skipped_examples,
    )


def _check_stops(config: DataConfig, num_stops: int) -> None:
    if num_stops == 0 and not config.allow_no_stop:
        raise InputError(
            f"data.source={config.source}: nothing in it teaches the model to stop: no chat ends with the assistant, "
            "and the chat template closes no turn in the middle. Let chats end with the assistant, or set "
            "data.allow_no_stop=true",
            id=ErrorId.data_without_stop,
        )


def _left_out(tally: ReadTally) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.skipped.items()))
    return f" (left out: {reasons})" if reasons else ""


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path` between processes; the file is gone afterwards."""
    with disk_errors(path):
        while True:
            file = open(path, "w")  # noqa: SIM115 - lives as long as the lock
            fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before us may have removed the file we waited on: then a third may hold its successor.
            with suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    break
            file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
