from __future__ import annotations

from pathlib import Path

import pytest

from headrace.bench import ray_overhead
from headrace.bench.harness import run_bench
from headrace.bench.ray_overhead import StepTimes, comparison
from headrace.storage.core.errors import InputError
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import StepReport


def test_medians_of_all_rounds_are_compared() -> None:
    row = comparison([[1.0, 1.0, 9.0], [1.1, 1.0, 1.0]], [[1.01, 1.01, 1.01], [1.01, 1.01, 0.99]], {})
    assert row.numbers["overhead_pct"] == pytest.approx(1.0)
    assert row.numbers["overhead_of_fastest_pct"] == pytest.approx(-1.0)
    assert row.numbers["noise_pct"] == pytest.approx(0.0)
    assert row.target is not None
    assert row.target.met


def test_an_unmet_target_says_so() -> None:
    row = comparison([[1.0], [1.01]], [[1.2], [1.2]], {})
    assert row.target is not None
    assert not row.target.met
    assert row.target.text == "at most 2 % of the step time"


def test_a_busy_machine_cannot_show_that_the_target_is_met() -> None:
    row = comparison([[1.0], [1.1]], [[0.9], [0.9]], {})
    assert row.target is not None
    assert not row.target.met
    assert "too busy for a result" in row.target.text
    assert row.numbers["noise_pct"] == pytest.approx(100 * 0.1 / 1.05)


def test_a_step_is_as_long_as_on_its_slowest_rank_and_the_first_ones_do_not_count() -> None:
    times = StepTimes()
    for step in range(1, 5):
        for rank, seconds in enumerate((1.0, 2.0 + step)):
            times.on_report(StepReport(step, rank, {names.STEP_S: seconds}))
    assert times.warm == [5.0, 6.0]


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(InputError, match="steps=2"):
        list(ray_overhead.run({**ray_overhead.OPTIONS, "steps": 2}))


@pytest.mark.ray
@pytest.mark.soak
def test_both_launchers_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "debug=cpu_tiny memory=keep train.num_threads=1"
    options = {"steps": 4, "rounds": 1, "seq_len": 128, "overrides": words}
    path, rows = run_bench("ray-overhead", options, tmp_path / "results")
    assert [row.name for row in rows] == ["inline_0", "ray_0", "overhead"]
    assert all(row.numbers["num_warm_steps"] == 2 for row in rows[:2])
    assert path.exists()


@pytest.mark.ray
@pytest.mark.soak
def test_records_are_compared_with_none(tmp_path: Path) -> None:
    _, (row,) = run_bench("records-overhead", {"steps": 2, "rounds": 1, "step_s": 0.2}, tmp_path / "results")
    assert row.numbers["num_steps"] == 2
    assert row.numbers["call_ms"] > 0.0
    assert row.numbers["bare_step_s"] == pytest.approx(0.2, rel=0.9)
