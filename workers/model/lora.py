"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank adapters beside the linear layers of a frozen trunk.

    y  = x W^T + b + s u B^T          u = dropout(x) A^T, s = alpha / rank; A (rank, in), B (out, rank)
    dB = s dy^T u      dA = s (dy B)^T dropout(x)      dx = dy W + dropout'(s dy B A)

Modules and the rule read the same parameters: `q_proj.lora_A.weight` and `q_proj.lora_B.weight` beside `q_proj.weight`.
A dropout mask is a function of seed, step, layer, tensor, the row's number in the step and the token. It has no state,
so tiles, recompute, resume and any number of ranks see the same one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from headrace.workers.model.adapter import adapted, targets_of
from headrace.workers.model.config import PROJECTIONS, AdapterConfig
from headrace.workers.model.param_sums import ParamSums
from headrace.workers.model.program import LinearRule, Program, Rule, Shared, Tensors
from headrace.workers.model.skeleton import Span

# Tokens whose masks are drawn at once, counted from the start of the row: a tile takes its part of them.
MASK_TOKENS = 128
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"


class LoraLinear(nn.Linear):
    """A linear layer with an adapter, in place of `linear` and with its parameter names."""

    def __init__(self, linear: nn.Linear, adapter: AdapterConfig) -> None:
        place = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, **place)
        self.lora_A = nn.Linear(linear.in_features, adapter.rank, bias=False, **place)
        self.lora_B = nn.Linear(adapter.rank, linear.out_features, bias=False, **place)
        self._scale, self._dropout = adapter.scale, adapter.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out).

        Raises:
            RuntimeError: in training with dropout: a block without a plan does not know the pass of its masks.
        """
        if self.training and self._dropout:
            raise RuntimeError("adapter.dropout: masks belong to a pass; run the blocks under apply_memory, or eval()")
        return super().forward(x) + self._scale * self.lora_B(self.lora_A(x))


def add_adapters(model: nn.Module, adapter: AdapterConfig) -> None:
    """Freeze every parameter of a decoder, and put adapters on its blocks' linear layers and programs. In place."""
    for block in model.blocks:  # type: ignore[union-attr]
        for name, module in list(block.named_modules()):
            parent, _, leaf = name.rpartition(".")
            if isinstance(module, nn.Linear) and leaf in adapter.projections:
                setattr(block.get_submodule(parent), leaf, LoraLinear(module, adapter))
        block.program = adapted_program(block.program, adapter)
    model.norm.program = adapted_program(model.norm.program, adapter)  # type: ignore[union-attr,arg-type]
    for name, param in model.named_parameters():
        param.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith((LORA_A, LORA_B))


def adapted_program(program: Program, adapter: AdapterConfig) -> Program:
    """A block's program with the trunk frozen and the adapters beside it."""
    skeleton = adapted(program.skeleton, adapter)
    rules: list[Rule] = []
    for rule, segment in zip(program.rules, skeleton.segments, strict=True):
        has = targets_of(segment, adapter)
        if isinstance(rule, LinearRule) and any(has):
            stems = (weight.removesuffix("weight") for weight in rule.weights)
            pairs = tuple((s + LORA_A, s + LORA_B) if on else None for s, on in zip(stems, has, strict=True))
            rules.append(LoraRule(segment, rule.weights, rule.biases, pairs, adapter.scale, adapter.dropout))
        else:
            rules.append(replace(rule, segment=segment))  # type: ignore[type-var]
    return Program(skeleton, tuple(rules))


