"""Grouped-query attention with rotary positions, the mixer of Llama, Qwen2, Qwen3 and Mistral. No torch before use."""

from __future__ import annotations

from typing import Any

from headrace.workers.model.config import ATTENTION
from headrace.workers.model.mixers.registry import MixerPart, register
from headrace.workers.model.segments import DenseShape, Segment
from headrace.workers.model.skeleton import attention_part


@register(ATTENTION)
class AttentionMixer:
    """See Mixer."""

    leaf = "self_attn"

    def part(self, shape: DenseShape) -> MixerPart:
        """See Mixer."""
        projected = ("q_in", "k_in") if shape.qk_norm else ("q", "k")
        return MixerPart(attention_part(shape), (*projected, "v", "out", "lse"))

    def module(self, config: Any, **place: Any) -> Any:
        """See Mixer."""
        from headrace.workers.model.layers import Attention

        return Attention(config, **place)

    def rules(self, config: Any, operators: Any, segments: tuple[Segment, ...]) -> tuple[Any, ...]:
        """See Mixer."""
        from headrace.workers.model.dense import attention_rules

        return attention_rules(config, operators, segments)
