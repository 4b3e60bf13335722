"""Names and sizes of the codecs: what a plan may contain. No torch."""

from __future__ import annotations

from enum import StrEnum

RANGE_BYTES = 8  # a low end and a step, fp32 each
GROUP_SIZE = 128  # neighbours that share a range in 4-bit codes


class CodecName(StrEnum):
    """How a row is coded.

    eight_bit_token: 8 bits per element, a range per row.
    four_bit_group: 4 bits per element, a range per GROUP_SIZE neighbours.
    """

    eight_bit_token = "eight_bit_token"
    four_bit_group = "four_bit_group"


def stash_bytes(name: CodecName, width: int) -> int:
    """Bytes of a row of `width` elements in a codec, whatever its dtype: its codes and ranges."""
    if name is CodecName.eight_bit_token:
        return width + RANGE_BYTES
    return -(-width // 2) + RANGE_BYTES * -(-width // GROUP_SIZE)


def plain_workspace(name: CodecName, width: int, itemsize: int) -> tuple[int, int]:
    """Bytes that the plain kernels take for a row of `width` elements: to encode, beside row and codes, and to decode.

    Encoding has four fp32 numbers per element at once, and a fifth where the row is cast or filled up to whole groups;
    decoding has two and the codes, and for groups their ends spread out.
    """
    if name is CodecName.eight_bit_token:
        return width * (16 + 4 * (itemsize < 4)), 9 * width
    padded = -(-width // GROUP_SIZE) * GROUP_SIZE
    encode = padded * (16 + 4 * (itemsize < 4 or padded != width)) + padded // 2 + RANGE_BYTES * padded // GROUP_SIZE
    return encode, 8 * padded + 9 * width + width // 2


def plain_traffic(name: CodecName, width: int, itemsize: int) -> tuple[int, int]:
    """Bytes that the operators of the plain kernels read and write for a row, to encode and to decode.

    Per element. Nine tenths of an encoding are its random numbers: integers of 8 bytes, in ten rounds (philox.py). A
    dtype below fp32 is cast once each way.
    """
    encode, decode = (715, 23) if name is CodecName.eight_bit_token else (717, 50)
    cast = 6 if itemsize < 4 else 0
    return width * (encode + cast), width * (decode + cast)
