"""The limits and verdicts of `headrace bench kernels`, against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from headrace.bench import kernel_targets
from headrace.bench.harness import Row
from headrace.bench.kernel_case import Case
from headrace.bench.kernel_loss import SHAPES
from headrace.bench.kernel_targets import (
    Limits,
    attention_targets,
    loss_targets,
    share_of_copy,
    with_agreement,
)

MIB = 1024**2
GEMMA = dict(zip(("tokens", "vocab", "width"), SHAPES["gemma2_2b"], strict=True))
# A device of 788 TFLOP/s and 4 TB/s.
GEMM_MS = {name: 2.0 * n * v * d / 788e12 * 1e3 for name, (n, v, d) in SHAPES.items()}


def limits(name: str) -> Limits:
    return Limits(*SHAPES[name], three_ms=3 * GEMM_MS[name], logits_ms=GEMM_MS[name], copy_gbps=4000.0)


def test_the_memory_bound_is_both_gradients_in_fp32() -> None:
    assert limits("gemma2_2b").bound_mib == 2322.0


def test_the_limits_at_256_mib_are_the_worked_ones() -> None:
    """36.8 and 49.1 ms for the products; 16 chunks of 524 tokens touch 4.7 GB of gradient each, some 19 ms."""
    gemma = limits("gemma2_2b")
    assert gemma.three_ms == pytest.approx(36.8, abs=0.05)
    assert gemma.three_ms + gemma.logits_ms == pytest.approx(49.1, abs=0.05)
    traffic_ms = gemma.three_products_ms(256 * MIB) - gemma.three_ms
    assert traffic_ms == pytest.approx(15 * 8 * 256_000 * 2304 / 4e12 * 1e3)
    assert 17 < traffic_ms < 19
    assert gemma.limit_ms(256 * MIB) == gemma.four_products_ms(256 * MIB) < 50.0, "at 256,000 the vocabulary wins"
    llama = limits("llama3_8b")
    assert llama.limit_ms(256 * MIB) == llama.three_products_ms(256 * MIB), "at 128,256 the tokens win"


def test_with_one_chunk_nothing_is_added_to_the_products() -> None:
    gemma = limits("gemma2_2b")
    assert gemma.limit_ms(2 * 8192 * 256_000) == gemma.three_ms


def rows(**totals: float | None) -> dict[str, Row]:
    """Rows of the Gemma head on the device above; the memory of ours is 2,500 MiB, of others 6,000."""
    found = {f"limit_gemm_{word}": Row(word, {"forward_ms": GEMM_MS["gemma2_2b"]}) for word in ("logits", "hidden")}
    found["limit_gemm_weight"] = Row("weight", {"forward_ms": GEMM_MS["gemma2_2b"]})
    found["limit_copy"] = Row("copy", {"forward_gbps": 4000.0})
    for name, total_ms in totals.items():
        numbers = {"total_ms": total_ms, "extra_mib": 2500.0 if name.startswith("ours") else 6000.0}
        found[name] = Row(name, numbers) if total_ms is not None else Row(name, error="not installed here")
    return found


def judged(measured: Mapping[str, Row]) -> dict[str, Row]:
    found = loss_targets("gemma2_2b", GEMMA, measured, judged=True)
    return {row.name.removeprefix("loss/gemma2_2b/"): row for row in found}


def test_every_target_is_judged_and_the_ratio_is_in_the_row() -> None:
    names = ("ours", "ours_softcap", "ours_4096", "ours_4096_softcap", "ours_equal_memory")
    found = judged(
        rows(**dict.fromkeys(names, 55.0), quack=50.0, liger_cute=56.0, cce_exact=54.0),
    )
    assert found["limits"].numbers["bound_mib"] == 2322.0
    verdicts = {name: row.target.met for name, row in found.items() if row.target is not None}
    assert verdicts == {
        "time_over_limit/ours": True,
        "time_over_limit/ours_softcap": True,
        "time_over_limit/ours_4096": False,
        "time_over_limit/ours_4096_softcap": False,
        "memory/ours": True,
        "memory/ours_softcap": True,
        "time_over_quack/ours_4096": True,
        "time_over_quack/ours_4096_softcap": True,
        "time_over_liger_cute/ours": True,
        "time_over_cce_exact/ours": False,
    }
    assert found["time_over_cce_exact/ours"].numbers["ratio"] == pytest.approx(55 / 54)
    assert found["memory/ours"].numbers["over_bound_mib"] == pytest.approx(178.0)


@pytest.mark.parametrize(("mib", "met"), [(2578.0, True), (2578.1, False)])
def test_memory_may_be_256_mib_over_the_bound(mib: float, met: bool) -> None:
    measured = rows(ours=50.0)
    measured["ours"] = Row("ours", {"total_ms": 50.0, "extra_mib": mib})
    target = judged(measured)["memory/ours"].target
    assert target is not None
    assert target.met is met


def test_what_takes_more_memory_than_liger_is_not_compared_with_it() -> None:
    measured = rows(ours=60.0, ours_4096=40.0, liger_cute=50.0)
    measured["ours_4096"] = Row("ours_4096", {"total_ms": 40.0, "extra_mib": 6000.1})
    found = judged(measured)["time_over_liger_cute/ours"]
    assert found.numbers["ratio"] == pytest.approx(1.2)
    assert found.target is not None
    assert not found.target.met


def test_nothing_is_said_where_the_other_side_is_missing() -> None:
    found = judged(rows(ours=50.0, ours_4096=50.0, quack=None, cce_exact=None, liger_cute=None))
    for name in ("time_over_quack/ours_4096", "time_over_cce_exact/ours", "time_over_liger_cute"):
        assert found[name].target is None
        assert "not installed here" in str(found[name].error)
    assert "it was not requested" in str(found["time_over_limit/ours_softcap"].error)
    (only,) = loss_targets("gemma2_2b", GEMMA, {"ours": Row("ours", {"total_ms": 1.0})}, judged=True)
    assert "a plain product or the copy was not measured" in str(only.error)


def test_off_the_gpu_there_are_ratios_and_no_verdicts() -> None:
    found = list(loss_targets("gemma2_2b", GEMMA, rows(ours=50.0), judged=False))
    assert {row.target for row in found} == {None}
    assert any(row.name.endswith("time_over_limit/ours") and row.numbers["ratio"] for row in found)
    assert not any("quack" in row.name for row in found)


CASE = Case("loss", "gemma2_2b", "ours", "ours", GEMMA, "cuda:0", "bfloat16", "linear_cross_entropy")


@pytest.mark.parametrize(("error", "met"), [(0.009, True), (0.011, False), (float("nan"), False)])
def test_a_wrong_gradient_is_a_target_that_is_not_met(error: float, met: bool) -> None:
    numbers = {"rel_error_loss": 1e-6, "rel_error_d_hidden": 1e-3, "rel_error_d_weight": error}
    target = with_agreement(CASE, Row("x", numbers)).target
    assert target is not None
    assert (target.text, target.met) == ("result and gradients within 0.01", met)


@pytest.mark.parametrize(("differing", "met"), [(0.0, True), (1.0, False)])
def test_what_must_be_exact_is_judged_to_the_bit(differing: float, met: bool) -> None:
    target = with_agreement(CASE, Row("x", {"differing_entries": differing})).target
    assert target is not None
    assert (target.text, target.met) == ("bit for bit the reference", met)


def test_a_row_without_errors_or_with_a_reason_is_left_alone() -> None:
    for row in (Row("x", {"total_ms": 1.0}), Row("x", error="out of memory")):
        assert with_agreement(CASE, row) == row


def test_rates_are_shares_of_the_copy_of_their_group() -> None:
    found = share_of_copy(
        {
            "copy": Row("copy", {"forward_gbps": 4000.0}),
            "triton": Row("triton", {"forward_gbps": 3000.0, "backward_gbps": 1000.0}),
            "liger": Row("liger", error="not installed here"),
        }
    )
    assert found["triton"].numbers["forward_share_of_copy"] == 0.75
    assert found["triton"].numbers["backward_share_of_copy"] == 0.25
    assert "forward_share_of_copy" not in found["copy"].numbers
    assert found["liger"].error == "not installed here"


@pytest.mark.parametrize(("streaming_ms", "met"), [(108.0, True), (109.0, False)])
def test_streaming_keeps_92_percent_of_the_stock_operator(streaming_ms: float, met: bool) -> None:
    measured = {
        "stock": Row("stock", {"forward_ms": 100.0, "backward_ms": 100.0}),
        "streaming": Row("streaming", {"forward_ms": 100.0, "backward_ms": streaming_ms}),
    }
    forward, backward = attention_targets("sequence", measured, judged=True)
    assert forward.target is not None
    assert forward.target.met
    assert backward.target is not None
    assert backward.target.met is met
    assert kernel_targets.STREAMING_SHARE == 0.92
