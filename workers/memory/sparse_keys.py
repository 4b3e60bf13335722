"""Page-sparse attention of a chunk: its queries read some pages of the KV blocks before it. Lossy.

A KV block is cut into pages, and a page of one row is what moves: only chosen pages are loaded, and only their
gradients are added to and stored. The chunk's own KV blocks are always read whole.

    choice      for every layer, row and chunk, by the scores of OOMB (kernels/pages.py): queries of the chunk against
                the mean key of a page, summed over all heads, so that all heads read the same pages
    always in   the first pages of the document (sink) and the last ones before the chunk's blocks (recent)
    once        made when attention of the chunk runs first, replayed ever after: a constant, without a gradient

That first time is stage 1. The last layer runs no attention there, and the last chunk is not in it: theirs are made in
stage 2's forward.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from headrace.kernels.api import Packing
from headrace.kernels.attention import AttentionSpec, SelectedSpec
from headrace.kernels.attention.blocks import Block
from headrace.kernels.pages import page_mean, page_score, top_pages
from headrace.storage.core.errors import InputError
from headrace.workers.memory.chunk_keys import ChunkKeys
from headrace.workers.memory.chunk_plan import LOADS_AHEAD
from headrace.workers.memory.kv_blocks import KvBlocks, Place, RowShape
from headrace.workers.memory.meter import Hold, Meter
from headrace.workers.memory.plan import MemoryPlan, PagePlan
from headrace.workers.model.program import RowPart
from headrace.workers.model.skeleton import Span

NO_PAGE = -1  # where a row reads fewer pages than another one


@dataclass(frozen=True)
class PageShape(RowShape):
    """Pages in place of KV blocks, each of one row: page p of row r has the number p * num_rows + r.

    Args:
        num_rows: of the batch; batch_size is 1.
        in_flight: see stores_in_flight.
    """

    num_rows: int = 1
    in_flight: int = 0

    @property
    def num_blocks(self) -> int:
        """Pages of all rows."""
        return super().num_blocks * self.num_rows

    @property
    def stores_in_flight(self) -> int:
        """Pages on their way out: those of as many KV blocks as without pages."""
        return self.in_flight

    def owner(self, index: int) -> str:
        """Rows have pages of the same tokens."""
        return f"row{index % self.num_rows}"

    def span(self, index: int) -> Span:
        """Tokens [begin, end) of a page."""
        return super().span(index // self.num_rows)


@dataclass(frozen=True)
class _Reader:
    """Queries of one row that see keys of earlier KV blocks, [begin, end), and the first key that they see."""

    queries: Span
    first_key: int


class SparseKeys(ChunkKeys):
    """See ChunkKeys.

    Attributes:
        chosen: by layer and first token of the chunk, the pages that it reads of earlier KV blocks: (B, most of a row)
            int32 on the host, filled up with NO_PAGE. Of the pass at hand or the last one.
    """

    def __init__(self, windows: Sequence[int | None], kv: KvBlocks, grads: KvBlocks, meter: Meter | None) -> None:
        super().__init__(windows, kv, grads, meter)
        self._is_dense = False
        self._counts = 0, 0
        self.chosen: dict[Place, torch.Tensor] = {}
        self._shape: PageShape | None = None
        self._split: dict[int, dict[int, list[list[int]]]] = {}
        self._means: dict[int, torch.Tensor] = {}
        self._holds: dict[int, Hold] = {}
        self._starts: list[list[int]] = []

    def begin(self, plan: MemoryPlan, step: int, micro_batch: int) -> None:
        super().begin(plan, step, micro_batch)
        self.chosen.clear()

    def enter(self, chunk: RowPart, packing: Packing | None) -> None:
        super().enter(chunk, packing)
        self._split.clear()
        self._starts = [] if packing is None else _starts_by_row(packing, chunk.span[1])

    @contextmanager
    def at_work(self, num_bytes: int) -> Iterator[None]:
        """See ChunkKeys. A block's keys and values are gathered while those of the one before are still there."""
        row, pages = self._rows, self._plan_pages
        of_token = 2 * row.batch_size * row.heads[0] * row.heads[1] * row.dtype.itemsize
        block = min(row.block_len, row.num_tokens)
        before = min(block, pages.budget * pages.page, self._own_blocks()[0] * row.block_len)
        with super().at_work(num_bytes + of_token * (block + before)):
            yield

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """See ChunkKeys. The mean keys of the pages that are full now are remembered, too."""
        self._start(k)
        begin, end = self.chunk.span
        if self._written.get(layer, 0) >= end:
            return
        self._written[layer] = end
        for page, row, place in self._own_pages(layer):
            first, last = self._page_row.span(place[1])
            low, high = max(begin, first), min(end, last)
            block = self.kv.new(place) if place not in self.kv else self.kv.get(place)
            for tensor, source in zip(block, (k, v), strict=True):
                tensor[0, low - first : high - first] = source[row, low - begin : high - begin]
            if high == last:
                start = max(first, self._document_start(row, last - 1))
                self._means_of(layer, k)[row, page] = page_mean(block[0][:, start - first :], last - start)[0, 0]

    def spec(self, layer: int, q: torch.Tensor, spec: AttentionSpec) -> AttentionSpec:
        """See ChunkKeys. The pages are chosen here, unless they were before."""
        spec = super().spec(layer, q, spec)
        readers = self._readers(q, spec)
        name = (layer, self.chunk.span[0])
        if name not in self.chosen:
            self.chosen[name] = self._choose(layer, q, readers)
        fields = {name: getattr(spec, name) for name in AttentionSpec.__dataclass_fields__}
        return SelectedSpec(**fields, gathered=self._gathered(layer, readers))

    def fetch(self, layer: int, order: Sequence[int], *, backward: bool) -> Iterator[Block]:
        """See ChunkKeys: k and v of the chosen pages of these blocks."""
        following = layer - 1 if backward else layer + 1
        ahead = [[place for _, _, place in self._read(layer, index)] for index in order]
        if following < self._finished and (following, self.chunk.span[0]) in self.chosen:
            blocks = sorted({*self._by_block(following), *self._own_blocks()}, reverse=backward)
            ahead += [[place for _, _, place in self._read(following, index)] for index in blocks[:LOADS_AHEAD]]
        for number, index in enumerate(order):
            for place in (place for places in ahead[number : number + 1 + LOADS_AHEAD] for place in places):
                for pages in (self.kv, self.grads) if backward else (self.kv,):
                    if place in pages:
                        pages.want(place)
            whole = self._gather(layer, index)
            yield whole[0], whole[1]

    def add(self, layer: int, index: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """See ChunkKeys: the gradients of a block's chosen pages, in the order of `fetch`."""
        own = self._own_blocks()[0]
        for row, at, place in self._read(layer, index):
            part = slice(at, at + self._num_keys(place))
            is_new = place not in self.grads
            block = self.grads.new(place) if is_new else self.grads.get(place, to_change=True)
            for total, grad in zip(block, (dk, dv), strict=True):
                rows = total[0, : part.stop - at]
                if is_new:
                    rows.copy_(grad[row, part])
                else:
                    rows += grad[row, part]
            if index < own:
                self.grads.put(place, changed=True)

    def take_gradients(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        self._finished, (begin, end) = layer, self.chunk.span
        row, device = self._rows, self._rows.device
        whole = torch.empty(2, row.batch_size, end - begin, *row.heads, dtype=dtype, device=device)
        for _, number, place in self._own_pages(layer):
            first, last = self._page_row.span(place[1])
            low, high = max(begin, first), min(end, last)
            whole[:, number, low - begin : high - begin] = self.grads.get(place)[:, 0, low - first : high - first]
        finished = -(-begin // self._page_row.block_len)
        # Later pages were finished by later chunks.
        for _, _, place in self._own_pages(layer, finished * self._page_row.block_len):
            self.kv.drop(place)
            self.grads.drop(place)
        return whole[0], whole[1]

    @contextmanager
    def dense(self) -> Iterator[None]:
        self._is_dense = True
        try:
            yield
        finally:
            self._is_dense = False

    def take_page_counts(self) -> tuple[int, int]:
        counts, self._counts = self._counts, (0, 0)
        return counts

    def choice(self) -> dict[str, torch.Tensor]:
        """See ChunkKeys. The last layer, and all layers in the last chunk, choose in stage 2, by the mean keys."""
        chosen = {f"chosen/{layer}/{begin}": pages for (layer, begin), pages in self.chosen.items() if pages.numel()}
        means = {f"means/{layer}/0": self._means[layer] for layer in self._written}
        return {**chosen, **means, "counts/0/0": torch.tensor(self._counts, dtype=torch.int32)}

    def restore_choice(self, tensors: Mapping[str, torch.Tensor]) -> None:
        device, counts = self._rows.device, tensors["counts/0/0"].tolist()
        self._counts = counts[0], counts[1]
        for name, tensor in tensors.items():
            kind, layer, begin = name.split("/")
            if kind == "chosen":
                self.chosen[int(layer), int(begin)] = tensor.cpu()
            elif kind == "means":
                self._keep_means(int(layer), tensor.to(device))

    def free(self) -> None:
        super().free()
        self._means.clear()
        for hold in self._holds.values():
            hold.release()
        self._holds.clear()

    @property
    def _page_row(self) -> PageShape:
        assert self._shape is not None, "append comes first"
        return self._shape

    @property
    def _plan_pages(self) -> PagePlan:
        assert self._plan is not None, "begin comes first"
        assert self._plan.pages is not None, "the plan has pages"
        return self._plan.pages

    def _blocks_of(self, row: RowShape) -> PageShape:
        """See ChunkKeys: pages."""
        page, rows = self._plan_pages.page, row.batch_size
        in_flight = row.stores_in_flight * row.block_len // page * rows
        self._shape = PageShape(1, row.num_tokens, page, row.heads, row.dtype, row.device, rows, in_flight)
        return self._shape

    def _means_of(self, layer: int, k: torch.Tensor) -> torch.Tensor:
        """(B, pages, Hkv, D) of a layer; kept from pass to pass while the shape stays."""
        shape = (k.shape[0], -(-self.chunk.num_tokens // self._page_row.block_len), *k.shape[2:])
        means = self._means.get(layer)
        if means is None or means.shape != shape:
            means = self._keep_means(layer, torch.empty(shape, dtype=k.dtype, device=k.device))
        return means

    def _keep_means(self, layer: int, means: torch.Tensor) -> torch.Tensor:
        if layer in self._holds:
            self._holds.pop(layer).release()
        self._means[layer] = means
        if self._meter is not None:
            self._holds[layer] = self._meter.hold(means)
        return means

    def _document_start(self, row: int, token: int) -> int:
        """First token of the document that a token of the row is in."""
        if not self._starts:
            return 0
        starts = self._starts[row]
        return starts[bisect.bisect_right(starts, token) - 1]

    def _full(self, layer: int) -> list[Place]:
        """See ChunkKeys: the pages of full KV blocks."""
        full = self.chunk.span[1] // self.block_len * self.block_len
        own = self._own_pages(layer, self._own_blocks()[0] * self.block_len)
        return [place for _, _, place in own if self._page_row.span(place[1])[0] < full]

    def _own_pages(self, layer: int, begin: int | None = None) -> Iterator[tuple[int, int, Place]]:
        """Page, row and place of the pages that hold tokens of the chunk, or of those from a token on."""
        first, end = self.chunk.span
        page, num_rows = self._page_row.block_len, self._page_row.num_rows
        for number in range((first if begin is None else begin) // page, -(-end // page)):
            for row in range(num_rows):
                yield number, row, (layer, number * num_rows + row)

    def _readers(self, q: torch.Tensor, spec: AttentionSpec) -> list[_Reader | None]:
        """By row; None: its queries see no key of an earlier block."""
        if spec.continues:
            # Between a prompt and a response may lie others, which it does not see.
            raise InputError(
                "memory=chunk_sparse: pages are chosen for one document of a row, and documents of this row share a "
                "prompt; choose memory=chunk_host, or prepare the data with data.share_prompts=false"
            )
        found: list[_Reader | None] = [None] * q.shape[0]
        for index, pieces in spec.schedule(q.shape[0], q.shape[1]).items():
            for piece in pieces if index < self._own_blocks()[0] else ():
                for row in range(*piece.rows):
                    if found[row] is None:
                        found[row] = _Reader(piece.queries, piece.keys[0])
        return found

    def _choose(self, layer: int, q: torch.Tensor, readers: Sequence[_Reader | None]) -> torch.Tensor:
        """The pages that every row reads of the blocks before the chunk's own, ascending."""
        page, rows = self._plan_pages.page, []
        last = self._own_blocks()[0] * self.block_len // page
        for row, reader in enumerate(readers):
            if reader is None:
                rows.append(torch.empty(0, dtype=torch.int32))
                continue
            first = reader.first_key // page
            begin, end = (place - self.chunk.span[0] for place in reader.queries)
            if self._is_dense or last - first <= self._plan_pages.budget:
                found = torch.arange(first, last, dtype=torch.int32)
            else:
                queries, means = q[row : row + 1, begin:end], self._means[layer][row : row + 1, first:last]
                found = first + choose_pages(queries, means, self._plan_pages)
            rows.append(found.to(torch.int32))
            if not self._is_dense:
                self._counts = self._counts[0] + len(found), self._counts[1] + last - first
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_PAGE)

    def _gathered(self, layer: int, readers: Sequence[_Reader | None]) -> tuple[tuple[Span, ...], ...]:
        page, found, by_block = self._plan_pages.page, [], self._by_block(layer)
        for index in range(self._own_blocks()[0]):
            begin, spans = index * self.block_len, []
            for here, reader in zip(by_block.get(index, [[]] * len(readers)), readers, strict=True):
                # Of the page in which the document begins it sees the end.
                hidden = max(0, reader.first_key - here[0] * page) if here and reader is not None else 0
                spans.append((begin + hidden, begin + len(here) * page))
            found.append(tuple(spans))
        return tuple(found)

    def _by_block(self, layer: int) -> dict[int, list[list[int]]]:
        """Chosen pages of the chunk: block to the pages of every row."""
        if layer not in self._split:
            of_block, rows = self.block_len // self._plan_pages.page, self.chosen[layer, self.chunk.span[0]].tolist()
            split: dict[int, list[list[int]]] = {}
            for row, pages in enumerate(rows):
                for number in pages:
                    if number != NO_PAGE:
                        split.setdefault(number // of_block, [[] for _ in rows])[row].append(number)
            self._split[layer] = split
        return self._split[layer]

    def _read(self, layer: int, index: int) -> list[tuple[int, int, Place]]:
        """Pages that are read of a block: row, first key among the row's gathered ones, and place."""
        page, num_rows = self._page_row.block_len, self._page_row.num_rows
        of_block = self.block_len // page
        own = range(index * of_block, -(-min((index + 1) * self.block_len, self.chunk.span[1]) // page))
        is_own, found = index >= self._own_blocks()[0], []
        for row, pages in enumerate([own] * num_rows if is_own else self._by_block(layer)[index]):
            found += [(row, at * page, (layer, number * num_rows + row)) for at, number in enumerate(pages)]
        return found

    def _num_keys(self, place: Place) -> int:
        """Of a page, up to the chunk's end."""
        first, last = self._page_row.span(place[1])
        return min(last, self.chunk.span[1]) - first

    def _gather(self, layer: int, index: int) -> torch.Tensor:
        """Keys and values of a block's pages, (2, B, most keys of a row, Hkv, D); the rest of a row is undefined."""
        read = self._read(layer, index)
        length = max(at + self._num_keys(place) for _, at, place in read)
        row = self._rows
        whole = torch.empty(2, row.batch_size, length, *row.heads, dtype=row.dtype, device=row.device)
        own = self._own_blocks()[0]
        for number, at, place in read:
            num_keys = self._num_keys(place)
            whole[:, number, at : at + num_keys] = self.kv.get(place)[:, 0, :num_keys]
            if index < own:
                self.kv.put(place, changed=False)
        return whole


def choose_pages(q: torch.Tensor, means: torch.Tensor, pages: PagePlan) -> torch.Tensor:
    """The pages to read: the first and the last ones, then those of highest score; see kernels.pages.page_score.

    Args:
        q: (1, n, Hq, D), after RoPE. means: (1, P, Hkv, D), of more pages than the budget, in order.

    Returns:
        (budget,) int64 on the host, ascending.
    """
    num_pages, free = means.shape[1], pages.budget - pages.sink - pages.recent
    always = [*range(pages.sink), *range(num_pages - pages.recent, num_pages)]
    # In tiles, because weights of every query and page exist at once.
    scores = page_score(q, means, pages.page).sum(1)[0]
    scores[torch.tensor(always, dtype=torch.int64)] = float("-inf")
    found = top_pages(scores, free).tolist() if free else []
    return torch.tensor(sorted(always + found))


def _starts_by_row(packing: Packing, row_len: int) -> list[list[int]]:
    """First tokens of the documents of every row of so many tokens."""
    starts: list[list[int]] = []
    place = 0
    for length in packing.lengths:
        if place % row_len == 0:
            starts.append([])
        starts[-1].append(place % row_len)
        place += length
    return starts
