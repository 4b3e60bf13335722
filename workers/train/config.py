"""Steps, precision, optimizer, checkpoints. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from headrace.kernels.backend import AttentionOperator, Backend


class Precision(StrEnum):
    """Compute dtype; weights, gradients and optimizer state are fp32 in both."""

    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(StrEnum):
    """Learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class NonFinite(StrEnum):
    """What happens to a step whose loss or gradient is not finite: the run stops, or the step is left out."""

    stop = "stop"
    skip = "skip"


class DeviceKind(StrEnum):
    """`auto` takes CUDA where there is a device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Allocator(StrEnum):
    """Who gives a step's tensors their addresses on CUDA: torch's caching allocator, or a plan."""

    caching = "caching"
    planned = "planned"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The loop.

    Args:
        steps: optimizer steps of the whole run (a resumed run continues to the same number).
        batch_size: sequences per micro-batch and rank.
        micro_batches: micro-batches per step and rank (gradient accumulation).
        seed: of weights, the order of the rows and dropout.
        grad_clip: the gradient's norm is cut to this; None leaves it.
        non_finite: stop, or skip a step whose loss or gradient is not finite. A skipped step changes neither weights
            nor optimizer state. Either way the rows that it read are written to the run folder.
        max_skipped_steps: of the whole run, with non_finite=skip; the run stops at the step that would be one more.
        eval_every: steps between evaluations; 0 means never.
        eval_batches: micro-batches per evaluation and rank.
        loss_tile: tokens per tile of the loss (logits exist for one tile at a time).
        attention: who computes attention; auto says flash on CPU, cudnn or flash on CUDA.
        kernels: who computes the other operators: auto, reference (plain torch) or triton (fused, CUDA).
        deterministic: use torch's deterministic kernels.
        allocator: who gives a step's tensors their addresses: torch's caching allocator, or planned: the second step is
            recorded, and later ones take solved addresses in one arena. Needs CUDA and a C++ compiler. Changes no bit.
        profile: numbers of steps, from 1, that are profiled: every rank writes a trace of each that opens in Perfetto.
            A profiled step is slower than others.
        num_threads: intra-op threads per rank; None means cores / local ranks (CPU runs only).
    """

    steps: int = 100
    batch_size: int = 1
    micro_batches: int = 1
    seed: int = 0
    precision: Precision = Precision.fp32
    device: DeviceKind = DeviceKind.auto
    grad_clip: float | None = 1.0
    non_finite: NonFinite = NonFinite.stop
    max_skipped_steps: int = 10
    eval_every: int = 0
    eval_batches: int = 4
    loss_tile: int = 1024
    attention: AttentionOperator = AttentionOperator.auto
    kernels: Backend = Backend.auto
    deterministic: bool = True
    allocator: Allocator = Allocator.caching
    num_threads: int | None = None
    profile: list[int] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019), with a warm-up and a schedule.

    Args:
        lr: learning rate after the warm-up.
        beta1 / beta2: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on matrices only: norms and biases do not decay.
        warmup_steps: steps in which the rate rises to `lr`.
        min_lr_ratio: where cosine and linear schedules end, as a share of `lr`.
    """

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 0
    schedule: Schedule = Schedule.cosine
    min_lr_ratio: float = 0.1


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When state is saved, and how much of it is kept.

    Args:
        every: steps between checkpoints; 0 means only at the end and on SIGTERM.
        every_chunks: for memory=chunk and memory=chunk_*: chunks of stage 2 between two records of a half-done step,
            from which the ranks go on when one of them was killed; 0 means the step restarts. Needs every=1.
        keep: committed checkpoints to keep (the newest ones); at least 1.
        at_end: also save after the last step.
    """

    every: int = 0
    every_chunks: int = 0
    keep: int = 2
    at_end: bool = True
