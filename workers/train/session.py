"""One rank from start to end: everything it opens, in order, and closes again. The entry for Ray, a process, a test."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from headrace.kernels.api import choices, choose_operator
from headrace.storage.build import open_stack
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import DeviceBudgetExceeded, InputError
from headrace.storage.core.records import Medium
from headrace.storage.stack import TierStack
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.batch import TokenBatch
from headrace.workers.data.loader import TokenLoader, open_loader
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.memory.out_of_memory import is_out_of_memory, memory_peaks
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.parallel.context import TokenIndex
from headrace.workers.parallel.dims import Axis, resolve_dims
from headrace.workers.parallel.process_group import pick_device, process_group
from headrace.workers.telemetry.flops import MicroBatch, mfu
from headrace.workers.telemetry.gemm import measure_gemm_flops
from headrace.workers.telemetry.rate_book import RateBook
from headrace.workers.telemetry.records import OnStage, OnStep, RankResult, ShouldStop, Stage
from headrace.workers.train.allocator import allocator_record
from headrace.workers.train.checkpoint import Checkpointer
from headrace.workers.train.config import Precision
from headrace.workers.train.drift import DriftWatch
from headrace.workers.train.drive_life import DriveLife
from headrace.workers.train.engine import TrainEngine
from headrace.workers.train.gauges import StepGauges
from headrace.workers.train.loop import NewestPlan, TrainLoop
from headrace.workers.train.model_state import digest_of_weights
from headrace.workers.train.predicted import predicted_of_step
from headrace.workers.train.runtime import torch_runtime
from headrace.workers.train.step_records import StepRecords, facts_of
from headrace.workers.train.step_trace import StepProfiler
from headrace.workers.train.timeline_file import TIMELINE_FILE

TRANSFERS_FILE = "transfers.parquet"


def run_rank(
    job: TrainJob,
    context: RankContext,
    *,
    on_step: OnStep,
    should_stop: ShouldStop,
    newest_plan: NewestPlan = lambda: None,
    on_stage: OnStage = lambda stage, part=None: None,
) -> RankResult:
    """Train as one rank of the job's group until it is finished or asked to stop.

    Blocks until the run ends; needs nothing but the job and its place in the group. A restarted group (attempt > 0)
    always resumes.

    Args:
        on_step: called after every step, from this thread.
        should_stop: polled once per step, from this thread.
        newest_plan: the plan that this rank was last told to change to; polled once per step, from this thread.
        on_stage: called whenever this thread begins something else, and for every layer or chunk of a step.

    Raises:
        InputError, MachineError: the job cannot run here. TrainingDiverged, CheckpointFailed, TierFull (its kind
        DeviceBudgetExceeded: the device is full), TransferFailed: it could not continue. What was opened is closed.
    """
    try:
        return _run(job, context, on_step, should_stop, newest_plan, on_stage)
    except Exception as error:
        if isinstance(error, DeviceBudgetExceeded) or not is_out_of_memory(error):
            raise
        peaks = ", ".join(f"{name} {value:.6g}" for name, value in memory_peaks(torch.device(context.device)).items())
        budget_gib = job.tiers.device.budget_gib
        given = "the device's own memory" if budget_gib is None else f"tiers.device.budget_gib={budget_gib:g}"
        raise DeviceBudgetExceeded(
            f"device: {given} is not enough. Raise it, shard over more ranks, choose memory=recompute or "
            f"memory=offload_host, or lower data.seq_len, train.batch_size or train.loss_tile. {error}"
            + (f" ({peaks})" if peaks else "")
        ) from error


def _run(
    job: TrainJob,
    context: RankContext,
    on_step: OnStep,
    should_stop: ShouldStop,
    newest_plan: NewestPlan,
    on_stage: OnStage,
) -> RankResult:
    device = pick_device(context)
    folder = rank_folder(Path(job.run_dir), context.rank)
    with CleanUps() as closing:
        closing.enter_context(torch_runtime(job.train, context))
        on_stage(Stage.group)
        closing.enter_context(process_group(context, device))
        on_stage(Stage.data)
        log = TransferLog(context.rank, spool_folder=folder)
        closing.callback(log.close)
        closing.callback(write_or_warn, log.write_parquet, transfers_path(folder, context.attempt), "transfer log")
        operators = record_operators(job, device)
        stack = None
        if any(lease.num_bytes for lease in context.leases):
            stack = open_stack(context.leases, job.tiers, device=device, log=log)
            closing.callback(stack.close)
        loader = rows_of(job, context)
        closing.callback(loader.close)
        loader.data.check_vocab(job.model.vocab_size)
        on_stage(Stage.model)
        engine = TrainEngine(job, device, stack, on_stage=on_stage, records=open_records(job, context, stack))
        closing.callback(engine.close)
        closing.callback(write_or_warn, engine.timeline.write, folder / TIMELINE_FILE, "timeline")
        checkpointer = open_checkpointer(job, context, device, loader.data.tokenizer_path)
        peak_flops, peak_source = peak_of(job, device)

        def utilisation(batches: Sequence[TokenBatch], step_s: float) -> Mapping[str, float]:
            computed = [micro_batch_of(b, engine.job.plan_of(b.seq_len), job.parallel.pipeline) for b in batches]
            return mfu(job.model, computed, step_s=step_s, peak_flops=peak_flops, adapter=job.adapter)

        gauges = open_gauges(job, context, engine, stack)
        closing.callback(gauges.close)
        loop = TrainLoop(
            job,
            engine,
            loader,
            checkpointer,
            gauges,
            profiler=StepProfiler(job.train.profile, folder, engine.timeline, log, device),
            utilisation=utilisation,
            on_step=on_step,
            should_stop=should_stop,
            newest_plan=newest_plan,
            on_stage=on_stage,
        )
        engine.follow(loop.note, lambda: loop.saved_step)
        if gpu_is_unused(device):
            loop.note("gpu_unused", "the run trains on the CPU, and this machine has a GPU: hardware=h200, ...")
        outcome = loop.run(may_resume=job.resume or context.attempt > 0)
        facts = closing_facts(context, device, stack)
        facts |= engine.facts() | {"operators": operators, "peak_flops": peak_flops, "peak_source": peak_source}
        facts |= {"transfers_left_out": log.num_left_out, "events": [vars(event) for event in loop.events]}
    return RankResult(context.rank, outcome, loop.step, facts)


def micro_batch_of(batch: TokenBatch, plan: MemoryPlan, num_stages: int = 1) -> MicroBatch:
    """What a rank computes of a micro-batch under a plan of all blocks: of so many stages, the mean."""
    lengths, prefixes = batch.document_lengths, batch.document_prefixes
    return MicroBatch(lengths, plan, len(batch.tokens), prefixes, batch.num_sharers * num_stages)


def rows_of(job: TrainJob, context: RankContext) -> TokenLoader:
    """The rows that this rank reads, those of its place on the data axis, and its tokens of them.

    Raises:
        InputError: as open_loader, or none is held out for a comparison with dense attention.
    """
    dims = resolve_dims(job.parallel, context.world_size)
    place = dims.coordinate(context.rank)
    index = TokenIndex.of(dims, context.rank, job.parallel.ring_layout, job.model.sliding_window)
    loader = open_loader(job.data, train=job.train, rank=place[Axis.data], world_size=dims.data, own_tokens=index.split)
    if job.compare_sparse_every and loader.index.num_eval == 0:
        loader.close()
        raise InputError(
            f"memory.sparse.compare_every={job.compare_sparse_every}: data.eval_fraction={job.data.eval_fraction} of "
            f"{loader.data.num_rows} row(s) holds none out for the comparison with dense attention; raise it, prepare "
            "more data, or set memory.sparse.compare_every=0"
        )
    return loader


def open_checkpointer(
    job: TrainJob, context: RankContext, device: torch.device, tokenizer: Path | None
) -> Checkpointer:
    """The run's checkpoints. The first rank reads frozen weights that a folder holds once, for their digest."""
    is_named = job.adapter.is_on and job.model.init_from is not None
    return Checkpointer(
        Path(job.run_dir),
        keep=job.checkpoint.keep,
        model=job.model,
        device=device,
        tokenizer=tokenizer,
        adapter=job.adapter,
        trunk=digest_of_weights(str(job.model.init_from)) if is_named and context.rank == 0 else None,
        in_stages=job.parallel.pipeline > 1,
        attempt=context.attempt,
    )


