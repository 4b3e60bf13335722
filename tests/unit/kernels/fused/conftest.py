"""The fused kernels, in Triton's interpreter (fp32); tests/gpu runs them on CUDA in bf16."""

from __future__ import annotations

import importlib.util

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if HAS_TRITON else "triton is not installed"
    if reason is None and torch.cuda.is_available():
        reason = "this machine has a GPU: tests/gpu runs the kernels there"
    for item in items:
        if reason and "unit/kernels/fused" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))
