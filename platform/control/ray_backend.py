"""Groups of Ray actors: one STRICT_PACK placement group per node, ranks in its bundles, slab owners in the last one."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.group import Answers, RankLost, ask_all
from headrace.platform.control.placement import STORAGE_CPUS, NodePlacement, NodeResources, Placement, place
from headrace.platform.control.reach import check_node
from headrace.platform.control.starting import Slabs, contexts_of, holders_of, start_all
from headrace.storage.core.cleanup import after_error
from headrace.storage.core.errors import ErrorId, MachineError
from headrace.storage.core.owners import Owner
from headrace.workers.actors.gpu_worker import GpuWorker
from headrace.workers.actors.slab_owner import HostMemory, SsdStorage
from headrace.workers.actors.status import RankHome
from headrace.workers.job import TrainJob
from headrace.workers.telemetry.records import RankEvent
from headrace.workers.train.config import DeviceKind

PLACEMENT_TIMEOUT_S = 10.0
SILENT_S = 10.0  # an owner that has not answered a small call by then is on a node that is out of reach
OWNER_TIMEOUT_S = 600.0  # touching a terabyte takes minutes
KILL_GRACE_S = 1.5  # Ray ends a live actor in less, and a stopped one after 5 s
# What a driver's environment may say to its ranks; the rest of it stays where it is.
FORWARDED = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUBLAS_", "KVIKIO_", "CUFILE_", "HEADRACE_", "TRITON_")


class RayRanks:
    """A group of GpuWorker actors."""

    def __init__(self, nodes: Sequence[_Node]) -> None:
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
                answers.lost[ref] = _cause_of_death(error)
            except RayTaskError as error:
                raise error.cause from error
        return answers

    def kill(self) -> None:
        """See Transport. The owners end the processes: a stopped one does not hear Ray for 5 s."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        for node in self._nodes:
            node.end_ranks()


