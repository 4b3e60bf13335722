"""Whole runs under Ray: equal to plain processes to the bit, also when ranks are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from headrace.helpers.tiers import has_id
from headrace.platform.control.ray_node import cluster_nodes
from headrace.platform.control.reach import check_address, check_node
from headrace.platform.control.states import Outcome
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.workers.telemetry.records import StepReport
from headrace.workers.train.checkpoint_folder import CheckpointFolder

pytestmark = pytest.mark.ray
NUM_STEPS = 6
TRAIN = {"steps": NUM_STEPS, "micro_batches": 4}


@pytest.fixture(scope="module")
def curves() -> dict[int, dict]:
    return {}


@pytest.fixture
def plain(job, start, curves: dict[int, dict]) -> Callable[[int], dict]:
    """The curve of a run in so many plain processes, which is made once."""

    def curve_of(num_workers: int) -> dict:
        if num_workers not in curves:
            run = start(job(train=TRAIN, memory="offload_ssd"), "inline", num_workers=num_workers)
            assert run.outcome.outcome is Outcome.finished
            curves[num_workers] = run.curve
            assert len(run.curve) == NUM_STEPS * num_workers
        return curves[num_workers]

    return curve_of


@pytest.mark.soak
@pytest.mark.parametrize("num_workers", [1, 2])
def test_ray_and_plain_processes_compute_the_same(num_workers: int, job, start, ray_cluster, plain) -> None:
    run = start(job(train=TRAIN, memory="offload_ssd"), num_workers=num_workers)
    assert run.outcome.outcome is Outcome.finished
    assert [result.rank for result in run.outcome.results] == list(range(num_workers))
    assert run.curve == plain(num_workers)


def kill_owners(run: Any) -> dict[str, int]:
    """Kill both slab owners; what the run must tell of them."""
    pids = [slab["pid"] for slab in run.of_kind("cluster_ready")[0].facts["slabs"]]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return dict(zip(("host-memory", "ssd-storage"), pids, strict=True))


def told(run: Any) -> dict[str, int]:
    return {event.facts["owner"]: event.facts["pid"] for event in run.of_kind("owner_lost")}


def test_owners_killed_in_the_first_step_change_nothing(job, start, ray_cluster, plain) -> None:
    """Ranks go on with the slabs that they have open, and compute what plain processes do."""
    killed: dict[str, int] = {}

    def meddle(run, found) -> None:
        if not killed and isinstance(found, StepReport):
            killed.update(kill_owners(run))

    run = start(job(train=TRAIN, memory="offload_ssd"), num_workers=2, meddle=meddle)
    assert (run.outcome.outcome, run.outcome.exit_code, run.outcome.restarts) == (Outcome.finished, 0, 0)
    assert told(run) == killed
    assert [result.rank for result in run.outcome.results] == [0, 1]
    assert run.curve == plain(2)


def test_owners_killed_before_the_ranks_are_up_are_replaced_and_a_killed_rank_restarts_the_group(
    job, start, ray_cluster, plain
) -> None:
    """Ranks that have not opened the slabs get new ones; the group goes on from the last committed checkpoint."""
    owners: dict[str, int] = {}
    killed: list[int] = []
    actors: set[str] = set()

    def meddle(run, found) -> None:
        if not owners and run.of_kind("cluster_ready"):
            owners.update(kill_owners(run))
        if getattr(found, "step", 0) >= 4 and not killed:
            actors.update(each["name"] for each in ray.util.list_named_actors(all_namespaces=True))
            killed.append(run.pid(1))
            os.kill(killed[0], signal.SIGKILL)

    hurt = job(train=TRAIN, memory="offload_ssd", checkpoint={"every": 3})
    run = start(hurt, num_workers=2, meddle=meddle)
    assert (run.outcome.outcome, run.outcome.exit_code, run.outcome.restarts) == (Outcome.finished, 0, 1)
    assert told(run) == owners
    name = Path(hurt.run_dir).name
    assert {f"{name}-rank0", f"{name}-rank1"} <= actors
    assert any(actor.startswith(f"{name}-host-memory-") for actor in actors)
    assert "process of rank 1 ended" in run.of_kind("group_restarted")[0].text
    resumed = [e.text for report in run.reports for e in report.events if e.kind == "resumed"]
    assert len(resumed) == 1
    # Both slabs lend one range to each rank: the second group could only start because the first one's came back.
    leases = [result.stats["tiers"] for result in run.outcome.results]
    assert all(lease is not None for lease in leases)
    assert run.curve == plain(2)
    log = (Path(hurt.run_dir) / "logs" / "rank1.log").read_text()
    assert "rank 1 attempt 0" in log
    assert "rank 1 attempt 1" in log
    assert not list(Path(hurt.run_dir).glob("ranks/*/reports-*"))


def test_bad_input_in_a_rank_reaches_the_user_in_its_own_words_without_a_restart(job, start, ray_cluster) -> None:
    with pytest.raises(InputError, match="vocab"):
        start(job(model={"vocab_size": 7}), num_workers=1)


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"num_nodes": 3}, r"3 node\(s\) of 1 rank\(s\).*are wanted, 1 of 1 node\(s\) can take that"),
        ({"num_workers": 2, "cpus_per_worker": 1000.0}, r"2000\.02 CPUs wanted, .*\n.*lower cluster.cpus_per_worker"),
    ],
)
def test_a_cluster_that_is_too_small_is_told_in_words_at_once(job, start, ray_cluster, cluster, words: str) -> None:
    with pytest.raises(MachineError, match=words):
        start(job(), start_timeout_s=3600.0, **cluster)  # waiting for it would end the test


def test_a_wrong_token_is_told_by_the_real_head_and_by_a_node(ray_cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = cluster_nodes()
    check_node(node.address, node.port)
    assert check_address(ray_cluster.address, "RAY_ADDRESS") == ray_cluster.address
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
    with pytest.raises(MachineError, check=has_id(ErrorId.token_refused)):
        check_address(ray_cluster.address, "RAY_ADDRESS")
    with pytest.raises(MachineError, check=has_id(ErrorId.token_refused), match=f"node {node.address}"):
        check_node(node.address, node.port)


# A closing terminal does the same in test_terminal.py; that SIGTERM is heeded like it, in test_signals.py.
@pytest.mark.soak
def test_sigterm_to_the_driver_saves_and_stops_all_ranks_and_the_exit_code_says_so(job, drive, ray_cluster) -> None:
    long = job(train={"steps": 100_000, "micro_batches": 4})
    with drive(long, "ray", RAY_ADDRESS=ray_cluster.address) as driver:
        driver.send_signal(signal.SIGTERM)
        rest = driver.stdout.read()
        assert driver.wait(600) == 3, rest
    assert "stop_requested" in rest
    assert "checkpoint_saved" in rest
    steps = CheckpointFolder(Path(long.run_dir) / "checkpoints").committed_steps()
    assert len(steps) == 1
    assert steps[0] >= 1


def test_nothing_is_left_on_the_cluster(ray_cluster) -> None:
    for _ in range(600):
        free, there = ray.available_resources(), ray.cluster_resources()
        if free.get("CPU") == there["CPU"]:
            break
        time.sleep(0.2)
    assert free["CPU"] == there["CPU"]
