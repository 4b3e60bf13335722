"""Gather the skeletal tensors of a token range into one contiguous staging block, and back, in one kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.dispatch import choose
from headrace.kernels.pack_layout import MIN_ALIGNMENT_BYTES, PackLayout, Piece
from headrace.kernels.reference import pack as reference


def layout_of(
    tensors: Mapping[str, torch.Tensor],
    num_tokens: int,
    *,
    token_dims: int | Mapping[str, int] = 1,
    staged_dtypes: Mapping[str, torch.dtype] | None = None,
    alignment_bytes: int = MIN_ALIGNMENT_BYTES,
) -> PackLayout:
    """The layout of a block for so many tokens of these tensors, in their order.

    Args:
        tensors: by name; (B, T, ...), (T, ...), (B, heads, T): any shape with one dimension of tokens.
        token_dims: that dimension, of all or by name.
        staged_dtypes: dtype in the block where it is not the tensor's own, by name; see Piece.

    Raises:
        ValueError: as Piece and PackLayout; a token dimension that is not there; a name that is no tensor's.
    """
    staged = dict(staged_dtypes or {})
    dims = dict.fromkeys(tensors, token_dims) if isinstance(token_dims, int) else dict(token_dims)
    if unknown := sorted({*staged, *dims} - set(tensors)):
        raise ValueError(f"layout_of: {unknown} are not tensors; known are {', '.join(tensors)}")
    pieces = []
    for name, tensor in tensors.items():
        dim = dims.get(name)
        if dim is None or not 0 <= dim < tensor.dim():
            raise ValueError(
                f"layout_of: token_dims of {name} is {dim}; 0 to {tensor.dim() - 1} for {tuple(tensor.shape)}"
            )
        shape = tuple(None if i == dim else size for i, size in enumerate(tensor.shape))
        pieces.append(Piece(name, shape, _name(tensor.dtype), _name(staged[name]) if name in staged else None))
    return PackLayout(tuple(pieces), num_tokens, alignment_bytes)


@torch.no_grad()
def pack(
    tensors: Mapping[str, torch.Tensor],
    layout: PackLayout,
    begin: int,
    *,
    out: torch.Tensor | None = None,
    backend: Backend = Backend.auto,
) -> torch.Tensor:
    """Copy tokens [begin, begin + layout.num_tokens) of every tensor into one block. No gradient flows through it.

    Args:
        tensors: one per piece, by its name, on one device; strided views of larger tensors are read in place as long as
            the dimensions behind the tokens are contiguous.
        begin: first token.
        out: (layout.total_bytes,) uint8, contiguous, at an address that 16 divides; None makes one.

    Returns:
        The block. The same tensors always give the same bytes: gaps are zero.

    Raises:
        ValueError: names, shapes, dtypes, devices or strides that do not fit the layout, a range beyond the tokens, an
            `out` that does not fit, or a backend that cannot (see dispatch.choose).
    """
    _check_tensors(tensors, layout, begin, layout.num_tokens, is_written=False)
    device = _device(tensors)
    if out is None:
        out = torch.empty(layout.total_bytes, dtype=torch.uint8, device=device)
    _check_block("out", out, layout, device)
    if _is_fused("pack", backend, device):
        from headrace.kernels.fused import pack as fused

        fused.pack(tensors, layout, begin, out)
    else:
        reference.pack(tensors, layout, begin, out)
    return out


@torch.no_grad()
def unpack(
    block: torch.Tensor,
    layout: PackLayout,
    *,
    out: Mapping[str, torch.Tensor] | None = None,
    begin: int = 0,
    backend: Backend = Backend.auto,
) -> dict[str, torch.Tensor]:
    """Copy a block's pieces back into tensors, cast back to the tensors' dtypes.

    Args:
        block: (layout.total_bytes,) uint8 as `pack` fills it.
        out: tensors to write tokens [begin, begin + layout.num_tokens) of, by name; strided views are written in place.
            None makes contiguous ones of layout.num_tokens tokens.
        begin: first token in `out`; 0 without it.

    Returns:
        `out`, or the new tensors, by name in the layout's order. Equal dtypes come back bit for bit.

    Raises:
        ValueError: as in `pack`; an `out` that requires a gradient, or whose elements share memory.
    """
    _check_block("block", block, layout, block.device)
    if out is None:
        if begin != 0:
            raise ValueError(f"unpack: begin={begin} without out: new tensors begin at 0")
        out = {
            piece.name: torch.empty(piece.shape_of(layout.num_tokens), dtype=_dtype(piece.dtype), device=block.device)
            for piece in layout.pieces
        }
    _check_tensors(out, layout, begin, layout.num_tokens, is_written=True)
    if _device(out) != block.device:
        raise ValueError(f"unpack: block is on {block.device}, out on {_device(out)}")
    if _is_fused("unpack", backend, block.device):
        from headrace.kernels.fused import pack as fused

        fused.unpack(block, layout, begin, out)
    else:
        reference.unpack(block, layout, begin, out)
    return {piece.name: out[piece.name] for piece in layout.pieces}


def _is_fused(op: str, backend: Backend, device: torch.device) -> bool:
    # Whatever the tensors' dtypes: their bits are copied as integers, and the casts are among the dtypes Triton takes.
    return choose(op, backend, device, torch.float32).got is Backend.triton


def _check_tensors(
    tensors: Mapping[str, torch.Tensor], layout: PackLayout, begin: int, num_tokens: int, *, is_written: bool
) -> None:
    names = [piece.name for piece in layout.pieces]
    if set(tensors) != set(names):
        raise ValueError(f"tensors {sorted(tensors)}: the layout has {sorted(names)}")
    device = _device(tensors)
    for piece in layout.pieces:
        tensor, dim = tensors[piece.name], piece.token_dim
        got = f"{piece.name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        fits = tensor.dim() == len(piece.shape) and tuple(tensor.shape) == piece.shape_of(tensor.shape[dim])
        if not fits or _name(tensor.dtype) != piece.dtype or tensor.device != device:
            raise ValueError(f"{got}: {piece.dtype} {piece.shape} on {device} expected, None being the tokens")
        if begin < 0 or begin + num_tokens > tensor.shape[dim]:
            raise ValueError(f"{got}: tokens [{begin}, {begin + num_tokens}) are not among its {tensor.shape[dim]}")
        if not _is_dense(tensor.shape[dim + 1 :], tensor.stride()[dim + 1 :]):
            raise ValueError(f"{got}, strides {tensor.stride()}: what lies behind the tokens must be contiguous")
        if is_written and tensor.requires_grad:
            raise ValueError(f"{got} requires a gradient: unpack writes in place; give it detached")
        if is_written and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"{got}, strides {tensor.stride()}: elements share memory; unpack cannot write them")


def _check_block(name: str, block: torch.Tensor, layout: PackLayout, device: torch.device) -> None:
    fits = block.dtype is torch.uint8 and block.shape == (layout.total_bytes,) and block.is_contiguous()
    if not fits or block.device != device:
        got = f"{block.dtype} {tuple(block.shape)} on {block.device}"
        raise ValueError(f"{name}: {got}; contiguous torch.uint8 ({layout.total_bytes},) on {device} expected")
    if block.data_ptr() % MIN_ALIGNMENT_BYTES:
        raise ValueError(f"{name}: its address is no multiple of {MIN_ALIGNMENT_BYTES} bytes")


def _is_dense(shape: torch.Size | tuple[int, ...], strides: tuple[int, ...]) -> bool:
    place = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != place:
            return False
        place *= size
    return True


def _device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    return next(iter(tensors.values())).device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
