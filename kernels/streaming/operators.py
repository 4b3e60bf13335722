"""Who computes attention of queries over one block of keys: stock operators behind one interface, with their traps.

Every operator returns (out, LSE) of its block alone. Given the final out and LSE of the whole row, its backward yields
exact gradients for its block (Liu et al. 2023, ring attention, arXiv 2310.01889): P = exp(s - LSE) needs no more.
Tensors are heads first, (B, H, T, D); LSEs are (B, H, T), natural logarithm, contiguous.
"""

from __future__ import annotations

import functools
import importlib.util
from enum import Enum
from typing import Protocol

import torch

from headrace.kernels.merge import merge_
from headrace.kernels.reference.attention import causal_mask, tile_backward, tile_forward
from headrace.kernels.streaming.cut import TILE

aten = torch.ops.aten
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NARROW = (torch.bfloat16, torch.float16)


class StreamingOperator(Enum):
    """Names of the block operators; a plan names one.

    auto: on CPU `flash`; on CUDA in bf16 and fp16 `cudnn` on Hopper and later, `flash` before it, for head dims above
        128 and under deterministic algorithms; `reference` with a softcap and for fp32 and fp64 on CUDA.
    cudnn: aten cuDNN attention; CUDA, bf16 and fp16, head dim at most 128, backward not deterministic.
    fa4: flash-attn-4 (extra `fa4`); Hopper and later, bf16 and fp16, head dim at most 128, deterministic on demand.
    flash: aten flash attention 2 on CUDA (bf16, fp16, deterministic on demand); on CPU torch's flash kernel, any dtype.
    reference: plain torch, tile by tile; any device and dtype, softcap.
    """

    auto = "auto"
    cudnn = "cudnn"
    fa4 = "fa4"
    flash = "flash"
    reference = "reference"


class BlockOperator(Protocol):
    """Attention over one block.

    With `causal` there are as many queries as keys, so that top-left and bottom-right masks are the same.
    """

    name: StreamingOperator
    softcap: float | None
    # Fewer queries or keys than this go to the reference.
    smallest_side: int

    def check(self, q: torch.Tensor) -> None:
        """Raise ValueError where queries (..., D) of this dtype, device and head dim cannot be computed."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Out (B, Hq, T, D) and LSE (B, Hq, T) fp32 (fp64 for fp64) over this block; k, v (B, Hkv, S, D)."""

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> Gradients:
        """dq, dk, dv of this block, given the final `out` and `lse` of the whole row; in q's dtype or wider."""


class CudnnBlocks:
    """aten cuDNN attention."""

    name = StreamingOperator.cudnn
    softcap: float | None = None
    smallest_side = 2  # torch refuses cuDNN a sequence of one token

    def check(self, q: torch.Tensor) -> None:
        _check_narrow(self.name, q, largest_head_dim=128)
        if torch.are_deterministic_algorithms_enabled():
            raise ValueError("operator cudnn: its backward is not deterministic; use flash or fa4")

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out, lse.view(out.shape[:3])

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> Gradients:
        # torch keeps one cuDNN graph per layout of q, k, v; those of out and dout are no part of its key. So they must
        # follow from q's, or a graph made for one layout reads another.
        out, dout = _laid_out_like(out, q), _laid_out_like(dout, q)
        lse = lse.contiguous()
        if _cudnn_lse_dim(q.device.index or 0) == 4:
            lse = lse[..., None]
        # Seed and offset of the dropout are read only where there is dropout.
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        return aten._scaled_dot_product_cudnn_attention_backward(
            *(dout, q, k, v, out, lse, seed, seed, None, None, None),
            *(q.shape[2], k.shape[2], 0.0, causal),
            scale=scale,
        )


class FlashBlocks:
    """aten flash attention 2 on CUDA, torch's own flash kernel on CPU."""

    name = StreamingOperator.flash
    softcap: float | None = None
    smallest_side = 1

    def check(self, q: torch.Tensor) -> None:
        if q.is_cuda:
            _check_narrow(self.name, q, largest_head_dim=256)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not q.is_cuda:
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> Gradients:
        lse = lse.contiguous()
        if not q.is_cuda:
            return aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, q, k, v, out, lse, 0.0, causal, scale=scale
            )
        dout, q, k, v, out = (tensor.transpose(1, 2) for tensor in (dout, q, k, v, out))
        # The generator's state is read only where there is dropout.
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            *(dout, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, state, state[0]), scale=scale
        )
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv


class FlashAttention4Blocks:
    """flash-attn-4, called directly, never registered globally."""

    name = StreamingOperator.fa4
    softcap: float | None = None
    smallest_side = 1

    def check(self, q: torch.Tensor) -> None:
        _check_narrow(self.name, q, largest_head_dim=128)
        if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
            raise ValueError("operator fa4: flash-attn-4 is not installed (extra `fa4`); use cudnn or flash")
        if torch.cuda.get_device_capability(q.device) < (9, 0):
            raise ValueError("operator fa4: Hopper or later; use flash")

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from flash_attn.cute.interface import _flash_attn_fwd

        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> Gradients:
        from flash_attn.cute.interface import _flash_attn_bwd

        # It accepts any stride of q, k, v but wants out and dout whole.
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out, dout = (tensor.transpose(1, 2).contiguous() for tensor in (out, dout))
        grads = _flash_attn_bwd(
            *(q, k, v, out, dout, lse.contiguous()),
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads[:3])
        return dq, dk, dv


