"""Opening a prepared folder: what does not fit or is damaged is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from headrace.storage.core.errors import InputError
from headrace.workers.data.opening import open_prepared
from headrace.workers.data.prepared import SCHEMA_VERSION, PreparedData


@pytest.fixture
def folder(prepared_data: PreparedData, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared_data.folder, tmp_path / "copy"))


def test_a_folder_may_be_moved(prepared_data: PreparedData, folder: Path) -> None:
    moved = open_prepared(folder, seq_len=32, vocab_size=prepared_data.vocab_size)
    assert moved.to_json() == prepared_data.to_json()
    assert moved.folder == folder
    assert moved.content_digest() == moved.digest
    assert moved.tokenizer_path.is_file()


def test_another_length_or_vocabulary_is_named(prepared_data: PreparedData, folder: Path) -> None:
    with pytest.raises(InputError, match=r"rows of data.seq_len=32, the run has data.seq_len=64"):
        open_prepared(folder, seq_len=64)
    last = prepared_data.vocab_size - 1
    with pytest.raises(
        InputError, match=rf"token ids go up to {last} but model.vocab_size={last}; use the model's own"
    ):
        open_prepared(folder, vocab_size=last)
    open_prepared(folder, vocab_size=last + 100)


@pytest.mark.parametrize("name", ["tokens.npy", "flags.npy"])
def test_a_damaged_array_is_named(folder: Path, name: str) -> None:
    path = folder / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(InputError, match=rf"{name}: {size - 1} bytes, .* rows need {size}: truncated"):
        open_prepared(folder)
    array = np.zeros((size - 128) // 4, dtype=np.int32)
    np.save(path, array)
    os.truncate(path, size)
    with pytest.raises(InputError, match=rf"{name}: its header is not that of"):
        open_prepared(folder)
    path.unlink()
    with pytest.raises(InputError, match=rf"{name}: missing"):
        open_prepared(folder)


def test_a_flipped_bit_changes_the_digest(folder: Path) -> None:
    raw = bytearray((folder / "flags.npy").read_bytes())
    raw[500] ^= 2
    (folder / "flags.npy").write_bytes(raw)
    data = open_prepared(folder)
    assert data.content_digest() != data.digest


def test_what_is_no_prepared_folder_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: not a prepared data folder \(no meta.json\)"):
        open_prepared(tmp_path / "nowhere")
    meta = json.loads((folder / "meta.json").read_text())
    for values, reason in (
        ({**meta, "schema_version": 99}, f"schema_version 99, this version of headrace reads {SCHEMA_VERSION}"),
        ({**meta, "extra": 1}, r"missing or unknown keys \['extra'\]"),
        ({k: v for k, v in meta.items() if k != "digest"}, r"missing or unknown keys \['digest'\]"),
        ([], "schema_version None"),
        ({**meta, "num_rows": "12"}, "num_rows='12', int is wanted"),
        ({**meta, "num_rows": 0}, "num_rows=0, a whole number above 0 is expected"),
        ({**meta, "vocab_size": True}, "vocab_size=True, int is wanted"),
    ):
        (folder / "meta.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match=reason):
            open_prepared(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(InputError, match=r"meta.json: cannot be read"):
        open_prepared(folder)
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer.json: missing"):
        open_prepared(folder)
