"""The words of `headrace monitor`, and what it says where a program is missing or an address is wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.platform.cli import monitor
from headrace.platform.control import head as head_module
from headrace.storage.core.errors import HeadraceError, InputError, MachineError
from headrace.storage.core.ports import free_port


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["promtheus=http://x"], "prometheus"),
        (["--file"], "--files"),
        (["prometheus=10.0.0.1:9090"], "a URL is expected"),
        (["dashboard="], "dashboard= has no value"),
    ],
)
def test_wrong_words_are_named(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        monitor.run(words)


def test_without_prometheus_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(head_module, "start_head", lambda *_: pytest.fail("a head was started"))
    with pytest.raises(MachineError, match="apt-get install prometheus, or give prometheus=URL"):
        monitor.run([])


def test_an_address_without_prometheus_is_refused() -> None:
    with pytest.raises(InputError, match="no Prometheus is ready there"):
        monitor.run([f"prometheus=http://127.0.0.1:{free_port()}"])


def test_files_of_another_cluster_are_written(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert monitor.run(["dashboard=http://10.0.0.1:8265/", "--files", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cluster"] == "http://10.0.0.1:8265"
    assert "http://10.0.0.1:8265/api/prometheus/sd" in (Path(facts["folder"]) / "prometheus.yml").read_text()


def program(folder: Path, name: str, text: str) -> None:
    """A program of Python."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


SERVER = """
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
ini = next(word.partition("=")[2] for word in sys.argv if word.startswith("--config="))
port = next(line.split()[2] for line in open(ini) if line.startswith("http_port"))
open("started", "w").write(" ".join(sys.argv[1:]))
http.server.HTTPServer(("127.0.0.1", int(port)), Health).serve_forever()
"""


def test_grafana_is_started_where_it_is_installed_and_ends_with_the_verb(monkeypatch, tmp_path: Path) -> None:
    """A stand-in that reads the address from our grafana.ini, as Grafana does."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs, "grafana-server", SERVER)
    port = free_port()
    grafana = f"http://127.0.0.1:{port}"
    watched = monitor.Watched(
        monitor.Addresses("http://127.0.0.1:1", "http://127.0.0.1:2", grafana), tmp_path / "files", None
    )
    monitor.write_monitor_files(watched.folder, watched.addresses, None)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    seen = []

    def serve_report(run_dir, port, *, on_ready) -> None:
        on_ready("http://page")
        seen.append(monitor.answers(f"{grafana}/api/health"))
        raise KeyboardInterrupt

    monkeypatch.setattr("headrace.platform.report.live.serve_report", serve_report)
    monitor.serve(watched, start_prometheus=False, as_json=False)
    assert seen == [True]
    assert not monitor.answers(f"{grafana}/api/health")
    assert "--homepath=/usr/share/grafana" in (watched.folder / "started").read_text()


def test_a_prometheus_that_does_not_start_says_why(monkeypatch, tmp_path: Path) -> None:
    program(tmp_path, "prometheus", "raise SystemExit('no room on the disk')")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HeadraceError, match="Prometheus did not start: no room on the disk"):
        with monitor.prometheus(tmp_path, f"http://127.0.0.1:{free_port()}"):
            pass
    assert subprocess.run(["pgrep", "-f", str(tmp_path / "prometheus")]).returncode == 1
