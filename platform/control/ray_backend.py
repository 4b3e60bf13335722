"""Groups of Ray actors: one STRICT_PACK placement group per node, ranks in its bundles, slab owners in the last one."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.group import Answers, ask_all
from headrace.platform.control.placement import NodeResources, Placement, place
from headrace.platform.control.ray_node import (
    PLACEMENT_TIMEOUT_S,
    RayNode,
    cause_of_death,
    cluster_nodes,
    get_all,
    problem_of,
)
from headrace.platform.control.starting import Slabs, contexts_of, start_all
from headrace.storage.core.cleanup import after_error
from headrace.storage.core.errors import ErrorId, MachineError
from headrace.workers.job import TrainJob
from headrace.workers.telemetry.records import RankEvent
from headrace.workers.train.config import DeviceKind

# What a driver's environment may say to its ranks; the rest of it stays where it is.
FORWARDED = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUBLAS_", "KVIKIO_", "CUFILE_", "HEADRACE_", "TRITON_")


class RayRanks:
    """A group of GpuWorker actors."""

    def __init__(self, nodes: Sequence[RayNode]) -> None:
        self._nodes = nodes
        self._actors = [actor for node in nodes for actor in node.actors]

    @property
    def num_ranks(self) -> int:
        """Size of the group."""
        return len(self._actors)

    def send(self, rank: int, method: str, *args: Any) -> Hashable:
        """See Transport."""
        return getattr(self._actors[rank], method).remote(*args)

    def collect(self, tickets: Iterable[Hashable], timeout_s: float) -> Answers:
        """See Transport. An exception of the method is raised here."""
        answers, refs = Answers(), list(tickets)
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
        for ref in done:
            try:
                answers.values[ref] = ray.get(ref)
            except RayActorError as error:
                answers.lost[ref] = cause_of_death(error)
            except RayTaskError as error:
                raise error.cause from error
        return answers

    def kill(self) -> None:
        """See Transport. The owners end the processes: a stopped one does not hear Ray for 5 s."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        for node in self._nodes:
            node.end_ranks()


