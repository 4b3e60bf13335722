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
from itertools import product
from typing import TYPE_CHECKING

from headrace.platform.planning.cost import UNSHARDED_BLOCKS, is_tied
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.predict import Rates, Work, device_peak_bytes
from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Medium
from headrace.workers.memory.chunk_plan import (
    WIDE,
    CarriedBytes,
    KvBytes,
    KvShape,
    attention_bytes,
    gathered_bytes,
    has_keys,
    pass_bytes,
    states_of,
)
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.head_bytes import tied_head_bytes
from headrace.workers.memory.plan import MemoryPlan, Residence, Stretch
from headrace.workers.memory.presets import Choices, kv_place, preset_plan
from headrace.workers.model.adapter import weights_of
from headrace.workers.telemetry.flops import causal_pairs, populating_flops, skipped_flops

if TYPE_CHECKING:
    from headrace.platform.planning.request import PlanRequest

# Places of KV blocks, from the oldest block on.
KV_AGES = (Residence.hbm, Residence.host, Residence.ssd)
# Chunks where no copy has to be hidden: long enough that products run at their rate.
LEAST_CHUNK = {DeviceClass.cpu: 1024, DeviceClass.cuda: 4096}


def chunk_choices(request: PlanRequest) -> Choices:
    """The chunk's size, and whether all of its tensors stay until its backward: where the device has room.

    Blocks stay gathered from chunk to chunk; where nothing fits so, only those that there is room for.

    chunk_auto: the oldest KV blocks in HBM, later ones on the host, the newest on the SSD. No tier is used before the
    one above it is full, and where the device is full already, the chunk's MLP is recomputed before keys leave it:
    reading them once per chunk costs more.
    """
    budgets = request.budgets()
    places = KV_AGES if request.preset is MemoryPreset.chunk_auto else (kv_place(request.preset, request.sparse),)
    on_cuda = request.profile.device_class is DeviceClass.cuda  # elsewhere weights do not count
    for gathered in (None, 0) if on_cuda else (None,):
        for slowest, keeps_chunk in product(places, (True, False)):
            choices = Choices(
                seq_len=request.seq_len,
                chunk_size=_chunk_of(request, slowest),
                keeps_chunk=keeps_chunk,
                gathered_layers=gathered,
                sparse=request.sparse,
            )
            if request.preset is MemoryPreset.chunk_auto:
                choices = _by_age(request, choices, slowest)
            wanted = wanted_bytes(_plan(request, choices), request)
            if not budgets.shortages(wanted):
                return choices if gathered is None else _gathering(request, choices, wanted[Medium.hbm])
    return choices


def _gathering(request: PlanRequest, choices: Choices, peak: int) -> Choices:
    """The same with as many blocks gathered from chunk to chunk as the device has room for beside its peak."""
    each = [request.itemsize * weights_of(skeleton) for skeleton in request.skeletons()]
    more = _fitting(request.budgets()[Medium.hbm], peak, max(each), len(each))
    return replace(choices, gathered_layers=min(len(each), UNSHARDED_BLOCKS + more))


def lean_chunks_wanted(request: PlanRequest) -> dict[Medium, int]:
    """Peaks to judge memory=chunk_auto by, those that fit if any do: the MLP of a chunk is recomputed, and all KV
    blocks are in one place, or by age in several where none has room for all.
    """
    budgets, found = request.budgets(), []
    for place in reversed(KV_AGES):
        kv, size = (Stretch(0, None, place),), _chunk_of(request, place)
        choices = Choices(request.seq_len, chunk_size=size, keeps_chunk=False, gathered_layers=0, kv=kv)
        found.append(wanted_bytes(_plan(request, choices), request))
        over = {tier for tier, _, _ in budgets.shortages(found[-1])}
        if not over or (place is Residence.ssd and over & {Medium.hbm, None}):
            # With all of them on the SSD the device and memory have the most room.
            break
        found.append(wanted_bytes(_plan(request, _by_age(request, choices, place)), request))
    return min(found, key=budgets.excess)


def _plan(request: PlanRequest, choices: Choices) -> MemoryPlan:
    plan = preset_plan(request.preset, request.skeletons(), choices=choices)
    return replace(plan, cuts=replace(plan.cuts, token_tile=request.cuts().token_tile))


