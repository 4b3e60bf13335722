"""The solver against its baseline, against the presets, and against every count of real treatments."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headrace.helpers.planning import QWEN_7B
from headrace.helpers.tiny_models import LLAMA
from headrace.platform.planning import priced
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.budgets import Budgets
from headrace.platform.planning.columns import Column, groups, pruned
from headrace.platform.planning.greedy import greedy
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.judge import Prices, judge
from headrace.platform.planning.leanest import chunk_plan, lean_fits
from headrace.platform.planning.milp import MOST_KINDS, Solution, solve_milp
from headrace.platform.planning.predict import BlockCost
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.problem import GAP, Layers, Problem
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.platform.planning.solve import Solver, find_plan, predict, problem_of, slab_bytes_per_node, solve
from headrace.storage.core.records import Direction, Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence, Sweep
from headrace.workers.memory.schedule import moved_bytes
from headrace.workers.telemetry import names

NOTHING = BlockCost(0, 0, 0)
TINY = replace(LLAMA, vocab_size=64, hidden_size=64, num_layers=6, intermediate_size=128)
RATED = HardwareProfile(
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
H200 = HardwareProfile(
    name="h200",
    device_memory_gib=139.8,
    bf16_tflops=989.4,
    h2d_gbps=63,
    d2h_gbps=63,
    ssd_write_gbps=10,
    ssd_read_gbps=12,
)
LARGE = PlanRequest(model=QWEN_7B, seq_len=262144, profile=H200, itemsize=2)


def requests() -> dict[str, PlanRequest]:
    """Requests of a small model on a rated machine, each with another budget that binds."""
    small = PlanRequest(model=TINY, seq_len=2048, profile=RATED)
    block = small.shape().cost(asked_plan(replace(small, preset=MemoryPreset.keep)).layers[0])
    memory = {"device_budget_bytes": 3 * block.backward}
    return {
        "all in HBM": replace(small, device_budget_bytes=20 * block.backward),
        "device": replace(small, **memory),
        "tight device": replace(small, device_budget_bytes=int(1.3 * block.backward)),
        "host": replace(small, **memory, host_budget_bytes=block.held, ssd_budget_bytes=0),
        "host and SSD": replace(small, **memory, host_budget_bytes=block.held // 2, ssd_budget_bytes=block.held),
        "slow links": replace(small, **memory, profile=replace(RATED, d2h_gbps=0.05, h2d_gbps=0.05)),
        "nothing but HBM": replace(small, **memory, host_budget_bytes=0, ssd_budget_bytes=0),
        "no rates": replace(small, **memory, profile=HardwareProfile(name="cpu", device_class=DeviceClass.cpu)),
        "deeper prefetch": replace(small, **memory, prefetch_layers=3),
    }


def real_brute_force(problem: Problem) -> tuple[float, ...] | None:
    """The lowest rank over all numbers of layers of each treatment, in the order of the solver."""
    kinds, fixed = range(len(problem.columns)), [n for n, c in enumerate(problem.columns) if not c.cost.away]
    rows = list(itertools.combinations_with_replacement(kinds, problem.cost.num_layers - 1))
    counts = np.array([np.bincount(row, minlength=len(kinds)) for row in rows])
    best = []
    for top in fixed:
        judged = judge(problem, Prices.of(problem), counts, np.full(len(rows), top))
        best.append(judged.at(judged.best()))
    rank = min(best)
    return None if rank[0] else rank[1:]


@pytest.mark.parametrize("name", ["tight device", "host and SSD", "slow links"])
def test_the_optimum_over_the_treatments_of_a_block(name: str) -> None:
    """All treatments that the skeleton gives, in a model of three layers."""
    request = requests()[name]
    problem = problem_of(replace(request, model=replace(TINY, num_layers=3)))
    expected, solution = real_brute_force(problem), solve_milp(problem, gap=0.0, time_limit_s=60)
    assert expected is not None
    assert solution.layers is not None
    assert problem.rank(solution.layers)[:2] == pytest.approx(expected[:2], rel=1e-9)


@pytest.mark.parametrize("name", requests())
def test_auto_is_no_slower_than_greedy_and_any_preset(name: str) -> None:
    request = requests()[name]
    plan = find_plan(request)
    assert plan is not None
    assert plan.solver in list(Solver)
    assert (plan.solver == Solver.greedy_is_best) <= (priced.work_of(plan, request).rerun_flops == 0)
    if plan.sweep is Sweep.by_chunk:
        return
    problem = problem_of(request.with_cuts(plan.cuts))
    number = {column.plan: n for n, column in enumerate(problem.columns)}
    layers = tuple(number[layer] for layer in plan.layers)
    assert len(set(layers[:-1])) <= MOST_KINDS
    slack = 1 + 2 * GAP
    start = greedy(problem)
    assert start is None or problem.rank(layers)[1] <= problem.rank(start)[1] * slack
    for preset in MemoryPreset:
        if preset in (MemoryPreset.auto, MemoryPreset.alst) or preset.is_by_chunk:
            continue
        other = find_plan(replace(request, preset=preset))
        if other is None:
            continue
        ours, its = (priced.seconds(each, request).total for each in (plan, other))
        assert ours <= its * slack, preset
        if not its:  # no rate is known
            assert priced.work_of(plan, request).rerun_flops <= priced.work_of(other, request).rerun_flops * slack


def restricted(request: PlanRequest, plans: list[LayerPlan]) -> MemoryPlan:
    """The solver's plan over these treatments alone."""
    shape = request.shape()
    found = pruned([Column(plan, shape.cost(plan)) for plan in dict.fromkeys(plans)])
    problem = Problem(found, request.cost(), request.budgets(), request.rates(), request.prefetch_layers)
    solution = solve_milp(problem, gap=0.0)
    assert solution.layers is not None
    rows = tuple(problem.columns[number].plan for number in solution.layers)
    return MemoryPlan("auto", rows, cuts=request.cuts(), prefetch_layers=request.prefetch_layers)


