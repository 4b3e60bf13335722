"""`headrace bench kernels`: its options, what it measures, and that every case computes the right thing on the CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from headrace.bench import (
    kernel_attention,
    kernel_block,
    kernel_child,
    kernel_codec,
    kernel_loss,
    kernel_targets,
    kernels,
)
from headrace.bench.harness import Row, run_bench
from headrace.bench.kernel_case import Case, NotHere, Shared
from headrace.bench.kernel_child import Bench, reason
from headrace.bench.kernel_loss import draw_head, make_oracle, sketch
from headrace.bench.kernel_settings import DEFAULTS, Settings, read_settings
from headrace.storage.core.errors import InputError

TINY = {
    kernel_attention: {"block": 16, "q_heads": 4, "k_heads": 2, "head": 8},
    kernel_block: {"tokens": 7, "hidden": 24, "q_heads": 4, "k_heads": 1, "head": 8, "inner": 20},
    kernel_codec: {"tokens": 5, "width": 32},
}


def options(**changes: Any) -> dict[str, Any]:
    return {**DEFAULTS, "device": "cpu", **changes}


def on_cuda() -> Settings:
    """As on a machine that has one; nothing is computed."""
    return replace(read_settings(options(dtype="bfloat16")), device=torch.device("cuda", 0))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Settings:
    for module, shape in TINY.items():
        monkeypatch.setattr(module, "CPU_SIZES" if hasattr(module, "CPU_SIZES") else "CPU_SHAPE", shape)
    monkeypatch.setattr(kernel_child, "WARM_UP_PASSES", 0)
    monkeypatch.setattr(kernel_child, "MOST_PASSES", 2)
    return read_settings(options(shapes="70x257x48"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"part": "losses"}, "part=losses: one of loss"),
        ({"shapes": "70x257"}, "TOKENSxVOCABULARYxWIDTH"),
        ({"shapes": "0x257x8"}, "every size is at least 1"),
        ({"contenders": "ligre"}, "contenders=ligre: one of"),
        ({"dtype": "float8"}, "dtype=float8"),
        ({"rounds": 0}, "rounds=0: at least 1"),
        ({"part": ","}, "at least one is expected"),
    ],
)
def test_wrong_options_are_named(change: Mapping[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        list(kernels.run(options(limit_s=-1.0, **change)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        read_settings(options(device="cuda"))


def test_the_loss_has_the_promised_contenders_at_the_promised_shapes() -> None:
    cases = kernel_loss.cases(on_cuda())
    shapes = {tuple(case.shape.values()) for case in cases}
    assert shapes == {(8192, 256_000, 2304), (8192, 128_256, 4096), (8192, 152_064, 3584)}
    gemma = {case.contender: case for case in cases if case.shape_name == "gemma2_2b"}
    assert set(gemma) >= {
        *("limit_gemm_logits", "limit_gemm_hidden", "limit_gemm_weight", "limit_copy"),
        *("ours", "ours_tokens", "ours_vocabulary", "ours_4096", "ours_softcap", "ours_4096_softcap"),
        *("ours_equal_memory", "torch_plain", "torch_compile", "torch_linear_cross_entropy"),
        *("liger", "liger_cute", "cce", "cce_exact", "quack"),
    }
    assert {c.options["backend"] for c in gemma.values() if c.family == "ours"} == {"triton", "reference"}
    assert gemma["cce_exact"].options["filter_eps"] is None
    assert gemma["quack"].options["chunk_size"] == gemma["ours_4096"].options["tokens_per_chunk"] == 4096
    # Liger's environment is of its CuTe process alone: the default path must not see it.
    assert [c.contender for c in gemma.values() if c.environment] == ["liger_cute"]
    assert len({case.name for case in cases}) == len(cases)


def test_other_parts_have_their_contenders_on_cuda() -> None:
    block = {case.name for case in kernel_block.cases(on_cuda())}
    for operator in ("rms_norm/16384x4096", "add_rms_norm/16384x4096", "swiglu/16384x14336"):
        for contender in ("copy", "reference", "triton", "torch_compile", "liger"):
            assert f"block/{operator}/{contender}" in block
    attention = kernel_attention.cases(on_cuda())
    assert {(case.shape["keys"], case.shape["block"]) for case in attention} == {(8 * 16384, 16384), (9 * 16384, 16384)}
    assert {"copy", "reference", "triton"} <= {case.contender for case in kernel_codec.cases(on_cuda())}


@pytest.mark.parametrize("module", [kernel_loss, *TINY], ids=lambda module: module.__name__.rsplit("_", 1)[-1])
def test_every_case_on_the_cpu_is_right_and_has_times(module: ModuleType, tiny: Settings) -> None:
    # torch's own loss loads a compiler when it is first called: seconds; it has a test of its own.
    cases: list[Case] = [case for case in module.cases(tiny) if case.contender != "torch_linear_cross_entropy"]
    assert cases
    run_each(cases)


@pytest.mark.soak
def test_torchs_own_loss_is_right(tiny: Settings) -> None:
    run_each([case for case in kernel_loss.cases(tiny) if case.contender == "torch_linear_cross_entropy"])


def run_each(cases: Sequence[Case]) -> None:
    bench = Bench()
    for case in cases:
        made = bench.prepare(case)
        assert made["numbers"]["extra_mib"] is None
        row = kernel_targets.with_agreement(case, Row(case.name, made["numbers"]))
        assert row.target is None or row.target.met, row
        assert row.target is not None or case.is_limit or case.contender in ("copy", "stock")
        numbers = bench.round(case.name)["numbers"]
        assert numbers["total_ms"] >= numbers["forward_ms"] > 0
    assert bench.drop() == {}


def a_case(contender: str, family: str, tiny: Settings, **more: Any) -> Case:
    found = next(case for case in kernel_loss.cases(tiny) if case.contender == "ours")
    return replace(found, contender=contender, family=family, options=more)


def test_a_wrong_gradient_does_not_pass(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """One label's row off by a half, among 257: the loss is right, one gradient is not."""

    def wrong(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weight.register_hook(lambda grad: grad.index_fill(0, targets[1:2], 0.0))
        return kernel_loss.plain_loss(hidden, weight, targets)

    case = a_case("torch_plain", "torch", tiny)
    monkeypatch.setattr(kernel_loss, "_torch", lambda case: wrong)
    row = kernel_targets.with_agreement(case, Row(case.name, Bench().prepare(case)["numbers"]))
    assert row.target is not None
    assert not row.target.met
    assert (row.numbers["rel_error_d_hidden"] or 0.0) < 1e-5 < (row.numbers["rel_error_d_weight"] or 0.0)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_oracle_is_autograds(tiny: Settings, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_loss, "ORACLE_LOGITS", 1000)  # tiles of three tokens
    head = draw_head(a_case("ours", "ours", tiny))
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in head[:2])
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(logits, head.targets)
    grads = torch.autograd.grad(loss, (hidden, weight))
    oracle = make_oracle(head, softcap)
    assert float(oracle.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
    for got, grad in zip(oracle[1:], grads, strict=True):
        torch.testing.assert_close(got, sketch(grad, torch.float64), rtol=1e-10, atol=1e-12)


def test_a_sketch_has_the_relative_error_of_the_whole() -> None:
    grad = torch.randn(3000, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3000, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for size in (1e-2, 1e-4):
        off, whole = (sketch(tensor, torch.float64) for tensor in (grad + size * noise, grad))
        assert float((off - whole).norm() / whole.norm()) == pytest.approx(size, rel=0.1)


def test_some_tokens_are_certain_and_some_are_not(tiny: Settings) -> None:
    head = draw_head(a_case("ours", "ours", tiny))
    labels = head.targets.clamp(min=0)[:, None]
    p = (head.hidden @ head.weight.T).detach().softmax(-1).gather(1, labels)[:, 0]
    assert float(p.min()) < 0.5 < 0.99 < float(p.max())
    assert int((head.targets == -100).sum()) == 1


@pytest.mark.parametrize(
    ("contender", "module"),
    [("liger", "liger_kernel"), ("liger_cute", "liger_kernel"), ("cce", "cut_cross_entropy"), ("quack", "quack")],
)
def test_a_package_that_is_not_there_is_a_reason(
    contender: str, module: str, tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotHere, match=f"{contender} is not installed here"):
        kernel_loss.build(a_case(contender, contender, tiny, filter_eps=None, chunk_size=8), Shared())


def test_torch_before_its_own_loss_is_a_reason(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(NotHere, match="has no linear_cross_entropy"):
        kernel_loss.build(a_case("torch_linear_cross_entropy", "torch", tiny), Shared())


def test_reasons_are_one_line() -> None:
    assert reason(NotHere("quack is not installed here")) == "quack is not installed here"
    assert reason(RuntimeError("CUDA error: illegal\naddress")) == "RuntimeError: CUDA error: illegal"
    assert reason(AssertionError()) == "AssertionError"


def test_what_comes_too_late_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.Workshop, "start", lambda self, cases: None)
    rows = list(kernels.run(options(part="codec,block", limit_s=-1.0)))
    names = [row.name for row in rows]
    assert names[0] == "codec/eight_bit_token/512x256"
    assert "block/rms_norm/1024x512" in names
    assert all("limit_s" in str(row.error) for row in rows[:-1])
    assert rows[-1].name == "left_out_on_cpu"
    assert {"quack", "liger_cute", "torch_compile"} <= set(rows[-1].config)


@pytest.mark.slow
def test_rows_of_a_real_child_are_on_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chosen = options(part="codec", contenders="reference", rounds=2)
    path, rows = run_bench("kernels", chosen, tmp_path)
    assert [row.name.rsplit("/", 1)[1] for row in rows[:2]] == ["copy", "reference"]
    content = json.loads(path.read_text())
    assert content["complete"] is True
    copy, ours = content["rows"][:2]
    assert ours["config"]["device"] == "cpu"
    assert ours["numbers"]["extra_mib"] is None
    assert ours["numbers"]["rounds"] == 2
    ratio = ours["numbers"]["forward_gbps"] / copy["numbers"]["forward_gbps"]
    assert ours["numbers"]["forward_share_of_copy"] == pytest.approx(ratio)
    assert ours["target"] == {"text": "bit for bit the reference", "met": True}
