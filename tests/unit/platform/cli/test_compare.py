from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.platform.cli.main import main


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, lr in (("one", 1), ("two", 2)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"optim: {{lr: {lr}}}\n")
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "loss/train": 2.0}\n{"step": 2, "lo')
        (folder / "summary.json").write_text('{"outcome": "finished"}')
    return tmp_path / "runs"


def test_a_table_is_printed_and_a_page_written(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "one", "runs/two"]) == 0
    out = capsys.readouterr().out
    assert "optim.lr: 1 | 2" in out
    assert out.strip().endswith("comparison.html")
    assert "<svg" in (runs_dir / "comparison.html").read_text()


def test_runs_that_make_passes(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADRACE_RUNS", "one 'runs/two'")
    assert main(["compare"]) == 0
    monkeypatch.setenv("HEADRACE_RUNS", "one 'two")
    assert main(["compare"]) == 2
    assert "close the quote" in capsys.readouterr().err


def test_for_programs(runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "one", "two", "out=x.html", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == "x.html"
    assert (tmp_path / "x.html").exists()
    assert found["config"] == {"optim.lr": ["1", "2"]}
    assert [run["figures"]["loss"] for run in found["runs"]] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["one"], "at least two runs"),
        (["one", "nope"], "run=nope"),
        (["one", "runs/../runs/one"], "given twice"),
        (["one", "two", "--open"], "--open"),
        (["one", "two", "out="], "out="),
        (["one", "two", "out=a/b/c.html"], "out=a/b/c.html"),
    ],
)
def test_bad_words_are_exit_code_2(
    runs_dir: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "a: [\n"),
        ("plan.json", '{"layers": 5, "table": 5}'),
        ("summary.json", '{"outcome": "finished", "facts": {"data": 5}, "provenance": []}'),
        ("metrics.jsonl", '{"step": 1, "perf/step_s": "x"}\n'),
    ],
)
def test_odd_files_end_in_a_sentence(
    runs_dir: Path, file: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs_dir / "two" / file).write_text(content)
    code = main(["compare", "one", "two"])
    assert code == (2 if file in ("config.yaml", "plan.json") else 0)
    if code:
        assert file in capsys.readouterr().err
