"""RMSNorm in one pass over x, with the residual sum in it where asked, and its backward. See kernels/norm.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.reference.norm import NormCasting, inverse_rms

# Elements of one tile (rows x columns) that a program holds in registers: 64 fp32 words per thread, in 4 to 16 warps.
SMALL_TILE = 4096
LARGE_TILE = 8192
# Programs of the backward kernel: enough to fill any GPU, few enough that their fp32 rows are 4 MiB or 256 rows.
MIN_PROGRAMS = 256
MAX_PROGRAMS = 1024
PARTIAL_ELEMENTS = 2**20


@triton.jit
def _input(x_ptr, residual_ptr, offsets, mask, HAS_RESIDUAL: tl.constexpr):
    """x, or x + residual rounded to their dtype, in fp32."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = (x + residual).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _factor(weight_ptr, columns, mask, GEMMA: tl.constexpr):
    """What x / rms(x) is multiplied by, in fp32: the weight, or 1 + weight."""
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if GEMMA:
        weight += 1.0
    return weight


@triton.jit
def _scaled(x, rstd, factor, dtype: tl.constexpr, GEMMA: tl.constexpr):
    """x rstd factor, with the rounding of casting llama before the factor."""
    unit = x * rstd
    if not GEMMA:
        unit = unit.to(dtype).to(tl.float32)
    return (unit * factor).to(dtype)


