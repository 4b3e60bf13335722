from __future__ import annotations

import pytest

from headrace.bench.chunks import BY_LAYER, OPTIONS, run
from headrace.storage.core.errors import InputError

TINY = {**OPTIONS, "model": "tiny", "vocab_size": 64, "seq_len": 128, "chunk_size": 32, "token_tile": 32, "rounds": 1}


def test_rows_of_a_tiny_model() -> None:
    rows = {row.name: row for row in run({**TINY, "record_every": "2"})}
    assert list(rows) == [BY_LAYER, "chunk", "chunk_host", "chunk_ssd", "chunk_host_record_every_2"]
    for row in rows.values():
        assert row.numbers["us_per_token"] == pytest.approx(1e6 * row.numbers["step_s_median"] / 128)
    for name in ("chunk_host", "chunk_ssd"):
        numbers = rows[name].numbers
        # Of four chunks with a KV block each, keys of the first three are stored, and their gradients by later chunks.
        assert numbers["stored_bytes"] == 2 * (3 + (3 + 2 + 1)) * 2 * 32 * 32 * 4
        assert numbers["explained_s"] > rows["chunk"].numbers["step_s_median"]
        assert numbers["over_explained"] == pytest.approx(numbers["step_s_median"] / numbers["explained_s"])
    assert rows["chunk_host_record_every_2"].numbers["over_no_record"] > 0
    assert [name for name, row in rows.items() if row.target] == ["chunk", "chunk_host", "chunk_ssd"]


@pytest.mark.parametrize(("key", "value"), [("rounds", 0), ("record_every", "0")])
def test_no_round_and_no_chunk_are_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{key}=0: at least 1"):
        next(run({**TINY, key: value}))
