from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.helpers.training import FOREIGN_HOST, FOREIGN_KEEP
from headrace.platform.cli.main import main
from headrace.platform.report import page
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry import names

PLAN = MemoryPlan(
    "auto", (FOREIGN_HOST, FOREIGN_KEEP), predicted={names.STEP_S: 2.5, names.GPU_PEAK_GIB: 3.0}
).to_dict()
LENGTH = {"seq_len": 2048, "batch_size": 32, "share": 0.25, "plan": PLAN}
ODD = (5, "x", None, True, [5], [None], ["x"], [[]], {"x": 5}, -1, 10**400, float("nan"))


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


@pytest.mark.parametrize(
    "words", [["nope"], ["runs"], ["one", "two"], ["one", "--open"], ["one", "port=5"], ["one", "--live", "port=x"]]
)
def test_bad_words_are_exit_code_2(run_dir: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    assert "headrace report:" in capsys.readouterr().err


def write_plan(run_dir: Path, outcome: str, **values: object) -> None:
    (run_dir / "plan.json").write_text(json.dumps({**PLAN, **values}))
    (run_dir / "summary.json").write_text(json.dumps({"outcome": outcome, "num_ranks": 1}))
    (run_dir / "report.html").unlink(missing_ok=True)


def test_the_lengths_of_rows_have_a_table(run_dir: Path) -> None:
    write_plan(run_dir, "finished", buckets=[LENGTH])
    assert main(["report", "one"]) == 0
    text = (run_dir / "report.html").read_text()
    cells = ("2048", "32", "25 %", "3 GiB", "–", "–", "2.5 s")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "buckets",
    [
        *([value] for value in ODD),
        *([{name: value for name, value in LENGTH.items() if name != key}] for key in LENGTH),
        *([{**LENGTH, key: value}] for key in LENGTH for value in ODD),
        *([{**LENGTH, "plan": {**PLAN, "predicted": value}}] for value in ODD),
        *([{**LENGTH, "plan": {"predicted": {names.STEP_S: value}}}] for value in ODD),
        *ODD,
    ],
    ids=lambda value: repr(value)[:60],
)
def test_wrong_values_of_the_lengths_are_told_in_a_sentence(
    run_dir: Path, buckets: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and a sentence, or a page where the value can be shown."""
    write_plan(run_dir, "finished", buckets=buckets)
    code = main(["report", "one"])
    said = capsys.readouterr().err
    if code == 0:
        assert "step of these only" in (run_dir / "report.html").read_text() or not buckets
    else:
        assert code == 2
        assert f"{run_dir.name}/plan.json: its values are not those of a memory plan" in said
        assert "remove it" in said
        assert not (run_dir / "report.html").exists()


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("outcome", ["finished", "running"])
@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
def test_wrong_predictions_are_left_out_of_the_table(run_dir: Path, outcome: str, value: object) -> None:
    """Also of a run that was killed, whose records are finished first."""
    for predicted in (value, {names.STEP_S: value, names.GPU_PEAK_GIB: 3.0}):
        write_plan(run_dir, outcome, predicted=predicted)
        assert main(["report", "one"]) == 0
        assert (">3 GiB<" in (run_dir / "report.html").read_text()) == (predicted is not value)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    monkeypatch.setattr(page, "_pictures", lambda *_: [])
