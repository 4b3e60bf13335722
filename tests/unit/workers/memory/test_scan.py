"""Mixers that scan, under both sweeps: the gradients of the plain recurrence, equal bits everywhere, mutants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from headrace.helpers.linear_attention import LINEAR_ATTENTION
from headrace.helpers.live_bytes import LiveBytes
from headrace.helpers.metered_step import live_and_metered
from headrace.helpers.scans import (
    BY_LAYER,
    MODEL,
    MODELS,
    PLACES,
    SEQ_LEN,
    TILE,
    batch_of,
    by_chunk,
    by_layer,
    decoder,
    equal,
    error,
    gradients,
    oracle,
)
from headrace.helpers.tiers import FakeTier, open_fake_stack
from headrace.kernels.api import Packing
from headrace.storage.core.records import Direction, Medium
from headrace.storage.stack import TierStack
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.chunk_plan import KvShape, kv_bytes, state_bytes
from headrace.workers.memory.chunk_states import ChunkStates
from headrace.workers.memory.footprint import footprint
from headrace.workers.memory.kv_blocks import KvBlocks
from headrace.workers.memory.layer_sweep import BlockCall, PlannedBlock
from headrace.workers.memory.plan import Cuts, MemoryPlan, check_plan
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.memory.schedule import Schedule, moved_bytes
from headrace.workers.memory.shelf import Shelf
from headrace.workers.memory.sweeps import apply_plan, open_sweep
from headrace.workers.model import scan
from headrace.workers.model.config import ATTENTION, AdapterConfig, AdapterKind
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.program import Shared
from headrace.workers.model.scan import ScanRule, pieces


@pytest.fixture
def stack() -> Iterator[TierStack]:
    tiers = [FakeTier(1 << 22, medium=medium) for medium in (Medium.host, Medium.ssd)]
    with contextlib.closing(open_fake_stack(tiers)) as opened:
        yield opened


@pytest.mark.parametrize(("name", "packed"), [("scans", False), ("hybrid", True), ("ends with attention", True)])
def test_gradients_are_those_of_the_recurrence(name: str, packed: bool, stack: TierStack) -> None:
    """Both sweeps on two rows: ragged chunks, documents, what differs most in residence."""
    check_gradients(decoder(name), [batch_of(packed=packed)], ("recompute", "front"), ((5, 9),), ("mixed",), stack)


@pytest.mark.soak
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_under_every_plan(name: str, packed: bool, stack: TierStack) -> None:
    """The same under every residence, with two micro-batches."""
    batches = [batch_of(packed=packed, seed=seed) for seed in range(2)]
    check_gradients(decoder(name), batches, BY_LAYER[1:], ((8,), (5, 9), (SEQ_LEN,)), tuple(PLACES), stack)


def check_gradients(
    model: Decoder,
    batches: list[TokenBatch],
    plans: tuple[str, ...],
    all_chunks: tuple[tuple[int, ...], ...],
    places: tuple[str, ...],
    stack: TierStack,
) -> None:
    """What is kept has the oracle's gradients; what is not has the same bits on the same cuts."""
    wanted = oracle(model, batches)
    kept = gradients(model, by_layer(model, "keep"), batches)
    assert error(kept, wanted) <= 1e-12
    for plan in (by_layer(model, kind) for kind in plans):
        check_plan(plan, skeletons_of(model.blocks))
        assert equal(gradients(model, plan, batches, stack), kept), plan.name
    for chunks in all_chunks:
        kept = gradients(model, by_chunk(model, chunks=chunks), batches)
        assert error(kept, wanted) <= 1e-12
        for place in places:
            plan = by_chunk(model, place, chunks, again=True)
            assert equal(gradients(model, plan, batches, stack), kept), (chunks, place)
    assert all(tier.used_bytes == 0 for tier in stack.stats().values())


def test_the_state_of_bf16_is_fp32(stack: TierStack) -> None:
    model, batches = decoder("hybrid", torch.bfloat16), [batch_of(packed=True)]
    kept = gradients(model, by_layer(model, "keep"), batches)
    assert equal(gradients(model, by_layer(model, "front"), batches, stack), kept)
    kept = gradients(model, by_chunk(model), batches)
    assert equal(gradients(model, by_chunk(model, "mixed", again=True), batches, stack), kept)


def test_adapters_on_a_mixer() -> None:
    adapter = AdapterConfig(kind=AdapterKind.lora, rank=2, targets="q_proj,o_proj")
    model, batches = Decoder(MODEL, dtype=torch.float64, adapter=adapter), [batch_of()]
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    wanted = oracle(model, batches)
    for plan in (by_layer(model, "recompute"), by_chunk(model)):
        assert error(gradients(model, plan, batches), wanted) <= 1e-12


