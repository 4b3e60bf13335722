"""Silence and lack of progress, on a clock that the test turns."""

from __future__ import annotations

from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.states import TroubleKind
from headrace.platform.control.watch import Watch
from headrace.workers.actors.status import RankPhase, RankStatus
from headrace.workers.telemetry.records import Stage, StepPart

CLUSTER = ClusterConfig(heartbeat_timeout_s=10, start_timeout_s=100, hang_timeout_s=50)


def status(rank: int, progress: int, step: int | None, phase: RankPhase = RankPhase.running) -> RankStatus:
    return RankStatus(rank, phase, progress, step, 0, stage=Stage.compute)


def test_a_rank_that_falls_silent_is_named_and_its_neighbours_are_not() -> None:
    watch = Watch(CLUSTER, 2, 0.0)
    watch.hear({0: status(0, 2, 1), 1: status(1, 2, 1)}, 5.0)
    watch.hear({0: status(0, 4, 2)}, 14.0)
    assert watch.troubles(15.0) == []
    (trouble,) = watch.troubles(15.1)
    assert (trouble.rank, trouble.kind, trouble.step) == (1, TroubleKind.silent, 1)
    assert "heartbeat_timeout_s=10" in trouble.text
    assert Stage.compute.value in trouble.text


def test_before_the_first_step_a_rank_may_be_silent_for_longer() -> None:
    watch = Watch(CLUSTER, 1, 0.0)
    assert watch.troubles(99.0) == []
    assert watch.troubles(101.0)[0].kind is TroubleKind.silent


def test_a_group_that_answers_and_does_not_get_on_names_the_rank_behind() -> None:
    watch = Watch(CLUSTER, 2, 0.0)
    for now in (1.0, 2.0):
        watch.hear({0: status(0, 3, 1), 1: status(1, 2, 1)}, now)
    for now in (30.0, 51.0):
        watch.hear({0: status(0, 3, 1), 1: status(1, 2, 1)}, now)
        assert watch.troubles(now) == []
    watch.hear({0: status(0, 3, 1), 1: status(1, 2, 1)}, 52.0)
    (trouble,) = watch.troubles(52.0)
    assert (trouble.rank, trouble.kind) == (1, TroubleKind.stuck)
    assert "hang_timeout_s" in trouble.text
    assert Stage.compute.value in trouble.text


def test_a_start_without_a_first_step_has_its_own_limit() -> None:
    watch = Watch(CLUSTER, 1, 0.0)
    for now in (60.0, 101.0):
        watch.hear({0: status(0, 0, None)}, now)
    (trouble,) = watch.troubles(101.0)
    assert trouble.kind is TroubleKind.stuck
    assert "start_timeout_s" in trouble.text


def test_long_steps_raise_the_limit() -> None:
    watch = Watch(CLUSTER, 1, 0.0)
    for step, now in ((1, 40.0), (2, 80.0)):  # 40 s a step: five of them are 200 s
        watch.hear({0: status(0, 2 * step, step)}, now)
    watch.hear({0: status(0, 4, 2)}, 279.0)
    assert watch.troubles(279.0) == []
    watch.hear({0: status(0, 4, 2)}, 281.0)
    assert watch.troubles(281.0)[0].kind is TroubleKind.stuck


def test_ranks_that_have_ended_are_not_waited_for() -> None:
    watch = Watch(CLUSTER, 1, 0.0)
    watch.hear({0: status(0, 2, 1)}, 1.0)
    watch.hear({0: status(0, 2, 1, RankPhase.finished)}, 500.0)
    assert watch.troubles(501.0) == []


def test_ranks_that_still_run_when_the_time_for_stopping_is_up_are_late() -> None:
    watch = Watch(ClusterConfig(stop_timeout_s=20), 2, 0.0)
    watch.hear({0: status(0, 2, 1, RankPhase.finished), 1: status(1, 2, 1)}, 5.0)
    assert watch.late(30.0, stop_s=10.0) == []
    (trouble,) = watch.late(30.1, stop_s=10.0)
    assert (trouble.rank, trouble.kind) == (1, TroubleKind.late)
    assert "cluster.stop_timeout_s" in trouble.text
    assert Watch(CLUSTER, 2, 0.0).late(1e9, stop_s=0.0) == []


def in_chunk(number: int, progress: int, step: int) -> RankStatus:
    part = StepPart(2, 2, number, 64, "chunk")
    return RankStatus(0, RankPhase.running, progress, step, 0, stage=Stage.compute, part=part)


def test_a_long_step_whose_chunks_advance_lives_and_a_chunk_that_hangs_is_found() -> None:
    watch = Watch(CLUSTER, 1, 0.0)
    watch.hear({0: status(0, 2, 1)}, 1.0)
    for number in range(1, 31):  # 20 s a chunk: a step of 600 s, and no step is done for longer than any limit
        watch.hear({0: in_chunk(number, 2 + number, 1)}, 20.0 * number)
        assert watch.troubles(20.0 * number) == []
    watch.hear({0: status(0, 40, 2)}, 620.0)
    watch.hear({0: in_chunk(37, 41, 2)}, 640.0)
    for now in (700.0, 739.0):
        watch.hear({0: in_chunk(37, 41, 2)}, now)
        assert watch.troubles(now) == []
    watch.hear({0: in_chunk(37, 41, 2)}, 741.0)  # five chunks of 20 s; five steps would be 3095 s
    (trouble,) = watch.troubles(741.0)
    assert trouble.kind is TroubleKind.stuck
    assert f"last after step 2, {Stage.compute.value} (stage 2/2, chunk 37/64)" in trouble.text


def test_outside_of_a_step_the_longest_step_counts() -> None:
    watch = Watch(CLUSTER, 1, 0.0)
    for step, now in ((1, 40.0), (2, 80.0)):
        watch.hear({0: in_chunk(1, 2 * step - 1, step - 1)}, now - 1.0)
        watch.hear({0: status(0, 2 * step, step)}, now)
    watch.hear({0: status(0, 4, 2)}, 279.0)  # a checkpoint is being saved
    assert watch.troubles(279.0) == []
    watch.hear({0: status(0, 4, 2)}, 281.0)
    assert watch.troubles(281.0)[0].kind is TroubleKind.stuck
