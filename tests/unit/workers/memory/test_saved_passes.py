"""Foreign blocks whose saved tensors leave: passes of many kinds, compiled blocks, changes in place, order, memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headrace.helpers.foreign_blocks import (
    ALL_HOST,
    ALL_SSD,
    BATCH,
    HBM,
    HOST,
    LENGTH,
    NUM_BLOCKS,
    OFF,
    ROW_BYTES,
    WIDTH,
    Mlp,
    data,
    equal,
    model_of,
    plan_of,
    train,
)
from headrace.helpers.live_bytes import LiveBytes
from headrace.helpers.training import FOREIGN_HOST, FOREIGN_KEEP, foreign_plan, spilled_bytes
from headrace.storage.config import HostTierConfig, SsdTierConfig, TiersConfig
from headrace.storage.core.errors import InputError, TierFull, TransferFailed
from headrace.storage.core.records import Medium
from headrace.storage.stack import TierStack
from headrace.workers.memory import saved, spill
from headrace.workers.memory.plan import LayerPlan, MemoryPlan
from headrace.workers.memory.policy import apply_memory


@pytest.mark.parametrize(
    ("when", "layer"),
    [
        *((when, ALL_HOST) for when in ("before", "after", "in place before", "in place after", "model")),
        *((when, FOREIGN_HOST) for when in ("before", "in place after")),
    ],
)
def test_compiled_blocks(when: str, layer: LayerPlan, opened) -> None:
    def compiled(model: nn.Sequential) -> None:
        if "in place" in when:
            model[1].compile(backend="aot_eager")
        elif when != "model":
            model[1] = torch.compile(model[1], backend="aot_eager")

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reference, model = train(model_of(Mlp, 2), (LENGTH,)), model_of(Mlp, 2)
    if "before" in when:
        compiled(model)
    with spill(model, plan_of(layer, FOREIGN_KEEP), blocks=list(model)[1:-1]):
        if "after" in when:
            compiled(model)
        seen = train(torch.compile(model, backend="aot_eager") if when == "model" else model, (LENGTH,))
    assert equal(seen, reference)
    assert spilled_bytes(opened[0].log)[Medium.host] > 0
    num_compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (num_compiled > 0) == (layer is ALL_HOST or when == "before")


# Passes of many kinds


def test_forwards_without_backward_leave_nothing(opened, scripted_stack) -> None:
    reference, model = train(model_of(Mlp)), model_of(Mlp)
    gc.disable()
    try:
        for layer in (ALL_HOST, FOREIGN_HOST):
            model.zero_grad()
            with spill(model, plan_of(*(layer,) * 4)) as handle:
                with torch.no_grad():
                    model(data())
                assert not opened[-1]._stacks
                for _ in range(3):
                    model(data())
                assert handle.waiting_layers() == [0, 1, 2, 3]  # of the last one
                stored = len(opened[-1]._stored)
                assert equal(train(model), reference)
                assert len(opened[-1]._stored) == 0
                assert opened[-1]._most[Medium.host] == max(opened[-1]._most.values())
                assert stored == (16 if layer is ALL_HOST else 4)
    finally:
        gc.enable()


def test_several_passes_wait_for_one_backward(opened) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        losses = [model(data(length)).square().sum() for length in (LENGTH, 24, 56)]
        (losses[1] - losses[0] * losses[2]).backward()
        return [*(loss.detach() for loss in losses), *(p.grad for p in model.parameters())]

    reference, model = run(model_of(Mlp)), model_of(Mlp)
    with spill(model, OFF):
        assert equal(run(model), reference)
        model.zero_grad()
        assert equal(run(model), reference)
        assert len(opened[0]._stacks) == 1, "one tier for the most that was stored"


def test_a_second_backward_and_a_double_one(opened) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        x = data().requires_grad_()
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
        return [x.grad, gradient.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    reference, model = run(model_of(Mlp)), model_of(Mlp)
    with spill(model, OFF):
        assert equal(run(model), reference)
    assert spilled_bytes(opened[0].log)[Medium.host] == (NUM_BLOCKS - 1) * (WIDTH * ROW_BYTES + Mlp.saved_bytes)


def test_an_exception_in_the_middle(opened) -> None:
    reference, model = train(model_of(Mlp)), model_of(Mlp)

    class Stop(Exception):
        pass

    def stop(*args: Any) -> None:
        raise Stop

    with spill(model, OFF) as handle:
        hook = model[3].down.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            train(model)
        hook.remove()
        hook = model[2].down.register_full_backward_pre_hook(stop)
        with pytest.raises(Stop):
            train(model)
        hook.remove()
        model.zero_grad()
        assert equal(train(model), reference)
        assert handle.waiting_layers() == []


def test_a_failed_load_reaches_the_step(monkeypatch) -> None:
    def broken(*args: Any) -> None:
        raise TransferFailed("checksum differs")

    model = model_of(Mlp)
    with pytest.raises(TransferFailed, match="checksum"), spill(model, OFF):  # noqa: PT012
        loss = model(data()).sum()
        monkeypatch.setattr(TierStack, "complete_load", broken)
        loss.backward()


# Changes in place


class Mutating(nn.Module):
    """Changes the result of exp, which autograd needs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        z = y * 2
        y.add_(1)
        return x + z