def test_head_groups_leave_layers_that_scan_as_they_are(stack: TierStack) -> None:
    """The attention between them runs in two groups."""
    model, batches = Decoder(replace(MODEL, num_kv_heads=2), dtype=torch.float64), [batch_of(packed=True)]
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    skeletons, cuts = skeletons_of(model.blocks), Cuts(TILE, head_groups=2)
    assert [a is b for a, b in zip(skeletons, cuts.skeletons(skeletons), strict=True)] == [True, False, True]
    found = gradients(model, preset_plan("offload_ssd", skeletons, cuts=cuts), batches, stack)
    assert error(found, oracle(model, batches)) <= 1e-12
    assert equal(found, gradients(model, preset_plan("keep", skeletons, cuts=cuts), batches))


def test_the_presets_run_and_evaluation_is_the_loss_of_whole_rows(stack: TierStack) -> None:
    model, batch = decoder("hybrid"), batch_of(packed=True)
    wanted = oracle(model, [batch])
    for preset in ("recompute", "memo", "ssdtrain", "chunk_ssd"):
        choices = Choices(seq_len=SEQ_LEN, chunk_size=12, host_fraction=0.5)
        plan = preset_plan(preset, skeletons_of(model.blocks), cuts=Cuts(TILE), choices=choices)
        assert MemoryPlan.from_dict(plan.to_dict()) == plan
        assert error(gradients(model, plan, [batch], stack), wanted) <= 1e-12
        handle = apply_plan(model, plan, stack, meter=None, bucket_plans=None)
        sweep = open_sweep(model, handle, None, loss_tile=16, itemsize=8)
        torch.testing.assert_close(sweep.evaluate(batch), wanted[0], rtol=1e-13, atol=0)
        sweep.close()


