"""A codec under the sweep by layer: forward is exact, gradients are right on average, and residence changes no bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.helpers.tiny_models import MODELS
from headrace.kernels.api import CodecName
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Direction, Medium
from headrace.workers.memory import held
from headrace.workers.memory.plan import HELD, Cuts, LayerPlan, MemoryPlan, Residence, Stretch, Sweep, check_plan
from headrace.workers.memory.policy import apply_memory, skeletons_of
from headrace.workers.memory.schedule import moved_bytes, schedule_of
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.head_groups import whole_name

CODECS = tuple(CodecName)
SEQ_LEN, TILE = 29, 8
# Norm of the error of all gradients by their own. A step of a codec is 1 / 255 of a range, or 1 / 15.
CLOSE = {CodecName.eight_bit_token: 0.01, CodecName.four_bit_group: 0.15}


@functools.cache
def decoder(name: str) -> Decoder:
    model = Decoder(MODELS[name])
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


def gradients(name: str, plan: MemoryPlan, stack: Any = None, *, step: int = 0) -> list[torch.Tensor]:
    """Loss and gradients of two rows."""
    model = decoder(name)
    model.zero_grad()
    handle = apply_memory(model.blocks, plan, stack, norm=model.norm)
    try:
        handle.begin(step, 0, seed=5)
        tokens = torch.randint(0, 50, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
        loss = model(tokens, tokens.roll(-1, 1), loss_tile=16)
        loss.backward()
        handle.end()
    finally:
        handle.remove()
    return [loss.detach(), *(param.grad.clone() for param in model.parameters())]


def twin(name: str, codec: CodecName | None, head_groups: int = 1) -> MemoryPlan:
    """Everything is held on the device."""
    skeletons = skeletons_of(decoder(name).blocks)
    row = LayerPlan.of(x=Residence.hbm)
    return MemoryPlan("p", (row,) * len(skeletons), cuts=Cuts(TILE, head_groups=head_groups, codec=codec)).keep_twin(
        skeletons
    )


@functools.cache
def kept(name: str, codec: CodecName | None, head_groups: int = 1) -> list[torch.Tensor]:
    return gradients(name, twin(name, codec, head_groups))


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of all gradients, by their norm."""
    apart = sum(float((a - b).square().sum()) for a, b in zip(found[1:], exact[1:], strict=True))
    return (apart / sum(float(b.square().sum()) for b in exact[1:])) ** 0.5


def test_what_is_coded_is_what_is_placed_tile_by_tile() -> None:
    for model in MODELS.values():
        (skeleton,) = Cuts(codec=CODECS[0]).skeletons([Decoder(model, device="meta").blocks[0].program.skeleton])
        schedule = schedule_of(skeleton)
        assert skeleton.coded == {name for name in skeleton.skeletal if not schedule.is_whole(name)}
        assert {"residual", "gate", "up"} <= skeleton.coded
        assert not replace(skeleton, codec=None).coded


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@given(data=st.data())
@settings(max_examples=4, deadline=None, derandomize=True)
def test_residence_never_changes_a_bit(
    name: str, codec: CodecName, make_scripted_stack: Callable[[], Any], data: st.DataObject
) -> None:
    """Random places: the bits of the twin that keeps everything in the same codec, and exactly the planned bytes.

    Nothing is recomputed: what is made again from coded values has other bits.
    """
    cuts = Cuts(TILE, head_groups=data.draw(st.sampled_from([1, 2])), codec=codec)
    skeletons = cuts.skeletons(skeletons_of(decoder(name).blocks))
    layers = []
    for skeleton in skeletons:
        rows = {}
        for tensor in skeleton.skeletal:
            first, second = data.draw(st.sampled_from(HELD)), data.draw(st.sampled_from(HELD))
            is_one = whole_name(tensor) in ("out", "lse")
            rows[tensor] = (
                (Stretch(0, None, first),) if is_one else (Stretch(0, 2 * TILE, first), Stretch(2 * TILE, None, second))
            )
        layers.append(LayerPlan(rows))
    plan = MemoryPlan("random", tuple(layers), cuts=cuts, prefetch_layers=data.draw(st.integers(0, 2)))
    check_plan(plan, skeletons)
    stack = make_scripted_stack()
    found = gradients(name, plan, stack)
    assert all(torch.equal(a, b) for a, b in zip(found, kept(name, codec, cuts.head_groups), strict=True))
    for direction in Direction:
        sizes = {"batch_size": 2, "num_tokens": SEQ_LEN, "itemsize": 4, "direction": direction}
        for medium, num_bytes in moved_bytes(plan, skeletons, **sizes).items():
            assert stack.moved[direction.value, medium] == num_bytes, direction


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_loss_is_exact_and_gradients_are_close(name: str, codec: CodecName) -> None:
    exact, found = kept(name, None), kept(name, codec)
    assert torch.equal(found[0], exact[0]), "forward goes on with exact values"
    assert 0 < error(found, exact) < CLOSE[codec]


def mean_error(num_steps: int) -> float:
    """Of the mean over some steps of one batch with four bits."""
    plan = twin("llama", CodecName.four_bit_group)
    steps = [gradients("llama", plan, step=step) for step in range(num_steps)]
    return error([torch.stack(grads).mean(0) for grads in zip(*steps, strict=True)], kept("llama", None))


def test_gradients_are_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent errors of 16 steps add up to a quarter of one step's. One seed for all steps makes one error."""
    one = mean_error(1)
    assert mean_error(16) < 0.45 * one
    monkeypatch.setattr(held, "derive_seed", lambda *parts: 1)
    assert mean_error(16) > 0.8 * mean_error(1)


def test_a_plan_by_chunk_refuses_a_codec() -> None:
    skeletons = skeletons_of(decoder("llama").blocks)
    cuts = Cuts(TILE, chunks=(8,), kv_block=8, codec=CODECS[0])
    plan = MemoryPlan("c", (LayerPlan.of(x=Residence.hbm),) * len(skeletons), sweep=Sweep.by_chunk, cuts=cuts)
    with pytest.raises(InputError, match=r"memory.codec=eight_bit_token is of the sweep by layer"):
        check_plan(plan, skeletons)


def test_a_plan_keeps_its_codec_in_its_file() -> None:
    plan = twin("llama", CODECS[1])
    assert MemoryPlan.from_dict(plan.to_dict()).cuts == plan.cuts
    assert plan.to_dict()["cuts"]["codec"] == "four_bit_group"
    assert plan.cuts.skeletons(skeletons_of(decoder("llama").blocks))[0].codec is CODECS[1]
    assert Medium.host not in plan.media
