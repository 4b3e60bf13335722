"""Decoders of a few thousand weights, one of each family, for tests of the sweeps."""

from __future__ import annotations

from dataclasses import replace

from headrace.workers.model.config import Family, ModelConfig

LLAMA = ModelConfig(
    name="llama",
    family=Family.llama,
    vocab_size=50,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=24,
)
QWEN3 = replace(LLAMA, family=Family.qwen3, qk_norm=True, head_dim=8, tie_embeddings=True)
MODELS = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, family=Family.qwen2, qkv_bias=True),
    "qwen3": QWEN3,
    "mistral": replace(LLAMA, family=Family.mistral, sliding_window=7),
}
