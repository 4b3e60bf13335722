"""The shape of a decoder. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from headrace.kernels.rope_scaling import RopeScaling, RopeType

__all__ = ["AdapterConfig", "AdapterKind", "Family", "ModelConfig", "RopeScaling", "RopeType"]


# Layers that an adapter may stand on: every linear layer of a block, by its leaf name.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_PROJECTIONS = "all"
ATTENTION = "attention"


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
        hidden_size: width of a block's input.
        num_layers: decoder blocks.
        num_heads / num_kv_heads: heads of the queries, and of keys and values.
        intermediate_size: width inside the MLP.
        head_dim: per head; None means hidden_size // num_heads.
        rms_norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary positions.
        rope_scaling: see RopeScaling; None means none.
        qkv_bias: biases on q, k, v (Qwen2).
        qk_norm: RMSNorm on q and k heads (Qwen3).
        tie_embeddings: embedding and head are one matrix.
        mixers: how the tokens of a layer see each other, by registered name (mixers/registry.py): one name after the
            other for the layers in turn, and from the first again.
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
    mixers: list[str] = field(default_factory=lambda: [ATTENTION])

    def mixer_of(self, layer: int) -> str:
        """Name of a layer's mixer."""
        return self.mixers[layer % len(self.mixers)]

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads


class AdapterKind(StrEnum):
    """What is trained: every weight, or low-rank adapters beside weights that stay as they are."""

    none = "none"
    lora = "lora"


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W^T + b + (alpha / rank) dropout(x) A^T B^T; A and B are trained.

    Args:
        kind: none | lora. With lora every other weight of the model is frozen.
        rank: rows of A, columns of B.
        alpha: of the scale alpha / rank.
        dropout: share of the elements of x that are left out on the way through A and B, in training.
        targets: layers with an adapter, by leaf name, separated by commas; all: every linear layer of the blocks.
        init_from: folder in PEFT's format to start from; rank, alpha, dropout and targets are read from there. None:
            A is random and B is 0.
    """

    kind: AdapterKind = AdapterKind.none
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = ALL_PROJECTIONS
    init_from: str | None = None

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained and the rest is frozen."""
        return self.kind is not AdapterKind.none

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied by."""
        return self.alpha / self.rank

    @property
    def projections(self) -> tuple[str, ...]:
        """Leaf names of the layers with an adapter, in the order of PROJECTIONS; unknown names last, for a message."""
        if not self.is_on:
            return ()
        named = [name.strip() for name in self.targets.split(",") if name.strip()]
        if named == [ALL_PROJECTIONS]:
            return PROJECTIONS
        return (*(n for n in PROJECTIONS if n in named), *(n for n in named if n not in PROJECTIONS))


NO_ADAPTER = AdapterConfig()
