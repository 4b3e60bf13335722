"""What one evaluation is asked to compute. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.presets import DEFAULT_CHUNK
from headrace.workers.verify.config import VerifyDevice, VerifyDtype

# Plans that follow from the budgets of a training step.
SOLVED = (MemoryPreset.auto, MemoryPreset.chunk_auto)


class EvalSplit(StrEnum):
    """Rows that are evaluated: those held out of training, or all of the data."""

    held_out = "held_out"
    all = "all"


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """One evaluation.

    Args:
        memory: by chunk, keys and values live where the preset says; by layer, the whole row passes a block at once.
        chunk_size: tokens of a chunk, and of a KV block.
        split: which rows.
        rows: at most so many of them, in an order that depends on nothing but the data; None: all.
        position_bucket: tokens of the first bucket of positions; every next one is as long as all before it.
        dtype: of weights and computation; None: fp32 on the CPU, bf16 on a GPU.
    """

    memory: MemoryPreset = MemoryPreset.chunk
    chunk_size: int = DEFAULT_CHUNK
    split: EvalSplit = EvalSplit.all
    rows: int | None = None
    position_bucket: int = 1024
    dtype: VerifyDtype | None = None
    device: VerifyDevice = VerifyDevice.auto


def check_config(config: EvalConfig) -> None:
    """Refuse what cannot be computed, before torch is imported.

    Raises:
        InputError: names the key, the value and the remedy.
    """
    for key in ("chunk_size", "rows", "position_bucket"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise InputError(f"{key}={value}: a whole number of at least 1 is expected")
    if config.memory.is_lossy:
        raise InputError(f"memory={config.memory.value}: an evaluation reads every page; choose memory=chunk_host")
    if config.memory in SOLVED:
        known = ", ".join(p.value for p in MemoryPreset if p not in SOLVED and not p.is_lossy)
        raise InputError(
            f"memory={config.memory.value}: a plan solved for a training step; name one for the evaluation: {known}"
        )
