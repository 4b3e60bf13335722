"""When a person should look: the alerts, as rules that Prometheus evaluates. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.workers.telemetry.exported import EVENTS_SERIES

# An event keeps its alert for so long: it cannot be taken back, and a person has time to see it.
WINDOW = "10m"


@dataclass(frozen=True)
class Alert:
    """One alert.

    Args:
        name: without the prefix that all have.
        measure: query of what is judged; has data whenever there is something to judge.
        condition: on it, as `> 0`.
        summary: a sentence; `{{ $labels.run }}` and `{{ $value }}` are filled in.
        remedy: what to do.
        severity: `critical` where the run stands or has lost work, else `warning`.
    """

    name: str
    measure: str
    condition: str
    summary: str
    remedy: str
    severity: str = "critical"

    @property
    def full_name(self) -> str:
        """As Prometheus shows it."""
        return f"Headrace{self.name}"


def recent(*, kind: str = ".*", cause: str = ".*") -> str:
    """Query: events of the last WINDOW by run. The first count of a series has nothing before it, and counts too.

    Args:
        kind / cause: regular expressions of the whole label.
    """
    now = f'{EVENTS_SERIES}{{kind=~"{kind}",cause=~"{cause}"}}'
    return f"sum by (run) ({now}) - (sum by (run) ({now} offset {WINDOW}) or 0 * sum by (run) ({now}))"


RUN = "run {{ $labels.run }}"
ALERTS = (
    Alert(
        "RankLost",
        recent(kind="group_restarted|run_failed", cause="lost|host_memory_low"),
        "> 0",
        f"{RUN}: the process of a rank ended",
        "events.jsonl of the run names the rank, its step and its log; the run goes on while cluster.max_restarts last",
    ),
    Alert(
        "RankHung",
        recent(kind="rank_hung"),
        "> 0",
        f"{RUN}: a rank makes no progress",
        "logs/stacks-attemptN.txt of the run has the stacks of all ranks",
    ),
    Alert(
        "WaitingForNodes",
        recent(kind="waiting_for_nodes"),
        "> 0",
        f"{RUN} stands: the cluster lacks nodes for its ranks",
        "bring the lost node or another one into the cluster (ray start): the run goes on by itself; after "
        "cluster.node_wait_s it fails",
    ),
    Alert(
        "RunFailed",
        recent(kind="run_failed"),
        "> 0",
        f"{RUN} has failed",
        "its last event says why; headrace train --resume RUN continues it",
    ),
    Alert(
        "NotFinite",
        f"({recent(kind='step_skipped')}) or ({recent(cause='training_diverged')})",
        "> 0",
        f"{RUN}: loss or gradient is not finite",
        "non_finite/ of the run lists the rows; lower optim.lr or raise optim.warmup_steps",
    ),
    Alert(
        "SlowTier",
        recent(kind="tier_drift"),
        "> 0",
        f"{RUN}: a drive or a link is slower than its profile",
        "look for another program on the drive and for thermal throttling; headrace doctor --profile measures again",
        severity="warning",
    ),
    Alert(
        "CheckpointFailed",
        recent(kind="checkpoint_failed|checkpoint_damaged"),
        "> 0",
        f"{RUN}: a checkpoint was not saved, or is damaged",
        "make room on the disk of the run folder; older checkpoints are kept",
    ),
    Alert(
        "SlabOwnerLost",
        recent(kind="owner_lost"),
        "> 0",
        f"{RUN}: the owner of a host or SSD slab has ended",
        "ranks continue with the files that they have open; see the kernel's log (dmesg)",
        severity="warning",
    ),
    Alert(
        "DriveWear",
        recent(kind="endurance_low|endurance_over"),
        "> 0",
        f"{RUN}: the drive's write budget is nearly used, or over",
        "lower tiers.ssd.budget_gib, or set another tiers.ssd.path",
        severity="warning",
    ),
    Alert(
        "HostMemory",
        "100 * ray_node_mem_used / ray_node_mem_total",
        "> 95",
        "node {{ $labels.ip }} uses {{ $value }} % of its memory",
        "below 512 MiB the ranks of the node save and stop; lower tiers.host.budget_gib",
        severity="warning",
    ),
)


def alert_rules(*, evaluate_s: float) -> dict[str, Any]:
    """The content of Prometheus' rule file."""
    rules = [
        {
            "alert": alert.full_name,
            "expr": f"({alert.measure}) {alert.condition}",
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.remedy},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "headrace", "interval": f"{evaluate_s:g}s", "rules": rules}]}
