"""Codecs by name."""

from __future__ import annotations

from headrace.kernels.codecs.activations import Activation
from headrace.kernels.codecs.config import CodecName, Rounding
from headrace.kernels.codecs.derivative import FourBitDerivative
from headrace.kernels.codecs.eight_bit import EightBitPerHead, EightBitPerToken
from headrace.kernels.codecs.four_bit import FourBitPerGroup
from headrace.kernels.codecs.interface import Codec


def build_codec(name: CodecName, rounding: Rounding = Rounding.stochastic, check_finite: bool = True) -> Codec:
    """The codec of this name, with its usual options."""
    if name is CodecName.eight_bit_token:
        return EightBitPerToken(rounding, check_finite)
    if name is CodecName.eight_bit_head:
        return EightBitPerHead(rounding, check_finite)
    if name is CodecName.four_bit_group:
        return FourBitPerGroup(rounding, check_finite)
    by_name = {activation.codec: activation for activation in Activation}
    return FourBitDerivative(by_name[name], rounding, check_finite)
