"""Rates that need torch but no GPU."""

from __future__ import annotations

import pytest
import torch

from headrace.platform.doctor import rates


def test_rates_of_the_cpu() -> None:
    rows = {(row["what"], row.get("dtype")): row for row in rates.cpu_rates()}
    assert set(rows) == {("host_copy", None), ("cpu_gemm", "float32"), ("cpu_gemm", "bfloat16")}
    assert rows["cpu_gemm", "float32"]["tflops"] > 0.001
    assert rows["host_copy", None]["gbps"] > 0.1


def test_touch_writes_every_page() -> None:
    tensor = torch.zeros(5 * 4096, dtype=torch.uint8)
    assert rates.touch(tensor) > 0
    assert tensor.view(5, 4096)[:, 0].tolist() == [1] * 5
    assert int(tensor.sum()) == 5


@pytest.mark.parametrize(("durations", "expected"), [([9.0, 2.5], 2.5), ([9.0, 0.2, 0.1, 0.3, 0.9], 0.2)])
def test_the_median_is_taken_until_enough_is_measured(
    durations: list[float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(durations[1:])  # the first call warms up and is not timed
    warmed: list[int] = []
    monkeypatch.setattr(rates, "_one_call", lambda work: next(calls))
    assert rates.cuda_seconds(lambda: warmed.append(1), min_s=0.3) == expected
    assert len(warmed) == 1


def test_pinning_names_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> None:
        raise RuntimeError(f"cudaHostRegister of {num_bytes} bytes failed with code 2")

    monkeypatch.setattr(rates, "pinned_buffer", refuse)
    (row,) = rates.pin_times((1,))
    assert row["gib"] == 1
    assert row["error"] == f"cudaHostRegister of {2**30} bytes failed with code 2"
    assert row["mem_available_gib_before"] > 0
