"""Who computes attention of queries over one block of keys: stock operators behind one interface, with their traps.

Every operator returns (out, LSE) of its block alone. Given the final out and LSE of the whole row, its backward yields
exact gradients for its block (Liu et al. 2023, ring attention, arXiv 2310.01889): P = exp(s - LSE) needs no more.
Tensors are heads first, (B, H, T, D); LSEs are (B, H, T), natural logarithm, contiguous.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Protocol

import torch

from headrace.kernels.attention.cut import Piece, PieceKind
from headrace.kernels.attention.reference_blocks import Gradients, ReferenceBlocks
from headrace.kernels.backend import AttentionOperator
from headrace.kernels.packing import Packing

aten = torch.ops.aten
NARROW = (torch.bfloat16, torch.float16)
# torch builds a cuDNN graph for every exact shape and thread, and cuDNN has returned NaN for a single query.
SHORTEST_CUDNN = 128
LARGEST_CUDNN_HEAD_DIM = 128


class BlockOperator(Protocol):
    """Attention over one block.

    With `causal` there are as many queries as keys, so that top-left and bottom-right masks are the same.
    """

    name: AttentionOperator
    softcap: float | None
    # Fewer queries or keys than this in a call go to flash.
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

    name = AttentionOperator.cudnn
    softcap: float | None = None
    smallest_side = SHORTEST_CUDNN

    def check(self, q: torch.Tensor) -> None:
        _check_narrow(self.name, q, largest_head_dim=LARGEST_CUDNN_HEAD_DIM)
        if torch.are_deterministic_algorithms_enabled():
            raise ValueError("attention operator cudnn: its backward is not deterministic; use flash or fa4")

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

    name = AttentionOperator.flash
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

    @staticmethod
    def forward_rows(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing | None, *, scale: float, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole rows with their documents and their window in one call; CUDA, as many queries as keys.

        Args:
            q: (B, T, Hq, D). k, v: (B, T, Hkv, D).

        Returns:
            out (B, T, Hq, D), lse (B, Hq, T) fp32: a view of (Hq, B * T) where there is a packing.
        """
        reach = _flash_window(window)
        if packing is None:
            length = q.shape[1]
            out, lse, *_ = aten._flash_attention_forward(
                q, k, v, None, None, length, length, 0.0, True, False, scale=scale, **reach
            )
            return out, lse
        longest, borders = max(packing.lengths), packing.cu_seqlens
        flat = (tensor.flatten(0, 1) for tensor in (q, k, v))
        out, lse, *_ = aten._flash_attention_forward(
            *flat, borders, borders, longest, longest, 0.0, True, False, scale=scale, **reach
        )
        return out.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1)

    @staticmethod
    def backward_rows(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        packing: Packing | None,
        *,
        scale: float,
        window: int | None,
    ) -> Gradients:
        """dq, dk, dv of `forward_rows`, in the shapes of q, k, v."""
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        reach = _flash_window(window)
        dout = dout.contiguous()
        if packing is None:
            length = q.shape[1]
            return aten._flash_attention_backward(
                *(dout, q, k, v, out, lse.contiguous(), None, None, length, length, 0.0, True, state, state[0]),
                scale=scale,
                **reach,
            )
        longest, borders = max(packing.lengths), packing.cu_seqlens
        flat = (tensor.flatten(0, 1) for tensor in (dout, q, k, v, out))
        flat_lse = lse.transpose(0, 1).flatten(1).contiguous()
        tail = (borders, borders, longest, longest, 0.0, True, state, state[0])
        dq, dk, dv = aten._flash_attention_backward(*flat, flat_lse, *tail, scale=scale, **reach)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


class FlashAttention4Blocks:
    """flash-attn-4, called directly, never registered globally."""

    name = AttentionOperator.fa4
    softcap: float | None = None
    smallest_side = 1

    def check(self, q: torch.Tensor) -> None:
        _check_narrow(self.name, q, largest_head_dim=128)
        if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
            raise ValueError("attention operator fa4: flash-attn-4 is not installed (extra `fa4`); use cudnn or flash")
        if torch.cuda.get_device_capability(q.device) < (9, 0):
            raise ValueError("attention operator fa4: Hopper or later; use flash")

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

        # It accepts any stride of q, k, v, but out and dout must be contiguous.
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


def choose_operator(
    wanted: AttentionOperator,
    q: torch.Tensor,
    *,
    packed: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> AttentionOperator:
    """What computes attention of queries (..., D) like `q`; the one rule behind `auto`, see AttentionOperator.

    The rule does not depend on lengths or blocks, so the whole sequence and its blocks have the same operator.

    Args:
        packed: whether a row holds several documents.

    Raises:
        ValueError: a named operator that cannot do this (device, dtype, head dim, softcap, determinism).
    """
    if wanted is AttentionOperator.auto:
        return _auto(q, packed or window is not None, softcap)
    block_operator(wanted, softcap).check(q)
    return wanted


def block_operator(name: AttentionOperator, softcap: float | None = None) -> BlockOperator:
    """The operator of this name (not auto).

    Raises:
        ValueError: a softcap that it cannot do.
    """
    if name is AttentionOperator.reference:
        return ReferenceBlocks(softcap)
    if softcap is not None:
        raise ValueError(f"attention operator {name.value}: no softcap ({softcap}); use reference")
    if name is AttentionOperator.cudnn:
        return CudnnBlocks()
    return FlashAttention4Blocks() if name is AttentionOperator.fa4 else FlashBlocks()


def _auto(q: torch.Tensor, cut_up: bool, softcap: float | None) -> AttentionOperator:
    if softcap is not None or (q.is_cuda and q.dtype not in NARROW):
        return AttentionOperator.reference
    if not q.is_cuda or cut_up or torch.are_deterministic_algorithms_enabled():
        return AttentionOperator.flash
    if q.shape[-1] > LARGEST_CUDNN_HEAD_DIM:
        return AttentionOperator.flash
    hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    return AttentionOperator.cudnn if hopper else AttentionOperator.flash


def piece_operator(operator: BlockOperator, piece: Piece) -> BlockOperator:
    """Who computes one piece: tiles with a mask go to the reference, pieces below the smallest side to flash."""
    if piece.kind is PieceKind.masked:
        return ReferenceBlocks(operator.softcap)
    return operator if piece.smallest_side >= operator.smallest_side else FlashBlocks()


def _flash_window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _check_narrow(name: AttentionOperator, q: torch.Tensor, *, largest_head_dim: int) -> None:
    if not q.is_cuda or q.dtype not in NARROW:
        raise ValueError(
            f"attention operator {name.value}: bf16 or fp16 on CUDA, not {q.dtype} on {q.device}; use reference"
        )
    if q.shape[-1] % 8 or q.shape[-1] > largest_head_dim:
        raise ValueError(
            f"attention operator {name.value}: head dim {q.shape[-1]}: a multiple of 8, at most {largest_head_dim}; "
            "use reference"
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
