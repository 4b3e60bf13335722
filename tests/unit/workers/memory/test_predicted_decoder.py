"""The plan's prediction of the device peak against the meter, on the real decoder: families, dtypes, kinds of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headrace.kernels.api import Packing
from headrace.platform.planning.cost import step_cost
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.predict import device_peak_bytes
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence, preset_plan
from headrace.workers.memory.policy import apply_memory
from headrace.workers.model.config import Family, ModelConfig
from headrace.workers.model.decoder import Decoder

LLAMA = ModelConfig(
    name="llama",
    family=Family.llama,
    vocab_size=300,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=160,
)
MODELS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, family=Family.qwen2, qkv_bias=True),
    "qwen3": replace(LLAMA, family=Family.qwen3, qk_norm=True, head_dim=32, tie_embeddings=True),
    "mistral": replace(LLAMA, family=Family.mistral, sliding_window=50),
}
RECOMPUTE, HOST, SSD = (LayerPlan(r, Residence.recompute) for r in (Residence.hbm, Residence.host, Residence.ssd))
PLANS = [
    *(preset_plan(name, 4) for name in ("keep", "recompute", "offload_host", "offload_ssd")),
    MemoryPlan("mixed", (HOST, SSD, RECOMPUTE, LayerPlan())),
    MemoryPlan("mixed the other way", (LayerPlan(), HOST, LayerPlan(), SSD), prefetch_layers=2),
]
BATCH_SIZE, SEQ_LEN, LOSS_TILE = 2, 256, 128


def measured(model: ModelConfig, dtype: torch.dtype, plan: MemoryPlan, stack, packed: bool) -> int:
    decoder, meter = Decoder(model, dtype=dtype), DeviceMeter()
    decoder.init_weights(0)
    handle = apply_memory(decoder.blocks, plan, stack, meter=meter)
    tokens = torch.randint(0, model.vocab_size, (BATCH_SIZE, SEQ_LEN))
    lengths = [SEQ_LEN // 4, SEQ_LEN - SEQ_LEN // 4] * BATCH_SIZE
    handle.begin(0)
    with meter:
        packing = Packing.of_lengths(lengths) if packed else None
        decoder(tokens, tokens, packing=packing, loss_tile=LOSS_TILE).backward()
    handle.end()
    return meter.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_predicted_is_measured(name: str, packed: bool, dtype: torch.dtype, scripted_stack) -> None:
    model = MODELS[name]
    cost = step_cost(
        model,
        batch_size=BATCH_SIZE,
        seq_len=SEQ_LEN,
        itemsize=dtype.itemsize,
        device_class=DeviceClass.cpu,
        loss_tile=LOSS_TILE,
        packed=packed,
    )
    for plan in PLANS if dtype is torch.float32 else (PLANS[0], PLANS[4]):  # a plan knows no dtype
        predicted = device_peak_bytes(plan.layers, plan.prefetch_layers, cost)
        found = measured(model, dtype, plan, scripted_stack, packed)
        assert predicted == pytest.approx(found, rel=0.005), plan.name
