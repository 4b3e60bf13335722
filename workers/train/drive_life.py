"""The drive's write budget during a run: counts bytes, and warns. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from headrace.storage.config import EnduranceConfig
from headrace.storage.core.endurance import DAY_S, TB, LifeBudget, StripedWear, Wear
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankEvent

LOW_SHARE = 0.8


class DriveLife:
    """What one rank adds to the wear of its node's drives, and what is left of them.

    Where there are several drives, shares are those of the most worn one.

    Args:
        folders: of the slab files.
        config: rating and wanted lifetime. Without a rating bytes are only counted.
        speaks: whether this rank reports for its node.
        clock: Unix seconds.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        config: EnduranceConfig,
        *,
        speaks: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._speaks, self._clock = config, speaks, clock
        self._wear = StripedWear(folders, clock=clock)
        self._budget: LifeBudget | None = None
        if config.rated_tbw is not None:
            self._budget = self._wear.budget(config.rated_tbw, config.lifetime_years)
        self._start_s, self._at_start = clock(), self._wear.wears
        self._said: set[str] = set()
        self._events: list[RankEvent] = []
        self._judge(self._at_start)

    def count(self, num_bytes: int) -> dict[str, float]:
        """Add what this rank has written since the last call; the drive's metrics."""
        wears = self._wear.add(num_bytes)
        metrics = {names.SSD_WRITTEN_TB: sum(wear.written_bytes for wear in wears) / TB}
        if self._budget is None:
            return metrics
        metrics[names.SSD_LIFE_USED_PCT] = 100.0 * max(wear.life_used(self._budget) for wear in wears)
        metrics[names.SSD_BUDGET_USED_PCT] = 100.0 * self._budget_used(wears, self._budget)
        days = self._days_left(wears, self._budget)
        if days is not None:
            metrics[names.SSD_DAYS_LEFT] = days
        self._judge(wears)
        return metrics

    def take_events(self) -> list[RankEvent]:
        """What there is to say since the last call."""
        events, self._events = self._events, []
        return events

    def _budget_used(self, wears: Sequence[Wear], budget: LifeBudget) -> float:
        now_s = self._clock()
        return max(wear.budget_used(budget, now_s) for wear in wears)

    def _days_left(self, wears: Sequence[Wear], budget: LifeBudget) -> float | None:
        """Days until the first drive's rating is used up, at the rate at which it was written since the run began."""
        gone_s = self._clock() - self._start_s
        days = []
        for before, wear in zip(self._at_start, wears, strict=True):
            written = wear.written_bytes - before.written_bytes
            if written > 0 and gone_s > 0.0:
                left = max(0.0, budget.rated_bytes - wear.written_bytes)
                days.append(left / (written / gone_s) / DAY_S)
        return min(days, default=None)

    def _judge(self, wears: Sequence[Wear]) -> None:
        if self._budget is None:
            return
        used = self._budget_used(wears, self._budget)
        if used >= 1.0:
            self._tell("endurance_over", used, wears, "; the run continues")
        elif used >= LOW_SHARE:
            self._tell("endurance_low", used, wears, "")

    def _tell(self, kind: str, used: float, wears: Sequence[Wear], consequence: str) -> None:
        if kind in self._said or not self._speaks:
            return
        self._said.add(kind)
        written_tb = sum(wear.written_bytes for wear in wears) / TB
        drives = ", ".join(wear.identity for wear in wears)
        text = (
            f"drive {drives}: {written_tb:.4g} TB written by all runs, {100 * used:.0f} % of the budget up to today "
            f"for tiers.ssd.endurance.rated_tbw={self._config.rated_tbw:g} over "
            f"lifetime_years={self._config.lifetime_years:g}{consequence}"
        )
        facts = {"budget_used_pct": 100 * used, "written_tb": written_tb}
        self._events.append(RankEvent(kind, text, facts))
