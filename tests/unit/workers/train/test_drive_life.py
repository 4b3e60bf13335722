"""A drive's write budget during a run: metrics by the formula, two events."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.helpers.training import RecordedRun, moved_bytes
from headrace.storage.config import EnduranceConfig, SsdTierConfig, TiersConfig
from headrace.storage.core.endurance import DAY_S
from headrace.storage.core.records import Medium
from headrace.workers.telemetry import names
from headrace.workers.train.drive_life import DriveLife

START_S = 1.7e9
# Of the tiny job: micro-batches x layers but the last x batch x tokens x hidden x fp32.
STEP_BYTES = 2 * 2 * 2 * 32 * 32 * 4


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a new drive."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Clock:
    def __init__(self) -> None:
        self.now_s = START_S

    def __call__(self) -> float:
        return self.now_s


def rated(num_bytes: float, years: float = 0.01) -> EnduranceConfig:
    """A rating that is due at once, for its lifetime is shorter than the grace."""
    return EnduranceConfig(rated_tbw=num_bytes / 1e12, lifetime_years=years)


def test_metrics_are_those_of_the_drive(tmp_path: Path) -> None:
    """Rated 600 TB over 5 years; a tenth of a terabyte an hour."""
    clock = Clock()
    life = DriveLife([tmp_path], EnduranceConfig(rated_tbw=600.0), clock=clock)
    for hour in range(1, 11):
        clock.now_s += 3600.0
        metrics = life.count(100_000_000_000)
        assert metrics[names.SSD_WRITTEN_TB] == pytest.approx(0.1 * hour)
        assert metrics[names.SSD_LIFE_USED_PCT] == pytest.approx(100 * 0.1 * hour / 600)
        due_tb = 600 * (30 + hour / 24) / (5 * 365)
        assert metrics[names.SSD_BUDGET_USED_PCT] == pytest.approx(100 * 0.1 * hour / due_tb)
        assert metrics[names.SSD_DAYS_LEFT] == pytest.approx((600 - 0.1 * hour) / 2.4)
    assert life.take_events() == []


def test_without_a_rating_bytes_are_counted_and_nothing_is_judged(tmp_path: Path) -> None:
    life = DriveLife([tmp_path], EnduranceConfig())
    assert life.count(10**15) == {names.SSD_WRITTEN_TB: 1000.0}
    assert life.take_events() == []


def test_a_run_that_writes_nothing_has_no_days_to_tell(tmp_path: Path) -> None:
    clock = Clock()
    life = DriveLife([tmp_path], rated(1000), clock=clock)
    clock.now_s += 5.0
    assert names.SSD_DAYS_LEFT not in life.count(0)


def test_both_events_come_once_and_say_what_is_done(tmp_path: Path) -> None:
    life = DriveLife([tmp_path], rated(1005))
    said = []
    for _ in range(12):
        life.count(100)
        said.append([event.kind for event in life.take_events()])
    assert said == [[]] * 8 + [["endurance_low"], [], ["endurance_over"], []]
    again = DriveLife([tmp_path], rated(1000))  # the next run on the drive knows it from the start
    (event,) = again.take_events()
    assert event.kind == "endurance_over"
    for words in ("120 %", "rated_tbw=1e-09", "lifetime_years=0.01", "the run continues"):
        assert words in event.text, words
    assert DriveLife([tmp_path], rated(1000), speaks=False).take_events() == []


def test_time_brings_a_drive_back_into_its_budget(tmp_path: Path) -> None:
    clock = Clock()
    life = DriveLife([tmp_path], EnduranceConfig(rated_tbw=365.0, lifetime_years=1.0), clock=clock)
    assert life.count(31 * 10**12)[names.SSD_BUDGET_USED_PCT] >= 100.0
    clock.now_s += 2 * DAY_S
    assert life.count(0)[names.SSD_BUDGET_USED_PCT] < 100.0


@pytest.fixture(scope="module")
def reference(job, run_job) -> RecordedRun:
    return run_job(job(train={"steps": 6}))


def test_a_run_over_its_write_budget_warns_and_goes_on(job, run_job, leases, reference) -> None:
    warned = job(
        memory="offload_ssd",
        tiers=TiersConfig(ssd=SsdTierConfig(endurance=rated(1.5 * STEP_BYTES))),
        train={"steps": 6},
    )
    with pytest.warns(UserWarning, match="the run continues"):
        run = run_job(warned, leases=leases)
    assert run.curve == reference.curve
    assert moved_bytes(warned.run_dir)["ssd", "store"] == 6 * STEP_BYTES


def test_what_a_failing_step_has_written_is_counted_too(job, run_job, leases, monkeypatch, tmp_path) -> None:
    """Fails after the second step's backward, before its gauges are read."""
    broken = job(memory="offload_ssd", train={"steps": 4})

    def boom(report) -> None:
        monkeypatch.setattr("headrace.workers.train.engine.TrainEngine._global_loss_and_norm", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        run_job(broken, leases=leases, also_on_step=boom)
    folder = Path(next(lease.folders[0] for lease in leases if lease.medium is Medium.ssd))
    assert DriveLife([folder], EnduranceConfig()).count(0)[names.SSD_WRITTEN_TB] * 1e12 == pytest.approx(2 * STEP_BYTES)
