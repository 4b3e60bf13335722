"""The solver against every assignment of small random problems, and the judgement of one assignment."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from headrace.platform.planning.budgets import Budgets
from headrace.platform.planning.columns import Column, pruned
from headrace.platform.planning.greedy import greedy
from headrace.platform.planning.judge import Prices, judge
from headrace.platform.planning.milp import Solution, solve_milp
from headrace.platform.planning.predict import BlockCost, Rates, StepCost
from headrace.platform.planning.problem import Layers, Problem
from headrace.storage.core.records import Medium
from headrace.workers.memory.plan import LayerPlan, Residence

BruteForce = Callable[[Problem], tuple[tuple[float, ...], Layers] | None]
NOTHING = BlockCost(0, 0, 0)


def random_problem(seed: int) -> Problem:
    """Small numbers, so that every constraint binds somewhere in a few dozen draws."""
    draw = random.Random(seed)
    num_layers, each = draw.randint(1, 5), 4096 * draw.randint(1, 2)
    found = []
    for number in range(5 if num_layers < 5 else 4):
        held, own = each * draw.randint(0 if number else 1, 8), each * draw.randint(1, 6)
        host, ssd = (each * draw.randint(0, 4) * draw.randint(0, 1) * (number > 0) for _ in range(2))
        backward = held + host + ssd + own
        cost = BlockCost(backward - draw.randint(0, own), backward, held, host, ssd, host, ssd)
        plan = LayerPlan.of(x=Residence.hbm, **{f"tensor {number}": Residence.hbm})
        found.append(Column(plan, replace(cost, rerun_flops=draw.choice([0.0, 0.0, 3.0, 10.0, 12.0]))))
    norm = BlockCost(draw.randint(0, each), draw.randint(0, 2 * each), draw.randint(0, each))
    cost = StepCost(num_layers, draw.randint(0, 40000), 10.0, draw.choice([0.0, 30.0]), norm=norm)
    most = num_layers * 8 * each + 40000
    tiers = {
        Medium.hbm: draw.choice([None, draw.randint(1, most), draw.randint(1, most)]),
        Medium.host: draw.choice([None, each * draw.randint(0, 10)]),
        Medium.ssd: draw.choice([None, each * draw.randint(0, 10)]),
    }
    memory = draw.choice([None, draw.randint(5000, most)])
    budgets = Budgets(tiers, memory, process_bytes=5000, device_is_memory=draw.random() < 0.5)
    link, drive = draw.choice([None, 500.0, 5000.0]), draw.choice([None, 200.0, 2000.0])
    rates = Rates(draw.choice([None, 1.0, 5.0]), link, link, drive, drive)
    return Problem(tuple(found), cost, budgets, rates, draw.choice([0, 1, 1, 1]), draw.choice([None, None, 500.0]))


def is_best(problem: Problem, solution: Solution, expected: tuple[tuple[float, ...], Layers] | None) -> bool:
    """Whether a solution is as good as the best assignment; a tick is 1e-9 of the step."""
    if expected is None or solution.layers is None:
        return expected is None and solution.layers is None
    found, best = problem.rank(solution.layers), expected[0]
    return (found[0], found[1]) <= (best[0], best[1] + 1)


def check_optimal(brute_force: BruteForce, seeds: Sequence[int]) -> None:
    feasible = infeasible = mixed = behind = other_order = 0
    for seed in seeds:
        problem = random_problem(seed)
        expected, start = brute_force(problem), greedy(problem)
        for first in {start, None}:
            solution = solve_milp(problem, first, gap=0.0, time_limit_s=60)
            assert solution.is_proven, seed
            assert solution.layers is None or problem.excess(solution.layers) == 0, seed
            if not is_best(problem, solution, expected):
                # The order of the layers is a rule: seldom only another one makes the best assignment fit.
                assert expected is not None, seed
                *others, top = expected[1]
                assert problem.excess(problem.arranged(Counter(others), top)) > 0, seed
                other_order += 1
        infeasible += expected is None
        if solution.layers is not None:
            feasible += 1
            mixed += len(set(solution.layers)) > 1
            assert start is None or problem.rank(start)[:2] >= problem.rank(solution.layers)[:2], seed
            behind += start is None or problem.rank(start)[1] > problem.rank(solution.layers)[1] + 1
    assert min(feasible, infeasible, mixed) > 3
    assert other_order <= len(seeds) // 50
    assert behind <= feasible // 10  # the baseline is a good one


def test_the_optimum_is_that_of_every_assignment(brute_force: BruteForce) -> None:
    check_optimal(brute_force, [*range(20, 60), 80, 152, 157, 253, 500, 978])  # the last ones catch what few others do


@pytest.mark.soak
@pytest.mark.parametrize("block", range(10))
def test_the_optimum_is_that_of_every_assignment_of_many_problems(brute_force: BruteForce, block: int) -> None:
    check_optimal(brute_force, range(block * 100, block * 100 + 100))


def test_many_assignments_are_judged_as_one_is() -> None:
    for seed in range(60):
        problem = random_problem(seed)
        draw, num = random.Random(seed), len(problem.columns)
        fixed = [number for number, column in enumerate(problem.columns) if not column.cost.away]
        others = [[draw.randrange(num) for _ in range(problem.cost.num_layers - 1)] for _ in range(8)]
        tops = [draw.choice(fixed) for _ in others]
        counts = np.array([np.bincount(row, minlength=num) for row in others])
        found = judge(problem, Prices.of(problem), counts, np.array(tops))
        for number, (row, top) in enumerate(zip(others, tops, strict=True)):
            layers = problem.arranged(Counter(row), top)
            assert found.at(number)[1:] == pytest.approx(problem.rank(layers)), seed
            assert (found.excess[number] == 0) == (problem.excess(layers) == 0), seed


def test_a_treatment_that_another_one_beats_is_left_out() -> None:
    good, bad, other = (BlockCost(4, 6, 2), BlockCost(4, 7, 2), BlockCost(4, 7, 1))
    plans = [LayerPlan.of(x=Residence.hbm, **{name: Residence.hbm}) for name in "abcd"]
    found = [Column(plan, cost) for plan, cost in zip(plans, (bad, good, other, good), strict=True)]
    assert {column.plan for column in pruned(found)} == {plans[1], plans[2]}


def test_layers_that_the_device_cannot_tell_apart_take_turns() -> None:
    kept, moved = BlockCost(9, 9, 9), BlockCost(5, 8, 0, host=2, host_slots=2)
    plans = [LayerPlan.of(x=place) for place in (Residence.hbm, Residence.host, Residence.ssd)]
    costs = [kept, moved, replace(moved, host=0, host_slots=0, ssd=2, ssd_slots=2)]
    found = tuple(Column(plan, cost) for plan, cost in zip(plans, costs, strict=True))
    problem = Problem(found, StepCost(8, 0, 1.0, 1.0, norm=NOTHING), Budgets(dict.fromkeys(Medium)), Rates(), 1)
    of = {next(iter(column.plan.stretches.values()))[0].residence: n for n, column in enumerate(problem.columns)}
    hbm, host, ssd = of[Residence.hbm], of[Residence.host], of[Residence.ssd]
    assert problem.arranged({host: 4, ssd: 2, hbm: 1}, hbm) == (host, ssd, host, host, ssd, host, hbm, hbm)
