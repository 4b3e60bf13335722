"""Tokenizers, data, prepared folders, configurations and records made to harm: a sentence and exit code 2, nothing run.

Run folders with hostile checkpoints are in test_hostile_runs.py.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from headrace.helpers.training import Bomb
from headrace.platform.cli.main import main
from headrace.platform.config.load import config_text, load_run_config
from headrace.storage.core.errors import InputError
from headrace.workers.data import tokenizer_files
from headrace.workers.data.config import DataConfig
from headrace.workers.data.prepare import prepare_into
from headrace.workers.data.readers import Cursor, ReadTally, read_pieces
from headrace.workers.data.sources import find_source

DEEP = b"[" * 200_000
# (folder, a pickle that makes a folder when it is loaded)
Attack = Callable[[Path, bytes], object]
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def content(name: str, data: bytes) -> Attack:
    return lambda folder, bomb: (folder / name).write_bytes(data)


def pickled(name: str) -> Attack:
    return lambda folder, bomb: (folder / name).write_bytes(bomb)


def instead(name: str, make: Callable[[Path], object]) -> Attack:
    """Something else in the place of a file."""

    def attack(folder: Path, bomb: bytes) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return attack


def no_files(name: str) -> dict[str, Attack]:
    """What is no file, in place of one."""
    return {
        f"{name} is a pipe": instead(name, os.mkfifo),
        f"{name} is a device": instead(name, lambda path: path.symlink_to("/dev/zero")),
        f"{name} is a folder": instead(name, Path.mkdir),
        f"{name} is a link to itself": instead(name, lambda path: path.symlink_to(path)),
    }


def changed(name: str, **values: Any) -> Attack:
    def attack(folder: Path, bomb: bytes) -> None:
        given = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**given, **values}))

    return attack


def refused(verb: list[str], capsys: pytest.CaptureFixture[str], canary: Path) -> None:
    code = main(verb)
    said = capsys.readouterr().err
    assert code == 2, said
    assert f"headrace {verb[0]}: " in said
    assert "Traceback" not in said
    assert not canary.exists()


def panicking() -> bytes:
    """A tokenizer in which the library's own code panics."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    values = json.loads(tokenizer.to_str())
    values["post_processor"]["single"][0]["SpecialToken"]["id"] = ""
    return json.dumps(values).encode()


