"""The sweep by chunk: the gradients of autograd over whole rows, equal bits for every residence, mutants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.helpers.fake_pages import PAGE, FakePages
from headrace.helpers.metered_step import live_and_metered
from headrace.helpers.tiers import FakeTier, open_fake_stack
from headrace.helpers.tiny_models import LLAMA, MODELS
from headrace.kernels.api import Packing
from headrace.storage.core.records import Medium
from headrace.storage.device_pages import PagePool
from headrace.storage.stack import TierStack
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory import chunk_keys, chunk_sweep
from headrace.workers.memory.chunk_keys import ChunkKeys
from headrace.workers.memory.chunk_plan import KvShape, pass_bytes
from headrace.workers.memory.chunk_sweep import ByChunk, apply_chunks
from headrace.workers.memory.kv_blocks import KvBlocks
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, Stretch, Sweep, keep_layer
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.skeleton import chunk_skeleton

SEQ_LEN = 29
RECOMPUTED = (Stretch(0, None, Residence.recompute),)


def decoder(name: str, dtype: torch.dtype) -> Decoder:
    """q and k weights are large, so that attention is not uniform."""
    model = Decoder(MODELS[name], dtype=dtype)
    torch.manual_seed(0)
    for key, param in model.named_parameters():
        torch.nn.init.normal_(param, std=1.2 if "q_proj" in key or "k_proj" in key else 0.3)
    return model


def batch_of(batch_size: int, packed: bool, seed: int = 0) -> TokenBatch:
    """Random tokens; every seventh target does not count. Packed: a prompt with two responses, and a document alone."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (batch_size, SEQ_LEN), generator=draw)
    targets = tokens.roll(-1, 1)
    targets[:, ::7] = -100
    packing = shared(batch_size, 9, (4, 6), SEQ_LEN - 19) if packed else Packing.of_lengths([SEQ_LEN] * batch_size)
    return TokenBatch(tokens, targets, packing)


def shared(batch_size: int, prompt: int, responses: tuple[int, ...], alone: int = 0) -> Packing:
    """Rows of a prompt, its responses and a document alone."""
    row = [prompt, *responses, *([alone] if alone else [])]
    starts = [number * len(row) for number in range(batch_size)]
    parents = [start if 1 <= n <= len(responses) else None for start in starts for n in range(len(row))]
    return Packing.of_lengths(row * batch_size, parents=parents)


def chunk_plan(model: Decoder, chunks: tuple[int, ...], kv_block: int, **fields: Any) -> MemoryPlan:
    layers = tuple(keep_layer(chunk_skeleton(s)) for s in skeletons_of(model.blocks))
    hbm = (Stretch(0, None, Residence.hbm),)
    plan = MemoryPlan("chunk", layers, sweep=Sweep.by_chunk, cuts=Cuts(4, None, chunks, kv_block), kv=hbm, kv_grads=hbm)
    return replace(plan, **fields)


def gradients(model: Decoder, plan: MemoryPlan, batches: list[TokenBatch], stack: Any = None) -> list[torch.Tensor]:
    model.zero_grad()
    handle = apply_chunks(model.blocks, plan, stack, norm=model.norm)
    sweep = ByChunk(model, handle, None, loss_tile=16, itemsize=4)
    divisor = sum(batch.num_targets for batch in batches)
    try:
        losses = [
            sweep.forward_backward(batch, divisor, step=0, micro_batch=number) for number, batch in enumerate(batches)
        ]
    finally:
        sweep.close()
    return [*losses, *(param.grad.clone() for param in model.parameters())]


def test_every_chunk_of_both_stages_is_told() -> None:
    model, told = decoder("llama", torch.float32), []
    handle = apply_chunks(model.blocks, chunk_plan(model, (12,), 12), None, norm=model.norm)
    sweep = ByChunk(model, handle, None, loss_tile=16, itemsize=4, on_chunk=lambda *part: told.append(part))
    sweep.forward_backward(batch_of(1, packed=False), 1.0, step=0, micro_batch=0)
    assert told == [(1, 1, 2), (1, 2, 2), (2, 1, 3), (2, 2, 3), (2, 3, 3)]
    told.clear()
    sweep.evaluate(batch_of(1, packed=False))
    assert told == [(1, 1, 3), (1, 2, 3), (1, 3, 3)]


