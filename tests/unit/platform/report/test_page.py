from __future__ import annotations

import json
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headrace.platform.report import page as page_module
from headrace.platform.report.page import number, render, write_report
from headrace.platform.tracking.mlflow_store import default_store
from headrace.platform.tracking.run_folder import write_json
from headrace.storage.core.errors import InputError
from headrace.workers.telemetry import names

MakeRun = Callable[..., Path]
VOID = {"meta", "br", "img", "link", "input"}


class Checker(HTMLParser):
    """Every element is closed in order, nothing is loaded from elsewhere, no script runs."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.num_pictures = 0
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        self.num_pictures += tag == "svg"
        for name, value in attrs:
            if tag == "a":
                self.links.append(str(value))
            elif name in ("src", "href", "xlink:href"):
                assert str(value).startswith("#"), f"{tag} loads {value}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    monkeypatch.setattr(page_module, "_pictures", lambda *_: [])


def test_the_page_of_a_whole_run(make_run: MakeRun) -> None:
    folder = make_run(30)
    write_json(folder / "summary.json", {"outcome": "finished", "num_steps": 30, "provenance": {"commit": "abc"}})
    path = write_report(folder)
    page = check(path.read_text(encoding="utf-8"))
    assert page.num_pictures == 9
    for words in (
        "30 of 30",
        "finished",
        "409.6 MiB",
        "512 MiB",
        "+25.0 %",
        "0 to 2",
        "<script>alert(1)</script> & grün",
    ):
        assert words in page.text, words
    assert "<script>" not in path.read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_pictures")
def test_the_reason_of_a_failure_is_on_top(make_run: MakeRun) -> None:
    folder = make_run(3)
    write_json(folder / "summary.json", {"outcome": "failed", "facts": {"error": "rank 1 failed: <boom>"}})
    text = check(render(folder)).text
    assert text.index("Why it failed") < text.index("rank 1 failed: <boom>") < text.index("tokens seen")
    write_json(folder / "summary.json", {"outcome": "lost"})
    (folder / "events.jsonl").write_text('{"kind": "run_lost", "text": "the process was killed"}\n')
    text = check(render(folder)).text
    assert text.index("Why it was lost") < text.index("the process was killed") < text.index("tokens seen")
    write_json(folder / "summary.json", {"outcome": "finished"})
    assert "Why it" not in check(render(folder)).text


@pytest.mark.usefixtures("no_pictures")
def test_files_logs_and_the_run_in_mlflow_are_linked(make_run: MakeRun) -> None:
    folder = make_run(3)
    (folder / "logs").mkdir()
    for rank in (0, 1, 10):
        (folder / "logs" / f"rank{rank}.log").touch()
    page = check(render(folder))
    assert page.links == ["config.yaml", "plan.json", "metrics.jsonl", *(f"logs/rank{r}.log" for r in (0, 1, 10))]
    for uri, start in ((default_store(folder.parent), True), ("http://host:7000/", False)):
        write_json(folder / "mlflow.json", {"run_id": "r1", "tracking_uri": uri})
        page = check(render(folder))
        assert page.links[-1] == ("http://127.0.0.1:5000/#/runs/r1" if start else "http://host:7000/#/runs/r1")
        assert ("headrace mlflow runs=" in page.text) == start


@pytest.mark.usefixtures("no_pictures")
def test_what_differs_from_the_experiment_stands_above_the_configuration(make_run: MakeRun) -> None:
    folder = make_run(3)
    write_json(folder / "summary.json", {"facts": {"changed": {"optim.lr": [0.001, 0.5]}}})
    text = check(render(folder)).text.partition("Configuration")[2]
    places = [text.index(words) for words in ("optim.lr", "0.001", "0.5", "grün")]
    assert places == sorted(places)


@pytest.mark.usefixtures("no_pictures")
def test_the_memory_plan_and_the_figures_have_one_word_for_the_device(make_run: MakeRun) -> None:
    page = check(render(make_run(3)))
    assert "hbm" not in page.text
    assert "device" in page.text


def test_the_drive_and_the_rates_have_a_table_where_there_is_something_to_say(make_run: MakeRun) -> None:
    folder = make_run(3)
    assert "Drive and tiers" not in check(render(folder)).text
    with (folder / "metrics.jsonl").open("a") as file:
        for step, drift in ((4, -50.0), (5, -10.0), (6, -20.0)):
            line = {"step": step, names.SSD_WRITTEN_TB: step / 2, names.SSD_BUDGET_USED_PCT: 10.0 * step}
            line |= {names.SSD_LIFE_USED_PCT: 0.5, names.SSD_DAYS_LEFT: 99.5, names.SSD_WRITE_DRIFT_PCT: drift}
            file.write(json.dumps(line) + "\n")
    (folder / "events.jsonl").write_text('{"kind": "endurance_over", "text": "written too fast"}\n')
    text = check(render(folder)).text
    for words in ("3 TB", "60 %", "0.5 %", "99.5 days", "-20 %", "lowest -50 %", "written too fast"):
        assert words in text, words


def test_page_sparse_attention_is_shown_beside_dense_attention(make_run: MakeRun) -> None:
    folder = make_run(3)
    assert "Page-sparse" not in check(render(folder)).text
    with (folder / "metrics.jsonl").open("a") as file:
        for step, sparse in ((4, 2.75), (5, 2.51)):
            line = {"step": step, names.SPARSE_LOSS_DENSE: 2.5, names.SPARSE_LOSS_SPARSE: sparse}
            line |= {names.SPARSE_LOSS_GAP: sparse - 2.5, names.SPARSE_PAGES_READ_PCT: 12.5}
            file.write(json.dumps(line) + "\n")
    page = check(render(folder))
    for words in ("Page-sparse against dense attention", "2.51", "+0.01", "largest +0.25", "12.5 %", "Lossy"):
        assert words in page.text, words


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_short_runs_have_a_page(make_run: MakeRun, num_steps: int) -> None:
    page = check(render(make_run(num_steps, moves=num_steps > 0)))
    assert "lost" in page.text  # nobody owns the folder
    assert ("No step has been recorded" in page.text) == (num_steps == 0)


def test_damaged_files_cost_only_their_part(make_run: MakeRun) -> None:
    folder = make_run(5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (folder / "plan.json").write_text("{")
    (folder / "summary.json").write_text("")
    (folder / "transfers.parquet").write_bytes(b"PAR1")
    (folder / "events.jsonl").write_text('{"kind": "x", "text": "<b>"}\nnonsense\n')
    page = check(render(folder))
    assert page.num_pictures == 6
    assert "<b>" in page.text
    assert "No transfer log" in page.text


def test_values_that_were_not_finite_leave_gaps(make_run: MakeRun) -> None:
    folder = make_run(3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": null, "loss/train": null, "perf/step_s": null, "io/exposed_pct": null}\n')
    check(render(folder))


def test_a_long_run_has_a_small_page_soon(make_run: MakeRun) -> None:
    folder = make_run(10_000)
    begin = time.process_time()
    path = write_report(folder)
    assert time.process_time() - begin < 15.0
    assert path.stat().st_size < 1_500_000


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1234567.0, "1,234,567"), (0.0001234, "0.0001234"), (2.5, "2.5"), (0.0, "0")]
)
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert number(value, 4) == text


def test_a_run_under_way_shows_how_far_its_step_is(make_run: MakeRun, no_pictures: None) -> None:
    run_dir, last = make_run(3), 3
    part = {"step": last + 1, "part": "stage 2/2, chunk 37/64", "unix_s": 1e9}
    write_json(run_dir / "step_part.json", part)
    words = f"step {last + 1}: stage 2/2, chunk 37/64 at 2001-09-09 01:46:40 UTC"
    write_json(run_dir / "summary.json", {"outcome": "finished"})
    assert words not in check(render(run_dir)).text
    write_json(run_dir / "summary.json", {"outcome": "running"})
    assert words in check(render(run_dir)).text
    write_json(run_dir / "step_part.json", part | {"step": last})
    assert "chunk 37/64" not in check(render(run_dir)).text
