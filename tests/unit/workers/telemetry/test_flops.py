from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from headrace.helpers.tiny_models import LLAMA
from headrace.helpers.training import plan_for
from headrace.storage.core.errors import InputError
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, keep_layer
from headrace.workers.model.adapter import num_params
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, AdapterKind, Family
from headrace.workers.model.head_groups import whole_name
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.telemetry import names
from headrace.workers.telemetry.flops import (
    MicroBatch,
    again_flops,
    block_flops,
    causal_pairs,
    full_pairs,
    mfu,
    step_flops,
)

MODEL = replace(LLAMA, vocab_size=100, hidden_size=32, intermediate_size=48)
KEEP = plan_for("keep", MODEL)
LORA = AdapterConfig(kind=AdapterKind.lora, rank=4)
SOME = AdapterConfig(kind=AdapterKind.lora, rank=3, targets="q_proj,v_proj,down_proj")


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 9])
def test_pairs_against_a_count(window: int | None) -> None:
    length = 8
    seen = [[k for k in range(q + 1) if window is None or q - k < window] for q in range(length)]
    assert causal_pairs(length, window) == sum(map(len, seen))
    assert full_pairs(length, window) == length * max(map(len, seen))
    for prefix in range(length):
        assert causal_pairs(length - prefix, window, prefix) == sum(map(len, seen[prefix:]))
        assert full_pairs(length - prefix, window, prefix) == (length - prefix) * max(map(len, seen))


def test_a_shared_prompt_counts_once() -> None:
    """Of three responses alone the prompt's own work comes off twice, and nothing else."""
    prompt, responses = 6, (2, 3, 4)
    shared = MicroBatch([prompt, *responses], KEEP, 1, [0, prompt, prompt, prompt])
    alone = MicroBatch([prompt + response for response in responses], KEEP, 3)
    for name in (names.MFU_CAUSAL_PCT, names.HFU_PCT):
        once, each, own = (
            mfu(MODEL, [batch], step_s=1.0, peak_flops=1e6)[name]
            for batch in (shared, alone, MicroBatch([prompt], KEEP))
        )
        assert once == pytest.approx(each - 2 * own)


def test_block_by_hand() -> None:
    # q, o: 32 x 32; k, v: 32 x 16; gate, up, down: 32 x 48; Q K^T and P V over 36 pairs of 4 heads of 8.
    products = 2 * 8 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert block_flops(dense_skeleton(MODEL), 8, causal_pairs(8))[0] == products + 2 * 2 * 4 * 8 * 36


def test_documents_do_not_attend_to_each_other() -> None:
    apart, together = (step_flops(MODEL, lengths, causal=True) for lengths in ([5, 3], [8]))
    assert together - apart == 3 * 3 * 4 * 32 * (36 - 15 - 6)


def test_three_conventions() -> None:
    found = mfu(MODEL, [MicroBatch([8, 8], KEEP)], step_s=2.0, peak_flops=1e6)
    products, head = 2 * 16 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 2 * 16 * 32 * 100
    causal = 3 * (3 * (products + 4 * 32 * 2 * 36) + head)
    full = 3 * (3 * (products + 4 * 32 * 2 * 64) + head)
    expected = {
        names.MFU_CAUSAL_PCT: 100 * causal / 2e6,
        names.MFU_FULL_ATTENTION_PCT: 100 * full / 2e6,
        names.HFU_PCT: 100 * causal / 2e6,
        names.MFU_PEAK_TFLOPS: 1e-6,
    }
    assert found == pytest.approx(expected)


def test_hfu_counts_what_the_plan_runs_again() -> None:
    down = 2 * 8 * 32 * 48  # the last product of a block is no value that its backward needs
    again = block_flops(dense_skeleton(MODEL), 8, causal_pairs(8))[0] - down
    keep, ssd = KEEP.layers[0], LayerPlan.of(x=Residence.ssd)
    for num, layers in {1: (keep, ssd, keep), 3: plan_for("offload_host", MODEL).layers}.items():
        found = mfu(MODEL, [MicroBatch([8], MemoryPlan("p", layers))], step_s=1.0, peak_flops=1e6)
        assert found[names.HFU_PCT] - found[names.MFU_CAUSAL_PCT] == pytest.approx(100 * num * again / 1e6)


