"""Where tokens come from. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Loader(StrEnum):
    """Who reads the token rows; both yield the same batches."""

    dali = "dali"
    memmap = "memmap"


class SourceFormat(StrEnum):
    """What the input files hold. `auto` goes by file name; `jsonl` is JSON, one object a line or one array of them."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    source_tree = "source_tree"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The token data set of a run.

    Args:
        name: for people and run names.
        source: file or folder to prepare; "stdlib" is the source text of the running interpreter's standard library.
        format: how to read `source`.
        tokenizer: a Hugging Face tokenizer.json (or its folder); None takes that of model.init_from, and without one
            trains a BPE of `bpe_vocab_size` on the source.
        allow_other_tokenizer: with model.init_from: allow ids of another tokenizer than the folder's.
        prepared: folder of token rows (`headrace data prepare` writes it), or the URL of one, as s3://bucket/folder,
            whose rows are fetched as they are read; None means a cache folder keyed by content.
        cache_dir: where prepared folders are kept when `prepared` is None.
        seq_len: tokens per sequence (the model sees seq_len inputs and as many shifted targets).
        eval_fraction: share of the rows held out for evaluation.
        pattern: glob of files in a source tree.
        allow_no_stop: prepare chats that nowhere teach the model to stop.
        max_bytes: stop reading the source after this many bytes; None means all.
    """

    name: str
    source: str = "stdlib"
    format: SourceFormat = SourceFormat.auto
    tokenizer: str | None = None
    allow_other_tokenizer: bool = False
    bpe_vocab_size: int = 4096
    prepared: str | None = None
    cache_dir: str = "data_cache"
    seq_len: int = 4096
    eval_fraction: float = 0.02
    loader: Loader = Loader.dali
    pattern: str = "**/*.py"
    allow_no_stop: bool = False
    max_bytes: int | None = None
