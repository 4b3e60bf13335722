"""The sweep by layer: equal bits for every plan with the same cuts, the gradients of autograd, mutants."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.helpers.tiers import FakeTier, open_fake_stack
from headrace.helpers.tiny_models import LLAMA, MODELS
from headrace.kernels.api import Packing
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Direction, Medium
from headrace.storage.transfer_log import TransferLog
from headrace.workers.memory import held, layer_sweep
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, Stretch, Sweep, check_plan
from headrace.workers.memory.policy import apply_memory, skeletons_of
from headrace.workers.memory.schedule import moved_bytes
from headrace.workers.model.config import AdapterConfig, AdapterKind
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.head_groups import whole_name
from headrace.workers.model.param_sums import ParamSums, Part
from headrace.workers.model.program import MixRule, PointwiseRule, Program
from headrace.workers.model.skeleton import opaque_skeleton

SEQ_LEN, TILE = 29, 8


@functools.cache
def decoder(name: str, dtype: torch.dtype) -> Decoder:
    model = Decoder(MODELS[name], dtype=dtype)
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


def gradients(
    model: Decoder, plan: MemoryPlan | None, stack=None, *, batch_size: int = 2, packed: bool = False, batches: int = 1
) -> list[torch.Tensor]:
    """Losses of some micro-batches and the sum of their gradients; None: autograd over the plain modules."""
    model.zero_grad()
    handle = None if plan is None else apply_memory(model.blocks, plan, stack, norm=model.norm)
    seen = []
    try:
        for micro_batch in range(batches):
            if handle is not None:
                handle.begin(0, micro_batch)
            draw = torch.Generator().manual_seed(micro_batch)
            tokens = torch.randint(0, 50, (batch_size, SEQ_LEN), generator=draw)
            packing = Packing.of_lengths([11, SEQ_LEN - 11] * batch_size) if packed else None
            loss = model(tokens, tokens.roll(-1, 1), packing=packing, loss_tile=16)
            loss.backward()
            seen.append(loss.detach())
            if handle is not None:
                handle.end()
    finally:
        if handle is not None:
            handle.remove()
    return [*seen, *(param.grad.clone() for param in model.parameters())]


@functools.cache
def kept(name: str, cuts: Cuts, **shape: int) -> list[torch.Tensor]:
    """Of two micro-batches, everything kept."""
    model = decoder(name, torch.float32)
    twin = plan_of(cuts).keep_twin(skeletons_of(model.blocks))
    return gradients(model, twin, **shape, batches=2)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@st.composite
def layer_plans(draw: st.DrawFn, skeletal: tuple[str, ...], cuts: Cuts) -> LayerPlan:
    """Random stretches of every tensor in random places; x is always held."""
    rows = {}
    for name in skeletal:
        step = cuts.query_tile if whole_name(name) in ("out", "lse") else cuts.token_tile
        ends = [end for end in range(step or SEQ_LEN, SEQ_LEN, step or SEQ_LEN) if draw(st.booleans())]
        places = [place for place in Residence if name != "x" or place is not Residence.recompute]
        bounds = [0, *ends, None]
        rows[name] = tuple(
            Stretch(begin, end, draw(st.sampled_from(places))) for begin, end in itertools.pairwise(bounds)
        )
    return LayerPlan({name: row for name, row in rows.items() if name == "x" or draw(st.booleans())})


@pytest.mark.parametrize("name", MODELS)
@given(data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_residence_never_changes_a_bit(name: str, make_scripted_stack: Callable[[], Any], data: st.DataObject) -> None:
    """Random plans for each family: the bits of the twin that keeps everything, and exactly the planned bytes."""
    check_residence(name, make_scripted_stack, data)


@pytest.mark.soak
@pytest.mark.parametrize("name", MODELS)
@given(data=st.data())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_50_plans_never_change_a_bit(name: str, make_scripted_stack: Callable[[], Any], data: st.DataObject) -> None:
    check_residence(name, make_scripted_stack, data)


def check_residence(name: str, make_scripted_stack: Callable[[], Any], data: st.DataObject) -> None:
    model = decoder(name, torch.float32)
    cuts = Cuts(
        TILE,
        data.draw(st.sampled_from([None, TILE, 2 * TILE])),
        head_groups=data.draw(st.sampled_from([1, 2])),
    )
    skeletons = cuts.skeletons(skeletons_of(model.blocks))
    layers = tuple(data.draw(layer_plans(skeleton.skeletal, cuts)) for skeleton in skeletons)
    plan = MemoryPlan("random", layers, cuts=cuts, prefetch_layers=data.draw(st.integers(0, 3)))
    check_plan(plan, skeletons)
    shape = {"batch_size": data.draw(st.integers(1, 2)), "packed": data.draw(st.booleans())}
    stack = make_scripted_stack()
    found = gradients(model, plan, stack, **shape, batches=2)
    assert equal(found, kept(name, cuts, **shape))
    sizes = {"batch_size": shape["batch_size"], "num_tokens": SEQ_LEN, "itemsize": 4}
    for direction in Direction:
        for medium, num_bytes in moved_bytes(plan, skeletons, **sizes, direction=direction).items():
            assert stack.moved[direction.value, medium] == 2 * num_bytes, direction
    assert not stack.blobs


def plan_of(cuts: Cuts, **held_in: Residence) -> MemoryPlan:
    return MemoryPlan("p", (LayerPlan.of(x=Residence.hbm, **held_in),) * 3, cuts=cuts)


def test_what_one_place_takes_at_one_moment_is_one_transfer_each_way() -> None:
    """On a real tier: one record per blob and direction, with the exact bytes, and the bits of the twin."""
    model, log = decoder("llama", torch.float32), TransferLog()
    stack = open_fake_stack([FakeTier(1024**2)], log=log)
    names = ("q", "k", "v", "out", "lse", "residual", "gate", "up")
    away = LayerPlan.of(**dict.fromkeys(("x", *names), Residence.ssd))
    plan = MemoryPlan("p", (away, away.on_device(), away.on_device()), cuts=Cuts(16))
    found = gradients(model, plan, stack, batches=2)
    stack.close()
    assert equal(found, kept("llama", plan.cuts, batch_size=2))
    wanted = [("x", 0, 29), ("q+k+v", 0, 29), ("out+lse", 0, 29)]
    wanted += [(name, *tile) for name in ("residual", "gate+up") for tile in ((0, 16), (16, 29))]
    for direction in Direction:
        records = [record for record in log.records if record.direction is direction]
        keys = [f"s0.m{batch}.l0.{name}.t{begin}-{end}.call1" for batch in range(2) for name, begin, end in wanted]
        assert sorted(record.key for record in records) == sorted(keys)
        bytes_of = moved_bytes(
            plan, skeletons_of(model.blocks), batch_size=2, num_tokens=SEQ_LEN, itemsize=4, direction=direction
        )
        assert sum(record.num_bytes for record in records) == 2 * bytes_of[Medium.ssd]


def test_a_head_group_is_a_blob_of_its_own() -> None:
    """One head group leaves and comes back; the other one is made again."""
    model, log = decoder("llama", torch.float32), TransferLog()
    stack = open_fake_stack([FakeTier(1024**2)], log=log)
    away = LayerPlan.of(x=Residence.hbm, **dict.fromkeys(("q:1", "k:1", "v:1", "out:1", "lse:1"), Residence.ssd))
    plan = MemoryPlan("p", (away, away.on_device(), away.on_device()), cuts=Cuts(TILE, head_groups=2))
    found = gradients(model, plan, stack, batches=2)
    stack.close()
    assert equal(found, kept("llama", plan.cuts, batch_size=2))
    wanted = [f"s0.m{batch}.l0.{name}.t0-29.call1" for batch in range(2) for name in ("q:1+k:1+v:1", "out:1+lse:1")]
    assert sorted(record.key for record in log.records) == sorted(2 * wanted)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (Cuts(TILE, head_groups=3), "memory.head_groups=3: the model has 2 KV heads; choose of 1, 2"),
        (Cuts(TILE, head_groups=0), "memory.head_groups=0: the model has 2 KV heads; choose of 1, 2"),
        (Cuts(TILE, head_groups=2, chunks=(8,), kv_block=8), "head_groups=2 is of the sweep by layer; choose 1"),
    ],
)
def test_head_groups_that_do_not_fit_are_refused(cuts: Cuts, message: str) -> None:
    plan = plan_of(cuts)
    if cuts.chunks:
        plan = replace(plan, sweep=Sweep.by_chunk)
    with pytest.raises(InputError, match=message):
        check_plan(plan, skeletons_of(decoder("llama", torch.float32).blocks))
    with pytest.raises(InputError, match="a foreign block does not show its heads"):
        check_plan(plan_of(Cuts(TILE, head_groups=2)), [opaque_skeleton()] * 3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "cuts",
    [Cuts(TILE, TILE), Cuts(TILE), Cuts(64), Cuts(TILE, TILE, head_groups=2), Cuts(64, head_groups=2)],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_are_those_of_autograd(name: str, cuts: Cuts, packed: bool) -> None:
    model = decoder(name, torch.float64)
    reference = gradients(model, None, packed=packed)
    held = {} if cuts.head_groups > 1 else {"out": Residence.hbm, "lse": Residence.hbm}
    found = gradients(model, plan_of(cuts, **held), packed=packed)
    for ours, theirs in zip(found, reference, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-12


def test_adapters_in_head_groups() -> None:
    """LoRA with dropout: a group takes its rows of B, all groups add to A, and masks are the same."""
    adapter = AdapterConfig(kind=AdapterKind.lora, rank=2, dropout=0.2)
    model = Decoder(MODELS["qwen2"], dtype=torch.float64, adapter=adapter)
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    trained = [param for param in model.parameters() if param.requires_grad]
    found = []
    for groups in (1, 2):
        handle = apply_memory(model.blocks, plan_of(Cuts(TILE, head_groups=groups)), norm=model.norm)
        handle.begin(0)
        tokens = torch.arange(2 * SEQ_LEN).view(2, -1) % 50
        loss = model(tokens, tokens.roll(-1, 1), loss_tile=16)
        found.append([loss.detach(), *torch.autograd.grad(loss, trained)])
        handle.remove()
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm()) <= 1e-12 * float(theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_cuts_are_another_order_of_sums_only(dtype: torch.dtype) -> None:
    model, exact = decoder("llama", dtype), decoder("llama", torch.float64)
    copied = {name: param.data.clone() for name, param in exact.named_parameters()}
    for name, param in exact.named_parameters():
        param.data.copy_(dict(model.named_parameters())[name])
    oracle = torch.cat([g.flatten() for g in gradients(exact, None)[1:]])
    for name, param in exact.named_parameters():
        param.data.copy_(copied[name])

    def error(plan: MemoryPlan | None) -> float:
        ours = torch.cat([g.double().flatten() for g in gradients(model, plan)[1:]])
        return float((ours - oracle).norm() / oracle.norm())

    assert error(plan_of(Cuts(TILE))) <= 1.2 * error(None)
    assert error(plan_of(Cuts(TILE, head_groups=2))) <= 1.2 * error(None)


def dropped_tile(monkeypatch) -> None:
    right = ParamSums.add_product
    calls = []

    def add_product(self, name, grad, x, *part) -> None:
        calls.append(name)
        if len(calls) != 3:
            right(self, name, grad, x, *part)

    monkeypatch.setattr(ParamSums, "add_product", add_product)


def wrong_tokens(monkeypatch) -> None:
    """A stretch is made again from the tokens before it."""
    right = held.Held.get

    def get(self, name, span):
        begin = max(0, span[0] - 1)
        rows = right(self, name, (begin, begin + span[1] - span[0]))
        return rows if name == "x" else right(self, name, span)

    monkeypatch.setattr(held.Held, "get", get)


def stale_buffer(monkeypatch) -> None:
    """What runs again leaves zeros where its results belong."""

    def rerun(self, rerun) -> None:
        for segment, names in rerun.segments:
            for spec in (spec for spec in segment.makes if spec.name in names):
                zeros = torch.zeros(2, rerun.span[1] - rerun.span[0], spec.width)
                self._held.add(spec.name, rerun.span, zeros)

    monkeypatch.setattr(layer_sweep.BlockCall, "_rerun", rerun)


def swapped_pieces(monkeypatch) -> None:
    """The pieces of a blob come back under each other's names."""
    right = held.Pack.back

    def back(self, memory):
        right(self, memory)
        self.views = dict(zip(self.views, reversed(self.views.values()), strict=True))

    monkeypatch.setattr(held.Pack, "back", back)


