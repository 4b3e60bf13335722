"""The planner's timeline of device bytes against the meter, byte for byte, on random plans."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from headrace.helpers.training import FOREIGN_HOST, FOREIGN_KEEP, FOREIGN_RECOMPUTE, FOREIGN_SSD, foreign_plan
from headrace.platform.planning.predict import BlockCost, StepCost, Treatment, device_peak_bytes, treatment_of
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.memory.policy import apply_memory

NUM_LAYERS = 6
OPTIONS = (FOREIGN_KEEP, FOREIGN_RECOMPUTE, FOREIGN_HOST, FOREIGN_SSD)


def measured_peak(make_model, tokens, plan: MemoryPlan, stack) -> int:
    model, meter = make_model(num_layers=len(plan.layers)), DeviceMeter()
    handle = apply_memory(model.blocks, plan, stack, meter=meter)
    handle.begin(0)
    with meter:
        model(tokens).backward()
    handle.end()
    assert meter.resident_bytes == 0
    return meter.peak_bytes


@pytest.fixture
def cost(make_model, tokens, scripted_stack) -> StepCost:
    one, two = (measured_peak(make_model, tokens, foreign_plan("keep", n), scripted_stack) for n in (1, 2))
    # The scale table (64 bytes) is shared by all blocks: it belongs to the head.
    saved, each = two - one, 2 * 8 * 16 * 4
    again = BlockCost(each, saved, each, rerun_flops=1.0)
    blocks = {
        Treatment.keep: BlockCost(saved, saved, saved),
        Treatment.recompute: again,
        Treatment.host: replace(again, held=0, host=each, host_slots=each),
        Treatment.ssd: replace(again, held=0, ssd=each, ssd_slots=each),
    }
    return StepCost(NUM_LAYERS, blocks, one - saved, 1.0, 1.0)


def blocks_of(cost: StepCost, plan: MemoryPlan) -> list[BlockCost]:
    return cost.of([treatment_of(layer) for layer in plan.layers])


@pytest.mark.parametrize("seed", range(12))
def test_predicted_is_measured(seed, cost, make_model, tokens, scripted_stack) -> None:
    draw = random.Random(seed)
    layers = tuple(draw.choice(OPTIONS) for _ in range(NUM_LAYERS))
    plan = MemoryPlan("random", layers, prefetch_layers=seed % 4)
    predicted = device_peak_bytes(blocks_of(cost, plan), plan.prefetch_layers, cost)
    # Up to the table that a peak inside the backward pass still has, and the tokens and loss that it has not.
    assert measured_peak(make_model, tokens, plan, scripted_stack) == pytest.approx(predicted, abs=64 + 2 * 8 * 8)


def test_presets(cost, make_model, tokens, scripted_stack) -> None:
    for name in ("keep", "recompute", "offload_host", "offload_ssd"):
        plan = foreign_plan(name, NUM_LAYERS)
        predicted = device_peak_bytes(blocks_of(cost, plan), 1, cost)
        measured = measured_peak(make_model, tokens, plan, scripted_stack)
        assert measured == pytest.approx(predicted, abs=64 + 2 * 8 * 8), name


def test_a_plan_within_its_budget_runs_within_it(cost, make_model, tokens, scripted_stack) -> None:
    from headrace.platform.planning.budgets import Budgets
    from headrace.platform.planning.cost import layer_plan
    from headrace.platform.planning.predict import Rates
    from headrace.platform.planning.solve import arrange, best_counts
    from headrace.storage.core.records import Medium
    from headrace.workers.model.skeleton import opaque_skeleton

    torch.manual_seed(0)
    for budget in (number * cost.blocks[Treatment.keep].held for number in (2, 3, 5)):
        budgets = Budgets({Medium.hbm: budget, Medium.host: 2 * cost.slot_bytes, Medium.ssd: None})
        counts = best_counts(cost, budgets, Rates(), 1)
        assert counts is not None
        plan = MemoryPlan("auto", tuple(layer_plan(t, opaque_skeleton()) for t in arrange(counts)))
        assert measured_peak(make_model, tokens, plan, scripted_stack) <= budget + 64 + 2 * 8 * 8
