"""Prepared folders: whole or absent, the same bytes however they came about."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.data import prepare as module
from headrace.workers.data import row_sorter
from headrace.workers.data.config import DataConfig
from headrace.workers.data.prepare import PrepareProgress, prepare, prepare_into
from headrace.workers.data.prepared import PreparedData
from headrace.workers.data.rows import STARTS, TARGET

Config = Callable[..., DataConfig]
WriteJsonl = Callable[..., Path]
TEXTS = [f"document {i} " + "grinds and turns " * (i % 13) for i in range(120)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded_documents(data: PreparedData) -> list[str]:
    """All texts, glued together again over row borders."""
    tokens, flags = np.load(data.tokens_path), np.load(data.flags_path)
    tokenizer = Tokenizer.from_file(str(data.tokenizer_path))
    ids = tokens.ravel()[: data.num_tokens].tolist()
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == data.end_of_document_id:
            documents.append([])
        else:
            documents[-1].append(token)
    assert documents.pop() == []
    assert ((flags & ~np.uint8(STARTS | TARGET)) == 0).all()
    return [tokenizer.decode(document) for document in documents]


def test_rows_hold_the_documents(write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path) -> None:
    data = prepare_into(data_config(write_jsonl([{"text": text} for text in TEXTS])), tmp_path / "out")
    assert decoded_documents(data) == TEXTS
    tokens, flags = np.load(data.tokens_path), np.load(data.flags_path)
    assert tokens.shape == flags.shape == (data.num_rows, 17)
    assert data.num_rows == -(-data.num_tokens // 17)
    assert data.num_documents == len(TEXTS)
    starts = np.flatnonzero(flags.ravel()[: data.num_tokens] & STARTS)
    ends = np.flatnonzero(tokens.ravel()[: data.num_tokens] == data.end_of_document_id)
    assert set(starts) == {0, *(ends[:-1] + 1), *range(0, data.num_tokens, 17)}
    assert data.num_target_tokens == data.num_tokens - len(starts)
    assert data.digest == data.content_digest()
    assert data.source_bytes == sum(map(len, TEXTS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source.jsonl"]


@pytest.mark.parametrize(("seq_len", "said"), [(16, None), (500, "on average"), (5000, "only")])
def test_rows_far_longer_than_the_data_are_said(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path, seq_len: int, said: str | None
) -> None:
    source = write_jsonl([{"text": "ab"}] * 400)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = prepare_into(data_config(source, seq_len=seq_len), tmp_path / "rows")
        assert prepare(data_config(source, seq_len=seq_len, prepared=str(tmp_path / "rows"))) == data
    words = [str(warning.message) for warning in caught if "data.seq_len" in str(warning.message)]
    assert len(words) == (0 if said is None else 2)
    assert all(str(said) in text and f"data.seq_len={seq_len}" in text for text in words)


def test_a_chat_counts_its_assistant_only(write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "turn the wheel"}, {"role": "assistant", "content": "it turns"}]
    data = prepare_into(data_config(write_jsonl([{"messages": chat}] * 5), seq_len=300), tmp_path / "out")
    tokens, flags = np.load(data.tokens_path), np.load(data.flags_path)
    tokenizer = Tokenizer.from_file(str(data.tokenizer_path))
    targets = tokens[(flags & TARGET) != 0].tolist()
    assert tokenizer.decode(targets, skip_special_tokens=False) == "it turns<|endoftext|>" * 5


def test_the_cache_is_keyed_by_what_goes_in(write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path) -> None:
    path = write_jsonl([{"text": text} for text in TEXTS])
    cache = str(tmp_path / "cache")
    calls: list[PrepareProgress] = []
    first = prepare(data_config(path, cache_dir=cache), progress=calls.append)
    assert calls[-1].done_bytes == calls[-1].total_bytes == path.stat().st_size
    calls.clear()
    assert prepare(data_config(path, cache_dir=cache), progress=calls.append) == first
    assert not calls
    others = [
        prepare(data_config(path, cache_dir=cache, seq_len=17)),
        prepare(data_config(path, cache_dir=cache, bpe_vocab_size=301)),
        prepare(data_config(path, cache_dir=cache, tokenizer=str(first.folder))),
        prepare(data_config(path, cache_dir=cache, max_bytes=1000)),
    ]
    os.utime(path, ns=(1, 1))
    others.append(prepare(data_config(path, cache_dir=cache)))
    assert len({data.folder for data in [first, *others]}) == 6
    assert others[2].digest == others[4].digest == first.digest
    assert others[3].source_bytes < 1100
    assert prepare(data_config(path, prepared=str(first.folder))) == first


def test_a_folder_of_ones_own_is_not_overwritten(write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path) -> None:
    config = data_config(write_jsonl([{"text": text} for text in TEXTS]))
    data = prepare_into(config, tmp_path / "out")
    before = contents(data.folder)
    assert prepare_into(config, tmp_path / "out") == data
    with pytest.raises(InputError, match="holds other data already"):
        prepare_into(data_config(config.source, bpe_vocab_size=290), tmp_path / "out")
    with pytest.raises(InputError, match=r"data.seq_len=16, the run has data.seq_len=8"):
        prepare_into(data_config(config.source, seq_len=8), tmp_path / "out")
    assert contents(data.folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(InputError, match="mine: exists and is not a prepared data folder"):
        prepare_into(config, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"do not lose"}


def test_a_tokenizer_that_did_not_make_the_rows_is_refused(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path
) -> None:
    path = write_jsonl([{"text": text} for text in TEXTS])
    ours = prepare_into(data_config(path), tmp_path / "ours")
    other = prepare_into(data_config(path, bpe_vocab_size=290), tmp_path / "other")
    prepared = str(ours.folder)
    assert prepare(data_config(path, prepared=prepared, tokenizer=str(ours.tokenizer_path))) == ours
    with pytest.raises(InputError, match=r"data.tokenizer=.*other.*: data.prepared=.* was made with another tokenizer"):
        prepare(data_config(path, prepared=prepared, tokenizer=str(other.folder)))


@pytest.mark.parametrize(
    ("place", "reason"),
    [("file/out", "File exists"), ("file/a/b", "Not a directory"), ("x" * 300, "File name too long")],
)
def test_a_folder_that_cannot_be_is_named(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path, place: str, reason: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    config = data_config(write_jsonl([{"text": text} for text in TEXTS]))
    with pytest.raises(InputError, match=rf"cannot be made \({reason}\); choose another folder"):
        prepare_into(config, tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source.jsonl"]


KILLED = """
import os, signal, sys
from headrace.workers.data import prepare as module
from headrace.workers.data.config import DataConfig
module.BATCH_BYTES, module.COMMIT_BYTES = 200, int(sys.argv[4])
calls = 0
def progress(_):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
config = DataConfig(name="t", source=sys.argv[1], bpe_vocab_size=300, seq_len=16)
module.prepare_into(config, sys.argv[2], progress=progress)
"""


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl([{"text": text} for text in TEXTS] + [{"text": ""}])
    whole = contents(prepare_into(data_config(path), tmp_path / "whole").folder)
    out = tmp_path / "out"
    for kill_at, commit_bytes in ((1, 1), (20, 1), (15, 2000)):
        words = [sys.executable, "-c", KILLED, str(path), str(out), str(kill_at), str(commit_bytes)]
        assert subprocess.run(words, check=False).returncode == -9
        assert not out.exists()
    journal = json.loads((tmp_path / "out.partial" / "journal.json").read_text())
    assert journal["positions"] > [500]
    first_pieces: list[Any] = []
    original = module.read_pieces
    monkeypatch.setattr(
        module, "read_pieces", lambda *args, **kw: first_pieces.append(kw["start"]) or original(*args, **kw)
    )
    resumed = prepare_into(data_config(path), out)
    assert first_pieces[0].record == journal["cursor"]["record"] > 40
    assert contents(out) == whole
    assert resumed.num_documents == len(TEXTS)
    assert resumed.skipped == {"empty": 1}
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("damage", ["source", "truncate", "journal", "settings"])
def test_a_partial_folder_that_does_not_fit_is_started_anew(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path, interrupt: Callable[..., None], damage: str
) -> None:
    path = write_jsonl([{"text": text} for text in TEXTS])
    config = data_config(path)
    partial = tmp_path / "out.partial"
    interrupt(config, tmp_path / "out", stop_at=15, batch_bytes=200)  # after a third
    if damage == "source":
        write_jsonl([{"text": "something else altogether " * 30}])
    elif damage == "truncate":
        os.truncate(partial / "flags.npy", 200)
    elif damage == "journal":
        (partial / "journal.json").write_text('{"key": 5')
    else:
        config = data_config(path, seq_len=20)
    assert contents(prepare_into(config, tmp_path / "out").folder) == contents(
        prepare_into(config, tmp_path / "fresh").folder
    )


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([{"text": "fine"}] * 90 + ["{broken"], "source.jsonl line 91: not a JSON object"),
        ([{"text": ""}] * 3, r"no text in it \(left out: 3 empty\)"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "none of its .* tokens is a target"),
    ],
)
def test_bad_input_leaves_nothing(
    write_jsonl: WriteJsonl,
    data_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    records: list[Any],
    reason: str,
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 10)
    monkeypatch.setattr(module, "COMMIT_BYTES", 1)
    # The training sample must not be what finds the fault.
    tokenizer = prepare_into(data_config(write_jsonl([{"text": text} for text in TEXTS], "ok.jsonl")), tmp_path / "ok")
    config = data_config(write_jsonl(records), tokenizer=str(tokenizer.tokenizer_path))
    with pytest.raises(InputError, match=reason):
        prepare_into(config, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_leaves_nothing(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullWriter(row_sorter.RowWriter):
        def append(self, *args: Any, **kw: Any) -> None:
            if self.position > 100:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / "tokens.npy"))
            super().append(*args, **kw)

    monkeypatch.setattr(row_sorter, "RowWriter", FullWriter)
    config = data_config(write_jsonl([{"text": text} for text in TEXTS]))
    with pytest.raises(MachineError, match=r"out.partial/tokens.npy: cannot write token rows \(No space left"):
        prepare_into(config, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_small_file_system_leaves_nothing(data_config: Config, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], check=False)
    if done.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with pytest.raises(MachineError, match=r"No space left on device, .* GiB free there"):
            prepare_into(data_config("stdlib", max_bytes=500_000), mount / "out")
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_source_that_changes_meanwhile_is_refused(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path
) -> None:
    path = write_jsonl([{"text": text} for text in TEXTS])

    def touch(_: PrepareProgress) -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(InputError, match="changed while it was read"):
        prepare_into(data_config(path), tmp_path / "out", progress=touch)
    assert not list(tmp_path.glob("out*"))


def test_preparing_the_same_thing_at_once_is_safe(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = data_config(write_jsonl([{"text": text} for text in TEXTS]), cache_dir=str(tmp_path / "cache"))
    builds: list[Path] = []
    original = module._build
    monkeypatch.setattr(module, "_build", lambda r, partial, p: builds.append(partial) or original(r, partial, p))
    results: list[PreparedData] = []
    threads = [threading.Thread(target=lambda: results.append(prepare(config))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(results) == 8
    assert all(data == results[0] for data in results)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [results[0].folder.name]


@pytest.mark.parametrize(
    ("values", "reason"), [({"seq_len": 0}, "data.seq_len=0"), ({"max_bytes": 0}, "data.max_bytes=0: at least 1")]
)
def test_impossible_settings_are_named(data_config: Config, values: dict[str, int], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        prepare(data_config("stdlib", **values))