TOKENIZERS: dict[str, Attack] = {
    **no_files("tokenizer.json"),
    **no_files("tokenizer_config.json"),
    **no_files("chat_template.jinja"),
    "a pickle": pickled("tokenizer.json"),
    "a companion is a pickle": pickled("special_tokens_map.json"),
    "another schema": content("tokenizer.json", b'{"version": "9.0", "model": {"type": "Evil", "run": "x"}}'),
    "a list": content("tokenizer.json", b"[]"),
    "deep": content("tokenizer.json", DEEP),
    "deep in the schema": changed("tokenizer.json", normalizer=json.loads('{"a":' * 300 + "1" + "}" * 300)),
    "a model of text": changed("tokenizer.json", model="BPE"),
    "a vocabulary of ids below zero": changed(
        "tokenizer.json", model={"type": "BPE", "vocab": {"a": -1}, "merges": []}
    ),
    "merges of what is not there": changed(
        "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}
    ),
    "no vocabulary": changed("tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
    "a panic": content("tokenizer.json", panicking()),
    "large": content("tokenizer.json", b" " * 2_000_000),
    "a large companion": content("added_tokens.json", b" " * 2_000_000),
    "a deep companion": content("tokenizer_config.json", DEEP),
    "a deep map": content("special_tokens_map.json", b'{"eos_token": ' + DEEP),
    "an end that is a list": content("special_tokens_map.json", b'["</s>"]'),
    "added tokens that are a bomb of ids": content("added_tokens.json", b'{"x": 99999999999999999999}'),
    "ends that are objects": content("generation_config.json", b'{"eos_token_id": [{"__reduce__": 1}]}'),
    "ends below zero": content("generation_config.json", b'{"eos_token_id": -1}'),
    "a deep generation_config": content("generation_config.json", DEEP),
}


@pytest.mark.parametrize("attack", TOKENIZERS)
def test_a_hostile_tokenizer_ends_in_a_sentence(
    attack: str, tmp_path: Path, canary: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_files, "MAX_TOKENIZER_BYTES", 1_000_000)
    monkeypatch.setattr(tokenizer_files, "MAX_COMPANION_BYTES", 1_000_000)
    folder, source = tmp_path / "tokenizer", tmp_path / "a.jsonl"
    folder.mkdir()
    tokenizer = Tokenizer(
        models.BPE({"</s>": 0, **{c: i + 1 for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source.write_text(json.dumps({"messages": chat}) + "\n")
    words = ["data", "prepare", f"source={source}", "seq_len=4", f"tokenizer={folder}"]
    assert main([*words, f"out={tmp_path / 'good'}"]) == 0
    TOKENIZERS[attack](folder, pickle.dumps(Bomb(canary)))
    refused([*words, f"out={tmp_path / 'rows'}"], capsys, canary)
    assert not list(tmp_path.glob("rows*"))


def object_array(folder: Path, bomb: bytes) -> None:
    """A .npy of Python objects: NumPy unpickles it where it is allowed to."""
    np.save(folder / "tokens.npy", np.array([pickle.loads(b"N."), Bomb(folder.parent / "executed")]), allow_pickle=True)


PREPARED: dict[str, Attack] = {
    **no_files("meta.json"),
    **no_files("tokens.npy"),
    **no_files("tokenizer.json"),
    "meta is a pickle": pickled("meta.json"),
    "meta is deep": content("meta.json", DEEP),
    "meta is deep in a value": content("meta.json", b'{"schema_version": 2, "skipped": ' + DEEP),
    "meta is a list": content("meta.json", b"[]"),
    "meta is empty": content("meta.json", b""),
    "rows are text": changed("meta.json", num_rows="12"),
    "rows are below zero": changed("meta.json", num_rows=-1),
    "rows are very many": changed("meta.json", num_rows=10**30),
    "rows are more than there are": changed("meta.json", num_rows=10**12),
    "rows are true": changed("meta.json", num_rows=True),
    "a vocabulary beyond all numbers": changed("meta.json", vocab_size=10**30),
    "a digest that is a list": changed("meta.json", digest=[]),
    "skipped is a list": changed("meta.json", skipped=[1]),
    "companions outside": changed("meta.json", companions={"../../etc/passwd": ""}),
    "companions that are absolute": changed("meta.json", companions={"/etc/passwd": ""}),
    "companions outside by their folder": changed(
        "meta.json", companions={"additional_chat_templates/../../x.jinja": ""}
    ),
    "companions that are a list": changed("meta.json", companions=["chat_template.jinja"]),
    "companions that are missing": changed("meta.json", companions={"chat_template.jinja": ""}),
    "tokens are a pickle": pickled("tokens.npy"),
    "tokens are objects": object_array,
    "tokens are cut": content("tokens.npy", b"\x93NUMPY"),
    "flags are a pickle": pickled("flags.npy"),
}


@pytest.mark.parametrize("attack", PREPARED)
def test_a_hostile_prepared_folder_ends_in_a_sentence(attack: str, tmp_path: Path, canary: Path, capsys) -> None:
    source, rows = tmp_path / "a.txt", tmp_path / "rows"
    source.write_text("the river turns a wheel " * 9)
    prepare_into(DataConfig(name="t", source=str(source), bpe_vocab_size=300, seq_len=8), rows)
    assert main(["data", "info", str(rows), "--verify"]) == 0
    PREPARED[attack](rows, pickle.dumps(Bomb(canary)))
    refused(["data", "info", str(rows)], capsys, canary)


def test_damaged_parquet_files_are_named_and_end_no_process(tmp_path: Path) -> None:
    """Random bytes of small files: in one of them pyarrow ended the process when it was asked about a column."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path, draw, outcomes = tmp_path / "a.parquet", random.Random(1), [0, 0]
    for table in (
        pa.table({"text": ["a" * 50, "b", None, "x" * 9] * 5}),
        pa.table({"messages": [chat, [{**chat[0], "name": "x"}]] * 5, "tools": ["[]", "[{}]"] * 5}),
    ):
        pq.write_table(table, path)
        whole = path.read_bytes()
        cases = [whole[:end] for end in range(0, len(whole), 97)]
        for _ in range(250):
            damaged = bytearray(whole)
            for _ in range(draw.choice([1, 1, 2, 5])):
                damaged[draw.randrange(len(whole))] = draw.randrange(256)
            cases.append(bytes(damaged))
        for case in cases:
            path.write_bytes(case)
            config = DataConfig(name="t", source=str(path))
            try:
                list(read_pieces(find_source(config), start=Cursor(), tally=ReadTally(), max_bytes=None))
                outcomes[0] += 1
            except InputError:
                outcomes[1] += 1
    assert min(outcomes) > 50


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([b"a", b"b"]),
        pa.array([["a"], ["b"]]),
        pa.array([{"text": "a"}, {"text": "b"}]),
        pa.array([2**62, 2**62], pa.timestamp("us")),
        pa.array([None, 1], pa.decimal128(38, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["text", "messages", "conversations"])
def test_columns_of_another_type_are_named(name: str, column: pa.Array, tmp_path: Path, canary: Path, capsys) -> None:
    pq.write_table(pa.table({name: column}), tmp_path / "a.parquet")
    refused(["data", "prepare", f"source={tmp_path / 'a.parquet'}", f"out={tmp_path / 'rows'}"], capsys, canary)
    assert not list(tmp_path.glob("rows*"))


ALIASES = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS: dict[str, Attack] = {
    **no_files("config.yaml"),
    "config.yaml is a pickle": pickled("config.yaml"),
    "config.yaml has an object": content("config.yaml", b"model: !!python/object/apply:os.mkdir [executed]"),
    "config.yaml is deep": content("config.yaml", b"model: " + DEEP),
    "config.yaml grows": content("config.yaml", b"a: &a [1, 1]\n" + ALIASES.encode()),
    "config.yaml is large": content("config.yaml", b"# " + b"x" * (2 << 20)),
    "config.yaml is a list": content("config.yaml", b"[1, 2]"),
    "config.yaml has text for a part": content("config.yaml", b"model: hello"),
    "config.yaml is not UTF-8": content("config.yaml", b"run: {name: '\xff'}"),
}


@pytest.fixture(scope="module")
def saved() -> str:
    """The content of a good config.yaml."""
    return config_text(load_run_config(["debug=cpu_tiny"], environ={}).config)


@pytest.mark.parametrize("attack", CONFIGS)
def test_a_hostile_configuration_is_not_resumed(attack: str, saved: str, tmp_path: Path, canary: Path, capsys) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(saved)
    CONFIGS[attack](run_dir, pickle.dumps(Bomb(canary)))
    refused(["train", "--resume", str(run_dir), "--dry-run"], capsys, canary)


SCRIPT = "<script>alert(1)</script>"
STEP = {"step": 1, "loss": 2.0, "grad_norm": 1.0}
RECORDS: dict[str, Attack] = {
    **no_files("metrics.jsonl"),
    **no_files("summary.json"),
    **no_files("plan.json"),
    **no_files("transfers.parquet"),
    **no_files("config.yaml"),
    "metrics are a pickle": pickled("metrics.jsonl"),
    "metrics are deep": content("metrics.jsonl", DEEP + b"\n" + json.dumps(STEP).encode() + b"\n"),
    "metrics are text": content(
        "metrics.jsonl", json.dumps({**STEP, "loss": SCRIPT, "perf/step_s": SCRIPT}).encode() + b"\n"
    ),
    "summary is a script": content(
        "summary.json",
        json.dumps(
            {"num_ranks": SCRIPT, "outcome": SCRIPT, "facts": SCRIPT, "provenance": {"commit": SCRIPT}}
        ).encode(),
    ),
    "summary has other types": content("summary.json", b'{"started_unix_s": "x", "num_steps": [], "provenance": [1]}'),
    "plan has other types": content("plan.json", b'{"layers": [1, [], null], "predicted": 5}'),
    "plan is a script": content("plan.json", json.dumps({"layers": [{SCRIPT: SCRIPT}], SCRIPT: SCRIPT}).encode()),
    "plan is deep": content("plan.json", b'{"layers": ' + DEEP),
    "transfers are a pickle": pickled("transfers.parquet"),
    "transfers have other columns": lambda folder, bomb: pq.write_table(
        pa.table({"x": [1]}), folder / "transfers.parquet"
    ),
    "events are scripts": content(
        "events.jsonl", json.dumps({"kind": SCRIPT, "text": SCRIPT, "unix_s": 1e300}).encode() + b"\n"
    ),
}


@pytest.mark.parametrize("attack", RECORDS)
def test_a_report_of_hostile_records_is_a_page_or_a_sentence(attack: str, tmp_path: Path, canary: Path, capsys) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("run: {name: x}\n")
    (run_dir / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    RECORDS[attack](run_dir, pickle.dumps(Bomb(canary)))
    code = main(["report", str(run_dir)])
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert "Traceback" not in said
    assert not canary.exists()
    if code == 0:
        assert "<script" not in (run_dir / "report.html").read_text()


def test_a_pipe_as_data_is_no_file(tmp_path: Path, canary: Path, capsys) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "folder").mkdir()
    shutil.copyfile(__file__, tmp_path / "folder" / "a.txt")
    os.mkfifo(tmp_path / "folder" / "b.jsonl")
    refused(["data", "prepare", f"source={tmp_path / 'a.jsonl'}", f"out={tmp_path / 'rows'}"], capsys, canary)
    words = [f"source={tmp_path / 'folder'}", f"out={tmp_path / 'rows'}", "seq_len=64"]
    assert main(["data", "prepare", *words]) == 0  # a pipe beside the files is passed over
