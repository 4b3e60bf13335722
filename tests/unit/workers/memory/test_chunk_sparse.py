"""Page-sparse attention in the sweep by chunk: brute force under a mask, the dense bits, residence, bytes, mutants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from headrace.helpers.metered_step import live_and_metered
from headrace.helpers.tiers import FakeTier, open_fake_stack
from headrace.helpers.tiny_models import LLAMA, QWEN3
from headrace.kernels.api import Packing
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.storage.stack import TierStack
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.chunk_plan import KvShape, pairs_seen, pass_bytes
from headrace.workers.memory.chunk_sweep import ByChunk, apply_chunks
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import (
    Cuts,
    LayerPlan,
    MemoryPlan,
    PagePlan,
    Residence,
    Stretch,
    Sweep,
    check_plan,
    keep_layer,
)
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.memory.sparse_keys import NO_PAGE, SparseKeys, choose_pages
from headrace.workers.model import layers
from headrace.workers.model.config import Family, ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.skeleton import chunk_skeleton

SEQ_LEN = 37
PAGES = PagePlan(page=2, budget=4, sink=1, recent=1)
EVERYTHING = PagePlan(page=2, budget=1000)


def decoder(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """q and k weights are large, so that attention is not uniform."""
    model = Decoder(config, dtype=dtype)
    torch.manual_seed(0)
    for key, param in model.named_parameters():
        torch.nn.init.normal_(param, std=1.2 if "q_proj" in key or "k_proj" in key else 0.3)
    return model


def batch_of(*, packed: bool, rows: int = 2) -> TokenBatch:
    """Documents begin in the middle of a page; every seventh target does not count."""
    tokens = torch.randint(0, 50, (rows, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    targets[:, ::7] = -100
    lengths = [9, SEQ_LEN - 9, SEQ_LEN - 4, 4][: 2 * rows] if packed else [SEQ_LEN] * rows
    return TokenBatch(tokens, targets, Packing.of_lengths(lengths))


def plan_of(
    model: Decoder, chunks: tuple[int, ...], kv_block: int, pages: PagePlan | None, **fields: Any
) -> MemoryPlan:
    layers = tuple(keep_layer(chunk_skeleton(s)) for s in skeletons_of(model.blocks))
    hbm = (Stretch(0, None, Residence.hbm),)
    cuts = Cuts(4, None, chunks, kv_block)
    plan = MemoryPlan("sparse", layers, sweep=Sweep.by_chunk, cuts=cuts, kv=hbm, kv_grads=hbm, pages=pages)
    return replace(plan, **fields)


@dataclass(frozen=True)
class Run:
    """Loss and gradients, and the pages of the first choice, by layer and first token of the chunk."""

    results: list[torch.Tensor]
    chosen: dict[tuple[int, int], torch.Tensor]


def run(model: Decoder, plan: MemoryPlan, batch: TokenBatch, stack: TierStack | None = None) -> Run:
    model.zero_grad()
    handle = apply_chunks(model.blocks, plan, stack, norm=model.norm)
    sweep = ByChunk(model, handle, None, loss_tile=16, itemsize=4)
    chosen: dict[tuple[int, int], torch.Tensor] = {}
    choose = SparseKeys._choose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseKeys, "_choose", lambda *args: _remember(chosen, choose, *args))
        try:
            loss = sweep.forward_backward(batch, batch.num_targets, step=0, micro_batch=0)
        finally:
            sweep.close()
    return Run([loss, *(param.grad.clone() for param in model.parameters())], chosen)


def _remember(chosen: dict, choose: Callable, keys: SparseKeys, layer: int, q: torch.Tensor, readers: Any) -> Any:
    found = choose(keys, layer, q, readers)
    chosen.setdefault((layer, keys.chunk.span[0]), found)
    return found


def masked_gradients(
    model: Decoder, plan: MemoryPlan, batch: TokenBatch, chosen: dict[tuple[int, int], torch.Tensor]
) -> list[torch.Tensor]:
    """Autograd over whole rows; attention is a softmax over the pairs that the pages leave."""
    assert plan.pages is not None
    assert plan.cuts.kv_block is not None
    rows, page, layer = len(batch.tokens), plan.pages.page, iter(range(100))
    documents = batch.packing.documents(rows, SEQ_LEN)
    masks = []
    for number in range(model.config.num_layers):
        mask = torch.zeros(rows, SEQ_LEN, SEQ_LEN, dtype=torch.bool)
        for begin, end in plan.cuts.chunk_spans(SEQ_LEN):
            own = begin // plan.cuts.kv_block * plan.cuts.kv_block
            mask[:, begin:end, own:] = True
            for row, pages in enumerate(chosen[number, begin].tolist()):
                for p in (p for p in pages if p != NO_PAGE):
                    mask[row, begin:end, p * page : (p + 1) * page] = True
        masks.append(mask.tril() & (documents[:, :, None] == documents[:, None, :]))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, **_: Any) -> torch.Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(~masks[next(layer)][:, None], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "attention", attention)
        loss = model(batch.tokens, batch.targets, packing=batch.packing, loss_tile=16)
    (loss / batch.num_targets).backward()
    return [loss.detach().double(), *(param.grad.clone() for param in model.parameters())]


def error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def equal(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.results, b.results, strict=True))


CUTS = [((8,), 8), ((5,), 8), ((3, 6, 9), 6)]
SOAK = [
    pytest.param(config, *cuts, packed, marks=pytest.mark.soak)
    for config in (LLAMA, QWEN3)
    for cuts in CUTS
    for packed in (False, True)
]


@pytest.mark.parametrize(
    ("config", "chunks", "kv_block", "packed"),
    [(LLAMA, (8,), 8, False), (QWEN3, (5,), 8, True), (LLAMA, (3, 6, 9), 6, True), *SOAK],
)
def test_gradients_are_those_of_masked_attention(
    config: ModelConfig, chunks: tuple[int, ...], kv_block: int, packed: bool
) -> None:
    model, batch = decoder(config, torch.float64), batch_of(packed=packed)
    plan = plan_of(model, chunks, kv_block, PAGES)
    found = run(model, plan, batch)
    assert error(found.results, masked_gradients(model, plan, batch, found.chosen)) <= 1e-12
    assert error(found.results, run(model, replace(plan, pages=None), batch).results) > 1e-3, "pages were left out"


@pytest.mark.parametrize(("chunks", "kv_block", "packed"), [((8,), 8, False), ((5,), 8, True), ((3, 6, 9), 6, False)])
def test_a_budget_for_all_pages_gives_the_dense_bits(chunks: tuple[int, ...], kv_block: int, packed: bool) -> None:
    model, batch = decoder(QWEN3, torch.float32), batch_of(packed=packed)
    plan = plan_of(model, chunks, kv_block, EVERYTHING)
    assert equal(run(model, plan, batch), run(model, replace(plan, pages=None), batch))


def test_every_row_reads_its_budget_its_first_and_its_last_pages() -> None:
    model, batch = decoder(LLAMA, torch.float32), batch_of(packed=False)
    chosen = run(model, plan_of(model, (8,), 8, PAGES), batch).chosen
    assert {layer for layer, _ in chosen} == {0, 1, 2}
    for (_, begin), rows in chosen.items():
        assert rows.dtype is torch.int32
        for pages in rows.tolist():
            assert pages == sorted(set(pages))
            assert len(pages) == min(4, begin // 2)
            assert not pages or (pages[0] == 0 and pages[-1] == begin // 2 - 1)
    assert any(not torch.equal(rows[0], rows[1]) for rows in chosen.values()), "rows choose for themselves"


def test_no_page_of_another_document_is_chosen() -> None:
    model, batch = decoder(LLAMA, torch.float32), batch_of(packed=True)
    chosen = run(model, plan_of(model, (8,), 8, PAGES), batch).chosen
    for (_, begin), (first, second) in chosen.items():
        of_first, of_second = ([p for p in row.tolist() if p != NO_PAGE] for row in (first, second))
        # The first row's second document begins with token 9; the second row's ends with token 33.
        assert all(page >= 4 for page in of_first) or begin == 8
        assert len(of_first) == (4 if begin == 8 else min(4, begin // 2 - 4) if begin else 0)
        assert len(of_second) == min(4, begin // 2)


def test_pages_of_highest_score_are_chosen() -> None:
    draw = torch.Generator().manual_seed(0)
    q, means = (torch.randn(1, n, h, 6, generator=draw, dtype=torch.float64) for n, h in ((5, 4), (9, 2)))
    weights = torch.einsum("thd,phd->htp", q[0].unflatten(1, (2, 2)).sum(2), means[0]).softmax(-1)
    scores = weights.sum((0, 1))
    best = [p for p in scores.argsort(descending=True).tolist() if p not in (0, 1, 8)][:2]
    found = choose_pages(q, means, PagePlan(page=2, budget=5, sink=2, recent=1))
    assert found.tolist() == sorted([0, 1, 8, *best])
    assert choose_pages(q, means, PagePlan(page=2, budget=3, sink=2, recent=1)).tolist() == [0, 1, 8]


@pytest.fixture
def stack() -> Iterator[TierStack]:
    tiers = [FakeTier(1 << 22, medium=medium) for medium in (Medium.host, Medium.ssd)]
    with contextlib.closing(open_fake_stack(tiers)) as opened:
        yield opened


HOST, SSD = ((Stretch(0, None, place),) for place in (Residence.host, Residence.ssd))
MIXED = (Stretch(0, 8, Residence.hbm), Stretch(8, 24, Residence.host), Stretch(24, None, Residence.ssd))


@pytest.mark.parametrize(
    ("chunks", "kv", "grads", "packed"),
    [((8,), HOST, SSD, False), ((5,), MIXED, HOST, True), ((8, 3), SSD, MIXED, True)],
)
def test_residence_never_changes_a_bit(
    chunks: tuple[int, ...], kv: tuple[Stretch, ...], grads: tuple[Stretch, ...], packed: bool, stack: TierStack
) -> None:
    model, batch = decoder(QWEN3, torch.float32), batch_of(packed=packed)
    plan = plan_of(model, chunks, 8, PAGES, kv=kv, kv_grads=grads)
    twin = plan.keep_twin([chunk_skeleton(s) for s in skeletons_of(model.blocks)])
    assert equal(run(model, plan, batch, stack), run(model, twin, batch))
    assert all(tier.used_bytes == 0 for tier in stack.stats().values())


@pytest.mark.parametrize(
    ("chunks", "kv_block", "pages"),
    [((8,), 8, PAGES), ((5,), 8, PAGES), ((10, 4), 4, PagePlan(4, 1)), ((3,), 12, EVERYTHING)],
)
def test_bytes_moved_are_the_formulas(
    chunks: tuple[int, ...], kv_block: int, pages: PagePlan, stack: TierStack
) -> None:
    """Attention of the second layer runs again in backward."""
    model = decoder(LLAMA, torch.float32)
    plan = plan_of(model, chunks, kv_block, pages, kv=HOST, kv_grads=SSD)
    first, second, third = plan.layers
    less = LayerPlan({name: row for name, row in second.stretches.items() if name not in ("out", "lse")})
    plan = replace(plan, layers=(first, less, third))
    run(model, plan, batch_of(packed=False), stack)
    shape, skeletons = KvShape(3, 2, SEQ_LEN, 2 * 4, 4), skeletons_of(model.blocks)
    wanted = pass_bytes(plan, skeletons, shape)
    for medium, found in stack.stats().items():
        assert (found.stored_bytes, found.loaded_bytes) == (wanted.stored[medium], wanted.loaded[medium])
    if pages is EVERYTHING:
        dense = pass_bytes(replace(plan, pages=None), skeletons, shape)
        assert (wanted.stored, wanted.loaded) == (dense.stored, dense.loaded)
        whole = pairs_seen(plan.cuts, pages, plan.cuts.chunk_spans(SEQ_LEN))
        assert whole == SEQ_LEN * (SEQ_LEN + 1) // 2


def test_dense_evaluation_of_a_sparse_plan_is_the_loss_of_whole_rows(stack: TierStack) -> None:
    model, batch = decoder(LLAMA, torch.float64), batch_of(packed=True)
    handle = apply_chunks(model.blocks, plan_of(model, (5,), 8, PAGES, kv=SSD), stack, norm=model.norm)
    sweep = ByChunk(model, handle, None, loss_tile=16, itemsize=8)
    sparse, counts = sweep.evaluate(batch), handle.take_page_counts()
    with handle.dense():
        dense = sweep.evaluate(batch)
    again = sweep.evaluate(batch)
    sweep.close()
    with torch.no_grad():
        wanted = model(batch.tokens, batch.targets, packing=batch.packing)
    torch.testing.assert_close(dense, wanted, rtol=1e-14, atol=0)
    assert abs(float(sparse / wanted) - 1) > 1e-4
    assert torch.equal(sparse, again)
    assert 0 < counts[0] < counts[1]
    assert handle.take_page_counts() == counts, "dense passes do not count"


SMALL = replace(LLAMA, vocab_size=512, hidden_size=64, num_layers=4, num_heads=8, intermediate_size=160)


def peaks(num_tokens: int, place: Residence, stack: TierStack) -> tuple[int, int]:
    """Live and metered, of a step with chunks of 64 tokens."""
    model, where = Decoder(SMALL), (Stretch(0, None, place),)
    plan = plan_of(model, (64,), 64, PagePlan(16, 6, 1, 2), kv=where, kv_grads=where, cuts=Cuts(32, None, (64,), 64))
    return live_and_metered(model, plan, num_tokens, stack, loss_tile=32)


@pytest.mark.parametrize("place", [Residence.host, pytest.param(Residence.hbm, marks=pytest.mark.soak)])
def test_the_meter_counts_all_live_tensors(place: Residence, stack: TierStack) -> None:
    live, metered = peaks(256, place, stack)
    assert metered == pytest.approx(live, rel=0.03)


def test_device_bytes_grow_by_mean_keys_and_choices_only(stack: TierStack) -> None:
    shorter, longer = (peaks(n, Residence.ssd, stack)[0] for n in (256, 384))
    means, choices = 8 * 4 * 2 * 8 * 4, 2 * 4 * 6 * 4  # 8 more pages, 2 more chunks of 6 pages; 4 layers
    gathered = 6 * 16 * 2 * 16 * 4  # how the budget is spread over the blocks depends on the data
    assert longer - shorter <= means + choices + 2 * gathered


def test_wrong_pages_are_refused() -> None:
    model = decoder(LLAMA, torch.float32)
    skeletons = [chunk_skeleton(s) for s in skeletons_of(model.blocks)]
    for pages in (PagePlan(3, 4), PagePlan(2, 1, 1, 1), PagePlan(2, 0)):
        with pytest.raises(InputError, match="pages"):
            check_plan(plan_of(model, (8,), 8, pages), skeletons)
    window = decoder(replace(LLAMA, family=Family.mistral, sliding_window=7), torch.float32)
    with pytest.raises(InputError, match="sliding_window=7"):
        apply_chunks(window.blocks, plan_of(window, (8,), 8, PAGES), norm=window.norm)


@pytest.mark.parametrize("lengths", [(8, 8, SEQ_LEN - 16), (8, 4, SEQ_LEN - 12)])
def test_rows_whose_documents_share_a_prompt_are_refused(lengths: tuple[int, ...]) -> None:
    """Also where a chunk holds tokens of one response only: an earlier response lies between it and the prompt."""
    model = decoder(LLAMA, torch.float32)
    tokens = torch.zeros(1, SEQ_LEN, dtype=torch.int64)
    batch = TokenBatch(tokens, tokens, Packing.of_lengths(lengths, parents=(None, 0, 0)))
    with pytest.raises(InputError, match="share a prompt; choose memory=chunk_host"):
        run(model, plan_of(model, (8,), 8, PAGES), batch)


def test_means_of_rows_of_another_length_are_not_counted_twice() -> None:
    model, meter = decoder(LLAMA, torch.float32), DeviceMeter()
    plan = plan_of(model, (8,), 8, PAGES)
    handle = apply_chunks(model.blocks, plan, meter=meter, norm=model.norm)
    sweep, resident = ByChunk(model, handle, meter, loss_tile=16, itemsize=4), []
    for _ in range(2):
        for length in (SEQ_LEN, 16):
            tokens = torch.zeros(1, length, dtype=torch.int64)
            batch = TokenBatch(tokens, tokens, Packing.of_lengths([length]))
            sweep.forward_backward(batch, 1.0, step=len(resident), micro_batch=0)
            resident.append(meter.resident_bytes)
    sweep.close()
    assert resident[:2] == resident[2:]
    assert meter.resident_bytes == 0


Mutant = Callable[[pytest.MonkeyPatch], None]


def _chosen_anew(patch: pytest.MonkeyPatch) -> None:
    """Stage 2 chooses again, from other queries."""
    spec = SparseKeys.spec

    def anew(self: SparseKeys, layer: int, q: torch.Tensor, plain: Any) -> Any:
        name = layer, self.chunk.span[0]
        if name in self.chosen:
            del self.chosen[name]
            self._split.pop(layer, None)
            return spec(self, layer, -q, plain)
        return spec(self, layer, q, plain)

    patch.setattr(SparseKeys, "spec", anew)


def _gradient_dropped(patch: pytest.MonkeyPatch) -> None:
    """The first page of a gathered block gets no gradient."""
    add = SparseKeys.add

    def without(self: SparseKeys, layer: int, index: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        if index < self._own_blocks()[0]:
            dk[:, :2] = 0
            dv[:, :2] = 0
        add(self, layer, index, dk, dv)

    patch.setattr(SparseKeys, "add", without)


def _of_another_document(patch: pytest.MonkeyPatch) -> None:
    """Pages may lie before the document."""
    readers = SparseKeys._readers
    patch.setattr(
        SparseKeys,
        "_readers",
        lambda *args: [None if found is None else replace(found, first_key=0) for found in readers(*args)],
    )


def _pages_swapped(patch: pytest.MonkeyPatch) -> None:
    """Gradients go to another page than keys and values came from."""
    read = SparseKeys._read

    def add(self: SparseKeys, layer: int, index: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(SparseKeys, "_read", lambda self, layer, index: _rolled(read(self, layer, index)))
            ADD(self, layer, index, dk, dv)

    patch.setattr(SparseKeys, "add", add)


ADD = SparseKeys.add


def _rolled(found: list[tuple[int, int, tuple[int, int]]]) -> list[tuple[int, int, tuple[int, int]]]:
    of_row = [entry for entry in found if entry[0] == 0]
    places = [place for _, _, place in of_row]
    rolled = [(row, at, place) for (row, at, _), place in zip(of_row, places[1:] + places[:1], strict=True)]
    return rolled + found[len(of_row) :]


@pytest.mark.parametrize("mutant", [_chosen_anew, _gradient_dropped, _of_another_document, _pages_swapped])
def test_mutants_fail(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = decoder(LLAMA, torch.float64), batch_of(packed=True)
    plan = plan_of(model, (8,), 8, PAGES)
    chosen = run(model, plan, batch).chosen
    wanted = masked_gradients(model, plan, batch, chosen)
    mutant(monkeypatch)
    assert error(run(model, plan, batch).results, wanted) > 1e-3