@pytest.mark.parametrize("preset", [MemoryPreset.memo, MemoryPreset.ssdtrain, MemoryPreset.offload_host])
def test_a_published_rule_is_a_special_case(preset: MemoryPreset) -> None:
    """Over the treatments that the rule knows the solver finds its plan, or one that is not slower."""
    request = replace(requests()["device"], preset=preset, device_budget_bytes=None)
    published = asked_plan(request)
    found = restricted(request, list(published.layers))
    ours, its = (priced.seconds(plan, request).total for plan in (found, published))
    assert ours <= its * (1 + 1e-9)


def test_memo_s_fraction_is_the_solver_s() -> None:
    """Links and host are MEMO's constraints: over all fractions of the tokens no plan like MEMO's is faster."""
    request = replace(requests()["slow links"], preset=MemoryPreset.memo, device_budget_bytes=None, ssd_budget_bytes=0)
    from headrace.workers.memory.presets import Choices, preset_plan

    skeletons, tiles = [request.skeleton()] * TINY.num_layers, len(request.cuts().tiles(request.seq_len))
    plans = [
        preset_plan("memo", skeletons, cuts=request.cuts(), choices=Choices(request.seq_len, host_fraction=n / tiles))
        for n in range(tiles + 1)
    ]
    best = min(priced.seconds(plan, request).total for plan in plans)
    found = restricted(request, [layer for plan in plans for layer in plan.layers])
    assert priced.seconds(found, request).total <= best * (1 + 1e-9)
    assert priced.seconds(asked_plan(request), request).total <= best * 1.1


