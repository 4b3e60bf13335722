"""Small models of every family with transformers' own random initialisation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (transformers' model_type, what differs from SIZES)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-5}),
    "llama3 scaled": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 windowed": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral windowed": ("mistral", {"sliding_window": 5}),
}


def make_model(case: str) -> Any:
    """transformers' model of a case, seeded; biases and norms are moved away from 0 and 1."""
    kind, more = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                param.add_(0.3 * torch.randn_like(param))
    return model.eval()


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """hf_folder(case, shard="5GB"): the case saved by transformers, and reused."""
    made: dict[tuple[str, str], Path] = {}

    def folder(case: str, shard: str = "5GB") -> Path:
        if (case, shard) not in made:
            made[case, shard] = tmp_path_factory.mktemp("hf")
            make_model(case).save_pretrained(made[case, shard], max_shard_size=shard)
        return made[case, shard]

    return folder


@pytest.fixture(scope="session")
def hf_model() -> Callable[[str], Any]:
    """The function above."""
    return make_model


@pytest.fixture(scope="session", params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    """Every case in turn."""
    return str(request.param)
