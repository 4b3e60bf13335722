"""`headrace data`: words to settings, settings to folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.platform.cli import data as verb
from headrace.platform.cli.main import main
from headrace.storage.core.errors import InputError
from headrace.workers.data.config import SourceFormat


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("the mill grinds and grinds\n" * 50)
    return path


def test_prepare_and_info(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["data", "prepare", f"source={source}", f"out={out}", "seq_len=16", "bpe_vocab_size=280", "--json"]
    assert main(words) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["folder"] == str(out)
    assert made["seq_len"] == 16
    assert main(["data", "info", str(out), "--verify", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown.pop("verified") is True
    assert shown == {key: value for key, value in made.items() if key != "seconds"}
    assert main(["data", "info", str(out)]) == 0
    assert f"num rows             {made['num_rows']}\n" in capsys.readouterr().out


def test_a_damaged_folder_is_found_by_verify(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["data", "prepare", f"source={source}", f"out={out}", "seq_len=16", "bpe_vocab_size=280"]) == 0
    raw = bytearray((out / "tokens.npy").read_bytes())
    raw[200] ^= 1
    (out / "tokens.npy").write_bytes(raw)
    assert main(["data", "info", str(out)]) == 0
    assert main(["data", "info", str(out), "--verify"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_words_become_typed_settings() -> None:
    words = [
        "source=x",
        "format=jsonl",
        "seq_len=1_024",
        "data.max_bytes=null",
        "tokenizer=None",
        "out=y",
        "pattern=*.c",
    ]
    assert verb.parse_words(words) == {
        "source": "x",
        "format": SourceFormat.jsonl,
        "seq_len": 1024,
        "max_bytes": None,
        "tokenizer": None,
        "out": "y",
        "pattern": "*.c",
    }


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["prepare", "sorce=x"], r"no key 'sorce'; did you mean `source`\?"),
        (["prepare", "source=x", "loader=dali"], "no key 'loader'"),
        (["prepare", "source"], "'source' is not KEY=VALUE"),
        (["prepare", "source="], "source= has no value"),
        (["prepare", "source=x", "source=y"], "source is given twice"),
        (["prepare", "source=x", "seq_len=4k"], "seq_len=4k: a whole number"),
        (["prepare", "source=x", "format=json"], r"format=json: one of auto, .*did you mean `jsonl`\?"),
        (["prepare", "out=x"], "source=FILE_OR_FOLDER is missing"),
        (["prepare", "source=x", "--jsn"], r"unknown flag --jsn; did you mean `--json`\?"),
        (["prepare", "source=/nowhere/at/all"], "/nowhere/at/all: cannot be read"),
        (["prepair"], r"no `data prepair`; did you mean `prepare`\?"),
        (["info"], "one prepared folder is expected, got 0"),
        (["info", "/nowhere"], "/nowhere: not a prepared data folder"),
    ],
)
def test_wrong_words_are_explained(words: list[str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        verb.run(words)


def test_an_interrupted_preparation_says_how_to_go_on(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("headrace.workers.data.prepare.prepare", stop)
    assert main(["data", "prepare", f"source={source}"]) == 3
    assert "run the same command again" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    assert verb.run([]) == 2
    assert "headrace data prepare source=" in capsys.readouterr().out
