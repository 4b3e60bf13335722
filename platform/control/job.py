"""Converts a composed configuration to the job of the ranks: open values filled in, no Hydra. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.platform.planning.hardware import DeviceClass
from headrace.workers.job import TrainJob
from headrace.workers.train.config import DeviceKind, Precision

if TYPE_CHECKING:
    from headrace.platform.config.schema import RunConfig
    from headrace.workers.data.prepared import PreparedData
    from headrace.workers.memory.plan import MemoryPlan


def resolve(config: RunConfig, data: PreparedData) -> RunConfig:
    """Fill in what depends on the data and the machine: vocabulary, prepared folder, device.

    Raises:
        InputError: the data has token ids beyond the model's vocabulary.
    """
    vocab_size = config.model.vocab_size or data.vocab_size
    data.check_vocab(vocab_size)
    return replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        data=replace(config.data, prepared=data.where),
        train=replace(config.train, device=DeviceKind(config.hardware.device_class.value)),
    )


def make_job(config: RunConfig, plans: Mapping[int, MemoryPlan], run_dir: Path, *, resume: bool = False) -> TrainJob:
    """The job of every rank.

    Args:
        plans: of every length of the rows.
    """
    longest = config.data.seq_len
    return TrainJob(
        run_dir=str(run_dir),
        model=config.model,
        data=config.data,
        optim=config.optim,
        parallel=config.parallel,
        plan=plans[longest],
        bucket_plans={length: plan for length, plan in plans.items() if length != longest},
        tiers=config.tiers,
        train=config.train,
        checkpoint=config.checkpoint,
        adapter=config.adapter,
        peak_flops=peak_flops(config),
        compare_sparse_every=config.memory.sparse.compare_every if config.memory.preset.is_lossy else 0,
        resume=resume,
    )


def peak_flops(config: RunConfig) -> float:
    """FLOP/s that MFU is a share of: the profile's rate on a GPU; 0 (measure) on CPU or where it is unknown."""
    hardware = config.hardware
    tflops = hardware.bf16_tflops if config.train.precision is Precision.bf16 else hardware.fp32_tflops
    return 0.0 if tflops is None or hardware.device_class is DeviceClass.cpu else tflops * 1e12
