"""The tasks of a plan by chunk: two stages over the chunks of a row. No torch.

Stage 1 runs every chunk but the last one forward and stores its keys and values; stage 2 goes back over the chunks,
runs each again and takes its gradients. Work and bytes are those of platform/planning/chunks.py: a pass over a chunk
gets its part of them by the keys that it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.platform.planning.chunks import kv_of, work
from headrace.platform.planning.simulate.blocks import Rank, Task
from headrace.platform.planning.simulate.engine import What
from headrace.platform.planning.simulate.network import GRADIENT_BYTES
from headrace.storage.core.records import Medium
from headrace.workers.memory.chunk_plan import WIDE
from headrace.workers.memory.schedule import STORES_IN_FLIGHT
from headrace.workers.telemetry.flops import blocks_flops, causal_pairs, populating_flops

# So many pieces of passes at most: with more chunks than that, a piece is several layers.
MOST_PIECES = 12_000


@dataclass(frozen=True)
class Pass:
    """One pass over a chunk: shares of the step's work and bytes, and what it does."""

    chunk: int
    what: What
    seconds: float
    stored: float
    loaded: float


def add_chunks(rank: Rank, label: str) -> Task:
    """Add the tasks of one micro-batch; the last one. Gradients are reduced at the end."""
    passes, plan, request = chunk_passes(rank), rank.part.plan, rank.part.request
    kv, spans = kv_of(plan, request), plan.cuts.chunk_spans(request.seq_len)
    num_pieces = max(1, min(rank.num_layers, MOST_PIECES // max(1, len(passes))))
    layers = rank.num_layers / num_pieces
    gathers = [rank.weights(layers, request.itemsize, label, [rank.last]) for _ in range(num_pieces)]
    freed = layers * (1 - plan.gathered_layers / rank.num_layers)  # of a piece, and gathered again for every pass
    stores: list[Sequence[Task]] = []
    start = rank.last
    for one in passes:
        name = f"{label} chunk {one.chunk}".strip()
        begin, end = spans[one.chunk]
        for piece in range(num_pieces):
            amounts = _amounts(kv.loaded, one.loaded / num_pieces, ("h2d", "ssd_read"))
            waits = [rank.last, gathers[piece], *rank.move(amounts, What.load, name, [start])]
            if freed:
                waits.append(rank.weights(freed, request.itemsize, name, [start]))
            if len(stores) >= STORES_IN_FLIGHT:
                waits += stores[-STORES_IN_FLIGHT]
            start = rank.last
            run = rank.compute(one.what, one.seconds / num_pieces, f"{name} part {piece}", waits)
            share, again = layers * (end - begin) / request.seq_len, rank.times(0).gathered_again
            sent = share * (1 + again) if one.what is What.backward else share
            rank.last = rank.exchange(sent, share, name, run)
            amounts = _amounts(kv.stored, one.stored / num_pieces, ("d2h", "ssd_write"))
            stores.append(rank.move(amounts, What.store, name, [run]))
    rank.last = rank.weights(rank.num_layers, GRADIENT_BYTES, label, [rank.last]) or rank.last
    return rank.last


def _amounts(num_bytes: dict[Medium, int], share: float, links: tuple[str, str]) -> dict[str, float]:
    """Bytes by link: all go over the first, those of the drive over the second too."""
    host, ssd = num_bytes[Medium.host] * share, num_bytes[Medium.ssd] * share
    return {links[0]: host + ssd, links[1]: ssd}


def chunk_passes(rank: Rank) -> list[Pass]:
    """All passes of one micro-batch, in their order."""
    part, request = rank.part, rank.part.request
    model, skeletons = request.model, request.skeletons()
    chunks = part.plan.cuts.chunk_spans(request.seq_len)
    done, cost = work(part.plan, request), rank.cost
    rows = request.batch_size / request.num_sharers
    pairs = causal_pairs(request.seq_len, model.sliding_window)
    populating = rows * populating_flops(skeletons, part.plan, request.seq_len, pairs)
    again = cost.whole_flops - done.skipped_flops + done.rerun_flops - populating
    flops = [
        blocks_flops(
            skeletons, end - begin, causal_pairs(end, model.sliding_window) - causal_pairs(begin, model.sliding_window)
        )
        for begin, end in chunks
    ]
    size, wide = request.itemsize, max(WIDE, request.itemsize)
    begins = [begin for begin, _ in chunks]
    # Keys and values are stored once, their gradients by every later chunk; in bytes of one number of one layer.
    first = [
        Pass(i, What.forward, flops[i][0], (chunks[i][1] - begins[i]) * size, begins[i] * size)
        for i in range(len(chunks) - 1)
    ]
    second = [
        one
        for i in reversed(range(len(chunks)))
        for one in (
            Pass(i, What.forward, flops[i][0], 0.0, begins[i] * size),
            Pass(i, What.backward, flops[i][1], begins[i] * wide, begins[i] * (size + wide)),
        )
    ]
    stored, loaded = (
        sum(amounts) or 1.0 for amounts in zip(*((p.stored, p.loaded) for p in first + second), strict=True)
    )
    return [
        replace(one, seconds=one.seconds * scale, stored=one.stored / stored, loaded=one.loaded / loaded)
        for row, total in ((first, populating), (second, again))
        for scale in [total / rank.flops / (sum(one.seconds for one in row) or 1.0)]
        for one in row
    ]
