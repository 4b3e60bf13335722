from __future__ import annotations

import pytest

from headrace.bench.length import OURS, longest, run
from headrace.storage.core.errors import InputError


@pytest.mark.parametrize("budget", range(40))
@pytest.mark.parametrize("most", [4, 28, 30])
def test_the_search_finds_the_longest_length_that_fits(budget: int, most: int) -> None:
    asked: list[int] = []
    found = longest(lambda tokens: asked.append(tokens) or tokens + 2, budget, stride=4, most=most)
    assert found == max((n for n in range(0, most + 1, 4) if n == 0 or n + 2 <= budget), default=0)
    assert len(asked) == len(set(asked)) <= 8


def test_rows_of_a_tiny_model() -> None:
    options = {"model": "tiny", "vocab_size": 64, "budget_mib": 2, "stride": 64, "most": 256}
    rows = list(run({**options, "chunk_size": 64, "token_tile": 64}))
    assert [row.name for row in rows] == ["transformers_checkpointing", *OURS]
    for row in rows:
        assert row.numbers["live_peak_mib"] <= 2
        assert row.numbers["longest_tokens"] % 64 == 0


def test_a_stride_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="stride=0: at least 1"):
        next(run({"budget_mib": 1, "stride": 0, "most": 8, "chunk_size": 8, "token_tile": 8}))
