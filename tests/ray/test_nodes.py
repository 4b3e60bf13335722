"""Several nodes: a node is lost in the middle of a run and comes back, and the losses stay the same to the bit."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.storage.core.ports import free_port

pytestmark = pytest.mark.ray
BIN = Path(sys.executable).parent
NUM_STEPS, CUT_STEP = 20, 6


class Node:
    """One node of a Ray cluster: `ray start` on this machine.

    Args:
        head: HOST:PORT of the head, which may be this node.
        inside: words that run a command in a network namespace.
    """

    def __init__(self, env: Mapping[str, str], address: str, head: str, inside: Sequence[str] = ()) -> None:
        role = [f"--address={head}"]
        if head.startswith(f"{address}:"):
            role = ["--head", f"--port={head.rpartition(':')[2]}", "--include-dashboard=false"]
        words = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={address}", "--num-cpus=1", *role]
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen([*inside, *words], env=env, stdout=self._out, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        """Until it has joined its cluster."""
        until_s = time.monotonic() + 120
        while "Ray runtime started" not in (said := self._read()):
            assert self._process.poll() is None, said
            assert time.monotonic() < until_s, said
            time.sleep(0.1)

    def kill(self) -> None:
        """As a loss of power: all of its processes end, and nobody is told."""
        with suppress(psutil.NoSuchProcess):
            for process in [*(root := psutil.Process(self._process.pid)).children(recursive=True), root]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()
        self._out.close()

    def _read(self) -> str:
        self._out.seek(0)
        return self._out.read()


@pytest.fixture
def nodes(folder: Path) -> Iterator[Callable[..., Node]]:
    """Starts nodes of a cluster of its own, which has a token; all end with the test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_", "NCCL_"))}
    started: list[Node] = []
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        env = {**kept, **token, "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0"}

        def start(*args: Any) -> Node:
            started.append(Node(env, *args))
            return started[-1]

        start.env = env  # type: ignore[attr-defined]
        yield start
        for node in started:
            node.kill()


