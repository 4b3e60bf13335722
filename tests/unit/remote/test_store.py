"""Reading an object store: whole or an error with a name, over a real S3 server that is made to fail."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import fsspec
import pytest

from headrace.helpers.s3 import Fault, S3Server, s3_server
from headrace.storage.core.errors import InputError, MachineError
from headrace.storage.remote import folder as remote_folder
from headrace.storage.remote.errors import RemoteChanged, RemoteMissing, RemoteUnavailable
from headrace.storage.remote.folder import ATTEMPTS, ByteRange, is_remote, open_remote, refuse_remote

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def url(s3: S3Server, bucket: str, tmp_path: Path) -> str:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "data.bin").write_bytes(CONTENT)
    (source / "below" / "empty").write_bytes(b"")
    return s3.upload(source, bucket, "some/folder")


def test_what_is_a_url() -> None:
    assert all(map(is_remote, ("s3://bucket/x", "memory://x", "file:///x", "S3://b/x")))
    assert not any(map(is_remote, ("runs/x", "/abs", "C:\\x", "a:b", None, Path("s3://b/x"), "", "://x")))
    with pytest.raises(InputError, match="out=s3://b/x: is a URL, a local path is expected"):
        refuse_remote("out", "s3://b/x")
    refuse_remote("out", "runs/s3")


@pytest.mark.parametrize("scheme", ["s3", "memory", "file"])
def test_listing_ranges_and_whole_files(url: str, scheme: str, tmp_path: Path) -> None:
    if scheme == "memory":
        url = f"memory://{tmp_path.name}/some/folder"
        filesystem = fsspec.filesystem("memory")
        filesystem.pipe(
            {f"/{tmp_path.name}/some/folder/{n}": c for n, c in {"data.bin": CONTENT, "below/empty": b""}.items()}
        )
    elif scheme == "file":
        url = f"file://{tmp_path}/source"
    remote = open_remote(url + "/")
    assert {name: file.num_bytes for name, file in remote.files().items()} == {"data.bin": 10240, "below/empty": 0}
    assert list(remote.files("below")) == ["below/empty"]
    assert remote.info("data.bin") == remote.files()["data.bin"]
    assert remote.read("data.bin") == CONTENT
    assert remote.read("below/empty") == b""
    parts = [ByteRange("data.bin", begin, begin + 3) for begin in range(0, 10_000, 517)]
    assert remote.read_ranges(parts) == [CONTENT[part.begin : part.end] for part in parts]
    assert remote.bytes_read == len(CONTENT) + 3 * len(parts)
    (tmp_path / "target" / "below").mkdir(parents=True)
    remote.fetch_all(remote.files(), tmp_path / "target")
    assert (tmp_path / "target" / "data.bin").read_bytes() == CONTENT
    assert (tmp_path / "target" / "below" / "empty").read_bytes() == b""
    with pytest.raises(RemoteMissing, match=r"nope: there is no such .*|nope.*No such file|nope"):
        remote.read("nope")
    with pytest.raises(RemoteMissing, match="below"):
        remote.read("below")


def test_a_large_file_comes_in_parts(url: str, s3: S3Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(remote_folder, "PART_BYTES", 1000)
    monkeypatch.setattr(remote_folder, "WINDOW_BYTES", 3500)
    open_remote(url).fetch("data.bin", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert (
        sorted(request.num_bytes for request in s3.requests if request.method == "GET")
        == [240] + [500] * 2 + [1000] * 9
    )


@pytest.mark.parametrize("fault", [Fault.cut, Fault.reset, Fault.busy])
def test_what_may_pass_is_tried_again_and_then_named(url: str, s3: S3Server, fail_first, fault: Fault) -> None:
    fail_first(fault, "data.bin", times=ATTEMPTS - 1)
    remote = open_remote(url)
    assert remote.read_bytes("data.bin", 5, 900) == CONTENT[5:900]
    # The HTTP library itself repeats a request whose connection was closed.
    assert 1 <= remote.num_retries <= ATTEMPTS - 1
    s3.requests.clear()
    fail_first(fault, "data.bin")
    with pytest.raises(
        RemoteUnavailable, match=rf"{url}/data.bin: {s3.proxy} cannot be reached, or did not answer whole"
    ):
        remote.read_bytes("data.bin", 5, 900)
    assert ATTEMPTS <= len(s3.requests) <= 2 * ATTEMPTS


def test_only_the_ranges_that_failed_are_asked_for_again(url: str, s3: S3Server, fail_first) -> None:
    fail_first(Fault.busy, "data.bin", times=2)
    parts = [ByteRange("data.bin", 100 * i, 100 * i + 100) for i in range(8)]
    assert open_remote(url).read_ranges(parts) == [CONTENT[part.begin : part.end] for part in parts]
    assert len(s3.requests) == 10


def test_access_denied_is_not_tried_again(url: str, s3: S3Server, fail_first) -> None:
    fail_first(Fault.denied, "data.bin")
    with pytest.raises(InputError, match=rf"{url}/data.bin: access denied .* AWS_ACCESS_KEY_ID"):
        open_remote(url).read_bytes("data.bin", 0, 9)
    assert len(s3.requests) == 1


def test_what_is_not_there_is_named_with_what_is(url: str, bucket: str) -> None:
    with pytest.raises(RemoteMissing, match=rf"{url}/data.bim: there is no such object .* there is: below, data.bin"):
        open_remote(url).read("data.bim")
    with pytest.raises(RemoteMissing, match=rf"s3://{bucket}/some/fold: there is nothing; beside it there is: folder"):
        open_remote(f"s3://{bucket}/some/fold").files()
    with pytest.raises(RemoteMissing, match=r"s3://no-such-bucket/x/y: .*bucket does not exist"):
        open_remote("s3://no-such-bucket/x").read("y")


def test_ranges_beyond_the_end_are_never_filled_up(url: str) -> None:
    with pytest.raises(RemoteUnavailable, match="240 bytes came of bytes 10000 to 10300"):
        open_remote(url).read_bytes("data.bin", 10_000, 10_300)
    with pytest.raises(InputError, match="range is not satisfiable"):
        open_remote(url).read_bytes("data.bin", 20_000, 20_300)


def test_no_credentials_no_client_no_scheme(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(InputError, match=r"no credentials for .* AWS_PROFILE"):
        open_remote(url).read("data.bin")
    with pytest.raises(InputError, match="not known"):
        open_remote("nosuchscheme://x/y")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    with pytest.raises(InputError, match=r'pip install "headrace\[s3\]"'):
        open_remote(url)


def test_a_server_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setattr(remote_folder, "FIRST_WAIT_S", 1e-3)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "data.bin").write_bytes(CONTENT)
    with s3_server() as server:
        for name, value in server.environment(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        remote = open_remote(server.upload(tmp_path / "x", bucket, "x"))
        assert remote.read("data.bin") == CONTENT
        server.process.kill()
        server.process.wait()
        with pytest.raises(RemoteUnavailable, match=f"s3://{bucket}/x/data.bin: {server.proxy} cannot be reached"):
            remote.read("data.bin")
    with pytest.raises(MachineError, match="AWS_ENDPOINT_URL"):  # nobody listens at the port
        remote.read("data.bin")


def test_a_file_replaced_under_a_fetch_does_not_appear(url: str, s3: S3Server, bucket: str, tmp_path: Path) -> None:
    def replace_it(request):
        s3.fault_of = lambda request: None
        s3.change(bucket, "some/folder/data.bin", lambda content: content[::-1])

    there = open_remote(url).info("data.bin")
    s3.fault_of = replace_it
    with pytest.raises(RemoteChanged, match=rf"{url}/data.bin: was replaced"):
        open_remote(url).fetch("data.bin", tmp_path / "got", there)
    assert not list(tmp_path.glob("*got*"))


def test_a_full_disk_is_named_and_leaves_nothing(url: str, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(MachineError, match=r"cannot be written \(File too large.* free there\).*XDG_CACHE_HOME"):
            open_remote(url).fetch("data.bin", tmp_path / "got")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*got*"))


def test_room_is_looked_for_before_the_first_byte(url: str, s3: S3Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10_239})())
    remote = open_remote(url)
    with pytest.raises(MachineError, match="10240 bytes are to be fetched, 10239 are free"):
        remote.fetch_all(remote.files(), tmp_path)
    assert s3.content_bytes("data.bin") == 0