class RayBackend:
    """Placement and slabs of a run on the Ray cluster that this process is connected to.

    Args:
        run: name of the run, for labels and files.

    Raises:
        MachineError: the cluster is too small, a node has too little memory or disk.
    """

    def __init__(self, cluster: ClusterConfig, device: DeviceKind, slabs: Slabs, *, run: str) -> None:
        self._cluster, self._device_kind, self._slabs, self._run = cluster, device, slabs, run
        self._namespace = f"headrace-{run}-{uuid.uuid4().hex[:6]}"
        self._nodes: list[RayNode] = []
        self._device = "cpu"
        self.facts: dict[str, Any] = {"launcher": "ray", "num_ranks": cluster.num_ranks, "namespace": self._namespace}
        try:
            self._place()
            self._open_owners()
        except BaseException as error:
            after_error(error, self.close)
            raise

    def start_group(self, job: TrainJob, attempt: int) -> RayRanks:
        """See Backend. Nodes that have gone are replaced by others first; those that are left keep their slabs."""
        if attempt:
            self._place()
        self._open_owners()
        cpus = {node.node_id: node.num_cpus for node in cluster_nodes()}
        for node in self._nodes:
            node.start_ranks(attempt, self._env(int(cpus.get(node.place.node_id, 1)) // node.place.num_ranks))
        ranks = RayRanks(self._nodes)
        try:
            timeout_s = self._cluster.start_timeout_s
            homes = ask_all(ranks, "home", timeout_s)
            leases = []
            for node in self._nodes:
                first = node.place.first_rank
                leases += node.lend(homes[first : first + node.place.num_ranks])
            one_node = len(self._nodes) == 1
            master = get_all([self._nodes[0].actors[0].rendezvous.remote(one_node=one_node)], timeout_s)[0]
            here = ray.get_runtime_context().get_node_id()
            contexts = contexts_of(
                self._cluster,
                [node.place.num_ranks for node in self._nodes],
                leases,
                master,
                device=self._device,
                attempt=attempt,
                near_nodes=[node.place.node_id == here for node in self._nodes],
            )
            start_all(ranks, job, contexts, timeout_s)
        except BaseException as error:
            after_error(error, ranks.kill)
            raise
        return ranks

    def lost_owners(self) -> list[RankEvent]:
        """See Backend."""
        return [event for node in self._nodes for event in node.lost_owners()]

    def missing_room(self) -> str | None:
        """See Backend."""
        try:
            self._choose(whole=False)
        except MachineError as error:
            return str(error)
        return None

    def close(self) -> None:
        """See Backend."""
        for node in self._nodes:
            node.close()
        self._nodes = []

    def _open_owners(self) -> None:
        for node in self._nodes:
            node.open_owners()
        self.facts["slabs"] = [facts for node in self._nodes for facts in node.slab_facts]

    def _place(self) -> None:
        placement = self._wait_for_room()
        self._device = placement.device
        held = {node.place.node_id: node for node in self._nodes}
        for node_id in held.keys() - {chosen.node_id for chosen in placement.nodes}:
            held[node_id].close()
        self._nodes = []
        for chosen in placement.nodes:
            if (node := held.get(chosen.node_id)) is None:
                node = RayNode(chosen, self._slabs, self._namespace, self._run)
            node.place = replace(node.place, first_rank=chosen.first_rank)
            self._nodes.append(node)
        self.facts |= {
            "device": placement.device,
            "cpus_per_worker": placement.cpus_per_worker,
            "nodes": [node.address for node in placement.nodes],
        }
        late = [node.place for node in self._nodes if not node.wait()]
        if late:
            # Someone else was quicker: say what is left now.
            wanted = "; ".join(f"{node.address}: {list(node.bundles)}" for node in late)
            left = "; ".join(f"{n.address}: {n.free_cpus:g} CPUs, {n.free_gpus:g} GPUs" for n in cluster_nodes())
            raise MachineError(
                f"Ray did not reserve the ranks' resources within {PLACEMENT_TIMEOUT_S:g} s. Wanted {wanted}. Free now "
                f"{left}. End other runs on this cluster, or lower cluster.num_workers"
            )

    def _wait_for_room(self) -> Placement:
        """Wait for resources that a finished run is releasing; fail at once if the cluster is too small."""
        until_s = time.monotonic() + PLACEMENT_TIMEOUT_S
        while True:
            try:
                return self._choose(whole=False)
            except MachineError as error:
                self._choose(whole=True)
                if time.monotonic() > until_s or error.id is ErrorId.token_refused:
                    raise
            time.sleep(0.2)

    def _choose(self, *, whole: bool) -> Placement:
        """Where a group can run, on nodes that answer and in what is free of them; what this run holds counts as free.

        Args:
            whole: in all that the nodes have.

        Raises:
            MachineError: nowhere; or a node that would be needed has another token.
        """
        held = {node.place.node_id: node.place.bundles for node in self._nodes}
        nodes: list[NodeResources] = []
        problems: list[MachineError] = []
        for node in cluster_nodes():
            if whole:
                nodes.append(replace(node, free_cpus=node.num_cpus, free_gpus=node.num_gpus))
            elif (problem := problem_of(node)) is None:
                nodes.append(node.freed(held.get(node.node_id, ())))
            else:
                problems.append(problem)
        try:
            return place(self._cluster, nodes, self._device_kind)
        except MachineError as error:
            refused = next((each for each in problems if each.id is ErrorId.token_refused), error)
            raise MachineError("\n  ".join([str(error), *map(str, problems)]), id=refused.id) from error

    def _env(self, num_cpus: int) -> dict[str, str]:
        forwarded = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
        # An actor with a part of a CPU gets OMP_NUM_THREADS=1 from Ray, whatever the machine has.
        return forwarded | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cpus))}
