"""What a cluster or a machine cannot do is said before anything is started."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from headrace.helpers.tiers import has_id
from headrace.platform.control import reach
from headrace.platform.control.auth_token import ensure_token
from headrace.platform.control.config import ClusterConfig, Launcher
from headrace.platform.control.reach import check_address, check_cluster, check_node, check_temporary_folder
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.storage.core.ports import free_port
from headrace.workers.train.config import DeviceKind

TOKEN = "right"
METHODS = (reach.ASK, reach.ASK_NODE)


@pytest.fixture(autouse=True)
def _own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


class Head(grpc.GenericRpcHandler):
    """Answers the call to a head and that to a node as Ray does: a wrong token is refused."""

    def service(self, details):
        def answer(request, context):
            if dict(details.invocation_metadata).get("authorization") != f"Bearer {TOKEN}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer) if details.method in METHODS else None


@pytest.fixture
def head() -> Iterator[str]:
    """HOST:PORT of a head."""
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Head()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def silent() -> Iterator[str]:
    """HOST:PORT that takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """HOST:PORT where nobody listens."""
    return f"127.0.0.1:{free_port()}"


def test_a_head_that_answers_is_taken(head: str) -> None:
    assert check_address(head, "RAY_ADDRESS") == head


@pytest.mark.parametrize(("token", "words"), [("wrong", "was not accepted"), ("", "is not there")])
def test_a_refused_token_says_where_it_was_looked_for(
    head: str, token: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(MachineError, check=has_id(ErrorId.token_refused)) as caught:
        check_address(head, "cluster.address")
    assert words in str(caught.value)
    assert f"cluster.address={head}" in str(caught.value)


@pytest.fixture
def other() -> Iterator[str]:
    """HOST:PORT of a server that is no head: a proxy, or another port of Ray."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_node_must_answer_and_have_the_same_token(
    head: str, silent: str, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "ANSWER_S", 0.3)
    check_node("127.0.0.1", int(head.rpartition(":")[2]))
    for dead in (silent, closed):
        with pytest.raises(MachineError, check=has_id(ErrorId.cluster_unreachable), match=r"node 127\.0\.0\.1: "):
            check_node("127.0.0.1", int(dead.rpartition(":")[2]))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(
        MachineError, check=has_id(ErrorId.token_refused), match=r"node 127\.0.*all nodes need the same"
    ):
        check_node("127.0.0.1", int(head.rpartition(":")[2]))


@pytest.mark.parametrize("kind", ["closed", "silent", "other"])
def test_a_dead_address_is_named_with_its_variable(kind: str, request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "ANSWER_S", 0.3)
    monkeypatch.setenv("RAY_ADDRESS", request.getfixturevalue(kind))
    with pytest.raises(MachineError, check=has_id(ErrorId.cluster_unreachable), match="RAY_ADDRESS=127"):
        check_cluster(ClusterConfig(), DeviceKind.cpu)
    check_cluster(ClusterConfig(launcher=Launcher.inline), DeviceKind.cpu)
    check_cluster(ClusterConfig(address="local"), DeviceKind.cpu)


@pytest.mark.parametrize("address", ["ray://host:10001", "http://host:8265", "host", "host:", "host:port", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="HOST:PORT"):
        check_address(address, "cluster.address")


def test_auto_is_the_newest_cluster_of_this_machine(head: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(MachineError, check=has_id(ErrorId.cluster_unreachable)):
        check_address("auto", "RAY_ADDRESS")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(head)
    assert check_address("auto", "RAY_ADDRESS") == head


@pytest.mark.parametrize("cluster", [{"num_workers": 100_000}, {"num_nodes": 2}, {"cpus_per_worker": 1e4}])
def test_more_than_this_machine_can_ever_hold_is_refused_before_ray_is_started(cluster: dict) -> None:
    with pytest.raises(MachineError, check=has_id(ErrorId.cluster_too_small)):
        check_cluster(ClusterConfig(address="local", **cluster), DeviceKind.cpu)


def test_a_folder_too_deep_for_a_socket_is_refused_and_the_longest_that_fits_is_not() -> None:
    session = reach.SESSION.format(pid=12345)
    fits = 107 - len(session) - 1
    base = Path("/tmp/headrace-test")
    for length, ok in ((fits, True), (fits + 1, False)):
        folder = str(base / ("x" * (length - len(str(base)) - 1)))
        assert len(folder) == length
        if ok:
            # The longest path that Ray makes there can be bound.
            check_temporary_folder({"TMPDIR": folder}, pid=12345)
            path = Path(folder) / session
            path.parent.mkdir(parents=True)
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(path))
            path.unlink()
        else:
            with pytest.raises(MachineError, match="RAY_TMPDIR=/tmp"):
                check_temporary_folder({"TMPDIR": folder}, pid=12345)
    shutil.rmtree(base)


@pytest.mark.parametrize("key", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_cannot_be_written_is_refused(key: str) -> None:
    for folder in ("/proc/nope", "/dev/null"):
        with pytest.raises(MachineError, match=f"{key}={folder}"):
            check_temporary_folder({key: folder})


def test_without_a_home_the_token_is_the_runs_own_and_a_head_that_stays_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/proc/nohome")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    with pytest.raises(MachineError, match="/proc/nohome"):
        ensure_token()
    place = ensure_token(keep=False)
    assert place.there
    assert "this run alone" in place.words
    assert "/proc/nohome" in place.words
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_loopback_is_told_from_a_head_that_listens_everywhere(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reach.own_address() == "127.0.0.1":
        pytest.skip("this machine has no other address")
    assert reach.listens_on_loopback_only(head)
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        assert not reach.listens_on_loopback_only(f"127.0.0.1:{listener.getsockname()[1]}")
