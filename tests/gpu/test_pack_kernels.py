"""The Triton forms of the loss steps, staging blocks and pages on CUDA, against torch in fp64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.kernels.backend import Backend
from headrace.kernels.loss import steps
from headrace.kernels.pack import layout_of, pack, unpack
from headrace.kernels.pages import page_mean, page_score, top_pages

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 300), (131, 4096 + 77), (300, 12_801)]


def loss_operands(n: int, v: int, first: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(first - 3, first + v + 3, (n,), generator=generator)
    labels[::5] = -1
    return {
        "logits": torch.randn(n, v, generator=generator) * 3,
        "labels": labels,
        "bias": torch.randn(v, generator=generator),
        "weight": torch.rand(v, generator=generator) + 0.5,
        "softmax": (labels >= 0) * (torch.rand(n, generator=generator) + 0.5),
        "label": (labels >= 0) * (torch.rand(n, generator=generator) + 0.5),
        "smooth": (labels >= 0) * 0.1 / v,
    }


def loss_steps(module, given: dict[str, torch.Tensor], first: int, **options):
    """Statistics, capped logits, gradient, and the kept tiles."""
    logits = given["logits"].clone()
    found = module.block_stats(
        logits, given["labels"], given["bias"], first=first, softcap=5.0, class_weight=given["weight"], want_total=True
    )
    capped = logits.clone()
    kept = module.block_gradient_(
        logits,
        given["labels"],
        found.max + found.sum_exp.log(),
        steps.RowScales(given["softmax"], given["label"], given["smooth"]),
        first=first,
        softcap=5.0,
        class_weight=given["weight"],
        **options,
    )
    return [*found, capped, logits if options.get("out") is None else options["out"]], kept


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_steps(shape: tuple[int, int]) -> None:
    from headrace.kernels.fused import loss as fused

    given = loss_operands(*shape, first=1000)
    mine, kept = loss_steps(fused, {name: tensor.cuda() for name, tensor in given.items()}, 1000)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    exact, _ = loss_steps(steps, wide, 1000)
    plain, _ = loss_steps(steps, given, 1000)
    assert kept is None
    for got, by_torch, oracle in zip(mine, plain, exact, strict=True):
        assert rel_error(got.cpu(), oracle) <= rel_error(by_torch, oracle) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_gradient_in_a_narrow_buffer_and_twice_the_same_bits(dtype: torch.dtype) -> None:
    from headrace.kernels.fused import loss as fused

    given = {name: tensor.cuda() for name, tensor in loss_operands(131, 4173, 1000).items()}
    wide, _ = loss_steps(fused, given, 1000)
    again, _ = loss_steps(fused, given, 1000)
    out = torch.full_like(given["logits"], torch.nan, dtype=dtype)
    loss_steps(fused, given, 1000, out=out)
    assert all(torch.equal(a, b) for a, b in zip(wide, again, strict=True))
    assert torch.equal(out, wide[-1].to(dtype))


def test_loss_filter_keeps_the_tiles_that_torch_keeps() -> None:
    from headrace.kernels.fused import loss as fused

    given = loss_operands(300, 1000, 7)
    given["logits"][:128, :10] += 9.0
    given["labels"][:128] = 7
    given["labels"][128:256] = -1
    _, kept = loss_steps(fused, {name: tensor.cuda() for name, tensor in given.items()}, 7, filter_eps=2e-2)
    _, expected = loss_steps(steps, given, 7, filter_eps=2e-2)
    assert torch.equal(kept.cpu(), expected)
    assert 0 < int(kept.sum()) < kept.numel()


def test_loss_offsets_beyond_32_bits() -> None:
    """The last rows of a block of 2^31 entries and more: 9 GiB of logits."""
    from headrace.kernels.fused import loss as fused

    n, v = 113_400, 18_944
    assert n * v > 2**31
    logits = torch.zeros(n, v, device="cuda")
    logits[-1, -1] = 3.0
    labels = torch.full((n,), -1, device="cuda")
    labels[-1] = v - 1
    found = fused.block_stats(logits, labels, None, first=0, softcap=None)
    assert float(found.picked[-1]) == 3.0
    assert float(found.max[-1]) == 3.0
    rows = torch.zeros(n, device="cuda")
    ones = steps.RowScales(rows, rows + 1, None)
    fused.block_gradient_(logits, labels, found.max + found.sum_exp.log(), ones, first=0, softcap=None)
    assert float(logits[-1, -1]) == -1.0
    assert int(torch.count_nonzero(logits)) == 1


def skeletal() -> dict[str, torch.Tensor]:
    qkv = torch.randn(2, 513, 1000, device="cuda").bfloat16()
    return {
        "x": torch.randn(2, 513, 896, device="cuda").bfloat16(),
        "q": qkv[..., :896].unflatten(-1, (14, 64)),
        "v": qkv[..., 901:],
        "lse": torch.randn(2, 14, 513, device="cuda"),
        "gate": torch.randn(2, 513, 37, device="cuda").half(),
        "codes": torch.randint(-128, 128, (2, 513, 5), device="cuda").to(torch.int8),
        "sum": torch.randn(2, 513, 3, device="cuda", dtype=torch.float64),
    }


@pytest.mark.parametrize("alignment_bytes", [16, 512])
def test_pack_gives_the_bytes_of_torch_and_comes_back(alignment_bytes: int) -> None:
    tensors = skeletal()
    dims = {name: 2 if name == "lse" else 1 for name in tensors}
    layout = layout_of(tensors, 300, token_dims=dims, alignment_bytes=alignment_bytes)
    block = pack(tensors, layout, 101, backend=Backend.triton)
    assert torch.equal(block, pack(tensors, layout, 101, backend=Backend.reference))
    given = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    unpack(block, layout, out=given, begin=7, backend=Backend.triton)
    for name, tensor in tensors.items():
        assert torch.equal(given[name].narrow(dims[name], 7, 300), tensor.narrow(dims[name], 101, 300))
        assert not given[name].narrow(dims[name], 0, 7).any()
        assert not given[name].narrow(dims[name], 307, 206).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("staged", DTYPES)
def test_pack_casts_as_torch_does(dtype: torch.dtype, staged: torch.dtype) -> None:
    x = torch.randn(1, 700, 33, device="cuda").to(dtype)
    layout = layout_of({"x": x}, 512, staged_dtypes={"x": staged})
    block = pack({"x": x}, layout, 5, backend=Backend.triton)
    assert torch.equal(block, pack({"x": x}, layout, 5, backend=Backend.reference))
    back = unpack(block, layout, backend=Backend.triton)["x"]
    assert torch.equal(back, x[:, 5:517].to(staged).to(dtype))


def test_pack_is_one_launch() -> None:
    tensors = skeletal()
    layout = layout_of(tensors, 300, token_dims={name: 2 if name == "lse" else 1 for name in tensors})
    out = pack(tensors, layout, 101, backend=Backend.triton)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        pack(tensors, layout, 101, out=out, backend=Backend.triton)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type is torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1, launched


def test_pack_offsets_beyond_32_bits() -> None:
    x = torch.empty(3, 1_100_000_000, dtype=torch.int8, device="cuda")
    x[:, 77:90] = torch.arange(39, device="cuda", dtype=torch.int8).view(3, 13)
    layout = layout_of({"x": x}, 13)
    block = pack({"x": x}, layout, 77, backend=Backend.triton)
    unpack(block, layout, out={"x": x}, begin=1_099_999_987, backend=Backend.triton)
    assert x[:, -13:].flatten().tolist() == list(range(39))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100, 128])
def test_pages(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    k = torch.randn(2, 1000, 2, width, generator=generator).to(dtype)
    q = (torch.randn(2, 300, 6, width, generator=generator) * 0.3).to(dtype)
    means = page_mean(k.cuda(), 48, backend=Backend.triton)
    exact = page_mean(k.double(), 48)
    assert rel_error(means.cpu(), exact) <= REL_ERROR["page_mean"][dtype]
    scores = page_score(q.cuda(), means, 128, backend=Backend.triton)
    again = page_score(q.cuda(), means, 128, backend=Backend.triton)
    oracle = page_score(q.double(), means.cpu().double(), 128)
    assert rel_error(scores.cpu(), oracle) <= REL_ERROR["page_score"][dtype]
    assert torch.equal(scores, again)
    assert torch.equal(top_pages(scores, 5).cpu(), top_pages(scores.cpu(), 5))
