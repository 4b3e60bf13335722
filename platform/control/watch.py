"""Finds ranks that do not answer and groups that make no progress. Pure: times are passed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.states import Trouble, TroubleKind
from headrace.workers.actors.status import RankPhase, RankStatus
from headrace.workers.telemetry.records import Stage, StepPart

LONGEST_OF = 5.0


@dataclass
class _Seen:
    heard_s: float
    progress: int
    progress_s: float
    step: int | None
    step_s: float
    phase: RankPhase = RankPhase.waiting
    stage: Stage | None = None
    part: StepPart | None = None


class Watch:
    """Keeps the time of each rank's last answer and of its last progress.

    For Ray a stopped process still runs; only missing answers show it. If all answer without progress, they wait for
    each other: the one that made the least progress is named.

    Args:
        now_s: when the group was started.
    """

    def __init__(self, cluster: ClusterConfig, num_ranks: int, now_s: float) -> None:
        self._cluster = cluster
        self._longest_s = self._longest_part_s = 0.0
        self._ranks = {rank: _Seen(now_s, 0, now_s, None, now_s) for rank in range(num_ranks)}

    def hear(self, statuses: Mapping[int, RankStatus], now_s: float) -> None:
        """Take the answers of one round of heartbeats."""
        for rank, status in statuses.items():
            seen = self._ranks[rank]
            if status.progress > seen.progress:
                if seen.part is not None:
                    self._longest_part_s = max(self._longest_part_s, now_s - seen.progress_s)
                seen.progress, seen.progress_s = status.progress, now_s
            seen.heard_s, seen.phase, seen.stage, seen.part = now_s, status.phase, status.stage, status.part
            if status.step is not None and status.step != seen.step:
                if seen.step is not None:
                    self._longest_s = max(self._longest_s, (now_s - seen.step_s) / (status.step - seen.step))
                seen.step, seen.step_s = status.step, now_s

    def step_of(self, rank: int) -> int:
        """Last step that the rank reported in this group; 0 before the first one."""
        return self._ranks[rank].step or 0

    def place_of(self, rank: int) -> str:
        """Where the rank was when it last answered, in words."""
        seen = self._ranks[rank]
        stage, part = seen.stage, seen.part
        words = f", {stage.value}" if stage is not None else ""
        return f"last after step {self.step_of(rank)}{words}" + (f" ({part})" if part is not None else "")

    def late(self, now_s: float, stop_s: float) -> list[Trouble]:
        """Ranks that still run `cluster.stop_timeout_s` after they were asked to stop at `stop_s`."""
        limit_s = self._cluster.stop_timeout_s
        if limit_s is None or now_s - stop_s <= limit_s:
            return []
        words = f"had not ended {limit_s:g} s after the signal (cluster.stop_timeout_s)"
        return [
            Trouble(rank, TroubleKind.late, self.step_of(rank), f"rank {rank} {words}, {self.place_of(rank)}")
            for rank, seen in self._ranks.items()
            if seen.phase is RankPhase.running
        ]

    def troubles(self, now_s: float) -> list[Trouble]:
        """Ranks that are silent; or, where all answer, the one that a hanging group waits for."""
        silent = []
        for rank, seen in self._ranks.items():
            # Before the first step a rank may pin a terabyte in one call that lets no other thread speak.
            name = "start_timeout_s" if seen.step is None else "heartbeat_timeout_s"
            waited_s = now_s - seen.heard_s
            if waited_s > getattr(self._cluster, name):
                text = (
                    f"rank {rank} has not answered for {waited_s:.0f} s (cluster.{name}="
                    f"{getattr(self._cluster, name):g}), {self.place_of(rank)}"
                )
                silent.append(Trouble(rank, TroubleKind.silent, self.step_of(rank), text))
        return silent or self._stuck(now_s)

    def _stuck(self, now_s: float) -> list[Trouble]:
        running = {rank: seen for rank, seen in self._ranks.items() if seen.phase is RankPhase.running}
        if not running:
            return []
        started = all(seen.step is not None for seen in running.values())
        name = "hang_timeout_s" if started else "start_timeout_s"
        limit_s = getattr(self._cluster, name)
        rank = min(running, key=lambda rank: (running[rank].progress, running[rank].progress_s))
        if started:
            longest_s = self._longest_s if running[rank].part is None else self._longest_part_s
            limit_s = max(limit_s, LONGEST_OF * longest_s)
        waited_s = now_s - max(each.progress_s for each in running.values())
        if waited_s <= limit_s:
            return []
        text = (
            f"no rank made progress for {waited_s:.0f} s (limit {limit_s:g} s, cluster.{name}); rank {rank} made the "
            f"least progress, {self.place_of(rank)}"
        )
        return [Trouble(rank, TroubleKind.stuck, self.step_of(rank), text)]