def by_autograd(model: Decoder, batches: list[TokenBatch]) -> list[torch.Tensor]:
    model.zero_grad()
    divisor = sum(batch.num_targets for batch in batches)
    losses = []
    for batch in batches:
        loss = model(batch.tokens, batch.targets, packing=batch.packing, loss_tile=16)
        (loss / divisor).backward()
        losses.append(loss.detach().double())
    return [*losses, *(param.grad.clone() for param in model.parameters())]


def error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "packed", "chunks", "kv_block"),
    [
        *((name, True, (5,), 8) for name in MODELS),
        *(pytest.param(name, False, (5,), 8, marks=pytest.mark.soak) for name in MODELS),
        ("llama", False, (8,), 8),
        ("mistral", True, (3, 6, 9), 6),
        ("qwen3", False, (40,), 7),
    ],
)
def test_gradients_are_those_of_whole_rows(name: str, packed: bool, chunks: tuple[int, ...], kv_block: int) -> None:
    model = decoder(name, torch.float64)
    batches = [batch_of(2, packed, seed) for seed in range(2)]
    found = gradients(model, chunk_plan(model, chunks, kv_block), batches)
    assert error(found, by_autograd(model, batches)) <= 1e-13


@st.composite
def places(draw: st.DrawFn, kv_block: int) -> tuple[Stretch, ...]:
    """Of KV blocks: the oldest in HBM, later ones on the host, the newest on the SSD; each may be absent."""
    num_blocks = -(-SEQ_LEN // kv_block)
    ends = sorted(draw(st.lists(st.integers(0, num_blocks), min_size=2, max_size=2)))
    rows, begin = [], 0
    for end, residence in zip((*ends, num_blocks), (Residence.hbm, Residence.host, Residence.ssd), strict=True):
        if end * kv_block > begin:
            rows.append(Stretch(begin, end * kv_block, residence))
            begin = end * kv_block
    return (*rows[:-1], replace(rows[-1], end=None))


@pytest.fixture
def stack() -> Iterator[TierStack]:
    tiers = [FakeTier(1 << 20, medium=medium) for medium in (Medium.host, Medium.ssd)]
    with contextlib.closing(open_fake_stack(tiers)) as opened:
        yield opened


RANDOM = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
@given(data=st.data())
@settings(max_examples=3, **RANDOM)
def test_residence_never_changes_a_bit(name: str, stack: TierStack, data: st.DataObject) -> None:
    check_residence(name, stack, data, least_chunk=5)


@pytest.mark.soak
@pytest.mark.parametrize("name", MODELS)
@given(data=st.data())
@settings(max_examples=50, **RANDOM)
def test_residence_never_changes_a_bit_in_50_plans(name: str, stack: TierStack, data: st.DataObject) -> None:
    check_residence(name, stack, data, least_chunk=1)


def check_residence(name: str, stack: TierStack, data: st.DataObject, *, least_chunk: int) -> None:
    """Random places of KV blocks, of their gradients and of the chunk's tensors: the bits of the twin in HBM."""
    model = decoder(name, torch.float32)
    kv_block = data.draw(st.sampled_from([4, 8, 12]))
    chunks = tuple(data.draw(st.lists(st.integers(least_chunk, 12), min_size=1, max_size=3)))
    residence = st.sampled_from([Residence.hbm, Residence.host, Residence.ssd, Residence.recompute])
    held = residence.filter(lambda place: place is not Residence.recompute)
    rows = []
    for skeleton in skeletons_of(model.blocks):
        names = chunk_skeleton(skeleton).skeletal
        rows.append(LayerPlan.of(**{n: data.draw(residence) for n in names if n != "x"}, x=data.draw(held)))
    fields = {"kv": data.draw(places(kv_block)), "kv_grads": data.draw(places(kv_block)), "layers": tuple(rows)}
    plan = chunk_plan(model, chunks, kv_block, **fields)
    batches = [batch_of(data.draw(st.integers(1, 2)), data.draw(st.booleans()), seed) for seed in range(2)]
    twin = plan.keep_twin([chunk_skeleton(s) for s in skeletons_of(model.blocks)])
    found, wanted = gradients(model, plan, batches, stack), gradients(model, twin, batches)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(tier.used_bytes == 0 for tier in stack.stats().values())


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.soak), "mistral"])
def test_pages_that_are_mapped_as_the_row_grows_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, driver = decoder(name, torch.float32), FakePages(500)
    plan, batches = chunk_plan(model, (5,), 8), [batch_of(2, packed=True), batch_of(1, packed=False)]
    wanted = gradients(model, plan, batches)
    monkeypatch.setattr(chunk_keys, "open_pages", lambda *_: (PagePool(driver, 32 * PAGE), "pages"))
    found = gradients(model, plan, batches)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert driver.num_maps > 0
    assert driver.num_left == 500


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(("chunks", "kv_block"), [((8,), 8), ((5,), 8), ((3,), 12), ((10, 4), 4)])
@pytest.mark.parametrize(("query_tile", "num_again"), [(None, 0), (3, 0), (None, 2), (2, 1)])
def test_bytes_moved_are_the_formulas(
    name: str, chunks: tuple[int, ...], kv_block: int, query_tile: int | None, num_again: int, stack: TierStack
) -> None:
    """Also where queries come in tiles, and where backward runs attention of some layers, or a part of it, again."""
    model = decoder(name, torch.float32)
    kv = (Stretch(0, kv_block, Residence.hbm), Stretch(kv_block, None, Residence.host))
    grads = (Stretch(0, kv_block, Residence.host), Stretch(kv_block, None, Residence.ssd))
    plan = chunk_plan(model, chunks, kv_block, kv=kv, kv_grads=grads)
    front = (Stretch(0, 4, Residence.recompute), Stretch(4, None, Residence.hbm)) if query_tile else RECOMPUTED
    less = LayerPlan({**plan.layers[0].stretches, "out": front, "lse": front})
    layers = (*plan.layers[num_again:], *(less,) * num_again)
    plan = replace(plan, layers=layers, cuts=replace(plan.cuts, query_tile=query_tile))
    gradients(model, plan, [batch_of(2, packed=False)], stack)
    config = model.config
    shape = KvShape(config.num_layers, 2, SEQ_LEN, config.num_kv_heads * config.head_size, 4, config.sliding_window)
    wanted = pass_bytes(plan, skeletons_of(model.blocks), shape)
    for medium, found in stack.stats().items():
        assert (found.stored_bytes, found.loaded_bytes) == (wanted.stored[medium], wanted.loaded[medium])


