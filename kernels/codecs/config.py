"""Names, modes and sizes of the codecs: what a plan may contain. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

RANGE_BYTES = 8  # a low end and a step, fp32 each
GROUP_SIZE = 128  # elements that share a range in the 4-bit codes of unbounded values
MIN_GROUP_SIZE, MAX_GROUP_SIZE = 16, 1024


class CodecName(StrEnum):
    """A codec that represents one tensor.

    eight_bit_token: values, 8 bits, a range per row of the last dimension.
    eight_bit_head: values, 8 bits, a range per head (the last dimension but one), given or taken from the tensor.
    four_bit_group: values, 4 bits, a range per GROUP_SIZE neighbours of the last dimension.
    derivative_silu, derivative_gelu_tanh, derivative_gelu_erf: the derivative f'(x), 4 bits, one fixed range.
    """

    eight_bit_token = "eight_bit_token"
    eight_bit_head = "eight_bit_head"
    four_bit_group = "four_bit_group"
    derivative_silu = "derivative_silu"
    derivative_gelu_tanh = "derivative_gelu_tanh"
    derivative_gelu_erf = "derivative_gelu_erf"


# Those of the tensor itself whose ranges lie within a row: a plan may hold rows in them.
ROW_CODECS = (CodecName.eight_bit_token, CodecName.four_bit_group)


class Rounding(StrEnum):
    """How a value between two codes is rounded.

    stochastic: up with the probability of its distance from the lower code, so the decoded value is right on average.
    nearest: to the nearer code, at half-way to the lower one; half the error variance, and biased.
    """

    stochastic = "stochastic"
    nearest = "nearest"


def stash_bytes(name: CodecName, shape: Sequence[int], group_size: int = GROUP_SIZE) -> int:
    """Bytes that `name` keeps for a tensor of `shape`, whatever its dtype; used by a planner.

    Raises:
        ValueError: a shape that the codec does not take, a group size out of range.
    """
    check_shape(name, shape)
    num_elements = math.prod(shape)
    if name is CodecName.eight_bit_token:
        return num_elements + RANGE_BYTES * math.prod(shape[:-1])
    if name is CodecName.eight_bit_head:
        return num_elements + RANGE_BYTES * shape[-2]
    if name is CodecName.four_bit_group:
        check_group_size(group_size)
        return math.prod(shape[:-1]) * (-(-shape[-1] // 2) + RANGE_BYTES * -(-shape[-1] // group_size))
    return -(-num_elements // 2)


def plain_workspace(name: CodecName, width: int, itemsize: int) -> tuple[int, int]:
    """Bytes that the plain kernels take for a row of `width` elements: to encode, beside row and codes, and to decode.

    eight_bit_token and four_bit_group only. Encoding has four fp32 numbers per element at once, and a fifth where the
    row is cast or filled up to whole groups; decoding has two and the codes, and for groups their ends spread out.
    """
    if name is CodecName.eight_bit_token:
        return width * (16 + 4 * (itemsize < 4)), 9 * width
    padded = -(-width // GROUP_SIZE) * GROUP_SIZE
    encode = padded * (16 + 4 * (itemsize < 4 or padded != width)) + padded // 2 + RANGE_BYTES * padded // GROUP_SIZE
    return encode, 8 * padded + 9 * width + width // 2


def swiglu_bytes(shape: Sequence[int], group_size: int = GROUP_SIZE) -> int:
    """Bytes that `swiglu_s2a` keeps for gate and up of `shape`: two 4-bit codes with their ranges.

    An element costs 1 + 2 * 8 / group_size bytes (1.125 at 128), where SwiGLU with recompute keeps gate and up: 4
    in bf16.
    """
    return 2 * stash_bytes(CodecName.four_bit_group, shape, group_size)


def check_shape(name: CodecName, shape: Sequence[int]) -> None:
    """Raise ValueError where `name` needs more dimensions than `shape` has."""
    needed = {CodecName.eight_bit_token: 1, CodecName.eight_bit_head: 2, CodecName.four_bit_group: 1}.get(name, 0)
    if len(shape) < needed or any(size < 0 for size in shape):
        raise ValueError(f"x: shape {tuple(shape)}; {name.value} takes at least {needed} dimensions")


def check_group_size(group_size: int) -> None:
    """Raise ValueError unless group_size is a power of two from MIN_GROUP_SIZE to MAX_GROUP_SIZE."""
    if not MIN_GROUP_SIZE <= group_size <= MAX_GROUP_SIZE or group_size & (group_size - 1):
        raise ValueError(f"group_size={group_size}: a power of two from {MIN_GROUP_SIZE} to {MAX_GROUP_SIZE}")
