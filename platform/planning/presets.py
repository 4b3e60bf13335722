"""What a preset takes from the machine: MEMO's fraction of the tokens, SSDTrain's tail. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from headrace.platform.planning.chunks import chunk_choices
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.memory.presets import (
    MEMO_KEPT_LAYERS,
    Choices,
    after_attention,
    block_parts,
    memo_tensors,
    preset_plan,
)
from headrace.workers.model.skeleton import Skeleton


def asked_plan(request: PlanRequest) -> MemoryPlan:
    """The plan of the request's preset, fit or not; the preset is not auto."""
    choices = Choices(seq_len=request.shape().rows, keeps_last=request.in_flight == 1)
    if request.preset is MemoryPreset.memo:
        choices = memo_choices(request)
    elif request.preset is MemoryPreset.ssdtrain:
        choices = ssdtrain_choices(request)
    elif request.preset.is_by_chunk:
        choices = chunk_choices(request)
    return preset_plan(
        request.preset,
        request.skeletons(),
        prefetch_layers=request.prefetch_layers,
        cuts=request.cuts(),
        choices=choices,
    )


def memo_choices(request: PlanRequest) -> Choices:
    """MEMO's alpha in closed form, and as much again for the SSD where host memory ends.

        alpha      = min(B T - S_always, M_host / n - S_always) / S_others                 within 0 and 1
        alpha_ssd  = min(B T - S_always - alpha S_others, W T, M_ssd / n) / S_others       within 0 and 1 - alpha

    B: rate to the host, W: of the drives, T: seconds of a block's forward, n: blocks that move (all but two), S: bytes
    of a block, of several kinds the most. Rates that are not known bind nothing. Fractions are of whole token tiles.
    Where not even S_always fits on the host, the blocks that do not fit send it to the SSD.
    """
    shape, budgets, rates = request.shape(), request.budgets(), request.rates()
    kinds = [(skeleton, *memo_tensors(skeleton)) for skeleton in dict.fromkeys(request.skeletons())]
    num_blocks = max(1, request.model.num_layers - MEMO_KEPT_LAYERS)
    fixed = max(_slot_bytes(request, skeleton, always, shape.rows) for skeleton, always, _ in kinds)
    tiles = shape.cuts.tiles(shape.rows)
    tile = min(shape.cuts.token_tile, shape.rows)
    per_tile = max(_slot_bytes(request, skeleton, others, tile) for skeleton, _, others in kinds)
    host, ssd = (budgets[tier] for tier in (Medium.host, Medium.ssd))
    on_host = num_blocks if host is None else min(num_blocks, host // fixed)
    forward_s = None if rates.flops is None else request.cost().block_flops / rates.flops
    link = None if forward_s is None or rates.d2h is None else int(rates.d2h * forward_s) - fixed
    room = None if host is None else host // num_blocks - fixed
    num_host = _whole_tiles([link, room], per_tile, len(tiles))
    drive = None if forward_s is None or rates.ssd_write is None else int(rates.ssd_write * forward_s)
    inputs_there = (num_blocks - on_host) * fixed
    space = None if ssd is None else (ssd - inputs_there) // num_blocks
    left = None if link is None else link - num_host * per_tile
    num_ssd = _whole_tiles([left, drive, space], per_tile, len(tiles) - num_host)
    return Choices(
        seq_len=shape.rows,
        host_fraction=num_host / len(tiles),
        ssd_fraction=num_ssd / len(tiles),
        inputs_on_ssd=(num_blocks - on_host) / num_blocks,
    )


def ssdtrain_choices(request: PlanRequest) -> Choices:
    """SSDTrain's adaptive rule: keep the tail from the first part that the drive cannot bring back in time.

        V = bytes of all earlier parts + 2 x bytes of the part       all stores, and the part's own load
        T = forward and backward of the model - backward of the earlier parts
        keep the part and all later ones where V / T is above the drives' write rate

    The last block stays in any case: its backward starts at once. With unknown rates only that one stays.
    """
    rates, cost, shape, num_layers = request.rates(), request.cost(), request.shape(), request.model.num_layers
    if rates.flops is None or rates.ssd_write is None:
        return Choices(seq_len=shape.rows)
    pairs, parts = shape.pairs((0, shape.rows)), []  # bytes of every part of every block, and FLOPs of its gradient
    for skeleton in request.skeletons():
        cut = after_attention(skeleton)
        halves = skeleton.segments[:cut], skeleton.segments[cut:]
        for names, segments in zip(block_parts(skeleton), halves, strict=True):
            flops = sum(segment.grad_flops(shape.batch_size * shape.rows, pairs) for segment in segments)
            parts.append((sum(_tensor_bytes(request, skeleton, names, shape.rows)), flops))
    whole_s = cost.whole_flops / rates.flops
    before_bytes, before_s = 0, 0.0
    for number in range(2 * (num_layers - 1)):
        volume = before_bytes + 2 * parts[number][0]
        if volume > rates.ssd_write * (whole_s - before_s):
            return Choices(seq_len=shape.rows, kept_parts=2 * num_layers - number)
        before_bytes += parts[number][0]
        before_s += parts[number][1] / rates.flops
    return Choices(seq_len=shape.rows)


def _slot_bytes(request: PlanRequest, skeleton: Skeleton, names: Iterable[str], num_tokens: int) -> int:
    """What these tensors of a block take in a slab at most: each is a blob of its own here."""
    return sum(map(round_up, _tensor_bytes(request, skeleton, names, num_tokens)))


def _tensor_bytes(request: PlanRequest, skeleton: Skeleton, names: Iterable[str], num_tokens: int) -> Iterator[int]:
    tile = request.cuts().token_tile
    for tensor in map(skeleton.tensors.__getitem__, names):
        yield request.batch_size * tensor.num_rows((0, num_tokens), tile) * tensor.bytes_per_token(request.itemsize)


def _whole_tiles(limits: Iterable[int | None], per_tile: int, most: int) -> int:
    known = [limit for limit in limits if limit is not None]
    return max(0, min([most, *(limit // per_tile for limit in known)]))
