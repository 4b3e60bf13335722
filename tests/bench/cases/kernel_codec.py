"""The codecs: forward is encode, backward is decode; bytes are the tensor's and the stash's, once each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from headrace.bench.kernel_case import OURS, TORCH, Case, Shared, Task, generator
from headrace.bench.kernel_settings import Settings
from headrace.kernels import api
from headrace.kernels.codecs.config import CodecName, stash_bytes
from headrace.kernels.codecs.interface import Encoded
from headrace.kernels.codecs.registry import build_codec

SEED = 1
# (tokens, heads, head size): 8-bit codes per head have a range for each.
CUDA_SHAPE = {"tokens": 16384, "heads": 32, "head": 128}
CPU_SHAPE = {"tokens": 512, "heads": 4, "head": 64}
MEANING = {"forward": "encode", "backward": "decode"}


def cases(settings: Settings) -> list[Case]:
    """Every codec: a copy of as many bytes, the reference, and on CUDA the fused form."""
    shape = CUDA_SHAPE if settings.on_cuda else CPU_SHAPE
    size = "x".join(str(one) for one in shape.values())
    contenders = [("copy", TORCH), ("reference", OURS), *([("triton", OURS)] if settings.on_cuda else [])]
    return [
        Case("codec", f"{codec.value}/{size}", name, family, shape, str(settings.device), settings.dtype)
        for codec in CodecName
        for name, family in contenders
    ]


def build(case: Case, shared: Shared) -> Task:
    """The case's tensors and passes."""
    name = CodecName(case.operator)
    sizes = (case.shape["tokens"], case.shape["heads"], case.shape["head"])
    draws = generator(case.torch_device, 0)
    x = shared.get("x", lambda: torch.randn(sizes, device=case.torch_device, generator=draws).to(case.torch_dtype))
    num_bytes = x.numel() * x.element_size() + stash_bytes(name, sizes)
    if case.contender == "copy":
        source, copy = (torch.ones(num_bytes // 2, dtype=torch.uint8, device=x.device) for _ in range(2))
        return Task(lambda: copy.copy_(source), None, (), lambda result: {}, forward_bytes=num_bytes)
    # Without the look at every value, for which the host waits.
    codec = build_codec(name, check_finite=False)
    backend = api.Backend(case.contender)
    encode = partial(codec.encode, x, seed=SEED)
    expected = shared.get("expected", partial(encode, backend=api.Backend.reference))

    def check(encoded: Encoded) -> Mapping[str, float]:
        pairs = zip(encoded.payload, expected.payload, strict=True)
        return {"differing_entries": float(sum(int((got != one).sum()) for got, one in pairs))}

    return Task(
        forward=partial(encode, backend=backend),
        backward=lambda encoded: codec.decode(encoded, backend=backend),
        leaves=(),
        check=check,
        forward_bytes=num_bytes,
        backward_bytes=num_bytes,
        facts={"meaning": MEANING, "stash_bytes": stash_bytes(name, sizes)},
    )
