"""Bytes that a rank sends to those that share its rows, as workers/parallel/collectives.py counts them. No torch.

    s = batch_size x rows of the rank; e bytes of an element, w of fp32 (fp64 for fp64); per block and micro-batch:
    Ulysses    (u - 1) / u  s e  (2 (2 Q + 2 K) + what runs again)           Q, K: widths of queries and exchanged keys
    ring       2 s K (e h (forwards + 1) + w (h + 1))                        h: hops; forwards: passes of all keys

(research of the two: arXiv 2309.14509, arXiv 2310.01889.)
"""

from __future__ import annotations

from headrace.platform.planning.request import PlanRequest
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan
from headrace.workers.memory.schedule import Schedule, all_reruns
from headrace.workers.model.exchanged import mix_of
from headrace.workers.parallel.row_cut import layout_of, num_hops
from headrace.workers.telemetry import names

WIDE_BYTES = 4


def sent_bytes(plan: MemoryPlan, request: PlanRequest) -> dict[str, int]:
    """Of one rank in one step, by metric name; of the axes whose degree is above 1. Without a tensor degree only."""
    if request.sequence_degree == 1 or request.tensor_degree > 1:
        return {}
    shape = request.shape(plan)
    schedule, tokens, ring = shape.schedule, request.batch_size * request.micro_batches, request.ring
    found: dict[str, int] = {}
    if request.ulysses > 1:
        elements = sum(_exchanged(schedule, layer, shape.rows) for layer in plan.layers)
        found[names.ULYSSES_SENT_GIB] = tokens * elements // request.ulysses * (request.ulysses - 1) * request.itemsize
    if ring > 1:
        seq_len, window = request.seq_len, request.model.sliding_window
        layout = layout_of(request.ring_layout, ring=ring, seq_len=seq_len, window=window)
        hops = num_hops(layout, ring=ring, seq_len=seq_len, window=window)
        mix = mix_of(schedule.skeleton)
        width = sum(schedule.skeleton.tensors[name].width for name in mix.earlier)
        home = (hops + 1) * max(WIDE_BYTES, request.itemsize) if hops else 0
        passes = sum(1 + _forwards(schedule, layer, plan.cuts, shape.rows) for layer in plan.layers)
        per_row = width * (hops * request.itemsize * passes + home * len(plan.layers))
        found[names.RING_SENT_GIB] = tokens * shape.rows * per_row
    return found


def _exchanged(schedule: Schedule, layer: LayerPlan, rows: int) -> int:
    """Elements that a block exchanges of one row: forward, gradient, and what runs again."""
    again = sum(run.segment.exchanged * (run.span[1] - run.span[0]) for run in all_reruns(schedule, layer, rows))
    return 2 * rows * sum(segment.exchanged for segment in schedule.skeleton.segments) + again


def _forwards(schedule: Schedule, layer: LayerPlan, cuts: Cuts, rows: int) -> int:
    """How often a block's attention runs forward: once for every tile of queries, and again where its results go."""
    mix, tiles = mix_of(schedule.skeleton), cuts.query_tiles(rows)
    spans = [run.span for run in all_reruns(schedule, layer, rows) if run.segment is mix]
    again = sum(any(begin < tile[1] and tile[0] < end for begin, end in spans) for tile in tiles)
    return len(tiles) + again
