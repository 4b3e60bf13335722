"""Attention: one contract (forward with LSE, exact backward) on whole rows or KV blocks."""

from headrace.kernels.attention.blocks import (
    BlockSource,
    GradientSink,
    ResidentBlocks,
    attention_backward_blocks,
    attention_forward_blocks,
)
from headrace.kernels.attention.cut import block_bounds
from headrace.kernels.attention.operators import block_operator, choose_operator
from headrace.kernels.attention.selected import SelectedSpec
from headrace.kernels.attention.spec import AttentionSpec, spec_for
from headrace.kernels.attention.whole import attention, attention_backward, attention_forward

__all__ = [
    "AttentionSpec",
    "BlockSource",
    "GradientSink",
    "ResidentBlocks",
    "SelectedSpec",
    "attention",
    "attention_backward",
    "attention_backward_blocks",
    "attention_forward",
    "attention_forward_blocks",
    "block_bounds",
    "block_operator",
    "choose_operator",
    "spec_for",
]
