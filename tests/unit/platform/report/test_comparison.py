from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.platform.report.comparison import (
    ABSENT,
    cautions,
    differing,
    read_runs,
    text_table,
    to_json,
    write_comparison,
)
from headrace.platform.tracking.run_folder import write_json
from headrace.storage.core.json_lines import JsonLines
from headrace.workers.telemetry import names

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run folder of four steps: seconds of a warm step, loss at the end, lines of its configuration."""

    def make(name: str, *, step_s: float = 2.0, loss: float = 4.0, config: str = "a: 1\n", digest: str = "d") -> Path:
        folder = tmp_path / "runs" / name
        lines = JsonLines(folder / "metrics.jsonl")
        for step in range(1, 5):
            lines.append(
                {
                    "step": step,
                    "loss": loss,
                    names.LOSS_TRAIN: loss,
                    # The first step of a start is not counted.
                    names.STEP_S: step_s if step > 1 else 60.0,
                    names.TOKENS_PER_S_PER_GPU: 1000 / step_s,
                    names.TOKENS_SEEN: 1000 * step,
                    names.GPU_PEAK_GIB: 0.5,
                }
            )
        lines.close()
        (folder / "config.yaml").write_text(f"{config}run:\n  name: {name}\n", encoding="utf-8")
        write_json(folder / "plan.json", {"predicted": {names.STEP_S: 1.0}, "name": name})
        facts = {"data": {"digest": digest}, "hardware": {"name": "cpu"}}
        write_json(folder / "summary.json", {"outcome": "finished", "facts": facts, "provenance": {"commit": "abc"}})
        return folder

    return make


def test_figures_are_those_of_each_run_and_errors_those_of_its_own_plan(make_run: MakeRun) -> None:
    found = to_json(read_runs([make_run("one"), make_run("two", step_s=3.0, loss=3.5)]))
    one, two = found["runs"]
    assert [run["figures"]["step_s"] for run in (one, two)] == [2.0, 3.0]
    assert [run["figures"]["loss"] for run in (one, two)] == [4.0, 3.5]
    assert [run["figures"]["tokens_per_s_per_gpu"] for run in (one, two)] == [500.0, 1000 / 3]
    errors = [
        line["error_pct"]
        for run in (one, two)
        for line in run["predicted_against_measured"]
        if line["name"] == names.STEP_S
    ]
    assert errors == [100.0, 200.0]


def test_only_what_computes_something_else_differs(make_run: MakeRun) -> None:
    runs = [make_run("one", config="a: 1\nb: {c: 2}\n"), make_run("two", config="a: 1\nb: {c: 3, d: x}\n")]
    assert to_json(read_runs(runs))["config"] == {"b.c": ["2", "3"], "b.d": [ABSENT, "x"]}
    assert to_json(read_runs(runs))["source"] == {}


def test_keys_that_all_tables_share_are_left_out() -> None:
    assert differing([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}]) == {"b": ["2", "3", ABSENT]}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"digest": "e"}, "different text"),
        ({"config": "data: {seq_len: 64}\n"}, "compare losses by tokens"),
        ({}, ""),
    ],
)
def test_what_cannot_be_compared_is_said(make_run: MakeRun, other: dict[str, str], words: str) -> None:
    first = make_run("one", config="data: {seq_len: 32}\n" if "config" in other else "a: 1\n")
    said = cautions(read_runs([first, make_run("two", **other)]))
    assert words in " ".join(said)
    assert bool(said) == bool(words)


def test_an_unfinished_run_is_named(make_run: MakeRun) -> None:
    one, two = make_run("one"), make_run("two")
    write_json(two / "summary.json", {"outcome": "failed"})
    runs = read_runs([one, two])
    assert "Not finished: two." in cautions(runs)
    assert "two (failed)" in text_table(runs)


def test_runs_of_one_name_go_by_their_paths(make_run: MakeRun, tmp_path: Path) -> None:
    one = make_run("one")
    other = tmp_path / "other" / "one"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("a: 2\n")
    assert [run.name for run in read_runs([one, other])] == [str(one), str(other)]


def test_the_page_shows_values_ratios_differences_and_links(make_run: MakeRun, tmp_path: Path) -> None:
    one, two = make_run("one"), make_run("two", step_s=3.0, config="a: <b>&\n")
    (two / "report.html").write_text("x")
    page = tmp_path / "runs" / "comparison.html"
    write_comparison(read_runs([one, two]), page)
    text = page.read_text(encoding="utf-8")
    assert "x 1.5" in text  # step time, to the first run's
    assert "1 s → 3 s" in text
    assert "+200.0 %" in text
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    assert 'href="two/report.html"' in text
    assert 'href="one/report.html"' not in text
    assert text.count("<svg") == 5  # no held-out loss, no MFU
    assert "<script" not in text
    assert " src=" not in text
