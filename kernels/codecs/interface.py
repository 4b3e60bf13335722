"""What every codec has: encode, decode, bytes_for; and the frozen result of one encode call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.codecs.config import CodecName, Rounding, check_shape
from headrace.kernels.codecs.philox import check_seed
from headrace.kernels.dispatch import choose

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STREAM_END = 1 << 32


@dataclass(frozen=True)
class Encoded:
    """One tensor, encoded; holds all that decoding needs, and shares no state with another call.

    Args:
        codec: who wrote it, and who alone can read it.
        payload: the tensors to keep: codes (uint8) and, but for a fixed range, ranges (..., 2) fp32 with low end and
            step of each. They may be moved to another tier and put back with `with_payload`.
        shape, dtype: of the tensor that was encoded.
        rounding, seed, stream: as given to encode; they replay it. Decoding needs none of them.
    """

    codec: CodecName
    payload: tuple[torch.Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    rounding: Rounding
    seed: int
    stream: int

    def with_payload(self, payload: Sequence[torch.Tensor]) -> Encoded:
        """The same, holding these tensors instead."""
        return replace(self, payload=tuple(payload))

    @property
    def num_bytes(self) -> int:
        """Bytes of the payload."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.payload)


class Codec(Protocol):
    """Encodes one tensor and decodes it to what it represents: the tensor itself, or f'(x) of a derivative codec.

    Implementations are frozen: options, no state.
    """

    @property
    def name(self) -> CodecName:
        """Who this is, in plans and in what it encodes."""
        ...

    def encode(self, x: torch.Tensor, *, seed: int, stream: int = 0, backend: Backend = Backend.auto) -> Encoded:
        """Encode x (fp32, bf16, fp16; not fp64). x is not changed, and a copy is made of one that is not contiguous.

        Args:
            seed: 0 <= seed < 2^63, different for every call (`derive_seed`); nearest rounding does not use it.
            stream: 0 <= stream < 2^32; tells apart tensors that are encoded under one seed.

        Raises:
            ValueError: the dtype, too few dimensions, a seed or stream out of range, a backend that cannot, and NaN,
                infinities or a range beyond fp32 where the codec checks for them.
        """
        ...

    def decode(
        self, encoded: Encoded, *, dtype: torch.dtype | None = None, backend: Backend = Backend.auto
    ) -> torch.Tensor:
        """Decode to a tensor of encoded.shape in `dtype` (fp32, bf16 or fp16; as encoded where None).

        Raises:
            ValueError: another codec wrote it, a payload that does not fit its shape, the dtype, the backend.
        """
        ...

    def bytes_for(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that Encoded.payload has for a tensor of this shape and dtype; pure.

        Raises:
            ValueError: a shape or dtype that encode would refuse.
        """
        ...


def forms(op: str, backend: Backend, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that computes: `codecs.reference` or `fused.codecs`, with functions of the same names."""
    if choose(op, backend, device, dtype).got is Backend.triton:
        from headrace.kernels.fused import codecs as fused

        return fused
    from headrace.kernels.codecs import reference

    return reference


def check_encode(name: CodecName, x: torch.Tensor, seed: int, stream: int) -> None:
    """Raise ValueError where x, seed or stream are not what `Codec.encode` takes."""
    check_dtype("x", x.dtype)
    check_shape(name, x.shape)
    check_seed(seed)
    if type(stream) is not int or not 0 <= stream < STREAM_END:
        raise ValueError(f"stream={stream!r}: an integer from 0 to 2^32 - 1")


def check_dtype(argument: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless the dtype is one of DTYPES."""
    if dtype not in DTYPES:
        raise ValueError(f"{argument}: dtype {dtype}; a codec takes {', '.join(map(str, DTYPES))}")


def check_writer(name: CodecName, encoded: Encoded) -> None:
    """Raise ValueError unless `name` wrote it."""
    if encoded.codec is not name:
        raise ValueError(f"encoded: written by {encoded.codec.value}, {name.value} cannot read it")


def check_payload(name: CodecName, encoded: Encoded, shapes: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless the payload has these shapes: uint8 codes first, then fp32 ranges; all contiguous."""
    kinds = (torch.uint8, torch.float32)
    got = [(tuple(tensor.shape), tensor.dtype) for tensor in encoded.payload]
    expected = [(tuple(shape), kinds[place]) for place, shape in enumerate(shapes)]
    if got != expected:
        raise ValueError(f"encoded: payload {got}, {name.value} expects {expected} for shape {encoded.shape}")
    if any(not tensor.is_contiguous() for tensor in encoded.payload):
        raise ValueError(f"encoded: the payload of {name.value} must be contiguous")


def check_finite(name: CodecName, what: str, tensor: torch.Tensor) -> None:
    """Raise ValueError where the tensor has a NaN or an infinity; on CUDA the host waits for the answer."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"x: {what} has NaN, infinities or values whose range fp32 does not hold; {name.value} refuses them"
            " (check_finite=False skips this check)"
        )
