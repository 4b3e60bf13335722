from __future__ import annotations

import pytest

from headrace.bench import knapsack
from headrace.storage.core.errors import InputError

OPTIONS = {**knapsack.OPTIONS, "model": "tiny", "seq_len": 512, "budgets": "0.5"}


@pytest.mark.soak  # torch.compile takes seconds
def test_our_plan_computes_less_again_at_no_higher_peak() -> None:
    (row,) = knapsack.run(OPTIONS)
    assert row.error is None
    assert row.target.met, row
    assert 0 <= row.numbers["our_recomputed_gflops"] <= row.numbers["their_recomputed_gflops"]
    # Their planner has something to choose: a matrix product or attention runs again.
    assert row.numbers["their_recomputed_gflops"] > 0


@pytest.mark.parametrize("budgets", ["1", "half", "-0.1", ""])
def test_budgets_are_shares(budgets: str) -> None:
    with pytest.raises(InputError, match=r"shares from 0 to below 1"):
        next(knapsack.run({**OPTIONS, "budgets": budgets}))