class _Owner:
    """One slab owner's actor, which may die while its ranks go on."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor, self.name = actor, name
        self.pid: int | None = None
        self.died = False
        self._ping: Any = None

    def look(self) -> None:
        """See whether it still answers, without waiting for the answer."""
        if self.died:
            return
        if self._ping is None:
            self._ping = self.actor.holders.remote()
        if ray.wait([self._ping], timeout=0)[0]:
            ping, self._ping = self._ping, None
            try:
                ray.get(ping)
            except RayActorError:
                self.died = True


class _Node:
    """One placement group, the owners in its storage bundle, and the ranks of the group that runs now."""

    def __init__(self, place: NodePlacement, slabs: Slabs, namespace: str, run: str) -> None:
        self.place = place
        self.actors: list[Any] = []
        self.slab_facts: list[dict[str, Any]] = []
        self._slabs, self._namespace, self._run = slabs, namespace, run
        self._processes: list[Owner] = []
        self._owners: list[_Owner] = []
        self._lost: list[RankEvent] = []
        self._group: PlacementGroup = placement_group(
            [dict(bundle) for bundle in place.bundles],
            strategy="STRICT_PACK",
            name=f"{namespace}-{place.node_id}",
            bundle_label_selector=[{"ray.io/node-id": place.node_id}] * len(place.bundles),
        )

    def wait(self) -> bool:
        """Whether Ray has reserved the bundles in time."""
        return bool(self._group.wait(PLACEMENT_TIMEOUT_S))

    def open_owners(self) -> None:
        """Start the missing owners: at the start, or after they ended.

        Raises:
            MachineError: too little memory or disk, or an owner ended meanwhile. RankLost: so did its node.
        """
        if self._processes:
            self.end_ranks()  # the node was out of reach when its group ended
        for owner in self._owners:
            owner.died = owner.died or not _is_alive(owner.actor)
        if self._owners and not any(owner.died for owner in self._owners):
            return
        self._lost = self.lost_owners()
        for owner in self._owners:
            ray.kill(owner.actor)
        slabs = self._slabs
        self._owners = [self._start(HostMemory, "host-memory", slabs.host_bytes, self._run, slabs.memory_grows)]
        if slabs.ssd_bytes:
            words = (slabs.ssd_bytes, slabs.ssd_folders, slabs.direct)
            self._owners.append(self._start(SsdStorage, "ssd-storage", *words))
        try:
            _get([owner.actor.open.remote() for owner in self._owners], OWNER_TIMEOUT_S)
            found = _get([owner.actor.record.remote() for owner in self._owners], OWNER_TIMEOUT_S)
        except RayActorError as error:
            where = f"the owner of a slab on {self.place.address} ended while it made the slab"
            if not any(node.node_id == self.place.node_id and _problem(node) is None for node in cluster_nodes()):
                raise RankLost(self.place.first_rank, f"{where}: the node is lost") from error
            raise MachineError(
                f"{where}: {_cause_of_death(error)}; see the kernel's log (dmesg) for processes that it killed"
            ) from error
        self.slab_facts = [{"node": self.place.address} | record for record in found]
        for owner, record in zip(self._owners, found, strict=True):
            owner.pid = record["pid"]

    def lost_owners(self) -> list[RankEvent]:
        """Owners that have ended since the last call."""
        for owner in self._owners:
            owner.look()
            if owner.died and owner.pid is not None:
                text = (
                    f"{owner.name} has ended: process {owner.pid} on {self.place.address}, which owned a slab. "
                    "Ranks that have the slab open continue; a group that is started again gets a new slab"
                )
                facts = {"node": self.place.address, "owner": owner.name, "pid": owner.pid}
                self._lost.append(RankEvent("owner_lost", text, facts))
                owner.pid = None
        lost, self._lost = self._lost, []
        return lost

    def start_ranks(self, attempt: int, env: Mapping[str, str]) -> None:
        """Make the actors of the node's ranks; they come up on their own time."""
        suffix = f"-attempt{attempt}" if attempt else ""
        self.actors = []
        for i in range(self.place.num_ranks):
            rank, bundle = self.place.first_rank + i, self.place.bundles[i]
            options = {
                "name": f"{self._run}-rank{rank}{suffix}",
                "namespace": self._namespace,
                "num_cpus": bundle["CPU"],
                "num_gpus": bundle.get("GPU", 0),
                "max_restarts": 0,
                "max_task_retries": 0,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=i),
                "runtime_env": {"env_vars": dict(env)},
            }
            self.actors.append(ray.remote(GpuWorker).options(**options).remote(rank, self._run))

    def lend(self, homes: Sequence[RankHome]) -> list[dict[str, Any]]:
        """Leases of the node's ranks, by owner and holder. Raises RankLost if an owner has ended."""
        self._processes = [home.process for home in homes]
        try:
            return _get([owner.actor.lend.remote(holders_of(homes)) for owner in self._owners], OWNER_TIMEOUT_S)
        except RayActorError as error:
            text = (
                f"the owner of a slab on {self.place.address} ended while the ranks started: {_cause_of_death(error)}"
            )
            raise RankLost(self.place.first_rank, text) from error

    def end_ranks(self) -> None:
        """Kill what is left of the ranks' processes and take their leases back; on a silent node a later call does."""
        if self._ask_owners("end", self._processes, KILL_GRACE_S):
            self._processes = []
        self.actors = []

    def close(self) -> None:
        """End the owners and give the bundles back."""
        self._ask_owners("close")
        for owner in self._owners:
            ray.kill(owner.actor)
        remove_placement_group(self._group)

    def _ask_owners(self, method: str, *args: Any) -> bool:
        """Call a method of all owners and wait; whether none is silent, which would hold up the other nodes.

        One that has died takes its leases and its slab with it.
        """
        pings = {owner.actor.holders.remote(): owner for owner in self._owners if not owner.died}
        answered = ray.wait(list(pings), num_returns=len(pings), timeout=SILENT_S)[0] if pings else []
        asked = [(pings[ping], getattr(pings[ping].actor, method).remote(*args)) for ping in answered]
        for owner, ref in asked:
            try:
                _get([ref], OWNER_TIMEOUT_S)
            except RayActorError:
                owner.died = True
        return len(answered) == len(pings)

    def _start(self, kind: type, name: str, *args: Any) -> _Owner:
        last = len(self.place.bundles) - 1
        options = {
            "name": f"{self._run}-{name}-{self.place.address}-{uuid.uuid4().hex[:6]}",
            "namespace": self._namespace,
            "num_cpus": STORAGE_CPUS / 2,
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=last),
        }
        return _Owner(ray.remote(kind).options(**options).remote(*args), name)


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
        self._nodes: list[_Node] = []
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
            master = _get([self._nodes[0].actors[0].rendezvous.remote(one_node=one_node)], timeout_s)[0]
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
                node = _Node(chosen, self._slabs, self._namespace, self._run)
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
            elif (problem := _problem(node)) is None:
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


def cluster_nodes() -> list[NodeResources]:
    """The nodes of the cluster that are alive, with what they have and what is free."""
    free = ray._private.state.available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        total, left = node["Resources"], free.get(node["NodeID"], {})
        nodes.append(
            NodeResources(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                num_cpus=total.get("CPU", 0.0),
                num_gpus=total.get("GPU", 0.0),
                free_cpus=left.get("CPU", 0.0),
                free_gpus=left.get("GPU", 0.0),
                port=node["NodeManagerPort"],
            )
        )
    return nodes


def _problem(node: NodeResources) -> MachineError | None:
    """Why a node that Ray takes for alive cannot be used: Ray finds a broken link after a minute."""
    try:
        check_node(node.address, node.port)
    except MachineError as error:
        return error
    return None


def _get(refs: Sequence[Any], timeout_s: float) -> list[Any]:
    try:
        return list(ray.get(list(refs), timeout=timeout_s))
    except RayTaskError as error:
        raise error.cause from error


def _is_alive(owner: Any) -> bool:
    try:
        ray.get(owner.holders.remote(), timeout=PLACEMENT_TIMEOUT_S)
    except (RayActorError, ray.exceptions.GetTimeoutError):
        return False
    return True


def _cause_of_death(error: RayActorError) -> str:
    """Ray's account of a death in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "cause" in line.lower() or "exit" in line.lower()]
    return " ".join((causes or lines)[:2])