def test_attention_that_runs_again_in_backward_loads_nothing_for_a_layer_that_is_done(stack: TierStack) -> None:
    model = decoder("llama", torch.float32)
    plan = chunk_plan(model, (5,), 5, kv=(Stretch(0, None, Residence.host),))
    plan = replace(plan, layers=(LayerPlan.of(x=Residence.hbm),) * model.config.num_layers)
    handle = apply_chunks(model.blocks, plan, stack, norm=model.norm)
    idle: list[int] = []

    def look(*_: int) -> None:
        blocks = handle.parts.keys.kv._blocks.values()
        idle.append(sum(block.tensor is not None and not (block.is_open or block.is_leaving) for block in blocks))

    sweep = ByChunk(model, handle, None, loss_tile=16, itemsize=4, on_chunk=look)
    sweep.forward_backward(batch_of(1, packed=False), 1.0, step=0, micro_batch=0)
    sweep.close()
    assert idle == [0] * 11


def test_evaluation_is_the_loss_of_whole_rows(stack: TierStack) -> None:
    model, batch = decoder("qwen2", torch.float64), batch_of(2, packed=True)
    away = (Stretch(0, None, Residence.ssd),)
    handle = apply_chunks(model.blocks, chunk_plan(model, (5,), 8, kv=away), stack, norm=model.norm)
    sweep = ByChunk(model, handle, None, loss_tile=16, itemsize=8)
    found = sweep.evaluate(batch)
    sweep.close()
    with torch.no_grad():
        wanted = model(batch.tokens, batch.targets, packing=batch.packing)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("first", "num_stored"), [(0, 3), (16, 1), (24, 0)])
