"""The planner's timeline of device bytes against the meter, byte for byte, on random plans."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from headrace.helpers.training import FOREIGN_HOST, FOREIGN_KEEP, FOREIGN_RECOMPUTE, FOREIGN_SSD, foreign_plan
from headrace.platform.planning.predict import BlockCost, StepCost, device_peak_bytes
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import LayerPlan, MemoryPlan
from headrace.workers.memory.policy import apply_memory

NUM_LAYERS = 6
OPTIONS = (FOREIGN_KEEP, FOREIGN_RECOMPUTE, FOREIGN_HOST, FOREIGN_SSD)
Costs = tuple[dict[LayerPlan, BlockCost], StepCost]


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
def costs(make_model, tokens, scripted_stack) -> Costs:
    one, two = (measured_peak(make_model, tokens, foreign_plan("keep", n), scripted_stack) for n in (1, 2))
    # The scale table (64 bytes) is shared by all blocks: it belongs to the head.
    saved, each = two - one, 2 * 8 * 16 * 4
    again = BlockCost(each, saved, each, rerun_flops=1.0)
    blocks = {
        FOREIGN_KEEP: BlockCost(saved, saved, saved),
        FOREIGN_RECOMPUTE: again,
        FOREIGN_HOST: replace(again, held=0, host=each, host_slots=each),
        FOREIGN_SSD: replace(again, held=0, ssd=each, ssd_slots=each),
    }
    return blocks, StepCost(NUM_LAYERS, one - saved, 1.0, 1.0)


def peak(costs: Costs, plan: MemoryPlan) -> int:
    blocks, cost = costs
    return device_peak_bytes([blocks[layer] for layer in plan.layers], plan.prefetch_layers, cost)


@pytest.mark.parametrize("seed", range(12))
def test_predicted_is_measured(seed, costs, make_model, tokens, scripted_stack) -> None:
    draw = random.Random(seed)
    layers = tuple(draw.choice(OPTIONS) for _ in range(NUM_LAYERS))
    plan = MemoryPlan("random", layers, prefetch_layers=seed % 4)
    predicted = peak(costs, plan)
    # Up to the table that a peak inside the backward pass still has, and the tokens and loss that it has not.
    assert measured_peak(make_model, tokens, plan, scripted_stack) == pytest.approx(predicted, abs=64 + 2 * 8 * 8)


def test_presets(costs, make_model, tokens, scripted_stack) -> None:
    for name in ("keep", "recompute", "offload_host", "offload_ssd"):
        plan = foreign_plan(name, NUM_LAYERS)
        predicted = peak(costs, plan)
        measured = measured_peak(make_model, tokens, plan, scripted_stack)
        assert measured == pytest.approx(predicted, abs=64 + 2 * 8 * 8), name
