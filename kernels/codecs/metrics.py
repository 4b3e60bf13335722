"""How far a stash is from what it represents, measured and predicted; a sampled figure for a run's log."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headrace.kernels.codecs.activations import derivative, fixed_grid
from headrace.kernels.codecs.config import CodecName, Rounding
from headrace.kernels.codecs.derivative import FourBitDerivative
from headrace.kernels.codecs.four_bit import FourBitPerGroup
from headrace.kernels.codecs.grid import EIGHT_BIT_LEVELS, FOUR_BIT_LEVELS
from headrace.kernels.codecs.interface import Codec, Encoded


@dataclass(frozen=True)
class StashError:
    """Squared errors, summed over a tensor.

    Args:
        measured: of the decoded tensor.
        predicted: what rounding is expected to give, h^2 p (1 - p) for a step h and a value p steps above its lower
            code (nearest: its square error), plus what the clamp costs. The two agree on average over seeds; with
            many elements their ratio is near 1, and a ratio far from it is a defect: a reused seed, a biased rounding.
        reference: the squared values themselves, so sqrt(measured / reference) is the relative error.
        clamped_share: of the elements, those that lay outside their range by more than rounding of the range.
    """

    measured: float
    predicted: float
    reference: float
    clamped_share: float


def stash_error(codec: Codec, x: torch.Tensor, encoded: Encoded, weight: torch.Tensor | None = None) -> StashError:
    """The error of `encoded`, which `codec` made of x; in fp64.

    Args:
        weight: of the shape of x, what the decoded tensor will be multiplied with: with the output's gradient, and a
            derivative codec, the sums are the variance of the input's gradient.

    Raises:
        ValueError: see Codec.decode; a weight of another shape.
    """
    if weight is not None and weight.shape != x.shape:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, x has {tuple(x.shape)}")
    exact = x.detach().double()
    if isinstance(codec, FourBitDerivative):
        exact = derivative(exact, codec.activation)
    low, step = grid_of(codec, encoded)
    levels = (
        EIGHT_BIT_LEVELS if encoded.codec in (CodecName.eight_bit_token, CodecName.eight_bit_head) else FOUR_BIT_LEVELS
    )
    place = (exact - low) / torch.where(step == 0, 1.0, step)
    inside = place.clamp(0, levels)
    above = inside - inside.floor()
    rounding = above * (1 - above) if encoded.rounding is Rounding.stochastic else torch.minimum(above, 1 - above) ** 2
    scale = 1.0 if weight is None else weight.detach().double().square()
    predicted = scale * step.square() * (rounding + (place - inside).square())
    measured = scale * (codec.decode(encoded, dtype=torch.float32).double() - exact).square()
    return StashError(
        measured=float(measured.sum()),
        predicted=float(predicted.sum()),
        reference=float((scale * exact.square()).sum()),
        clamped_share=float(((place - inside).abs() > 1e-3).double().mean()) if x.numel() else 0.0,
    )


def grid_of(codec: Codec, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """Low end and step of every element's codes, fp64, broadcasting to encoded.shape."""
    if isinstance(codec, FourBitDerivative):
        low, step = (torch.tensor(end, dtype=torch.float64) for end in fixed_grid(codec.activation))
        device = encoded.payload[0].device
        return low.to(device), step.to(device)
    ends = encoded.payload[1].double().unbind(-1)
    if isinstance(codec, FourBitPerGroup):
        cols = encoded.shape[-1]
        low, step = (end.repeat_interleave(codec.group_size, dim=-1)[..., :cols] for end in ends)
        return low, step
    return ends[0][..., None], ends[1][..., None]
