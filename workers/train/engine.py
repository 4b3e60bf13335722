"""One rank's model, optimizer and step. No Ray, no files: the loop decides when, the engine computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from headrace.storage.core.errors import InputError
from headrace.storage.stack import TierStack
from headrace.workers.data.batch import TokenBatch
from headrace.workers.job import TrainJob
from headrace.workers.memory.meter import open_meter
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.memory.policy import MemoryHandle
from headrace.workers.memory.sweeps import Sweeping, apply_plan, open_sweep
from headrace.workers.parallel.apply import of_rank_lengths, parallelize
from headrace.workers.parallel.collectives import PIPELINE, RING, TENSOR, ULYSSES, Traffic
from headrace.workers.parallel.dims import SAME_TOKEN_AXES, TOKEN_AXES, Axis, resolve_dims
from headrace.workers.parallel.meshes import Meshes
from headrace.workers.parallel.pipeline.actions import resolve_pipeline
from headrace.workers.parallel.pipeline.by_stage import ByStage, PipelineRank
from headrace.workers.parallel.pipeline.messages import Lines
from headrace.workers.parallel.tensor import is_whole
from headrace.workers.parallel.ulysses import ContextGroup
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import OnStage, Stage
from headrace.workers.train.config import Allocator, Precision
from headrace.workers.train.optim import ShardedAdamW, clip_gradients, local_square_sum, lr_at
from headrace.workers.train.pace import Pace
from headrace.workers.train.step_addresses import open_addresses
from headrace.workers.train.step_records import StepRecords
from headrace.workers.train.timeline import Timeline
from headrace.workers.train.timeline_file import BACKWARD, FORWARD
from headrace.workers.train.weights import build_model, fill_weights

GIB = 1024**3
SENT_NAMES = {
    TENSOR: names.TENSOR_SENT_GIB,
    ULYSSES: names.ULYSSES_SENT_GIB,
    RING: names.RING_SENT_GIB,
    PIPELINE: names.PIPELINE_SENT_GIB,
}
MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optim."


@dataclass(frozen=True)
class StepTotals:
    """What all ranks agreed on before a step.

    Args:
        num_targets / num_tokens: sums over ranks and micro-batches.
        stop: whether any rank was asked to stop.
        change_plan: whether all ranks have the new plan.
    """

    num_targets: int
    num_tokens: int
    stop: bool
    change_plan: bool = False


@dataclass(frozen=True)
class StepResult:
    """One step, the same on all ranks but for `bad_micro_batches`.

    Args:
        loss: per target of the global batch; None where no target counts.
        grad_norm: of its gradient before clipping.
        lr: learning rate of the step.
        bad_micro_batches: those of this rank whose own loss is not finite.
    """

    loss: float | None
    grad_norm: float
    lr: float
    bad_micro_batches: tuple[int, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are finite, so that the weights were updated."""
        return math.isfinite(self.grad_norm) and (self.loss is None or math.isfinite(self.loss))


