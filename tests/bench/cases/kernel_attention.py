"""Attention by streaming over resident blocks, beside the stock operator on everything at once.

    sequence    every token is a query: the stock operator in one causal call
    chunk       the queries are the last block: the stock operator in one call on the whole prefix and one causal call
                on the diagonal, and one merge

Both use the same operator (row config `operator`), so that the difference is what streaming costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from headrace.bench.kernel_case import OURS, Case, Shared, Task, generator
from headrace.bench.kernel_settings import Settings
from headrace.kernels import api
from headrace.kernels.attention.operators import BlockOperator
from headrace.kernels.merge import merge_

NUM_BLOCKS = 8
# Llama-3-8B on CUDA, with the blocks of 16K tokens that the target names.
CUDA_SIZES = {"block": 16384, "q_heads": 32, "k_heads": 8, "head": 128}
CPU_SIZES = {"block": 64, "q_heads": 4, "k_heads": 2, "head": 32}
# Backward makes the scores again and takes four products more: five for forward's two.
BACKWARD_OVER_FORWARD = 2.5


class Inputs(NamedTuple):
    """q (1, T, Hq, D), k and v (1, S, Hkv, D), leaves, T the last of S; dout like q."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


def cases(settings: Settings) -> list[Case]:
    """Both forms, stock and streaming."""
    sizes = CUDA_SIZES if settings.on_cuda else CPU_SIZES
    found = []
    for form, num_blocks, num_query_blocks in (("sequence", NUM_BLOCKS, NUM_BLOCKS), ("chunk", NUM_BLOCKS + 1, 1)):
        shape = {**sizes, "keys": num_blocks * sizes["block"], "queries": num_query_blocks * sizes["block"]}
        word = f"{form}/{num_blocks}x{sizes['block']}"
        for contender in ("stock", "streaming"):
            case = Case("attention", word, contender, OURS, shape, str(settings.device), settings.dtype, "attention")
            found.append(case)
    return found


def build(case: Case, shared: Shared) -> Task:
    """The case's tensors and passes."""
    inputs = shared.get("inputs", partial(_draw, case))
    operator = api.block_operator(api.choose_operator(api.AttentionOperator.auto, inputs.q))
    stock = _Stock(operator, inputs, case.shape["head"] ** -0.5)
    leaves = inputs[:3]
    expected = shared.get("stock", stock.results)
    forward: Callable[[], tuple[torch.Tensor, ...]] = stock.forward
    backward: Callable[[Any], None] = stock.backward
    if case.contender == "streaming":
        forward, backward = partial(_stream, case, inputs), partial(_stream_backward, inputs)
    flops = _forward_flops(case)
    return Task(
        forward=forward,
        backward=backward,
        leaves=leaves,
        check=lambda outs: _difference(case, [outs[0], *(leaf.grad for leaf in leaves)], expected),
        forward_flops=flops,
        backward_flops=flops * BACKWARD_OVER_FORWARD,
        facts={"operator": operator.name.value, "compared_with": "the stock operator"},
    )


def _draw(case: Case) -> Inputs:
    draws = generator(case.torch_device, 0)
    size = case.shape
    made = []
    for tokens, heads in (
        *((size["queries"], size["q_heads"]), (size["keys"], size["k_heads"])),
        *((size["keys"], size["k_heads"]), (size["queries"], size["q_heads"])),
    ):
        tensor = torch.empty(1, tokens, heads, size["head"], device=case.torch_device, dtype=case.torch_dtype)
        made.append(tensor.normal_(generator=draws))
    q, k, v, dout = made
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


def _forward_flops(case: Case) -> float:
    """Two products of the scores that are seen."""
    queries, keys = case.shape["queries"], case.shape["keys"]
    pairs = queries * (keys - queries) + queries * (queries + 1) / 2
    return 4.0 * pairs * case.shape["q_heads"] * case.shape["head"]


class _Stock:
    """The operator on everything at once, called as it is: heads first, no autograd."""

    def __init__(self, operator: BlockOperator, inputs: Inputs, scale: float) -> None:
        self._operator, self._inputs, self._scale = operator, inputs, scale
        num_before = inputs.k.shape[1] - inputs.q.shape[1]
        # (keys, whether they are the diagonal)
        self._parts = [(slice(0, num_before), False)] if num_before else []
        self._parts.append((slice(num_before, None), True))

    @torch.no_grad()
    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out (1, T, Hq, D) and LSE (1, Hq, T)."""
        q, k, v = (tensor.transpose(1, 2) for tensor in self._inputs[:3])
        found = []
        for keys, causal in self._parts:
            found.append(self._operator.forward(q, k[:, :, keys], v[:, :, keys], causal=causal, scale=self._scale))
        out, lse = found[0]
        if len(found) > 1:
            out = out.to(lse.dtype)
            merge_(out, lse, *found[1])
        return out.transpose(1, 2).to(self._inputs.q.dtype), lse

    @torch.no_grad()
    def backward(self, outs: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Into the leaves' gradients."""
        q, k, v, dout = (tensor.transpose(1, 2) for tensor in self._inputs)
        out, lse = outs[0].transpose(1, 2), outs[1]
        parts = []
        for keys, causal in self._parts:
            pair = (k[:, :, keys], v[:, :, keys])
            parts.append(self._operator.backward(dout, q, *pair, out, lse, causal=causal, scale=self._scale))
        dq = parts[0][0] if len(parts) == 1 else parts[0][0] + parts[1][0]
        dk, dv = (torch.cat([part[index] for part in parts], dim=2) for index in (1, 2))
        for leaf, grad in zip(self._inputs[:3], (dq, dk, dv), strict=True):
            leaf.grad = grad.transpose(1, 2).to(leaf.dtype)

    def results(self) -> list[torch.Tensor]:
        """out, dq, dk, dv of one pass."""
        outs = self.forward()
        self.backward(outs)
        return [outs[0], *(leaf.grad for leaf in self._inputs[:3] if leaf.grad is not None)]


def _stream(case: Case, inputs: Inputs) -> tuple[torch.Tensor]:
    scale, block_len = case.shape["head"] ** -0.5, case.shape["block"]
    return (api.attention(inputs.q, inputs.k, inputs.v, scale=scale, block_len=block_len),)


def _stream_backward(inputs: Inputs, outs: tuple[torch.Tensor]) -> None:
    for leaf, grad in zip(inputs[:3], torch.autograd.grad(outs[0], inputs[:3], inputs.dout), strict=True):
        leaf.grad = grad


def _difference(case: Case, got: list[torch.Tensor], expected: list[torch.Tensor]) -> Mapping[str, float]:
    """The largest relative difference of any result or gradient from the stock operator's, head by head."""
    if case.contender == "stock":
        return {}
    errors = []
    for one, other in zip(got, expected, strict=True):
        pairs = zip(one.detach().unbind(2), other.unbind(2), strict=True)
        squares = [((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in pairs]
        off, norm = (torch.stack(list(part)).sum() for part in zip(*squares, strict=True))
        errors.append(float((off / norm).sqrt()))
    return {"rel_difference": max(errors)}
