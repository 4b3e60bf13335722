"""The plan's prediction of the device peak against all live tensors of a step, and against the meter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headrace.helpers import tiny_models
from headrace.helpers.live_bytes import LiveBytes
from headrace.helpers.training import plan_for
from headrace.kernels.api import CodecName, Packing
from headrace.platform.planning.cost import block_shape, step_cost
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.predict import device_peak_bytes
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.by_layer import ByLayer
from headrace.workers.memory.footprint import footprint
from headrace.workers.memory.layer_sweep import BlockCall, PlannedBlock
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, Stretch, keep_layer
from headrace.workers.memory.policy import apply_memory
from headrace.workers.memory.presets import PRESETS, preset_plan
from headrace.workers.memory.schedule import Schedule
from headrace.workers.memory.shelf import Shelf
from headrace.workers.model.adapter import block_skeleton
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, AdapterKind, Family, ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.head_groups import whole_name
from headrace.workers.model.lora import MASK_TOKENS
from headrace.workers.model.program import Shared
from headrace.workers.model.skeleton import dense_skeleton

LLAMA = replace(tiny_models.LLAMA, vocab_size=300, hidden_size=64, num_layers=4, intermediate_size=160)
QWEN3 = replace(LLAMA, family=Family.qwen3, vocab_size=2000, qk_norm=True, head_dim=32, tie_embeddings=True)
MODELS = {"llama": LLAMA, "qwen2": replace(LLAMA, family=Family.qwen2, qkv_bias=True), "qwen3": QWEN3}
KEEP = keep_layer(dense_skeleton(LLAMA))
AGAIN, HOST, SSD = (LayerPlan.of(x=place) for place in (Residence.hbm, Residence.host, Residence.ssd))
LOSS_TILE = 128
# Tokens of a step's row, and of one block. Attention in bf16 is slow on CPU.
SEQ_LEN = 1024
SHORT = {torch.float32: 1024, torch.bfloat16: 512}
NUM_TOKENS = {torch.float32: 2048, torch.bfloat16: 1024}
CLOSE = {torch.float32: 0.01, torch.bfloat16: 0.02}
CODECS = tuple(CodecName)
DTYPES = (torch.float32, torch.bfloat16)
LORA = AdapterConfig(kind=AdapterKind.lora, rank=8, targets="q_proj,v_proj,down_proj")
DROPPED = replace(LORA, dropout=0.1)
CASES = [("llama", NO_ADAPTER), ("qwen2", NO_ADAPTER), ("qwen3", NO_ADAPTER), ("qwen3", LORA)]


def plans(model: ModelConfig) -> list[MemoryPlan]:
    keep = keep_layer(dense_skeleton(model))
    # The planner counts the gradient of a tied head for forward too, where a codec has its peak.
    codecs = () if model.tie_embeddings else CODECS
    return [
        *(plan_for(name, model) for name in PRESETS if name != "alst" and not name.is_by_chunk),
        MemoryPlan("mixed", (HOST, SSD, AGAIN, keep)),
        MemoryPlan("mixed the other way", (keep, HOST, keep, SSD), prefetch_layers=2),
        *(grouped_plan(name, model) for name in ("keep", "offload_host", "memo", "ssdtrain")),
        *(coded_plan(name, codec, model) for name in ("keep", "ssdtrain") for codec in codecs),
    ]


def grouped_plan(name: str, model: ModelConfig) -> MemoryPlan:
    plan = preset_plan(name, [dense_skeleton(model)] * model.num_layers, cuts=Cuts(head_groups=2))
    return replace(plan, name=f"{name} in head groups")


def coded_plan(name: str, codec: CodecName, model: ModelConfig) -> MemoryPlan:
    plan = preset_plan(name, [dense_skeleton(model)] * model.num_layers, cuts=Cuts(codec=codec))
    return replace(plan, name=f"{name} in {codec}")


def live_and_metered(
    model: ModelConfig, plan: MemoryPlan, stack, adapter: AdapterConfig, dtype: torch.dtype, seq_len: int
) -> tuple[int, int]:
    """Peaks of a whole step, gradients of parameters apart."""
    decoder, meter = Decoder(model, adapter=adapter, dtype=dtype), DeviceMeter()
    decoder.init_weights(0)
    trained = [param for param in decoder.parameters() if param.requires_grad]
    for param in trained:
        param.grad = torch.zeros_like(param)
    tokens = torch.randint(0, model.vocab_size, (1, seq_len))
    handle = apply_memory(decoder.blocks, plan, stack, meter=meter, norm=decoder.norm)
    with torch.no_grad():
        decoder(tokens[:, :1])  # the tables of frequencies are made once
    handle.begin(0)
    with LiveBytes([*decoder.parameters(), *(p.grad for p in trained), tokens]) as live:
        decoder(tokens, tokens, loss_tile=LOSS_TILE).backward()
    handle.end()
    assert live.now == 0
    sweep = ByLayer(decoder, handle, meter, loss_tile=LOSS_TILE, itemsize=dtype.itemsize)
    batch = TokenBatch(tokens, tokens, Packing.of_lengths([seq_len]))
    sweep.forward_backward(batch, 1.0, step=1, micro_batch=0)
    return live.peak, meter.peak_bytes


@pytest.mark.parametrize(
    ("name", "adapter", "dtype"),
    [
        *((*case, torch.float32) for case in CASES),
        ("llama", NO_ADAPTER, torch.bfloat16),
        ("qwen3", LORA, torch.bfloat16),
        *(pytest.param(*case, torch.bfloat16, marks=pytest.mark.soak) for case in CASES[1:3]),
    ],
    ids=str,
)
def test_predicted_is_live_and_metered(
    name: str, adapter: AdapterConfig, dtype: torch.dtype, make_scripted_stack
) -> None:
    """Every preset for llama in fp32, one for qwen2 (biases), those that differ most for the others."""
    chosen = plans(MODELS[name])
    if name != "llama" or dtype is torch.bfloat16:
        few = ("memo",) if name == "qwen2" else ("memo", "mixed", "offload_host in head groups")
        # Of so short a row, what a head group holds for a moment is above the bound: the long form has it.
        few = few[:2] if name == "llama" else few
        chosen = [plan for plan in chosen if plan.name in few]
    check_predictions(name, adapter, dtype, chosen, make_scripted_stack(), seq_len=SHORT[dtype])


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_predicted_is_live_and_metered_under_every_preset(name: str, dtype: torch.dtype, make_scripted_stack) -> None:
    check_predictions(name, NO_ADAPTER, dtype, plans(MODELS[name]), make_scripted_stack(), seq_len=SEQ_LEN)


def check_predictions(
    name: str, adapter: AdapterConfig, dtype: torch.dtype, chosen: list[MemoryPlan], stack: Any, *, seq_len: int
) -> None:
    model = MODELS[name]
    sizes = {"batch_size": 1, "seq_len": seq_len, "itemsize": dtype.itemsize, "device_class": DeviceClass.cpu}
    for plan in chosen:
        cost = step_cost(model, **sizes, cuts=plan.cuts, loss_tile=LOSS_TILE, adapter=adapter)
        (skeleton,) = plan.cuts.skeletons([block_skeleton(model, adapter)])
        shape = block_shape(model, skeleton, **sizes, cuts=plan.cuts)
        predicted = device_peak_bytes([shape.cost(layer) for layer in plan.layers], plan.prefetch_layers, cost)
        live, metered = live_and_metered(model, plan, stack, adapter, dtype, seq_len)
        assert predicted == pytest.approx(live, rel=CLOSE[dtype]), plan.name
        assert metered == pytest.approx(predicted, rel=CLOSE[dtype]), plan.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tiles", [8, 1])
@pytest.mark.parametrize(
    ("name", "adapter", "head_groups"),
    [
        ("llama", NO_ADAPTER, 1),
        ("llama", NO_ADAPTER, 2),
        pytest.param("qwen3", NO_ADAPTER, 1, marks=pytest.mark.soak),
        pytest.param("qwen3", NO_ADAPTER, 2, marks=pytest.mark.soak),
        pytest.param("llama", LORA, 1, marks=pytest.mark.soak),
        ("qwen3", DROPPED, 1),
        pytest.param("qwen3", DROPPED, 2, marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_the_footprint_of_one_block(
    name: str, adapter: AdapterConfig, head_groups: int, num_tiles: int, dtype: torch.dtype
) -> None:
    model, num_tokens = MODELS[name], NUM_TOKENS[dtype]
    tile = num_tokens // num_tiles
    cuts = Cuts(tile, head_groups=head_groups)
    block = Decoder(replace(model, num_layers=1), adapter=adapter, dtype=dtype).blocks[0]
    for param in block.parameters():
        torch.nn.init.normal_(param)
    program = block.program.grouped(head_groups)
    schedule = Schedule(program.skeleton)
    away = (Stretch(0, num_tokens // 2, Residence.recompute), Stretch(num_tokens // 2, None, Residence.hbm))
    held = [name for name in schedule.skeleton.skeletal if whole_name(name) in ("x", "out", "lse")]
    part = {name: away for name in schedule.skeleton.skeletal if name not in held}
    whole = {name: (Stretch(0, None, Residence.hbm),) for name in held}
    layer_plans = [keep_layer(schedule.skeleton), AGAIN, LayerPlan(whole)] + [LayerPlan({**whole, **part})] * (
        tile < num_tokens
    )
    # Dropout draws a mask for few tokens at once: fp32 numbers, the mask, and the rows. A footprint does not count it.
    mask = MASK_TOKENS * model.intermediate_size * 6 if adapter.dropout else 0
    decoder = Decoder(model)
    tables = decoder.rope(torch.arange(num_tokens)[None], dtype, lengths=(num_tokens,))
    for plan in layer_plans:
        shelf = Shelf(None, 1, None)
        shelf.begin(0, 0)
        sizes = {"program": program, "schedule": schedule, "plan": plan, "cuts": cuts, "shelf": shelf}
        call = BlockCall(PlannedBlock(block=block, layer=0, **sizes), Shared(tables, None))
        with LiveBytes([*block.parameters(), *tables]) as live, torch.no_grad():
            x = torch.randn(1, num_tokens, model.hidden_size, dtype=dtype)
            y = call.forward(x)
            forward = live.peak
            del x, y
            held_bytes, live.peak = live.now, live.now
            trained = [name for name, param in program.parameters(block).items() if param.requires_grad]
            grads = call.backward(torch.randn(1, num_tokens, model.hidden_size, dtype=dtype), trained)
        found = footprint(
            *(schedule, plan, cuts),
            batch_size=1,
            num_tokens=num_tokens,
            itemsize=dtype.itemsize,
            casts_products=True,
        )
        assert found.held == held_bytes
        assert found.forward == pytest.approx(forward, rel=CLOSE[dtype], abs=mask), plan
        assert found.backward == pytest.approx(live.peak, rel=CLOSE[dtype], abs=mask), plan
        del grads
