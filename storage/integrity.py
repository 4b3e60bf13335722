"""Checksums of blobs: made when bytes enter a tier, compared when they come back.

xxh3_64 runs at memory speed on host bytes. Bytes that go from device memory to the drive without touching the host
(GPUDirect Storage) are summed where they are, by an XOR of 64-bit words: it finds any single flip, and every part
that came back as zeros, but not two equal flips in one bit position.
"""

from __future__ import annotations

from enum import StrEnum

import torch
import xxhash

from headrace.storage.core.errors import TransferFailed


class Checksum(StrEnum):
    """How the bytes of a part are summed."""

    none = "none"
    xxh3_64 = "xxh3_64"
    xor_64 = "xor_64"


def digest(checksum: Checksum, data: torch.Tensor) -> int:
    """The sum of a flat uint8 tensor: host memory for xxh3_64, any device for xor_64; 0 for none."""
    if checksum is Checksum.xxh3_64:
        return xxhash.xxh3_64_intdigest(data.numpy().data)
    if checksum is Checksum.xor_64:
        return _xor_64(data)
    return 0


def verify(checksum: Checksum, data: torch.Tensor, wanted: int, label: str) -> None:
    """Compare with the sum made at store.

    Raises:
        TransferFailed: the bytes are not those that were stored.
    """
    if checksum is Checksum.none:
        return
    found = digest(checksum, data)
    if found != wanted:
        raise TransferFailed(
            f"{label}: {checksum.value} checksum is {found:016x} where {wanted:016x} was stored: the bytes changed "
            "in the tier"
        )


def _xor_64(data: torch.Tensor) -> int:
    whole = data.numel() // 8 * 8
    total = 0
    if data.storage_offset() % 8:  # rows of a given buffer: a view as 64-bit words needs an aligned start
        data = data.clone()
    if whole:
        total ^= int(torch.hash_tensor(data[:whole].view(torch.int64)).item())
    if whole < data.numel():
        tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
        tail[: data.numel() - whole] = data[whole:]
        total ^= int(torch.hash_tensor(tail.view(torch.int64)).item())
    return total
