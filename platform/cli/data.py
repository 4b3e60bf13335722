"""`headrace data`: prepare token rows, and look at prepared ones."""

from __future__ import annotations

import json
import sys
import time
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from headrace.platform.keys import hint, read_keys
from headrace.storage.core.errors import InputError
from headrace.storage.remote.folder import refuse_remote
from headrace.workers.data.config import DataConfig

USAGE = """\
usage: headrace data prepare source=FILE_OR_FOLDER [out=DIR] [KEY=VALUE ...] [--json]
       headrace data info DIR [--verify] [--json]

prepare  converts text, JSON, Parquet or a folder of source files into rows of tokens on disk
  source=PATH|stdlib     stdlib is the source text of the Python standard library
  out=DIR                folder of the rows; default: a folder below cache_dir, named by its content
  format=auto|text|jsonl|parquet|source_tree
                         jsonl: one object per line, or one array of objects; they have text, messages,
                         conversations (ShareGPT), instruction and output (Alpaca), or a prompt and responses
  tokenizer=PATH         a tokenizer.json or its folder; without it a BPE of bpe_vocab_size=4096 is trained
  seq_len=4096           tokens per sequence
  buckets=512,4096       rows of several lengths, the last one seq_len: a document goes to the shortest that holds it
  share_prompts=false    several responses to one prompt do not share it: each is a document with a prompt of its own
  allow_no_stop=true     also prepare chats that never teach the model to stop
  max_bytes=N            read at most N bytes of the source
  pattern=GLOB           files of a source tree; default: "**/*.py"
  cache_dir=DIR          used if out is not given
  To continue an interrupted preparation, run the same command again.

info     prints the content of a prepared folder (DIR may be a URL, such as s3://bucket/folder); --verify reads all of
         it and checks the digest
"""

_SUBVERBS = ("prepare", "info")
# Settings of a run, not of a preparation.
_NOT_HERE = ("name", "allow_other_tokenizer", "prepared", "eval_fraction", "loader")


def run(argv: Sequence[str]) -> int:
    """Run `headrace data ...`.

    Returns:
        0; 2 when no sub-verb is given; 3 when interrupted (what was prepared so far is kept for the next call).

    Raises:
        InputError: unknown words, keys or values, or bad input files.
    """
    words = [word for word in argv if not word.startswith("-")]
    flags = {word for word in argv if word.startswith("-")}
    if not words:
        print(USAGE, end="")
        return 2
    subverb, rest = words[0], words[1:]
    if subverb not in _SUBVERBS:
        raise InputError(f"no `data {subverb}`; {hint(subverb, _SUBVERBS)}")
    known = {"--json"} if subverb == "prepare" else {"--json", "--verify"}
    for flag in sorted(flags - known):
        raise InputError(f"data {subverb}: unknown flag {flag}; {hint(flag, tuple(known))}")
    try:
        values = _prepare(rest) if subverb == "prepare" else _info(rest, verify="--verify" in flags)
    except KeyboardInterrupt:
        print(f"headrace data {subverb}: interrupted; run the same command again to continue", file=sys.stderr)
        return 3
    if "--json" in flags:
        print(json.dumps(values))
    else:
        _print_table(values)
    return 0


def _prepare(words: Sequence[str]) -> dict[str, Any]:
    from headrace.workers.data.prepare import prepare, prepare_into
    from headrace.workers.data.progress import progress_bar

    values = parse_words(words)
    out = values.pop("out", None)
    if "source" not in values:
        raise InputError("data prepare: source=FILE_OR_FOLDER is missing (source=stdlib needs no download)")
    config = DataConfig(name="data", **values)
    begin = time.perf_counter()
    with progress_bar() as progress:
        data = prepare(config, progress=progress) if out is None else prepare_into(config, out, progress=progress)
    return {"folder": str(data.folder), **data.to_json(), "seconds": round(time.perf_counter() - begin, 2)}


def _info(words: Sequence[str], *, verify: bool) -> dict[str, Any]:
    from headrace.workers.data.opening import open_prepared

    if len(words) != 1:
        raise InputError(f"data info: one prepared folder is expected, got {len(words)} words")
    data = open_prepared(words[0])
    values = {"folder": data.where, **data.to_json()}
    if verify:
        found = data.content_digest()
        if found != data.digest:
            raise InputError(
                f"{data.where}: its rows have the digest {found[:16]}..., meta.json says {data.digest[:16]}...: they "
                "were damaged; prepare them again"
            )
        values["verified"] = True
    return values


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words to typed values of DataConfig's fields, and `out`.

    Raises:
        InputError: a word without `=`, an unknown or repeated key, a value of another type.
    """
    hints = typing.get_type_hints(DataConfig)
    known = {f.name: hints[f.name] for f in fields(DataConfig) if f.name not in _NOT_HERE} | {"out": str}
    values = read_keys([word.removeprefix("data.") for word in words], known)
    for key in ("source", "out", "cache_dir", "tokenizer"):
        if values.get(key) is not None:
            refuse_remote(key, values[key])
    return values


def _print_table(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key == "companions":
            value = ", ".join(value) or "none"
        if key == "buckets":
            value = "; ".join(_bucket_words(**row) for row in value) or "none"
        if isinstance(value, dict):
            value = ", ".join(f"{count} {reason}" for reason, count in value.items()) or "nothing"
            if key == "skipped_examples":
                continue
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(f"{key.replace('_', ' '):<20} {shown}")


def _bucket_words(seq_len: int, num_rows: int, num_tokens: int) -> str:
    full = f", {100 * num_tokens // (num_rows * (seq_len + 1))} % full" if num_rows else ""
    return f"{num_rows:,} rows of {seq_len:,}{full}"
