"""Where tokens come from. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
        bpe_vocab_size: tokens of that BPE.
        prepared: folder of token rows (`headrace data prepare` writes it), or the URL of one, as s3://bucket/folder,
            whose rows are fetched as they are read; None means a cache folder keyed by content.
        cache_dir: where prepared folders are kept when `prepared` is None.
        seq_len: tokens per sequence (the model sees seq_len inputs and as many shifted targets).
        buckets: lengths of rows, ascending, the last one seq_len. A document goes to the shortest row that holds it; a
            micro-batch has rows of one length, as many as the tokens of train.batch_size rows of seq_len allow. Empty:
            all rows have seq_len tokens, and a document may continue in the next row.
        eval_fraction: share of the rows held out for evaluation.
        pattern: glob of files in a source tree.
        share_prompts: several responses to one prompt share it in a row; false: each is a document with its own prompt.
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
    buckets: list[int] = field(default_factory=list)
    eval_fraction: float = 0.02
    loader: Loader = Loader.dali
    pattern: str = "**/*.py"
    share_prompts: bool = True
    allow_no_stop: bool = False
    max_bytes: int | None = None


def bucket_problem(buckets: Sequence[int], seq_len: int) -> str | None:
    """What is wrong with the lengths of rows, as one sentence with the remedy; None where nothing is."""
    given = f"data.buckets={words_of(buckets)}"
    if not buckets:
        return None
    if short := [length for length in buckets if length < 1]:
        return f"{given}: a row of {short[0]} tokens; give lengths of at least 1"
    right = sorted({*buckets, seq_len})
    right = right[: right.index(seq_len) + 1]
    if list(buckets) == right:
        return None
    remedy = f"give data.buckets={words_of(right)}"
    if max(buckets) != seq_len:
        remedy += f", or data.seq_len={max(buckets)} data.buckets={words_of(sorted(set(buckets)))}"
    return f"{given}: lengths ascend, each is there once, and the last one is data.seq_len={seq_len}; {remedy}"


def words_of(buckets: Sequence[int]) -> str:
    """The lengths as they are typed."""
    return ",".join(map(str, buckets))


def bucket_batch(batch_size: int, seq_len: int, length: int) -> int:
    """Rows of a micro-batch of rows of `length` tokens: no more tokens than batch_size rows of seq_len have."""
    return batch_size * seq_len // length
