"""The decoder against transformers with the same weights, and against itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headrace.helpers.tiny_models import LLAMA
from headrace.helpers.tolerances import rel_error
from headrace.kernels.api import Packing
from headrace.storage.core.errors import InputError
from headrace.workers.model.adapter import num_params
from headrace.workers.model.config import Family, RopeScaling
from headrace.workers.model.decoder import Decoder, initial_weights
from headrace.workers.model.hf import hf_name, load_config, load_weights

NUM_TOKENS = 23
FP32_BOUND, FP64_BOUND = 5e-5, 1e-11  # DESIGN section 8
SMALL = replace(
    LLAMA, vocab_size=61, hidden_size=24, num_layers=2, num_heads=3, num_kv_heads=1, intermediate_size=40, init_std=0.3
)


def decoder_of(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    model = Decoder(replace(load_config(folder), **changes), dtype=dtype)
    load_weights(model, folder)
    return model


def random_tokens(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, NUM_TOKENS) and their targets, the last of a row ignored."""
    tokens = torch.randint(0, 61, (rows, NUM_TOKENS), generator=torch.Generator().manual_seed(3))
    return tokens, torch.cat([tokens[:, 1:], torch.full((rows, 1), -100)], dim=1)


def theirs(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and every gradient of a transformers model, by name."""
    logits = model(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    return float(loss.detach()), {name: param.grad for name, param in model.named_parameters()}


def errors_against(model: Decoder, oracle: Any, **options: Any) -> list[float]:
    """Relative errors of loss and every parameter's gradient."""
    tokens, targets = random_tokens()
    expected_loss, expected = theirs(oracle, tokens, targets)
    loss = model(tokens, targets, **options)
    loss.backward()
    found = {hf_name(name): param.grad for name, param in model.named_parameters()}
    assert sorted(found) == sorted(expected)
    return [
        abs(float(loss.detach()) / expected_loss - 1),
        *(rel_error(found[name], expected[name]) for name in expected),
    ]


def test_fp32_loss_logits_and_every_gradient(hf_folder: Callable[..., Path], hf_model: Any, case: str) -> None:
    model, oracle = decoder_of(hf_folder(case)), hf_model(case)
    tokens, _ = random_tokens()
    assert rel_error(model(tokens), oracle(tokens).logits) < FP32_BOUND
    assert max(errors_against(model, oracle, loss_tile=10)) < FP32_BOUND


class ExactNorm(torch.nn.Module):
    """transformers' RMSNorm in the dtype of its input (DESIGN section 8)."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def exact(model: Any) -> Any:
    """The fp64 oracle of a transformers model."""
    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, ExactNorm(child))
    return model


def test_fp64_loss_and_every_gradient(hf_folder: Callable[..., Path], hf_model: Any, case: str) -> None:
    model, oracle = decoder_of(hf_folder(case), torch.float64), exact(hf_model(case))
    assert max(errors_against(model, oracle, loss_tile=7)) < FP64_BOUND


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {"rope_theta": 10001.0}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama3 scaled", {"rope_scaling": None}),
        ("llama3 scaled", {"rope_scaling": RopeScaling(factor=8.1, original_max_position=16)}),
        ("mistral windowed", {"sliding_window": 6}),
        ("mistral windowed", {"sliding_window": None}),
    ],
)
def test_another_number_in_the_configuration_is_seen(
    hf_folder: Callable[..., Path], hf_model: Any, case: str, changes: dict[str, Any]
) -> None:
    model = decoder_of(hf_folder(case), torch.float64, **changes)
    assert max(errors_against(model, exact(hf_model(case)))) > 1e4 * FP64_BOUND


@pytest.mark.parametrize("tile", [1, 5, 46, 1000])
def test_loss_tile_changes_no_more_than_the_order_of_a_sum(tile: int) -> None:
    model = Decoder(SMALL, dtype=torch.float64)
    model.init_weights(0)
    tokens, targets = random_tokens()
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    assert rel_error(model(tokens, targets, loss_tile=tile), expected) < 1e-14


@pytest.mark.parametrize("window", [None, 4])
def test_packed_documents_equal_separate_ones(window: int | None) -> None:
    """Loss and every gradient of one packed row: the sum over its documents, each alone."""
    model = Decoder(replace(SMALL, family=Family.mistral, sliding_window=window), dtype=torch.float64)
    model.init_weights(1)
    tokens, targets = random_tokens(2)
    lengths = (9, NUM_TOKENS - 9, 1, NUM_TOKENS - 1)
    packed = model(tokens, targets, packing=Packing.of_lengths(lengths))
    grads = torch.autograd.grad(packed, list(model.parameters()))
    pieces = zip(tokens.flatten().split(lengths), targets.flatten().split(lengths), strict=True)
    alone = torch.stack([model(t[None], y[None]) for t, y in pieces]).sum()
    expected = torch.autograd.grad(alone, list(model.parameters()))
    assert rel_error(packed, alone) < 1e-13
    assert max(rel_error(a, b) for a, b in zip(grads, expected, strict=True)) < 1e-12
    assert rel_error(model(tokens, targets), alone) > 1e-4  # documents that see each other are another loss


def test_a_row_is_one_document_with_and_without_saying_so() -> None:
    model = Decoder(SMALL)
    model.init_weights(0)
    tokens, targets = random_tokens(2)
    packing = Packing.of_lengths((NUM_TOKENS, NUM_TOKENS))
    assert torch.equal(model(tokens, targets, packing=packing), model(tokens, targets))


def test_bf16_stays_near_fp32_and_its_loss_is_fp32(hf_folder: Callable[..., Path], case: str) -> None:
    tokens, targets = random_tokens()
    wide, narrow = (decoder_of(hf_folder(case), dtype)(tokens, targets) for dtype in (torch.float32, torch.bfloat16))
    assert narrow.dtype is torch.float32
    assert narrow.item() == pytest.approx(wide.item(), rel=3e-2)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    model, deeper = Decoder(SMALL), Decoder(replace(SMALL, num_layers=3))
    model.init_weights(7)
    deeper.init_weights(7)
    more = dict(deeper.named_parameters())
    for name, param in model.named_parameters():
        assert torch.equal(param, more[name])
    streamed = dict(initial_weights(SMALL, 7))
    assert all(torch.equal(streamed[name], param) for name, param in model.named_parameters())
    assert list(streamed) == [name for name, _ in model.named_parameters()]
    other = dict(initial_weights(SMALL, 8))
    assert not torch.equal(other["embed_tokens.weight"], streamed["embed_tokens.weight"])
    gate = streamed["blocks.0.mlp.gate_proj.weight"]
    assert not torch.equal(gate, streamed["blocks.1.mlp.gate_proj.weight"])
    assert float(gate.std()) == pytest.approx(0.3, rel=0.1)
    assert bool((streamed["norm.weight"] == 1).all())


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("tied", [False, True])
def test_num_params_is_what_the_model_has(family: Family, tied: bool) -> None:
    config = replace(
        SMALL, family=family, tie_embeddings=tied, qkv_bias=family is Family.qwen2, qk_norm=family is Family.qwen3
    )
    model = Decoder(config, device="meta")
    assert sum(param.numel() for param in model.parameters()) == num_params(config)
    assert {param.device.type for param in model.parameters()} == {"meta"}
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


def test_blocks_take_the_layer_input_as_their_one_tensor_with_gradient() -> None:
    model = Decoder(SMALL)
    model.init_weights(0)
    calls: list[tuple[Any, ...]] = []
    model.blocks[1].register_forward_pre_hook(lambda module, args: calls.append(args))
    tokens, targets = random_tokens()
    model(tokens, targets)
    [(x, (cos, sin), packing)] = calls
    assert (x.requires_grad, cos.requires_grad, sin.requires_grad, packing) == (True, False, False, None)
    assert x.shape == (2, NUM_TOKENS, SMALL.hidden_size)
    assert cos.shape == (1, NUM_TOKENS, SMALL.head_size)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_kv_heads": 2}, "num_kv_heads=2"),
        ({"num_heads": 5, "num_kv_heads": 5}, "num_heads=5"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"num_layers": 0}, "num_layers=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Decoder(replace(SMALL, **changes), device="meta")
