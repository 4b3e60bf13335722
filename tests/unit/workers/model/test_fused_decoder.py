"""The whole decoder with the fused kernels (Triton's interpreter, fp32) against the plain one."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace

import pytest
import torch

from headrace.helpers import tiny_models
from headrace.helpers.tolerances import rel_error
from headrace.kernels.api import Backend, Operators, Packing
from headrace.workers.model.config import Family, ModelConfig
from headrace.workers.model.decoder import Decoder

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: tests/gpu runs the kernels there"),
]
LLAMA = replace(
    tiny_models.LLAMA,
    vocab_size=61,
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    intermediate_size=40,
    init_std=0.3,
)
IN_BOTH = {"norm.fused_rms_norm", "norm.fused_add_rms_norm", "activation.fused_swiglu"}
FUSED = {"llama": IN_BOTH | {"rope.fused_apply_rope"}, "qwen3": IN_BOTH | {"qk_norm.fused_qk_norm_rope"}}
MODELS = {"llama": LLAMA, "qwen3": replace(LLAMA, family=Family.qwen3, qk_norm=True, tie_embeddings=True)}


def loss_and_gradients(config: ModelConfig, backend: Backend) -> dict[str, torch.Tensor]:
    """Of two packed rows in three documents, 11 tokens each, in loss tiles of 8."""
    model = Decoder(config, operators=Operators(kernels=backend))
    model.init_weights(0)
    tokens = torch.randint(0, config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(3))
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss = model(tokens, targets, packing=Packing.of_lengths([11, 4, 7]), loss_tile=8)
    loss.backward()
    return {"loss": loss, **{name: param.grad for name, param in model.named_parameters()}}


@pytest.mark.parametrize("name", MODELS)
def test_fused_kernels_compute_the_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    for place in FUSED["llama"] | FUSED["qwen3"]:
        module = importlib.import_module(f"headrace.kernels.fused.{place.split('.')[0]}")
        real = getattr(module, place.split(".")[1])

        def spy(*args, _real=real, _place=place, **options):
            called.add(_place)
            return _real(*args, **options)

        monkeypatch.setattr(module, place.split(".")[1], spy)
    plain = loss_and_gradients(MODELS[name], Backend.reference)
    assert called == set()
    fused = loss_and_gradients(MODELS[name], Backend.triton)
    assert called == FUSED[name]
    errors = {key: rel_error(fused[key], plain[key]) for key in plain}
    assert max(errors.values()) < 2e-6, errors
