"""The actor of one torch.distributed rank: RankShell, with the gauges of its node's metrics endpoint."""

from __future__ import annotations

import ray.util

from headrace.storage.core.ports import free_port
from headrace.workers.actors.gauges import RankGauges
from headrace.workers.actors.rank import RankShell


class GpuWorker(RankShell):
    """One rank under Ray. A rank whose process has ended is not restarted alone: the group is.

    Args:
        run_name: label of the gauges.
    """

    def __init__(self, rank: int, run_name: str) -> None:
        self._gauges = RankGauges(run_name, rank)
        super().__init__(rank, also_on_report=lambda report: self._gauges.update(report.metrics))

    def rendezvous(self, *, one_node: bool) -> tuple[str, int]:
        """Address and a free port of this node, for torch.distributed where this is rank 0."""
        address = "127.0.0.1" if one_node else ray.util.get_node_ip_address()
        return address, free_port()
