"""Staging blocks: forward packs a token range of what one layer leaves behind, backward unpacks it.

copy                  one copy of as many bytes
one_copy_per_tensor   a torch copy for every tensor, both ways
reference, triton     `pack` and `unpack`
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from headrace.bench.kernel_case import OURS, TORCH, Case, Shared, Task, generator
from headrace.bench.kernel_settings import Settings
from headrace.kernels import api

# One layer of Llama-3-8B: the second half of its tokens is packed.
CUDA_SHAPE = {"tokens": 16384, "packed": 8192, "hidden": 4096, "q_heads": 32, "k_heads": 8, "head": 128, "inner": 14336}
CPU_SHAPE = {"tokens": 512, "packed": 256, "hidden": 256, "q_heads": 4, "k_heads": 2, "head": 64, "inner": 512}
MEANING = {"forward": "pack", "backward": "unpack"}
Tensors = dict[str, torch.Tensor]


def cases(settings: Settings) -> list[Case]:
    """Every contender, on one layer's tensors."""
    shape = CUDA_SHAPE if settings.on_cuda else CPU_SHAPE
    contenders = [("copy", TORCH), ("one_copy_per_tensor", TORCH), ("reference", OURS)]
    if settings.on_cuda:
        contenders.append(("triton", OURS))
    word = f"layer/{shape['packed']}_of_{shape['tokens']}"
    return [
        Case("pack", word, name, family, shape, str(settings.device), settings.dtype) for name, family in contenders
    ]


def build(case: Case, shared: Shared) -> Task:
    """The case's tensors and passes."""
    tensors = shared.get("tensors", partial(_draw, case))
    begin = case.shape["tokens"] - case.shape["packed"]
    dims = {name: 2 if name == "lse" else 1 for name in tensors}
    layout = api.layout_of(tensors, case.shape["packed"], token_dims=dims)
    num_bytes = 2 * sum(layout.piece_bytes)
    device = case.torch_device
    if case.contender == "copy":
        source, copy = (torch.ones(num_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
        return Task(lambda: copy.copy_(source), None, (), lambda result: {}, forward_bytes=num_bytes)
    staged = torch.empty(layout.total_bytes, dtype=torch.uint8, device=device)
    back = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    if case.contender == "one_copy_per_tensor":
        pieces = _views(staged, tensors, layout, dims)

        def forward() -> torch.Tensor:
            for name, piece in pieces.items():
                piece.copy_(_range_of(tensors[name], dims[name], begin))
            return staged

        def backward(block: torch.Tensor) -> None:
            for name, piece in pieces.items():
                _range_of(back[name], dims[name], begin).copy_(piece)
    else:
        backend = api.Backend(case.contender)

        def forward() -> torch.Tensor:
            return api.pack(tensors, layout, begin, out=staged, backend=backend)

        def backward(block: torch.Tensor) -> None:
            api.unpack(block, layout, out=back, begin=begin, backend=backend)

    def check(block: torch.Tensor) -> Mapping[str, float]:
        """Elements that did not come back as they went, and bytes of the block that differ from the plain copies'."""
        differing = 0
        for name, piece in _views(block, tensors, layout, dims).items():
            gone = _range_of(tensors[name], dims[name], begin)
            differing += int((piece != gone).sum()) + int((_range_of(back[name], dims[name], begin) != gone).sum())
        return {"differing_entries": float(differing)}

    facts = {"meaning": MEANING, "block_bytes": layout.total_bytes, "tensors": len(tensors)}
    return Task(forward, backward, (), check, forward_bytes=num_bytes, backward_bytes=num_bytes, facts=facts)


def _draw(case: Case) -> Tensors:
    """What a layer leaves behind, (1, T, ...), and the LSE of attention, (1, heads, T) in fp32."""
    size = case.shape
    widths: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("layer_input", "norm_output", "residual", "mlp_norm_output"), (size["hidden"],)),
        **dict.fromkeys(("q", "attention_output"), (size["q_heads"], size["head"])),
        **dict.fromkeys(("k", "v"), (size["k_heads"], size["head"])),
        **dict.fromkeys(("gate", "up"), (size["inner"],)),
    }
    draws, device = generator(case.torch_device, 0), case.torch_device

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=draws)

    tensors = {name: empty(1, size["tokens"], *width, dtype=case.torch_dtype) for name, width in widths.items()}
    return {**tensors, "lse": empty(1, size["q_heads"], size["tokens"], dtype=torch.float32)}


def _range_of(tensor: torch.Tensor, dim: int, begin: int) -> torch.Tensor:
    return tensor.narrow(dim, begin, tensor.shape[dim] - begin)


def _views(block: torch.Tensor, tensors: Tensors, layout: api.PackLayout, dims: Mapping[str, int]) -> Tensors:
    """The pieces of a block as tensors."""
    views = {}
    for piece in layout.pieces:
        offset, size = layout.place(piece.name)
        dtype = tensors[piece.name].dtype
        views[piece.name] = block[offset : offset + size].view(dtype).view(piece.shape_of(layout.num_tokens))
    return views
