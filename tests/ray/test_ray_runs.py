"""Whole runs under Ray: equal to plain processes to the bit, also when ranks are killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import ray

from headrace.helpers.tiers import has_id
from headrace.platform.control.reach import check_address
from headrace.platform.control.states import Outcome
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.workers.train.checkpoint_folder import CheckpointFolder

pytestmark = pytest.mark.ray
NUM_STEPS = 10
TRAIN = {"steps": NUM_STEPS, "micro_batches": 4}


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest) -> dict:
    return {}


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_ray_and_plain_processes_compute_the_same(num_workers: int, job, start, ray_cluster, reference) -> None:
    runs = {}
    for launcher in ("ray", "inline"):
        run = start(job(train=TRAIN, memory="offload_ssd"), launcher, num_workers=num_workers)
        assert run.outcome.outcome is Outcome.finished
        assert [result.rank for result in run.outcome.results] == list(range(num_workers))
        runs[launcher] = run
    assert runs["ray"].curve == runs["inline"].curve
    assert len(runs["ray"].curve) == NUM_STEPS * num_workers
    reference[num_workers] = runs["ray"].curve


def test_a_killed_rank_restarts_the_group_from_the_last_committed_checkpoint(
    job, start, ray_cluster, reference
) -> None:
    killed: list[int] = []
    actors: set[str] = set()

    def kill_rank(run, report) -> None:
        if getattr(report, "step", 0) >= 5 and not killed:
            actors.update(each["name"] for each in ray.util.list_named_actors(all_namespaces=True))
            killed.append(run.pid(1))
            os.kill(killed[0], signal.SIGKILL)

    hurt = job(train=TRAIN, memory="offload_ssd", checkpoint={"every": 3})
    run = start(hurt, num_workers=2, meddle=kill_rank)
    assert (run.outcome.outcome, run.outcome.restarts) == (Outcome.finished, 1)
    name = Path(hurt.run_dir).name
    assert {f"{name}-rank0", f"{name}-rank1"} <= actors
    assert any(actor.startswith(f"{name}-host-memory-") for actor in actors)
    assert "process of rank 1 ended" in run.of_kind("group_restarted")[0].text
    resumed = [e.text for report in run.reports for e in report.events if e.kind == "resumed"]
    assert len(resumed) == 1
    # Both slabs lend one range to each rank: the second group could only start because the first one's came back.
    leases = [result.stats["tiers"] for result in run.outcome.results]
    assert all(lease is not None for lease in leases)
    if 2 in reference:
        assert run.curve == reference[2]
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


def test_a_wrong_token_is_told_by_the_real_head(ray_cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_address(ray_cluster.address, "RAY_ADDRESS") == ray_cluster.address
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
    with pytest.raises(MachineError, check=has_id(ErrorId.token_refused)):
        check_address(ray_cluster.address, "RAY_ADDRESS")


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
