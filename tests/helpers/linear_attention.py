"""Gated linear attention, registered as a third party's mixer would be. No torch: the rest is in scanning.py.

    S_t = g_t S_{t-1} + k_t v_t^T      o_t = q_t S_t / sqrt(D)      g_t = sigmoid(x_t W_g), one for each head

(Yang et al., arXiv 2312.06635, with one gate for each head.)
"""

from __future__ import annotations

from typing import Any

from headrace.workers.model.mixers.registry import MixerPart, register
from headrace.workers.model.segments import DenseShape, Kind, Reach, Segment, TensorSpec, Workspace

LINEAR_ATTENTION, BY_AUTOGRAD = "linear_attention", "linear_attention_by_autograd"
# Tokens that are taken at once.
INNER = 16


@register(LINEAR_ATTENTION)
class LinearAttentionMixer:
    """See Mixer. Its gradient is in closed form."""

    leaf = "linear_attn"
    closed_form = True

    def part(self, shape: DenseShape) -> MixerPart:
        """See Mixer."""
        hidden, width, heads = shape.hidden_size, shape.q_width, shape.num_heads
        state = TensorSpec("state", width * shape.head_size, least_itemsize=4, is_state=True)
        segments = (
            Segment(
                name="qkvg",
                kind=Kind.linear,
                reads=("n1",),
                makes=(*(TensorSpec(name, width) for name in "qkv"), TensorSpec("g_in", heads)),
                needs=("n1",),
                macs_per_token=hidden * (3 * width + heads),
                weights=hidden * (3 * width + heads),
                projections=("q_proj", "k_proj", "v_proj", "g_proj"),
            ),
            Segment(
                name="decay",
                kind=Kind.pointwise,
                reads=("g_in",),
                makes=(TensorSpec("g", heads),),
                needs=("g_in",),
                workspace=lambda itemsize: Workspace(grad=2 * heads * itemsize),
            ),
            Segment(
                name="scan",
                kind=Kind.mix,
                reach=Reach.scan,
                reads=("q", "k", "v", "g", "state"),
                makes=(TensorSpec("out", width), state),
                needs=("q", "k", "v", "g", "state"),
                macs_per_token=2 * state.width + INNER * width,
                # Gradients of pieces beside the whole ones, and the states before every piece.
                workspace=lambda itemsize: Workspace(grad=6 * width * max(itemsize, 4)),
            ),
            Segment(
                name="o",
                kind=Kind.linear,
                reads=("out", "x"),
                adds="x",
                makes=(TensorSpec("residual", hidden),),
                needs=("out",),
                macs_per_token=width * hidden,
                weights=width * hidden,
                projections=("o_proj",),
            ),
        )
        return MixerPart(segments, ("q", "k", "v", "g_in", "out", "state"))

    def module(self, config: Any, **place: Any) -> Any:
        """See Mixer."""
        from headrace.helpers.scanning import LinearAttention

        return LinearAttention(config, **place)

    def rules(self, config: Any, operators: Any, segments: tuple[Segment, ...]) -> tuple[Any, ...]:
        """See Mixer."""
        from headrace.helpers.scanning import scan_rules

        return scan_rules(config, segments, f"{self.leaf}.", INNER, closed_form=self.closed_form)


@register(BY_AUTOGRAD)
class ByAutograd(LinearAttentionMixer):
    """The same without a closed form."""

    closed_form = False
