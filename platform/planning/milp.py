"""The shortest step that every budget holds, as a mixed-integer linear program (HiGHS). No torch.

Variables, with one value for every column c in the order of the layers (problem.py); all but the last layer count:

    n_c      layers that are treated so, a whole number          y_c = 1 where n_c >= 1, z_c = 1 where n_c >= 2
    t_c      1 for the treatment of the last layer, 0 for the others
    r_c      bytes that stay of the layers of the columns up to c
    q_c      bytes that the last of these layers moves: they are on the device beside the next layer's own
    s, l     exposed seconds of stores (forward) and of loads (backward)

With need_c the most bytes of one layer's own, h_c what stays of it, a_c what it moves:

    the last layer of c     r_c - h_c + need_c <= room                    where y_c; with a_c beside it where z_c
    the first one           r_(c-1) + q_(c-1) + need_c <= room            where y_c
    the last one of all, the final norm, the loss                         always

Stores hide behind the forward pass of the blocks that move something and of one more; loads behind the backward pass of
the blocks that load, less what the longest of them computes again (predict.Work). So the program is exact for
prefetch_layers up to 1; with more the bytes that move count prefetch_layers times.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from headrace.platform.planning.greedy import greedy
from headrace.platform.planning.problem import GAP, Layers, Problem
from headrace.storage.core.records import Medium

TIME_LIMIT_S = 1.0
# Treatments in one plan, beside that of the last layer: a plan must be readable, and more of them gain little.
MOST_KINDS = 6
# The tolerances of HiGHS are absolute: the largest layer counts so many units of bytes, the step so many of seconds.
LAYER_UNITS = 100.0
STEP_UNITS = 1000.0
TOLERANCE = 1e-6
SOLVE_ERROR = 4  # a status of scipy.optimize.milp

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Terms = Iterable[tuple[Any, Any]]


@dataclass(frozen=True)
class Solution:
    """What HiGHS found.

    Args:
        layers: None: nothing fits, or nothing was found in time.
        is_proven: no other plan is better by more than the gap; with no layers: nothing fits.
    """

    layers: Layers | None
    is_proven: bool


def solve_milp(
    problem: Problem, start: Layers | None = None, *, gap: float = GAP, time_limit_s: float = TIME_LIMIT_S
) -> Solution:
    """The best assignment.

    Args:
        start: one that holds the budgets: what is no better by more than the gap is not looked for.
        gap: share of each goal (Problem.rank) by which another plan may be better.
        time_limit_s: of each goal.
    """
    if problem.cost.num_layers == 1:
        return Solution(greedy(problem), is_proven=True)  # it tries every treatment
    formulation, layers, is_proven = _Formulation(problem), start, True
    for goal in formulation.goals():
        layers, is_sure = formulation.improved(goal, layers, gap, time_limit_s)
        is_proven &= is_sure
        if layers is None:
            break
        formulation.at_most(formulation.value(goal, layers) + TOLERANCE, [(slice(None), goal)])
    return Solution(layers, is_proven)


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """HiGHS prints a line of its own at times, and programs read the last line on stdout: what it prints is dropped."""
    sys.stdout.flush()
    out, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(out, 1)
        os.close(out)
        os.close(nowhere)


@dataclass
class _Part:
    """Variables with one value for every column."""

    start: int
    num: int

    @property
    def all(self) -> slice:
        return slice(self.start, self.start + self.num)

    def __getitem__(self, column: int) -> int:
        return self.start + column


@dataclass
class _Columns:
    """Prices of the columns in units of bytes and of seconds."""

    problem: Problem
    held: Numbers = field(init=False)
    away: Numbers = field(init=False)
    host: Numbers = field(init=False)
    ssd: Numbers = field(init=False)
    host_slots: Numbers = field(init=False)
    ssd_slots: Numbers = field(init=False)
    forward: Numbers = field(init=False)
    backward: Numbers = field(init=False)

    def __post_init__(self) -> None:
        costs = [column.cost for column in self.problem.columns]
        self.byte = max(1, *(max(c.forward, c.backward) for c in costs)) / LAYER_UNITS
        for name in ("held", "away", "host", "ssd", "host_slots", "ssd_slots", "forward", "backward"):
            setattr(self, name, np.array([getattr(cost, name) for cost in costs]) / self.byte)
        self.moves = (self.away > 0).astype(float)
        self.flops = np.array([cost.rerun_flops for cost in costs], dtype=float)
        rates, whole = self.problem.rates, self.problem.cost.whole_flops
        slowest = min((rate for rate in vars(rates).values() if rate is not None), default=1.0)
        moved_s = self.problem.cost.num_layers * self.away.max() * self.byte / slowest
        self.second = (whole / rates.flops if rates.flops else moved_s or 1.0) / STEP_UNITS
        self.rerun = self.compute(self.flops)

    def compute(self, flops: Any) -> Any:
        """Units of seconds; 0 where the rate is unknown."""
        rate = self.problem.rates.flops
        return flops / rate / self.second if rate else 0.0 * flops

    def transfer(self, units: Numbers, rate: float) -> Numbers:
        """Units of seconds."""
        return units * self.byte / rate / self.second


class _Formulation:
    """The program of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.columns = problem, _Columns(problem)
        self.num = num = len(problem.columns)
        self.others = problem.cost.num_layers - 1
        self.n, self.y, self.z, self.t, self.q, self.r = (_Part(part * num, num) for part in range(6))
        self.stores, self.loads, self.longest, self.any, self.one = range(6 * num, 6 * num + 5)
        self.rows: list[Numbers] = []
        self.limits: list[tuple[float, float]] = []
        self.lower, self.upper = np.zeros(6 * num + 5), np.full(6 * num + 5, np.inf)
        self.upper[self.n.all], self.upper[self.y.all], self.upper[self.z.all] = self.others, 1, 1
        self.upper[self.t.all] = 1 - self.columns.moves
        self.upper[[self.any, self.one]] = self.lower[self.one] = 1
        self.integral = np.ones(6 * num + 5)
        self.integral[self.q.all] = self.integral[self.r.all] = 0
        self.integral[[self.stores, self.loads, self.longest, self.one]] = 0
        self._counts()
        self._device()
        self._tiers()
        self._links()

    def row(self, terms: Terms) -> Numbers:
        """The coefficients of all variables, from those of some."""
        row = np.zeros(len(self.lower))
        for where, values in terms:
            row[where] += values
        return row

    def at_most(self, limit: float, terms: Terms) -> None:
        """A constraint from above."""
        self.rows.append(self.row(terms))
        self.limits.append((-np.inf, limit))

    def exactly(self, value: float, terms: Terms) -> None:
        """An equation."""
        self.rows.append(self.row(terms))
        self.limits.append((value, value))

    def _counts(self) -> None:
        self.exactly(self.others, [(self.n.all, 1)])
        self.exactly(1, [(self.t.all, 1)])
        for c in range(self.num):
            self.at_most(0, [(self.n[c], 1), (self.y[c], -self.others)])
            self.at_most(0, [(self.n[c], -1), (self.y[c], 1)])
            self.at_most(1, [(self.n[c], 1), (self.z[c], 1 - max(1, self.others))])
        self.at_most(MOST_KINDS, [(self.y.all, 1)])
        self.at_most(0, [(self.any, 1), (self.n.all, -self.columns.moves)])

    def _device(self) -> None:
        """The device's budget and, where the device is in host memory, what both may take of that together."""
        budgets, fixed = self.problem.budgets, self.problem.cost.fixed_bytes
        limits: list[tuple[float, Numbers]] = []
        if (device := budgets[Medium.hbm]) is not None:
            limits.append((device - fixed, np.zeros(self.num)))
        if budgets.memory is not None and budgets.device_is_memory:
            limits.append((budgets.memory - budgets.process_bytes - fixed, self.columns.host_slots))
        for room, beside in limits:
            self._peaks(room / self.columns.byte, beside)
        if limits:
            self._carried()

    def _peaks(self, room: float, beside: Numbers) -> None:
        """No moment of the step is above the room; `beside` is what every layer takes of it beside the device."""
        cost, ahead, columns = self.problem.cost, self.problem.prefetch_layers, self.columns
        at_work = room - cost.block_transient_bytes / columns.byte
        if ahead == 1:
            self._in_order(at_work, np.maximum(columns.forward, columns.backward), 1, beside)
        else:
            self._in_order(at_work, columns.forward, 1, beside)
            self._in_order(at_work, columns.backward, ahead, beside)
        stays = [(self.n.all, columns.held + beside), (self.t.all, columns.held)]
        norm = self.problem.norm
        self.at_most(at_work - max(norm.forward, norm.backward) / columns.byte, stays)
        if ahead > 1:
            early = [(self.q[self.num - 1], ahead - 1)]
            self.at_most(at_work - norm.backward / columns.byte, [*stays, *early])
        head = cost.head_bytes + cost.head_transient_bytes + norm.held
        self.at_most(room - head / columns.byte, stays)

    def _in_order(self, room: float, need: Numbers, times: int, beside: Numbers) -> None:
        """The moments of the layers' own work; `times`: so many layers' moved bytes are there beside one layer's."""
        held, away = self.columns.held, self.columns.away
        # Without a layer of c its rows say no more than that what stays, and what moves, is within these.
        most = room + self.others * beside.max()
        slack = most + times * away.max()
        whole = (self.n.all, beside) if beside.any() else (self.any, 0)
        for c in range(self.num):
            own = need[c] - held[c]
            if times and own + times * away[c] > room:
                self.upper[self.z[c]] = 0
            if own > room or need[c] > room:
                self.upper[self.y[c]] = 0
            self.at_most(most, [(self.r[c], 1), whole, (self.y[c], own + most - room)])
            if times and away[c]:
                self.at_most(most, [(self.r[c], 1), whole, (self.z[c], own + times * away[c] + most - room)])
            if times and c:
                before = [(self.r[c - 1], 1), (self.q[c - 1], times)]
                self.at_most(slack, [*before, whole, (self.y[c], need[c] + slack - room)])
        self.at_most(room, [(self.n.all, held + beside), (self.t.all, need), (self.q[self.num - 1], times)])

    def _carried(self) -> None:
        """q_c: the bytes that move of the last layer so far."""
        away, held = self.columns.away, self.columns.held
        for c in range(self.num):
            self.exactly(0, [(self.r[c], 1), (self.n[c], -held[c]), *([(self.r[c - 1], -1)] if c else [])])
            self.at_most(0, [(self.q[c], -1), (self.y[c], away[c])])
            if c:
                self.at_most(0, [(self.q[c], -1), (self.q[c - 1], 1), (self.y[c], -away.max())])

    def _tiers(self) -> None:
        budgets, columns = self.problem.budgets, self.columns
        rooms = [(budgets[Medium.host], columns.host_slots), (budgets[Medium.ssd], columns.ssd_slots)]
        if budgets.memory is not None and not budgets.device_is_memory:
            rooms.append((budgets.host_room(0), columns.host_slots))
        for room, slots in rooms:
            if room is not None:
                self.at_most(room / columns.byte, [(self.n.all, slots)])

    def _links(self) -> None:
        """Exposed seconds, and the endurance of the drives."""
        rates, cost, columns = self.problem.rates, self.problem.cost, self.columns
        window, back, again = (columns.compute(f) for f in (cost.block_flops, cost.backward_flops, columns.flops))
        hides = bool(self.problem.prefetch_layers)
        ways = [(columns.away, rates.d2h, rates.h2d), (columns.ssd, rates.ssd_write, rates.ssd_read)]
        for moved, store, load in ways:
            if store is not None:
                exposed = columns.transfer(moved, store) - window * columns.moves
                self.at_most(0, [(self.n.all, exposed), (self.any, -window), (self.stores, -1)])
            if load is not None:
                exposed = columns.transfer(moved, load) - hides * (back + again) * columns.moves
                self.at_most(0, [(self.n.all, exposed), (self.longest, hides), (self.loads, -1)])
        for c in map(int, np.flatnonzero(again * columns.moves)):
            self.at_most(0, [(self.longest, -1), (self.y[c], again[c])])
        if (wear := self.problem.ssd_wear_bytes_per_s) is not None and self.problem.knows_ssd:
            written = columns.transfer(columns.ssd, wear)
            self.at_most(0, [(self.n.all, written), (slice(None), -self.seconds())])

    def seconds(self) -> Numbers:
        """Of the step, as coefficients."""
        again = self.columns.rerun
        compute = self.columns.compute(self.problem.cost.whole_flops)
        return self.row([(self.n.all, again), (self.t.all, again), ([self.stores, self.loads], 1), (self.one, compute)])

    def goals(self) -> list[Numbers]:
        """What is minimised, most important first, as Problem.rank up to the bytes that move."""
        columns, found = self.columns, [self.seconds()]
        if not self.problem.knows_ssd:
            found.insert(0, self.row([(self.n.all, columns.ssd)]))
        if self.problem.rates.flops is None:
            again = LAYER_UNITS * columns.flops / max(1.0, columns.flops.max())
            found.append(self.row([(self.n.all, again), (self.t.all, again)]))
        return [goal for goal in found if goal.any()]

    def value(self, goal: Numbers, layers: Layers) -> float:
        """A goal of an assignment."""
        problem, columns, point = self.problem, self.columns, np.zeros(len(self.lower))
        work = problem.work(layers)
        point[self.n.all] = np.bincount(layers[:-1], minlength=self.num)
        point[[self.t[layers[-1]], self.one]] = 1
        compute = columns.compute(problem.cost.whole_flops + work.rerun_flops)
        point[self.stores] = problem.seconds(work) / columns.second - compute
        return float(goal @ point)

    def improved(
        self, goal: Numbers, layers: Layers | None, gap: float, time_limit_s: float
    ) -> tuple[Layers | None, bool]:
        """An assignment with a lower goal, or the same one, and whether none is lower by more than the gap."""
        rows, limits = np.array(self.rows), np.array(self.limits)
        upper: Numbers = self.upper
        if layers is not None:
            value = self.value(goal, layers)
            wanted = value - max(gap * abs(value), TOLERANCE)
            narrowed = self._narrowed(goal, wanted)
            if narrowed is None:
                return layers, True
            upper = narrowed
            rows, limits = np.vstack([rows, goal]), np.vstack([limits, (-np.inf, wanted)])
        # Presolve fails on some programs whose best value is within its tolerance of the wanted one.
        for presolve in (True, False):
            with _nothing_on_stdout():
                answer = milp(
                    goal,
                    constraints=LinearConstraint(csr_array(rows), *limits.T),
                    bounds=Bounds(self.lower, upper),
                    integrality=self.integral,
                    options={"mip_rel_gap": gap, "time_limit": time_limit_s, "presolve": presolve},
                )
            if answer.status != SOLVE_ERROR:
                break
        return layers if answer.x is None else self.layers(answer.x), answer.status in (0, 2)

    def _narrowed(self, goal: Numbers, wanted: float) -> Numbers | None:
        """Upper bounds without what no assignment with such a goal has; None where there is none.

        By the linear relaxation: its bound, and with it the reduced cost of every variable.
        """
        rows, limits = np.array(self.rows), np.array(self.limits)
        equal = limits[:, 0] == limits[:, 1]
        relaxed = linprog(
            goal,
            csr_array(rows[~equal]),
            limits[~equal, 1],
            csr_array(rows[equal]),
            limits[equal, 1],
            bounds=np.stack([self.lower, self.upper], axis=1),
        )
        if relaxed.status == 2 or (relaxed.status == 0 and relaxed.fun > wanted):
            return None
        if relaxed.status:
            return self.upper
        upper = self.upper.copy()
        for part in (self.n, self.t):
            upper[part.all][relaxed.fun + relaxed.lower.marginals[part.all] > wanted + TOLERANCE] = 0
        for part in (self.y, self.z):
            upper[part.all] = np.minimum(upper[part.all], upper[self.n.all])
        return upper

    def layers(self, found: Numbers) -> Layers:
        """The assignment of a solution."""
        counts = {c: round(found[self.n[c]]) for c in range(self.num)}
        return self.problem.arranged(counts, int(np.argmax(found[self.t.all])))
