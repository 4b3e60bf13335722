"""The codecs: forward is encode, backward is decode; bytes are the tensor's and the codes', once each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from headrace.bench.kernel_case import OURS, TORCH, Case, Shared, Task, generator
from headrace.bench.kernel_settings import Settings
from headrace.kernels import api
from headrace.kernels.codecs.config import CodecName, stash_bytes

SEED = 1
CUDA_SHAPE = {"tokens": 16384, "width": 4096}
CPU_SHAPE = {"tokens": 512, "width": 256}
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
    name, sizes = CodecName(case.operator), (case.shape["tokens"], case.shape["width"])
    draws = generator(case.torch_device, 0)
    x = shared.get("x", lambda: torch.randn(sizes, device=case.torch_device, generator=draws).to(case.torch_dtype))
    stash = sizes[0] * stash_bytes(name, sizes[1])
    num_bytes = x.numel() * x.element_size() + stash
    if case.contender == "copy":
        source, copy = (torch.ones(num_bytes // 2, dtype=torch.uint8, device=x.device) for _ in range(2))
        return Task(lambda: copy.copy_(source), None, (), lambda result: {}, forward_bytes=num_bytes)
    backend = api.Backend(case.contender)
    encode = partial(api.encode_rows, name, x, seed=SEED, stream=0)
    expected = shared.get("expected", partial(encode, backend=api.Backend.reference))

    def check(held: torch.Tensor) -> Mapping[str, float]:
        return {"differing_entries": float((held != expected).sum())}

    return Task(
        forward=partial(encode, backend=backend),
        backward=lambda held: api.decode_rows(name, held, sizes[1], x.dtype, backend=backend),
        leaves=(),
        check=check,
        forward_bytes=num_bytes,
        backward_bytes=num_bytes,
        facts={"meaning": MEANING, "stash_bytes": stash},
    )
