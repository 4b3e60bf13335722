"""The parts that want a GPU, on one: small sizes of the same code."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.bench.attention_operators import facts_rows, operators, speed_rows
from headrace.platform.children import find
from headrace.platform.doctor.rates import GIB, copy_rates, gemm_rates, pin_times
from headrace.platform.doctor.readings import gds_rows, torch_rows

pytestmark = pytest.mark.gpu


def test_copies_and_products() -> None:
    rows = copy_rates(num_bytes=GIB // 8)
    pinned = [find(rows, memory="pinned", direction=way) for way in ("h2d", "d2h", "h2d+d2h together")]
    assert all(row is not None and row["gbps"] > 1 for row in pinned)
    assert {row["dtype"] for row in gemm_rates((1024,))} == {"bfloat16", "float32"}


def test_pinning_takes_and_gives_back() -> None:
    (row,) = pin_times((1,))
    assert "error" not in row, row
    assert row["pin_s"] > 0


@pytest.mark.parametrize("operator", operators()[0], ids=lambda operator: operator.name)
def test_operators_are_right_and_timed(operator: object) -> None:
    (facts,) = facts_rows(operator)  # type: ignore[arg-type]
    assert "error" not in facts, facts
    assert facts["out_rel_error"] < 1e-2
    rows = list(speed_rows(operator, (28, 4), 1024, 1024, True))  # type: ignore[arg-type]
    assert all("error" not in row for row in rows), rows
    assert {row["pass"] for row in rows} == {"forward", "backward"}


def test_torch_and_engine_say_what_is_there(tmp_path: Path) -> None:
    rows = list(torch_rows())
    assert all("error" not in row for row in rows), rows
    assert find(rows, what="torch")["gpus"]  # type: ignore[index]
    engine = find(list(gds_rows(str(tmp_path))), what="engine")
    assert engine is not None
    assert engine["got"] in ("ring", "gds")