def open_records(job: TrainJob, context: RankContext, stack: TierStack | None) -> StepRecords | None:
    """The rank's records of half-done steps, where the job asks for them."""
    if not job.checkpoint.every_chunks:
        return None
    folder = rank_folder(Path(job.run_dir), context.rank)
    return StepRecords(folder, job.checkpoint.every_chunks, facts_of(job, context), stack)


def gpu_is_unused(device: torch.device) -> bool:
    """A run on the CPU of a machine that has a GPU is seldom meant."""
    return device.type == "cpu" and torch.cuda.is_available()


def open_gauges(job: TrainJob, context: RankContext, engine: TrainEngine, stack: TierStack | None) -> StepGauges:
    """The rank's gauges, with the count of its drive where it has one; a node's first rank reports for the drive."""
    predicted, speaks = predicted_of_step(job, job.lengths), context.local_rank == 0
    drift = DriftWatch(predicted, job.tiers.drift_pct, rank=context.rank, speaks_for_drive=speaks)
    folders = [Path(folder) for lease in context.leases if lease.medium is Medium.ssd for folder in lease.folders]
    life = None
    if stack is not None and Medium.ssd in stack.stats():
        life = DriveLife(folders, job.tiers.ssd.endurance, speaks=speaks)
    return StepGauges(engine.meter, stack, drift=drift, life=life)


