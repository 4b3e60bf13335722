"""What the planner is asked, with the budgets and the rates worked out. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from headrace.kernels.codecs.config import CodecName
from headrace.platform.control.config import Launcher
from headrace.platform.planning.budgets import Budgets
from headrace.platform.planning.cost import UNSHARDED_BLOCKS, BlockShape, block_shape, default_cuts, on_rank, step_cost
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.predict import BlockCost, Correction, Rates, StepCost
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.actors.memory_guard import SAVE_BELOW_BYTES
from headrace.workers.data.config import bucket_batch
from headrace.workers.memory.chunk_plan import CarriedBytes
from headrace.workers.memory.config import MemoryPreset, SparseConfig
from headrace.workers.memory.head_bytes import WIDE_BYTES, head_transient_bytes
from headrace.workers.memory.plan import Cuts, MemoryPlan, Sweep
from headrace.workers.memory.presets import alst_cuts
from headrace.workers.memory.schedule import schedule_of
from headrace.workers.model.adapter import block_skeleton, block_skeletons, weights_of
from headrace.workers.model.config import AdapterConfig, ModelConfig
from headrace.workers.model.head_groups import possible_groups, refuse_groups
from headrace.workers.model.skeleton import Skeleton, chunk_skeleton
from headrace.workers.parallel.config import RingLayout
from headrace.workers.parallel.pipeline.moments import RankPasses

GIB = 1024**3
# Of what CUDA reports as free to a process; the rest is for its context, NCCL and cuBLAS. Pools of the allocator are
# counted one by one (cost.py).
CUDA_USABLE_SHARE = 0.98
# Of a node's host memory: the driver with MLflow, and Ray with its dashboard and the owners of the slabs. Measured as
# private and shared memory of a run's processes: 0.3 GiB without Ray, 1.4 GiB with it.
NODE_BYTES = {Launcher.inline: 384 << 20, Launcher.ray: 1536 << 20}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """One run, seen from one rank.

    Args:
        batch_size / micro_batches: per rank: sequences per micro-batch, micro-batches per step.
        itemsize: bytes of the compute dtype (4: fp32, 2: bf16).
        device_budget_bytes / host_budget_bytes / ssd_budget_bytes: per rank; None takes the profile's value, and where
            the profile has none there is no limit. 0 switches host or ssd off.
        ranks_per_node: share the node's host memory and drives.
        launcher: what starts them needs memory too.
        num_shards / num_replicas / tensor_degree / sequence_degree / packed / deterministic / adapter: see step_cost.
        seq_len_step: a length is a multiple of it.
        chunk_size: tokens of a chunk of the sweep by chunk; None: the planner chooses.
        sparse: for memory=chunk_sparse.
        gradient_copies: see kv_bytes.
        buckets: lengths of rows, ascending, the last one seq_len; empty: all rows have one length. The request asks for
            the plan of the longest rows, of_length(...) of it for that of others.
        head_groups: of attention (Cuts); None: auto takes as few as fit, other presets one.
        token_tile: of plans (Cuts); None: the device's usual one, of alst that of its rule; of auto the latter where
            the usual one does not fit.
        codec: of what plans by layer hold (Cuts); None: nothing is lossy.
        sweep: that a plan of auto must have; None: the faster one.
        tile_rows: rows for which token tiles are as long as usual: where batch_size is larger, a tile is shorter and
            holds as many tokens in all. None: tiles are as long as usual.
        ssd_wear_bytes_per_s: that auto may write to the drives while training, by one rank; None: no limit. Where
            nothing else fits more is written.
        passes: of the rank of a pipeline; None elsewhere.
        has_lookup / has_head: whether the rank looks tokens up, and computes norm, head and loss; of a pipeline it may
            be the first stage alone, and the last.
        correction: what a run has measured of the rates; the profile's are multiplied by it.
        rates_note: when and under which load rates were measured, for people.
        pinned: keys (or groups of keys) that another setting holds where they are: no remedy proposes to change them.
    """

    model: ModelConfig
    seq_len: int
    profile: HardwareProfile
    preset: MemoryPreset = MemoryPreset.auto
    batch_size: int = 1
    micro_batches: int = 1
    itemsize: int = 4
    device_budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    ssd_budget_bytes: int | None = None
    ranks_per_node: int = 1
    launcher: Launcher = Launcher.ray
    num_shards: int = 1
    num_replicas: int = 1
    tensor_degree: int = 1
    sequence_degree: int = 1
    ulysses: int = 1
    ring_layout: RingLayout = RingLayout.auto
    packed: bool = False
    prefetch_layers: int = 1
    loss_tile: int = 1024
    deterministic: bool = False
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    seq_len_step: int = 1
    chunk_size: int | None = None
    sparse: SparseConfig = field(default_factory=SparseConfig)
    gradient_copies: int = 1
    buckets: tuple[int, ...] = ()
    head_groups: int | None = None
    token_tile: int | None = None
    codec: CodecName | None = None
    sweep: Sweep | None = None
    tile_rows: int | None = None
    ssd_wear_bytes_per_s: float | None = None
    passes: RankPasses | None = None
    has_lookup: bool = True
    has_head: bool = True
    correction: Correction = field(default_factory=Correction)
    rates_note: str = ""
    pinned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, value in {
            "data.seq_len": self.seq_len,
            "train.batch_size": self.batch_size,
            "train.micro_batches": self.micro_batches,
            "model.vocab_size": self.model.vocab_size,
            "model.num_layers": self.model.num_layers,
        }.items():
            if value < 1:
                raise InputError(f"{key}={value}: a plan needs at least 1")
        if self.head_groups is not None and self.head_groups not in possible_groups(self.model.num_kv_heads):
            raise refuse_groups(self.head_groups, self.model.num_kv_heads)
        if self.head_groups not in (None, 1) and self.preset.is_by_chunk:
            raise InputError(
                f"memory.head_groups={self.head_groups}: memory={self.preset.value} runs by chunk, with all heads; "
                "set memory.head_groups=null"
            )
        if self.device_budget_bytes is not None and self.device_budget_bytes <= 0:
            raise InputError(
                "tiers.device.budget_gib=0: the device cannot be switched off; leave the key out or raise it"
            )

    def of_length(self, length: int) -> PlanRequest:
        """The request for micro-batches of rows of another length: see data.buckets."""
        if length == self.seq_len:
            return self
        return replace(
            self,
            seq_len=length,
            batch_size=bucket_batch(self.batch_size, self.seq_len, length),
            tile_rows=self.batch_size,
            buckets=(),
            # These follow from the longest rows.
            pinned=(*self.pinned, "data.seq_len", "train.batch_size"),
        )

    @property
    def in_flight(self) -> int:
        """Micro-batches that the rank holds at once between forward and backward."""
        return 1 if self.passes is None else self.passes.in_flight

    @property
    def ring(self) -> int:
        """Ranks of a ring."""
        return self.sequence_degree // self.ulysses

    @property
    def num_sharers(self) -> int:
        """Ranks that share the rows."""
        return self.tensor_degree * self.sequence_degree

    @property
    def cut_choices(self) -> list[Cuts]:
        """Head groups and token tiles that the plan may have, the fastest first, and last those that need the least."""
        usual = self.cuts()
        if self.preset is not MemoryPreset.auto or self.is_mixed:
            return [usual]
        groups, tiles = [usual.head_groups], [usual.token_tile]
        if self.head_groups is None and self.num_sharers == 1:
            groups = possible_groups(self.model.num_kv_heads)
        if self.token_tile is None:
            short = replace(self, preset=MemoryPreset.alst).cuts().token_tile
            tiles += [short] if short < usual.token_tile else []
        return [replace(usual, head_groups=number, token_tile=tile) for number in groups for tile in tiles]

    def with_cuts(self, cuts: Cuts) -> PlanRequest:
        """The request for plans with these head groups and token tiles."""
        return replace(self, head_groups=cuts.head_groups, token_tile=cuts.token_tile)

    def with_cuts_of(self, plan: MemoryPlan) -> PlanRequest:
        """The request for plans of auto that compute the same bits as this one."""
        chunk_size = plan.cuts.chunks[0] if plan.cuts.chunks else None
        groups, tile = self.head_groups or plan.cuts.head_groups, plan.cuts.token_tile
        return replace(self, sweep=plan.sweep, head_groups=groups, token_tile=tile, chunk_size=chunk_size)

    @property
    def what(self) -> str:
        """The rows that the plan is for, as messages name them."""
        return (
            f"data.seq_len={self.seq_len}" if self.tile_rows is None else f"the data.buckets of {self.seq_len} tokens"
        )

    def cost(self) -> StepCost:
        """Bytes and FLOPs of one micro-batch."""
        return self._cost

    @cached_property
    def _cost(self) -> StepCost:
        cost = step_cost(
            self.model,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            itemsize=self.itemsize,
            device_class=self.profile.device_class,
            cuts=self.cuts(),
            num_shards=self.num_shards,
            tensor_degree=self.tensor_degree,
            sequence_degree=self.sequence_degree,
            ulysses=self.ulysses,
            packed=self.packed,
            loss_tile=self.loss_tile,
            num_replicas=self.num_replicas,
            deterministic=self.deterministic,
            adapter=self.adapter,
            num_passes=1 if self.passes is None else self.in_flight * len(self.passes.counts),
            has_both_ends=self.has_lookup and self.has_head,
        )
        cost = replace(cost, in_flight=self.in_flight)
        whole, more = self._whole_bytes
        on_cuda = self.profile.device_class is DeviceClass.cuda
        cost = replace(
            cost,
            fixed_bytes=cost.fixed_bytes + (whole + more if on_cuda else 0),
            process_bytes=cost.process_bytes + (0 if on_cuda else more),
        )
        if self.passes is not None and self.passes.splits:
            sums = sum(CarriedBytes.of(self.skeletons(), self.itemsize))
            cost = replace(cost, fixed_bytes=cost.fixed_bytes + sums)
        if self.passes is not None and self.passes.is_shared:
            on_cpu = self.profile.device_class is DeviceClass.cpu
            transient = head_transient_bytes(
                *(self.model.vocab_size, self.model.hidden_size),
                num_tokens=-(-self.batch_size * self.seq_len // self.num_sharers),
                loss_tile=self.loss_tile,
                itemsize=self.itemsize,
                casts_products=on_cpu,
                is_frozen=True,
            )
            tables = 0 if on_cpu else 1 if self.model.tie_embeddings else 2  # the meter of cpu leaves these sums out
            rows = WIDE_BYTES * tables * self.model.vocab_size * self.model.hidden_size
            fixed_bytes = cost.fixed_bytes + rows
            cost = replace(cost, fixed_bytes=fixed_bytes, head_bytes=0, head_transient_bytes=transient)
        if self.has_head:
            return cost
        return replace(cost, norm=None, head_bytes=0, head_flops=0.0, head_backward_flops=0.0, head_transient_bytes=0)

    @property
    def _whole_bytes(self) -> tuple[int, int]:
        """Gathered weights that stay from pass to pass of a pipeline, and gradients that wait whole, of the blocks.

        FSDP2 reduces gradients in the last micro-batch. Until then they wait in fp32, in place of their shards; where
        backward is split, their sums are counted by themselves.
        """
        skeletons = self.skeletons()
        gradients = sum(CarriedBytes.of(skeletons, self.itemsize))
        shards = gradients // self.num_shards
        if self.passes is None:
            return 0, gradients - shards if self.micro_batches > 1 else 0
        weights = [weights_of(skeleton) for skeleton in skeletons]
        gathered = self.itemsize * max(0, sum(weights) - UNSHARDED_BLOCKS * max(weights))
        return gathered, -shards if self.passes.splits else gradients - shards

    def shape(self, plan: MemoryPlan | None = None, layer: int = 0) -> BlockShape:
        """Of a block, for pricing layer plans; under a plan of the sweep by chunk of its longest chunk."""
        own = self if plan is None else self.with_cuts(plan.cuts)
        if plan is not None and plan.sweep is Sweep.by_chunk:
            chunk = replace(own, seq_len=plan.cuts.longest_chunk(own.seq_len), buckets=()).shape()
            return replace(chunk, schedule=schedule_of(chunk_skeleton(own.skeleton(layer))), cuts=plan.cuts)
        shape = block_shape(
            own.model,
            own.skeleton(layer),
            batch_size=own.batch_size,
            seq_len=own.seq_len,
            itemsize=own.itemsize,
            cuts=own.cuts(),
            device_class=own.profile.device_class,
            degree=own.num_sharers,
        )
        if self.codec is not None:
            shape = replace(shape, flops_per_byte=self._flops_per_byte())
        if self.passes is None:
            return shape
        return replace(shape, shares=self.passes.shares, splits=self.passes.splits)

    def _flops_per_byte(self) -> float:
        """Of compute against the device's memory, which the same ranks share; 0 where a rate is unknown."""
        flops, memory = self.rates().flops, self.profile.link_bytes_per_s(self.profile.memory_gbps)
        return 0.0 if flops is None or memory is None else flops * self.ranks_per_device / memory

    def blocks(self, plan: MemoryPlan) -> list[BlockCost]:
        """What every block costs under a plan."""
        kinds = list(zip(self.skeletons(), plan.layers, strict=True))
        first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
        costs = {kind: self.shape(plan, layer).cost(kind[1]) for kind, layer in first.items()}
        return [costs[kind] for kind in kinds]

    def skeleton(self, layer: int = 0) -> Skeleton:
        """Of a block of the model, as one rank runs it."""
        return on_rank([block_skeleton(self.model, self.adapter, layer)], self.cuts(), **self._degrees)[0]

    def skeletons(self) -> list[Skeleton]:
        """Of all blocks of the model; those that are alike are one object."""
        return on_rank(block_skeletons(self.model, self.adapter), self.cuts(), **self._degrees)

    @property
    def _degrees(self) -> dict[str, int]:
        return {"tensor": self.tensor_degree, "ulysses": self.ulysses, "ring": self.ring}

    @property
    def may_run_by_chunk(self) -> bool:
        """Whether auto may choose the sweep by chunk.

        Rows of several lengths go through one sweep; rings, head groups and codecs are of that by layer.
        """
        one_length = not self.buckets and self.tile_rows is None and self.sweep is not Sweep.by_layer
        return one_length and self.ring == 1 and self.head_groups in (None, 1) and self.codec is None

    @property
    def is_mixed(self) -> bool:
        """Whether the model has blocks of several kinds."""
        return len(set(block_skeletons(self.model))) > 1

    def cuts(self) -> Cuts:
        """Where its plans cut the tokens."""
        is_alst = self.preset is MemoryPreset.alst
        cuts = alst_cuts(block_skeleton(self.model)) if is_alst else default_cuts(self.profile.device_class)
        cuts = replace(cuts, head_groups=self.head_groups or 1, codec=self.codec)
        if self.token_tile is not None:
            return replace(cuts, token_tile=self.token_tile)
        if self.tile_rows is None:
            return cuts
        return replace(cuts, token_tile=max(1, cuts.token_tile * self.tile_rows // self.batch_size))

    def process_bytes(self) -> int:
        """Host memory of one rank that no tier counts: its process, on cpu its state, and its part of the node's.

        The node's are the driver, Ray, and what memory_guard keeps free.
        """
        return self.cost().process_bytes + (NODE_BYTES[self.launcher] + SAVE_BELOW_BYTES) // self.ranks_per_node

    def budgets(self) -> Budgets:
        """What every tier, and host memory as a whole, has for one rank."""
        profile, device = self.profile, self.device_budget_bytes
        on_cpu = profile.device_class is DeviceClass.cpu
        if device is None and profile.device_memory_gib is not None:
            device = int(profile.device_memory_gib * (1.0 if on_cpu else CUDA_USABLE_SHARE) * GIB)
        tiers = {
            Medium.hbm: device,
            Medium.host: self._node_share(self.host_budget_bytes, profile.host_gib),
            Medium.ssd: self._node_share(self.ssd_budget_bytes, profile.ssd_gib),
        }
        memory = None if profile.host_gib is None else int(profile.host_gib * GIB / self.ranks_per_node)
        return Budgets(tiers, memory, self.process_bytes(), device_is_memory=on_cpu)

    @property
    def ranks_per_device(self) -> int:
        """Ranks that share one device: on CPU all of a node."""
        return self.ranks_per_node if self.profile.device_class is DeviceClass.cpu else 1

    def rates(self) -> Rates:
        """Rates of one rank while all ranks of its node are at work: they share drives, and on CPU cores and memory."""
        profile, ranks, ranks_per_device = self.profile, self.ranks_per_node, self.ranks_per_device

        def share(rate: float | None, num_ranks: int) -> float | None:
            return None if rate is None else rate / num_ranks

        def copies(gbps: float | None) -> float | None:
            own = share(profile.link_bytes_per_s(gbps), ranks_per_device)
            known = [
                rate for rate in (own, share(profile.link_bytes_per_s(profile.host_gbps), ranks)) if rate is not None
            ]
            return None if own is None else min(known)

        expected = Rates(
            flops=share(profile.flops_per_s(self.itemsize), ranks_per_device),
            d2h=copies(profile.d2h_gbps),
            h2d=copies(profile.h2d_gbps),
            ssd_write=share(profile.link_bytes_per_s(profile.ssd_write_gbps), ranks),
            ssd_read=share(profile.link_bytes_per_s(profile.ssd_read_gbps), ranks),
        )
        return self.correction.of(expected)

    def _node_share(self, budget_bytes: int | None, node_gib: float | None) -> int | None:
        # Where no budget is given a tier may take half of what the node has: the rest is the user's.
        if budget_bytes is None and node_gib is not None:
            return int(node_gib * GIB / 2 / self.ranks_per_node)
        return budget_bytes
