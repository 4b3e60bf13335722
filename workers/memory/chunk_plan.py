"""What the sweep by chunk moves and holds, in numbers: the rules of chunk_keys.py and kv_blocks.py. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Medium
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, PagePlan, Stretch
from headrace.workers.memory.schedule import schedule_of, tiles_again
from headrace.workers.model.skeleton import Skeleton, Span, chunk_skeleton

# Blocks whose loads are under way beside the one that attention reads.
LOADS_AHEAD = 2
# Stores under way, of keys and values and of their gradients each: their memory is not free yet.
STORES_IN_FLIGHT = 2
WIDE = 4  # bytes of an element of the gradients, fp64 models apart
PAGE_NUMBER_BYTES = 4

Again = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class KvShape:
    """Keys and values of one micro-batch on one rank.

    Args:
        num_tokens: of whole rows.
        kv_width: elements per token of all keys of a layer that the rank has.
        itemsize: bytes of the compute dtype.
        num_layers: that have keys and values.
        window: keys that a query sees, itself included; None: all before it.
        is_last_layer: whether the last one of them is the model's last layer, which reads none in stage 1.
        num_sharers: ranks that share the rows of a chunk.
    """

    num_layers: int
    batch_size: int
    num_tokens: int
    kv_width: int
    itemsize: int
    window: int | None = None
    is_last_layer: bool = True
    num_sharers: int = 1

    @classmethod
    def of(
        cls,
        skeletons: Sequence[Skeleton],
        *,
        batch_size: int,
        num_tokens: int,
        itemsize: int,
        window: int | None = None,
    ) -> KvShape:
        """Of a model's blocks on whole rows, as one rank runs them. Those that scan have no keys."""
        found = [_keys_width(skeleton) for skeleton in skeletons]
        with_keys = [width for width in found if width]
        return cls(
            len(with_keys),
            batch_size,
            num_tokens,
            max(with_keys, default=0),
            itemsize,
            window,
            is_last_layer=bool(found[-1]),
            num_sharers=max((s.tokens_per_row for each in skeletons for s in each.segments if s.earlier), default=1),
        )

    def bytes_of(self, num_tokens: int, itemsize: int) -> int:
        """Of keys and values of so many tokens of every row of one layer."""
        return 2 * self.batch_size * num_tokens * self.kv_width * itemsize


class KvBytes(NamedTuple):
    """Of one micro-batch, over all layers.

    Args:
        stored / loaded: that move, by tier.
        slots: that a tier holds at most.
        resident: on the device all the time: arenas.
        buffers: on the device beside the arenas: blocks that are open, on their way out or back.
    """

    stored: dict[Medium, int]
    loaded: dict[Medium, int]
    slots: dict[Medium, int]
    resident: int
    buffers: int

    def plus(self, other: KvBytes) -> KvBytes:
        """Of both."""
        stored, loaded, slots = (
            {medium: own[medium] + its[medium] for medium in own} for own, its in zip(self[:3], other[:3], strict=True)
        )
        return KvBytes(stored, loaded, slots, self.resident + other.resident, self.buffers + other.buffers)


def medium_of(stretches: tuple[Stretch, ...], token: int) -> Medium | None:
    """The tier of the block that begins at a token; None: HBM."""
    (row,) = (s for s in stretches if s.begin <= token and (s.end is None or token < s.end))
    return row.residence.medium


def pass_bytes(plan: MemoryPlan, skeletons: Sequence[Skeleton], shape: KvShape, *, gradient_copies: int = 1) -> KvBytes:
    """What keys, values and the states of scans take in a training pass, with their gradients; see the two below."""
    cuts, each = plan.cuts, {"batch_size": shape.batch_size, "itemsize": shape.itemsize}
    again = attention_again(tuple(zip(skeletons, plan.layers, strict=True)), cuts, shape)
    total = kv_bytes(shape, cuts, plan.kv, plan.kv_grads, plan.pages, gradient_copies=gradient_copies, again=again)
    for num_bytes, num_layers in states_of(skeletons, **each).items():
        total = total.plus(state_bytes(num_layers, num_bytes, shape.num_tokens, cuts, plan.kv))
    return total