def test_a_window_is_counted() -> None:
    narrow = mfu(replace(MODEL, sliding_window=2), [MicroBatch([8], KEEP)], step_s=1.0, peak_flops=1e6)
    wide = mfu(MODEL, [MicroBatch([8], KEEP)], step_s=1.0, peak_flops=1e6)
    lost = 100 * 3 * 3 * 4 * 32 / 1e6
    assert wide[names.MFU_CAUSAL_PCT] - narrow[names.MFU_CAUSAL_PCT] == pytest.approx(lost * (36 - 15))
    assert wide[names.MFU_FULL_ATTENTION_PCT] - narrow[names.MFU_FULL_ATTENTION_PCT] == pytest.approx(lost * (64 - 16))


def test_agrees_with_six_n_d() -> None:
    # Kaplan et al. 2020: 6 FLOPs per weight and token where attention is negligible (norms have no products).
    weights = num_params(MODEL) - MODEL.vocab_size * MODEL.hidden_size - (2 * 3 + 1) * MODEL.hidden_size
    attention = 3 * 3 * 4 * 32 * causal_pairs(8)
    assert step_flops(MODEL, [8], causal=True) - attention == 6 * weights * 8


def test_bad_numbers_are_named() -> None:
    with pytest.raises(InputError, match="step_s=0"):
        mfu(MODEL, [MicroBatch([8], KEEP)], step_s=0.0, peak_flops=1.0)
    with pytest.raises(InputError, match="peak_flops=nan"):
        mfu(MODEL, [MicroBatch([8], KEEP)], step_s=1.0, peak_flops=float("nan"))


def test_planning_can_import_it_without_torch() -> None:
    code = "import sys, headrace.workers.telemetry.flops; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("num_again", [0, 2])
@pytest.mark.parametrize("held", [{"x": Residence.hbm}, dict.fromkeys(("x", "out", "lse"), Residence.hbm)], ids=len)
@pytest.mark.parametrize(
    ("family", "adapter", "groups"),
    [
        ("llama", NO_ADAPTER, 1),
        ("llama", NO_ADAPTER, 2),
        ("qwen3", NO_ADAPTER, 1),
        ("qwen3", NO_ADAPTER, 2),
        ("llama", LORA, 1),
        ("llama", SOME, 1),
    ],
    ids=str,
)
def test_against_the_flop_counter(
    num_again: int, held: dict, family: str, adapter: AdapterConfig, groups: int, monkeypatch
) -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from headrace.workers.memory.policy import apply_memory
    from headrace.workers.model import decoder, program

    def addmm_flops(total, a, b, **_: object):
        return 2 * a[0] * a[1] * b[1]

    def heads(x, like):
        return x.transpose(1, 2).repeat_interleave(like.shape[2] // x.shape[2], 1)

    def forward(q, k, v, spec):
        # Two products over the whole square: the counter knows products, and no fused CPU attention.
        weights = heads(q, q) @ heads(k, q).transpose(2, 3)
        return (weights @ heads(v, q)).transpose(1, 2), weights.sum(-1)

    def backward(dout, q, k, v, out, lse, spec):
        weights_grad = heads(dout, q) @ heads(v, q).transpose(2, 3)
        dq, dk = weights_grad @ heads(k, q), weights_grad.transpose(2, 3) @ heads(q, q)
        dv = weights_grad.transpose(2, 3) @ heads(dout, q)
        grouped = (x.unflatten(1, (k.shape[2], -1)).sum(2).transpose(1, 2) for x in (dk, dv))
        return dq.transpose(1, 2), *grouped

    monkeypatch.setattr(program, "attention_forward", forward)
    monkeypatch.setattr(program, "attention_backward", backward)
    config = replace(MODEL, family=Family(family), qk_norm=family == "qwen3", head_dim=16)
    model = decoder.Decoder(config, adapter=adapter)
    model.init_weights(0)
    cuts = Cuts(16, head_groups=groups)
    (skeleton,) = cuts.skeletons([dense_skeleton(config)])
    again = LayerPlan.of(**{n: Residence.hbm for n in skeleton.skeletal if whole_name(n) in held})
    kept = keep_layer(skeleton)
    plan = MemoryPlan("p", (*(again,) * num_again, *(kept,) * (3 - num_again)), cuts=cuts)
    handle = apply_memory(model.blocks, plan)
    tokens = torch.randint(0, 100, (2, 24))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        handle.begin(0)
        model(tokens, tokens, loss_tile=16).backward()
    expected = step_flops(config, [24, 24], causal=False, adapter=adapter)
    expected += again_flops(config, MicroBatch([24, 24], plan, num_rows=2), adapter, causal=False)
    assert counter.get_total_flops() == expected