def test_evaluation_stores_no_key_that_nothing_reads_again(first: int, num_stored: int, stack: TierStack) -> None:
    """Of four KV blocks the last chunk completes the last one: a plan with that one on a tier needs no room there."""
    model, away = decoder("llama", torch.float32), (Stretch(first, None, Residence.ssd),)
    kv = (Stretch(0, first, Residence.hbm), *away) if first else away
    handle = apply_chunks(model.blocks, chunk_plan(model, (5,), 8, kv=kv), stack, norm=model.norm)
    sweep = ByChunk(model, handle, None, loss_tile=16, itemsize=4)
    for _ in range(2):
        sweep.evaluate(batch_of(2, packed=False))
    sweep.close()
    ssd, config = stack.stats()[Medium.ssd], model.config
    of_block = 2 * 2 * 8 * config.num_kv_heads * config.head_size * 4 * config.num_layers
    assert (ssd.stored_bytes, ssd.used_bytes) == (2 * num_stored * of_block, 0)


def test_a_shared_prompt_is_run_and_stored_once(stack: TierStack) -> None:
    """Against a row for every response; the sums of the losses are equal."""
    model, prompt, responses = decoder("llama", torch.float64), 17, (4, 3, 5)
    row = batch_of(1, packed=False)
    row = TokenBatch(row.tokens, row.targets, shared(1, prompt, responses))
    row.targets[:, :prompt] = -100
    begins = [prompt + sum(responses[:number]) for number in range(len(responses))]
    alone = []
    for begin, length in zip(begins, responses, strict=True):
        tokens, targets = (
            torch.cat([part[:, :prompt], part[:, begin : begin + length]], 1) for part in (row.tokens, row.targets)
        )
        alone.append(TokenBatch(tokens, targets, Packing.of_lengths([prompt + length])))
    plan = chunk_plan(model, (4,), 4, kv=(Stretch(0, None, Residence.host),))
    passed: list[int] = []

    def count(block: Any, inputs: Any) -> None:
        if torch.is_grad_enabled():
            passed.append(inputs[0].shape[1])

    found = []
    with model.blocks[0].register_forward_pre_hook(count):
        for batches in ([row], alone):
            before = stack.stats()[Medium.host].stored_bytes
            losses = gradients(model, plan, batches, stack)[: len(batches)]
            found.append((sum(passed), stack.stats()[Medium.host].stored_bytes - before, sum(losses)))
            passed.clear()
    (tokens, stored, loss), (tokens_alone, stored_alone, loss_alone) = found
    assert (tokens, tokens_alone) == (prompt + sum(responses), len(responses) * prompt + sum(responses))
    torch.testing.assert_close(loss, loss_alone, rtol=1e-14, atol=0)
    # Two heads of four elements, keys and values, three layers; of a row all full blocks before the last chunk.
    of_block = 2 * 2 * 4 * 8 * 4 * 3
    assert (stored, stored_alone) == (7 * of_block, (5 + 4 + 5) * of_block)


SMALL = replace(LLAMA, vocab_size=512, hidden_size=64, num_layers=4, num_heads=8, intermediate_size=160)


def peaks(num_tokens: int, chunk: int, kv_block: int, place: Residence, stack: TierStack) -> tuple[int, int]:
    """Live and metered, of a step."""
    model, where = Decoder(SMALL), (Stretch(0, None, place),)
    cuts = Cuts(64, None, (chunk,), kv_block)
    plan = replace(chunk_plan(model, (chunk,), kv_block, kv=where, kv_grads=where), cuts=cuts)
    return live_and_metered(model, plan, num_tokens, stack, loss_tile=64)