@lru_cache(maxsize=256)
def attention_again(blocks: tuple[tuple[Skeleton, LayerPlan], ...], cuts: Cuts, shape: KvShape) -> Again:
    """Attention that backward of stage 2 runs again: passes of queries, by their first one, and in how many layers."""
    found: Counter[int] = Counter()
    chunks = cuts.chunk_spans(shape.num_tokens)
    for (skeleton, layer), number in Counter(blocks).items():
        if has_keys(skeleton):
            schedule = schedule_of(chunk_skeleton(skeleton))
            for length in {end - begin for begin, end in chunks}:
                rows = length // shape.num_sharers
                firsts = _passes(tiles_again(schedule, layer, cuts, rows), rows, shape.num_sharers)
                for begin in (begin for begin, end in chunks if end - begin == length):
                    found.update({begin + first: number for first in firsts})
    return tuple(sorted(found.items()))


def _passes(tiles: Sequence[Span], rows: int, num_sharers: int) -> list[int]:
    """The first query, in a chunk, of every pass that attention makes for tiles of a rank's rows.

    Of ranks that share the rows each has its tile in another place, and a pass takes queries that are neighbours.
    """
    if list(tiles) == [(0, rows)]:
        return [0]
    return [rank * rows + first for rank in range(num_sharers) for first, _ in tiles]


def states_of(skeletons: Sequence[Skeleton], *, batch_size: int, itemsize: int) -> Counter[int]:
    """Bytes of the state of every row together, and how many scans have one of that size."""
    found = (segment.state for skeleton in skeletons for segment in skeleton.segments)
    return Counter(batch_size * state.bytes_per_token(itemsize) for state in found if state is not None)


def has_keys(skeleton: Skeleton) -> bool:
    """Whether a block on whole rows reads keys and values of earlier tokens."""
    return any(segment.earlier for segment in skeleton.segments)


