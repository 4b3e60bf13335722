"""The shape of a decoder. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from headrace.kernels.rope_scaling import RopeScaling, RopeType

__all__ = ["Family", "ModelConfig", "RopeScaling", "RopeType"]


class Family(StrEnum):
    """Which decoder family's rules apply; member names equal transformers' `model_type`."""

    llama = "llama"
    qwen2 = "qwen2"
    qwen3 = "qwen3"
    mistral = "mistral"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """One decoder.

    Args:
        name: for people and for run names.
        family: llama | qwen2 | qwen3 | mistral.
        vocab_size: rows of the embedding. 0 takes the tokenizer's size when the data is prepared.
        head_dim: per head; None means hidden_size // num_heads.
        qkv_bias: biases on q, k, v (Qwen2); qk_norm: RMSNorm on q and k heads (Qwen3).
        sliding_window: tokens a query sees, itself included; None means all before it.
        pad_token_id: row of the embedding that gets no gradient from look-ups, as in transformers; None means none.
        max_position_embeddings: beyond it a run warns.
        init_from: Hugging Face folder to load weights from; None means seeded random initialisation.
        init_std: standard deviation of random weights.
    """

    name: str
    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    head_dim: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None
    pad_token_id: int | None = None
    max_position_embeddings: int = 131072
    init_from: str | None = None
    init_std: float = 0.02

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    def num_params(self) -> int:
        """Trainable parameters (tied embeddings counted once)."""
        h, d = self.hidden_size, self.head_size
        q, kv = self.num_heads * d, self.num_kv_heads * d
        layer = h * (q + 2 * kv) + q * h + 3 * h * self.intermediate_size + 2 * h
        layer += (q + 2 * kv) if self.qkv_bias else 0
        layer += 2 * d if self.qk_norm else 0
        embeddings = self.vocab_size * h * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + h
