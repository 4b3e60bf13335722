"""Two layers trained 200 steps: by the plain forms and by every other one that there is, to the same losses."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headrace.helpers.tolerances import REL_ERROR
from headrace.kernels import api

VOCAB, WIDTH, INNER, Q_HEADS, K_HEADS, HEAD = 61, 32, 48, 4, 2, 8
BATCH, TOKENS, STEPS = 2, 16, 200
EPS, LEARNING_RATE, SCALE = 1e-5, 2e-3, HEAD**-0.5
REFERENCE, TRITON = api.Backend.reference, api.Backend.triton
Tensor = torch.Tensor
Dtype = torch.dtype


def plain_mlp(forms: Forms, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return F.linear(forms.gate(*F.linear(x, gate_up).chunk(2, dim=-1)), down)


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten())


def chunked_loss(axis: api.ChunkAxis, backend: api.Backend = REFERENCE) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """In ragged chunks: 20 of 32 tokens, 40 of 61 columns."""
    columns = 40 if axis is api.ChunkAxis.vocabulary else None
    options = api.LossOptions(axis=axis, tokens_per_chunk=20, columns_per_chunk=columns)
    return partial(api.linear_cross_entropy, options=options, backend=backend)


PLAIN_NORM, PLAIN_ADD_NORM, PLAIN_ROPE, PLAIN_GATE = (
    partial(operator, backend=REFERENCE) for operator in (api.rms_norm, api.add_rms_norm, api.apply_rope, api.swiglu)
)
PLAIN_ATTENTION = partial(api.attention, scale=SCALE)


@dataclass(frozen=True)
class Forms:
    """Who computes what; plain torch unless said otherwise."""

    norm: Callable[..., Tensor] = PLAIN_NORM
    add_norm: Callable[..., tuple[Tensor, Tensor]] = PLAIN_ADD_NORM
    rope: Callable[..., tuple[Tensor, Tensor]] = PLAIN_ROPE
    attention: Callable[..., Tensor] = PLAIN_ATTENTION
    gate: Callable[[Tensor, Tensor], Tensor] = PLAIN_GATE
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = plain_loss


class MiniModel(nn.Module):
    """Embedding, two decoder layers, head. One fp32 vector holds all weights and is rounded to `dtype` once a step."""

    def __init__(self, forms: Forms, dtype: Dtype, device: torch.device) -> None:
        super().__init__()
        self.forms, self.dtype = forms, dtype
        layer = {"norm_1": (WIDTH,), "qkv": ((Q_HEADS + 2 * K_HEADS) * HEAD, WIDTH), "out": (WIDTH, Q_HEADS * HEAD)}
        layer |= {"norm_2": (WIDTH,), "gate_up": (2 * INNER, WIDTH), "down": (WIDTH, INNER)}
        self.shapes = {f"{name}_{i}": shape for i in range(2) for name, shape in layer.items()}
        self.shapes |= {"embedding": (VOCAB, WIDTH), "final_norm": (WIDTH,), "head": (VOCAB, WIDTH)}
        draws = torch.Generator().manual_seed(0)
        drawn = [
            torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draws) / math.sqrt(shape[-1])
            for shape in self.shapes.values()
        ]
        self.weights = nn.Parameter(torch.cat([tensor.flatten() for tensor in drawn]).to(device))
        positions = torch.arange(TOKENS, device=device)[None]
        self.tables = api.rope_tables(positions, api.rope_frequencies(HEAD, 10_000.0).to(device), dtype)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        parts = self.weights.to(self.dtype).split([math.prod(shape) for shape in self.shapes.values()])
        w = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        forms, x = self.forms, F.embedding(tokens, w["embedding"])
        for i in range(2):
            y = forms.norm(x, w[f"norm_1_{i}"], EPS)
            heads = F.linear(y, w[f"qkv_{i}"]).unflatten(-1, (-1, HEAD))
            q, k, v = heads.split((Q_HEADS, K_HEADS, K_HEADS), dim=2)
            q, k = forms.rope(q, k, *(table[:, : tokens.shape[1]] for table in self.tables))
            mixed = F.linear(forms.attention(q, k, v).flatten(2), w[f"out_{i}"])
            y, x = forms.add_norm(mixed, x, w[f"norm_2_{i}"], EPS)
            x = x + plain_mlp(forms, y, w[f"gate_up_{i}"], w[f"down_{i}"])
        return forms.loss(forms.norm(x, w["final_norm"], EPS), w["head"], targets)


def train(forms: Forms, dtype: Dtype, *, steps: int = STEPS, tokens: int = TOKENS, device: str = "cpu") -> Tensor:
    """The loss of every step, fp64 on the CPU; of each row the first `tokens` are used."""
    model = MiniModel(forms, dtype, torch.device(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    losses = []
    for batch in text()[:steps, :, : tokens + 1].to(device):
        loss = model(batch[:, :-1], batch[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


def text() -> Tensor:
    """(STEPS, BATCH, TOKENS + 1): every token has four successors, equally likely; no loss stays below ln 4."""
    draws = torch.Generator().manual_seed(1)
    choices = torch.randint(1, 5, (STEPS, BATCH, TOKENS), generator=draws)
    tokens = torch.randint(0, VOCAB, (STEPS, BATCH, 1), generator=draws)
    for place in range(TOKENS):
        tokens = torch.cat((tokens, (3 * tokens[..., -1:] + choices[..., place : place + 1]) % VOCAB), dim=-1)
    return tokens


@cache
def plain_losses(dtype: Dtype, device: str = "cpu", steps: int = STEPS, tokens: int = TOKENS) -> Tensor:
    return train(Forms(), dtype, steps=steps, tokens=tokens, device=device)


def difference(losses: Tensor, plain: Tensor) -> float:
    return float(((losses - plain).abs() / plain).max())


TOKENS_LOSS, VOCABULARY_LOSS = (chunked_loss(axis) for axis in (api.ChunkAxis.tokens, api.ChunkAxis.vocabulary))
STREAMING = partial(api.attention, scale=SCALE, block_len=12)
ALONE = {
    "loss by tokens": Forms(loss=TOKENS_LOSS),
    "loss by vocabulary": Forms(loss=VOCABULARY_LOSS),
    "streaming attention": Forms(attention=STREAMING),
}
TOGETHER = {
    "loss by tokens, streaming attention": Forms(loss=TOKENS_LOSS, attention=STREAMING),
    "loss by vocabulary": ALONE["loss by vocabulary"],
}


def fused(axis: api.ChunkAxis) -> Forms:
    """Every operator that has a Triton form."""
    return Forms(
        norm=partial(api.rms_norm, backend=TRITON),
        add_norm=partial(api.add_rms_norm, backend=TRITON),
        rope=partial(api.apply_rope, backend=TRITON),
        gate=partial(api.swiglu, backend=TRITON),
        loss=chunked_loss(axis, TRITON),
    )


def bound(dtype: Dtype) -> float:
    return REL_ERROR["linear_cross_entropy"][dtype]


def check(forms: Forms, dtype: Dtype, device: str = "cpu") -> None:
    plain = plain_losses(dtype, device)
    assert float(plain[-20:].mean()) < 0.85 * float(plain[:20].mean()), "nothing was learned"
    assert difference(train(forms, dtype, device=device), plain) <= bound(dtype)


@pytest.mark.parametrize(("name", "dtype"), list(zip(TOGETHER, (torch.float32, torch.bfloat16), strict=True)))
def test_200_steps_with_other_forms_have_the_plain_losses(name: str, dtype: Dtype) -> None:
    """Every other form once; each alone and in both dtypes below."""
    check(TOGETHER[name], dtype)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ALONE)
def test_200_steps_with_each_form_alone(name: str, dtype: Dtype) -> None:
    check(ALONE[name], dtype)


interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="triton is not installed, or its interpreter is off because there is a GPU",
)


@interpreted
@pytest.mark.parametrize("axis", [api.ChunkAxis.tokens, pytest.param(api.ChunkAxis.vocabulary, marks=pytest.mark.soak)])
def test_a_few_steps_fused_in_the_interpreter(axis: api.ChunkAxis) -> None:
    """Three tokens a row, for the interpreter is slow; see below for all steps."""
    few = {"steps": 2, "tokens": 3}
    losses = train(fused(axis), torch.float32, **few)
    assert difference(losses, plain_losses(torch.float32, **few)) <= bound(torch.float32)


@interpreted
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_200_steps_fused_in_the_interpreter() -> None:
    check(fused(api.ChunkAxis.tokens), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("axis", [api.ChunkAxis.tokens, api.ChunkAxis.vocabulary])
def test_200_steps_fused_on_a_gpu(axis: api.ChunkAxis, dtype: Dtype) -> None:
    check(fused(axis), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TOGETHER)
def test_200_steps_with_other_forms_on_a_gpu(name: str, dtype: Dtype) -> None:
    check(TOGETHER[name], dtype, "cuda")


class _RopeWithoutItsBackward(torch.autograd.Function):
    """Rotates forward and hands gradients on as they are."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return api.apply_rope(q, k, cos, sin)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return dq, dk, None, None


def mean_of_chunk_means(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    chunks = zip(hidden.flatten(0, 1).split(20), targets.flatten().split(20), strict=True)
    return torch.stack([F.cross_entropy(F.linear(h, weight), t) for h, t in chunks]).mean()


@pytest.mark.parametrize(
    "mutant",
    [
        Forms(rope=_RopeWithoutItsBackward.apply),
        Forms(loss=mean_of_chunk_means),
        Forms(norm=lambda x, w, eps: api.rms_norm(x, w, 10 * eps)),
    ],
    ids=["gradient", "loss", "value"],
)
def test_mutants_are_told_apart(mutant: Forms) -> None:
    losses = train(mutant, torch.float32, steps=20)
    assert difference(losses, plain_losses(torch.float32)[:20]) > bound(torch.float32)
