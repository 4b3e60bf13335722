"""Helpers for tests and benchmarks that need a whole, tiny training job, or several ranks on one machine."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import pickle
import random
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from headrace.storage.config import TiersConfig
from headrace.storage.core.outside import parse_json, read_regular
from headrace.storage.core.ports import free_port
from headrace.storage.core.records import Direction, Lease, Medium
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.config import DataConfig, Loader, SourceFormat
from headrace.workers.data.prepare import prepare
from headrace.workers.job import NewPlan, RankContext, TrainJob
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence
from headrace.workers.memory.presets import preset_plan
from headrace.workers.memory.schedule import STORES_IN_FLIGHT, num_forwarded
from headrace.workers.model.config import Family, ModelConfig
from headrace.workers.model.skeleton import dense_skeleton, opaque_skeleton
from headrace.workers.model.tensor_cut import shared
from headrace.workers.parallel.config import ParallelConfig
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import OnStep, RankResult, StepReport
from headrace.workers.train.config import CheckpointConfig, OptimConfig, TrainConfig

SAYING = "the river turns a wheel and the wheel turns the stone so that grain becomes flour while nobody sleeps"
TINY_MODEL = ModelConfig(
    name="tiny_test",
    family=Family.llama,
    vocab_size=0,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
)
RankFunction = Callable[[RankContext], Any]
# What ranks need, imported once by the server that they are forked from: a process that imports torch takes seconds.
PRELOADED = ("torch._dynamo", "torch.distributed.fsdp", "headrace.workers.train.session", "pytest")
Row = tuple[int, float, float, tuple[float, ...]]


@dataclass
class RecordedRun:
    """What a run said: reports in order, a draw of every generator after each step, and its result."""

    reports: list[StepReport] = field(default_factory=list)
    draws: list[tuple[float, ...]] = field(default_factory=list)
    result: RankResult | None = None

    @property
    def curve(self) -> list[Row]:
        """Step, loss, gradient norm, draws: equal curves are equal runs, to the bit."""
        rows = zip(self.reports, self.draws, strict=True)
        keys = (names.LOSS_TRAIN, names.GRAD_NORM)
        # A skipped step has neither; infinity equals itself.
        return [(r.step, *(r.metrics.get(key, math.inf) for key in keys), drawn) for r, drawn in rows]  # type: ignore[misc]

    @property
    def events(self) -> dict[str, str]:
        """Texts of the events of the whole run by kind, one a line."""
        assert self.result is not None
        texts: dict[str, str] = {}
        for event in self.result.stats["events"]:
            texts[event["kind"]] = "\n".join(filter(None, (texts.get(event["kind"]), event["text"])))
        return texts


def run_recorded(
    job: TrainJob,
    context: RankContext | None = None,
    *,
    stop_after: int | None = None,
    also_on_step: OnStep = lambda report: None,
    newest_plan: Callable[[int], NewPlan | None] = lambda num_done: None,
) -> RecordedRun:
    """Run a job in this process and keep what it says.

    Args:
        context: None means the only rank, on the CPU.
        stop_after: ask to stop once that many steps are done.
        also_on_step: called after every step.
        newest_plan: the plan that the rank has been told when so many steps of this start are done.
    """
    from headrace.workers.train.session import run_rank

    run, context = RecordedRun(), context or RankContext()

    def on_step(report: StepReport) -> None:
        run.reports.append(report)
        run.draws.append(_draws(context.device))
        also_on_step(report)

    def should_stop() -> bool:
        return stop_after is not None and bool(run.reports) and run.reports[-1].step >= stop_after

    def told() -> NewPlan | None:
        return newest_plan(len(run.reports))

    run.result = run_rank(job, context, on_step=on_step, should_stop=should_stop, newest_plan=told)
    return run


def plan_for(
    preset: str, model: ModelConfig, prefetch_layers: int = 1, parallel: ParallelConfig | None = None
) -> MemoryPlan:
    """A preset's plan for a dense decoder of this shape."""
    degrees = parallel or ParallelConfig()
    skeleton = shared(dense_skeleton(model), tensor=degrees.tensor, ulysses=degrees.ulysses, ring=degrees.ring)
    return preset_plan(preset, [skeleton] * model.num_layers, prefetch_layers=prefetch_layers)


def foreign_plan(preset: str, num_layers: int, prefetch_layers: int = 1) -> MemoryPlan:
    """A preset's plan for blocks of which nothing is known but their forward."""
    return preset_plan(preset, [opaque_skeleton()] * num_layers, prefetch_layers=prefetch_layers)


