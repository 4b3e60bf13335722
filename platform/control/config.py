"""How many ranks a run has, where they run and how long the controller waits for them. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from headrace.storage.core.errors import InputError


class Launcher(StrEnum):
    """Who starts the ranks: Ray actors, or plain processes of this machine (`inline`: tests, benchmarks, no Ray)."""

    ray = "ray"
    inline = "inline"


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The ranks of a run and the policy for their failures.

    The number of ranks is `num_nodes` x `gpus_per_node`, or `num_workers` where only that is given.

    Args:
        num_workers: ranks in all; None means it follows from the other two, or 1.
        num_nodes: machines; each gets one placement group.
        gpus_per_node: ranks on each node, one GPU each (on CPU: ranks on each node).
        cpus_per_worker: CPUs that a rank reserves in Ray, may be fractional; None shares the node's, 1 at most. It does
            not set the number of threads (train.num_threads does).
        address: of the Ray cluster to join, HOST:PORT. None takes RAY_ADDRESS, else the head that `headrace dashboard`
            started, else starts Ray on this machine for this run; "local" always starts one.
        interface: network interface by which ranks reach each other, of the same name on every node. None takes, on
            each node, the one that routes to rank 0's node; the run records it.
        max_restarts: how often a run may start its group again after it lost a rank.
        heartbeat_timeout_s: a rank that has finished a step and then does not answer for so long is stuck.
        start_timeout_s: until the first step is done, no sign of progress for so long means the group hangs.
        hang_timeout_s: later, no sign of progress (layer, chunk, step) for so long means the group hangs. Where it is
            more: inside a step five times the longest time between two signs so far, elsewhere five times the longest
            step. Above heartbeat_timeout_s, so that a rank that does not answer is named first.
        collective_timeout_s: how long a rank waits for the others in one collective; None is twice hang_timeout_s. More
            than hang_timeout_s, so that the controller, which knows the rank that is behind, speaks first.
        node_wait_s: after a node was lost, how long the run waits for room for its ranks before it gives up.
        stop_timeout_s: from a signal to the end of the ranks, checkpoint included; then they are killed, and the run
            has failed with its last committed checkpoint. None waits. Give a little less than the scheduler leaves
            between SIGTERM and SIGKILL.
        dashboard: also start the dashboard, where this run starts Ray.
    """

    launcher: Launcher = Launcher.ray
    num_workers: int | None = None
    num_nodes: int = 1
    gpus_per_node: int | None = None
    cpus_per_worker: float | None = None
    address: str | None = None
    interface: str | None = None
    max_restarts: int = 3
    heartbeat_timeout_s: float = 30.0
    start_timeout_s: float = 900.0
    hang_timeout_s: float = 900.0
    collective_timeout_s: float | None = None
    node_wait_s: float = 600.0
    stop_timeout_s: float | None = None
    dashboard: bool = True

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node.

        Raises:
            InputError: a number is not positive, or the numbers do not agree.
        """
        self.check()
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        return 1 if self.num_workers is None else self.num_workers // self.num_nodes

    @property
    def num_ranks(self) -> int:
        """Ranks in all. Raises InputError as `ranks_per_node` does."""
        return self.num_nodes * self.ranks_per_node

    @property
    def collective_limit_s(self) -> float:
        """How long one collective may take."""
        return 2 * self.hang_timeout_s if self.collective_timeout_s is None else self.collective_timeout_s

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            InputError: names the key, the value and the remedy.
        """
        for name in ("num_workers", "num_nodes", "gpus_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"cluster.{name}={value}: at least 1")
        self._check_seconds()
        if self.cpus_per_worker is not None and self.cpus_per_worker <= 0:
            raise InputError(f"cluster.cpus_per_worker={self.cpus_per_worker:g}: above 0 (0.5 is two ranks per core)")
        if self.max_restarts < 0:
            raise InputError(f"cluster.max_restarts={self.max_restarts}: 0 switches restarts off, -1 has no meaning")
        if self.launcher is Launcher.inline and self.num_nodes > 1:
            raise InputError(f"cluster.launcher=inline runs on one machine and cluster.num_nodes={self.num_nodes}")
        self._check_product()

    def _check_seconds(self) -> None:
        for name in (
            "heartbeat_timeout_s",
            "start_timeout_s",
            "hang_timeout_s",
            "collective_timeout_s",
            "stop_timeout_s",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"cluster.{name}={value:g}: seconds, above 0")
        if self.node_wait_s < 0:
            raise InputError(f"cluster.node_wait_s={self.node_wait_s:g}: seconds; 0 does not wait for a lost node")
        heartbeat_s, hang_s = self.heartbeat_timeout_s, self.hang_timeout_s
        if hang_s <= heartbeat_s:
            raise InputError(
                f"cluster.hang_timeout_s={hang_s:g} is not above cluster.heartbeat_timeout_s={heartbeat_s:g}: a rank "
                "that does not answer would be taken for a group that hangs; raise the first or lower the second"
            )
        if self.collective_limit_s <= hang_s:
            raise InputError(
                f"cluster.collective_timeout_s={self.collective_limit_s:g} is not above cluster.hang_timeout_s="
                f"{hang_s:g}: ranks would fail before the one that is behind is named; raise it, or leave it out for "
                f"{2 * hang_s:g}"
            )

    def _check_product(self) -> None:
        if self.num_workers is None:
            return
        if self.num_workers % self.num_nodes:
            raise InputError(
                f"cluster.num_workers={self.num_workers} does not divide over cluster.num_nodes={self.num_nodes}"
            )
        if self.gpus_per_node is not None and self.num_workers != self.num_nodes * self.gpus_per_node:
            raise InputError(
                f"cluster.num_workers={self.num_workers} is not cluster.num_nodes={self.num_nodes} x "
                f"cluster.gpus_per_node={self.gpus_per_node}; leave num_workers out"
            )