@dataclass(frozen=True)
class LoraRule(LinearRule):
    """A linear segment with adapters on some of its weights.

    Args:
        adapters: names of A and B for each tensor that is made; None: no adapter.
        scale: s above. dropout: share of the elements of x that A does not see.
    """

    adapters: tuple[tuple[str, str] | None, ...]
    scale: float
    dropout: float

    @property
    def params(self) -> tuple[str, ...]:
        return (*super().params, *(name for pair in self.adapters if pair is not None for name in pair))

    def run(self, params: Mapping[str, torch.Tensor], values: Tensors, span: Span, shared: Shared) -> Tensors:
        made, x = super().run(params, values, span, shared), self.input(values)
        for index, name, a, b in self._pairs():
            u = _rows(self._dropped(x, index, span, shared)) @ params[a].t()
            b_part = self.part.of(params[b])
            made[name].view(-1, len(b_part)).addmm_(u, b_part.t(), alpha=self.scale)
        return made

    def grad_input(self, params: Mapping[str, torch.Tensor], rows: Tensors, span: Span, shared: Shared) -> torch.Tensor:
        total = super().grad_input(params, rows, span, shared)
        for index, name, a, b in self._pairs():
            narrow = rows[name] @ self.part.of(params[b])
            if self.dropout:
                part = (narrow @ params[a]).view(-1, span[1] - span[0], total.shape[1])
                total.add_(_rows(self._dropped(part, index, span, shared, out=part)), alpha=self.scale)
                del part
            else:
                total.addmm_(narrow, params[a], alpha=self.scale)
        return total

    def grad_weight(
        self,
        params: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        rows: Tensors,
        sums: ParamSums,
        at: tuple[Span, Shared],
    ) -> None:
        """dA and dB; see LinearRule."""
        super().grad_weight(params, x, rows, sums, at)
        for index, name, a, b in self._pairs():
            dropped, grad = _rows(self._dropped(x, index, *at)), rows[name]
            sums.add_product(b, grad, (dropped @ params[a].t()).mul_(self.scale), self.part)
            sums.add_product(a, (grad @ self.part.of(params[b])).mul_(self.scale), dropped)
            del dropped

    def _pairs(self) -> Iterator[tuple[int, str, str, str]]:
        """Of every adapter: its number in PROJECTIONS, the tensor that it is added to, the names of A and B."""
        for name, leaf, pair in zip(self.segment.made, self.segment.projections, self.adapters, strict=True):
            if pair is not None:
                yield PROJECTIONS.index(leaf), name, *pair

    def _dropped(
        self, x: torch.Tensor, tensor: int, span: Span, shared: Shared, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, n, width) on the tokens of `span`, with the pass's mask: x / (1 - dropout), or 0. `out` may be x."""
        if not self.dropout:
            return x
        dropped, draw = torch.empty_like(x) if out is None else out, shared.draw
        span = (span[0] + draw.token, span[1] + draw.token)
        for row in range(len(x)):
            for first in range(span[0] // MASK_TOKENS * MASK_TOKENS, span[1], MASK_TOKENS):
                place = (draw.seed, draw.step, draw.layer, tensor, draw.row + row, first)
                low, high = max(first, span[0]), min(first + MASK_TOKENS, span[1])
                kept = _drawn(place, x.shape[2], x.device)[low - first : high - first] >= self.dropout
                here = (row, slice(low - span[0], high - span[0]))
                torch.mul(x[here], kept, out=dropped[here])
        return dropped.mul_(1.0 / (1.0 - self.dropout))


def _drawn(place: tuple[int, ...], width: int, device: torch.device) -> torch.Tensor:
    """(MASK_TOKENS, width) fp32 uniform in [0, 1): a function of place and kind of device."""
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(MASK_TOKENS, width, generator=generator, device=device)


def initial_adapter(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """First value of A or B, fp32, as PEFT's: A uniform within 1 / sqrt(in) (Kaiming, a = sqrt 5), B zero."""
    value = torch.zeros(shape, dtype=torch.float32, device=generator.device)
    return value if name.endswith(LORA_B) else nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W + s B A, in the dtype of W: the layer without its adapter."""
    return torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=scale)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(B, n, width) as (B n, width)."""
    return tensor.flatten(0, 1)