@pytest.mark.parametrize("mutant", [swapped_pieces])
def test_mutants_of_packs_fail(mutant, monkeypatch, scripted_stack) -> None:
    model, cuts = decoder("llama", torch.float32), Cuts(TILE)
    plan = plan_of(cuts, gate=Residence.host, up=Residence.host)
    right = gradients(model, plan.keep_twin(skeletons_of(model.blocks)))
    assert equal(gradients(model, plan, scripted_stack), right)
    mutant(monkeypatch)
    assert not equal(gradients(model, plan, scripted_stack), right)


def dropped_group(monkeypatch) -> None:
    """A head group's gradient of the keys is lost."""
    right = MixRule.backward

    def backward(self, values, grad, shared):
        grads = right(self, values, grad, shared)
        return grads | ({"k:0": torch.zeros_like(grads["k:0"])} if "k:0" in grads else {})

    monkeypatch.setattr(MixRule, "backward", backward)


def wrong_rows(monkeypatch) -> None:
    """A group adds its gradient to another group's rows of the weights."""
    right = Part.of
    monkeypatch.setattr(ParamSums, "_whole_sum", _turned(ParamSums._whole_sum, right))


def _turned(whole_sum, of):
    def turned(self, name):
        total = whole_sum(self, name)
        return torch.cat((of(Part(1, 2), total), of(Part(0, 2), total)))

    return turned


