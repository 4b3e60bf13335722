from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.platform.cli.main import main


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("a: 1\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "loss/train": 2.0}\n{"step": 2, "lo')
    return folder


@pytest.mark.parametrize("words", [["runs/one"], ["run=runs/one"], ["one"], ["last"], [""], []])
def test_the_page_is_written(run_dir: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    assert "<svg" in (run_dir / "report.html").read_text()


def test_for_programs(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(run_dir / "report.html")


@pytest.mark.parametrize("words", [["nope"], ["runs"], ["one", "two"], ["one", "--open"]])
def test_bad_words_are_exit_code_2(run_dir: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    assert "headrace report:" in capsys.readouterr().err
