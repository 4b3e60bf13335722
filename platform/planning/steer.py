"""Compares a run with its plan, corrects the rates by what it measured, and plans again where that pays. No torch.

Rates are corrected by ratio: of compute from the seconds of a step that no transfer and no data is waited for, of links
and drives from the rate while they move. A plan of memory=auto is then solved again with the same cuts, inside the
slabs that are open, so no bit of the run changes; a chosen preset is compared, and never changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean, median
from typing import Any

from headrace.platform.planning.lengths import Plans, plan_record
from headrace.platform.planning.predict import Correction
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.platform.planning.solve import find_plan, predict
from headrace.platform.tracking.aggregate import aggregate
from headrace.storage.core.records import Medium
from headrace.workers.job import NewPlan, TrainJob
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import REPLANNED, RankEvent, StepReport
from headrace.workers.train.drift import LEAST_BYTES
from headrace.workers.train.predicted import mixed

# Steps that are judged together: the median of fewer follows a single slow one.
WINDOW = 5
# A rate that is off by less is corrected no further: steps of one run differ by as much.
LEAST_CHANGE = 0.1
# A share of the step. Predicted steps of two plans that differ by less may come out the other way round.
LEAST_GAIN = 0.05
# What a change costs, in steps: the first one under a plan allocates its buffers.
COST_STEPS = 1
LINKS = {
    "d2h": (names.D2H_GBPS, names.HOST_STORED_GIB),
    "h2d": (names.H2D_GBPS, names.HOST_LOADED_GIB),
    "ssd_write": (names.SSD_WRITE_GBPS, names.SSD_STORED_GIB),
    "ssd_read": (names.SSD_READ_GBPS, names.SSD_LOADED_GIB),
}
WORDS = {"flops": "compute", "d2h": "to host", "h2d": "from host", "ssd_write": "to SSD", "ssd_read": "from SSD"}
Steps = Sequence[Mapping[str, float]]


class Steering:
    """Hears every report of a run, and says when its ranks are to change their plan, and to which.

    Args:
        request: what the plans were solved for.
        plans: of every length of the rows.
        slabs: bytes per node of the tiers that are open.
        shares: of every length, its share of the run's micro-batches.
        record: plan.json of the run's last start, whose history goes on.
        checks: whether to compare, correct and plan again. False for a pipeline, where every rank has a request of its
            own and waits for others.
    """

    def __init__(
        self,
        request: PlanRequest,
        plans: Plans,
        slabs: Mapping[Medium, int],
        *,
        shares: Mapping[int, float],
        num_ranks: int,
        num_steps: int,
        record: Mapping[str, Any],
        checks: bool = True,
    ) -> None:
        self._request, self.plans, self._shares, self._checks = request, plans, shares, checks
        self._slabs = {tier: num_bytes // request.ranks_per_node for tier, num_bytes in slabs.items()}
        self._num_ranks, self._num_steps = num_ranks, num_steps
        history = record.get("replans")
        self._history: list[dict[str, Any]] = list(history) if isinstance(history, list) else []
        self._num_changes = 0
        self._predicted = self._mean({length: plan.predicted for length, plan in plans.items()})
        self._last_step: dict[int, int] = {}
        self._by_rank: dict[int, dict[int, Mapping[str, float]]] = {}
        self._first_step: int | None = None
        self._window: list[Mapping[str, float]] = []
        self._sent: NewPlan | None = None
        self._entry: dict[str, Any] = {}
        self._is_due = self._is_checked = self._is_new = self._is_spent = False

    @property
    def number(self) -> int:
        """Changes of plan that the run has made."""
        return len(self._history)

    @property
    def record(self) -> dict[str, Any]:
        """The content of plan.json: the plan now, what rates are corrected by, and the plans before."""
        corrected = {"hardware": self._request.profile.name, **asdict(self._request.correction)}
        record = plan_record(self.plans, self._request, self._shares)
        return record | {"correction": corrected, "replans": self._history}

    def hear(self, report: StepReport) -> list[RankEvent]:
        """A rank has finished a step. Returns what there is to say."""
        if not self._checks:
            return []
        if self._first_step is None or report.step <= self._last_step.get(report.rank, 0):
            # The first step of a start allocates.
            self._begin(report.step + 1)
        self._last_step[report.rank] = report.step
        if any(event.kind == REPLANNED for event in report.events):
            self._changed(report.step)
        ranks = self._by_rank.setdefault(report.step, {})
        ranks[report.rank] = report.metrics
        if len(ranks) < self._num_ranks:
            return []
        del self._by_rank[report.step]
        assert self._first_step is not None, "a report has come"
        if report.step < self._first_step or self._sent is not None:
            return []
        return self._judge(report.step, aggregate(ranks))

    def take_plan(self) -> NewPlan | None:
        """The plan that all ranks are to be told; once."""
        new, self._is_due = (self._sent if self._is_due else None), False
        return new

    def take_record(self) -> dict[str, Any] | None:
        """The content of plan.json where it has changed since the last call."""
        is_new, self._is_new = self._is_new, False
        return self.record if is_new else None

    def job(self, job: TrainJob) -> TrainJob:
        """The job of a group that is started now: with the newest plan."""
        if self._sent is not None:
            self._changed(1 + min(self._last_step.values(), default=0))
        return job.changed(NewPlan(self.number, self.plans)) if self.number > job.num_replans else job

    def _begin(self, first_step: int) -> None:
        """Steps from this one on are judged."""
        self._first_step, self._window = first_step, []
        self._by_rank.clear()
        self._last_step.clear()

    def _judge(self, step: int, metrics: Mapping[str, float]) -> list[RankEvent]:
        """One step of all ranks."""
        if metrics.get(names.SSD_BUDGET_USED_PCT, 0.0) >= 100.0 and not self._is_spent and self._may_plan:
            self._is_spent = True
            return self._avoid_drive(step)
        self._window.append(metrics)
        if len(self._window) < WINDOW:
            return []
        window, self._window = self._window, []
        found = corrected(self._request, self._predicted, window, self._num_ranks)
        is_first, self._is_checked = not self._is_checked, True
        changed = change(self._request.correction, found) >= LEAST_CHANGE
        correction = found if changed else self._request.correction
        events = [self._checked(step, window, correction)] if is_first or changed else []
        if changed:
            self._request, self._is_new = replace(self._request, correction=found), True
            self._predicted = self._mean(self._priced(self.plans))
            events += self._plan_again(step) if self._may_plan else []
        return events

    @property
    def _may_plan(self) -> bool:
        return self._request.preset is MemoryPreset.auto

    def _plan_again(self, step: int) -> list[RankEvent]:
        """Change the plan where the steps that are left gain more than the change costs."""
        new = self._solved(self._in_slabs)
        before = self._predicted.get(names.STEP_S)
        after = None if new is None else self._mean(self._priced(new)).get(names.STEP_S)
        if new is None or before is None or after is None:
            return []
        events = self._larger_tiers(step, min(before, after))
        gain = 1.0 - after / before
        if gain < LEAST_GAIN or gain * (self._num_steps - step) <= COST_STEPS:
            return events
        why = f"at the corrected rates a step takes {before:.3g} s, and {after:.3g} s with another plan"
        return [self._send(step, new, why, before, after), *events]

    def _larger_tiers(self, step: int, step_s: float) -> list[RankEvent]:
        """Say what the whole budgets would gain: tiers are opened once, as large as the first plan needs them."""
        best = self._solved(self._request)
        best_s = None if best is None else self._mean(self._priced(best)).get(names.STEP_S)
        if best_s is None or best_s > (1.0 - LEAST_GAIN) * step_s:
            return []
        text = f"after step {step}: at the corrected rates a step would take {best_s:.3g} s with tiers that are larger "
        text += "than the open ones, and within the budgets; stop the run, and `headrace train --resume` opens them"
        return [RankEvent("larger_tiers", text, {"step_s": step_s, "larger_step_s": best_s})]

    def _avoid_drive(self, step: int) -> list[RankEvent]:
        """The drive's write budget is spent: go on without the drive, whatever that costs."""
        why = "the write budget of the drive up to today is spent"
        self._request, self._slabs[Medium.ssd] = replace(self._request, ssd_budget_bytes=0), 0
        new = self._solved(self._in_slabs)
        if new is None:
            return [RankEvent("replan", f"after step {step}: {why}, and no plan without the drive fits: it goes on")]
        before, after = (self._mean(self._priced(plans)).get(names.STEP_S) for plans in (self.plans, new))
        return [self._send(step, new, why, before, after)]

    def _send(
        self, step: int, new: dict[int, MemoryPlan], why: str, before: float | None, after: float | None
    ) -> RankEvent:
        self._sent, self._is_due = NewPlan(self.number + 1, new), True
        self._entry = {"number": self.number + 1, "after_step": step, "why": why}
        self._entry |= {"step_s": before, "new_step_s": after, "correction": asdict(self._request.correction)}
        text = f"after step {step}: {why}; the ranks change to it together, and no bit changes"
        return RankEvent("replan", text, self._entry)

    def _changed(self, step: int) -> None:
        """All ranks follow the plan that they were told, from this step on."""
        if self._sent is None:
            return
        self._history.append(
            {**self._entry, "first_step": step, "plan": plan_record(self.plans, self._request, self._shares)}
        )
        self.plans, self._sent, self._is_new = self._sent.plans, None, True
        self._predicted = self._mean(self._priced(self.plans))
        # Every change waits twice as long as the one before: rates that swing do not make the plan swing.
        self._num_changes += 1
        self._first_step, self._window = step + WINDOW * 2**self._num_changes, []

    @property
    def _in_slabs(self) -> PlanRequest:
        """The request at the corrected rates, for the tiers that are open."""
        host, ssd = self._slabs[Medium.host], self._slabs[Medium.ssd]
        return replace(self._request, host_budget_bytes=host, ssd_budget_bytes=ssd)

    def _solved(self, request: PlanRequest) -> dict[int, MemoryPlan] | None:
        """Plans with the cuts of those at work; None: they do not fit."""
        found = {}
        for length, plan in self.plans.items():
            own = request.of_length(length).with_cuts_of(plan)
            new = find_plan(own)
            if new is None or (new.sweep, new.cuts) != (plan.sweep, plan.cuts):
                return None
            peak = round(new.predicted[names.GPU_PEAK_GIB] * GIB)
            # Without an accelerator the whole slabs lie in host memory beside the device's bytes.
            if own.budgets().shortages({Medium.hbm: peak, Medium.host: self._slabs[Medium.host], Medium.ssd: 0}):
                return None
            found[length] = new
        return found

    def _priced(self, plans: Plans) -> dict[int, Mapping[str, float]]:
        """What plans cost at the corrected rates."""
        return {length: predict(plan, self._request.of_length(length)) for length, plan in plans.items()}

    def _mean(self, predicted: Mapping[int, Mapping[str, float]]) -> Mapping[str, float]:
        return mixed(predicted, self._shares)

    def _checked(self, step: int, window: Steps, found: Correction) -> RankEvent:
        """What was predicted of the last steps, what was measured, and what rates are corrected by."""
        facts = {}
        for name in (name for name in self._predicted if any(name in each for each in window)):
            measured = median(each[name] for each in window if name in each)
            facts[name] = {"predicted": self._predicted[name], "measured": measured}
        shown = facts.get(names.STEP_S, {})
        text = f"steps {step - len(window) + 1} to {step}"
        if shown:
            text += f": {shown['measured']:.3g} s a step, the plan predicts {shown['predicted']:.3g} s"
        rates = ", ".join(f"{WORDS[name]} {ratio:.2g} x" for name, ratio in asdict(found).items() if ratio != 1.0)
        text += f"; rates are corrected: {rates}" if rates else ""
        if not self._may_plan:
            text += f"; memory={self._request.preset.value} stays as it is, memory=auto would plan again"
        return RankEvent("plan_checked", text, {"compared": facts, "correction": asdict(found)})