class ReferenceBlocks:
    """Plain torch, TILE x TILE scores at a time; results are fp32, fp64 for fp64.

    Args:
        softcap: scores become softcap * tanh(score / softcap).
    """

    name = StreamingOperator.reference
    smallest_side = 1

    def __init__(self, softcap: float | None = None) -> None:
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap={softcap}: above 0, or None")
        self.softcap = softcap

    def check(self, q: torch.Tensor) -> None:
        if not q.dtype.is_floating_point:
            raise ValueError(f"operator reference: q is {q.dtype}: a floating dtype")

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        scale: float,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the interface says; `mask` (T, S) bool, True where a query sees a key, in the place of `causal`."""
        wide = torch.float64 if q.dtype is torch.float64 else torch.float32
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
        for rows, columns, tile_mask in _tiles(q, k, causal, mask):
            merge_(
                *(out[:, :, rows], lse[:, :, rows]),
                *tile_forward(
                    *(q[:, :, rows], k[:, :, columns], v[:, :, columns]),
                    scale=scale,
                    mask=tile_mask,
                    softcap=self.softcap,
                ),
            )
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        scale: float,
        mask: torch.Tensor | None = None,
    ) -> Gradients:
        """As the interface says; `mask` as in `forward`."""
        dq, dk, dv = (torch.zeros(tensor.shape, dtype=lse.dtype, device=q.device) for tensor in (q, k, v))
        for rows, columns, tile_mask in _tiles(q, k, causal, mask):
            part = tile_backward(
                *(dout[:, :, rows], q[:, :, rows], k[:, :, columns], v[:, :, columns]),
                *(out[:, :, rows], lse[:, :, rows]),
                scale=scale,
                mask=tile_mask,
                softcap=self.softcap,
            )
            dq[:, :, rows] += part[0]
            dk[:, :, columns] += part[1]
            dv[:, :, columns] += part[2]
        return dq, dk, dv


def choose_block_operator(wanted: StreamingOperator, q: torch.Tensor, softcap: float | None = None) -> BlockOperator:
    """The operator of this name for queries (..., D) like `q`; its `name` says what `auto` became.

    Raises:
        ValueError: an operator that cannot do this (device, dtype, head dim, softcap, determinism).
    """
    if softcap is not None and wanted not in (StreamingOperator.auto, StreamingOperator.reference):
        raise ValueError(f"operator {wanted.value}: no softcap ({softcap}); use reference")
    if wanted is StreamingOperator.auto:
        wanted = _auto(q, softcap)
    stock: dict[StreamingOperator, type[CudnnBlocks | FlashAttention4Blocks | FlashBlocks]] = {
        StreamingOperator.cudnn: CudnnBlocks,
        StreamingOperator.fa4: FlashAttention4Blocks,
        StreamingOperator.flash: FlashBlocks,
    }
    operator: BlockOperator = stock[wanted]() if wanted in stock else ReferenceBlocks(softcap)
    operator.check(q)
    return operator


def _auto(q: torch.Tensor, softcap: float | None) -> StreamingOperator:
    if softcap is not None or (q.is_cuda and q.dtype not in NARROW):
        return StreamingOperator.reference
    if not q.is_cuda or torch.are_deterministic_algorithms_enabled() or q.shape[-1] > 128:
        return StreamingOperator.flash
    hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    return StreamingOperator.cudnn if hopper else StreamingOperator.flash


def _check_narrow(name: StreamingOperator, q: torch.Tensor, *, largest_head_dim: int) -> None:
    if not q.is_cuda or q.dtype not in NARROW:
        raise ValueError(f"operator {name.value}: bf16 or fp16 on CUDA, not {q.dtype} on {q.device}; use reference")
    if q.shape[-1] % 8 or q.shape[-1] > largest_head_dim:
        raise ValueError(
            f"operator {name.value}: head dim {q.shape[-1]}: a multiple of 8, at most {largest_head_dim}; use reference"
        )


def _laid_out_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`tensor` in the strides that torch.empty_like(other) has."""
    fresh = torch.empty_like(other, device="meta").stride()
    if tensor.stride() == fresh:
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


@functools.cache
def _cudnn_lse_dim(device_index: int) -> int:
    """3 or 4: releases of torch differ on whether cuDNN's LSE, out and in, has a last axis of one. Asked once."""
    q = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device=torch.device("cuda", device_index))
    lse = aten._scaled_dot_product_cudnn_attention(q, q, q, None, True, 0.0, False, False)[1]
    return lse.dim()


def _tiles(
    q: torch.Tensor, k: torch.Tensor, causal: bool, mask: torch.Tensor | None
) -> list[tuple[slice, slice, torch.Tensor | None]]:
    """Queries, keys and mask of every tile in which something is seen."""
    tiles: list[tuple[slice, slice, torch.Tensor | None]] = []
    for first in range(0, q.shape[2], TILE):
        rows = slice(first, min(first + TILE, q.shape[2]))
        for begin in range(0, k.shape[2], TILE):
            columns = slice(begin, min(begin + TILE, k.shape[2]))
            if mask is not None:
                tiles.append((rows, columns, mask[rows, columns]))
            elif not causal or begin < first:
                tiles.append((rows, columns, None))
            elif begin == first:
                side = rows.stop - first
                tiles.append((rows, columns, causal_mask(side, side, None, q.device)))
    return tiles
