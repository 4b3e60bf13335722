"""Mixers that scan, under both sweeps: the gradients of the plain recurrence, equal bits everywhere, mutants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.helpers import scanning
from headrace.helpers.linear_attention import BY_AUTOGRAD, LINEAR_ATTENTION
from headrace.helpers.live_bytes import LiveBytes
from headrace.helpers.tiers import FakeTier, open_fake_stack
from headrace.kernels.api import Packing
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Direction, Medium
from headrace.storage.stack import TierStack
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.chunk_plan import KvShape, kv_bytes, state_bytes
from headrace.workers.memory.chunk_states import ChunkStates
from headrace.workers.memory.footprint import footprint
from headrace.workers.memory.kv_blocks import KvBlocks
from headrace.workers.memory.layer_sweep import BlockCall, PlannedBlock
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import (
    Cuts,
    LayerPlan,
    MemoryPlan,
    Residence,
    Stretch,
    Sweep,
    check_plan,
    input_layer,
    keep_layer,
)
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.memory.schedule import Schedule, moved_bytes
from headrace.workers.memory.shelf import Shelf
from headrace.workers.memory.sweeps import apply_plan, open_sweep
from headrace.workers.model import scan, skeleton
from headrace.workers.model.config import ATTENTION, AdapterConfig, AdapterKind, Family, ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.generation import SamplingConfig, generate
from headrace.workers.model.hf_config import config_to_hf
from headrace.workers.model.mixers.registry import mixer_named, register
from headrace.workers.model.program import Shared
from headrace.workers.model.scan import ScanRule, pieces
from headrace.workers.model.skeleton import Reach, chunk_skeleton

MODEL = ModelConfig(
    name="scan",
    family=Family.llama,
    vocab_size=50,
    hidden_size=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=24,
    mixers=[LINEAR_ATTENTION, ATTENTION],
)
MODELS = {
    "scans": replace(MODEL, num_layers=2, mixers=[LINEAR_ATTENTION, BY_AUTOGRAD]),
    "hybrid": MODEL,
    "ends with attention": replace(MODEL, num_layers=2),
}
SEQ_LEN, TILE = 29, 4


def decoder(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(MODELS[name], dtype=dtype)
    torch.manual_seed(0)
    for key, param in model.named_parameters():
        torch.nn.init.normal_(param, std=1.2 if "q_proj" in key or "k_proj" in key else 0.3)
    return model


def batch_of(batch_size: int = 2, *, packed: bool = False, seed: int = 0) -> TokenBatch:
    """Random tokens; every seventh target does not count. Documents of the rows end at different tokens."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (batch_size, SEQ_LEN), generator=draw)
    targets = tokens.roll(-1, 1)
    targets[:, ::7] = -100
    rows = ([11, 1, SEQ_LEN - 12], [8, SEQ_LEN - 8])
    lengths = [n for row in range(batch_size) for n in (rows[row % 2] if packed else [SEQ_LEN])]
    return TokenBatch(tokens, targets, Packing.of_lengths(lengths))


def oracle(model: Decoder, batches: list[TokenBatch]) -> list[torch.Tensor]:
    """Autograd over the plain modules: the recurrence token by token."""
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = model(batch.tokens, batch.targets, packing=batch.packing, loss_tile=16)
        (loss / sum(b.num_targets for b in batches)).backward()
        losses.append(loss.detach().double())
    return [*losses, *(param.grad.clone() for param in model.parameters() if param.requires_grad)]


def gradients(model: Decoder, plan: MemoryPlan, batches: list[TokenBatch], stack: Any = None) -> list[torch.Tensor]:
    model.zero_grad()
    handle = apply_plan(model, plan, stack, meter=None, bucket_plans=None)
    sweep = open_sweep(model, handle, None, loss_tile=16, itemsize=8)
    divisor = sum(batch.num_targets for batch in batches)
    try:
        losses = [sweep.forward_backward(b, divisor, step=0, micro_batch=i).double() for i, b in enumerate(batches)]
    finally:
        sweep.close()
    return [*losses, *(param.grad.clone() for param in model.parameters() if param.requires_grad)]


def error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rows(*ends: tuple[int | None, Residence]) -> tuple[Stretch, ...]:
    begins = [0, *(end for end, _ in ends[:-1])]
    return tuple(Stretch(begin, end, place) for begin, (end, place) in zip(begins, ends, strict=True))


HBM, HOST, SSD, NONE = Residence.hbm, Residence.host, Residence.ssd, Residence.recompute


