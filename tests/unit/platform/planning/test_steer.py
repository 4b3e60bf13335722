"""A run on a machine whose true rates are known: what is measured is what the planner predicts at these rates."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from headrace.helpers.planning import FOUR_KEYS
from headrace.platform.planning import steer
from headrace.platform.planning.answer import resumed, solve_plan
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.lengths import slab_bytes, solve_plans
from headrace.platform.planning.predict import Correction
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.platform.planning.solve import predict
from headrace.platform.planning.steer import COST_STEPS, LEAST_GAIN, WINDOW, Steering
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import REPLANNED, RankEvent, StepReport

CPU = HardwareProfile(
    name="cpu",
    device_class=DeviceClass.cpu,
    evidence=Evidence.measured,
    compute_efficiency=1.0,
    fp32_tflops=1.0,
    h2d_gbps=4.0,
    d2h_gbps=4.0,
    ssd_write_gbps=3.0,
    ssd_read_gbps=3.0,
)
REQUEST = PlanRequest(
    model=replace(FOUR_KEYS, num_layers=6),
    seq_len=1024,
    batch_size=16,
    profile=CPU,
    device_budget_bytes=int(0.3 * GIB),
    host_budget_bytes=0,
    ssd_budget_bytes=GIB,
)
SLOW_DRIVE = Correction(ssd_write=0.1, ssd_read=0.1)


class Run:
    """A run of one rank, or of several that are alike, with its plan carried out at the true rates."""

    def __init__(
        self,
        request: PlanRequest = REQUEST,
        truth: Correction = SLOW_DRIVE,
        *,
        num_ranks: int = 1,
        num_steps: int = 1000,
        record: Any = None,
        **extra: float,
    ) -> None:
        self.request, self.truth, self.num_ranks, self.extra = request, truth, num_ranks, extra
        self.plans = solve_plans(request)
        shares = dict.fromkeys(self.plans, 1 / len(self.plans))
        self.steering = Steering(
            request,
            self.plans,
            slab_bytes(self.plans, request),
            shares=shares,
            num_ranks=num_ranks,
            num_steps=num_steps,
            record=record or {},
        )
        self.step, self.events, self.pending = 0, [], None

    def go(self, num_steps: int) -> list[RankEvent]:
        """Steps; a plan that is sent is taken up before the next but one."""
        for _ in range(num_steps):
            self.step += 1
            events = ()
            if self.pending is not None:
                self.plans, self.pending = self.pending.plans, None
                events = (RankEvent(REPLANNED, "", {}),)
            metrics = self.metrics()
            for rank in range(self.num_ranks):
                report = StepReport(self.step, rank, metrics, events if rank == 0 else ())
                self.events += self.steering.hear(report)
            self.pending = self.steering.take_plan()
        return self.events

    def metrics(self) -> dict[str, float]:
        plan = self.plans[self.request.seq_len]
        return predict(plan, replace(self.request, correction=self.truth)) | self.extra

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


@pytest.fixture(autouse=True)
def _few_bytes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steer, "LEAST_BYTES", 1)


def stored(run: Run) -> float:
    return run.metrics()[names.SSD_STORED_GIB]


def test_the_plan_changes_when_the_drive_is_slow() -> None:
    run = Run()
    before, first = stored(run), run.metrics()[names.STEP_S]
    run.go(WINDOW)  # the first one does not count
    assert run.kinds == []
    run.go(1)
    assert run.kinds == ["plan_checked", "replan"]
    checked, again = run.events
    assert checked.facts["correction"] == pytest.approx(vars_of(SLOW_DRIVE))
    assert "to SSD 0.1 x, from SSD 0.1 x" in checked.text
    run.go(1)
    assert stored(run) < before / 2
    # The best plan for the true rates in the slabs that are open.
    slab = slab_bytes(solve_plans(REQUEST), REQUEST)[Medium.ssd]
    best = solve_plan(replace(REQUEST, correction=SLOW_DRIVE, ssd_budget_bytes=slab))
    assert run.metrics()[names.STEP_S] == best.predicted[names.STEP_S] < 0.5 * first
    assert (again.facts["step_s"], again.facts["new_step_s"]) == pytest.approx((first, best.predicted[names.STEP_S]))
    assert run.go(100) == [checked, again], "what it predicts now is what it measures"


def test_a_plan_that_changes_keeps_its_cuts() -> None:
    run = Run(replace(REQUEST, head_groups=2))
    before = run.plans[REQUEST.seq_len]
    run.go(WINDOW + 2)
    after = run.plans[REQUEST.seq_len]
    assert after.layers != before.layers
    assert (after.cuts, after.sweep) == (before.cuts, before.sweep)


@pytest.mark.parametrize("ratio", [3.0, 1 / 3])
def test_a_profile_that_is_wrong_by_three_is_corrected(ratio: float) -> None:
    run = Run(truth=Correction(flops=ratio))
    run.go(WINDOW + 1)
    assert run.events[0].facts["correction"]["flops"] == pytest.approx(ratio)
    # A device that is faster than was thought computes again what it would wait for.
    assert run.kinds == (["plan_checked", "replan"] if ratio > 1 else ["plan_checked"])
    record = run.steering.take_record()
    assert record is not None
    assert record["correction"]["flops"] == pytest.approx(ratio)
    assert run.steering.take_record() is None


def test_what_larger_tiers_would_gain_is_said() -> None:
    """A device that was thought to be too fast computes again what the drive would have held."""
    fast = replace(CPU, fp32_tflops=3.0, ssd_write_gbps=1.0, ssd_read_gbps=1.0)
    run = Run(replace(REQUEST, profile=fast), Correction(flops=1 / 3))
    run.go(WINDOW + 1)
    assert run.kinds == ["plan_checked", "larger_tiers"]
    assert "headrace train --resume" in run.events[1].text
    own, _ = resumed(run.request, run.steering.record)
    assert solve_plan(own).predicted[names.STEP_S] == pytest.approx(run.events[1].facts["larger_step_s"])
    assert run.events[1].facts["larger_step_s"] < 0.95 * run.events[1].facts["step_s"]


def test_a_right_profile_is_checked_once_and_changes_nothing() -> None:
    run = Run(truth=Correction(flops=1.05, ssd_read=0.93))
    assert [event.kind for event in run.go(50)] == ["plan_checked"]
    assert run.events[0].facts["correction"] == vars_of(Correction())
    assert run.steering.take_record() is None


def test_a_full_link_says_nothing_about_the_drive() -> None:
    fast = replace(CPU, ssd_write_gbps=40.0, ssd_read_gbps=40.0)
    run = Run(replace(REQUEST, profile=fast), Correction())
    run.go(WINDOW + 1)
    assert run.events[0].facts["correction"] == pytest.approx(vars_of(Correction()))


def test_a_chosen_preset_is_compared_and_stays() -> None:
    run = Run(replace(REQUEST, preset=MemoryPreset.offload_ssd))
    run.go(50)
    assert set(run.kinds) == {"plan_checked"}
    assert "memory=offload_ssd stays as it is" in run.events[0].text
    assert run.events[0].facts["correction"]["ssd_read"] == pytest.approx(0.1)


def test_what_gains_too_little_is_left() -> None:
    whole = Run().go(WINDOW + 1)[1].facts
    gain = 1 - whole["new_step_s"] / whole["step_s"]
    assert gain > LEAST_GAIN
    # So many steps are left that the change has just not paid at the end, and one more.
    few = WINDOW + 1 + int(COST_STEPS / gain)
    assert "replan" not in [event.kind for event in Run(num_steps=few).go(WINDOW + 1)]
    assert "replan" in [event.kind for event in Run(num_steps=few + 1).go(WINDOW + 1)]


def test_little_gain_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steer, "LEAST_GAIN", 0.99)
    assert [event.kind for event in Run().go(50)] == ["plan_checked"]


def test_bytes_that_are_too_few_say_nothing_about_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steer, "LEAST_BYTES", GIB)
    (event,) = Run().go(WINDOW + 1)
    correction = event.facts["correction"]
    assert (correction["ssd_write"], correction["ssd_read"]) == (1.0, 1.0)


def test_a_spent_drive_is_not_written_any_more() -> None:
    run = Run(truth=Correction(), **{names.SSD_BUDGET_USED_PCT: 100.0})
    assert stored(run) > 0
    run.go(2)
    assert run.kinds == ["replan"]
    assert "write budget" in run.events[0].text
    run.go(1)
    assert stored(run) == 0
    assert "replan" not in [event.kind for event in run.go(50)[1:]]


def test_a_spent_drive_that_is_needed_goes_on() -> None:
    least = replace(REQUEST, device_budget_bytes=int(0.25 * GIB))
    run = Run(least, Correction(), **{names.SSD_BUDGET_USED_PCT: 130.0})
    run.go(30)
    assert run.kinds.count("replan") == 1
    assert "no plan without the drive fits" in run.events[0].text
    assert stored(run) > 0


def test_every_change_waits_longer_than_the_one_before() -> None:
    run = Run()
    changes = []
    for _ in range(400):
        num = run.kinds.count("replan")
        run.go(1)
        if run.kinds.count("replan") > num:
            changes.append(run.step)
            # The drive is as it was, or slow again: seen in its rate, or in what nothing stores any more.
            run.truth = Correction(flops=3.0) if run.truth == SLOW_DRIVE else SLOW_DRIVE
    waits = [later - earlier for earlier, later in itertools.pairwise(changes)]
    assert 3 <= len(changes) <= 6
    assert all(later >= WINDOW * 2 ** (n + 1) for n, later in enumerate(waits))


def test_ranks_that_report_later_are_judged_by_the_plan_that_they_had() -> None:
    """The controller hears all of rank 0 before rank 1: a step under the plan before must not count for the next."""
    run = Run(num_ranks=2)
    run.go(WINDOW + 1)
    assert run.pending is not None
    was, run.plans = run.metrics(), run.pending.plans
    now, at = run.metrics(), run.step
    for step in (at + 1, at + 2):
        events = (RankEvent(REPLANNED, ""),) if step == at + 2 else ()
        run.steering.hear(StepReport(step, 0, now if events else was, events))
    assert run.steering.hear(StepReport(at + 1, 1, was)) == []
    run.step, run.pending = at + 2, None
    run.steering.hear(StepReport(at + 2, 1, now))
    assert run.go(100)[2:] == []


def test_a_group_that_starts_again_has_the_newest_plan(make_job) -> None:
    run = Run()
    run.go(WINDOW + 1)
    job = make_job(run)
    told = run.steering.job(job)
    assert told.num_replans == 1
    assert told.plan == run.pending.plans[REQUEST.seq_len]
    assert run.steering.job(told) is told
    # It begins at an earlier step, and its first step allocates.
    run.plans, run.pending, run.step = run.pending.plans, None, 3
    assert run.go(60)[2:] == []
    record = run.steering.take_record()
    assert [entry["number"] for entry in record["replans"]] == [1]
    assert record["layers"] == told.plan.to_dict()["layers"]


def test_the_record_goes_on_in_the_next_start() -> None:
    run = Run()
    run.go(WINDOW + 2)
    record = run.steering.take_record()
    (entry,) = record["replans"]
    assert entry["plan"]["layers"] == solve_plan(REQUEST).to_dict()["layers"]
    assert (entry["after_step"], entry["first_step"]) == (WINDOW + 1, WINDOW + 2)
    own, warning = resumed(REQUEST, record)
    assert warning is None
    assert own.correction == run.steering._request.correction
    again = Run(own, record=record)
    # Slabs are not open yet, so the plan may be better than the one that had to fit into them.
    assert again.metrics()[names.STEP_S] <= run.metrics()[names.STEP_S]
    assert again.steering.number == 1
    assert [event.kind for event in again.go(50)] == ["plan_checked"]
    assert again.steering.record["replans"] == record["replans"]


@pytest.mark.parametrize(
    "correction",
    [
        None,
        "fast",
        {"hardware": "cpu"},
        {"hardware": "h200", **dict.fromkeys(("flops", "d2h", "h2d", "ssd_write", "ssd_read"), 2.0)},
        {"hardware": "cpu", **dict.fromkeys(("flops", "d2h", "h2d", "ssd_write", "ssd_read"), 0.0)},
        {"hardware": "cpu", **dict.fromkeys(("flops", "d2h", "h2d", "ssd_write", "ssd_read"), float("nan"))},
    ],
)
def test_a_record_of_other_hardware_or_without_sense_corrects_nothing(correction: Any) -> None:
    own, _ = resumed(REQUEST, solve_plan(REQUEST).to_dict() | {"correction": correction})
    assert own.correction == Correction()


def vars_of(correction: Correction) -> dict[str, float]:
    return {name: getattr(correction, name) for name in correction.__dataclass_fields__}


@pytest.fixture
def make_job(tmp_path):
    from headrace.storage.config import TiersConfig
    from headrace.workers.data.config import DataConfig
    from headrace.workers.job import TrainJob
    from headrace.workers.parallel.config import ParallelConfig
    from headrace.workers.train.config import CheckpointConfig, OptimConfig, TrainConfig

    def make(run: Run) -> TrainJob:
        return TrainJob(
            run_dir=str(tmp_path),
            model=run.request.model,
            data=DataConfig(name="x", seq_len=REQUEST.seq_len),
            optim=OptimConfig(),
            parallel=ParallelConfig(),
            plan=solve_plan(REQUEST),
            tiers=TiersConfig(),
            train=TrainConfig(),
            checkpoint=CheckpointConfig(),
        )

    return make