def _keys_width(skeleton: Skeleton) -> int:
    """Elements per token of all keys of a block on one rank; 0: it has none."""
    mixes = [segment for segment in skeleton.segments if segment.earlier]
    return sum(skeleton.tensors[name].width // mix.tokens_per_row for mix in mixes for name in mix.earlier) // 2


@lru_cache(maxsize=256)  # the planner asks again and again, and a long row has many blocks
def kv_bytes(
    shape: KvShape,
    cuts: Cuts,
    kv: tuple[Stretch, ...],
    grads: tuple[Stretch, ...],
    pages: PagePlan | None = None,
    *,
    gradient_copies: int = 1,
    again: Again = (),
) -> KvBytes:
    """What keys, values and their gradients of a training pass take.

    A block that lives in a tier is stored once, when it is full, and loaded once by every pass of a later chunk that
    sees it (stage 1 but in the last layer, forward and backward of stage 2; each tile of queries is a pass of forward,
    and so is what runs again), and once more when stage 2 comes to its own tokens. Its gradient is stored by the
    backward of every later chunk, and loaded as often: the first backward finds none, the block's own chunk leaves
    none. With pages see page_bytes.

    Args:
        gradient_copies: of a block that a tier holds at once: two where records of the step pin the older ones.
        again: see attention_again.
    """
    assert cuts.kv_block is not None, "cuts of the sweep by chunk"
    if pages is not None:
        return page_bytes(shape, cuts, (kv, grads), pages, gradient_copies=gradient_copies, again=again)
    if shape.num_layers == 0:
        empty = dict.fromkeys((Medium.host, Medium.ssd), 0)
        return KvBytes(empty, empty, empty, 0, 0)
    chunks = cuts.chunk_spans(shape.num_tokens)
    blocks = block_spans(shape.num_tokens, cuts.kv_block)
    tiers, begins = (Medium.host, Medium.ssd), [begin for begin, _ in chunks]
    stored, loaded, slots = (dict.fromkeys(tiers, 0) for _ in range(3))
    resident = buffers = 0
    own = max(-(-end // cuts.kv_block) - begin // cuts.kv_block for begin, end in chunks)
    tiles, more = [], dict(again)  # the first query of every pass of a layer's forward
    for begin, end in chunks:
        rows = (end - begin) // shape.num_sharers
        tiles += [begin + first for first in _passes(cuts.query_tiles(rows), rows, shape.num_sharers)]
    forwards = [0, *accumulate(shape.num_layers + more.get(tile, 0) for tile in tiles)]  # of stage 2, up to a pass
    for stretches, itemsize, is_gradient in ((kv, shape.itemsize, False), (grads, max(WIDE, shape.itemsize), True)):
        some_away = False
        for begin, end in blocks:
            of_layer, tier = shape.bytes_of(end - begin, itemsize), medium_of(stretches, begin)
            if tier is None:
                resident += shape.num_layers * shape.bytes_of(cuts.kv_block, itemsize)
                continue
            some_away = True
            later = _readers(begins, (begin, end), cuts.kv_block, shape.window)
            if is_gradient:
                num_stored = num_loaded = shape.num_layers * len(later)
            elif end <= chunks[-1][0]:
                seen_to = shape.num_tokens if shape.window is None else end + shape.window - 1
                first, stop, last = (bisect_left(tiles, at) for at in (begins[later.start], seen_to, begins[-1]))
                stop, num_stored = max(first, stop), shape.num_layers
                populating = max(0, min(stop, last) - first) * (shape.num_layers - shape.is_last_layer)
                num_loaded = forwards[stop] - forwards[first] + shape.num_layers * (len(later) + 1) + populating
            else:
                num_stored = num_loaded = 0
            stored[tier] += num_stored * of_layer
            loaded[tier] += num_loaded * of_layer
            copies = gradient_copies if is_gradient else 1
            slots[tier] += copies * shape.num_layers * round_up(of_layer) if num_stored else 0
        if some_away:
            # Of the chunk at hand the keys of every layer are open, and of one layer the gradients. The rest passes by:
            # loads ahead and stores behind are of two layers at most. Backward stores gradients, and no keys.
            opened, passing = shape.num_layers * own, 1 + LOADS_AHEAD
            if is_gradient:
                opened, passing = own, min(passing + STORES_IN_FLIGHT, 2 * (len(blocks) - own))
            buffers += (opened + passing) * shape.bytes_of(min(cuts.kv_block, shape.num_tokens), itemsize)
    return KvBytes(stored, loaded, slots, resident, buffers)


def state_bytes(num_layers: int, bytes_each: int, num_tokens: int, cuts: Cuts, kv: tuple[Stretch, ...]) -> KvBytes:
    """What the states of scans at the chunks' starts take in a training pass.

    The state before a chunk lives where a KV block would that begins there. It is stored when stage 1 has used it, and
    loaded when stage 2 comes to its chunk. That of the first chunk is zero, and the last chunk has no stage 1. Of every
    layer one gradient of a state is on the device.

    Args:
        num_layers: with such a scan.
        bytes_each: of the state of all rows.
    """
    stored, slots = (dict.fromkeys((Medium.host, Medium.ssd), 0) for _ in range(2))
    num_resident = 0
    spans = cuts.chunk_spans(num_tokens)[1:]
    for begin, _ in spans:
        tier = medium_of(kv, begin)
        if tier is None:
            num_resident += 1
        elif (begin, _) != spans[-1]:
            stored[tier] += num_layers * bytes_each
            slots[tier] += num_layers * round_up(bytes_each)
    buffers = num_layers + min(num_layers, STORES_IN_FLIGHT) if num_resident < len(spans) else 0
    num_gradients = num_layers if spans else 0
    return KvBytes(
        stored, dict(stored), slots, (num_layers * num_resident + num_gradients) * bytes_each, buffers * bytes_each
    )


def page_bytes(
    shape: KvShape,
    cuts: Cuts,
    places: tuple[tuple[Stretch, ...], tuple[Stretch, ...]],
    pages: PagePlan,
    *,
    gradient_copies: int = 1,
    again: Again = (),
) -> KvBytes:
    """As kv_bytes, where a chunk reads chosen pages of the blocks before it (sparse_keys.py).

    A page that lives in a tier is stored once and loaded once for its own chunk, as without a choice. Each pass of a
    later chunk loads the pages that it has chosen, and its backward loads and stores their gradients. Which pages that
    will be is not known, but how many, in rows of one document. Where the blocks before a chunk live in several places,
    each place has its share of the chosen pages.

    Args:
        places: of keys and values, and of their gradients.
    """
    assert cuts.kv_block is not None, "cuts of the sweep by chunk"
    chunks, tiers, layers = cuts.chunk_spans(shape.num_tokens), (Medium.host, Medium.ssd), shape.num_layers
    stored, loaded, slots = (dict.fromkeys(tiers, 0) for _ in range(3))
    chosen = [pages_read(chunk, cuts.kv_block, pages) for chunk in chunks]
    resident = sum(page_index_bytes(shape, cuts, pages))
    buffers = 0
    own = max(-(-end // cuts.kv_block) - begin // cuts.kv_block for begin, end in chunks)
    for stretches, itemsize, is_gradient in (
        (places[0], shape.itemsize, False),
        (places[1], max(WIDE, shape.itemsize), True),
    ):
        of_page, copies = shape.bytes_of(pages.page, itemsize), gradient_copies if is_gradient else 1
        away: dict[Medium | None, list[int]] = {}  # numbers of the blocks that live there
        for number, (begin, end) in enumerate(block_spans(shape.num_tokens, cuts.kv_block)):
            tier, held = medium_of(stretches, begin), -(-(end - begin) // pages.page)
            away.setdefault(tier, []).append(number)
            if tier is None:
                resident += layers * held * of_page
            elif end <= chunks[-1][0]:
                stored[tier] += 0 if is_gradient else layers * held * of_page
                loaded[tier] += 0 if is_gradient else layers * held * of_page
                slots[tier] += copies * layers * held * shape.batch_size * round_up(of_page // shape.batch_size)
        for tier in away.keys() & set(tiers):
            assert tier is not None
            for number, ((begin, _), read) in enumerate(zip(chunks, chosen, strict=True)):
                before = begin // cuts.kv_block
                here = read * bisect_left(away[tier], before) // max(1, before)
                forwards = layers + dict(again).get(begin, 0) + (0 if number == len(chunks) - 1 else layers - 1)
                loaded[tier] += of_page * here * (layers if is_gradient else layers + forwards)
                stored[tier] += of_page * here * layers if is_gradient else 0
        if away.keys() & set(tiers):
            passing = (1 + LOADS_AHEAD + STORES_IN_FLIGHT) * min(cuts.kv_block, pages.budget * pages.page)
            longest = min(cuts.kv_block, shape.num_tokens)
            buffers += shape.bytes_of(layers * own * longest + min(passing, shape.num_tokens), itemsize)
    return KvBytes(stored, loaded, slots, resident, buffers)


def page_index_bytes(shape: KvShape, cuts: Cuts, pages: PagePlan) -> tuple[int, int]:
    """Of the mean keys of all pages, and of the numbers of the chosen ones (on CUDA these are in host memory)."""
    assert cuts.kv_block is not None, "cuts of the sweep by chunk"
    num_chosen = sum(pages_read(chunk, cuts.kv_block, pages) for chunk in cuts.chunk_spans(shape.num_tokens))
    means = shape.bytes_of(-(-shape.num_tokens // pages.page), shape.itemsize) // 2
    return shape.num_layers * means, shape.num_layers * shape.batch_size * PAGE_NUMBER_BYTES * num_chosen


def pages_read(chunk: Span, block_len: int, pages: PagePlan) -> int:
    """Pages that a chunk reads of the KV blocks before its own, in a row of one document."""
    return min(pages.budget, chunk[0] // block_len * block_len // pages.page)


def gathered_bytes(shape: KvShape, cuts: Cuts, pages: PagePlan) -> int:
    """Copies of keys and values that attention reads: a chunk's own KV block, and the pages of one before it."""
    assert cuts.kv_block is not None, "cuts of the sweep by chunk"
    block = min(cuts.kv_block, shape.num_tokens)
    before = min(block, pages.budget * pages.page) if shape.num_tokens > block else 0
    return shape.bytes_of(block + before, shape.itemsize)


def pairs_seen(cuts: Cuts, pages: PagePlan, chunks: Sequence[Span]) -> int:
    """(query, key) pairs that these chunks compute in a row of one document."""
    assert cuts.kv_block is not None, "cuts of the sweep by chunk"
    total = 0
    for begin, end in chunks:
        before = pages_read((begin, end), cuts.kv_block, pages) * pages.page + begin % cuts.kv_block
        total += (end - begin) * before + (end - begin) * (end - begin + 1) // 2
    return total


class AttentionBytes(NamedTuple):
    """What a chunk's attention takes beside its inputs and results; see kernels/attention/blocks.py."""

    forward: int
    backward: int


def attention_bytes(
    *, batch_size: int, num_queries: int, num_keys: int, heads: tuple[int, int], head_size: int, itemsize: int
) -> AttentionBytes:
    """With the operators of the CPU, over one KV block at a time.

        forward     a sum of out, heads-first q, one block's out and LSE, LSE in fp64
        backward    a sum of dq, heads-first q, out and dout, one block's dq, dk and dv, and these two in fp32

    Args:
        num_keys: of a KV block.
        heads: of queries and of keys.
    """
    queries, keys = (
        batch_size * num * count * head_size for num, count in zip((num_queries, num_keys), heads, strict=True)
    )
    lse, wide = batch_size * num_queries * heads[0], max(WIDE, itemsize)
    is_grouped = heads[0] != heads[1]
    # A sum in the compute dtype becomes the result.
    sum_bytes = 0 if wide == itemsize else wide * queries
    copies = itemsize * queries if is_grouped else 0
    forward = sum_bytes + copies + itemsize * queries + (8 + wide) * lse
    backward = sum_bytes + 3 * copies + itemsize * queries + wide * lse + 2 * keys * (wide + itemsize)
    return AttentionBytes(forward, backward)


class CarriedBytes(NamedTuple):
    """Sums of parameter gradients that wait from chunk to chunk, or, where backward is split, for the step's end.

    Args:
        beside_block: of the other blocks, while one is at work: it counts its own.
        own: of the largest block.
    """

    beside_block: int
    own: int

    @classmethod
    def of(cls, blocks: Iterable[Skeleton], itemsize: int) -> CarriedBytes:
        """Of these blocks, computed in a dtype of so many bytes."""
        trained = [sum(segment.trained for segment in skeleton.segments) for skeleton in blocks]
        wide, most = max(WIDE, itemsize), max(trained, default=0)
        return cls(wide * (sum(trained) - most), wide * most)


def block_spans(num_tokens: int, block_len: int) -> list[Span]:
    """The KV blocks of a row, the last one ragged."""
    return [(begin, min(begin + block_len, num_tokens)) for begin in range(0, num_tokens, block_len)]


def _readers(begins: Sequence[int], block: Span, block_len: int, window: int | None) -> range:
    """The chunks, by their first tokens, that see an earlier block which holds none of their own tokens."""
    first = bisect_left(begins, block[0] + block_len)
    end = len(begins) if window is None else bisect_left(begins, block[1] + window - 1)
    return range(first, max(first, end))
