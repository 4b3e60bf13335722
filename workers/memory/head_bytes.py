"""Bytes that the loss takes on the device. No torch."""

from __future__ import annotations

# Of an element of fp32, in which gradients of parameters are summed.
WIDE_BYTES = 4


def head_transient_bytes(
    vocab_size: int,
    hidden_size: int,
    *,
    num_tokens: int,
    loss_tile: int,
    itemsize: int,
    casts_products: bool,
    is_frozen: bool = False,
) -> int:
    """What the loss takes while it runs.

    Its input, a tile's logits in fp32 with their gradient, and dW of the head in fp32 unless it is frozen. Without CUDA
    (`casts_products`, see footprint.py) a tile has its logits twice before it has their gradient, and in a narrow dtype
    the product for dW takes its factors in fp32.
    """
    tile = min(loss_tile, num_tokens)
    d_weight = 0 if is_frozen else WIDE_BYTES * vocab_size * hidden_size
    logits = tile * vocab_size * (WIDE_BYTES + itemsize)
    if casts_products and itemsize < WIDE_BYTES:
        factors = 0 if is_frozen else d_weight + WIDE_BYTES * tile * hidden_size
        logits = max(tile * vocab_size * 2 * WIDE_BYTES, logits + factors)
    return num_tokens * hidden_size * itemsize + d_weight + logits


def tied_head_bytes(vocab_size: int, hidden_size: int, itemsize: int) -> int:
    """The head's gradient of a tied weight, which waits for the embedding's: autograd adds them up.

    A narrow gradient lies in the memory of its fp32 sum (kernels/loss/narrowing.py).
    """
    return vocab_size * hidden_size * max(itemsize, WIDE_BYTES)