def rank_folder(run_dir: Path, rank: int) -> Path:
    """What one rank leaves in the run folder besides checkpoints."""
    return run_dir / "ranks" / f"rank{rank}"


def transfers_path(folder: Path, attempt: int) -> Path:
    """The rank's part of the transfer log; a restarted group does not overwrite what the one before it moved."""
    return folder / (TRANSFERS_FILE if attempt == 0 else f"transfers-attempt{attempt}.parquet")


def write_or_warn(write: Callable[[Path], None], path: Path, what: str) -> None:
    """Write a record of the rank; a disk that does not take it is no reason to lose the run or its own error."""
    try:
        write(path)
    except OSError as error:
        warnings.warn(f"{path}: the {what} could not be written: {error}", stacklevel=2)


def peak_of(job: TrainJob, device: torch.device) -> tuple[float, str]:
    """FLOP/s that 100 % of MFU stands for, and how it is known."""
    return (job.peak_flops, "hardware profile") if job.peak_flops else own_gemm_flops(device, job.train.precision)


def own_gemm_flops(device: torch.device, precision: Precision) -> tuple[float, str]:
    """The device's GEMM rate and how it is known: measured once on this machine, for the dtype and number of threads.

    The random numbers that the measurement draws do not count in the run.
    """
    dtype, book = compute_dtype(precision), RateBook()

    def measure() -> list[float]:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return [measure_gemm_flops(device, dtype)]

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    (flops,) = book.rates(f"peak {dtype} {where}", measure)
    assert flops is not None
    return flops, f"best matrix product, {book.note()}"


def compute_dtype(precision: Precision) -> torch.dtype:
    """In which dtype matrices are multiplied."""
    return torch.bfloat16 if precision is Precision.bf16 else torch.float32


def record_operators(job: TrainJob, device: torch.device) -> dict[str, dict[str, str]]:
    """The implementation of each operator of this run, and why: operator to {wanted, got, why}, JSON-able.

    Raises:
        InputError: train.kernels or train.attention names what cannot compute here.
    """
    wanted, dtype = job.train.kernels, compute_dtype(job.train.precision)
    try:
        found = choices(wanted, device, dtype)
    except ValueError as error:
        raise InputError(f"train.kernels={wanted.value}: {error}; or choose train.kernels=auto") from error
    record = {each.op: {"wanted": each.wanted.value, "got": each.got.value, "why": each.why} for each in found}
    attention = job.train.attention
    like_q = torch.empty(0, job.model.head_size, device=device, dtype=dtype)
    try:
        whole, packed = (
            choose_operator(attention, like_q, packed=packed, window=job.model.sliding_window).value
            for packed in (False, True)
        )
    except ValueError as error:
        raise InputError(f"train.attention={attention.value}: {error}; or choose train.attention=auto") from error
    record["attention"] = {"wanted": attention.value, "got": whole}
    if packed != whole:
        record["attention"]["got if a row holds several documents"] = packed
    return record


def closing_facts(context: RankContext, device: torch.device, stack: TierStack | None) -> dict[str, Any]:
    """What the run's record should know about this rank, JSON-able."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "rank": context.rank,
        "world_size": context.world_size,
        "attempt": context.attempt,
        "pid": os.getpid(),
        "device": str(device),
        "device_name": name,
        "torch": torch.__version__,
        "allocator": allocator_record(),
        "num_threads": torch.get_num_threads(),
        "tiers": None if stack is None else stack.record(),
    }
