from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace.platform.report import page as page_module
from headrace.platform.report.live import LiveReport
from headrace.platform.tracking.run_folder import write_json
from headrace.platform.tracking.run_owner import own_run_folder
from headrace.storage.core.errors import InputError

MakeRun = Callable[..., Path]


@pytest.fixture
def server(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveReport]:
    monkeypatch.setattr(page_module, "_pictures", lambda *_: [])
    folder = make_run(2, moves=False)
    write_json(folder / "summary.json", {"outcome": "running"})
    (folder / "logs").mkdir()
    (folder / "logs" / "rank0.log").write_text("a line")
    (folder / "secret.txt").write_text("weights")
    with LiveReport(folder, 0) as live:
        thread = threading.Thread(target=live.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield live
        live.shutdown()
        thread.join()


def get(server: LiveReport, path: str, host: str = "127.0.0.1:1") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def test_the_page_is_made_anew_and_loads_again_while_the_run_goes_on(server: LiveReport) -> None:
    with own_run_folder(server.run_dir):
        write_json(server.run_dir / "step_part.json", {"step": 3, "part": "stage 2/2, chunk 37/64", "unix_s": 1.7e9})
        status, body = get(server, "/")
    assert status == 200
    assert 'http-equiv="refresh" content="10"' in body
    assert "stage 2/2, chunk 37/64" in body
    write_json(server.run_dir / "summary.json", {"outcome": "finished"})
    _, body = get(server, "/?again")
    assert "finished" in body
    assert "http-equiv" not in body


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/logs/rank0.log", 200, "a line"),
        ("/config.yaml", 200, "alert"),
        ("/secret.txt", 404, "not linked"),
        ("/logs/../secret.txt", 404, "not linked"),
        ("/../page.html", 404, "not linked"),
        ("//etc/passwd", 404, "not linked"),
    ],
)
def test_only_what_the_page_links_to_is_served(server: LiveReport, path: str, status: int, words: str) -> None:
    found, body = get(server, path)
    assert found == status
    assert words in body


def test_another_site_cannot_read_it_through_a_browser(server: LiveReport) -> None:
    assert get(server, "/", host="evil.example:80")[0] == 403


def test_it_listens_on_this_machine_only(server: LiveReport) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_a_taken_port_and_a_folder_that_is_no_run_are_refused(server: LiveReport, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is free"):
        LiveReport(server.run_dir, int(server.server_address[1]))
    with pytest.raises(InputError, match="not a run folder"):
        LiveReport(tmp_path, 0)
