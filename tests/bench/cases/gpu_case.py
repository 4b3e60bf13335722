"""One measurement of the GPU headline table: one system, one model shape, one length, in a process of its own.

`python -m headrace.bench.gpu_case '{"system": ..., ...}'` prints a JSON row per step, as it is done, and
one for the case, also when the system fails: running out of memory is an answer, not an accident. Both systems read the
same rows of the same prepared data, start from random weights drawn on the device, and do a whole step: forward,
backward, clipping to norm 1, AdamW.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from headrace.workers.train.allocator import allocator_record, set_allocator

if __name__ == "__main__":
    set_allocator()

import torch

from headrace.bench.model_shapes import model_shape
from headrace.platform.children import tell
from headrace.platform.planning.cost import default_cuts
from headrace.platform.planning.hardware import DeviceClass
from headrace.workers.data.config import DataConfig, Loader
from headrace.workers.data.loader import TokenLoader, open_loader
from headrace.workers.memory.out_of_memory import is_out_of_memory, memory_peaks
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.memory.presets import preset_plan
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.telemetry import names
from headrace.workers.telemetry.flops import MicroBatch, mfu
from headrace.workers.train.config import OptimConfig, Precision, TrainConfig

GIB = 1024**3
LEARNING_RATE = 1e-5


class System(StrEnum):
    """Who trains, and where the layer inputs wait."""

    headrace_recompute = "headrace_recompute"
    headrace_offload_host = "headrace_offload_host"
    headrace_offload_ssd = "headrace_offload_ssd"
    transformers_checkpoint = "transformers_checkpoint"
    transformers_offload = "transformers_offload"

    @property
    def is_ours(self) -> bool:
        """Whether headrace runs it."""
        return self.value.startswith("headrace_")

    @property
    def preset(self) -> str:
        """The memory preset that does what the system does."""
        return {"checkpoint": "recompute", "offload": "offload_host"}.get(
            self.value.split("_", 1)[1], self.value.split("_", 1)[1]
        )


class Weights(StrEnum):
    """Dtype of the weights that AdamW updates; gradients and moments have it too. Products are bf16 in both."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(frozen=True)
class Case:
    """One row to measure.

    Args:
        prepared: folder of token rows of `seq_len` tokens, one document a row.
        steps: timed steps, after `warmup` others.
        device: cuda; cpu is for tests.
        peak_flops: FLOP/s that MFU is relative to; 0 measures a GEMM.
    """

    system: System
    model: str
    seq_len: int
    prepared: str
    weights: Weights = Weights.fp32
    steps: int = 5
    warmup: int = 2
    device: str = "cuda"
    peak_flops: float = 0.0

    def to_json(self) -> str:
        """The argument of the child process."""
        return json.dumps(asdict(self), default=lambda value: value.value)

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Inverse of to_json."""
        words = json.loads(text)
        return cls(**{**words, "system": System(words["system"]), "weights": Weights(words["weights"])})


def measure(case: Case) -> dict[str, Any]:
    """Run the case: seconds of every timed step, and from them the numbers of the row.

    Raises:
        torch.OutOfMemoryError and whatever else the system raises.
    """
    model = model_shape(case.model)
    if model.vocab_size == 0:  # a shape that follows its data
        meta = json.loads((Path(case.prepared) / "meta.json").read_text())
        model = replace(model, vocab_size=meta["vocab_size"])
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        run = _ours if case.system.is_ours else _transformers
        losses, seconds, facts = run(case, model, Path(folder))
    step_s = statistics.median(seconds[case.warmup :])
    plan = plan_of(case, model)
    peak_flops = facts.pop("peak_flops")
    used = mfu(model, [MicroBatch([case.seq_len], plan)], step_s=step_s, peak_flops=peak_flops)
    row = {"status": "ok", "step_s": step_s, "step_s_all": seconds, "tokens_per_s": case.seq_len / step_s}
    row |= {name.split("/")[1]: value for name, value in used.items()}
    row |= {"peak_tflops": peak_flops / 1e12, "first_loss": losses[0], "last_loss": losses[-1]}
    if case.device == "cuda":
        row["peak_device_gib"] = torch.cuda.max_memory_allocated() / GIB
        row["peak_device_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    row["peak_host_rss_gib"] = peak_rss_bytes() / GIB
    return row | facts


def plan_of(case: Case, model: ModelConfig) -> MemoryPlan:
    """The plan of the case's preset, cut as plans for its device are."""
    cuts = default_cuts(DeviceClass(case.device))
    return preset_plan(case.system.preset, [dense_skeleton(model)] * model.num_layers, cuts=cuts)


