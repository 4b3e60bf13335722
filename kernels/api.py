"""The seam: what the layers above may call. A fused version takes a reference's place here, under the same name."""

from __future__ import annotations

from headrace.kernels.attention import AttentionOperator, attention, choose_operator
from headrace.kernels.packing import Packing
from headrace.kernels.reference.activation import swiglu
from headrace.kernels.reference.loss import IGNORED_TARGET, linear_cross_entropy
from headrace.kernels.reference.norm import rms_norm
from headrace.kernels.reference.rope import Llama3Scaling, apply_rope, rope_frequencies, rope_tables

__all__ = [
    "IGNORED_TARGET",
    "AttentionOperator",
    "Llama3Scaling",
    "Packing",
    "apply_rope",
    "attention",
    "choose_operator",
    "linear_cross_entropy",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "swiglu",
]
