"""Continuing a text, token by token, with the keys and values of what was there already."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from headrace.storage.core.errors import InputError
from headrace.workers.model.config import ATTENTION, ModelConfig
from headrace.workers.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen.

    Args:
        max_new_tokens: at most.
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest only.
        top_p: draw among the likeliest whose probabilities add up to p (nucleus, arXiv 1904.09751), after top_k.
        seed: of the draws.

    Raises:
        InputError: a value out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise InputError(f"temperature={self.temperature}: 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k}: at least 1, or leave it out")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p={self.top_p}: above 0 and at most 1, or leave it out")
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p is not None):
            raise InputError("temperature=0 takes the most probable token: give temperature=1 with top_k or top_p")


class KVCache:
    """Keys and values of one layer, in one buffer of the final length."""

    def __init__(self, config: ModelConfig, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (1, capacity, config.num_kv_heads, config.head_size)
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)
        self._length = 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (1, T, Hkv, D) each; all there is comes back, (1, S, Hkv, D) each."""
        begin, self._length = self._length, self._length + k.shape[1]
        self._k[:, begin : self._length] = k
        self._v[:, begin : self._length] = v
        return self._k[:, : self._length], self._v[:, : self._length]


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue one sequence.

    Args:
        prompt: token ids, at least one.
        stop_tokens: the first of these that is chosen ends the text; it is part of what is returned.
        on_token: called with every new token as it is there.

    Returns:
        The new tokens.

    Raises:
        InputError: an empty prompt, a token id beyond the vocabulary, or layers without attention.
    """
    config, weight = model.config, model.embed_tokens.weight
    if any(name != ATTENTION for name in config.mixers):
        raise InputError(f"model.mixers={config.mixers}: text is generated with a cache of keys and values only")
    _check_prompt(prompt, config, sampling)
    capacity = len(prompt) + sampling.max_new_tokens
    caches = [KVCache(config, capacity, dtype=weight.dtype, device=weight.device) for _ in model.blocks]
    generator = torch.Generator("cpu").manual_seed(sampling.seed)
    new: list[int] = []
    tokens, num_done = list(prompt), 0
    while len(new) < sampling.max_new_tokens:
        logits = _next_logits(model, tokens, num_done, caches)
        num_done += len(tokens)
        token = choose_token(logits, sampling, generator)
        new.append(token)
        if on_token is not None:
            on_token(token)
        if token in stop_tokens:
            break
        tokens = [token]
    return new


def _check_prompt(prompt: Sequence[int], config: ModelConfig, sampling: SamplingConfig) -> None:
    if not prompt:
        raise InputError("the prompt is empty: give at least one token")
    beyond = [token for token in prompt if not 0 <= token < config.vocab_size]
    if beyond:
        raise InputError(
            f"the prompt has token {beyond[0]}, the model has ids 0 to {config.vocab_size - 1}; take its own tokenizer"
        )
    wanted = len(prompt) + sampling.max_new_tokens
    if wanted > config.max_position_embeddings:
        warnings.warn(
            f"{wanted} tokens, the model was made for {config.max_position_embeddings}: the text may get worse",
            stacklevel=3,
        )


def _next_logits(model: Decoder, tokens: Sequence[int], num_before: int, caches: Sequence[KVCache]) -> torch.Tensor:
    """Run `tokens`, which follow the `num_before` in the caches; (V,) fp32 logits of what comes after the last."""
    device = model.embed_tokens.weight.device
    x = model.embed_tokens(torch.tensor([tokens], device=device))
    positions = torch.arange(num_before, num_before + len(tokens), device=device)[None]
    rope = model.rope(positions, x.dtype, lengths=(num_before + len(tokens),))
    for block, cache in zip(model.blocks, caches, strict=True):
        x = block(x, rope, None, cache)
    return F.linear(model.norm(x[:, -1:]), model.head_weight)[0, 0].float()


def choose_token(logits: torch.Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """The next token from (V,) logits: temperature, then top_k, then top_p, then one draw on the CPU."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    logits = logits.cpu() / sampling.temperature
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(-1).sort(descending=True, stable=True)
        # A token goes when those before it have p together; the likeliest always stays.
        gone = ordered.cumsum(-1) - ordered >= sampling.top_p
        gone[0] = False
        logits = logits.masked_fill(torch.zeros_like(gone).scatter(0, order, gone), -math.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
