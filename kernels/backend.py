"""Who computes an operator, as names: what a configuration may say. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Backend(StrEnum):
    """Who computes an operator.

    auto: what `dispatch.choose` returns for the device and dtype; see Choice.why.
    reference: plain torch, any device and dtype; the definition that the others are tested against.
    triton: our fused kernels; CUDA, or Triton's interpreter on CPU (TRITON_INTERPRET=1, fp32 only).
    stock: another library's operator, where the operator's row in the README names one.
    """

    auto = "auto"
    reference = "reference"
    triton = "triton"
    stock = "stock"


class AttentionOperator(StrEnum):
    """Who computes attention, on the whole sequence and block by block alike.

    auto: `flash` on CPU. On CUDA in bf16 and fp16 `cudnn` on Hopper and later where one document fills a row, and
        `flash` before Hopper, for packed documents, windows, head dims above 128 and under deterministic algorithms.
        `reference` with a softcap and for fp32 and fp64 on CUDA.
    cudnn: aten cuDNN attention; CUDA, bf16 and fp16, head dim at most 128, backward not deterministic. Fewer than 128
        queries or keys in a call go to `flash`: cuDNN plans every length anew and errs on single tokens.
    fa4: flash-attn-4 (extra `fa4`); Hopper and later, bf16 and fp16, head dim at most 128, deterministic on demand.
    flash: aten flash attention 2 on CUDA (bf16, fp16, packed documents and windows in one call, deterministic on
        demand); on CPU torch's flash kernel, any dtype, deterministic.
    reference: plain torch, tile by tile; any device and dtype, softcap.
    """

    auto = "auto"
    cudnn = "cudnn"
    fa4 = "fa4"
    flash = "flash"
    reference = "reference"


@dataclass(frozen=True)
class Operators:
    """Who computes a model: its attention, and its other operators."""

    attention: AttentionOperator = AttentionOperator.auto
    kernels: Backend = Backend.auto


@dataclass(frozen=True)
class Choice:
    """What was requested, which backend computes, and why; a run records one per operator."""

    op: str
    wanted: Backend
    got: Backend
    why: str
