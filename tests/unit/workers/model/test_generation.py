"""Greedy decoding token-equal to transformers; sampling by the distribution it should have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.storage.core.errors import InputError
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.generation import SamplingConfig, choose_token, generate
from headrace.workers.model.hf import load_config, load_weights

PROMPT = [5, 17, 80, 3, 44, 9, 61]


def load(folder: Path) -> Decoder:
    model = Decoder(load_config(folder))
    load_weights(model, folder)
    return model


@pytest.mark.parametrize("length", [1, 7])
def test_greedy_is_token_equal_to_transformers(
    hf_folder: Callable[..., Path], hf_model: Any, case: str, length: int
) -> None:
    ours = generate(load(hf_folder(case)), PROMPT[:length], SamplingConfig(max_new_tokens=40))
    prompt = torch.tensor([PROMPT[:length]])
    theirs = hf_model(case).generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert ours == theirs[0, length:].tolist()


def test_the_cache_changes_nothing(hf_folder: Callable[..., Path], case: str) -> None:
    """Every token is the likeliest after running the whole text without a cache."""
    model = load(hf_folder(case))
    new = generate(model, PROMPT, SamplingConfig(max_new_tokens=12))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + new]))[0]
    assert new == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()


def test_stop_tokens_and_callback(hf_folder: Callable[..., Path]) -> None:
    model = load(hf_folder("llama"))
    whole = generate(model, PROMPT, SamplingConfig(max_new_tokens=10))
    seen: list[int] = []
    stopped = generate(model, PROMPT, SamplingConfig(max_new_tokens=10), stop_tokens={whole[3]}, on_token=seen.append)
    assert stopped == seen == whole[: whole.index(whole[3]) + 1]


def test_sampling_repeats_with_its_seed(hf_folder: Callable[..., Path]) -> None:
    model = load(hf_folder("qwen3"))

    def draw(**options: Any) -> list[int]:
        return generate(model, PROMPT, SamplingConfig(max_new_tokens=16, temperature=1.5, **options))

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    greedy = generate(model, PROMPT, SamplingConfig(max_new_tokens=16))
    assert draw(top_k=1) == draw(top_p=1e-6) == greedy


PROBABILITIES = torch.tensor([0.4, 0.05, 0.25, 0.2, 0.1])


def drawn(**options: Any) -> dict[int, float]:
    sampling = SamplingConfig(temperature=options.pop("temperature", 1.0), **options)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(choose_token(PROBABILITIES.log(), sampling, generator) for _ in range(4000))
    return {token: count / 4000 for token, count in sorted(counts.items())}


def expected(kept: dict[int, float]) -> dict[int, float]:
    return {token: p / sum(kept.values()) for token, p in kept.items()}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0: 0.4, 1: 0.05, 2: 0.25, 3: 0.2, 4: 0.1}),
        ({"temperature": 0.5}, {0: 0.16, 1: 0.0025, 2: 0.0625, 3: 0.04, 4: 0.01}),
        ({"top_k": 2}, {0: 0.4, 2: 0.25}),
        ({"top_k": 99}, {0: 0.4, 1: 0.05, 2: 0.25, 3: 0.2, 4: 0.1}),
        ({"top_p": 0.7}, {0: 0.4, 2: 0.25, 3: 0.2}),
        ({"top_p": 0.1}, {0: 0.4}),
        ({"top_k": 3, "top_p": 0.7}, {0: 0.4, 2: 0.25}),
    ],
)
def test_frequencies_of_draws(options: dict[str, Any], kept: dict[int, float]) -> None:
    found = drawn(**options)
    assert set(found) == set(kept)
    assert found == pytest.approx(expected(kept), abs=0.025)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_p": 0.5}, "temperature=0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SamplingConfig(**options)


def test_bad_prompts(hf_folder: Callable[..., Path]) -> None:
    model = load(hf_folder("llama"))
    with pytest.raises(InputError, match="empty"):
        generate(model, [], SamplingConfig())
    with pytest.raises(InputError, match="token 97"):
        generate(model, [3, 97], SamplingConfig())
    model.config.max_position_embeddings = 9
    with pytest.warns(UserWarning, match="10 tokens, the model was made for 9"):
        generate(model, PROMPT, SamplingConfig(max_new_tokens=3))
