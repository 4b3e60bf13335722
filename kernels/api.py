"""The seam: what the layers above may call. A fused version takes a reference's place here, under the same name."""

from __future__ import annotations

from headrace.kernels.activation import geglu, swiglu, swiglu_backward
from headrace.kernels.attention import (
    AttentionSpec,
    BlockSource,
    ResidentBlocks,
    attention,
    attention_backward,
    attention_backward_blocks,
    attention_forward,
    attention_forward_blocks,
    block_bounds,
    block_operator,
    choose_operator,
    spec_for,
)
from headrace.kernels.backend import AttentionOperator, Backend, Choice, Operators
from headrace.kernels.codecs.config import CodecName, stash_bytes
from headrace.kernels.codecs.philox import derive_seed
from headrace.kernels.codecs.rows import decode_rows, encode_rows
from headrace.kernels.dispatch import choices
from headrace.kernels.loss.filtering import FilterStats, FilterSummary
from headrace.kernels.loss.head import linear_cross_entropy
from headrace.kernels.loss.options import IGNORED_TARGET, ChunkAxis, LossOptions, WeightSum, filter_threshold
from headrace.kernels.merge import lse_of_max_sum, merge, merge_, merge_max_sum
from headrace.kernels.norm import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_scaled
from headrace.kernels.packing import Packing
from headrace.kernels.pages import page_mean, page_score, top_pages
from headrace.kernels.reference.norm import NormCasting
from headrace.kernels.reference.rope import rope_frequencies, rope_tables
from headrace.kernels.rope import apply_rope, qk_norm_rope, qk_norm_rope_backward

__all__ = [
    "IGNORED_TARGET",
    "AttentionOperator",
    "AttentionSpec",
    "Backend",
    "BlockSource",
    "Choice",
    "ChunkAxis",
    "CodecName",
    "FilterStats",
    "FilterSummary",
    "LossOptions",
    "NormCasting",
    "Operators",
    "Packing",
    "ResidentBlocks",
    "WeightSum",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "attention_backward",
    "attention_backward_blocks",
    "attention_forward",
    "attention_forward_blocks",
    "block_bounds",
    "block_operator",
    "choices",
    "choose_operator",
    "decode_rows",
    "derive_seed",
    "encode_rows",
    "filter_threshold",
    "geglu",
    "linear_cross_entropy",
    "lse_of_max_sum",
    "merge",
    "merge_",
    "merge_max_sum",
    "page_mean",
    "page_score",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_scaled",
    "rope_frequencies",
    "rope_tables",
    "spec_for",
    "stash_bytes",
    "swiglu",
    "swiglu_backward",
    "top_pages",
]