def corrected(request: PlanRequest, predicted: Mapping[str, float], steps: Steps, num_ranks: int) -> Correction:
    """What the rates of a request are to be multiplied by so that it predicts what these steps measured.

    Args:
        predicted: of a step, at the request's correction.
        steps: metrics of all ranks together.
    """
    was, rates = asdict(request.correction), request.rates()
    found = dict(was)
    middle = fmean if request.buckets else median  # steps of several lengths differ, and are predicted as their mean
    busy_s = middle(_busy_s(step) for step in steps)
    if names.STEP_S in predicted and busy_s > 0.0:
        found["flops"] = was["flops"] * _busy_s(predicted) / busy_s
    for link, (rate_name, moved_name) in LINKS.items():
        seen = [step[rate_name] for step in steps if step.get(moved_name, 0.0) * GIB >= num_ranks * LEAST_BYTES]
        rate = getattr(rates, link)
        if len(seen) < len(steps) or rate is None:
            continue
        measured = median(seen) * 1e9
        cable = {"ssd_write": rates.d2h, "ssd_read": rates.h2d}.get(link)
        if cable is not None and cable < rate and measured > (1.0 - LEAST_CHANGE) * cable:
            continue  # the link was full: it says nothing about the drive
        found[link] = was[link] * measured / rate
    return Correction(**found)


def change(one: Correction, other: Correction) -> float:
    """The largest change of a rate, as a share: 0.1 where one of them is 1.1 times as fast or as slow."""
    before, after = asdict(one), asdict(other)
    return max(math.exp(abs(math.log(after[name] / rate))) - 1.0 for name, rate in before.items())


def _busy_s(step: Mapping[str, float]) -> float:
    """Seconds of a step in which the device had work."""
    return step[names.STEP_S] * (1.0 - step.get(names.EXPOSED_PCT, 0.0) / 100.0) - step.get(names.DATA_WAIT_S, 0.0)
