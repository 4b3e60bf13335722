"""The attention table without a GPU: its reference, its order, and how it says what it could not measure."""

from __future__ import annotations

import time

import pytest
import torch

from headrace.bench import attention_operators
from headrace.bench.attention_operators import Operator, attention_rows, dense, facts_rows, operators, speed_rows
from headrace.bench.harness import Row


def refuse(*_: object) -> None:
    raise RuntimeError("this operator wants another GPU")


REFUSING = Operator("refusing", refuse, refuse, has_deterministic=True)  # type: ignore[arg-type]


def test_the_reference_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 7, 128, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    for seen in (mask, None):
        out, lse = dense((q, k, v), seen)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        assert torch.allclose(out, expected, atol=1e-12)
        scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) / 128**0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        assert torch.allclose(lse, scores.exp().sum(-1).log(), atol=1e-12)
    assert not torch.allclose(dense((q, k, v), mask)[0], dense((q, k, v), None)[0])


def test_an_operator_that_refuses_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = (torch.zeros(1, 28, 1, 128), (torch.zeros(1),) * 3)
    monkeypatch.setattr(attention_operators, "_tensors", lambda *_: tensors)
    (row,) = speed_rows(REFUSING, (28, 4), 16384, 16384, True)
    assert row["error"] == "RuntimeError: this operator wants another GPU"
    assert (row["operator"], row["num_q"], row["causal"]) == ("refusing", 16384, True)
    (row,) = facts_rows(REFUSING)
    assert row["error"] == "RuntimeError: this operator wants another GPU"


def test_rates_count_the_flops_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Operator("fake", lambda *_: (None, None, None), lambda *_: None, True)  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(attention_operators, "_tensors", lambda *_: (None, (None,) * 3))
    monkeypatch.setattr(attention_operators, "cuda_seconds", lambda work: 2.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    square = 4 * 1024 * 1024 * 28 * 128
    for causal, num_k, flops in ((True, 1024, square / 2), (False, 1024, square), (False, 4096, 4 * square)):
        rows = list(speed_rows(fake, (28, 4), 1024, num_k, causal))
        assert [(row["pass"], row.get("deterministic")) for row in rows] == [
            ("forward", None),
            ("backward", False),
            ("backward", True),
        ]
        assert rows[0]["tflops"] == pytest.approx(flops / 2 / 1e12)
        assert rows[1]["tflops"] == pytest.approx(2.5 * flops / 2 / 1e12)


def test_what_time_does_not_allow_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention_operators, "operators", lambda: ([REFUSING], [{"operator": "fa4", "error": "absent"}])
    )
    rows = list(attention_rows(time.monotonic() - 1))
    assert rows[0] == {"operator": "fa4", "error": "absent"}
    assert rows[-1]["what"] == "attention_skipped"
    assert len(rows[-1]["shapes"]) == 2 * 3 + 2 * 2
    assert rows[-1]["shapes"][0] == "refusing 28/4 16384x16384"
    assert rows[-1]["shapes"][-1] == "refusing 32/8 262144x262144"


def test_the_operators_of_aten_are_called_as_their_schema_says() -> None:
    found, missing = operators()
    assert [operator.name for operator in found][:2] == ["flash", "cudnn"]
    assert len(found) + len(missing) == 3
    for name, outputs in (
        ("_scaled_dot_product_flash_attention", 9),
        ("_scaled_dot_product_cudnn_attention", 9),
    ):
        schema = getattr(torch.ops.aten, name).default._schema
        assert len(schema.returns) == outputs
        assert [a.name for a in schema.returns][2:6] == ["cum_seq_q", "cum_seq_k", "max_q", "max_k"]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_backward.default._schema
    assert [a.name for a in flash.arguments][6:14] == [
        *("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "philox_seed", "philox_offset")
    ]
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default._schema
    assert [a.name for a in cudnn.arguments][6:15] == [
        *("philox_seed", "philox_offset", "attn_bias", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal"),
    ]


def test_the_benchmark_has_a_row_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"what": "attention", "operator": "fa4", "error": "absent"}
    fast = {"what": "attention", "operator": "flash", "num_q": 7, "s": 0.5, "tflops": 2.0}
    monkeypatch.setattr(attention_operators, "attention_rows", lambda deadline_s: [missing, fast])
    assert list(attention_operators.run(attention_operators.OPTIONS)) == [
        Row("attention fa4", config={"operator": "fa4"}, error="absent"),
        Row("attention flash", {"s": 0.5, "tflops": 2.0}, {"operator": "flash", "num_q": 7}),
    ]