def spilled_bytes(log: TransferLog) -> dict[Medium, int]:
    """Bytes that passes of foreign blocks stored to each tier, after the check that the same came back.

    Blobs of a pass's last calls may be left out: they are forwarded (num_forwarded).
    """
    stored, loaded = (
        {record.key: record.num_bytes for record in log.records if record.direction is direction}
        for direction in (Direction.store, Direction.load)
    )
    assert loaded.items() <= stored.items()
    calls: dict[str, set[int]] = {}
    for key in stored:
        calls.setdefault(key.split(".l")[0], set()).add(int(key.rpartition("call")[2]))
    for key in stored.keys() - loaded.keys():
        last = max(calls[key.split(".l")[0]])
        assert int(key.rpartition("call")[2]) > last - STORES_IN_FLIGHT
    return {medium: log.moved_bytes[medium, Direction.store] for medium in (Medium.host, Medium.ssd)}


def input_bytes_moved(
    plan: MemoryPlan,
    input_bytes: int,
    micro_batches: int = 1,
    direction: Direction = Direction.store,
    *,
    with_norm: bool = False,
) -> dict[Medium, int]:
    """What a plan that moves block inputs alone stores to each tier in a step, or loads back (see moved_bytes)."""
    media = [layer.residence("x", 0).medium for layer in plan.layers]
    if direction is Direction.load:
        media = media[: max(0, len(media) - num_forwarded(plan.prefetch_layers, with_norm=with_norm))]
    return {medium: micro_batches * input_bytes * media.count(medium) for medium in (Medium.host, Medium.ssd)}


# Plans of one foreign block.
FOREIGN_KEEP = LayerPlan.of(x=Residence.hbm, saved=Residence.hbm)
FOREIGN_RECOMPUTE, FOREIGN_HOST, FOREIGN_SSD = (
    LayerPlan.of(x=residence) for residence in (Residence.hbm, Residence.host, Residence.ssd)
)


def moved_bytes(run_dir: str, rank: int = 0, attempt: int = 0) -> dict[tuple[str, str], int]:
    """Bytes of a rank's transfer log by (tier, direction)."""
    import pyarrow.parquet as pq

    from headrace.workers.train.session import rank_folder, transfers_path

    sums: dict[tuple[str, str], int] = {}
    for row in pq.read_table(transfers_path(rank_folder(Path(run_dir), rank), attempt)).to_pylist():
        name = row["tier"], row["direction"]
        sums[name] = sums.get(name, 0) + row["bytes"]
    return sums


def _draws(device: str) -> tuple[float, ...]:
    """The next number of every generator of this process."""
    import numpy as np
    import torch

    here = random.random(), float(np.random.rand()), float(torch.rand(()))
    return here if device == "cpu" else (*here, float(torch.rand((), device=device)))


def tiny_data(
    folder: Path, *, seq_len: int = 32, num_documents: int = 60, loader: Loader = Loader.memmap
) -> DataConfig:
    """A prepared folder of a few dozen token rows below `folder`, made of pseudo-random sentences; reused if there.

    Returns:
        A configuration with `prepared` set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source.jsonl"
    if not source.exists():
        draw = random.Random(7)
        words = SAYING.split()
        texts = (" ".join(draw.choice(words) for _ in range(draw.randrange(5, 90))) for _ in range(num_documents))
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(
        name="tiny_test",
        source=str(source),
        format=SourceFormat.jsonl,
        bpe_vocab_size=300,
        seq_len=seq_len,
        cache_dir=str(folder / "cache"),
        eval_fraction=0.1,
        loader=loader,
    )
    return replace(config, prepared=str(prepare(config).folder))


def tiny_job(folder: Path, *, run: str = "run", memory: str = "keep", **overrides: Any) -> TrainJob:
    """A whole job that takes milliseconds a step, its data prepared.

    Args:
        folder: data goes to folder/data (shared by the jobs of one folder), the run to folder/`run`.
        memory: preset of the plan.
        overrides: fields of TrainJob, or of its parts as `train={"steps": 5}`, `model={...}`, `optim`, `data`,
            `parallel`, `tiers`, `checkpoint`.
    """
    data = tiny_data(folder / "data")
    meta = parse_json(read_regular(Path(str(data.prepared)) / "meta.json"))
    parts: dict[str, Any] = {
        "model": replace(TINY_MODEL, vocab_size=meta["vocab_size"]),
        "data": data,
        "optim": OptimConfig(lr=3e-3, warmup_steps=2),
        "parallel": ParallelConfig(),
        "tiers": TiersConfig(),
        "train": TrainConfig(steps=4, batch_size=2, micro_batches=2, loss_tile=32, num_threads=1),
        "checkpoint": CheckpointConfig(at_end=False),
        "peak_flops": 1e11,
    }
    for name, value in overrides.items():
        parts[name] = replace(parts[name], **value) if isinstance(value, dict) else value
    plan = parts.pop("plan", None) or plan_for(memory, parts["model"], parallel=parts["parallel"])
    return TrainJob(run_dir=str(folder / run), plan=plan, **parts)


@contextmanager
def tiny_leases(
    folder: Path, *, num_ranks: int = 1, host_bytes: int = 1 << 20, ssd_bytes: int = 1 << 20
) -> Iterator[list[tuple[Lease, ...]]]:
    """Both slabs of a node for as long as the block runs, and every rank's leases (bytes are per rank)."""
    host = HostSlab(num_ranks * host_bytes, run_id="tiny")
    try:
        ssd = SsdSlab(folder / "tiers", num_ranks * ssd_bytes)
        try:
            holders = [f"rank{rank}" for rank in range(num_ranks)]
            yield [(host.lease(holder, host_bytes), ssd.lease(holder, ssd_bytes)) for holder in holders]
        finally:
            ssd.close()
    finally:
        host.close()


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Starts processes that find what a rank imports already imported."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([name for name in PRELOADED if importlib.util.find_spec(name)])
    return server


