"""One node of a run under Ray: its placement group, the slab owners in the last bundle, and its ranks."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from headrace.platform.control.group import RankLost
from headrace.platform.control.placement import STORAGE_CPUS, NodePlacement, NodeResources
from headrace.platform.control.reach import check_node
from headrace.platform.control.starting import Slabs, holders_of
from headrace.storage.core.errors import MachineError
from headrace.storage.core.owners import Owner
from headrace.workers.actors.gpu_worker import GpuWorker
from headrace.workers.actors.slab_owner import HostMemory, SsdStorage
from headrace.workers.actors.status import RankHome
from headrace.workers.telemetry.records import RankEvent

PLACEMENT_TIMEOUT_S = 10.0
SILENT_S = 10.0  # an owner that has not answered a small call by then is on a node that is out of reach
OWNER_TIMEOUT_S = 600.0  # touching a terabyte takes minutes
KILL_GRACE_S = 1.5  # Ray ends a live actor in less, and a stopped one after 5 s


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


class RayNode:
    """One placement group, the owners in its storage bundle, and the ranks of the group that runs now.

    Args:
        place: where it is, its bundles and its first rank.
        namespace / run: of the actors' names.
    """

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
            get_all([owner.actor.open.remote() for owner in self._owners], OWNER_TIMEOUT_S)
            found = get_all([owner.actor.record.remote() for owner in self._owners], OWNER_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            where = f"the owner of a slab on {self.place.address} ended while it made the slab"
            if not any(node.node_id == self.place.node_id and problem_of(node) is None for node in cluster_nodes()):
                raise RankLost(self.place.first_rank, f"{where}: the node is lost") from error
            raise MachineError(
                f"{where}: {cause_of_death(error)}; see the kernel's log (dmesg) for processes that it killed"
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
            return get_all([owner.actor.lend.remote(holders_of(homes)) for owner in self._owners], OWNER_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            text = f"the owner of a slab on {self.place.address} ended while the ranks started: {cause_of_death(error)}"
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
                get_all([ref], OWNER_TIMEOUT_S)
            except (RayActorError, GetTimeoutError):
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


def problem_of(node: NodeResources) -> MachineError | None:
    """Why a node that Ray takes for alive cannot be used: Ray finds a broken link after a minute."""
    try:
        check_node(node.address, node.port)
    except MachineError as error:
        return error
    return None


def get_all(refs: Sequence[Any], timeout_s: float) -> list[Any]:
    """What calls to actors return. Raises what a method raised, and Ray's errors."""
    try:
        return list(ray.get(list(refs), timeout=timeout_s))
    except RayTaskError as error:
        raise error.cause from error


def _is_alive(owner: Any) -> bool:
    try:
        ray.get(owner.holders.remote(), timeout=PLACEMENT_TIMEOUT_S)
    except (RayActorError, GetTimeoutError):
        return False
    return True


def cause_of_death(error: RayActorError | GetTimeoutError) -> str:
    """Ray's account of a death in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "cause" in line.lower() or "exit" in line.lower()]
    return " ".join((causes or lines)[:2])
