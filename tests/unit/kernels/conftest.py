"""What the operator tests share: an operator against its fp64 oracle, output and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from headrace.helpers.tolerances import REL_ERROR, rel_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
Operator = Callable[..., torch.Tensor]


def errors(operator: Operator, oracle: Operator, inputs: list[torch.Tensor]) -> list[float]:
    """Relative errors of the output and of every gradient; the oracle sees the same inputs in fp64."""

    def run(call: Operator, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        out = call(*leaves)
        cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        cotangent = cotangent.to(inputs[0].dtype).to(out.dtype)
        return [out, *torch.autograd.grad(out, leaves, cotangent)]

    got = run(operator, inputs)
    expected = run(oracle, [tensor.double() for tensor in inputs])
    return [rel_error(a, b) for a, b in zip(got, expected, strict=True)]


@pytest.fixture(scope="session")
def check() -> Callable[..., None]:
    """check(name, operator, oracle, inputs): every error is within the table's row."""

    def run(name: str, operator: Operator, oracle: Operator, inputs: list[torch.Tensor]) -> None:
        found = errors(operator, oracle, inputs)
        assert max(found) <= REL_ERROR[name][inputs[0].dtype], found

    return run


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """draw(*shape, dtype=...): seeded normal numbers."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    return make
