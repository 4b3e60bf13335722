from __future__ import annotations

import pytest

from headrace.platform.tracking.summary import compare, summarize
from headrace.workers.telemetry import names


def steps() -> list[dict]:
    seconds = [9.0, 2.0, 3.0, 8.0, 4.0]
    return [
        {
            "step": i + 1,
            "loss": 5.0 - i,
            "num_ranks": 2,
            "first_of_start": i in (0, 3),
            names.STEP_S: s,
            names.GPU_PEAK_GIB: 1.0 + i,
            names.HOST_STORED_GIB: 4.0,
        }
        for i, s in enumerate(seconds)
    ]


def table(predicted: dict[str, float], num_ranks: int = 2) -> dict:
    return {line.name: line for line in compare(steps(), predicted, num_ranks)}


def test_times_leave_out_the_first_step_of_every_start() -> None:
    line = table({names.STEP_S: 2.0})[names.STEP_S]
    assert line.measured == 3.0
    assert line.error_pct == pytest.approx(50.0)


def test_peaks_are_of_the_fullest_step_and_bytes_of_all_ranks() -> None:
    lines = table({names.GPU_PEAK_GIB: 10.0, names.HOST_STORED_GIB: 2.0})
    assert lines[names.GPU_PEAK_GIB].measured == 5.0
    assert lines[names.GPU_PEAK_GIB].error_pct == pytest.approx(-50.0)
    assert lines[names.HOST_STORED_GIB].predicted == 4.0
    assert lines[names.HOST_STORED_GIB].error_pct == 0.0


def test_what_nobody_predicted_or_measured_is_said_to_be_unknown() -> None:
    lines = table({names.SSD_PEAK_GIB: 0.0})
    assert (lines[names.STEP_S].predicted, lines[names.STEP_S].error_pct) == (None, None)
    assert (lines[names.SSD_PEAK_GIB].measured, lines[names.SSD_PEAK_GIB].error_pct) == (None, None)


def test_an_empty_run_has_a_summary() -> None:
    summary = summarize([], {})
    assert summary["last_step"] == 0
    assert summary["loss"] == {"first": None, "last": None, "mean_of_last_5": None}


def test_losses_that_were_not_finite_are_left_out() -> None:
    lines = steps()
    lines[1]["loss"] = None
    assert summarize(lines, {})["loss"] == {"first": 5.0, "last": 1.0, "mean_of_last_5": pytest.approx(11 / 4)}


def test_a_share_has_no_error_of_its_own() -> None:
    lines = [{"step": s, names.EXPOSED_PCT: 4.0} for s in (1, 2)]
    line = next(x for x in compare(lines, {names.EXPOSED_PCT: 1.0}, 1) if x.name == names.EXPOSED_PCT)
    assert (line.predicted, line.measured, line.error_pct) == (1.0, 4.0, None)
