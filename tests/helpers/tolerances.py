"""How far an operator may be from its fp64 oracle: the one table that tests and benches read.

The figure is ||got - oracle|| / ||oracle||, of the output and of every gradient; the oracle sees the same (rounded)
inputs.
"""

from __future__ import annotations

import torch

_NARROW = {torch.bfloat16: 1.0e-2, torch.float16: 1.5e-3}
REL_ERROR: dict[str, dict[torch.dtype, float]] = {
    "rms_norm": {torch.float64: 1e-14, torch.float32: 1e-6, **_NARROW},
    "add_rms_norm": {torch.float64: 1e-14, torch.float32: 1e-6, **_NARROW},
    "apply_rope": {torch.float64: 1e-14, torch.float32: 1e-6, **_NARROW},
    "qk_norm_rope": {torch.float64: 1e-14, torch.float32: 1e-6, **_NARROW},
    "swiglu": {torch.float64: 1e-14, torch.float32: 1e-6, **_NARROW},
    "geglu": {torch.float64: 1e-14, torch.float32: 1e-6, **_NARROW},
    "attention": {torch.float64: 1e-13, torch.float32: 2e-6, **_NARROW},
    "page_mean": {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 1e-6, torch.float16: 1e-6},
    "page_score": {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6},
    "linear_cross_entropy": {torch.float64: 1e-13, torch.float32: 2e-6, **_NARROW},
}


def rel_error(got: torch.Tensor, oracle: torch.Tensor) -> float:
    """||got - oracle|| / ||oracle|| in fp64; of a zero oracle, ||got||."""
    got, oracle = got.detach().double(), oracle.detach().double()
    norm, error = oracle.norm(), (got - oracle).norm()
    return float(error / norm if norm > 0 else error)
