"""Streaming attention: a query chunk over a prefix of keys and values that arrives block by block."""

from headrace.kernels.streaming.cut import Piece, PieceKind, block_bounds, block_pieces
from headrace.kernels.streaming.operators import (
    BlockOperator,
    CudnnBlocks,
    FlashAttention4Blocks,
    FlashBlocks,
    ReferenceBlocks,
    StreamingOperator,
    choose_block_operator,
)
from headrace.kernels.streaming.stream import (
    BlockSource,
    GradientSink,
    ResidentBlocks,
    StreamSpec,
    stream_backward,
    stream_forward,
    streaming_attention,
)

__all__ = [
    "BlockOperator",
    "BlockSource",
    "CudnnBlocks",
    "FlashAttention4Blocks",
    "FlashBlocks",
    "GradientSink",
    "Piece",
    "PieceKind",
    "ReferenceBlocks",
    "ResidentBlocks",
    "StreamSpec",
    "StreamingOperator",
    "block_bounds",
    "block_pieces",
    "choose_block_operator",
    "stream_backward",
    "stream_forward",
    "streaming_attention",
]