@pytest.mark.parametrize("kind", BY_LAYER)
def test_bytes_moved_by_layer_are_the_formulas(kind: str, make_scripted_stack: Callable[[], Any]) -> None:
    model, stack = decoder("hybrid", torch.float32), make_scripted_stack()
    plan = by_layer(model, kind)
    gradients(model, plan, [batch_of()], stack)
    for direction in Direction:
        sizes = {"batch_size": 2, "num_tokens": SEQ_LEN, "itemsize": 4, "direction": direction}
        for medium, wanted in moved_bytes(plan, skeletons_of(model.blocks), **sizes).items():
            assert stack.moved[direction.value, medium] == wanted


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunks", [(8,), (5, 9)])
def test_bytes_by_chunk_are_the_formulas(
    name: str, chunks: tuple[int, ...], stack: TierStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    allocate = KvBlocks._allocate

    def allocated(self: KvBlocks, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = allocate(self, shape)
        made.append(tensor.nbytes * (self._name == "state"))
        return tensor

    monkeypatch.setattr(KvBlocks, "_allocate", allocated)
    model, config = decoder(name, torch.float32), MODELS[name]
    plan = by_chunk(model, "mixed", chunks)
    gradients(model, plan, [batch_of()], stack)
    kinds = [config.mixer_of(layer) for layer in range(config.num_layers)]
    num_attention = kinds.count(ATTENTION)
    width = config.num_kv_heads * config.head_size
    shape = KvShape(num_attention, 2, SEQ_LEN, width, 4, is_last_layer=kinds[-1] == ATTENTION)
    of_state = 2 * 4 * config.num_heads * config.head_size**2
    states = state_bytes(len(kinds) - num_attention, of_state, SEQ_LEN, plan.cuts, plan.kv)
    wanted = kv_bytes(shape, plan.cuts, plan.kv, plan.kv_grads).plus(states)
    for medium, found in stack.stats().items():
        assert (found.stored_bytes, found.loaded_bytes) == (wanted.stored[medium], wanted.loaded[medium])
    # Of every layer a gradient is on the device beside the states.
    assert sum(made) == states.resident + states.buffers - (len(kinds) - num_attention) * of_state


@pytest.mark.parametrize("kind", BY_LAYER)
def test_the_footprint_of_one_block_is_live(kind: str, make_scripted_stack: Callable[[], Any]) -> None:
    model = Decoder(replace(WIDE, num_layers=1))
    model.init_weights(0)
    block, shelf = model.blocks[0], Shelf(make_scripted_stack(), 1, None)
    program, schedule = block.program, Schedule(block.program.skeleton)
    plan, cuts = by_layer(model, kind, tile=16).layers[0], Cuts(16)
    shelf.begin(0, 0)
    sizes = {"program": program, "schedule": schedule, "plan": plan, "cuts": cuts, "shelf": shelf}
    call = BlockCall(PlannedBlock(block=block, layer=0, **sizes), Shared())
    with LiveBytes(block.parameters()) as live, torch.no_grad():
        x = torch.randn(1, 96, WIDE.hidden_size)
        y = call.forward(x)
        forward = live.peak
        del x, y
        live.peak = live.now
        grads = call.backward(torch.randn(1, 96, WIDE.hidden_size), program.params)
    found = footprint(schedule, plan, cuts, batch_size=1, num_tokens=96, itemsize=4, casts_products=True)
    assert found.forward == pytest.approx(forward, rel=0.01)
    # The mixer counts its own workspace by token, and has more of it in short tiles.
    assert found.backward == pytest.approx(live.peak, rel=0.02)
    del grads


WIDE = replace(
    MODEL, num_layers=2, vocab_size=300, hidden_size=64, num_heads=4, intermediate_size=160, mixers=[LINEAR_ATTENTION]
)


MORE = [pytest.param(name, marks=pytest.mark.soak) for name in ("keep", "recompute", "host", "ssd", "chunk hbm")]


@pytest.mark.parametrize("plan", ["front", "chunk ssd", *MORE])
def test_the_meter_counts_all_live_tensors(plan: str, stack: TierStack) -> None:
    model = Decoder(WIDE)
    sweep_name, _, place = plan.partition(" ")
    made = by_chunk(model, place, (64,)) if place else by_layer(model, sweep_name, 64)
    made = replace(made, cuts=replace(made.cuts, token_tile=64, kv_block=64 if place else None))
    live, metered = live_and_metered(model, made, 320, stack, loss_tile=64)
    assert metered == pytest.approx(live, rel=0.01)


def test_pieces_are_cut_where_documents_start() -> None:
    every, first, second = slice(None), slice(0, 1), slice(1, 2)
    assert pieces(None, 2, (0, 4)) == [(every, (0, 4), True)]
    assert pieces(None, 2, (4, 8)) == [(every, (4, 8), False)]
    packing = Packing.of_lengths([3, 7, 4, 6])
    assert pieces(packing, 2, (0, 3)) == [(every, (0, 3), True)]
    assert pieces(packing, 2, (2, 5)) == [
        (first, (2, 3), False),
        (first, (3, 5), True),
        (second, (2, 4), False),
        (second, (4, 5), True),
    ]


def _no_cotangent(patch: pytest.MonkeyPatch) -> None:
    """Chunks forget what later ones want of their state."""
    patch.setattr(ChunkStates, "gradient", lambda self, spec, layer: None)


def _no_cotangent_of_tiles(patch: pytest.MonkeyPatch) -> None:
    """Tiles forget what later ones want of their state."""
    back = ScanRule.backward
    patch.setattr(
        ScanRule, "backward", lambda self, *args: {**(found := back(self, *args)), "state": 0 * found["state"]}
    )


def _one_document(patch: pytest.MonkeyPatch) -> None:
    """The state goes on from document to document."""
    right = pieces
    patch.setattr(scan, "pieces", lambda packing, batch_size, span: right(None, batch_size, span))


def _old_state(patch: pytest.MonkeyPatch) -> None:
    """A chunk of stage 2 starts from the state of the chunk before."""
    right = ChunkStates.before

    def before(self: ChunkStates, spec: Any, layer: int, zero: torch.Tensor) -> torch.Tensor:
        found = right(self, spec, layer, zero)
        return found if self._number < 2 else self._kinds[spec].blocks.get((layer, self._number - 2))[0]

    patch.setattr(ChunkStates, "before", before)


def _zero_state(patch: pytest.MonkeyPatch) -> None:
    """Every chunk starts from zero."""
    patch.setattr(ChunkStates, "before", lambda self, spec, layer, zero: (BEFORE(self, spec, layer, zero), zero)[1])


BEFORE = ChunkStates.before


@pytest.mark.parametrize(
    ("mutant", "plans"),
    [
        (_no_cotangent, ("chunk",)),
        (_no_cotangent_of_tiles, ("keep", "chunk")),
        (_one_document, ("keep", "chunk")),
        (_old_state, ("chunk",)),
        (_zero_state, ("chunk",)),
    ],
)
def test_mutants_fail(
    mutant: Callable[[pytest.MonkeyPatch], None], plans: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = decoder("hybrid"), [batch_of(1, packed=True)]
    wanted = oracle(model, batches)
    mutant(monkeypatch)
    for kind in plans:
        plan = by_chunk(model) if kind == "chunk" else by_layer(model, kind)
        assert error(gradients(model, plan, batches), wanted) > 1e-3, kind
