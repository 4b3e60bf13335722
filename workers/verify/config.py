"""What one verification is asked to compare. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from headrace.kernels.codecs.config import CodecName
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.model.weight_files import check_model_folder
from headrace.workers.parallel.config import ONE_F_ONE_B, ParallelConfig, PipelineSchedule, Vocabulary
from headrace.workers.parallel.pipeline.actions import filling_problem, training_problem
from headrace.workers.parallel.row_cut import chunk_problems, length_problem

ROW_DEGREES = ("tensor", "ulysses", "ring")
DEGREES = (*ROW_DEGREES, "pipeline")
PARALLEL = (*DEGREES, "pipeline_schedule", "vocabulary")  # keys of ParallelConfig


class VerifyDtype(StrEnum):
    """Precision of weights and compute; each has its own oracle and bound (NUMERICS.md)."""

    fp64 = "fp64"
    fp32 = "fp32"
    bf16 = "bf16"


class VerifyDevice(StrEnum):
    """Where both models run. `auto` is cuda where there is a CUDA device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(kw_only=True, slots=True)
class VerifyConfig:
    """One comparison with transformers.

    Args:
        hf: folder with config.json and safetensors.
        seq_len: tokens per row.
        batch: rows of a micro-batch.
        micro_batches: forward-and-backward passes whose gradients add up to one step.
        documents: documents packed into a row, of random lengths, without attention across them.
        responses: every document is a prompt with so many responses behind it, which share it; 0: none.
        steps: optimizer steps (AdamW, lr); gradients of every step are compared. bf16 takes one.
        memory: the plan our side runs under; where it moves or recomputes, it is also compared with the plan of the
            same cuts that keeps everything (memory=keep; memory=chunk for those by chunk), bit by bit. chunk_sparse is
            lossy: its errors are shown and not judged.
        chunk_size: tokens of a chunk, for those by chunk; None: three tenths of the row, so that the last is shorter.
        head_groups: of attention, for plans by layer (memory.head_groups).
        codec: of what plans by layer hold (memory.codec); lossy as chunk_sparse is.
        tensor, ulysses, ring: ranks that share the weights or the rows (parallel.tensor, ...); they are started here.
        pipeline: ranks that have some of the blocks each (parallel.pipeline), for plans by layer; as them.
        pipeline_schedule, vocabulary: order of their passes, and who has head and look-up (parallel.X).
        seed: of the random tokens; bf16 uses seed to seed + 4.
        lr: learning rate between the steps.
        loss_tile: tokens whose logits exist at one time on our side.
    """

    hf: str
    dtype: VerifyDtype = VerifyDtype.fp64
    seq_len: int = 128
    batch: int = 1
    micro_batches: int = 1
    documents: int = 1
    responses: int = 0
    steps: int = 1
    memory: MemoryPreset = MemoryPreset.keep
    chunk_size: int | None = None
    head_groups: int = 1
    codec: CodecName | None = None
    tensor: int = 1
    ulysses: int = 1
    ring: int = 1
    pipeline: int = 1
    pipeline_schedule: PipelineSchedule = ONE_F_ONE_B
    vocabulary: Vocabulary = Vocabulary.auto
    seed: int = 0
    lr: float = 1e-3
    loss_tile: int = 1024
    device: VerifyDevice = VerifyDevice.auto

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VerifyConfig:
        """That of `dataclasses.asdict`, also after a passage through JSON."""
        kinds = {"dtype": VerifyDtype, "memory": MemoryPreset, "device": VerifyDevice}
        kinds |= {"pipeline_schedule": PipelineSchedule, "vocabulary": Vocabulary}
        enums: dict[str, Any] = {name: kind(values[name]) for name, kind in kinds.items()}
        enums["codec"] = None if values["codec"] is None else CodecName(values["codec"])
        return cls(**(values | enums))

    @property
    def parallel(self) -> ParallelConfig:
        """How the ranks share the model."""
        return ParallelConfig(**{name: getattr(self, name) for name in PARALLEL})

    @property
    def num_ranks(self) -> int:
        """Ranks that share the weights, the rows or the blocks."""
        return self.tensor * self.ulysses * self.ring * self.pipeline

    @property
    def own_rows(self) -> int:
        """Tokens of a row on one rank."""
        return self.seq_len // (self.tensor * self.ulysses * self.ring)

    @property
    def own_chunk(self) -> int:
        """Tokens of a chunk."""
        unit = self.tensor * self.ulysses
        return self.chunk_size or max(unit, 3 * self.seq_len // 10 // unit * unit)

    @property
    def kept(self) -> MemoryPreset:
        """The preset that keeps everything, with the same sweep and codec; chunk_sparse, with its pages in HBM."""
        if self.memory.is_lossy:
            return self.memory
        return MemoryPreset.chunk if self.memory.is_by_chunk else MemoryPreset.keep

    @property
    def kept_words(self) -> str:
        """`kept`, for people."""
        codec = "" if self.codec is None else f" codec={self.codec.value}"
        return f"memory={self.kept.value}{codec}" + (" with every page in HBM" if self.memory.is_lossy else "")

    @property
    def is_lossy(self) -> bool:
        """Whether errors are shown and not judged."""
        return self.memory.is_lossy or self.codec is not None


def check_config(config: VerifyConfig) -> None:
    """Refuse what cannot be run, before torch is imported.

    Raises:
        InputError: names the key, the value and the remedy.
    """
    for key in ("seq_len", "batch", "micro_batches", "documents", "steps", "loss_tile"):
        if getattr(config, key) < 1:
            raise InputError(f"{key}={getattr(config, key)}: a whole number of at least 1 is expected")
    if config.chunk_size is not None and (config.chunk_size < 1 or not config.memory.is_by_chunk):
        raise InputError(
            f"chunk_size={config.chunk_size}: at least 1 token, with memory=chunk or memory=chunk_*; "
            f"memory={config.memory.value} is given"
        )
    if config.head_groups < 1 or (config.head_groups > 1 and config.memory.is_by_chunk):
        raise InputError(
            f"head_groups={config.head_groups}: at least 1, and 1 with plans by chunk; memory={config.memory.value} is "
            "given"
        )
    _check_codec(config)
    _check_degrees(config)
    if not 0 <= config.seed < 2**63 - 8:
        raise InputError(f"seed={config.seed}: a whole number from 0 to 2^63 - 9 is wanted")
    if not 0.0 < config.lr < 1.0:
        raise InputError(f"lr={config.lr}: a number between 0 and 1 is expected")
    if config.responses < 0:
        raise InputError(f"responses={config.responses}: a whole number of at least 0 is expected")
    if config.documents * (1 + config.responses) > config.seq_len:
        shared = f" with responses={config.responses} to each" if config.responses else ""
        raise InputError(
            f"documents={config.documents}{shared}: more than the {config.seq_len} tokens of a row; lower it, or raise "
            "seq_len"
        )
    if config.dtype is VerifyDtype.bf16 and config.steps != 1:
        raise InputError(
            f"steps={config.steps}: with dtype=bf16 one step is compared, since bf16 weights lose most of an update; "
            "use dtype=fp64 or fp32 for more"
        )
    if config.memory is MemoryPreset.auto:
        known = ", ".join(p.value for p in MemoryPreset if p is not MemoryPreset.auto)
        raise InputError(f"memory=auto: a plan solved for a machine; name the one to verify: {known}")
    try:
        check_model_folder(config.hf)
    except InputError as error:
        raise InputError(f"hf={config.hf}: {error}", id=error.id) from None


def _check_codec(config: VerifyConfig) -> None:
    if config.codec is None:
        return
    key = f"codec={config.codec.value}"
    # What other plans make again has exact values: their bits are not those of memory=keep with the codec.
    if config.memory not in (MemoryPreset.keep, MemoryPreset.ssdtrain):
        raise InputError(f"{key}: memory={config.memory.value} makes tensors again; choose memory=keep or ssdtrain")
    if config.dtype is VerifyDtype.fp64:
        raise InputError(f"{key}: codecs take fp32 and bf16; set dtype=fp32")


def _check_degrees(config: VerifyConfig) -> None:
    for name in DEGREES:
        degree = getattr(config, name)
        if degree < 1:
            raise InputError(f"parallel.{name}={degree}: a degree is at least 1")
        if degree > 1 and config.head_groups > 1 and name != "pipeline":
            other = f"head_groups={config.head_groups}"
            raise InputError(f"parallel.{name}={degree}: {other} is not supported with it; set parallel.{name}=1")
    if config.memory.is_by_chunk:
        degrees, sizes = {name: getattr(config, name) for name in DEGREES}, (config.own_chunk,)
        what, has_pages = f"memory={config.memory.value}", config.memory is MemoryPreset.chunk_sparse
        if problem := next(chunk_problems(what, degrees, sizes=sizes, has_pages=has_pages), None):
            raise InputError(problem)
    for key, plain in (("pipeline_schedule", ONE_F_ONE_B), ("vocabulary", Vocabulary.auto)):
        if config.pipeline == 1 and (value := getattr(config, key)) is not plain:
            raise InputError(
                f"parallel.{key}={value.value}: parallel.pipeline=1 has no stages; raise it, or leave this key out"
            )
    if problem := training_problem(config.parallel):
        raise InputError(problem)
    if problem := filling_problem("micro_batches", config.micro_batches, config.pipeline):
        raise InputError(problem)
    what = f"seq_len={config.seq_len}"
    if problem := length_problem(what, config.seq_len, **{name: getattr(config, name) for name in ROW_DEGREES}):
        raise InputError(problem)