def run_distributed(
    function: RankFunction, world_size: int, *, leases: list[tuple[Lease, ...]] | None = None, timeout_s: float = 600.0
) -> list[Any]:
    """Call `function(context)` in `world_size` new processes at once; what they return, by rank.

    The processes have this one's environment, and nothing else of its state.

    Args:
        function: a module-level function, also of a test file, or functools.partial of one.
        leases: of every rank.

    Raises:
        RuntimeError: a rank raised an error or ended; holds its traceback. The others are killed.
        TimeoutError: they took longer than `timeout_s`.
    """
    server = fork_server()
    call, port = _Call.of(function), free_port()
    ranks: dict[Any, tuple[int, Any]] = {}
    for rank in range(world_size):
        context = RankContext(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
            master_port=port,
            leases=leases[rank] if leases else (),
        )
        receiver, sender = server.Pipe(duplex=False)
        process = server.Process(target=_run_one, args=(call, dict(os.environ), context, sender), daemon=True)
        process.start()
        sender.close()
        ranks[receiver] = (rank, process)
    try:
        return _results(ranks, timeout_s)
    except BaseException:
        for _, process in ranks.values():
            process.kill()
        raise
    finally:
        for _, process in ranks.values():
            process.join(timeout=10.0)
            process.kill()


def _results(ranks: dict[Any, tuple[int, Any]], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    until_s = time.monotonic() + timeout_s
    waiting = dict(ranks)
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, until_s - time.monotonic()))
        if not ready:
            silent = sorted(rank for rank, _ in waiting.values())
            raise TimeoutError(f"rank(s) {silent} said nothing for {timeout_s:g} s")
        for receiver in ready:
            rank, _ = waiting.pop(receiver)
            assert isinstance(receiver, multiprocessing.connection.Connection)
            try:
                results[rank], trace = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} ended without a report") from None
            if trace is not None:
                raise RuntimeError(f"rank {rank} failed:\n{trace}")
    return [results[rank] for rank in range(len(ranks))]


@dataclass(frozen=True)
class _Call:
    """A function on its way to a new process, which cannot import a test file by its name."""

    module: str
    file: str | None
    pickled: bytes

    @classmethod
    def of(cls, function: RankFunction) -> _Call:
        bare = function
        while isinstance(bare, partial):
            bare = bare.func
        return cls(bare.__module__, getattr(sys.modules[bare.__module__], "__file__", None), pickle.dumps(function))

    def load(self) -> RankFunction:
        if self.file is not None and self.module != "__main__":
            _import_file(self.module, self.file)
        return pickle.loads(self.pickled)


def _import_file(name: str, file: str) -> None:
    if name in sys.modules or name.startswith("headrace."):
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    parents = name.split(".")[:-1]
    for end in range(1, len(parents) + 1):  # pickle imports them first; folders of tests are no packages
        sys.modules.setdefault(".".join(parents[:end]), types.ModuleType(parents[end - 1]))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _run_one(call: _Call, environ: dict[str, str], context: RankContext, sender: Any) -> None:
    answer: tuple[Any, str | None]
    os.environ.clear()  # the server's is that of the first call
    os.environ.update(environ)
    try:
        answer = (call.load()(context), None)
    except BaseException:
        answer = (None, traceback.format_exc())
    # Plain pickle: multiprocessing would share tensors by a socket that is gone when the rank is.
    sender.send_bytes(pickle.dumps(answer))
    sender.close()


class Bomb:
    """For tests of hostile files: whoever unpickles its pickle makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        """What pickle writes: a call."""
        return os.mkdir, (str(self.folder),)
