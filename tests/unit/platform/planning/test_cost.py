from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.helpers.tiny_models import LLAMA
from headrace.platform.planning.cost import (
    RANK_BYTES,
    attention_workspace_bytes,
    block_shape,
    default_cuts,
    reduction_bytes,
    state_bytes,
    step_cost,
)
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.predict import BlockCost, device_peak_bytes
from headrace.workers.memory.plan import Cuts, LayerPlan, Residence, keep_layer
from headrace.workers.model.adapter import block_skeleton, num_adapter_params, num_params
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, AdapterKind

MODEL = replace(LLAMA, vocab_size=100, hidden_size=32, intermediate_size=48)
SEVEN_B = replace(
    MODEL, vocab_size=152064, hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, intermediate_size=18944
)


def test_flops_agree_with_the_published_closed_form() -> None:
    # Per layer 24 s h^2 of products and 2 s^2 h of causal attention, for MHA and an MLP of 8 h^2 weights.
    h, s = 4096, 1 << 20
    model = replace(
        MODEL, hidden_size=h, num_heads=32, num_kv_heads=32, intermediate_size=8 * h // 3 + 1, vocab_size=32000
    )
    cost = step_cost(model, batch_size=1, seq_len=s, itemsize=2, device_class=DeviceClass.cuda)
    assert cost.block_flops == pytest.approx(24 * s * h**2 + 2 * s**2 * h, rel=1e-3)


def test_bytes_scale_with_tokens_and_dtype() -> None:
    skeleton = block_skeleton(MODEL, NO_ADAPTER)

    def cost(plan: LayerPlan, batch_size: int, seq_len: int, itemsize: int) -> BlockCost:
        sizes = {"batch_size": batch_size, "seq_len": seq_len, "itemsize": itemsize}
        return block_shape(MODEL, skeleton, **sizes, cuts=Cuts(), device_class=DeviceClass.cpu).cost(plan)

    assert cost(LayerPlan.of(x=Residence.host), 1, 64, 4).host == 64 * 32 * 4
    keep = [cost(keep_layer(skeleton), *sizes).held for sizes in ((1, 64, 4), (2, 64, 4), (1, 128, 4))]
    assert keep[1] == keep[2] == 2 * keep[0]
    assert cost(LayerPlan.of(x=Residence.ssd), 1, 64, 2).ssd == 64 * 32 * 2


def test_weights_and_state_are_sharded() -> None:
    params = num_params(MODEL)
    whole, half = state_bytes(MODEL, 2, 1), state_bytes(MODEL, 2, 2)
    assert whole - half == 16 * params // 2
    on_cuda = step_cost(MODEL, batch_size=1, seq_len=64, itemsize=2, device_class=DeviceClass.cuda)
    assert on_cuda.fixed_bytes > whole
    assert on_cuda.head_transient_bytes > 0


def test_a_frozen_weight_has_neither_gradient_nor_moments() -> None:
    lora = AdapterConfig(kind=AdapterKind.lora, rank=8)
    params, adapters = num_params(MODEL), num_adapter_params(MODEL, lora)
    whole, half = (state_bytes(MODEL, 2, num, lora) for num in (1, 2))
    assert 2 * (whole - half) == 4 * params + 16 * adapters
    assert reduction_bytes(MODEL, 1, 1, lora) == 4 * adapters // MODEL.num_layers
    sizes = {"batch_size": 1, "seq_len": 64, "itemsize": 2, "device_class": DeviceClass.cuda}
    full, frozen = step_cost(MODEL, **sizes), step_cost(MODEL, **sizes, adapter=lora)
    assert full.head_transient_bytes - frozen.head_transient_bytes == 4 * 100 * 32
    # The trunk's products count once in backward, and the adapters' run again.
    trunk = full.block_flops
    own = frozen.block_flops - trunk
    assert own == 2 * 64 * adapters / MODEL.num_layers
    attention = 4 * 32 * (64 * 65 // 2)
    assert frozen.backward_flops == trunk + attention + 3 * own


@pytest.mark.parametrize(("num_tokens", "share"), [(4096, 0.35), (32768, 0.6), (131072, 0.85)])
def test_what_a_frozen_trunk_saves_with_everything_held(num_tokens: int, share: float) -> None:
    """7B in bf16: gradients and moments. Activations are the same, so the share grows with the tokens."""
    lora, sizes = AdapterConfig(kind=AdapterKind.lora, rank=8), {"batch_size": 1, "seq_len": num_tokens, "itemsize": 2}

    def peak(adapter: AdapterConfig) -> int:
        cost = step_cost(SEVEN_B, **sizes, device_class=DeviceClass.cuda, adapter=adapter)
        skeleton, cuts = block_skeleton(SEVEN_B, adapter), default_cuts(DeviceClass.cuda)
        shape = block_shape(SEVEN_B, skeleton, **sizes, cuts=cuts, device_class=DeviceClass.cuda)
        return device_peak_bytes([shape.cost(keep_layer(skeleton))] * SEVEN_B.num_layers, 1, cost)

    found = peak(lora) / peak(NO_ADAPTER)
    assert share - 0.1 < found <= share, found


def test_cuda_counts_the_reduction_s_pool_and_flash_s_workspace() -> None:
    """A 7B model at 32K tokens: 4.06 GiB for the embeddings' gradients, 2.19 GiB for 5 fp32 copies of dq."""
    model = SEVEN_B
    root, block = 2 * 152064 * 3584, (num_params(model) - 2 * 152064 * 3584 - 3584) // 28
    assert reduction_bytes(model, 1, 1) == 4 * (root + block)
    assert reduction_bytes(model, 8, 1) == reduction_bytes(model, 1, 1)
    assert reduction_bytes(model, 1, 4) == 4 * (2 * root + block)
    tokens, gib = 32768, 2**30
    ordered, free = (
        attention_workspace_bytes(model, tokens, 2, degree=1, deterministic=value) for value in (True, False)
    )
    assert ordered - free == 4 * tokens * 3584 * 4
    assert (ordered - 2 * tokens * 3584 * 2) / gib == pytest.approx(2.19, abs=0.01)
    one = step_cost(model, batch_size=1, seq_len=tokens, itemsize=2, device_class=DeviceClass.cuda)
    assert one.fixed_bytes > state_bytes(model, 2, 1) + reduction_bytes(model, 1, 1)
    slow = step_cost(
        model, batch_size=1, seq_len=8 * tokens, itemsize=2, device_class=DeviceClass.cuda, deterministic=True
    )
    assert slow.block_transient_bytes >= 17.5 * gib


def test_without_an_accelerator_the_process_holds_what_the_device_does_not_count() -> None:
    cost = step_cost(MODEL, batch_size=1, seq_len=64, itemsize=4, device_class=DeviceClass.cpu)
    assert cost.process_bytes > RANK_BYTES[DeviceClass.cpu] + state_bytes(MODEL, 4, 1)
    assert cost.fixed_bytes < state_bytes(MODEL, 4, 1)
