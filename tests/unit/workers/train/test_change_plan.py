"""Runs that change their plan between steps: the same bits, other bytes moved, other predictions from there on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from headrace.helpers.buckets import FAR, plan_of_length, tiny_bucket_job
from headrace.helpers.training import RecordedRun, plan_for
from headrace.storage.core.errors import InputError
from headrace.workers.job import NewPlan, RankContext, TrainJob
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.memory.policy import MemoryHandle
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.telemetry import names
from headrace.workers.train import drift
from headrace.workers.train.step_records import StepRecords, facts_of

NUM_STEPS = 6
CHUNKS = Choices(seq_len=32, chunk_size=12)
Told = Sequence[tuple[int, MemoryPlan]]


def told(job: TrainJob, plans: Told) -> Callable[[int], NewPlan | None]:
    """What a rank has been told when so many steps are done."""

    def newest(num_done: int) -> NewPlan | None:
        found = [NewPlan(n, {job.data.seq_len: plan}) for n, (after, plan) in enumerate(plans, 1) if after <= num_done]
        return found[-1] if found else None

    return newest


def chunked(job: TrainJob, preset: MemoryPreset) -> MemoryPlan:
    return preset_plan(preset, [dense_skeleton(job.model)] * job.model.num_layers, choices=CHUNKS)


def stored(run: RecordedRun) -> list[tuple[bool, bool]]:
    """Whether host and SSD were written, step by step."""
    return [
        (report.metrics[names.HOST_STORED_GIB] > 0, report.metrics[names.SSD_STORED_GIB] > 0) for report in run.reports
    ]


@pytest.fixture(scope="module")
def make(job) -> Callable[..., TrainJob]:
    return lambda **fields: job(train={"steps": NUM_STEPS}, **fields)


@pytest.fixture(scope="module")
def reference(make, run_job) -> RecordedRun:
    return run_job(make())


def test_a_run_that_changes_its_plan_has_the_same_bits(make, run_job, reference, leases) -> None:
    one = make(memory="offload_ssd")
    presets = {1: "offload_host", 2: "keep", 4: "recompute", 5: "offload_ssd"}
    plans = [(after, plan_for(preset, one.model)) for after, preset in presets.items()]
    run = run_job(one, leases=leases, newest_plan=told(one, plans))
    assert run.curve == reference.curve
    assert stored(run) == [(False, True), (True, False), (False, False), (False, False), (False, False), (False, True)]
    assert [report.metrics.get(names.REPLANS) for report in run.reports] == [None, 1.0, 2.0, 2.0, 3.0, 4.0]
    events = [event for report in run.reports for event in report.events if event.kind == "replanned"]
    assert [(event.facts["step"], event.facts["number"]) for event in events] == [(2, 1), (3, 2), (5, 3), (6, 4)]


def test_mutant_a_plan_that_is_put_over_the_one_before_is_refused(make, run_job, leases) -> None:
    one = make(memory="offload_host")
    with (
        patch.object(MemoryHandle, "remove", lambda self: None),
        pytest.raises(InputError, match="applied to these blocks already"),
    ):
        run_job(one, leases=leases, newest_plan=told(one, [(1, plan_for("keep", one.model))]))


def test_a_plan_by_chunk_changes_where_keys_wait(make, run_job, leases) -> None:
    plain = make(checkpoint={"every": 1, "every_chunks": 1, "at_end": False})
    of = {preset: chunked(plain, preset) for preset in (MemoryPreset.chunk_ssd, MemoryPreset.chunk_host)}
    one = replace(plain, plan=of[MemoryPreset.chunk_ssd])
    other = replace(one, run_dir=one.run_dir + "-changed")
    plans = [(2, of[MemoryPreset.chunk_host]), (4, of[MemoryPreset.chunk_ssd])]
    changed = run_job(other, leases=leases, newest_plan=told(other, plans))
    assert changed.curve == run_job(one, leases=leases).curve
    assert [ssd for _, ssd in stored(changed)] == [True, True, False, False, True, True]


def test_records_of_half_done_steps_are_those_of_the_new_plan(make, tmp_path: Path) -> None:
    one, context = make(), RankContext()
    other = one.changed(NewPlan(1, {one.data.seq_len: chunked(one, MemoryPreset.chunk_host)}))
    records = StepRecords(tmp_path, 1, facts_of(one, context), None)
    records.change_plan(other)
    assert records._facts == facts_of(other, context) != facts_of(one, context)


def test_rows_of_several_lengths_change_all_their_plans(run_folder: Path, run_job, leases) -> None:
    numbers = itertools.count()

    def make(memory: str, plans: Any = None) -> TrainJob:
        one = tiny_bucket_job(run_folder, run=f"changed{next(numbers)}", memory=memory)
        return one if plans is None else replace(one, bucket_plans=plans)

    one = make("offload_ssd")
    new = NewPlan(1, {length: plan_of_length("offload_host", one.model, length) for length in FAR})
    run = run_job(one, leases=leases, newest_plan=lambda num_done: new if num_done >= 2 else None)
    assert run.curve == run_job(make("keep")).curve
    assert stored(run) == [(False, True)] * 2 + [(True, False)] * 2


def test_a_step_is_compared_with_the_plan_that_it_had(make, run_job, leases, monkeypatch) -> None:
    monkeypatch.setattr(drift, "LEAST_BYTES", 1)
    one, gib = make(memory="offload_host"), 1024.0**3
    old, new = plan_for("offload_host", one.model), plan_for("offload_ssd", one.model)
    measured = run_job(one, leases=leases).reports[-1].metrics
    moved = measured[names.HOST_STORED_GIB]
    old = replace(old, predicted={names.HOST_STORED_GIB: moved, names.HOST_PEAK_GIB: 1 / gib, names.EXPOSED_PCT: 0.0})
    new = replace(new, predicted={names.SSD_STORED_GIB: moved / 2, names.SSD_WRITE_GBPS: 1e9})
    run = run_job(replace(make(), plan=old), leases=leases, newest_plan=told(one, [(2, new)]))
    before, after = run.reports[1].metrics, run.reports[2].metrics
    assert before[names.HOST_STORED_ERROR_PCT] == 0.0
    assert before[names.HOST_PEAK_ERROR_PCT] == pytest.approx(100 * (before[names.HOST_PEAK_GIB] * gib - 1))
    assert before[names.EXPOSED_ERROR_PCT] == before[names.EXPOSED_PCT]
    assert after[names.SSD_STORED_ERROR_PCT] == pytest.approx(100.0)
    assert after[names.SSD_WRITE_DRIFT_PCT] == pytest.approx(-100.0)
    assert not {names.HOST_STORED_ERROR_PCT, names.EXPOSED_ERROR_PCT} & after.keys()


def test_blocks_take_a_part_of_the_step(make, run_job) -> None:
    metrics = run_job(make()).reports[-1].metrics
    assert min(metrics[names.FORWARD_S], metrics[names.BACKWARD_S]) > 0
    assert metrics[names.FORWARD_S] + metrics[names.BACKWARD_S] < metrics[names.STEP_S]


def test_a_run_that_has_changed_its_plan_ignores_older_changes(make, run_job, leases) -> None:
    one = replace(make(memory="offload_ssd"), num_replans=1)
    run = run_job(one, leases=leases, newest_plan=told(one, [(0, plan_for("keep", one.model))]))
    assert stored(run) == [(False, True)] * NUM_STEPS
    assert run.reports[0].metrics[names.REPLANS] == 1.0
