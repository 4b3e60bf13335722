from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from headrace.platform.cli.main import main
from headrace.platform.cli.mlflow_ui import parse
from headrace.platform.servers import check_port
from headrace.platform.tracking import mlflow_store
from headrace.platform.tracking.mlflow_store import MlflowRun, MlflowSettings, default_store
from headrace.storage.core.errors import InputError
from headrace.storage.core.ports import free_port


def test_words() -> None:
    assert parse(["--port", "7", "runs=x"]) == {"port": "7", "runs": "x"}
    assert parse(["--port=7", "uri=sqlite:///a=b"]) == {"port": "7", "uri": "sqlite:///a=b"}
    assert parse(["--send", "run=r"]) == {"send": "r"}


@pytest.mark.parametrize(
    "words", [["--prt=1"], ["--port"], ["--port=x"], ["runs="], ["runs=nowhere"], ["--send", "nope"], ["--port=0"]]
)
def test_bad_words_are_exit_code_2(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "nowhere" not in words[0]:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "mlflow.db").touch()
    assert main(["mlflow", *words]) == 2
    assert "headrace mlflow:" in capsys.readouterr().err


def test_a_taken_port_is_named_and_a_free_one_offered() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"{port}.*--port=\d+ is free"):
            check_port(port)


@pytest.mark.slow
def test_the_ui_shows_the_runs_recorded_here_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    store = default_store(tmp_path)
    run = MlflowRun.open(MlflowSettings(store, "exp", "my run", tmp_path / "artifacts"), None)
    run.close("FINISHED", [], {})
    port = free_port()
    words = [sys.executable, "-m", "headrace.platform.cli.main", "mlflow", f"runs={tmp_path}", f"--port={port}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=_heed_ctrl_c) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        try:
            assert f"http://127.0.0.1:{port}" in line
            url = f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/get?run_id={run.run_id}"
            with urllib.request.urlopen(url, timeout=600) as answer:
                assert json.load(answer)["run"]["info"]["run_name"] == "my run"
            others = [address for address in _addresses() if _answers(address, port)]
            assert others == [], "it listens on this machine only"
        finally:
            child.send_signal(signal.SIGINT)
        assert child.wait(600) == 0
    assert not _answers("127.0.0.1", port)
    assert mlflow_store._client(store).get_run(run.run_id).info.status == "FINISHED"


def _heed_ctrl_c() -> None:
    """A shell starts background jobs, maybe this test session, with SIGINT ignored; children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _addresses() -> list[str]:
    found = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    return sorted(address for address in found if not address.startswith("127."))


def _answers(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address, port)) == os.EX_OK