@pytest.mark.parametrize(
    ("place", "chunk", "kv_block"),
    [
        (Residence.hbm, 128, 128),
        pytest.param(Residence.host, 128, 128, marks=pytest.mark.soak),
        (Residence.ssd, 128, 256),
        (Residence.host, 192, 128),
    ],
)
def test_the_meter_counts_all_live_tensors(place: Residence, chunk: int, kv_block: int, stack: TierStack) -> None:
    live, metered = peaks(640, chunk, kv_block, place, stack)
    assert metered == pytest.approx(live, rel=0.03)


def test_device_bytes_do_not_grow_with_the_row(stack: TierStack) -> None:
    shorter, longer = (peaks(n, 64, 64, Residence.ssd, stack)[0] for n in (256, 512))
    assert shorter == longer


Mutant = Callable[[pytest.MonkeyPatch], None]


def _dropped(patch: pytest.MonkeyPatch) -> None:
    """Chunks forget the gradients of the keys of earlier ones."""
    add = ChunkKeys.add

    def only_own(self: ChunkKeys, layer: int, index: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        begin = self.chunk.span[0] - index * self.block_len
        for part in (dk, dv):
            part[:, : max(0, begin)] = 0
        add(self, layer, index, dk, dv)

    patch.setattr(ChunkKeys, "add", only_own)


def _twice(patch: pytest.MonkeyPatch) -> None:
    """What a later chunk adds counts twice."""
    add = ChunkKeys.add

    def double(self: ChunkKeys, layer: int, index: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        add(self, layer, index, dk, dv)
        if self.chunk.span[1] == SEQ_LEN:
            add(self, layer, index, dk, dv)

    patch.setattr(ChunkKeys, "add", double)


def _forward_order(patch: pytest.MonkeyPatch) -> None:
    """Stage 2 goes through the chunks in the order of stage 1."""
    patch.setattr(chunk_sweep, "reversed", lambda chunks: sorted(chunks), raising=False)
    patch.setattr(ChunkKeys, "take_gradients", _take_and_keep)


def _take_and_keep(self: ChunkKeys, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    begin, end = self.chunk.span
    blocks = [self.grads.get((layer, i)) for i in range(begin // self.block_len, -(-end // self.block_len))]
    whole = torch.cat(blocks, dim=2)[:, :, begin % self.block_len :][:, :, : end - begin].to(dtype, copy=True)
    return whole[0], whole[1]


def _mean_of_chunks(patch: pytest.MonkeyPatch) -> None:
    """Every chunk's loss is divided by its own targets."""
    forward = ByChunk._forward

    def mean(self: ByChunk, batch: TokenBatch, span: tuple[int, int], **flags: bool) -> torch.Tensor:
        own = int((batch.targets[:, slice(*span)] != -100).sum())
        return forward(self, batch, span, **flags) * (batch.num_targets / max(1, own) / 4)

    patch.setattr(ByChunk, "_forward", mean)


def _stale_keys(patch: pytest.MonkeyPatch) -> None:
    """A block that has been loaded is taken for the next one, too."""
    patch.setattr(KvBlocks, "get", _first_block)


def _first_block(self: KvBlocks, place: tuple[int, int], *, to_change: bool = False) -> torch.Tensor:
    block = GET(self, place, to_change=to_change)
    return GET(self, (place[0], 0)) if place[1] == 1 and not to_change and (place[0], 0) in self else block


GET = KvBlocks.get


@pytest.mark.parametrize("mutant", [_dropped, _twice, _forward_order, _mean_of_chunks, _stale_keys])
def test_mutants_fail(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = decoder("llama", torch.float64), [batch_of(1, packed=False)]
    wanted = by_autograd(model, batches)
    mutant(monkeypatch)
    found = gradients(model, chunk_plan(model, (8,), 8), batches)
    assert error(found, wanted) > 1e-3
