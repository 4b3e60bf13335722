"""What a plan of the sweep by chunk costs, and the chunk that a machine wants. No torch.

Keys and values of all earlier tokens are read once per chunk, so a chunk must be long enough for its compute to hide
them. With F FLOP/s, B bytes/s, g query heads per key head, s bytes of an element and s_g of a gradient's:

    forward     C >= F s / (2 g B)
    backward    C >= F (s + 2 s_g) / (5 g B)          reads keys and values, reads and writes their gradients

(from the FLOPs of attention per query and key, 4 D forward and 10 D backward for each of g heads, and the bytes of one
key and value, 2 s D).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.platform.planning.cost import UNSHARDED_BLOCKS
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.predict import Rates, Work, device_peak_bytes
from headrace.storage.core.records import Medium
from headrace.workers.memory.chunk_plan import (
    WIDE,
    CarriedBytes,
    KvBytes,
    KvShape,
    attention_bytes,
    kv_bytes,
)
from headrace.workers.memory.plan import MemoryPlan, Residence
from headrace.workers.memory.presets import KV_PLACES, Choices, preset_plan
from headrace.workers.telemetry.flops import causal_pairs, populating_flops

if TYPE_CHECKING:
    from headrace.platform.planning.request import PlanRequest

# Chunks where no copy has to be hidden: long enough that products run at their rate.
LEAST_CHUNK = {DeviceClass.cpu: 1024, DeviceClass.cuda: 4096}


def chunk_choices(request: PlanRequest) -> Choices:
    """The chunk's size, and whether all of its tensors stay until its backward: where the device has room."""
    size = request.chunk_size or chunk_size(request)
    if request.tile_rows is not None:
        # With more rows the chunks of all of them together have as many tokens.
        size = max(1, size * request.tile_rows // request.batch_size)
    size = min(size, request.seq_len)
    choices = Choices(seq_len=request.seq_len, chunk_size=size)
    device = request.budgets()[Medium.hbm]
    plan = preset_plan(request.preset, [request.skeleton()] * request.model.num_layers, choices=choices)
    plan = replace(plan, cuts=replace(plan.cuts, token_tile=request.cuts().token_tile))
    if device is None or wanted_bytes(plan, request)[Medium.hbm] <= device:
        return choices
    return replace(choices, keeps_chunk=False)


def chunk_size(request: PlanRequest) -> int:
    """Tokens that hide the copies of their tier, a power of two; unknown rates ask for nothing."""
    place, rates = KV_PLACES[request.preset], request.rates()
    least = LEAST_CHUNK[request.profile.device_class]
    group = request.model.num_heads / request.model.num_kv_heads
    s, s_grad = request.itemsize, max(WIDE, request.itemsize)
    found = [least]
    for rate in _link_rates(place, rates):
        if rates.flops is not None and rate is not None:
            found.append(math.ceil(rates.flops * s / (2 * group * rate)))
            found.append(math.ceil(rates.flops * (s + 2 * s_grad) / (5 * group * rate)))
    return 1 << math.ceil(math.log2(max(found)))


def _link_rates(place: Residence, rates: Rates) -> tuple[float | None, ...]:
    if place is Residence.hbm:
        return ()
    links = (rates.h2d, rates.d2h)
    return links if place is Residence.host else (*links, rates.ssd_read, rates.ssd_write)


def wanted_bytes(plan: MemoryPlan, request: PlanRequest) -> dict[Medium, int]:
    """Peak of every tier of one rank."""
    kv, of_chunk = kv_of(plan, request), _of_chunk(plan, request)
    cost = of_chunk.cost()
    model, num_tokens = request.model, of_chunk.seq_len
    attention = attention_bytes(
        batch_size=request.batch_size,
        num_queries=num_tokens,
        num_keys=min(plan.cuts.kv_block or num_tokens, request.seq_len),
        heads=(model.num_heads, model.num_kv_heads),
        head_size=model.head_size,
        itemsize=request.itemsize,
    )
    trained = [sum(segment.trained for segment in request.skeleton().segments)] * model.num_layers
    blocks = request.blocks(plan)
    sums = CarriedBytes.of(trained, request.itemsize)
    cost = replace(
        cost,
        block_transient_bytes=cost.block_transient_bytes + attention.backward,
        head_transient_bytes=cost.head_transient_bytes + sums.own,
    )
    device = device_peak_bytes(blocks, plan.prefetch_layers, cost) + kv.resident + kv.buffers
    if request.profile.device_class is DeviceClass.cuda:  # weights do not count on CPU
        weights = sum(segment.weights for segment in request.skeleton().segments)
        device += max(0, plan.gathered_layers - UNSHARDED_BLOCKS) * weights * request.itemsize
    return {Medium.hbm: device + sums.beside_block, **kv.slots}


def work(plan: MemoryPlan, request: PlanRequest) -> Work:
    """What a micro-batch does beside the model's own compute: stage 1, and what backward makes again."""
    kv, cost, chunks = kv_of(plan, request), request.cost(), plan.cuts.chunk_spans(request.seq_len)
    pairs = causal_pairs(request.seq_len, request.model.sliding_window)
    populating = populating_flops(request.skeleton(), cost.num_layers, chunks, pairs)
    stage_1 = request.batch_size * populating / (request.tensor_degree * request.sequence_degree)
    rerun = stage_1 + len(chunks) * sum(block.rerun_flops for block in request.blocks(plan))
    total = cost.whole_flops + rerun
    stored, loaded = kv.stored, kv.loaded
    return Work(
        rerun,
        host=stored[Medium.host],
        ssd=stored[Medium.ssd],
        load_host=loaded[Medium.host],
        load_ssd=loaded[Medium.ssd],
        store_flops=total,
        load_flops=total,
    )


def kv_of(plan: MemoryPlan, request: PlanRequest) -> KvBytes:
    """What keys, values and their gradients of one micro-batch take and move."""
    model = request.model
    shape = KvShape(
        model.num_layers,
        request.batch_size,
        request.seq_len,
        model.num_kv_heads * model.head_size,
        request.itemsize,
        model.sliding_window,
    )
    return kv_bytes(shape, plan.cuts, plan.kv, plan.kv_grads)


def _of_chunk(plan: MemoryPlan, request: PlanRequest) -> PlanRequest:
    """The request of one chunk, the longest one, as if it were a row."""
    return replace(request, seq_len=plan.cuts.longest_chunk(request.seq_len), buckets=())
