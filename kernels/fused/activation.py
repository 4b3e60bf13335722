"""Gated linear units in one pass over gate and up; backward makes the activation again. See kernels/activation.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.reference.activation import GeluForm

BLOCK = 1024


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _normal_cdf(x):
    """Phi(x) = (1 + erf(x / sqrt 2)) / 2 by Abramowitz and Stegun 7.1.26: erf to 1.5e-7."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    tail = 0.5 * t * (0.254829592 + t * (-0.284496736 + t * series)) * tl.exp(-z * z)
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def _activation(gate, ACTIVATION: tl.constexpr):
    """The activation of gate (fp32) and its derivative."""
    if ACTIVATION == "silu":
        share = _sigmoid(gate)
        slope = gate * share * (1.0 - share)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2 u), without the cancellation.
        share = _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        slope = gate * share * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * gate * gate))
    else:
        share = _normal_cdf(gate)
        slope = gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return gate * share, share + slope


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """Row and columns of this program, int64; programs run along the rows."""
    program, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(width, BLOCK)
    return program // tiles, (program % tiles) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def glu_forward(
    gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """activation(gate) * up for BLOCK columns of one row; out is contiguous."""
    row, columns = _place(width, BLOCK)
    mask = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    activated, _ = _activation(gate, ACTIVATION)
    tl.store(out_ptr + row * width + columns, (activated * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_backward(
    d_out_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    width,
    d_out_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of gate and up, contiguous, for BLOCK columns of one row."""
    row, columns = _place(width, BLOCK)
    mask = columns < width
    d_out = tl.load(d_out_ptr + row * d_out_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    activated, derivative = _activation(gate, ACTIVATION)
    offsets = row * width + columns
    tl.store(d_gate_ptr + offsets, (d_out * up * derivative).to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + offsets, (d_out * activated).to(d_up_ptr.dtype.element_ty), mask=mask)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, H) with dense columns: a view where one stride spans the rows, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


class _GLU(torch.autograd.Function):
    """Keeps gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        if out.numel() == 0:
            return out
        gate, up = _rows(gate), _rows(up)
        (num_rows, width), block = gate.shape, _block(gate.shape[1])
        with torch.cuda.device_of(gate):
            glu_forward[(num_rows * triton.cdiv(width, block),)](
                gate, up, out, width, gate.stride(0), up.stride(0), ACTIVATION=activation, BLOCK=block
            )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        return *_gradients(d_out, gate, up, ctx.activation), None


def _gradients(
    d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    d_gate, d_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    if d_out.numel() == 0:
        return d_gate, d_up
    gate, up, d_out = _rows(gate), _rows(up), _rows(d_out)
    (num_rows, width), block = gate.shape, _block(gate.shape[1])
    strides = (d_out.stride(0), gate.stride(0), up.stride(0))
    with torch.cuda.device_of(gate):
        glu_backward[(num_rows * triton.cdiv(width, block),)](
            d_out, gate, up, d_gate, d_up, width, *strides, ACTIVATION=activation, BLOCK=block
        )
    return d_gate, d_up


def fused_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """kernels.activation.swiglu by Triton; fp32, bf16 or fp16."""
    return _GLU.apply(gate, up, "silu")


def fused_swiglu_backward(
    d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels.activation.swiglu_backward by Triton."""
    return _gradients(d_out, gate, up, "silu")


def fused_geglu(gate: torch.Tensor, up: torch.Tensor, *, approximate: GeluForm) -> torch.Tensor:
    """kernels.activation.geglu by Triton; fp32, bf16 or fp16."""
    return _GLU.apply(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")
