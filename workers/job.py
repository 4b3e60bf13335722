"""The input of a rank: everything it needs, resolved, and nothing of Hydra, Ray or MLflow. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from headrace.storage.config import TiersConfig
from headrace.storage.core.records import Lease
from headrace.workers.data.config import DataConfig
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.model.config import AdapterConfig, ModelConfig
from headrace.workers.parallel.config import ParallelConfig
from headrace.workers.train.config import CheckpointConfig, OptimConfig, TrainConfig


@dataclass(frozen=True)
class NewPlan:
    """A plan that the ranks change to, all before the same step: the first one at whose start all of them have it.

    Args:
        number: of the change, from 1; ranks ignore one that they have made.
        plans: of every length of the rows; with the cuts of the plans before, so that no bit changes.
    """

    number: int
    plans: Mapping[int, MemoryPlan]


@dataclass(frozen=True)
class TrainJob:
    """One run, the same for all of its ranks.

    Args:
        model: with vocab_size already resolved.
        data: with `prepared` already resolved to an existing folder.
        run_dir: absolute path; checkpoints go to run_dir/checkpoints.
        plan: of micro-batches of rows of data.seq_len tokens.
        bucket_plans: of the shorter rows of data.buckets, by their tokens.
        adapter: what is trained: everything, or adapters on a frozen model.
        peak_flops: FLOP/s of one rank's device for MFU (GEMM rate measured at start on CPU); 0 means measure.
        resume: continue from the newest committed checkpoint of run_dir when there is one.
        init_on_device: draw random first weights on the ranks' devices, in seconds; a benchmark needs no more. Other
            kinds of device draw other weights.
        compare_sparse_every: steps between comparisons with dense attention, where the plan chooses pages; 0: none.
        start_over: begin at step 0 where every checkpoint of run_dir is damaged, in place of an error.
        num_replans: how often the run has changed its plan.
    """

    run_dir: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    plan: MemoryPlan
    tiers: TiersConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    bucket_plans: Mapping[int, MemoryPlan] = field(default_factory=dict)
    peak_flops: float = 0.0
    resume: bool = True
    init_on_device: bool = False
    compare_sparse_every: int = 0
    start_over: bool = False
    num_replans: int = 0

    def plan_of(self, seq_len: int) -> MemoryPlan:
        """The plan of micro-batches of rows of so many tokens."""
        return self.bucket_plans.get(seq_len, self.plan)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of the rows."""
        return self.data.buckets or [self.data.seq_len]

    def changed(self, new: NewPlan) -> TrainJob:
        """The job after it has changed its plan."""
        bucket_plans = {length: plan for length, plan in new.plans.items() if length != self.data.seq_len}
        return replace(self, plan=new.plans[self.data.seq_len], bucket_plans=bucket_plans, num_replans=new.number)


@dataclass(frozen=True)
class RankContext:
    """One rank's place in the group.

    Args:
        rank / world_size: global; local_rank / local_world_size: on this node.
        master_addr / master_port: rendezvous of torch.distributed (rank 0's node).
        device: "cpu" or "cuda". Under Ray a rank sees its one GPU as device 0.
        interface: by which the other ranks are reached; None takes the one that routes to master_addr.
        collective_timeout_s: how long a collective waits for the other ranks.
        poll_timeout_s: a rank that the driver has not polled for so long ends by itself: it is cut off, and another
            group may have taken its place. None: it cannot be cut off, because it runs on the driver's machine.
        attempt: 0 for the first start of the group, +1 per restart.
        leases: ranges of the node's slabs that this rank may use (at most one per medium).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    device: str = "cpu"
    interface: str | None = None
    collective_timeout_s: float = 1800.0
    poll_timeout_s: float | None = None
    attempt: int = 0
    leases: tuple[Lease, ...] = field(default_factory=tuple)
