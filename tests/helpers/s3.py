"""For tests: a real S3 server (moto's) on this machine, and a proxy before it that counts and goes wrong on demand."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from headrace.storage.core.owners import die_with_parent
from headrace.storage.core.ports import free_port

START_TIMEOUT_S = 300.0
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_BUSY = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"


class Fault(StrEnum):
    """What the proxy does in place of answering: half of the body, no answer at all, or an error of the store."""

    cut = "cut"
    reset = "reset"
    busy = "busy"
    denied = "denied"


@dataclass
class Request:
    """What the proxy was asked, and how many bytes of content it answered."""

    method: str
    path: str
    num_bytes: int = 0


@dataclass
class S3Server:
    """A running server.

    Args:
        endpoint: of moto. process: its own.
        proxy: of the proxy; what `environment` names.
        fault_of: asked for every request that came through the proxy; None answers it truly.
        requests: that came through the proxy, in the order of their beginnings.
    """

    endpoint: str
    process: subprocess.Popen[bytes]
    proxy: str = ""
    fault_of: Callable[[Request], Fault | None] = lambda request: None
    requests: list[Request] = field(default_factory=list)

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables that make S3 clients ask the proxy, with the local cache in a folder of the test."""
        return {
            "AWS_ENDPOINT_URL": self.proxy,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "XDG_CACHE_HOME": str(cache),
        }

    def client(self) -> Any:
        """A boto3 client that asks moto itself."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="tester",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )

    def upload(self, folder: Path, bucket: str, prefix: str) -> str:
        """Put the files of a folder into a bucket, which is made. Returns their URL."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
        return f"s3://{bucket}/{prefix}"

    def change(self, bucket: str, key: str, how: Callable[[bytes], bytes]) -> None:
        """Replace the content of an object."""
        client = self.client()
        content = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        client.put_object(Bucket=bucket, Key=key, Body=how(content))

    def content_bytes(self, ending: str) -> int:
        """Bytes of content that GETs of keys with this ending were answered."""
        return sum(
            r.num_bytes for r in self.requests if r.method == "GET" and r.path.partition("?")[0].endswith(ending)
        )


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run moto's server in a process of its own, and the proxy in a thread, for as long as the block runs."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    server = S3Server(f"http://127.0.0.1:{port}", process)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(server))
    server.proxy = f"http://127.0.0.1:{proxy.server_port}"
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        _wait_until_it_answers(server)
        yield server
    finally:
        proxy.shutdown()
        proxy.server_close()
        process.kill()
        process.wait()


def _wait_until_it_answers(server: S3Server) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{server.endpoint}/moto-api/", timeout=5):
                return
        except OSError:
            if server.process.poll() is not None or time.monotonic() > until_s:
                raise
            time.sleep(0.05)


def _handler_of(server: S3Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            request = Request(self.command, self.path)
            server.requests.append(request)
            fault = server.fault_of(request)
            if fault is Fault.reset:
                self.close_connection = True
            elif fault in (Fault.denied, Fault.busy):
                status, body = (403, _DENIED) if fault is Fault.denied else (503, _BUSY)
                self.answer(status, {"Content-Type": "application/xml"}, body)
            else:
                self.forward(request, cut=fault is Fault.cut)

        do_HEAD = do_GET

        def forward(self, request: Request, *, cut: bool) -> None:
            onward = http.client.HTTPConnection(server.endpoint.removeprefix("http://"), timeout=30)
            try:
                onward.request(self.command, self.path, headers=dict(self.headers))
                answer = onward.getresponse()
                body = answer.read()
            except OSError:
                self.close_connection = True
                return
            finally:
                onward.close()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OURS}
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
            body = body[: len(body) // 2] if cut else body
            request.num_bytes = len(body)
            self.answer(answer.status, {**headers, "Content-Length": length or "0"}, body)
            self.close_connection = self.close_connection or cut

        def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    return Handler


_OURS = ("content-length", "connection", "transfer-encoding", "date", "server")
