"""4-bit codes of the derivative f'(x) of SiLU and GELU, and of the two factors in the gradient of SwiGLU.

The gradient of y = f(x) is grad * f'(x): linear in f'(x), so a code of f'(x) that is right on average gives a gradient
that is right on average. A code of x is not, through the curvature of f', and its error is some four times as large.
The idea of few bits placed by the derivative is S2A's (arXiv 2503.08154); the grid here is our own choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.codecs.activations import Activation
from headrace.kernels.codecs.config import (
    GROUP_SIZE,
    CodecName,
    Rounding,
    check_group_size,
    stash_bytes,
    swiglu_bytes,
)
from headrace.kernels.codecs.four_bit import group_shapes
from headrace.kernels.codecs.interface import (
    Encoded,
    check_dtype,
    check_encode,
    check_finite,
    check_payload,
    check_writer,
    forms,
)


@dataclass(frozen=True)
class FourBitDerivative:
    """Represents f'(x), on 16 even codes over the range of f'; two codes a byte, no ranges.

    Args:
        check_finite: refuse NaN and infinities; reads x once more, and on CUDA the host waits for the answer.
            Unchecked, a NaN is coded as the smallest derivative (f(x) itself still shows it).
    """

    activation: Activation
    rounding: Rounding = Rounding.stochastic
    check_finite: bool = True

    @property
    def name(self) -> CodecName:
        """The codec of this activation's derivative."""
        return self.activation.codec

    def encode(self, x: torch.Tensor, *, seed: int, stream: int = 0, backend: Backend = Backend.auto) -> Encoded:
        """Codes (ceil(N / 2),) of x with N elements, in their order; see Codec.encode."""
        check_encode(self.name, x, seed, stream)
        if self.check_finite:
            check_finite(self.name, "the tensor", x)
        form = forms("encode", backend, x.device, x.dtype)
        seed_used = seed if self.rounding is Rounding.stochastic else None
        codes = form.encode_derivative(x.detach().contiguous().view(-1), self.activation, seed_used, stream)
        return Encoded(self.name, (codes,), tuple(x.shape), x.dtype, self.rounding, seed, stream)

    def decode(
        self, encoded: Encoded, *, dtype: torch.dtype | None = None, backend: Backend = Backend.auto
    ) -> torch.Tensor:
        """f'(x), up to a step per element; see Codec.decode."""
        codes, num_elements = self._codes(encoded)
        dtype = encoded.dtype if dtype is None else dtype
        check_dtype("dtype", dtype)
        form = forms("decode", backend, codes.device, dtype)
        return form.decode_derivative(codes, num_elements, self.activation, dtype).view(encoded.shape)

    def backward(self, encoded: Encoded, grad: torch.Tensor, *, backend: Backend = Backend.auto) -> torch.Tensor:
        """grad * f'(x), the product in fp32, in the dtype of grad.

        Raises:
            ValueError: as decode, and where grad has another shape than x or is on another device.
        """
        codes, _ = self._codes(encoded)
        check_grad(grad, encoded, codes.device)
        form = forms("decode", backend, grad.device, grad.dtype)
        return form.derivative_backward(grad.contiguous().view(-1), codes, self.activation).view(encoded.shape)

    def _codes(self, encoded: Encoded) -> tuple[torch.Tensor, int]:
        num_elements = math.prod(encoded.shape)
        check_writer(self.name, encoded)
        check_payload(self.name, encoded, ((-(-num_elements // 2),),))
        return encoded.payload[0], num_elements

    def bytes_for(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Half a byte per element."""
        check_dtype("dtype", dtype)
        return stash_bytes(self.name, shape)


@dataclass(frozen=True)
class FourBitSwiGLU:
    """What backward needs of y = silu(gate) * up, in two 4-bit codes per element.

    The gradients are grad * (up silu'(gate)) and grad * silu(gate): each linear in one factor, so two codes that are
    right on average suffice, and neither gate nor up is kept. Neither factor follows from the other or is bounded, so
    there are two codes, with ranges per group, and their random numbers must differ (streams `stream`, `stream` + 1).
    An element costs 1 + 16 / group_size bytes: 1.125 at 128, against 4 for gate and up in bf16.

    Args:
        group_size, check_finite: see FourBitPerGroup; here of the factors, which also overflow where gate * up does.

    Raises:
        ValueError: the group size.
    """

    rounding: Rounding = Rounding.stochastic
    check_finite: bool = True
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    def encode(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        *,
        seed: int,
        stream: int = 0,
        backend: Backend = Backend.auto,
    ) -> tuple[Encoded, Encoded]:
        """Codes of up * silu'(gate) and of silu(gate); gate, up (..., D) of one shape, dtype, device; see Codec.encode.

        Each of the two is one of FourBitPerGroup, which decodes it.
        """
        name = CodecName.four_bit_group
        check_encode(name, gate, seed, stream)
        check_encode(name, up, seed, stream + 1)
        for what, left, right in (
            ("shape", tuple(gate.shape), tuple(up.shape)),
            ("dtype", gate.dtype, up.dtype),
            ("device", gate.device, up.device),
        ):
            if left != right:
                raise ValueError(f"up: {what} {right}, gate has {left}")
        rows = (math.prod(gate.shape[:-1]), gate.shape[-1])
        form = forms("encode", backend, gate.device, gate.dtype)
        seed_used = seed if self.rounding is Rounding.stochastic else None
        inputs = (tensor.detach().contiguous().view(rows) for tensor in (gate, up))
        found = form.encode_swiglu(*inputs, self.group_size, seed_used, stream)
        if self.check_finite:
            check_finite(name, "up * silu'(gate) of a group", found[1])
            check_finite(name, "silu(gate) of a group", found[3])
        shapes = group_shapes(gate.shape, self.group_size)
        for_gate, for_up = ((found[at].view(shapes[0]), found[at + 1].view(shapes[1])) for at in (0, 2))
        shape, dtype = tuple(gate.shape), gate.dtype
        return (
            Encoded(name, for_gate, shape, dtype, self.rounding, seed, stream),
            Encoded(name, for_up, shape, dtype, self.rounding, seed, stream + 1),
        )

    def backward(
        self, encoded: tuple[Encoded, Encoded], grad: torch.Tensor, *, backend: Backend = Backend.auto
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of gate and up from grad (..., D); products in fp32, results in the dtype of grad.

        Raises:
            ValueError: as Codec.decode, and where grad has another shape than gate or is on another device.
        """
        for one in encoded:
            check_writer(CodecName.four_bit_group, one)
        shapes = group_shapes(encoded[0].shape, self.group_size)
        for one in encoded:
            check_payload(CodecName.four_bit_group, one, shapes)
        check_grad(grad, encoded[0], encoded[0].payload[0].device)
        rows, cols = math.prod(grad.shape[:-1]), grad.shape[-1]
        payload = tuple(tensor for one in encoded for tensor in one.payload)
        views = (
            tensor.view(rows, *shape[len(grad.shape) - 1 :]) for tensor, shape in zip(payload, shapes * 2, strict=True)
        )
        form = forms("decode", backend, grad.device, grad.dtype)
        grads = form.swiglu_backward(grad.contiguous().view(rows, cols), tuple(views), self.group_size)
        return grads[0].view(grad.shape), grads[1].view(grad.shape)

    def bytes_for(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """A byte per element and 16 per group: both codes."""
        check_dtype("dtype", dtype)
        return swiglu_bytes(shape, self.group_size)


def check_grad(grad: torch.Tensor, encoded: Encoded, device: torch.device) -> None:
    """Raise ValueError where a gradient does not fit what was encoded."""
    check_dtype("grad", grad.dtype)
    if tuple(grad.shape) != encoded.shape or grad.device != device:
        raise ValueError(
            f"grad: shape {tuple(grad.shape)} on {grad.device}, encoded was {encoded.shape}, its codes on {device}"
        )
