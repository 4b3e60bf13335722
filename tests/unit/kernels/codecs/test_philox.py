"""The generator against its published answers, against plain integers, and as a source of uniform numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from headrace.kernels.codecs import philox as module
from headrace.kernels.codecs.philox import derive_seed, philox, philox_of_integers, uniforms

# counter, key, answer: the known-answer file of the authors' Random123 (philox4x32, 10 rounds).
ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    assert philox_of_integers(counter, key[1] << 32 | key[0]) == answer


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 7, 2**63 - 1])
@pytest.mark.parametrize("stream", [0, 5, 2**32 - 1])
def test_torch_equals_plain_integers(seed: int, stream: int) -> None:
    """Also for blocks beyond 32 bits; the integers of Python do not overflow."""
    blocks = [0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**61]
    words = torch.stack(philox(torch.tensor(blocks), seed, stream), dim=-1)
    assert words.tolist() == [
        list(philox_of_integers((block & 0xFFFFFFFF, block >> 32, stream, 0), seed)) for block in blocks
    ]


@pytest.mark.parametrize(("rows", "cols"), [(3, 7), (1, 4), (5, 1), (2, 33)])
def test_an_element_has_its_own_number(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    got = uniforms(rows, cols, 77, 3)
    for row, col in itertools.product(range(rows), range(cols)):
        block = row * -(-cols // 4) + col // 4
        word = philox_of_integers((block, 0, 3, 0), 77)[col % 4]
        assert got[row, col].item() == (word >> 8) / 2**24
    monkeypatch.setattr(module, "_BLOCKS_AT_ONCE", 3)
    assert torch.equal(uniforms(rows, cols, 77, 3), got)


def test_numbers_are_uniform_and_streams_and_seeds_independent() -> None:
    """Mean, variance, 256 bins by chi-square, correlation to neighbour, stream and seed; fixed seeds, 4 deviations."""
    n = 1 << 18
    u = uniforms(1, n, 3, 0)[0].double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(u.var() * 12 - 1) < 4 * (0.8 / n) ** 0.5
    counts = torch.bincount((u * 256).long(), minlength=256).double()
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_square - 255) < 4 * (2 * 255) ** 0.5
    for other in (u.roll(1), uniforms(1, n, 3, 1)[0].double(), uniforms(1, n, 4, 0)[0].double()):
        assert abs(((u - 0.5) * (other - 0.5)).mean() * 12) < 4 / n**0.5


def test_torch_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = uniforms(4, 9, 11, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(uniforms(4, 9, 11, 0), first)
    assert not torch.equal(uniforms(4, 9, 12, 0), first)
    assert not torch.equal(uniforms(4, 9, 11, 1), first)


def test_the_default_dtype_changes_no_number() -> None:
    first = uniforms(2, 9, 11, 0)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(uniforms(2, 9, 11, 0), first)
        assert uniforms(2, 9, 11, 0).dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(run, *parts) for run in (0, 1) for parts in itertools.product(range(12), range(12), range(6))}
    assert len(seeds) == 2 * 12 * 12 * 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert len({derive_seed(1, 2, 3), derive_seed(1, 3, 2), derive_seed(1, 2), derive_seed(1, 2, 3, 0)}) == 4
    halves = [derive_seed(0, step) >> 62 for step in range(400)]
    assert 160 < sum(halves) < 240


@pytest.mark.parametrize("bad", [-1, 2**63, 1.0, True, None])
def test_bad_seeds(bad: object) -> None:
    with pytest.raises(ValueError, match="seed="):
        derive_seed(bad, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed="):
        derive_seed(1, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parts: none"):
        derive_seed(1)
