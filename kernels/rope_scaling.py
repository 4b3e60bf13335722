"""How rotary frequencies are scaled for longer contexts. No torch; kernels/reference/rope.py computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class RopeType(StrEnum):
    """Which formula; member names equal transformers' `rope_type`."""

    linear = "linear"
    dynamic = "dynamic"
    yarn = "yarn"
    llama3 = "llama3"


@dataclass(kw_only=True, slots=True)
class RopeScaling:
    """Scaling of the rotary frequencies. A field that the type does not name is not read.

    Args:
        type: linear (every frequency over `factor`), dynamic (a base that grows with the length of the sequence beyond
            `original_max_position`), yarn (arXiv 2309.00071) or llama3.
        factor: how much longer the context becomes.
        original_max_position: tokens of the training before the scaling (dynamic, yarn, llama3).
        low_freq_factor, high_freq_factor: llama3: wavelengths above original / low are scaled, below original / high
            they are not.
        beta_fast, beta_slow: yarn: turns within the original length above which a frequency stays, and below which it
            is scaled in full.
        attention_factor: yarn: what cos and sin are multiplied by; None means 0.1 ln(factor) + 1.
        truncate: yarn: round the two bounds to whole dimensions.
    """

    type: RopeType = RopeType.llama3
    factor: float = 8.0
    original_max_position: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def table_scale(self) -> float:
        """What cos and sin are multiplied by."""
        if self.type is not RopeType.yarn:
            return 1.0
        return yarn_mscale(self.factor) if self.attention_factor is None else self.attention_factor


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's scale of cos and sin: 0.1 weight ln(factor) + 1, and 1 for factors up to 1."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
