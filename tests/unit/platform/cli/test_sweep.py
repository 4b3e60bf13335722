"""`headrace sweep`: a grid of whole runs of the tiny model (no Ray), their table, and their places in MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.platform.cli.main import main

TINY = ["debug=cpu_tiny", "cluster=inline", "train.num_threads=1", "tracking.progress=off", "train.steps=2"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HEADRACE_CONF", "HEADRACE_OVERRIDES"):
        monkeypatch.delenv(name, raising=False)


def test_two_runs_and_their_parent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "memory=keep,recompute", "dir=runs/s", "tracking=mlflow", "tracking.system_metrics_every_s=0"]
    assert main(["sweep", *words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["ends"] == {"memory-keep": "finished", "memory-recompute": "finished"}
    assert found["config"]["memory.preset"] == ["keep", "recompute"]
    losses = [run["figures"]["loss"] for run in found["runs"]]
    assert losses[0] == losses[1]  # residence changes no bit
    assert (tmp_path / "runs" / "s" / "comparison.html").exists()

    from mlflow import MlflowClient

    from headrace.platform.tracking.mlflow_store import default_store

    client = MlflowClient(default_store(tmp_path / "runs"))
    (experiment,) = [each for each in client.search_experiments() if each.name == "headrace"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "s"]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["memory"] == "keep,recompute"
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.info.run_name for run in children) == ["memory-keep", "memory-recompute"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["memory=keep"], "no word has several values"),
        (["memory=keep,nope"], "memory=nope"),
        (["memory=keep,recompute", "jobs=0"], "jobs=0"),
        (["memory=keep,recompute", "run.dir=x"], "dir=FOLDER"),
        (["memory=keep,recompute", "jobs=x"], "jobs=x"),
    ],
)
def test_bad_words_end_before_anything_starts(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *TINY, *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
