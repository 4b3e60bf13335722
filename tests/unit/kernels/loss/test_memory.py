"""Nothing of the size tokens x vocabulary is ever made, and no second sum of the size of the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.kernels.api import ChunkAxis, LossOptions, linear_cross_entropy
from headrace.kernels.loss.narrowing import scaled_

NUM_TOKENS, WIDTH, VOCAB = 96, 4, 640


class Largest(TorchDispatchMode):
    """Elements of the largest storage that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.num_elements = max(self.num_elements, size)
        return out


TERMS: dict[str, Any] = {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.01}


@pytest.mark.parametrize("axis", [ChunkAxis.tokens, ChunkAxis.vocabulary])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_tensor_is_the_weight_or_a_block(draw, axis, dtype) -> None:
    hidden, weight = (draw(*shape, dtype=dtype).requires_grad_() for shape in ((NUM_TOKENS, WIDTH), (VOCAB, WIDTH)))
    targets = torch.arange(NUM_TOKENS)
    options = LossOptions(axis=axis, workspace_bytes=60_000)
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, targets, options=options, **TERMS).backward()
    limit = max(VOCAB * WIDTH, 60_000 // 4)
    assert 0 < seen.num_elements <= limit < NUM_TOKENS * VOCAB / 4
    with Largest() as whole:
        torch.nn.functional.cross_entropy(hidden @ weight.T, targets).backward()
    assert whole.num_elements >= NUM_TOKENS * VOCAB


def test_a_sum_is_narrowed_in_its_own_memory() -> None:
    total = torch.randn(700, 33)
    expected = (total * 0.37).bfloat16()
    address = total.data_ptr()
    narrow = scaled_(total, torch.tensor(0.37), torch.bfloat16)
    assert torch.equal(narrow, expected)
    assert narrow.data_ptr() == address
    assert narrow.is_contiguous()


@pytest.mark.parametrize("num_bytes", [1, 100, 2**20])
def test_narrowing_piece_by_piece_never_writes_what_is_still_to_be_read(monkeypatch, num_bytes) -> None:
    monkeypatch.setattr("headrace.kernels.loss.narrowing.NARROW_BYTES", num_bytes)
    total = torch.randn(37, 5)
    expected = total.half()
    assert torch.equal(scaled_(total, torch.tensor(1.0), torch.float16), expected)
    assert scaled_(torch.zeros(0, 5), torch.tensor(1.0), torch.float16).shape == (0, 5)


def test_the_narrowed_gradient_can_be_accumulated_and_saved(draw) -> None:
    weight = draw(VOCAB, WIDTH, dtype=torch.bfloat16).requires_grad_()
    hidden, options = draw(NUM_TOKENS, WIDTH, dtype=torch.bfloat16), LossOptions(axis=ChunkAxis.tokens)
    for _ in range(2):
        linear_cross_entropy(hidden, weight, torch.arange(NUM_TOKENS), options=options).backward()
    once = weight.grad / 2
    weight.grad = None
    linear_cross_entropy(hidden, weight, torch.arange(NUM_TOKENS), options=options).backward()
    assert torch.allclose(once.float(), weight.grad.float(), rtol=1e-2)


@pytest.mark.parametrize("axis", [ChunkAxis.tokens, ChunkAxis.vocabulary])
def test_ignored_tokens_cost_no_product(draw, monkeypatch, axis) -> None:
    from headrace.kernels.loss import problem

    rows, real = [], problem.product
    monkeypatch.setattr(problem, "product", lambda a, b, dtype: rows.append(a.shape[0]) or real(a, b, dtype))
    targets = torch.arange(NUM_TOKENS)
    targets[10:] = -100
    for options in (LossOptions(axis=axis), LossOptions(axis=axis, tokens_per_chunk=16)):
        rows.clear()
        linear_cross_entropy(draw(NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH), targets, options=options)
        assert rows == ([10] if options.tokens_per_chunk is None else [16])
