"""Runs that change their plan on the way: a drive that is slow indeed, and a whole run with all its records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from headrace.helpers.tiers import FakeTier, Faults, open_fake_stack
from headrace.helpers.training import RecordedRun, run_recorded, tiny_job, tiny_leases
from headrace.platform.cli.main import main
from headrace.platform.control import controller
from headrace.platform.planning import priced, steer
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.lengths import slab_bytes, solve_plans
from headrace.platform.planning.predict import Correction
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.steer import WINDOW, Steering
from headrace.storage.core.records import Medium
from headrace.workers.job import NewPlan, RankContext
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.telemetry import names
from headrace.workers.train import session

# A profile that is far too slow in compute and far too fast in its drive.
PROFILE = HardwareProfile(
    name="cpu",
    device_class=DeviceClass.cpu,
    evidence=Evidence.measured,
    compute_efficiency=1.0,
    fp32_tflops=1e-5,
    h2d_gbps=4.0,
    d2h_gbps=4.0,
    ssd_write_gbps=3.0,
    ssd_read_gbps=3.0,
)
DELAY_S = 0.02
# What the rate of compute is corrected by: what is measured of this machine is judged, but plans do not follow from it.
FASTER = 1000.0
# Some are over before the driver has heard of the first ones, solved, and told the ranks.
NUM_STEPS = 60
WORDS = ["debug=cpu_tiny", "cluster=inline", "train.num_threads=1", "tracking.progress=off"]
WORDS += ["cluster.num_workers=2", f"train.steps={NUM_STEPS}", "train.micro_batches=4", "data.seq_len=64"]
WORDS += ["hardware.compute_efficiency=1", "hardware.fp32_tflops=1e-4", "hardware.h2d_gbps=4", "hardware.d2h_gbps=4"]
WORDS += [
    "hardware.ssd_write_gbps=3",
    "hardware.ssd_read_gbps=3",
    "tiers.host.budget_gib=0",
    "tiers.device.budget_gib=0.00072",
]


@pytest.fixture(autouse=True)
def _few_bytes_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steer, "LEAST_BYTES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_a_drive_that_is_slow_is_left_alone_and_the_run_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(tmp_path, train={"steps": 2 * WINDOW + 3, "micro_batches": 1})
    request = PlanRequest(model=job.model, seq_len=32, batch_size=2, profile=PROFILE, loss_tile=32, host_budget_bytes=0)
    recompute = replace(request, preset=MemoryPreset.recompute)
    lean = priced.wanted_bytes(asked_plan(recompute), recompute)[Medium.hbm]
    request = replace(request, device_budget_bytes=lean + 16000, ssd_budget_bytes=1 << 22)
    plans = solve_plans(request)
    assert plans[32].predicted[names.EXPOSED_PCT] == 0
    slabs = slab_bytes(plans, request)
    steering = Steering(request, plans, slabs, shares={32: 1.0}, num_ranks=1, num_steps=job.train.steps, record={})
    told: list[NewPlan] = []

    def on_step(report: Any) -> None:
        steering.hear(report)
        if (new := steering.take_plan()) is not None:
            told.append(new)

    def slow(leases: Any, tiers: Any, *, device: Any, log: Any) -> Any:
        return open_fake_stack([FakeTier(slabs[Medium.ssd], Faults(delay_s=DELAY_S))], log=log)

    monkeypatch.setattr(session, "open_stack", slow)
    measured: list[Correction] = []
    correct = steer.corrected

    def corrected(*args: Any) -> Correction:
        measured.append(correct(*args))
        return replace(measured[-1], flops=FASTER)

    monkeypatch.setattr(steer, "corrected", corrected)

    def run(name: str, **options: Any) -> RecordedRun:
        own = replace(job, plan=plans[32], run_dir=str(tmp_path / name))
        return run_recorded(own, RankContext(leases=leases), **options)

    with tiny_leases(tmp_path) as per_rank:
        leases = per_rank[0]
        steered = run("steered", also_on_step=on_step, newest_plan=lambda num_done: told[-1] if told else None)
        assert steered.curve == run("left").curve
    (entry,) = steering.record["replans"]
    assert (entry["after_step"], entry["first_step"]) == (WINDOW + 1, WINDOW + 2)
    assert max(entry["correction"]["ssd_write"], entry["correction"]["ssd_read"]) < 0.01
    assert measured[0].flops > 3
    steps = [report.metrics for report in steered.reports]
    before, after = steps[1 : WINDOW + 1], steps[WINDOW + 2 :]
    assert all(step[names.SSD_STORED_GIB] > 0 for step in before)
    # A store counts when it is over, which may be in a later step than its own.
    stored = [step[names.SSD_STORED_GIB] for step in steps]
    assert sum(stored) == pytest.approx((WINDOW + 1) * plans[32].predicted[names.SSD_STORED_GIB])
    assert stored[-1] == 0
    # Of the seconds before, those that the drive's calls took are gone.
    seconds = [median(step[names.STEP_S] for step in part) for part in (before, after)]
    assert seconds[1] < seconds[0] - DELAY_S


def lines(folder: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, name).read_text().splitlines()]


@pytest.mark.slow
def test_ranks_change_their_plan_together_and_the_records_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is measured of the drive is given: that of this machine is anything."""
    words = [*WORDS, "data.cache_dir=data"]
    monkeypatch.setattr(controller, "POLL_S", 0.02)
    monkeypatch.setattr(steer, "WINDOW", 2)
    monkeypatch.setattr(steer, "corrected", lambda request, *rest: request.correction)
    assert main(["train", *words, "run.dir=left"]) == 0
    slow = Correction(flops=100.0, ssd_write=1e-3, ssd_read=1e-3)
    monkeypatch.setattr(steer, "corrected", lambda request, *rest: slow)
    assert main(["train", *words, "run.dir=steered"]) == 0
    left, steered = lines("left", "metrics.jsonl"), lines("steered", "metrics.jsonl")
    assert [line["loss"] for line in steered] == [line["loss"] for line in left]
    assert [line["grad_norm"] for line in steered] == [line["grad_norm"] for line in left]
    events = {event["kind"]: event for event in lines("steered", "events.jsonl")}
    first = events["replanned"]["facts"]["step"]
    assert 3 < first <= NUM_STEPS
    assert [line.get(names.REPLANS) for line in steered] == [None] * (first - 1) + [1.0] * (NUM_STEPS + 1 - first)
    stored = [line[names.SSD_STORED_GIB] for line in steered]
    plan = json.loads(Path("steered/plan.json").read_text())
    (entry,) = plan["replans"]
    assert entry["first_step"] == first
    each = entry["plan"]["predicted"][names.SSD_STORED_GIB] * 2  # of both ranks
    assert sum(stored) == pytest.approx((first - 1) * each)  # a store counts when it is over, in a later step perhaps
    assert entry["plan"]["layers"] != plan["layers"] or entry["plan"]["table"] != plan["table"]
    assert plan["correction"] == {"hardware": "cpu", "d2h": 1.0, "h2d": 1.0, **vars_of(slow)}
    assert json.loads(Path("left/plan.json").read_text())["replans"] == []
    assert events["replan"]["text"] in "".join(capsys.readouterr())
    # What is compared at the end is the last plan.
    summary = json.loads(Path("steered/summary.json").read_text())
    table = {line["name"]: line for line in summary["predicted_against_measured"]}
    assert table[names.SSD_STORED_GIB]["error_pct"] in (None, pytest.approx(0.0))
    assert table[names.STEP_S]["predicted"] == plan["predicted"][names.STEP_S]
    assert f"<td>{first}</td><td>{entry['why']}</td>" in Path("steered/report.html").read_text()

    # The run goes on at the corrected rates, and counts on.
    assert main(["train", "--resume", "steered", f"train.steps={NUM_STEPS + 1}"]) == 0
    resumed = json.loads(Path("steered/plan.json").read_text())
    assert resumed["replans"] == plan["replans"]
    assert resumed["correction"] == plan["correction"]
    assert resumed["predicted"] == plan["predicted"]
    last = lines("steered", "metrics.jsonl")[-1]
    assert (last["step"], last[names.REPLANS]) == (NUM_STEPS + 1, 1.0)
    assert last.get(names.SSD_STORED_GIB, 0.0) == stored[-1] == 0.0


def vars_of(correction: Correction) -> dict[str, float]:
    return {name: getattr(correction, name) for name in ("flops", "ssd_write", "ssd_read")}