def test_the_search_over_four_treatments_is_a_special_case() -> None:
    """Keep everything, or the input in one of three places: the best of all numbers of blocks treated each way."""
    for request in (requests()[name] for name in ("device", "host and SSD", "nothing but HBM")):
        whole = asked_plan(replace(request, preset=MemoryPreset.keep)).layers[0]
        plans = [whole, *(LayerPlan.of(x=place) for place in (Residence.hbm, Residence.host, Residence.ssd))]
        problem = Problem(
            tuple(Column(plan, request.shape().cost(plan)) for plan in plans),
            *(request.cost(), request.budgets(), request.rates(), request.prefetch_layers),
        )
        expected, solution = real_brute_force(problem), solve_milp(problem, gap=0.0)
        assert expected is not None
        assert solution.layers is not None
        assert problem.rank(solution.layers)[:2] == pytest.approx(expected[:2], rel=1e-9)


def test_auto_takes_the_faster_sweep() -> None:
    """By chunk where the device is so small that the sweep by layer must take head groups or does not fit."""
    request = replace(requests()["device"], model=replace(TINY, num_layers=3), seq_len=16384)
    roomy = solve_plan(replace(request, device_budget_bytes=None))
    assert roomy.sweep is Sweep.by_layer
    chunks = find_plan(replace(request, preset=MemoryPreset.chunk_auto, device_budget_bytes=None))
    assert chunks is not None
    assert priced.seconds(roomy, request).total < priced.seconds(chunks, request).total
    tight = replace(request, device_budget_bytes=least_peak(request) // 2)
    assert not lean_fits(replace(tight, head_groups=2))
    plan = solve_plan(tight)
    assert (plan.name, plan.sweep, plan.solver) == ("auto", Sweep.by_chunk, Solver.chunks)
    for blocked in (
        replace(tight, sequence_degree=2),
        replace(tight, head_groups=2),
        replace(tight, buckets=(16, 16384)),
    ):
        assert chunk_plan(blocked) is None
    for shared in ({"tensor_degree": 2}, {"sequence_degree": 2, "ulysses": 2}):
        assert chunk_plan(replace(tight, **shared)) is not None


def test_auto_takes_the_shorter_tiles_of_alst_where_the_usual_ones_do_not_fit() -> None:
    """Found by random configurations: auto refused a budget that memory=alst holds."""
    request = replace(requests()["device"], model=replace(TINY, intermediate_size=512), chunk_size=2048)
    request = replace(request, seq_len=2048, head_groups=1, sweep=Sweep.by_layer, device_budget_bytes=None)
    usual, alst = (
        asked_plan(replace(request, preset=preset)) for preset in (MemoryPreset.offload_host, MemoryPreset.alst)
    )
    most, least = (priced.wanted_bytes(plan, request)[Medium.hbm] for plan in (usual, alst))
    assert alst.cuts.token_tile < usual.cuts.token_tile
    assert least < 0.8 * most
    for budget, tile in ((most, usual.cuts.token_tile), (least, alst.cuts.token_tile)):
        plan = solve_plan(replace(request, device_budget_bytes=budget))
        assert plan.cuts.token_tile == tile
        assert priced.wanted_bytes(plan, request)[Medium.hbm] <= budget
    assert find_plan(replace(request, device_budget_bytes=least - 4096)) is None


def test_the_groups_are_what_moves_together() -> None:
    request = requests()["device"]
    expected = [("x",), ("q", "k", "v"), ("out", "lse"), ("residual",), ("gate", "up")]
    assert groups(request.shape().schedule) == expected
    cut = replace(request, head_groups=2).shape().schedule
    assert [sorted({name.split(":")[0] for name in group}) for group in groups(cut)] == list(map(sorted, expected))


def test_the_ssd_of_unknown_speed_is_the_last_resort() -> None:
    request = requests()["host and SSD"]
    unknown = replace(request.profile, ssd_write_gbps=None, ssd_read_gbps=None)
    problem = problem_of(replace(request, profile=unknown))
    least = min(problem.work(layers).ssd for layers in [found_layers(problem)])
    without = problem_of(replace(request, profile=unknown, ssd_budget_bytes=0))
    assert (greedy(without) is not None) == (least == 0)
    tight = problem_of(replace(request, profile=unknown, host_budget_bytes=0, device_budget_bytes=least_peak(request)))
    assert problem_needs_ssd(tight)


def found_layers(problem: Problem) -> Layers:
    found = solve(problem)
    assert found is not None
    return found.layers


def least_peak(request: PlanRequest) -> int:
    """A device that has room only where every input leaves."""
    plan = asked_plan(replace(request, preset=MemoryPreset.offload_ssd))
    return priced.wanted_bytes(plan, request)[Medium.hbm]


def problem_needs_ssd(problem: Problem) -> bool:
    return problem.work(found_layers(problem)).ssd > 0


def test_a_budget_of_writes_holds() -> None:
    request = replace(requests()["host and SSD"], host_budget_bytes=0)
    free = problem_of(request)
    work = free.work(found_layers(free))
    assert work.ssd > 0
    may = work.ssd / free.seconds(work) / 2
    bound = replace(free, ssd_wear_bytes_per_s=may)
    layers = found_layers(bound)
    work = bound.work(layers)
    assert work.ssd <= may * bound.seconds(work) * (1 + 1e-6)


def test_a_rating_of_the_drive_bounds_what_auto_writes() -> None:
    request = replace(requests()["host and SSD"], host_budget_bytes=0)
    plan = solve_plan(request)
    step_s, written = priced.seconds(plan, request).total, priced.work_of(plan, request).ssd
    assert written > 0
    rated = replace(request, ssd_wear_bytes_per_s=written / step_s / 2)
    bound = solve_plan(rated)
    assert priced.work_of(bound, rated).ssd < written
    # A drive that wears out in a day is written all the same where nothing else fits.
    needed = replace(request, device_budget_bytes=least_peak(request), ssd_wear_bytes_per_s=1.0)
    assert priced.work_of(solve_plan(needed), needed).ssd > 0


def test_what_fits_at_all_is_what_the_leanest_treatment_fits() -> None:
    """So a request is refused without a search."""
    fitting = refused = 0
    for seed in range(40):
        draw = random.Random(seed)
        model = replace(TINY, num_layers=draw.randint(1, 4), qk_norm=draw.random() < 0.3)
        request = PlanRequest(model=model, seq_len=draw.choice([64, 512, 1500]), profile=RATED)
        shape = request.shape()
        keep = shape.cost(asked_plan(replace(request, preset=MemoryPreset.keep)).layers[0])
        request = replace(
            request,
            device_budget_bytes=int(keep.backward * draw.uniform(0.4, 1.6)),
            host_budget_bytes=int(keep.held * draw.choice([0, 0.1, 1])),
            ssd_budget_bytes=int(keep.held * draw.choice([0, 0.1, 1])),
            prefetch_layers=draw.choice([0, 1, 1, 2]),
        )
        fits = lean_fits(request)
        assert (solve(problem_of(request)) is not None) == fits, seed
        fitting, refused = fitting + fits, refused + (not fits)
    assert min(fitting, refused) > 5


@pytest.mark.parametrize(("num_layers", "more_gib"), [(40, 40), (80, 200)])
def test_a_deep_model_is_solved_quickly(num_layers: int, more_gib: int) -> None:
    """CPU seconds: 40 layers within the 2 s of `headrace plan`, 80 within 5."""
    model = replace(QWEN_7B, num_layers=num_layers)
    request = PlanRequest(model=model, seq_len=262144, profile=H200, itemsize=2, host_budget_bytes=1000 << 30)
    fixed = request.cost().fixed_bytes
    request = replace(request, device_budget_bytes=fixed + (more_gib << 30), ssd_budget_bytes=2000 << 30)
    start = time.process_time()
    assert find_plan(request) is not None
    assert time.process_time() - start < num_layers / 20


def test_where_time_is_up_the_better_plan_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.platform.planning import milp
    from headrace.platform.planning import solve as module

    problem = problem_of(requests()["tight device"])
    monkeypatch.setattr(milp, "solve_milp", lambda problem, start: Solution(start, is_proven=False))
    found = solve(problem)
    assert found is not None
    assert found.solver is Solver.greedy
    plan = find_plan(requests()["tight device"])
    assert plan is not None
    assert MemoryPlan.from_dict(plan.to_dict()).solver == "greedy"
    monkeypatch.setattr(module, "greedy", lambda problem, start=None: start)
    better = found.layers
    monkeypatch.setattr(milp, "solve_milp", lambda problem, start: Solution(better, is_proven=False))
    again = solve(problem)
    assert again is not None
    assert again.solver is Solver.milp_in_time


def test_predicted_has_every_metric_of_the_run() -> None:
    request = PlanRequest(model=TINY, seq_len=1024, profile=RATED, ranks_per_node=2, micro_batches=3)
    host = request.shape().cost(LayerPlan.of(x=Residence.host))
    one = host.host
    request = replace(
        request,
        device_budget_bytes=max(host.backward + 3 * one, request.cost().head_bytes),
        host_budget_bytes=2 * one,
        ssd_budget_bytes=6 * one,
    )
    plan = solve_plan(request)
    wanted = {v for v in vars(names).values() if isinstance(v, str) and v.startswith(("mem/", "io/"))}
    wanted |= {names.STEP_S, names.FORWARD_S, names.BACKWARD_S}
    wanted -= {names.HOST_TENSOR_GIB, names.SSD_TENSOR_GIB}  # of single tensors
    # What compares with the plan, and what is the drive's and not the run's.
    wanted -= {name for name in wanted if name.endswith("_drift_pct")}
    wanted -= {names.SSD_WRITTEN_TB, names.SSD_LIFE_USED_PCT, names.SSD_BUDGET_USED_PCT, names.SSD_DAYS_LEFT}
    assert set(plan.predicted) == wanted
    stored = priced.work_of(plan, request)
    assert min(stored.host, stored.ssd) > 0
    assert plan.predicted[names.SSD_STORED_GIB] == 3 * stored.ssd / GIB
    assert plan.predicted[names.D2H_GBPS] == 2.0
    # A drive that reads faster than its link brings no more than the link; both ranks share both.
    assert plan.predicted[names.SSD_READ_GBPS] == 2.5
    assert plan.predicted[names.SSD_WRITE_GBPS] == 0.25
    wanted = priced.wanted_bytes(plan, request)
    assert slab_bytes_per_node(plan, request) == {tier: 2 * wanted[tier] for tier in (Medium.host, Medium.ssd)}


@pytest.mark.parametrize("prefetch_layers", [0, 1, 3])
def test_predicted_loads_leave_out_what_the_sources_answer(prefetch_layers: int) -> None:
    """As moved_bytes says, which the sweep's tests compare with what the tiers moved."""
    model = replace(TINY, num_layers=4)
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


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(24))
def test_another_order_of_real_treatments_gains_little(brute_force: Callable[[Problem], Any], seed: int) -> None:
    """Six treatments of a block in tight budgets, all assignments of five blocks in all orders."""
    draw = random.Random(seed)
    model, request = (TINY, requests()["device"]) if seed % 2 else (QWEN_7B, LARGE)
    request = replace(request, model=replace(model, num_layers=5))
    whole = problem_of(request)
    columns = tuple(draw.sample(whole.columns, 6))
    most = max(column.cost.backward for column in columns)
    device = int(whole.cost.fixed_bytes + whole.cost.block_transient_bytes + most * draw.uniform(0.9, 2.5))
    tiers = {Medium.hbm: device} | {
        tier: draw.choice([None, int(most * draw.uniform(0.2, 3))]) for tier in (Medium.host, Medium.ssd)
    }
    problem = Problem(columns, whole.cost, Budgets(tiers), whole.rates, 1)
    if all(column.cost.away for column in columns):
        return
    expected, solution = brute_force(problem), solve_milp(problem, gap=0.0, time_limit_s=60)
    assert (expected is None) == (solution.layers is None)
    if expected is not None and solution.layers is not None:
        assert problem.rank(solution.layers)[1] <= 1.005 * expected[0][1]
