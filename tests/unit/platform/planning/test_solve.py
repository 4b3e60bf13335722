from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest

from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.budgets import Budgets
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.predict import (
    BlockCost,
    Counts,
    Rates,
    StepCost,
    Treatment,
    Work,
    device_peak_bytes,
    step_seconds,
    treatment_of,
)
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.platform.planning.solve import (
    arrange,
    best_counts,
    overflow,
    predict,
    rank,
    slab_bytes_per_node,
)
from headrace.storage.core.records import Direction, Medium
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence
from headrace.workers.memory.schedule import moved_bytes
from headrace.workers.model.config import Family, ModelConfig
from headrace.workers.telemetry import names

KEEP, RECOMPUTE, HOST, SSD = Treatment


def blocks_of(input_bytes: int, saved_bytes: int, *, rerun_bytes: int = 0, rerun_flops: float = 0.0) -> dict:
    """Costs of the four treatments: a kept block holds `saved_bytes`, the others take `rerun_bytes` in backward."""
    again = BlockCost(input_bytes, input_bytes + rerun_bytes, input_bytes, rerun_flops=rerun_flops)
    slot = -(-input_bytes // 4096) * 4096
    return {
        KEEP: BlockCost(saved_bytes, saved_bytes, saved_bytes),
        RECOMPUTE: again,
        HOST: replace(again, held=0, host=input_bytes, host_slots=slot),
        SSD: replace(again, held=0, ssd=input_bytes, ssd_slots=slot),
    }


def brute_force(cost: StepCost, budgets: Budgets, rates: Rates, prefetch_layers: int) -> tuple | None:
    """The lowest rank over all 4^L assignments that hold the budgets."""
    ranks = [
        rank(Work.of(cost.of(layers), prefetch_layers, cost), prefetch_layers, cost, rates)
        for layers in itertools.product((KEEP, RECOMPUTE, HOST, SSD), repeat=cost.num_layers)
        if not overflow(cost.of(layers), prefetch_layers, cost, budgets)
    ]
    return min(ranks, default=None)


def random_problem(seed: int) -> tuple[StepCost, Budgets, Rates, int]:
    """Small numbers, so that every constraint binds somewhere in a few hundred draws."""
    draw = random.Random(seed)
    num_layers = draw.randint(1, 5)
    input_bytes = draw.choice([4096, 8192])
    saved = input_bytes * draw.randint(2, 12)
    head_bytes, head_flops = draw.randint(0, 40000), draw.choice([0.0, 30.0])
    blocks = blocks_of(input_bytes, saved, rerun_bytes=saved - input_bytes, rerun_flops=10.0)
    cost = StepCost(num_layers, blocks, head_bytes, 10.0, head_flops)
    most = num_layers * saved + 40000
    slots = [None, *range(num_layers + 1)]
    tiers = {
        Medium.hbm: draw.choice([None, draw.randint(1, most), draw.randint(1, most)]),
        Medium.host: None if (n := draw.choice(slots)) is None else n * input_bytes,
        Medium.ssd: None if (n := draw.choice(slots)) is None else n * input_bytes,
    }
    memory = draw.choice([None, draw.randint(5000, most)])
    budgets = Budgets(tiers, memory, process_bytes=5000, device_is_memory=draw.random() < 0.5)
    link, drive = draw.choice([None, 500.0, 5000.0]), draw.choice([None, 200.0, 2000.0])
    rates = Rates(draw.choice([None, 1.0, 5.0]), link, link, drive, drive)
    return cost, budgets, rates, draw.randint(0, 3)


@pytest.mark.parametrize("block", range(4))
def test_the_solver_is_optimal(block: int) -> None:
    feasible = infeasible = mixed = 0
    for seed in range(block * 60, block * 60 + 60):
        cost, budgets, rates, prefetch_layers = random_problem(seed)
        expected = brute_force(cost, budgets, rates, prefetch_layers)
        counts = best_counts(cost, budgets, rates, prefetch_layers)
        if expected is None:
            assert counts is None, seed
            infeasible += 1
            continue
        assert counts is not None, seed
        found = Work.of(cost.of(arrange(counts)), prefetch_layers, cost)
        assert found == Work.of_counts(counts, prefetch_layers, cost), seed
        assert rank(found, prefetch_layers, cost, rates) == pytest.approx(expected), seed
        assert not overflow(cost.of(arrange(counts)), prefetch_layers, cost, budgets), seed
        feasible += 1
        mixed += sum(n > 0 for n in (counts.keep, counts.recompute, counts.host, counts.ssd)) > 1
    assert min(feasible, infeasible, mixed) > 3


def test_the_arrangement_has_the_lowest_peak_of_all_orders() -> None:
    cost = StepCost(5, blocks_of(10, 37), 13, 1.0, 1.0)
    for counts in (Counts(1, 2, 1, 1), Counts(2, 0, 2, 1), Counts(0, 3, 2, 0), Counts(1, 1, 0, 3)):
        for prefetch_layers in (0, 1, 2, 4):
            chosen = device_peak_bytes(cost.of(arrange(counts)), prefetch_layers, cost)
            orders = set(itertools.permutations(arrange(counts)))
            assert chosen == min(device_peak_bytes(cost.of(order), prefetch_layers, cost) for order in orders)


def test_ssd_and_host_take_turns() -> None:
    assert arrange(Counts(1, 1, 2, 2)) == (HOST, SSD, HOST, SSD, RECOMPUTE, KEEP)
    layers = arrange(Counts(0, 0, 7, 3))
    assert Counts.of(layers) == Counts(0, 0, 7, 3)
    assert "SSD, SSD" not in str(layers)


def test_the_ssd_of_unknown_speed_is_the_last_resort() -> None:
    cost = StepCost(4, blocks_of(4096, 40960, rerun_bytes=36864), 0, 1.0, 0.0)
    budgets = Budgets({Medium.hbm: 2 * 40960, Medium.host: 2 * 4096, Medium.ssd: None})
    assert best_counts(cost, budgets, Rates(), 1).ssd == 0
    budgets = Budgets({Medium.hbm: 40960 + 4096, Medium.host: 4096, Medium.ssd: None})
    assert best_counts(cost, budgets, Rates(), 1).ssd > 0


def test_a_deep_model_is_solved_quickly() -> None:
    cost = StepCost(126, blocks_of(1 << 30, 20 << 30), 1 << 30, 1e15, 1e14)
    budgets = Budgets({Medium.hbm: 80 << 30, Medium.host: 60 << 30, Medium.ssd: 200 << 30})
    for rates in (Rates(), Rates(4e14, 5e10, 5e10, 5e9, 6e9)):
        start = time.process_time()
        assert best_counts(cost, budgets, rates, 1) is not None
        assert time.process_time() - start < 5


def test_a_bigger_budget_never_gives_a_slower_plan() -> None:
    grown = 0
    for seed in range(600):
        cost, budgets, rates, prefetch_layers = random_problem(seed)
        if None in (rates.flops, rates.ssd_write, rates.d2h):
            continue
        draw = random.Random(seed)
        tier = draw.choice([t for t in budgets.tiers if budgets[t] is not None] or [Medium.hbm])
        raised = None if budgets[tier] is None else budgets[tier] + draw.randint(1, 5) * 4096
        more = replace(budgets, tiers={**budgets.tiers, tier: raised})
        before, after = (best_counts(cost, b, rates, prefetch_layers) for b in (budgets, more))
        if before is None:
            continue
        assert after is not None, seed
        works = [Work.of_counts(c, prefetch_layers, cost) for c in (before, after)]
        seconds = [step_seconds(work, prefetch_layers, cost, rates).total for work in works]
        assert seconds[1] <= seconds[0], seed
        grown += seconds[1] < seconds[0]
    assert grown > 3


def test_host_too_small_takes_the_ssd_too() -> None:
    cost = StepCost(6, blocks_of(8192, 10 * 8192), 0, 1e6, 0.0)
    rates = Rates(1e6, 1e6, 1e6, 1e5, 1e5)
    budgets = Budgets({Medium.hbm: 2 * 10 * 8192, Medium.host: 2 * 8192, Medium.ssd: 6 * 8192})
    counts = best_counts(cost, budgets, rates, 1)
    assert (counts.host, counts.ssd) == (2, 2)
    assert {HOST, SSD} <= set(arrange(counts))


def test_predicted_has_every_metric_of_the_run() -> None:
    model = ModelConfig(
        name="m",
        family=Family.llama,
        vocab_size=64,
        hidden_size=64,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=128,
    )
    profile = HardwareProfile(
        name="cpu",
        device_class=DeviceClass.cpu,
        evidence=Evidence.measured,
        fp32_tflops=0.1,
        d2h_gbps=4.0,
        h2d_gbps=5.0,
        ssd_write_gbps=0.5,
        ssd_read_gbps=6.0,
        compute_efficiency=1.0,
    )
    request = PlanRequest(model=model, seq_len=1024, profile=profile, ranks_per_node=2, micro_batches=3)
    keep, host = (request.cost().blocks[treatment] for treatment in (KEEP, HOST))
    one = host.host
    request = replace(
        request,
        device_budget_bytes=max(keep.backward, host.backward + 2 * one, request.cost().head_bytes),
        host_budget_bytes=one,
        ssd_budget_bytes=6 * one,
    )
    plan = solve_plan(request)
    wanted = {v for v in vars(names).values() if isinstance(v, str) and v.startswith(("mem/", "io/"))} | {names.STEP_S}
    # What compares with the plan, and what is the drive's and not the run's.
    wanted -= {name for name in wanted if name.endswith("_drift_pct")}
    wanted -= {names.SSD_WRITTEN_TB, names.SSD_LIFE_USED_PCT, names.SSD_BUDGET_USED_PCT, names.SSD_DAYS_LEFT}
    assert set(plan.predicted) == wanted
    counts = Counts.of([treatment_of(layer) for layer in plan.layers])
    assert min(counts.host, counts.ssd) > 0
    assert plan.predicted[names.SSD_STORED_GIB] == 3 * counts.ssd * one / GIB
    assert plan.predicted[names.D2H_GBPS] == 2.0
    # A drive that reads faster than its link brings no more than the link; both ranks share both.
    assert plan.predicted[names.SSD_READ_GBPS] == 2.5
    assert plan.predicted[names.SSD_WRITE_GBPS] == 0.25
    assert slab_bytes_per_node(plan, request) == {Medium.host: 2 * counts.host * one, Medium.ssd: 2 * counts.ssd * one}


@pytest.mark.parametrize("prefetch_layers", [0, 1, 3])
def test_predicted_loads_leave_out_what_the_sources_answer(prefetch_layers: int) -> None:
    """As moved_bytes says, which the sweep's tests compare with what the tiers moved."""
    model = ModelConfig(
        name="m",
        family=Family.llama,
        vocab_size=64,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=128,
    )
    profile = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, evidence=Evidence.measured)
    request = PlanRequest(model=model, seq_len=1024, profile=profile, micro_batches=3)
    rows = tuple(LayerPlan.of(x=place) for place in (Residence.ssd, Residence.host, Residence.ssd, Residence.host))
    plan = MemoryPlan("away", rows, cuts=request.cuts(), prefetch_layers=prefetch_layers)
    sizes = {"batch_size": 1, "num_tokens": 1024, "itemsize": 4}
    stored, loaded = (moved_bytes(plan, [request.skeleton()] * 4, **sizes, direction=way) for way in Direction)
    predicted = predict(plan, request)
    assert predicted[names.HOST_STORED_GIB] * GIB == 3 * stored[Medium.host]
    assert predicted[names.HOST_LOADED_GIB] * GIB == 3 * loaded[Medium.host]
    assert predicted[names.SSD_LOADED_GIB] * GIB == 3 * loaded[Medium.ssd] == 3 * stored[Medium.ssd]
    assert (loaded[Medium.host] < stored[Medium.host]) == (prefetch_layers > 0)