class Ending(nn.Module):
    """Gives away a tensor that it saved."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (0.1 * x).exp()


class Meddling(nn.Module):
    """Changes its input, which the block before it saved."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2) + 1


@pytest.mark.parametrize("layer", [ALL_HOST, LayerPlan.of(x=HOST, saved=HBM)], ids=["away", "there"])
@pytest.mark.parametrize("case", ["inside", "after"])
def test_a_change_of_a_saved_tensor_is_named(layer: LayerPlan, case: str) -> None:
    blocks = [Ending(), Mutating(), Ending()] if case == "inside" else [Ending(), Ending(), Meddling()]
    model = nn.Sequential(nn.Linear(8, WIDTH), *blocks)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(data()).sum().backward()
    message = rf"layer 1: .* modified by an inplace operation: a tensor of shape \({BATCH}, {LENGTH}, {WIDTH}\) is at"
    with spill(model, plan_of(*(layer,) * 3), blocks=blocks) as handle:
        model(data())  # as long as nobody asks for a gradient, nothing is wrong
        with pytest.raises(RuntimeError, match=message):
            model(data()).sum().backward()
        handle.abort()


def test_a_mutant_without_the_version_check_is_silent(monkeypatch) -> None:
    def current(self) -> int:
        return self.witness._version

    blocks = [Ending(), Mutating(), Ending()]
    model = nn.Sequential(nn.Linear(8, WIDTH), *blocks)
    monkeypatch.setattr(saved.Saved, "version", property(current, lambda self, value: None), raising=False)
    with spill(model, plan_of(*(ALL_HOST,) * 3), blocks=blocks):
        model(data()).sum().backward()


# Order, memory


def test_the_order_of_the_verbs(scripted_stack) -> None:
    model = model_of(Ending, 3)
    handle = apply_memory(list(model)[1:-1], plan_of(ALL_HOST, ALL_HOST, FOREIGN_KEEP), scripted_stack)
    handle.begin(0)
    model(data()).sum().backward()
    handle.end()
    forward = ["prepare_store 0", "prepare_store 1", "complete_store 0"]
    # Block 1 gets its tensors from the sources.
    backward = ["prepare_load 1", "prepare_load 0", "complete_load 1", "complete_store 1", "discard 1"]
    backward += ["complete_load 0", "discard 0"]
    assert [f"{verb} {layer}" for verb, layer in scripted_stack.calls] == forward + backward


def test_the_last_block_of_the_preset_stays(opened, tmp_path: Path) -> None:
    model = model_of(Mlp)
    with spill(model, "ssdtrain", tiers=TiersConfig(ssd=SsdTierConfig(path=str(tmp_path)))):
        train(model, (LENGTH,))
    layers = {record.key.split(".")[2] for record in opened[0].log.records}
    assert layers == {"l0", "l1", "l2"}
    assert spilled_bytes(opened[0].log)[Medium.ssd] == (NUM_BLOCKS - 1) * (WIDTH * ROW_BYTES + Mlp.saved_bytes)


def peak_bytes(plan: MemoryPlan | None, num_blocks: int) -> int:
    model = model_of(Mlp, num_blocks)
    model(data()).sum().backward()
    apart = [t for p in model.parameters() for t in (p, p.grad)]

    def step() -> int:
        with LiveBytes(apart) as live:
            model(data()).sum().backward()
        return live.peak

    if plan is None:
        return step()
    with spill(model, plan):
        step()
        return step()


def test_the_peak_of_all_live_tensors_falls() -> None:
    kept = [peak_bytes(None, n) for n in (8, 16)]
    away = [peak_bytes(plan_of(*(ALL_HOST,) * (n - 1), FOREIGN_KEEP), n) for n in (8, 16)]
    block = WIDTH * ROW_BYTES + Mlp.saved_bytes
    assert kept[1] >= 16 * block
    statistics = 2 * ROW_BYTES  # mean and deviation of the norm are too small to leave
    assert away[1] - away[0] == 8 * statistics
    assert away[1] <= 3 * block + 16 * statistics


def test_presets_of_foreign_blocks(opened, tmp_path: Path) -> None:
    assert foreign_plan("ssdtrain", 3).layers == (ALL_SSD, ALL_SSD, FOREIGN_KEEP)
    with pytest.raises(InputError, match=r"memory=memo .*saved=Residence\.host"):
        foreign_plan("memo", 3)
    with pytest.raises(InputError, match=r"memory=alst .*choose offload_host"):
        foreign_plan("alst", 3)
    with pytest.raises(InputError, match=r"layer 1: tensors \['gate'\]: the block has x, saved"):
        with spill(model_of(Mlp, 2), plan_of(ALL_HOST, LayerPlan.of(x=HOST, gate=HOST))):
            pass
    model = model_of(Mlp)
    with spill(model, "ssdtrain", tiers=TiersConfig(ssd=SsdTierConfig(path=str(tmp_path)))):
        assert equal(train(model), train(model_of(Mlp)))
    assert spilled_bytes(opened[-1].log)[Medium.host] == 0
    assert spilled_bytes(opened[-1].log)[Medium.ssd] > 0


def test_a_budget_is_kept() -> None:
    model, budget = model_of(Mlp), TiersConfig(host=HostTierConfig(budget_gib=4 * 16384 / 2**30))
    with pytest.raises(TierFull, match=r"tiers\.host\.budget_gib"), spill(model, OFF, tiers=budget):
        model(data())
