from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from headrace.bench import harness
from headrace.bench.harness import Row, Target
from headrace.platform.cli import main as main_module
from headrace.platform.cli.main import main
from headrace.platform.paths import RESULTS_DIR


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("toy_bench")
    module.DESCRIPTION, module.OPTIONS = "a toy", {"bad": False}  # type: ignore[attr-defined]
    rows = [Row("one", {"s": 0.25, "none": None}, target=Target("at most 0.1 s", met=False))]
    failed = Row("two", error="out of memory")
    module.run = lambda options: [*rows, failed] if options["bad"] else rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_bench", module)
    monkeypatch.setitem(harness.BENCHES, "toy", "toy_bench")


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    assert "toy" in out
    assert "gpu-headline" in out
    assert main(["bench", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["toy"] == "a toy"


def test_rows_are_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "toy", f"out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "one: s=0.25  [NOT MET: at most 0.1 s]" in out
    assert main(["bench", "toy", "bad=true", f"out={tmp_path}", "--json"]) == 1, "a row with an error is a failure"
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"][1]["error"] == "out of memory"
    assert "two: out of memory" in captured.err


def test_rows_go_where_git_does_not_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "toy"]) == 0
    assert [path.parent for path in tmp_path.rglob("*.json")] == [tmp_path / RESULTS_DIR / "toy"]
    assert f"{RESULTS_DIR}/" in (repo_root / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("words", [["nope"], ["toy", "x=1"], ["toy", "--fast"], []])
def test_bad_words_are_exit_code_2(words: list[str]) -> None:
    assert main(["bench", *words]) == 2


def test_without_a_checkout_a_sentence_says_where_benchmarks_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The finder of an editable install finds headrace.bench whatever the test hides: another name stands for it.
    absent = "headrace.absent"
    monkeypatch.setattr(main_module, "BENCHES", absent)
    monkeypatch.setitem(main_module.VERBS, "bench", main_module.Verb(f"{absent}.command", ""))
    assert main(["bench", "kernels"]) == 2
    assert "run them from a checkout" in capsys.readouterr().err