def by_layer(model: Decoder, name: str, tile: int = TILE) -> MemoryPlan:
    """A plan of the sweep by layer. front: the first tokens run again, of the others all leaves or stays."""
    layers = []
    for block in skeletons_of(model.blocks):
        tiled = [n for n in block.skeletal[1:] if block.maker[n].reach is not Reach.prefix]
        front = dict.fromkeys(tiled, rows((2 * tile, NONE), (5 * tile, HOST), (None, HBM)))
        layers.append(
            {
                "keep": keep_layer(block),
                "recompute": input_layer(block, HBM),
                "host": LayerPlan.of(**dict.fromkeys(block.skeletal, HOST)),
                "ssd": input_layer(block, SSD),
                "front": LayerPlan({**front, **input_layer(block, SSD).stretches}),
            }[name]
        )
    return MemoryPlan(name, tuple(layers), cuts=Cuts(tile))


BY_LAYER = ("keep", "recompute", "host", "ssd", "front")
PLACES = {
    "hbm": rows((None, HBM)),
    "host": rows((None, HOST)),
    "ssd": rows((None, SSD)),
    "mixed": rows((8, HBM), (16, HOST), (None, SSD)),
}


def by_chunk(model: Decoder, place: str = "hbm", chunks: tuple[int, ...] = (8,), *, again: bool = False) -> MemoryPlan:
    """A plan of the sweep by chunk; `again`: of a chunk only the inputs of its blocks stay."""
    skeletons = [chunk_skeleton(s) for s in skeletons_of(model.blocks)]
    layers = tuple(input_layer(s, HOST) if again else keep_layer(s) for s in skeletons)
    kv, cuts = PLACES[place], Cuts(TILE, None, chunks, 8)
    return MemoryPlan(place, layers, sweep=Sweep.by_chunk, cuts=cuts, kv=kv, kv_grads=kv)


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
    model, meter = Decoder(WIDE), DeviceMeter()
    model.init_weights(0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    sweep_name, _, place = plan.partition(" ")
    made = by_chunk(model, place, (64,)) if place else by_layer(model, sweep_name, 64)
    made = replace(made, cuts=replace(made.cuts, token_tile=64, kv_block=64 if place else None))
    handle = apply_plan(model, made, stack, meter=meter, bucket_plans=None)
    sweep = open_sweep(model, handle, meter, loss_tile=64, itemsize=4)
    tokens = torch.randint(0, 300, (1, 320))
    batch = TokenBatch(tokens, tokens.roll(-1, 1), Packing.of_lengths([320]))
    apart = [*model.parameters(), *(param.grad for param in model.parameters()), tokens, batch.targets]
    with LiveBytes(apart) as live:
        sweep.forward_backward(batch, 1.0, step=0, micro_batch=0)
    sweep.close()
    assert meter.resident_bytes == 0
    assert meter.peak_bytes == pytest.approx(live.peak, rel=0.01)


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


def _changed(patch: pytest.MonkeyPatch, change: Callable[[Any], Any], mixer: str = LINEAR_ATTENTION) -> None:
    """The registered mixer's part of a block, changed."""
    kind = type(mixer_named(mixer))
    right = kind.part
    patch.setattr(kind, "part", lambda self, shape: change(right(self, shape)))
    skeleton._dense_skeleton.cache_clear()
    patch.setattr(skeleton, "_dense_skeleton", skeleton._dense_skeleton.__wrapped__)


def _scan_with(**fields: Any) -> Callable[[Any], Any]:
    def change(part: Any) -> Any:
        made = fields.pop("widths", {})
        segments = []
        for segment in part.segments:
            makes = tuple(replace(t, width=made.get(t.name, t.width)) for t in segment.makes)
            own = fields if segment.name == "scan" else {}
            segments.append(replace(segment, makes=makes, **own))
        return part._replace(segments=tuple(segments))

    return change


@pytest.mark.parametrize("kind", ["keep", "chunk"])
@pytest.mark.parametrize(
    ("mixer", "fields", "tensor"),
    [
        (LINEAR_ATTENTION, {"widths": {"state": 100}}, "state"),
        (LINEAR_ATTENTION, {"widths": {"out": 10}}, "out"),
        (LINEAR_ATTENTION, {"widths": {"g_in": 3}}, "g_in"),
        (LINEAR_ATTENTION, {"needs": ("q", "k", "v", "state")}, "g"),
        (ATTENTION, {"widths": {"lse": 3}}, "lse"),
    ],
    ids=str,
)
def test_a_skeleton_that_lies_is_refused(
    mixer: str, fields: dict[str, Any], tensor: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _changed(monkeypatch, _scan_with(**fields), mixer)
    others = LINEAR_ATTENTION if mixer == ATTENTION else ATTENTION
    model = Decoder(replace(MODEL, mixers=[others, mixer]), dtype=torch.float64)
    model.init_weights(0)
    plan = by_chunk(model) if kind == "chunk" else by_layer(model, kind)
    before = [param.clone() for param in model.parameters()]
    # A state of another width is one that the mixer's own function fails on.
    kind_of = RuntimeError if "state" in fields.get("widths", ()) else InputError
    with pytest.raises(kind_of, match=rf"layer 1, segment \w+: {tensor} .*; correct the skeleton"):
        gradients(model, plan, [batch_of()])
    assert equal(before, list(model.parameters()))


@pytest.mark.parametrize("kind", ["keep", "chunk"])
def test_a_state_that_changes_its_shape_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = scanning.LinearScan.forward

    def forward(self: Any, reads: Any, state: torch.Tensor) -> Any:
        made, after = right(self, reads, state)
        return made, after[:, :-1]

    monkeypatch.setattr(scanning.LinearScan, "forward", forward)
    model = decoder("hybrid")
    plan = by_chunk(model) if kind == "chunk" else by_layer(model, kind)
    with pytest.raises(InputError, match=r"layer 0, segment scan: state is \(2, 1, 127\) of .* says \(2, 1, 128\)"):
        gradients(model, plan, [batch_of()])


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part._replace(skeletal=tuple(name for name in part.skeletal if name != "state")),
        _scan_with(reads=("q", "k", "v", "g")),
        _scan_with(reach=Reach.token),
        lambda part: part._replace(segments=part.segments[:-1]),
    ],
)
def test_a_skeleton_that_contradicts_itself(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _changed(monkeypatch, change)
    with pytest.raises(ValueError, match=r"segment (scan|norm2)"):
        Decoder(replace(MODEL, mixers=[LINEAR_ATTENTION]), device="meta")


def test_the_state_of_a_scan_cannot_be_recomputed() -> None:
    model = decoder("scans")
    plan = MemoryPlan("p", (LayerPlan.of(x=HBM),) * 2)
    with pytest.raises(InputError, match="layer 0: state is the state of a scan and cannot be recomputed"):
        check_plan(plan, skeletons_of(model.blocks))


def test_what_knows_attention_only_refuses_other_mixers() -> None:
    with pytest.raises(InputError, match=r"model.mixers=.* cache of keys"):
        generate(Decoder(MODEL), [1], SamplingConfig())
    with pytest.raises(InputError, match=r"model.mixers=.* in every layer"):
        config_to_hf(MODEL, "float32")


def test_a_third_party_s_mixer_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[headrace.mixers]\ntheirs = their_mixer\n")
    (tmp_path / "their_mixer.py").write_text(
        "from headrace.helpers.linear_attention import LinearAttentionMixer\n"
        "from headrace.workers.model.mixers.registry import register\n"
        "@register('theirs')\n"
        "class Theirs(LinearAttentionMixer):\n"
        "    leaf = 'theirs'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = Decoder(replace(MODEL, num_layers=1, mixers=["theirs"]), device="meta")
    assert "blocks.0.theirs.g_proj.weight" in dict(model.named_parameters())


def test_names_of_mixers() -> None:
    with pytest.raises(InputError, match=r"model.mixers: 'none' is not registered; choose among attention, linear_att"):
        Decoder(replace(MODEL, mixers=["none"]), device="meta")
    with pytest.raises(InputError, match="name one mixer"):
        Decoder(replace(MODEL, mixers=[]), device="meta")
    with pytest.raises(ValueError, match=r"'linear_attention': .* has registered one of this name"):
        register(LINEAR_ATTENTION)(ScanRule)
    assert [MODEL.mixer_of(layer) for layer in range(3)] == [LINEAR_ATTENTION, ATTENTION, LINEAR_ATTENTION]


def test_responses_that_share_a_prompt_are_refused() -> None:
    packing = Packing.of_lengths((3, 2, 2), parents=(None, 0, 0))
    with pytest.raises(InputError, match=r"share a prompt.*layers that scan.*data\.share_prompts=false"):
        pieces(packing, 1, (0, 7))
