"""The writer against a real SQLite store, and against stores that fail in several ways."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.platform.tracking import copier, mlflow_store
from headrace.platform.tracking.config import TrackingConfig
from headrace.platform.tracking.copier import CopyState, RunCopier, copy_lines
from headrace.platform.tracking.evaluation import add_alone, add_to_run, is_tracked
from headrace.platform.tracking.mlflow_server import send_run
from headrace.platform.tracking.mlflow_store import MlflowRun, MlflowSettings, flatten, legal_name
from headrace.platform.tracking.recorder import RunRecorder
from headrace.platform.tracking.run_folder import MLFLOW_FILE, read_json, write_json
from headrace.storage.core.errors import HeadraceError, InputError
from headrace.storage.core.json_lines import JsonLines, read_lines
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry.records import StepReport

pytestmark = pytest.mark.slow
Make = Callable[..., RunRecorder]
MakeReport = Callable[..., StepReport]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables: making them takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    client = mlflow_store._client(f"sqlite:///{folder}/mlflow.db")
    client.create_experiment("warm")
    return folder / "mlflow.db"


@pytest.fixture
def store(template: Path, tmp_path: Path) -> str:
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "mlflow.db"
    path.write_bytes(template.read_bytes())
    return f"sqlite:///{path}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier, "FLUSH_EVERY_S", 0.05)
    monkeypatch.setattr(copier, "FIRST_RETRY_S", 0.1)
    monkeypatch.setattr(copier, "FINISH_AFTER_FAILURE_S", 1.0)
    monkeypatch.setattr("headrace.platform.tracking.recorder._write_report", lambda run_dir: None)


@pytest.fixture
def said() -> list[str]:
    return []


def settings(store: str, **more: Any) -> MlflowSettings:
    return MlflowSettings(store, "exp", "one", **more)


def history(store: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in mlflow_store._client(store).get_metric_history(run_id, name)]


def wait_for(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def test_a_run_is_in_mlflow(make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, store: str) -> None:
    run = make_recorder(mlflow=True, experiment="exp", tags={"who": "me"}, system_metrics_every_s=0.0)
    rows = {"folder": "/rows", "digest": "abc123", "num_rows": 7, "source": "/texts/book.txt"}
    facts = {"model": "tiny", "num_params": 5_000_000, "data": rows, "hardware": {"name": "cpu"}, "num_ranks": 1}
    run.start("optim:\n  lr: 0.1\n  betas: [1, 2]\nempty: {}\ndata: {seq_len: 64}\n", plan, facts)
    for step in range(1, 6):
        run.on_report(make_report(step, **{"odd name (%)": 1.5, "nan/x": float("nan")}))
    words = run.finish("finished", {})
    assert "headrace mlflow" in words
    client = mlflow_store._client(store)
    found = client.search_runs([client.get_experiment_by_name("exp").experiment_id])
    assert len(found) == 1
    data, info = found[0].data, found[0].info
    assert (info.run_name, info.status) == ("one", "FINISHED")
    assert data.params == {"optim.lr": "0.1", "optim.betas": "[1, 2]", "empty": "{}", "data.seq_len": "64"}
    assert data.tags["who"] == "me"
    assert data.tags["headrace.plan"] == "keep"
    assert data.tags["headrace.outcome"] == "finished"
    columns = {"model": "tiny", "num_params": "5000000", "num_ranks": "1", "hardware": "cpu"}
    assert {key: data.tags[f"headrace.{key}"] for key in columns} == columns
    assert data.tags["mlflow.source.name"] == "headrace train"
    assert data.tags["mlflow.user"] not in ("", "unknown")
    note = data.tags["mlflow.note.content"]
    assert "tiny, 5,000,000 parameters, sequences of 64 tokens, 1 rank(s), memory plan keep" in note
    assert "`_gbps` is GB/s: gigabytes (1e9 bytes) a second, not bits" in note
    (entry,) = found[0].inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("book.txt", "abc123")
    assert {tag.key: tag.value for tag in entry.tags} == {"mlflow.data.context": "training"}
    assert client.get_experiment_by_name("exp").tags[mlflow_store.KIND_TAG] == "custom_model_development"
    assert history(store, info.run_id, "loss/train") == [(s, 10.0 / s) for s in range(1, 6)]
    assert len(history(store, info.run_id, "odd name (%)".replace("(%)", "___"))) == 5
    assert history(store, info.run_id, "nan/x") == []
    names = {file.path for file in client.list_artifacts(info.run_id)}
    assert names == {"config.yaml", "plan.json", "metrics.jsonl", "events.jsonl", "summary.json"}


def test_a_resumed_run_is_one_run_without_double_points(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, store: str
) -> None:
    for text, outcome, steps in (("a: 1\n", "stopped", (1, 2, 3)), ("a: 2\nb: 3\n", "finished", (3, 4))):
        run = make_recorder(mlflow=True, experiment="exp", system_metrics_every_s=0.0)
        run.start(text, plan, {})
        for step in steps:
            run.on_report(make_report(step))
        run.finish(outcome, {})
    run_id = read_json(run.run_dir / "mlflow.json")["run_id"]
    client = mlflow_store._client(store)
    assert len(client.search_runs([client.get_experiment_by_name("exp").experiment_id])) == 1
    assert [step for step, _ in history(store, run_id, "loss/train")] == [1, 2, 3, 4]
    data = client.get_run(run_id).data
    assert data.params == {"a": "1", "b": "3"}
    assert data.tags["headrace.config_drift"] == "a"
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    "uri", ["nonsense://x", "sqlite:////proc/no/such/mlflow.db", "http://127.0.0.1:9", "/plain/folder"]
)
def test_a_bad_store_is_said_once_and_costs_nothing(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_recorder(mlflow=True, tracking_uri=uri)
    run.start("a: 1\n", plan, {})
    for step in range(1, 11):
        run.on_report(make_report(step))
    begin = time.monotonic()
    words = run.finish("finished", {})
    assert time.monotonic() - begin < 60.0, "MLflow's own retries take minutes"
    assert "run finished: 10 of 10 steps" in words
    assert f"--send {run.run_dir}" in words
    assert capfd.readouterr().err.count("refuses the run") == 1
    assert [line["step"] for line, _ in read_lines(run.run_dir / "metrics.jsonl")] == list(range(1, 11))


def test_a_store_that_comes_back_gets_what_it_missed(store: str, tmp_path: Path, said: list[str]) -> None:
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl")
    writer = RunCopier(tmp_path / "run", settings(store), said.append)
    lock = sqlite3.connect(store.removeprefix("sqlite:///"), check_same_thread=False)
    moved = tmp_path / "away.db"
    path = Path(store.removeprefix("sqlite:///"))
    lock.close()
    path.rename(moved)
    path.mkdir()  # no file can be opened there
    writer.start()
    for step in (1, 2, 3):
        lines.append({"step": step, "loss/train": float(step), "unix_s": 1.0 + step})
    wait_for(lambda: said, "the writer says that MLflow is lost")
    path.rmdir()
    moved.rename(path)
    lines.append({"step": 4, "loss/train": 4.0, "unix_s": 5.0})
    wait_for(lambda: len(said) == 2, "the writer says that MLflow is back")
    assert writer.finish("FINISHED", [], {}) is None
    assert "refuses" in said[0]
    assert "answers again" in said[1]
    assert writer.run_id is not None
    assert [step for step, _ in history(store, writer.run_id, "loss/train")] == [1, 2, 3, 4]


def test_a_locked_store_never_blocks_the_step(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, store: str
) -> None:
    lock = sqlite3.connect(store.removeprefix("sqlite:///"))
    lock.execute("BEGIN EXCLUSIVE")
    run = make_recorder(mlflow=True, system_metrics_every_s=0.0)
    run.start("a: 1\n", plan, {})
    slowest = 0.0
    for step in range(1, 200):
        begin = time.thread_time()
        run.on_report(make_report(step))
        slowest = max(slowest, time.thread_time() - begin)
    assert slowest < 0.05
    lock.rollback()
    lock.close()
    assert "MLflow" in run.finish("finished", {})


def test_ten_thousand_steps_in_batches_continue_after_a_failure(tmp_path: Path) -> None:
    class Flaky:
        """Counts what arrives; fails in the middle, after it took the batch (as a lost answer does)."""

        def __init__(self) -> None:
            self.got: set[tuple[int, str]] = set()
            self.calls = 0

        def points(self, line: dict[str, Any]) -> list[tuple[int, str]]:
            return [(line["step"], f"m{i}") for i in range(25)]

        def log(self, points: list[tuple[int, str]]) -> None:
            assert len(points) <= 1000
            self.calls += 1
            self.got |= set(points)
            if self.calls == 100:
                raise OSError("connection lost")

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {s}}}\n' for s in range(1, 10_001)))
    run = Flaky()
    with pytest.raises(OSError, match="lost"):
        copy_lines(run, path, saved_state(tmp_path))  # type: ignore[arg-type]
    again = saved_state(tmp_path)
    assert 0 < again.last_step < 10_000
    copy_lines(run, path, again)  # type: ignore[arg-type]
    assert len(run.got) == 250_000
    assert run.calls == 251
    assert saved_state(tmp_path).offset == path.stat().st_size


def saved_state(folder: Path) -> CopyState:
    state = CopyState.load(folder / MLFLOW_FILE, "x")
    state.run_id = "r"
    return state


def test_a_torn_line_waits_for_its_end(tmp_path: Path) -> None:
    sent: list[int] = []

    class Run:
        def points(self, line: dict[str, Any]) -> list[int]:
            return [line["step"]]

        def log(self, points: list[int]) -> None:
            sent.extend(points)

    path, state = tmp_path / "metrics.jsonl", saved_state(tmp_path)
    path.write_text('{"step": 1}\n{"step"')
    copy_lines(Run(), path, state)  # type: ignore[arg-type]
    with path.open("a") as file:
        file.write(": 2}\n")
    copy_lines(Run(), path, state)  # type: ignore[arg-type]
    assert sent == [1, 2]


def test_a_slow_store_costs_finish_its_limit_and_no_more(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(copier, "FINISH_S", 0.5)
    monkeypatch.setattr(MlflowRun, "open", lambda *args: gate.wait(600))
    writer = RunCopier(tmp_path, settings("sqlite:///x"), said.append)
    writer.start()
    assert "did not answer" in str(writer.finish("FINISHED", [], {}))
    assert writer._thread.is_alive(), "finish has waited for the store"
    gate.set()


def test_runs_of_dead_processes_are_closed_and_living_ones_are_not(store: str) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    dead, reused, living = (MlflowRun.open(settings(store), None) for _ in range(3))
    for each in (dead, reused, living):
        each.describe()
    client = mlflow_store._client(store)
    client.set_tag(dead.run_id, mlflow_store.PROCESS_TAG, f"{child.pid}-1")
    client.set_tag(reused.run_id, mlflow_store.PROCESS_TAG, f"{os.getpid()}-1")  # another process had this number
    MlflowRun.open(settings(store), None)
    assert client.get_run(reused.run_id).info.status == "KILLED"
    assert client.get_run(dead.run_id).info.status == "KILLED"
    assert client.get_run(living.run_id).info.status == "RUNNING"


def test_an_experiment_that_has_a_kind_keeps_it_and_another_gets_ours(store: str) -> None:
    client = mlflow_store._client(store)
    for name, tags, kind in (("theirs", {mlflow_store.KIND_TAG: "x"}, "x"), ("old", {}, mlflow_store.KIND)):
        client.create_experiment(name, tags=tags)
        MlflowRun.open(MlflowSettings(store, name, "one"), None)
        assert client.get_experiment_by_name(name).tags[mlflow_store.KIND_TAG] == kind


def test_system_metrics_are_sampled(store: str) -> None:
    run = MlflowRun.open(settings(store, system_metrics_every_s=0.01), None)
    num_samples = 0
    for _ in range(2):
        time.sleep(0.02)
        num_samples = run.sample_system(num_samples)
    assert num_samples == 2
    assert [step for step, _ in history(store, run.run_id, "system/cpu_utilization_percentage")] == [0, 1]


def test_a_run_is_sent_later(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, store: str, tmp_path: Path
) -> None:
    run = make_recorder()
    run.start("tracking:\n  mlflow: false\n  experiment: exp\n", plan, {})
    for step in (1, 2):
        run.on_report(make_report(step))
    run.finish("finished", {})
    assert store in send_run(run.run_dir)
    assert store in send_run(run.run_dir)
    run_id = read_json(run.run_dir / "mlflow.json")["run_id"]
    assert [step for step, _ in history(store, run_id, "loss/train")] == [1, 2]
    assert mlflow_store._client(store).get_run(run_id).info.status == "FINISHED"
    with pytest.raises(InputError, match=r"config\.yaml"):
        send_run(tmp_path)
    (run.run_dir / "config.yaml").write_text("tracking: {tracking_uri: 'nonsense://x'}")
    with pytest.raises(HeadraceError, match="nonsense"):
        send_run(run.run_dir)


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("perf/step_s", "perf/step_s"),
        ("mfu(%)", "mfu___"),
        ("größe/ß", "gr__e/_"),
        ("/a//../b.", "a/b."),
        ("", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_that_mlflow_takes(name: str, legal: str) -> None:
    assert legal_name(name) == legal


def test_parameters_are_flat_and_cut() -> None:
    flat = flatten({"a": {"b": {"c": None}}, "l": [1, {"x": 2}], "long": "y" * 9000})
    assert flat == {"a.b.c": "None", "l": "[1, {'x': 2}]", "long": "y" * 6000}


def test_mlflow_is_not_imported_on_the_way_to_the_first_step() -> None:
    code = (
        "import sys, headrace.platform.tracking.recorder, headrace.platform.tracking.copier\n"
        "sys.exit(str([m for m in ('mlflow', 'torch', 'ray', 'matplotlib', 'pyarrow') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_an_evaluation_joins_its_run_whose_status_stays_or_is_a_run_of_its_own(store: str, tmp_path: Path) -> None:
    runs_dir, files = tmp_path / "runs", [tmp_path / "e.json", tmp_path / "e.png"]
    (runs_dir / "one").mkdir()
    for file in files:
        file.write_text("x")
    buckets = [{"end": 1024, "perplexity": 9.0}, {"end": 2048, "perplexity": 7.0}, {"end": 4096, "perplexity": None}]
    record = {"model": "m", "data": {"folder": "f"}, "seq_len": 64, "step": 7, "loss": 2.0, "perplexity": 8.0}
    record |= {"by_position": buckets}
    config, client = TrackingConfig(experiment="exp"), mlflow_store._client(store)
    opened = MlflowRun.open(settings(store), None)
    opened.close("KILLED", (), {})
    write_json(runs_dir / "one" / "mlflow.json", {"tracking_uri": store, "run_id": opened.run_id})
    assert is_tracked(runs_dir / "one")
    assert not is_tracked(runs_dir)
    assert add_to_run(runs_dir / "one", config, "a: 1", record, files) == opened.run_id
    alone = add_alone(runs_dir, config, "a: 1", record, files)
    for run_id, status in ((opened.run_id, "KILLED"), (alone, "FINISHED")):
        assert client.get_run(run_id).info.status == status
        assert history(store, run_id, "eval/loss") == [(7, 2.0)]
        assert history(store, run_id, "eval/perplexity") == [(7, 8.0)]
        assert history(store, run_id, "eval/perplexity_by_position_step7") == [(1024, 9.0), (2048, 7.0)]
        assert {file.path for file in client.list_artifacts(run_id, "eval")} == {"eval/e.json", "eval/e.png"}
    assert client.get_run(alone).data.tags["mlflow.source.name"] == "headrace eval"
    assert client.get_run(alone).info.run_name == "eval-m-64"
