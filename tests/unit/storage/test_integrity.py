"""Sums that see every single flip."""

from __future__ import annotations

import pytest
import torch

from headrace.storage.core.errors import TransferFailed
from headrace.storage.integrity import Checksum, digest, verify

KINDS = [Checksum.xxh3_64, Checksum.xor_64]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 9, 4096, 65_543])
def test_every_flip_is_seen(kind: Checksum, num_bytes: int) -> None:
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    wanted = digest(kind, data)
    verify(kind, data.clone(), wanted, "x")
    for position in {0, 1, num_bytes // 2, num_bytes - 2, num_bytes - 1} & set(range(num_bytes)):
        for bit in (1, 128):
            flipped = data.clone()
            flipped[position] ^= bit
            with pytest.raises(TransferFailed, match=f"x: {kind.value} checksum is"):
                verify(kind, flipped, wanted, "x")


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_in_place_of_data_are_seen(kind: Checksum) -> None:
    data = torch.randint(1, 256, (4096,), dtype=torch.uint8)
    with pytest.raises(TransferFailed):
        verify(kind, torch.zeros_like(data), digest(kind, data), "x")


def test_the_xor_is_that_of_the_words() -> None:
    words = torch.tensor([0x0F, 0xF0, -1], dtype=torch.int64)
    assert digest(Checksum.xor_64, words.view(torch.uint8)) == (0x0F ^ 0xF0 ^ (2**64 - 1))


def test_none_accepts_everything() -> None:
    assert digest(Checksum.none, torch.ones(3, dtype=torch.uint8)) == 0
    verify(Checksum.none, torch.ones(3, dtype=torch.uint8), 17, "x")