class Drive:
    """A driver in a process of its own; `meddle` is called with every line that it prints."""

    def __init__(self, job: Any, folder: Path, env: Mapping[str, str], inside: Sequence[str] = (), **cluster: Any):
        self.lines: list[str] = []
        (folder / "job").write_bytes(pickle.dumps(job))
        script = str(Path(__file__).with_name("driver.py"))
        self._words = [*inside, sys.executable, script, str(folder / "job"), json.dumps({"launcher": "ray", **cluster})]
        self._env = env

    def run(self, meddle: Callable[[str], None]) -> int:
        """Its exit code."""
        with subprocess.Popen(self._words, env=self._env, stdout=subprocess.PIPE, text=True) as driver:
            try:
                assert driver.stdout is not None
                for line in driver.stdout:
                    self.lines.append(line)
                    meddle(line)
                return driver.wait()
            finally:
                driver.kill()

    @property
    def curve(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Loss and gradient norm by step and rank; a step that was done twice was the same twice."""
        found: dict[tuple[int, int], tuple[float, float]] = {}
        for words in (line.split() for line in self.lines if line.startswith("step ")):
            values = float(words[3]), float(words[4])
            assert found.setdefault((int(words[1]), int(words[2])), values) == values
        return found

    def of_kind(self, kind: str) -> list[str]:
        """Lines of the events of a kind."""
        return [line for line in self.lines if line.startswith(f"{kind} ")]


def is_step(line: str, number: int) -> bool:
    return line.startswith("step ") and int(line.split()[1]) >= number


def test_a_lost_node_is_waited_for_and_the_losses_stay_the_same(job, start, nodes, tmp_path: Path) -> None:
    """Two nodes on loopback addresses, and nothing configured but their number."""
    train = {"steps": NUM_STEPS, "micro_batches": 4}
    head = f"127.0.0.2:{free_port()}"
    nodes("127.0.0.2", head).wait()
    hurt = [nodes("127.0.0.3", head)]  # comes up meanwhile
    alone = start(job(train=train, memory="offload_ssd"), "inline", num_workers=2)
    hurt[0].wait()
    two = job(train=train, memory="offload_ssd", checkpoint={"every": CUT_STEP // 2})
    drive = Drive(two, tmp_path, nodes.env, address=head, num_nodes=2)

    def meddle(line: str) -> None:
        if is_step(line, CUT_STEP) and len(hurt) == 1:
            hurt[0].kill()
            hurt.append(None)
        elif line.startswith("waiting_for_nodes"):
            hurt.append(nodes("127.0.0.3", head))

    assert drive.run(meddle) == 0, "".join(drive.lines)
    (waiting,) = drive.of_kind("waiting_for_nodes")
    assert "1 of 1 node(s) can take that" in waiting
    assert len(drive.of_kind("group_restarted")) == len(drive.of_kind("nodes_are_back")) == 1
    for begun in drive.of_kind("group_started"):
        assert begun.count("{'GLOO_SOCKET_IFNAME': 'lo', 'NCCL_SOCKET_IFNAME': '=lo'}") == 2
    assert drive.curve == alone.curve
    assert len(drive.curve) == 2 * NUM_STEPS
    # The node that was there all the time has kept its slabs; the other one has new ones.
    (ready,), (slabs,) = drive.of_kind("cluster_ready"), drive.of_kind("slabs")
    kept = {(slab["node"], f"'pid': {slab['pid']}," in ready) for slab in json.loads(slabs.removeprefix("slabs "))}
    assert kept == {("127.0.0.2", True), ("127.0.0.3", False)}


class Link:
    """Two network namespaces behind one bridge. Cut, a node's packets end at the bridge, and nobody is told."""

    ADDRESSES = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self._spaces = [f"headrace{os.getpid()}{letter}" for letter in "abs"]
        self._bridge = self._spaces[2]

    def __enter__(self) -> Link:
        for space in self._spaces:
            self._ip("netns", "add", space)
            self._ip("-n", space, "link", "set", "lo", "up")
        self._ip("-n", self._bridge, "link", "add", "br0", "type", "bridge")
        self._ip("-n", self._bridge, "link", "set", "br0", "up")
        for index, (space, address) in enumerate(zip(self._spaces, self.ADDRESSES, strict=False)):
            ends = ["eth7", "netns", space, "type", "veth", "peer", "name", f"port{index}", "netns", self._bridge]
            self._ip("link", "add", *ends)
            self._ip("-n", self._bridge, "link", "set", f"port{index}", "master", "br0", "up")
            self._ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth7")
            self._ip("-n", space, "link", "set", "eth7", "up")
        return self

    def __exit__(self, *args: object) -> None:
        for space in self._spaces:
            self._ip("netns", "del", space)

    def inside(self, index: int) -> list[str]:
        """Words before a command of a node."""
        return ["ip", "netns", "exec", self._spaces[index]]

    def cut(self) -> None:
        """Take the second node off the bridge."""
        self._ip("-n", self._bridge, "link", "set", "port1", "nomaster")

    def mend(self) -> None:
        """Put it back."""
        self._ip("-n", self._bridge, "link", "set", "port1", "master", "br0")

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
@pytest.mark.parametrize("cut_s", [25.0, 90.0])
def test_a_link_that_is_cut_is_named_in_time_and_the_run_goes_on_when_it_is_back(
    cut_s: float, job, start, nodes, tmp_path: Path
) -> None:
    """Cut for less than Ray waits, and for longer: then Ray has given the node up, and is started on it again."""
    heartbeat_s = 10.0
    train = {"steps": NUM_STEPS, "micro_batches": 4}
    alone = start(job(train=train, memory="offload_ssd"), "inline", num_workers=2)
    cut_at: list[float] = []
    named_s: list[float] = []
    with Link() as link:
        addresses, head = link.ADDRESSES, f"{link.ADDRESSES[0]}:6399"
        for index, address in enumerate(addresses):
            nodes(address, head, link.inside(index)).wait()
        two = job(train=train, memory="offload_ssd", checkpoint={"every": CUT_STEP // 2})
        limits = {"heartbeat_timeout_s": heartbeat_s, "address": head, "num_nodes": 2}
        drive = Drive(two, tmp_path, nodes.env, link.inside(0), **limits)

        def mend() -> None:
            link.mend()
            if cut_s > 60.0:
                nodes(addresses[1], head, link.inside(1))

        def meddle(line: str) -> None:
            if is_step(line, CUT_STEP) and not cut_at:
                link.cut()
                cut_at.append(time.monotonic())
                threading.Timer(cut_s, mend).start()
            elif line.startswith("rank_hung"):
                named_s.append(time.monotonic() - cut_at[0])

        code = drive.run(meddle)
        print(f"link cut for {cut_s:g} s: named after {named_s} s")
    said = "".join(line for line in drive.lines if not line.startswith("step "))
    assert code == 0, said
    assert "rank 1 has not answered" in drive.of_kind("rank_hung")[0]
    assert heartbeat_s - 1.0 < named_s[0] < heartbeat_s + 5.0
    assert len(drive.of_kind("nodes_are_back")) == len(drive.of_kind("group_restarted")) == 1, said
    assert "'GLOO_SOCKET_IFNAME': 'eth7', 'NCCL_SOCKET_IFNAME': '=eth7'" in drive.of_kind("group_started")[0]
    log = (Path(two.run_dir) / "logs" / "rank1.log").read_text()
    assert "it is cut off, and ends" in log
    assert drive.curve == alone.curve
    assert len(drive.curve) == 2 * NUM_STEPS