class TrainEngine:
    """Builds the sharded model of a job and trains it, step by step. Needs a process group; all ranks call alike.

    Args:
        device: of this rank.
        stack: the rank's tiers, where the plan moves tensors.
        on_stage: called for every layer or chunk of a step.
        records: of half-done steps, where the job asks for them.
    """

    def __init__(
        self,
        job: TrainJob,
        device: torch.device,
        stack: TierStack | None = None,
        *,
        on_stage: OnStage = lambda stage, part=None: None,
        records: StepRecords | None = None,
    ) -> None:
        self.job, self.device, self._records = job, device, records
        self._dims = resolve_dims(job.parallel, dist.get_world_size())
        self._meshes = Meshes.build(self._dims, device.type)
        place = self._dims.coordinate(dist.get_rank())
        self._data_rank = place[Axis.data]
        self.model = build_model(job.model, job.train, job.adapter)
        self._part: PipelineRank | None = None
        if self._dims.pipeline > 1:
            pipeline = resolve_pipeline(job.parallel, job.train.micro_batches)
            self._part = PipelineRank(pipeline, place[Axis.pipeline], job.model.num_layers)
            self._part.cut(self.model, self._meshes.stages)
        self._addresses = open_addresses(device) if job.train.allocator is Allocator.planned else None
        budget_gib = job.tiers.device.budget_gib
        self.meter = open_meter(device, None if budget_gib is None else round(budget_gib * GIB))
        self.traffic, self._pace = Traffic(), Pace(on_stage, len(self.model.blocks))
        self._stack, self._context = stack, ContextGroup.of(self._meshes, self.traffic)
        self._handle = self._open_handle()
        self._sweep = self._open_sweep()
        fill_weights(
            self.model,
            job.model,
            seed=job.train.seed,
            device=device,
            on_device=job.init_on_device,
            adapter=job.adapter,
        )
        has_head = self._part is None or self._part.has_last
        self.timeline = Timeline(list(self.model.blocks), device, self._on_block, has_head=has_head)
        self._named_params = list(self.model.named_parameters())
        self._trained = [(name, param) for name, param in self._named_params if param.requires_grad]
        self._optimizer = ShardedAdamW(self._trained, job.optim)

    def follow(self, note: Callable[[str, str], None], saved_step: Callable[[], int | None]) -> None:
        """The loop that makes the steps: is told what happens to planned addresses; see also StepRecords.follow."""
        if self._addresses is not None:
            self._addresses.note = note
        if self._records is not None:
            self._records.follow(self.model, note, saved_step)

    def agree(self, batches: Sequence[TokenBatch], *, stop: bool, has_plan: bool = False) -> StepTotals:
        """Add up the step's targets and tokens over all ranks; stop together when one rank must stop.

        One all-reduce of four host integers, before the forward pass: the loss needs the global count. Ranks that
        work on the same tokens count them once, and each of them may stop the run.

        Args:
            has_plan: whether this rank has a new plan; they change to it when all have it.
        """
        num_targets = sum(batch.num_targets for batch in batches)
        num_tokens = sum(batch.num_tokens for batch in batches)
        totals = torch.tensor([num_targets, num_tokens, int(stop), int(has_plan)], dtype=torch.int64)
        self._meshes.add_up(totals, *TOKEN_AXES)
        self._meshes.add_up(totals[2:], *SAME_TOKEN_AXES)
        num_targets, num_tokens, num_stops, num_plans = totals.tolist()
        return StepTotals(num_targets, num_tokens, num_stops > 0, num_plans == dist.get_world_size())

    def change_plan(self, job: TrainJob) -> None:
        """Follow the plans of this job from the next step on; nothing else of it may differ. Between steps only.

        Raises:
            InputError: a plan does not fit the blocks, or needs a tier that is not open.
        """
        self._sweep.close()
        self.job = job
        self._handle = apply_plan(
            self.model,
            self._own(job.plan),
            self._stack,
            meter=self.meter,
            bucket_plans=of_rank_lengths(job.bucket_plans, self._context),
            layers=None if self._part is None else self._part.layers,
        )
        self._sweep = self._open_sweep()
        if self._records is not None:
            self._records.change_plan(job)

    def addresses_of_step(self) -> AbstractContextManager[None]:
        """Goes around train_step: what is freed inside it takes planned addresses, where the job says so."""
        return nullcontext() if self._addresses is None else self._addresses.step()

    def train_step(self, step: int, batches: Sequence[TokenBatch], totals: StepTotals) -> StepResult:
        """Forward and backward over the rank's micro-batches, then one AdamW update.

            loss = sum over ranks, micro-batches, tokens of the token loss / totals.num_targets

        Every micro-batch's sum is divided by the global count before its backward, and gradients are summed over
        micro-batches and ranks, both in fp32. A step without any target has no loss, and its gradient is 0. Where loss
        or gradient is not finite, neither the weights nor the optimizer's state are touched, on no rank: the sums over
        all ranks decide.

        Args:
            step: index of the optimizer step, from 0.
            batches: this rank's micro-batches.
        """
        self._handle.take_page_counts()  # evaluations read pages, too
        self.traffic.take()
        self.timeline.begin()
        losses = self._gradients_of(step, batches, max(1, totals.num_targets))
        loss, grad_norm = self._global_loss_and_norm(losses, totals.num_targets)
        lr = lr_at(step, self.job.optim, self.job.train.steps)
        result = StepResult(loss, grad_norm, lr)
        if not result.is_finite:
            self._optimizer.drop_gradients()
            bad = tuple(i for i, own in enumerate(losses) if not math.isfinite(float(own)))
            return replace(result, bad_micro_batches=bad)
        clip_gradients(self.model.parameters(), grad_norm, self.job.train.grad_clip)
        self._optimizer.step(lr)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a step ends when its update is done: clocks and peaks are read now
        self.timeline.end(step)
        return result

    def _gradients_of(self, step: int, batches: Sequence[TokenBatch], divisor: int) -> list[torch.Tensor]:
        """Forward and backward of all micro-batches; their losses. With records, of those that no process has done."""
        if isinstance(self._sweep, ByStage):
            starts = accumulate((self._dims.data * len(batch.tokens) for batch in batches), initial=0)
            rows = [start + self._data_rank * len(batch.tokens) for start, batch in zip(starts, batches, strict=False)]
            seed = self.job.train.seed
            found = self._sweep.forward_backward(batches, divisor, step=step, seed=seed, rows=rows)
            return [own.double() for own in found]
        records, first, losses, first_row = self._records, 0, [], 0
        if records is not None:
            first, done = records.begin(step, batches)
            losses = [loss.to(self.device) for loss in done]
        for micro_batch, batch in enumerate(batches):
            row = first_row + self._data_rank * len(batch.tokens)
            first_row += self._dims.data * len(batch.tokens)
            if micro_batch < first:
                continue
            self._pace.begin(Stage.compute, micro_batch, len(batches))
            is_last = micro_batch == len(batches) - 1
            own = self._sweep.forward_backward(
                batch,
                divisor,
                step=step,
                micro_batch=micro_batch,
                seed=self.job.train.seed,
                row=row,
                is_last=is_last,
            )
            losses.append(own.double())
            if records is not None and not is_last:
                records.end_pass(losses)
        if records is not None:
            records.end()
        return losses

    @torch.no_grad()
    def evaluate(self, batches: Sequence[TokenBatch]) -> float:
        """Loss per target over the batches of all ranks. No tier is touched.

        Raises:
            InputError: none of the held-out targets counts.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.model.eval()
        for number, batch in enumerate(batches):
            self._pace.begin(Stage.evaluate, number, len(batches))
            sums[0] += self._sweep.evaluate(batch).double()
            sums[1] += batch.num_targets
        self.model.train()
        # What keeps its gathered weights after a forward: without a backward nothing gives them back.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        self._meshes.add_up(sums, *TOKEN_AXES)
        self._meshes.add_up(sums[:1], Axis.pipeline)
        loss_sum, num_targets = sums.tolist()
        if num_targets == 0:
            raise InputError(
                "evaluation: no held-out token counts in the loss; set train.eval_every=0 or check the data"
            )
        return float(loss_sum / num_targets)

    def compare_sparse(self, batches: Sequence[TokenBatch]) -> dict[str, float]:
        """Losses of the same batches with dense attention and with that of a plan with pages, by metric name.

        Raises:
            InputError: as evaluate.
        """
        sparse = self.evaluate(batches)
        with self._handle.dense():
            dense = self.evaluate(batches)
        return {
            names.SPARSE_LOSS_DENSE: dense,
            names.SPARSE_LOSS_SPARSE: sparse,
            names.SPARSE_LOSS_GAP: sparse - dense,
        }

    def pages_read_pct(self) -> float | None:
        """Pages that attention has read in the last step, of those that were there; None without a choice of pages.

        Called after the step, and once.
        """
        num_read, num_there = self._handle.take_page_counts()
        return 100 * num_read / num_there if num_there else None

    def sent_gib(self) -> dict[str, float]:
        """What this rank has sent in the last step to those that share its rows or weights, by metric name.

        Called after the step, and once.
        """
        return {SENT_NAMES[axis]: num_bytes / GIB for axis, num_bytes in self.traffic.take().items()}

    def block_seconds(self) -> dict[str, float]:
        """Forward and backward of all blocks in the last step, by metric name."""
        return {
            names.FORWARD_S: self.timeline.seconds(FORWARD),
            names.BACKWARD_S: self.timeline.seconds(BACKWARD),
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights and moments by name: the live (sharded) tensors, to be saved, or filled in place and then resumed.

        A frozen trunk that a folder holds is not among them; one that was drawn at random is.
        """
        is_named = self.job.model.init_from is not None
        saved = self._trained if is_named else self._named_params
        weights = {MODEL_PREFIX + name: param.detach() for name, param in saved}
        moments = {OPTIMIZER_PREFIX + name: tensor for name, tensor in self._optimizer.moments().items()}
        return {**weights, **moments}

    def load_state_dict(self, fill: Callable[[dict[str, torch.Tensor]], bool], num_updates: int) -> bool:
        """Continue after so many updates: `fill` writes into the tensors of state_dict(). Returns its result."""
        complete = fill(self.state_dict())
        self._optimizer.set_num_steps(num_updates)
        return complete

    def facts(self) -> dict[str, str]:
        """How the sweep ran, for the run's record."""
        planned = {} if self._addresses is None else {"addresses": str(self._addresses)}
        return {**self._sweep.facts(), **planned}

    def close(self) -> None:
        """Drop what an unfinished step left in the tiers and give the blocks their own forward back."""
        self._sweep.close()
        if self._records is not None:
            self._records.close()

    def _open_handle(self) -> MemoryHandle:
        """Shard the model and make it obey the job's plan."""
        job = self.job
        return parallelize(
            self.model,
            mesh=self._meshes.params,
            context=self._context,
            precision=job.train.precision,
            plan=self._own(job.plan),
            stack=self._stack,
            meter=self.meter,
            bucket_plans={length: self._own(plan) for length, plan in job.bucket_plans.items()},
            layers=None if self._part is None else self._part.layers,
        )

    def _own(self, plan: MemoryPlan) -> MemoryPlan:
        """Of a plan of all blocks, that of this rank's."""
        return plan if self._part is None else plan.of_layers(self._part.layers)

    def _open_sweep(self) -> Sweeping | ByStage:
        """That of the plan."""
        train, is_bf16 = self.job.train, self.job.train.precision is Precision.bf16
        if self._part is not None:
            return ByStage(
                self.model,
                self._handle,
                self.meter,
                self._part,
                Lines.of(self._dims, dist.get_rank()),
                traffic=self.traffic,
                loss_tile=train.loss_tile,
                dtype=torch.bfloat16 if is_bf16 else torch.float32,
                device=self.device,
                on_pass=self._begin_pass,
            )
        return open_sweep(
            self.model,
            self._handle,
            self.meter,
            loss_tile=train.loss_tile,
            itemsize=2 if is_bf16 else 4,
            on_chunk=self._pace.on_chunk,
            records=self._records,
        )

    def _on_block(self, layer: int, is_backward: bool) -> None:
        self._pace.on_block(layer, is_backward)
        if self._addresses is not None:
            self._addresses.mark()

    def _begin_pass(self, micro_batch: int, num_micro_batches: int) -> None:
        self._pace.begin(Stage.compute, micro_batch, num_micro_batches)
        self.timeline.begin_pass(micro_batch)

    def _global_loss_and_norm(self, losses: Sequence[torch.Tensor], num_targets: int) -> tuple[float | None, float]:
        """Both in one all-reduce over the data axis. Ranks that hold equal gradients, replicas (HSDP) and those of a
        parameter that tensor ranks have whole, count their share each."""
        # A tied weight has its whole gradient at both ends of a pipeline, and counts at the first.
        head = None if self._part is None or not self._part.has_copy(self.model) else self.model.head_weight
        grads = [(p.grad, is_whole(p)) for _, p in self._trained if p.grad is not None and p is not head]
        square_sum = local_square_sum(grad for grad, is_copy in grads if not is_copy)
        if copies := [grad for grad, is_copy in grads if is_copy]:
            square_sum += local_square_sum(copies) / self._dims.tensor
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for own in losses:
            loss_sum += own
        sums = torch.stack([loss_sum, square_sum.to(self.device) / self._dims.num_replicas])
        self._meshes.add_up(sums, *TOKEN_AXES)
        self._meshes.add_up(sums[1:], *SAME_TOKEN_AXES)  # these have other parameters
        self._meshes.add_up(sums[:1], Axis.pipeline)  # the last stage knows the loss
        total_loss, total_square = sums.tolist()
        return total_loss / num_targets if num_targets else None, math.sqrt(total_square)
