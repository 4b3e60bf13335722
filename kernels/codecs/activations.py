"""SiLU and GELU, their derivatives, and the grid that 4-bit codes of a derivative lie on."""

from __future__ import annotations

import functools
import math
from enum import Enum

import torch
import torch.nn.functional as F

from headrace.kernels.codecs.config import CodecName
from headrace.kernels.codecs.grid import FOUR_BIT_LEVELS, grid_step

# The largest f'(x), rounded up in the eighth digit: SiLU at x tanh(x / 2) = 2, GELU at x = sqrt(2), its tanh form by
# a scan. All three have f'(x) + f'(-x) = 1, so the smallest is one minus it.
_LARGEST_DERIVATIVE = {"silu": 1.0998394, "gelu_tanh": 1.1289931, "gelu_erf": 1.1289042}
# Beyond it both GELU derivatives are 0 or 1 in fp32, and x^2 does not overflow below it.
_GELU_END = 20.0


class Activation(Enum):
    """An activation that takes no parameter; the value is its place in the Triton kernels."""

    silu = 0
    gelu_tanh = 1
    gelu_erf = 2

    @property
    def codec(self) -> CodecName:
        """The codec of its derivative."""
        return CodecName[f"derivative_{self.name}"]


def apply(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """f(x) by torch's own operator, in the dtype of x."""
    if activation is Activation.silu:
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation is Activation.gelu_tanh else "none")


def derivative(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """f'(x), in the dtype of x (fp32 or fp64).

    SiLU: s (1 + x (1 - s)) with s = sigmoid(x). GELU: Phi(x) + x phi(x). GELU's tanh form, with a = 0.044715,
    c = sqrt(2 / pi) and t = tanh(c (x + a x^3)): (1 + t) / 2 + x (1 - t^2) c (1 + 3 a x^2) / 2.
    """
    if activation is Activation.silu:
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    x = x.clamp(-_GELU_END, _GELU_END)
    if activation is Activation.gelu_erf:
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (x + cubic * x.pow(3)))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * scale * (1 + 3 * cubic * x.square())


def swiglu_factors(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(up silu'(gate), silu(gate)): what the gradient of silu(gate) * up is times, for gate and for up."""
    return up * derivative(gate, Activation.silu), F.silu(gate)


@functools.cache
def fixed_grid(activation: Activation) -> tuple[float, float]:
    """Low end and step of the 16 codes over all that f' takes; both are fp32 numbers."""
    largest = torch.tensor(_LARGEST_DERIVATIVE[activation.name], dtype=torch.float32)
    low = 1 - largest
    return float(low), float(grid_step(low, largest, FOUR_BIT_LEVELS))
