"""The benchmark of steps: every case runs the same step, and its peaks are those of that step."""

from __future__ import annotations

import pytest

from headrace.bench import step
from headrace.storage.core.errors import InputError

OPTIONS = {**step.OPTIONS, "model": "tiny", "vocab_size": 64, "seq_len": 256, "token_tile": 64, "rounds": 1}


def test_peaks_and_targets_of_ours_and_theirs() -> None:
    cases = ("keep", "offload_host", "transformers", "transformers_checkpointing")
    rows = {row.name: row for row in step.run({**OPTIONS, "cases": ",".join(cases)})}
    assert tuple(rows) == cases
    for row in rows.values():
        # Operators take memory inside that no tensor of ours holds.
        assert 1.0 <= row.numbers["allocated_peak_mib"] / row.numbers["live_peak_mib"] < 1.5
        assert row.target is not None
    peaks = {name: row.numbers["live_peak_mib"] for name, row in rows.items()}
    assert peaks["offload_host"] < peaks["keep"]
    assert peaks["transformers_checkpointing"] < peaks["transformers"]
    ratio = rows["keep"].numbers["step_s_median"] / rows["transformers"].numbers["step_s_median"]
    assert rows["keep"].numbers["seconds_over_transformers"] == ratio


def test_theirs_is_compared_with_our_fastest_case_that_takes_no_more() -> None:
    peaks = {"keep": (3, 3), "recompute": (1, 1), "memo": (2, 2), "transformers": (2, 2)}
    seconds = {"keep": [1.0], "recompute": [8.0], "memo": [6.0], "transformers": [4.0]}
    rows = {row.name: row for row in step.rows(list(peaks), peaks, seconds, OPTIONS)}
    assert rows["transformers"].numbers["ours_over_seconds"] == 1.5
    assert not rows["transformers"].target.met


def test_unknown_cases_are_named() -> None:
    with pytest.raises(InputError, match="compiled_10"):
        list(step.run({**OPTIONS, "cases": "transformers_compiled_10"}))


@pytest.mark.soak
def test_compiled_cases_compile_once_and_their_peaks_are_seen() -> None:
    """A budget that recomputes nothing takes about what the plain model takes."""
    cases = ("keep", "transformers", *step.BUDGETS)
    rows = {row.name: row.numbers for row in step.run({**OPTIONS, "seq_len": 1024, "cases": ",".join(cases)})}
    for name in step.BUDGETS:
        assert 0.2 < rows[name]["allocated_peak_mib"] / rows["transformers"]["allocated_peak_mib"] < 1.2
        assert rows[name]["step_s_median"] < 5.0  # compiling takes longer
        assert "live_peak_mib" not in rows[name]