@triton.jit
def rms_norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    rstd_ptr,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GEMMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """ROWS rows per program; a row wider than BLOCK (then ROWS is 1) is read twice."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    if WIDTH <= BLOCK:
        mask = (rows < num_rows) & (columns < WIDTH)
        x = _input(x_ptr, residual_ptr, rows * WIDTH + columns, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(sum_ptr + rows * WIDTH + columns, x.to(dtype), mask=mask)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / WIDTH + tl.cast(eps, tl.float32))
        factor = _factor(weight_ptr, columns, columns < WIDTH, GEMMA)
        tl.store(out_ptr + rows * WIDTH + columns, _scaled(x, rstd, factor, dtype, GEMMA), mask=mask)
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for begin in range(0, WIDTH, BLOCK):
            mask = (rows < num_rows) & (begin + columns < WIDTH)
            x = _input(x_ptr, residual_ptr, rows * WIDTH + begin + columns, mask, HAS_RESIDUAL)
            if HAS_RESIDUAL:
                tl.store(sum_ptr + rows * WIDTH + begin + columns, x.to(dtype), mask=mask)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / WIDTH + tl.cast(eps, tl.float32))
        for begin in range(0, WIDTH, BLOCK):
            mask = (rows < num_rows) & (begin + columns < WIDTH)
            x = _input(x_ptr, residual_ptr, rows * WIDTH + begin + columns, mask, HAS_RESIDUAL)
            factor = _factor(weight_ptr, begin + columns, begin + columns < WIDTH, GEMMA)
            out = _scaled(x, rstd, factor, dtype, GEMMA)
            tl.store(out_ptr + rows * WIDTH + begin + columns, out, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def _input_gradient(unit, d_unit, correction, rstd, d_sum_ptr, offsets, mask, HAS_D_SUM: tl.constexpr):
    """rstd (d_unit - unit mean(unit d_unit)), and the cotangent of the sum on top where there is one; fp32."""
    d_x = (d_unit - unit * correction) * rstd
    if HAS_D_SUM:
        d_x += tl.load(d_sum_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return d_x


@triton.jit
def rms_norm_backward(
    d_out_ptr,
    d_sum_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    d_x_ptr,
    partial_ptr,
    num_rows,
    rows_per_program,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GEMMA: tl.constexpr,
    HAS_D_SUM: tl.constexpr,
):
    """A run of rows per program, ROWS at a time; its share of the weight's gradient is in registers. WIDTH <= BLOCK."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    columns = tl.arange(0, BLOCK)[None, :]
    factor = _factor(weight_ptr, columns, columns < WIDTH, GEMMA)
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    # A while loop: the interpreter takes no range over numbers that are known at run time alone.
    begin = first
    while begin < last:
        rows = begin + tl.arange(0, ROWS)[:, None]
        mask = (rows < last) & (columns < WIDTH)
        offsets = rows * WIDTH + columns
        rstd = tl.load(rstd_ptr + rows, mask=rows < last, other=0.0)
        unit = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * rstd
        d_out = tl.load(d_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d_weight += d_out * unit
        d_unit = d_out * factor
        correction = tl.sum(unit * d_unit, axis=1)[:, None] / WIDTH
        d_x = _input_gradient(unit, d_unit, correction, rstd, d_sum_ptr, offsets, mask, HAS_D_SUM)
        tl.store(d_x_ptr + offsets, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        begin += ROWS
    tl.store(partial_ptr + program * WIDTH + columns, tl.sum(d_weight, axis=0)[None, :], mask=columns < WIDTH)


@triton.jit
def rms_norm_backward_wide(
    d_out_ptr,
    d_sum_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    d_x_ptr,
    partial_ptr,
    num_rows,
    rows_per_program,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GEMMA: tl.constexpr,
    HAS_D_SUM: tl.constexpr,
):
    """As rms_norm_backward for WIDTH > BLOCK: a row is read twice, the weight's share lies in partial (zeroed)."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    row = first
    while row < last:
        rstd = tl.load(rstd_ptr + row)
        products = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, WIDTH, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            mask = columns < WIDTH
            unit = tl.load(x_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32) * rstd
            d_out = tl.load(d_out_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
            products += unit * d_out * _factor(weight_ptr, columns, mask, GEMMA)
        correction = tl.sum(products, axis=0) / WIDTH
        for begin in range(0, WIDTH, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            mask = columns < WIDTH
            unit = tl.load(x_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32) * rstd
            d_out = tl.load(d_out_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
            d_unit = d_out * _factor(weight_ptr, columns, mask, GEMMA)
            d_x = _input_gradient(unit, d_unit, correction, rstd, d_sum_ptr, row * WIDTH + columns, mask, HAS_D_SUM)
            tl.store(d_x_ptr + row * WIDTH + columns, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
            share = partial_ptr + program * WIDTH + columns
            tl.store(share, tl.load(share, mask=mask, other=0.0) + d_out * unit, mask=mask)
        # The next row's loads of `share` come after this row's stores, whichever thread made them.
        tl.debug_barrier()
        row += 1


def tile_shape(width: int) -> tuple[int, int, int]:
    """Rows and columns of one tile, and its warps: as many short rows as fill it, or a part of one long row."""
    block = min(triton.next_power_of_2(width), LARGE_TILE)
    rows = max(1, SMALL_TILE // block)
    return rows, block, max(4, rows * block // 512)


def backward_share(num_rows: int, width: int) -> tuple[int, int]:
    """Programs of the backward kernel and rows of each: by the shape alone, and so is the order of the sums."""
    wanted = min(MAX_PROGRAMS, max(MIN_PROGRAMS, PARTIAL_ELEMENTS // width))
    tile_rows = tile_shape(width)[0]
    rows = max(1, triton.cdiv(triton.cdiv(num_rows, wanted), tile_rows)) * tile_rows
    return triton.cdiv(num_rows, rows), rows


class _RMSNorm(torch.autograd.Function):
    """Of x, or of x + residual; returns the normed rows and the sum (None without a residual)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, gemma: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight = x.contiguous(), weight.contiguous()
        out, total, rstd = _normed(x, None if residual is None else residual.contiguous(), weight, eps, gemma=gemma)
        ctx.save_for_backward(x if total is None else total, weight, rstd)
        ctx.gemma = gemma
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, d_out: torch.Tensor | None, d_sum: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        if d_out is None:
            return d_sum, d_sum if ctx.needs_input_grad[1] else None, None, None, None
        x, weight, rstd = ctx.saved_tensors
        d_x, d_weight = _gradients(d_out, d_sum, x, weight, rstd, gemma=ctx.gemma)
        return d_x, d_x if ctx.needs_input_grad[1] else None, d_weight.to(weight.dtype), None, None


def _normed(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The normed rows, the sum (None without a residual) and the scale of every row, (rows,) fp32; all contiguous."""
    width = x.shape[-1]
    num_rows = x.numel() // width if width else 0
    out, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rows, block, num_warps = tile_shape(width)
    with torch.cuda.device_of(x):
        rms_norm_forward[(triton.cdiv(num_rows, rows),)](
            x,
            x if residual is None else residual,
            weight,
            x if total is None else total,
            out,
            rstd,
            num_rows,
            eps,
            WIDTH=width,
            ROWS=rows,
            BLOCK=block,
            GEMMA=gemma,
            HAS_RESIDUAL=residual is not None,
            num_warps=num_warps,
        )
    return out, total, rstd


def _gradients(
    d_out: torch.Tensor,
    d_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    *,
    gemma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x, with the cotangent of the sum in it, and of the weight, in fp32."""
    d_out, d_sum = d_out.contiguous(), None if d_sum is None else d_sum.contiguous()
    width, num_rows = x.shape[-1], rstd.numel()
    d_x = torch.empty_like(x)
    rows, block, num_warps = tile_shape(width)
    programs, rows_per_program = backward_share(num_rows, width)
    wide = width > block
    partial = (torch.zeros if wide else torch.empty)(programs, width, dtype=torch.float32, device=x.device)
    kernel = rms_norm_backward_wide if wide else rms_norm_backward
    options = {"WIDTH": width, "BLOCK": block, "GEMMA": gemma, "HAS_D_SUM": d_sum is not None, "num_warps": num_warps}
    if not wide:
        options["ROWS"] = rows
    with torch.cuda.device_of(x):
        kernel[(programs,)](
            d_out,
            d_out if d_sum is None else d_sum,
            x,
            weight,
            rstd,
            d_x,
            partial,
            num_rows,
            rows_per_program,
            **options,
        )
    return d_x, partial.sum(0)


def fused_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, casting: NormCasting) -> torch.Tensor:
    """kernels.norm.rms_norm by Triton; x (..., H) of fp32, bf16 or fp16."""
    return _RMSNorm.apply(x, None, weight, eps, casting is NormCasting.gemma)[0]


def fused_rms_norm_scaled(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, casting: NormCasting
) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels.norm.rms_norm_scaled by Triton."""
    out, _, rstd = _normed(x.contiguous(), None, weight.contiguous(), eps, gemma=casting is NormCasting.gemma)
    return out, rstd.view(*x.shape[:-1], 1)


def fused_rms_norm_backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    casting: NormCasting,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels.norm.rms_norm_backward by Triton. A scale that is not given comes from plain torch."""
    x = x.contiguous()
    rstd = (inverse_rms(x.float(), eps) if scale is None else scale).flatten()
    return _gradients(d_out, None, x, weight.contiguous(), rstd, gemma=casting is NormCasting.gemma)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, casting: NormCasting
) -> tuple[torch.Tensor, torch.Tensor]:
    """kernels.norm.add_rms_norm by Triton; x and residual (..., H) of fp32, bf16 or fp16."""
    return _RMSNorm.apply(x, residual, weight, eps, casting is NormCasting.gemma)
