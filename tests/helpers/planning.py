"""Models that tests of the planner share."""

from __future__ import annotations

from dataclasses import replace

from headrace.helpers.tiny_models import LLAMA
from headrace.workers.model.config import Family, ModelConfig

QWEN_7B = ModelConfig(
    name="qwen2_5_7b",
    family=Family.qwen2,
    vocab_size=152064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    intermediate_size=18944,
    qkv_bias=True,
)
TINY = replace(LLAMA, vocab_size=4096, hidden_size=256, num_layers=4, num_heads=4, intermediate_size=512)
# Four KV heads, for head groups.
FOUR_KEYS = replace(
    LLAMA, vocab_size=512, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=4, intermediate_size=512
)
