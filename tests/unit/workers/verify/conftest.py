"""Tiny models of all four families, made by transformers' own random initialisation and saved as users save theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.workers.verify import verify as verify_module
from headrace.workers.verify.oracle import oracle_steps

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"sliding_window": None, "tie_word_embeddings": False}),
}
MakeFolder = Callable[..., Path]


class NarrowTensors(TorchDispatchMode):
    """Writes down every operator that makes a floating-point tensor narrower than fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.is_allowed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            is_floating = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            if is_floating and tensor.dtype is not torch.float64 and not self.is_allowed:
                self.found.append(f"{func} -> {tensor.dtype}")
        return out


@pytest.fixture
def narrow_tensors() -> type[NarrowTensors]:
    """The class above: `with narrow_tensors() as mode: ...; mode.found`."""
    return NarrowTensors


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """make_folder(family, **config fields) -> folder with config.json and safetensors; made once per arguments."""
    transformers = pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def make(family: str, **fields: Any) -> Path:
        key = f"{family} {sorted(fields.items())}"
        if key not in made:
            class_name, defaults = CONFIGS[family]
            config = getattr(transformers, class_name)(**{**SHAPE, **defaults, **fields})
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, param in model.named_parameters():
                    # transformers starts biases at 0 and norms at 1, where many mistakes cannot be seen
                    if name.endswith("bias"):
                        param.normal_(0.0, 0.3)
                    elif name.endswith("norm.weight"):
                        param.uniform_(0.5, 1.5)
            made[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[key])
        return made[key]

    return make


ORACLE_RUNS: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def oracle_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' side of equal comparisons is computed once: mutants break ours alone."""

    def remembered(folder: Any, oracle: Any, steps: Any, lr: float, device: torch.device) -> Any:
        parts = [
            (b.tokens.numpy().tobytes(), b.targets.numpy().tobytes(), b.packing.lengths, b.packing.parents)
            for step in steps
            for b in step
        ]
        key = (str(folder), oracle, lr, device, tuple(len(step) for step in steps), tuple(parts))
        if key not in ORACLE_RUNS:
            ORACLE_RUNS[key] = oracle_steps(folder, oracle, steps, lr, device)
        return ORACLE_RUNS[key]

    monkeypatch.setattr(verify_module, "oracle_steps", remembered)
