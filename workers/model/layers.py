"""The layers of a decoder's block, as plain modules; decoder.py puts them together."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from headrace.kernels.api import Operators, Packing, add_rms_norm, apply_rope, attention, qk_norm_rope, rms_norm, swiglu
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.dense import dense_program
from headrace.workers.model.mixers.registry import mixer_named

Rope = tuple[torch.Tensor, torch.Tensor]


class LayerCache(Protocol):
    """Keys and values of the tokens before this call, of one layer; see workers/model/generation.py."""

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (B, T, Hkv, D) each and return all there is, (B, S, Hkv, D) each."""
        ...


class RMSNorm(nn.Module):
    """weight * x / rms(x), over the last dimension."""

    def __init__(
        self, width: int, eps: float, *, dtype: torch.dtype, device: torch.device | str, operators: Operators
    ) -> None:
        super().__init__()
        self.eps, self.operators = eps, operators
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same."""
        return rms_norm(x, self.weight, self.eps, backend=self.operators.kernels)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, optional biases (Qwen2) and per-head norms (Qwen3)."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, operators: Operators
    ) -> None:
        super().__init__()
        self.head_size, self.window, self.operators = config.head_size, config.sliding_window, operators
        q_width, kv_width = config.num_heads * self.head_size, config.num_kv_heads * self.head_size

        def linear(width_in: int, width_out: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(width_in, width_out, bias=bias, dtype=dtype, device=device)

        self.q_proj = linear(config.hidden_size, q_width, config.qkv_bias)
        self.k_proj = linear(config.hidden_size, kv_width, config.qkv_bias)
        self.v_proj = linear(config.hidden_size, kv_width, config.qkv_bias)
        self.o_proj = linear(q_width, config.hidden_size)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_size, config.rms_norm_eps, dtype=dtype, device=device, operators=operators)
            self.k_norm = RMSNorm(self.head_size, config.rms_norm_eps, dtype=dtype, device=device, operators=operators)

    def forward(
        self, x: torch.Tensor, rope: Rope, packing: Packing | None, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """(B, T, H) to (B, T, H)."""
        batch_size, num_tokens, _ = x.shape
        q, k, v = (
            project(x).view(batch_size, num_tokens, -1, self.head_size)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        backend = self.operators.kernels
        if self.q_norm is not None and self.k_norm is not None:
            q_weight, k_weight, eps = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
            q, k = qk_norm_rope(q, k, q_weight, k_weight, *rope, eps, backend=backend)
        else:
            q, k = apply_rope(q, k, *rope, backend=backend)
        if cache is not None:
            k, v = cache.append(k, v)
        scale, operator = self.head_size**-0.5, self.operators.attention
        out = attention(q, k, v, scale=scale, packing=packing, window=self.window, operator=operator)
        return self.o_proj(out.reshape(batch_size, num_tokens, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, operators: Operators
    ) -> None:
        super().__init__()
        self.operators = operators
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype, device=device)
        self.up_proj = nn.Linear(hidden, inner, bias=False, dtype=dtype, device=device)
        self.down_proj = nn.Linear(inner, hidden, bias=False, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H) to (B, T, H)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), backend=self.operators.kernels))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x is the only argument that carries gradient.

    Args:
        mixer: name of what is in attention's place.
    """

    def __init__(
        self, config: ModelConfig, mixer: str, *, dtype: torch.dtype, device: torch.device | str, operators: Operators
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps, dtype=dtype, device=device, operators=operators)
        self._mixer = mixer_named(mixer)
        self.add_module(self._mixer.leaf, self._mixer.module(config, dtype=dtype, device=device, operators=operators))
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=dtype, device=device, operators=operators)
        self.mlp = MLP(config, dtype=dtype, device=device, operators=operators)
        self.program = dense_program(config, operators, mixer)

    def forward(
        self, x: torch.Tensor, rope: Rope, packing: Packing | None = None, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """(B, T, H) to (B, T, H)."""
        norm = self.post_attention_layernorm
        normed, x = add_rms_norm(
            x,
            self.get_submodule(self._mixer.leaf)(self.input_layernorm(x), rope, packing, cache),
            norm.weight,
            norm.eps,
            backend=norm.operators.kernels,
        )
        return x + self.mlp(normed)
