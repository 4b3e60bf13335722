"""A sweep's grid, folder and processes. A stand-in for `headrace train` writes what a run writes."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from headrace.platform.control.sweep import RunEnd, Sweep, SweepRunner, open_sweep, read_grid
from headrace.storage.core.errors import InputError

STAND_IN = """
import json, pathlib, signal, sys, time
words = sys.argv[2:]
resumed = words[0] == "--resume"
values = dict(word.split("=", 1) for word in words if "=" in word)
folder = pathlib.Path(words[1] if resumed else values["run.dir"])
log = folder.parent / "calls.jsonl"
begun = time.time()
def end(outcome, code):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("a: 1")
    (folder / "summary.json").write_text(json.dumps({"outcome": outcome}))
    with log.open("a") as file:
        file.write(json.dumps({"run": folder.name, "words": words, "begun": begun, "ended": time.time()}) + "\\n")
    sys.exit(code)
mode = "ok" if resumed else values["run.name"].rpartition("-")[2]
if mode == "refuse":
    print("headrace train: it does not fit")
    sys.exit(2)
if mode == "fail":
    end("failed", 1)
if mode == "hang":
    signal.signal(signal.SIGTERM, lambda *_: end("stopped", 3))
    (folder.parent / "hangs").touch()
    time.sleep(600)
if mode == "meet":  # ends when the other run is here too
    (folder.parent / (folder.name + ".here")).touch()
    while len(list(folder.parent.glob("*.here"))) < 2:
        if time.time() > begun + 600:
            end("failed", 1)
        time.sleep(0.01)
end("finished", 0)
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return [sys.executable, str(path)]


def sweep_of(tmp_path: Path, *modes: str) -> Sweep:
    return open_sweep(tmp_path / "sweep", read_grid(["run.name=" + ",".join(modes)]))


def do(sweep: Sweep, program: list[str], jobs: int = 1) -> tuple[dict[str, RunEnd], list[str]]:
    lines: list[str] = []
    runner = SweepRunner(sweep, jobs=jobs, words=["seed=1"], environ=os.environ, say=lines.append, program=program)
    return runner.run(), lines


def calls(sweep: Sweep) -> list[dict[str, object]]:
    return [json.loads(line) for line in (sweep.folder / "calls.jsonl").read_text().splitlines()]


def test_every_combination_is_a_run() -> None:
    grid = read_grid(["train.steps=5", "memory=keep,recompute", "data.seq_len=64,128", "data.buckets=64,128"])
    assert grid.axes == {"memory": ["keep", "recompute"], "data.seq_len": ["64", "128"]}
    assert [run.name for run in grid.runs] == [
        "memory-keep_seq_len-64",
        "memory-keep_seq_len-128",
        "memory-recompute_seq_len-64",
        "memory-recompute_seq_len-128",
    ]
    assert grid.runs[1].words == ("train.steps=5", "data.buckets=64,128", "memory=keep", "data.seq_len=128")


def test_commas_behind_two_dashes_separate_nothing() -> None:
    grid = read_grid(["seed=1,2", "--", "run.name=a,b"])
    assert [run.words for run in grid.runs] == [("run.name=a,b", "seed=1"), ("run.name=a,b", "seed=2")]


def test_names_are_legal_and_unique() -> None:
    names = [run.name for run in read_grid(["data.source=a/b,a b,../c", "optim.lr=1e-3,1e-4"]).runs]
    assert len(set(names)) == 6
    assert all("/" not in name and " " not in name for name in names)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.steps=5"], "no word has several values"),
        (["seed=1,2", "seed=3,4"], "several values already"),
        (["seed=1,,2"], "empty or given twice"),
        (["seed=1,1"], "empty or given twice"),
    ],
)
def test_bad_grids_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_grid(words)


def test_a_run_that_fails_or_is_refused_does_not_stop_the_others(tmp_path: Path, program: list[str]) -> None:
    sweep = sweep_of(tmp_path, "fail", "refuse", "ok")
    ends, lines = do(sweep, program)
    assert ends == {"name-fail": RunEnd.failed, "name-refuse": RunEnd.refused, "name-ok": RunEnd.finished}
    assert any("it does not fit" in line for line in lines)
    words = calls(sweep)[-1]["words"]
    assert isinstance(words, list)
    assert "seed=1" in words


def test_the_same_words_do_what_is_left(tmp_path: Path, program: list[str]) -> None:
    do(sweep_of(tmp_path, "ok", "fail"), program)
    sweep = sweep_of(tmp_path, "ok", "fail")
    ends, _ = do(sweep, program)
    assert set(ends.values()) == {RunEnd.finished}
    assert [call["run"] for call in calls(sweep)] == ["name-ok", "name-fail", "name-fail"]
    assert calls(sweep)[-1]["words"] == ["--resume", str(sweep.folder / "name-fail")]


def test_runs_at_once_overlap_and_single_ones_do_not(tmp_path: Path, program: list[str]) -> None:
    single = open_sweep(tmp_path / "single", read_grid(["run.name=a-ok,b-ok"]))
    do(single, program)
    first, second = calls(single)
    assert first["ended"] <= second["begun"]
    ends, _ = do(open_sweep(tmp_path / "pair", read_grid(["run.name=a-meet,b-meet"])), program, jobs=2)
    assert set(ends.values()) == {RunEnd.finished}


def test_a_signal_stops_the_run_at_hand_and_begins_no_other(tmp_path: Path, program: list[str]) -> None:
    sweep = sweep_of(tmp_path, "hang", "ok")

    def stop() -> None:
        while not (sweep.folder / "hangs").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    ends, _ = do(sweep, program)
    thread.join()
    assert ends == {"name-hang": RunEnd.stopped, "name-ok": RunEnd.waiting}


def test_a_folder_of_other_words_or_files_is_refused(tmp_path: Path) -> None:
    sweep_of(tmp_path, "a", "b")
    with pytest.raises(InputError, match="other words"):
        sweep_of(tmp_path, "a", "c")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(InputError, match="holds no sweep"):
        open_sweep(tmp_path / "used", read_grid(["seed=1,2"]))