def peak_rss_bytes() -> int:
    """Largest resident size of this program so far (getrusage would also count the process that started it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


Measured = tuple[list[float], list[float], dict[str, Any]]


def _ours(case: Case, model: ModelConfig, folder: Path) -> Measured:
    from headrace.storage.config import TiersConfig
    from headrace.storage.tiers.host_slab import HostSlab
    from headrace.storage.tiers.ssd_slab import SsdSlab
    from headrace.workers.job import RankContext, TrainJob
    from headrace.workers.parallel.config import ParallelConfig
    from headrace.workers.telemetry.records import StepReport
    from headrace.workers.train.config import CheckpointConfig
    from headrace.workers.train.session import run_rank

    if case.weights is not Weights.fp32:
        raise ValueError("headrace trains fp32 master weights only: weights=fp32")
    precision = Precision.bf16 if case.device == "cuda" else Precision.fp32
    train = _train(case, precision)
    job = TrainJob(
        run_dir=str(folder / "run"),
        model=model,
        data=_data(case),
        optim=_optim(),
        parallel=ParallelConfig(),
        plan=plan_of(case, model),
        tiers=TiersConfig(),
        train=train,
        checkpoint=CheckpointConfig(at_end=False),
        peak_flops=case.peak_flops,
        init_on_device=True,
    )
    layer_input = case.seq_len * model.hidden_size * (2 if precision is Precision.bf16 else 4)
    slab_bytes = int(layer_input * model.num_layers * 1.05) + (64 << 20)
    reports: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        reports.append(report)
        _tell_step(len(reports), report.metrics[names.STEP_S], report.metrics[names.LOSS_TRAIN])

    with ExitStack() as closing:
        leases = []
        if case.system is System.headrace_offload_host:
            leases.append(closing.enter_context(HostSlab(slab_bytes, run_id="bench")).lease("rank0", slab_bytes))
        if case.system is System.headrace_offload_ssd:
            ssd = closing.enter_context(SsdSlab(folder / "tiers", slab_bytes))
            leases.append(ssd.lease("rank0", slab_bytes))
        context = RankContext(device=case.device, leases=tuple(leases))
        result = run_rank(job, context, on_step=on_step, should_stop=lambda: False)
    seconds = [report.metrics[names.STEP_S] for report in reports]
    losses = [report.metrics[names.LOSS_TRAIN] for report in reports]
    last = reports[-1].metrics
    kept = {key: last[key] for key in (names.EXPOSED_PCT, names.D2H_GBPS, names.H2D_GBPS) if key in last}
    facts = {name.split("/")[1]: value for name, value in kept.items()}
    if case.device == "cuda":  # the allocator's peak is started anew by every step
        facts["peak_device_gib"] = max(report.metrics[names.GPU_PEAK_GIB] for report in reports)
    tiers = result.stats.get("tiers")
    return losses, seconds, {**facts, "tiers": tiers, "peak_flops": float(result.stats["peak_flops"])}


def _transformers(case: Case, model: ModelConfig, folder: Path) -> Measured:
    """The same step in transformers: SDPA attention, its own loss on whole logits, checkpointing per layer."""
    from headrace.workers.telemetry.gemm import measure_gemm_flops

    device = torch.device(case.device)
    torch.manual_seed(0)
    net = _hugging_face_model(model, device, torch.float32 if case.weights is Weights.fp32 else torch.bfloat16)
    spelling = _enable_checkpointing(net, offload=case.system is System.transformers_offload)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=device.type == "cuda")
    losses, seconds = [], []
    for rows in _token_rows(case):
        begin_s = time.perf_counter()
        tokens = rows.to(device)
        with _autocast(case, device):
            loss = net(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin_s)
        _tell_step(len(seconds), seconds[-1], losses[-1])
    peak_flops = case.peak_flops
    if not peak_flops:
        del net, optimizer, loss
        peak_flops = measure_gemm_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return losses, seconds, {"peak_flops": peak_flops, "checkpointing": spelling}


def _tell_step(step: int, step_s: float, loss: float) -> None:
    tell({"step": step, "step_s": step_s, "loss": loss})


def _autocast(case: Case, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=case.weights is Weights.fp32 and device.type == "cuda")


def _hugging_face_model(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from headrace.workers.model.hf_config import config_to_hf

    words = config_to_hf(model, str(dtype).removeprefix("torch."))
    config = AutoConfig.for_model(words.pop("model_type"), **words)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)


def _enable_checkpointing(net: Any, *, offload: bool) -> str:
    """Turn on transformers' checkpointing by the newest spelling that this version has; returns what was called."""
    if not offload:
        net.gradient_checkpointing_enable()
        return "gradient_checkpointing_enable()"
    for spelling in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable = getattr(net, spelling, None)
        if enable is None:
            continue
        try:
            enable(offload=True)
        except (TypeError, ValueError):
            continue
        return f"{spelling}(offload=True)"
    raise RuntimeError("this version of transformers has no known host offload of checkpoints")


def _token_rows(case: Case) -> Iterator[torch.Tensor]:
    loader: TokenLoader = open_loader(_data(case), train=_train(case, Precision.bf16), rank=0, world_size=1)
    try:
        for step in range(case.warmup + case.steps):
            yield loader.step_batches(step)[0].tokens
    finally:
        loader.close()


def _data(case: Case) -> DataConfig:
    return DataConfig(name="bench", prepared=case.prepared, seq_len=case.seq_len, loader=Loader.memmap)


def _train(case: Case, precision: Precision) -> TrainConfig:
    return TrainConfig(steps=case.warmup + case.steps, precision=precision, deterministic=False)


def _optim() -> OptimConfig:
    return OptimConfig(lr=LEARNING_RATE, weight_decay=0.01)


def main() -> None:
    """The child process: one case in, a row per step and one for the case out."""
    case = Case.from_json(sys.argv[1])
    row: dict[str, Any] = {"torch": torch.__version__, "allocator": allocator_record()}
    if case.device == "cuda":
        row["gpu"] = torch.cuda.get_device_name(0)
    try:
        row |= measure(case)
    except Exception as error:
        full = is_out_of_memory(error)
        status = "out_of_memory" if full else "failed"
        row |= {"status": status, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        row |= memory_peaks(torch.device(case.device)) if full else {}
    tell(row)


if __name__ == "__main__":
    main()