def _by_age(request: PlanRequest, choices: Choices, slowest: Residence) -> Choices:
    """As many of the oldest KV blocks in HBM as it has room for, then on the host; the rest in the slowest place."""
    if slowest is Residence.hbm:
        return choices
    budgets, size = request.budgets(), choices.chunk_size
    shape, last = kv_shape(request), (request.seq_len - 1) // size  # the block of the last chunk: it never leaves
    itemsizes = (request.itemsize, max(WIDE, request.itemsize))
    sizes = [shape.num_layers * shape.bytes_of(size, itemsize) for itemsize in itemsizes]
    scans = states_of(request.skeletons(), batch_size=request.batch_size, itemsize=request.itemsize)
    states = sum(num_bytes * num_layers for num_bytes, num_layers in scans.items())
    away = replace(choices, kv=(Stretch(0, None, slowest),))
    peak = wanted_bytes(_plan(request, away), request)[Medium.hbm]
    in_hbm = _fitting(budgets[Medium.hbm], peak, sum(sizes) + states, last)
    if budgets.device_is_memory and budgets.memory is not None:
        in_hbm = min(in_hbm, _fitting(budgets.host_room(peak), 0, sum(sizes) + states, last))
    ends = [(in_hbm, Residence.hbm)]
    if slowest is Residence.ssd:
        room, host = max(0, budgets.host_room(peak + in_hbm * (sum(sizes) + states))), budgets[Medium.host]
        room = room if host is None else min(host, room)
        pages = [shape.num_layers * round_up(num_bytes // max(1, shape.num_layers)) for num_bytes in sizes]
        slot = pages[0] + request.gradient_copies * pages[1]
        slot += sum(round_up(num_bytes) * num_layers for num_bytes, num_layers in scans.items())
        ends.append((in_hbm + _fitting(room, 0, slot, last - in_hbm), Residence.host))
    begin, row = 0, []
    for num_blocks, residence in ends:
        if num_blocks * size > begin:
            row.append(Stretch(begin, num_blocks * size, residence))
            begin = num_blocks * size
    return replace(choices, kv=(*row, Stretch(begin, None, slowest)))


def _fitting(budget: int | None, there: int, each: int, most: int) -> int:
    return most if budget is None else max(0, min(most, (budget - there) // each))


def _chunk_of(request: PlanRequest, slowest: Residence) -> int:
    size = request.chunk_size or chunk_size(request, slowest)
    if request.tile_rows is not None:
        # With more rows the chunks of all of them together have as many tokens.
        size = max(1, size * request.tile_rows // request.batch_size)
    if request.preset is MemoryPreset.chunk_sparse and size > request.sparse.page:
        size -= size % request.sparse.page
    # The ranks share every chunk evenly.
    return min(-(-size // request.num_sharers) * request.num_sharers, request.seq_len)


def chunk_size(request: PlanRequest, place: Residence) -> int:
    """Tokens that hide the copies of keys in a place, a power of two; unknown rates ask for nothing."""
    rates = request.rates()
    # Products of a rank have the tokens of its tensor ranks, and its share of the Ulysses ranks'.
    least = LEAST_CHUNK[request.profile.device_class] * request.ulysses
    model, own = request.model, kv_shape(request).kv_width * request.num_sharers  # of fewer heads than ranks copies
    group = model.num_heads * model.head_size / (own or model.num_kv_heads * model.head_size)
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
    shape, skeletons = kv_shape(request), request.skeletons()
    attention = attention_bytes(
        batch_size=request.batch_size,
        num_queries=num_tokens,
        num_keys=min(plan.cuts.kv_block or num_tokens, request.seq_len),
        heads=(model.num_heads // request.num_sharers, shape.kv_width // model.head_size),
        head_size=model.head_size,
        itemsize=request.itemsize,
    )
    gathered = 0 if plan.pages is None else gathered_bytes(shape, plan.cuts, plan.pages)
    at_work = attention.backward + gathered
    blocks = [
        replace(block, forward=block.forward + at_work, backward=block.backward + at_work)
        if has_keys(skeleton)
        else block
        for block, skeleton in zip(request.blocks(plan), skeletons, strict=True)
    ]
    sums = CarriedBytes.of(skeletons, request.itemsize)
    cost = replace(cost, head_transient_bytes=cost.head_transient_bytes + sums.own)
    device = device_peak_bytes(blocks, plan.prefetch_layers, cost) + kv.resident + kv.buffers
    if request.profile.device_class is DeviceClass.cuda:  # weights do not count on CPU
        gathered_weights = sum(map(weights_of, skeletons[: max(0, plan.gathered_layers - UNSHARDED_BLOCKS)]))
        device += gathered_weights * request.itemsize
        if request.micro_batches == 1:
            device -= sum(sums) // request.num_shards  # shards take the place of the sums, a block at a time
    elif is_tied(model, request.adapter):
        # A chunk's backward ends with the embedding's gradient, which autograd adds to the head's.
        vocab_size = -(-model.vocab_size // request.tensor_degree)
        rows = vocab_size * model.hidden_size
        last = tied_head_bytes(vocab_size, model.hidden_size, request.itemsize) + 2 * rows * request.itemsize
        device = max(device, cost.fixed_bytes + kv.resident + sums.own + last)
    return {Medium.hbm: device + sums.beside_block, **kv.slots}


def work(plan: MemoryPlan, request: PlanRequest) -> Work:
    """What a micro-batch does beside the model's own compute: stage 1, and what backward makes again."""
    kv, cost, chunks = kv_of(plan, request), request.cost(), plan.cuts.chunk_spans(request.seq_len)
    pairs = causal_pairs(request.seq_len, request.model.sliding_window)
    rows = request.batch_size / request.num_sharers
    populating, skipped = (
        rows * of_row(request.skeletons(), plan, request.seq_len, pairs) for of_row in (populating_flops, skipped_flops)
    )
    rerun = populating + len(chunks) * sum(block.rerun_flops for block in request.blocks(plan))
    total = cost.whole_flops - skipped + rerun
    stored, loaded = kv.stored, kv.loaded
    return Work(
        rerun,
        host=stored[Medium.host],
        ssd=stored[Medium.ssd],
        load_host=loaded[Medium.host],
        load_ssd=loaded[Medium.ssd],
        store_flops=total,
        load_flops=total,
        skipped_flops=skipped,
        is_together=True,
    )


def kv_of(plan: MemoryPlan, request: PlanRequest) -> KvBytes:
    """What keys, values, states and their gradients of one micro-batch take and move."""
    return pass_bytes(plan, request.skeletons(), kv_shape(request), gradient_copies=request.gradient_copies)


def kv_shape(request: PlanRequest) -> KvShape:
    """Keys and values of one micro-batch."""
    return KvShape.of(
        request.skeletons(),
        batch_size=request.batch_size,
        num_tokens=request.seq_len,
        itemsize=request.itemsize,
        window=request.model.sliding_window,
    )


def _of_chunk(plan: MemoryPlan, request: PlanRequest) -> PlanRequest:
    """The request of one chunk, the longest one, as if it were a row."""
    return replace(request, seq_len=plan.cuts.longest_chunk(request.seq_len), buckets=())
