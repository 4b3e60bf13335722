"""Who computes an operator, as names: what a configuration may say. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Backend(Enum):
    """Who computes an operator.

    auto: what `dispatch.choose` answers for the device and dtype at hand; see Choice.why.
    reference: plain torch, any device and dtype; the definition that the others are tested against.
    triton: our fused kernels; CUDA, or Triton's interpreter on CPU (TRITON_INTERPRET=1, fp32 only).
    stock: another library's operator, where the operator's row in the README names one.
    """

    auto = "auto"
    reference = "reference"
    triton = "triton"
    stock = "stock"


class AttentionOperator(Enum):
    """Who computes attention.

    auto: `sdpa` on CPU and for fp32 and fp64; for bf16 and fp16 on CUDA `flash`, or `cudnn` on Hopper and later
        where it can (no window inside the document, no demand for deterministic algorithms).
    sdpa: torch's scaled_dot_product_attention; any device and dtype, deterministic on CPU.
    flash: aten flash attention 2; bf16 and fp16 on CUDA, packed documents in one call, windows, deterministic on
        demand.
    cudnn: aten cuDNN attention; bf16 and fp16 on CUDA, no window, backward not deterministic.
    fa4: flash-attn-4 (extra `fa4`); bf16 and fp16 on Hopper and later, deterministic on demand.
    """

    auto = "auto"
    sdpa = "sdpa"
    flash = "flash"
    cudnn = "cudnn"
    fa4 = "fa4"


@dataclass(frozen=True)
class Operators:
    """Who computes a model: its attention, and its other operators."""

    attention: AttentionOperator = AttentionOperator.auto
    kernels: Backend = Backend.auto


@dataclass(frozen=True)
class Choice:
    """What was asked for, what computes, and why; a run records one per operator."""

    op: str
    wanted: Backend
    got: Backend
    why: str
