"""The codecs' kernels on CUDA: the bits of the CPU reference in every dtype, offsets beyond 2^31."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.backend import Backend
from headrace.kernels.codecs.config import CodecName
from headrace.kernels.codecs.grid import EIGHT_BIT_LEVELS, grid_step, to_codes
from headrace.kernels.codecs.philox import philox
from headrace.kernels.codecs.rows import decode_rows, encode_rows

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 8, 128), (5, 3, 1111), (1, 7, 4096), (3, 2, 1)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers of size 3 with an outlier, a constant row and a row of numbers below fp32's normal ones."""
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    x.view(-1)[-1] = 1e4
    rows = x.view(-1, shape[-1])
    rows[0] = 0.7
    rows[1] *= 1e-39
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", list(CodecName))
def test_bits_of_the_cpu_reference(codec: CodecName, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = numbers(shape, dtype)
    for seed in (1, 2**62 + 3):
        theirs = encode_rows(codec, x, seed=seed, stream=2)
        for backend in (Backend.triton, Backend.reference):
            ours = encode_rows(codec, x.cuda(), seed=seed, stream=2, backend=backend)
            assert torch.equal(ours.cpu(), theirs)
            decoded = decode_rows(codec, ours, shape[-1], dtype, backend=backend).cpu()
            assert torch.equal(decoded, decode_rows(codec, theirs, shape[-1], dtype))


@pytest.mark.soak
def test_offsets_beyond_32_bits() -> None:
    """2^19 + 1 rows of 4096 in bf16: the codes of the last row, against the formula at their places."""
    num_rows, width = 2**19 + 1, 4096
    x = torch.zeros(num_rows, width, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(width, generator=torch.Generator().manual_seed(0)).cuda()
    held = encode_rows(CodecName.eight_bit_token, x, seed=9, stream=0, backend=Backend.triton)
    last = x[-1].cpu().float()
    low, high = last.aminmax()
    step = grid_step(low, high, EIGHT_BIT_LEVELS)
    first = (num_rows - 1) * width // 4
    words = torch.stack(philox(torch.arange(first, first + width // 4), 9, 0), dim=-1).flatten()
    codes = to_codes(last, low, step, EIGHT_BIT_LEVELS, (words >> 8).float() * 2.0**-24)
    assert torch.equal(held[-1, 8:].cpu(), codes)
    assert torch.equal(held[-1, :8].cpu().view(torch.float32), torch.stack((low, step)))
    got = decode_rows(CodecName.eight_bit_token, held, width, torch.bfloat16, backend=Backend.triton)
    assert torch.equal(got[-1].cpu(), (codes.float() * step + low).to(torch.bfloat16))
