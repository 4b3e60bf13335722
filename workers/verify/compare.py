"""The relative error of every parameter's gradient, and what it is relative to where the true gradient is zero.

NUMERICS.md, section 2, states the definition and its reason.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

# A tensor whose norm is below this many unit roundoffs of its block's gradient holds rounding noise and no digit.
NOISE_ROUNDOFFS = 64
# JSON has no infinity: what a gradient that is not finite is reported as. It fails every bound.
NOT_FINITE = sys.float_info.max
_BLOCK = re.compile(r"^(.*?layers\.\d+)\.")


@dataclass(frozen=True)
class GradientErrors:
    """Errors of one gradient against its reference.

    Args:
        params: ||g - g_ref|| / scale by parameter name; scale is ||g_ref||, or the block's for those in `noise`.
        noise: parameters whose reference gradient is zero up to rounding.
        whole: ||G - G_ref|| / ||G_ref|| of all parameters concatenated.
    """

    params: dict[str, float]
    noise: frozenset[str]
    whole: float


def block_of(name: str) -> str:
    """The decoder block of a parameter by its Hugging Face name; embedding, last norm and head are one block, ""."""
    match = _BLOCK.match(name)
    return match[1] if match else ""


def gradient_errors(
    grads: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], *, noise_dtype: torch.dtype | None = None
) -> GradientErrors:
    """Compare two gradients parameter by parameter, in fp64.

    Args:
        noise_dtype: precision in which the reference was computed; None takes the dtype of its tensors.

    Raises:
        KeyError: the two have other parameters.
        ValueError: a parameter has another shape.
    """
    if grads.keys() != reference.keys():
        raise KeyError(f"only on one side: {sorted(grads.keys() ^ reference.keys())}")
    norms = {name: _norm(tensor) for name, tensor in reference.items()}
    differences = {name: _difference(name, grads[name], tensor) for name, tensor in reference.items()}
    blocks = {name: block_of(name) for name in norms}
    block_norms = {
        block: math.hypot(*(norms[name] for name in norms if blocks[name] == block)) for block in set(blocks.values())
    }
    whole_norm = math.hypot(*norms.values())
    params, noise = {}, set()
    for name, norm in norms.items():
        roundoff = torch.finfo(noise_dtype or reference[name].dtype).eps / 2
        scale = norm
        if norm <= NOISE_ROUNDOFFS * roundoff * block_norms[blocks[name]] or norm == 0.0:
            noise.add(name)
            scale = block_norms[blocks[name]] or whole_norm or _norm(grads[name])
        params[name] = ratio(differences[name], scale)
    return GradientErrors(params, frozenset(noise), ratio(math.hypot(*differences.values()), whole_norm))


def block_errors(grads: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """||G - G_ref|| / ||G_ref|| of every block's gradient, by the name of the block."""
    names: dict[str, list[str]] = {}
    for name in reference:
        names.setdefault(block_of(name), []).append(name)
    return {
        block: ratio(
            math.hypot(*(_difference(n, grads[n], reference[n]) for n in members)),
            math.hypot(*(_norm(reference[n]) for n in members)),
        )
        for block, members in names.items()
    }


def relative(value: float, reference: float) -> float:
    """|value - reference| / |reference|; 0 where both are 0."""
    return ratio(abs(value - reference), abs(reference))


def ratio(difference: float, scale: float) -> float:
    """difference / scale: 0 where difference is 0, NOT_FINITE where the quotient is not a finite number."""
    if difference == 0.0:
        return 0.0
    quotient = difference / scale if scale > 0.0 else math.inf
    return quotient if math.isfinite(quotient) else NOT_FINITE


def largest(errors: Mapping[str, float]) -> tuple[str, float]:
    """The name with the largest error, and that error."""
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]


def bit_equal(mine: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Same names, and the same bits in every tensor (so -0 differs from 0)."""
    return mine.keys() == other.keys() and all(_same_bits(mine[name], other[name]) for name in mine)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _difference(name: str, grad: torch.Tensor, reference: torch.Tensor) -> float:
    if grad.shape != reference.shape:
        raise ValueError(f"{name}: gradient of shape {tuple(grad.shape)}, reference {tuple(reference.shape)}")
    return float(torch.linalg.vector_norm(grad.double() - reference.double()))


def medians(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of every name over rows that have the same names (odd number of rows: the middle one)."""
    listed = list(rows)
    return {name: sorted(row[name] for row in listed)[len(listed) // 2] for name in listed[0]}