@pytest.mark.parametrize("mutant", [dropped_tile, wrong_tokens, stale_buffer, dropped_group, wrong_rows])
def test_mutants_fail(mutant, monkeypatch) -> None:
    model = decoder("llama", torch.float32)
    cuts = Cuts(TILE, head_groups=2 if mutant in (dropped_group, wrong_rows) else 1)
    plan = plan_of(cuts)
    right = gradients(model, plan.keep_twin(skeletons_of(model.blocks)))
    assert equal(gradients(model, plan), right)
    mutant(monkeypatch)
    assert not equal(gradients(model, plan), right)


def test_a_second_backward_is_refused() -> None:
    model = decoder("llama", torch.float32)
    handle = apply_memory(model.blocks, plan_of(Cuts(TILE)))
    handle.begin(0)
    tokens = torch.randint(0, 50, (1, SEQ_LEN))
    total = model.hidden_states(tokens).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()
    handle.remove()


def test_frozen_parameters_get_no_gradient() -> None:
    model = Decoder(LLAMA)
    model.init_weights(0)
    for name, param in model.named_parameters():
        param.requires_grad_("down_proj" in name)
    handle = apply_memory(model.blocks, plan_of(Cuts(TILE)))
    handle.begin(0)
    tokens = torch.randint(0, 50, (1, SEQ_LEN))
    model(tokens, tokens).backward()
    handle.end()
    assert all((param.grad is not None) == ("down_proj" in name) for name, param in model.named_parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_no_graph_is_built_inside_a_block(name: str, monkeypatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a block of ours has its gradients in closed form")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    assert len(gradients(decoder(name, torch.float32), plan_of(Cuts(TILE)))) > 1


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_segment_without_a_closed_form_is_run_again_under_autograd(name: str) -> None:
    model = Decoder(MODELS[name], dtype=torch.float64)
    model.load_state_dict(decoder(name, torch.float64).state_dict())
    for block in model.blocks:
        rules = tuple(
            replace(rule, gradient=None)
            if isinstance(rule, PointwiseRule) and rule.segment.needs == rule.segment.reads
            else rule
            for rule in block.program.rules
        )
        assert sum(getattr(rule, "gradient", True) is None for rule in rules) == (2 if name == "qwen3" else 1)
        block.program = Program(block.program.skeleton, rules)
    again = gradients(model, plan_of(Cuts(TILE)))
    assert equal(again, gradients(model, plan_of(Cuts(TILE)).keep_twin(skeletons_of(model.blocks))))
    for ours, theirs in zip(again, gradients(model, None), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-12


def test_a_segment_that_needs_less_than_it_reads_must_bring_its_gradient() -> None:
    (rope,) = (rule for rule in decoder("llama", torch.float32).blocks[0].program.rules if rule.segment.name == "rope")
    with pytest.raises(ValueError, match=r"segment rope: needs \(\) of \('q_in', 'k_in'\).*needs all that it reads"):
        replace(rope, gradient=None)
