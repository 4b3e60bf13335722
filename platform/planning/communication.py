"""Bytes that a rank sends to those that share its rows, as workers/parallel/collectives.py counts them. No torch.

    s = batch_size x rows of the rank; e bytes of an element, w of fp32 (fp64 for fp64); per block and micro-batch:
    tensor     (t - 1) s H e (8 + what runs again) + 2 (t - 1) / t w P       P: elements that every rank has whole
    Ulysses    (u - 1) / u  s e  (2 (2 Q + 2 K) + what runs again)           Q, K: widths of queries and exchanged keys
    ring       2 s K (e h (forwards + 1) + w (h + 1))                        h: hops; forwards: passes of all keys

By chunk each is of the rows of every chunk, and stage 1 sends forward's part once more, of all chunks but the last one.

Tensor ranks also send, once per micro-batch, 2 (t - 1) s H e for the look-up, half of that for the final norm, and what
the loss head adds up: of t s tokens three statistics and the input gradient, 2 (t - 1) / t of w (3 + H) bytes each,
where every loss tile has a target that counts. In a pipeline the first and the last stage do so. Where c tensor ranks
compute one KV head, each has 1 / c of its weights of keys and values, W elements, and sends (c - 1) / c W (2 e + w)
bytes for every block and micro-batch; by chunk 3 e for every chunk but the last one. zbv and v_half send what has w
once in a step for every block (the final norm's as ever), and gather W once more then.

(research of the three: arXiv 2205.05198, arXiv 2309.14509, arXiv 2310.01889.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from operator import attrgetter

from headrace.platform.planning.request import PlanRequest
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan
from headrace.workers.memory.schedule import Schedule, all_reruns, tiles_again
from headrace.workers.model.exchanged import mix_of
from headrace.workers.model.segments import Kind, Segment
from headrace.workers.parallel.row_cut import layout_of, num_hops
from headrace.workers.telemetry import names

WIDE_BYTES = 4
_EXCHANGED, _GATHERED = attrgetter("exchanged"), attrgetter("gathered")


def sent_bytes(plan: MemoryPlan, request: PlanRequest) -> dict[str, int]:
    """Of one rank in one step, by metric name; of the axes whose degree is above 1."""
    if request.num_sharers == 1:
        return {}
    shape = request.shape(plan)
    schedule, tokens, ring = shape.schedule, request.batch_size * request.micro_batches, request.ring
    found: dict[str, int] = {}
    if request.tensor_degree > 1:
        found[names.TENSOR_SENT_GIB] = _tensor_bytes(plan, request, schedule)
    if request.ulysses > 1:
        elements = _elements(plan, request, schedule, _EXCHANGED)
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


def gathered(schedule: Schedule, layer: LayerPlan, rows: int) -> int:
    """Elements of one row that a block gathers and scatters between tensor ranks again in backward."""
    return _again(schedule, layer, rows, _GATHERED)


def _again(schedule: Schedule, layer: LayerPlan, rows: int, of: Callable[[Segment], int]) -> int:
    return sum(of(run.segment) * (run.span[1] - run.span[0]) for run in all_reruns(schedule, layer, rows))


def _rows(plan: MemoryPlan, request: PlanRequest) -> list[int]:
    """The rank's rows of every chunk; of the whole row where the sweep is by layer."""
    return [(end - begin) // request.num_sharers for begin, end in plan.cuts.chunk_spans(request.seq_len)]


def _elements(plan: MemoryPlan, request: PlanRequest, schedule: Schedule, of: Callable[[Segment], int]) -> int:
    """Elements that all blocks send of a row of the batch: forward, gradient, what runs again, and by chunk stage 1.

    Stage 1 ends in the last block with its keys.
    """
    segments, parts = schedule.skeleton.segments, _rows(plan, request)
    each = sum(map(of, segments))
    total = sum(
        number * sum(2 * rows * each + _again(schedule, layer, rows, of) for layer in plan.layers)
        for rows, number in Counter(parts).items()
    )
    to_keys = sum(of(s) for s in takewhile(lambda segment: not segment.key_heads, segments))
    return total + sum(parts[:-1]) * ((len(plan.layers) - 1) * each + to_keys)


def _tensor_bytes(plan: MemoryPlan, request: PlanRequest, schedule: Schedule) -> int:
    """Adapters: the embedding has no gradient, and of each one half is whole on every rank."""
    model, adapter, degree = request.model, request.adapter, request.tensor_degree
    wide, width, parts = max(WIDE_BYTES, request.itemsize), model.hidden_size, _rows(plan, request)

    def reduced(elements: int) -> int:
        return 2 * (degree - 1) * elements * wide // degree

    lookup = (1 if adapter.is_on else 2) * request.has_lookup
    outside = (lookup + request.has_head) * sum(parts) * width + sum(parts[:-1]) * width
    elements = outside + _elements(plan, request, schedule, _GATHERED)
    if adapter.is_on:
        whole, norm = adapter.rank * width * len(adapter.projections), 0
    else:
        norms = (s.weights for s in schedule.skeleton.segments if s.kind is Kind.pointwise)
        whole, norm = sum(norms), width
    full, scored = request.loss_tile, [request.batch_size * rows * degree for rows in parts]
    tiles = [tile for tokens in scored for tile in (*[full] * (tokens // full), tokens % full)]
    head = sum(reduced(tile) + reduced(2 * tile) + reduced(tile * width) for tile in tiles)
    passing = (degree - 1) * request.batch_size * elements * request.itemsize
    each = passing + (head + len(parts) * reduced(norm)) * request.has_head
    # Where gradients of weights come in passes of their own, a block hands over the sums of all micro-batches at once.
    splits = request.passes is not None and request.passes.splits
    number = request.micro_batches
    num_sums, num_gathers = 1 if splits else number, number * (3 * len(parts) - 1) + splits
    of_block = num_sums * reduced(whole) + _copied_bytes(request, num_gathers, num_sums)
    return number * each + len(plan.layers) * of_block


def _copied_bytes(request: PlanRequest, num_gathers: int, num_sums: int) -> int:
    """Of the weights of one KV head that several tensor ranks compute, in one block."""
    model, adapter = request.model, request.adapter
    copies = request.tensor_degree // model.num_kv_heads
    if copies <= 1:
        return 0
    own = model.head_size // copies
    whole = 2 * own * (model.hidden_size + model.qkv_bias)
    adapted = own * adapter.rank * len({"k_proj", "v_proj"}.intersection(adapter.projections)) if adapter.is_on else 0
    trained = adapted if adapter.is_on else whole
    wide = max(WIDE_BYTES, request.itemsize)
    return (copies - 1) * (num_gathers * (whole + adapted) * request.itemsize + num_sums * trained * wide)


def _forwards(schedule: Schedule, layer: LayerPlan, cuts: Cuts, rows: int) -> int:
    """How often a block's attention runs forward: once for every tile of queries, and again where its results go."""
    return len(cuts.query_tiles(rows)) + len(tiles_again(schedule, layer, cuts, rows))
