"""One small check of each thing that everything else needs, most harmless first; scripts/gpu_checks.py begins with it.

Without a GPU the same checks run on the CPU, so that a mistake in them costs no GPU time.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.helpers.training import run_recorded, tiny_job
from headrace.kernels.api import AttentionOperator, Backend, attention, rms_norm
from headrace.kernels.products import add_product_
from headrace.storage.transfer import CpuCopies, CudaCopies
from headrace.workers.job import RankContext
from headrace.workers.parallel.process_group import process_group
from headrace.workers.train.config import Precision

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
HALF = torch.bfloat16 if HAS_GPU else torch.float32
pytestmark = [pytest.mark.gpu] if HAS_GPU else []


def draw(*shape: int, dtype: torch.dtype = HALF, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_copy_there_and_back() -> None:
    sent = draw(1 << 20)
    assert torch.equal(sent.to(DEVICE).cpu(), sent)


@pytest.mark.parametrize(("rows", "width", "depth"), [(64, 96, 128), (33, 17, 5)])
def test_a_product_is_added_in_place_in_fp32(rows: int, width: int, depth: int) -> None:
    total, a, b = draw(rows, width, dtype=torch.float32), draw(rows, depth, seed=1), draw(depth, width, seed=2)
    oracle = total.double() + a.double() @ b.double()
    got = total.to(DEVICE)
    add_product_(got, a.to(DEVICE), b.to(DEVICE))
    assert rel_error(got.cpu(), oracle) < 1e-6


@pytest.mark.parametrize("num_tokens", [512, 300, 1])
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_attention_and_its_gradients(name: str, num_tokens: int) -> None:
    operator = AttentionOperator(name) if HAS_GPU else AttentionOperator.flash
    results = []
    for device, dtype, chosen in (
        (DEVICE, HALF, operator),
        (torch.device("cpu"), torch.float64, AttentionOperator.reference),
    ):
        shapes = ((1, num_tokens, 4, 64), (1, num_tokens, 2, 64), (1, num_tokens, 2, 64))
        leaves = [draw(*shape, seed=n).to(device, dtype).requires_grad_() for n, shape in enumerate(shapes)]
        out = attention(*leaves, scale=0.125, operator=chosen)
        grads = torch.autograd.grad(out, leaves, draw(*out.shape, seed=9).to(device, dtype))
        results.append([tensor.detach().cpu() for tensor in (out, *grads)])
    for got, oracle in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        # With one token q and k have no gradient at all.
        assert float((got.double() - oracle).norm()) <= REL_ERROR["attention"][HALF] * max(float(oracle.norm()), 1.0)


def test_one_triton_kernel() -> None:
    x, weight = draw(70, 100), draw(100, seed=1)
    got = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6, backend=Backend.triton)
    oracle = rms_norm(x.double(), weight.double(), 1e-6, backend=Backend.reference)
    assert rel_error(got.cpu(), oracle) < REL_ERROR["rms_norm"][HALF]


@pytest.mark.parametrize("kind", ["memfd", "shm"])
def test_mapped_memory_is_page_locked_and_copied(kind: str) -> None:
    num_bytes = 1 << 20
    fd = os.memfd_create("smoke") if kind == "memfd" else os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(fd, num_bytes)
    memory = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
    os.close(fd)
    copies = CudaCopies(DEVICE) if HAS_GPU else CpuCopies(DEVICE)
    copies.register(memory, "host")
    assert memory.is_pinned() == HAS_GPU
    sent = torch.arange(num_bytes, device=DEVICE).to(torch.uint8)
    copies.wait(copies.to_host(memory, sent, [copies.fence()]))
    assert torch.equal(memory, sent.cpu())
    copies.unregister(memory)


def test_collectives_of_one_rank() -> None:
    with process_group(RankContext(device=DEVICE.type, collective_timeout_s=60.0), DEVICE):
        for device in {DEVICE, torch.device("cpu")}:
            value = torch.ones(3, device=device)
            dist.all_reduce(value)
            assert value.tolist() == [1.0, 1.0, 1.0]


def test_a_step_of_fsdp(tmp_path: Path) -> None:
    precision = Precision.bf16 if HAS_GPU else Precision.fp32
    job = tiny_job(tmp_path, train={"steps": 1, "precision": precision}, model={"hidden_size": 256})
    run = run_recorded(job, RankContext(device=DEVICE.type))
    ((_, loss, grad_norm, _),) = run.curve
    assert 4.0 < loss < 8.0
    assert 0.0 < grad_norm < 1e3
