"""The report of a run while it goes on: a page on this machine that is made again at every look. No torch."""

from __future__ import annotations

import html
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from headrace.platform.report.page import linked_files, render
from headrace.platform.servers import HOST, check_port
from headrace.platform.tracking.run_folder import find_run
from headrace.storage.core.errors import InputError
from headrace.storage.core.outside import read_regular

REFRESH_S = 10


class LiveReport(ThreadingHTTPServer):
    """Serves the report of a run folder, and the files that it links to, to this machine only.

    Args:
        run_dir: None is the newest run below runs/ at every look, and there may be none yet.
        port: 0 takes a free one.

    Raises:
        InputError: the port is taken, or the folder is not a run's.
    """

    daemon_threads = True

    def __init__(self, run_dir: Path | None, port: int) -> None:
        self._given = None if run_dir is None else run_dir.resolve()
        if self._given is not None:
            render(self._given)  # an error here is for the terminal, not for the browser
        if port:
            check_port(port)
        super().__init__((HOST, port), _Handler)

    @property
    def run_dir(self) -> Path:
        """The run that is shown. Raises InputError where there is none."""
        return self._given or find_run("last").resolve()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body of a GET."""
        try:
            run_dir = self.run_dir
        except InputError as error:
            page = f'<meta http-equiv="refresh" content="{REFRESH_S}">{html.escape(str(error))}'
            return HTTPStatus.OK, "text/html", page.encode()
        if path == "/":
            try:
                return HTTPStatus.OK, "text/html", render(run_dir, refresh_s=REFRESH_S).encode()
            except InputError as error:
                return HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", str(error).encode()
        # Only what the page links to: a run folder also holds weights, and the path is the browser's word.
        if path.removeprefix("/") in {link for link, _ in linked_files(run_dir) if link}:
            try:
                return HTTPStatus.OK, "text/plain", read_regular(run_dir / unquote(path.removeprefix("/")))
            except OSError as error:
                return HTTPStatus.NOT_FOUND, "text/plain", str(error).encode()
        return HTTPStatus.NOT_FOUND, "text/plain", b"not linked from the report"


class _Handler(BaseHTTPRequestHandler):
    server: LiveReport

    def do_GET(self) -> None:
        # A page of another site may make a browser ask here under its own name (DNS rebinding).
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        status, kind, body = self.server.answer(self.path.partition("?")[0])
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a line for every look would fill the terminal."""


def serve_report(run_dir: Path | None, port: int, *, on_ready: Callable[[str], None]) -> None:
    """Serve the report until an interrupt.

    Args:
        on_ready: called with the URL.

    Raises:
        As LiveReport.
    """
    with LiveReport(run_dir, port) as server:
        on_ready(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
