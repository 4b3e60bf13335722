"""Our decoder broken on purpose: the comparison with transformers sees it in every precision that can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.helpers.verifying import DYNAMIC, LLAMA3, SHARED, YARN, MakeFolder, Mutant, run, soak_unless
from headrace.kernels.api import Packing
from headrace.kernels.attention import spec as spec_module
from headrace.workers.memory.chunk_keys import ChunkKeys
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.model import decoder as decoder_module
from headrace.workers.model import dense as dense_module
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.dense import dense_program
from headrace.workers.verify import ours
from headrace.workers.verify.config import VerifyDtype
from headrace.workers.verify.verify import BOUNDS


def of_other_parents(change: Callable[[int, int | None], int | None], owner: Any, name: str) -> Mutant:
    """A mutant that lets `owner.name(packing, ...)` see other parents."""

    def mutant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def changed(packing: Packing, *args: Any) -> Any:
            parents = tuple(change(document, parent) for document, parent in enumerate(packing.parents))
            return original(replace(packing, parents=parents), *args)

        patch.setattr(owner, name, changed)

    return mutant


def last_response_only(patch: pytest.MonkeyPatch) -> None:
    """A prompt keeps the gradient that reaches it first, which is that of its last response."""
    add = ChunkKeys.add

    def mutant(self: ChunkKeys, layer: int, index: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        is_prompt = (index + 1) * self.block_len <= self.chunk.span[0]
        if not (is_prompt and (layer, index) in self.grads):
            add(self, layer, index, dk, dv)

    patch.setattr(ChunkKeys, "add", mutant)


SHARED_MUTANTS = {
    "sibling_seen": of_other_parents(lambda n, p: None if p is None else n - 1, spec_module, "readings_by_row"),
    "prompt_not_seen": of_other_parents(lambda n, p: None, spec_module, "readings_by_row"),
    "positions_from_zero": of_other_parents(lambda n, p: None, Packing, "positions"),
    "positions_run_on": of_other_parents(lambda n, p: None if p is None else n - 1, Packing, "positions"),
    "last_response_only": last_response_only,
}


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, {"memory": MemoryPreset.chunk, "chunk_size": 4}) for name in SHARED_MUTANTS]
    + [(name, {}) for name in SHARED_MUTANTS if name != "last_response_only"],  # that one is in the sweep by chunk
)
def test_mutants_of_shared_prompts_fail(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, name: str, fields: dict[str, Any]
) -> None:
    SHARED_MUTANTS[name](monkeypatch)
    result = run(make_folder("llama"), **fields, **SHARED)
    assert result.max_rel_error > 1e-3


def on_load(change: Callable[[Decoder], None]) -> Mutant:
    """A mutant that changes the decoder after its weights are loaded."""

    def mutant(patch: pytest.MonkeyPatch) -> None:
        load = ours.load_decoder

        def changed(*args: Any, **kwargs: Any) -> Decoder:
            model = load(*args, **kwargs)
            change(model)
            return model

        patch.setattr(ours, "load_decoder", changed)

    return mutant


def on_forward(change: Callable[..., Any]) -> Mutant:
    """A mutant that replaces Decoder.forward by change(forward, model, tokens, targets, packing, loss_tile)."""

    def mutant(patch: pytest.MonkeyPatch) -> None:
        forward = Decoder.forward

        def changed(self: Decoder, tokens: Any, targets: Any, *, packing: Any, loss_tile: int, each: bool) -> Any:
            assert not each, "a training pass takes the sum"
            return change(forward, self, tokens, targets, packing, loss_tile)

        patch.setattr(Decoder, "forward", changed)

    return mutant


def on_config(change: Callable[[ModelConfig], ModelConfig]) -> Mutant:
    """A mutant that reads the folder's configuration wrongly."""

    def mutant(patch: pytest.MonkeyPatch) -> None:
        load = ours.load_config
        patch.setattr(ours, "load_config", lambda folder: change(load(folder)))

    return mutant


def other_eps(config: ModelConfig) -> ModelConfig:
    return replace(config, rms_norm_eps=1.01 * config.rms_norm_eps)


def other_theta(model: Decoder) -> None:
    model.config = replace(model.config, rope_theta=model.config.rope_theta * 1.001)


def unscaled_rope(model: Decoder) -> None:
    model.config = replace(model.config, rope_scaling=None)


def no_attention_factor(model: Decoder) -> None:
    assert model.config.rope_scaling is not None
    model.config = replace(model.config, rope_scaling=replace(model.config.rope_scaling, attention_factor=1.0))


def length_of_the_row(patch: pytest.MonkeyPatch) -> None:
    rope = Decoder.rope

    def of_row(self: Decoder, positions: torch.Tensor, dtype: torch.dtype, **_: Any) -> Any:
        return rope(self, positions, dtype, lengths=(positions.shape[1],))

    patch.setattr(Decoder, "rope", of_row)


def no_key_bias(model: Decoder) -> None:
    with torch.no_grad():
        model.blocks[1].self_attn.k_proj.bias.zero_()  # type: ignore[union-attr]


def wider_window(config: ModelConfig) -> ModelConfig:
    assert config.sliding_window is not None
    return replace(config, sliding_window=config.sliding_window + 1)


def no_window(model: Decoder) -> None:
    config = replace(model.config, sliding_window=None)
    model.blocks[0].program = dense_program(config, model.operators)  # type: ignore[assignment]


def no_boundary(forward: Any, model: Any, tokens: Any, targets: Any, packing: Any, tile: int) -> Any:
    return forward(model, tokens, targets, packing=None, loss_tile=tile)


def unshifted(forward: Any, model: Any, tokens: Any, targets: Any, packing: Any, tile: int) -> Any:
    return forward(model, tokens, torch.where(targets == -100, targets, tokens), packing=packing, loss_tile=tile)


def shifted_twice(forward: Any, model: Any, tokens: Any, targets: Any, packing: Any, tile: int) -> Any:
    return forward(model, tokens, targets.roll(-1, 1), packing=packing, loss_tile=tile)


def positions_go_on(patch: pytest.MonkeyPatch) -> None:
    rope = Decoder.rope

    def run_on(self: Decoder, positions: torch.Tensor, dtype: torch.dtype, **rest: Any) -> Any:
        return rope(self, torch.arange(positions.shape[1])[None], dtype, **rest)

    patch.setattr(Decoder, "rope", run_on)


def fp32_norm(patch: pytest.MonkeyPatch) -> None:
    norm = dense_module.rms_norm_scaled

    def mutant(x: torch.Tensor, w: torch.Tensor, eps: float, **options: Any) -> Any:
        return tuple(made.to(x.dtype) for made in norm(x.float(), w.float(), eps, **options))

    patch.setattr(dense_module, "rms_norm_scaled", mutant)


def fp64_rope_table(patch: pytest.MonkeyPatch) -> None:
    def tables(positions: Any, frequencies: Any, dtype: Any, scale: float) -> Any:
        angles = positions[..., None].double() * frequencies.double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    patch.setattr(decoder_module, "rope_tables", tables)


def mean_per_tile(patch: pytest.MonkeyPatch) -> None:
    linear_cross_entropy = decoder_module.linear_cross_entropy

    def mutant(hidden: Any, weight: Any, targets: Any, *, options: Any, **others: Any) -> Any:
        tile = options.tokens_per_chunk
        hidden, targets = hidden.flatten(0, 1).split(tile), targets.flatten().split(tile)
        num_targets = sum((t != -100).sum() for t in targets)
        means = [
            linear_cross_entropy(h, weight, t, options=options, **others) / (t != -100).sum()
            for h, t in zip(hidden, targets, strict=True)
        ]
        return sum(means) / len(means) * num_targets

    patch.setattr(decoder_module, "linear_cross_entropy", mutant)


def mean_per_micro_batch(patch: pytest.MonkeyPatch) -> None:
    linear_cross_entropy = decoder_module.linear_cross_entropy

    def mutant(hidden: Any, weight: Any, targets: Any, **others: Any) -> Any:
        # what `sum / all targets` makes a mean of two means out of
        mean = linear_cross_entropy(hidden, weight, targets, **others) / (targets != -100).sum()
        return mean / 2 * mutant.num_targets  # type: ignore[attr-defined]

    def counted(*args: Any) -> Any:
        mutant.num_targets = sum(batch.num_targets for batch in args[2][0])  # type: ignore[attr-defined]
        return run_decoder(*args)

    run_decoder = ours.run_decoder
    patch.setattr(decoder_module, "linear_cross_entropy", mutant)
    patch.setattr(ours, "run_decoder", counted)


def head_without_gradient(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Decoder, "head_weight", property(lambda self: self.embed_tokens.weight.detach()))


WINDOW = {"sliding_window": 5}
MUTANTS: dict[str, tuple[str, dict[str, Any], Mutant]] = {
    "norm_eps": ("llama", {}, on_config(other_eps)),
    "norm_in_fp32": ("llama", {}, fp32_norm),
    "rope_theta": ("qwen3", {}, on_load(other_theta)),
    "rope_table_in_fp64": ("qwen3", {}, fp64_rope_table),
    "rope_not_scaled": ("llama", {"rope_parameters": LLAMA3}, on_load(unscaled_rope)),
    "yarn_attention_factor": ("llama", YARN, on_load(no_attention_factor)),
    "dynamic_length_of_the_row": ("llama", DYNAMIC, length_of_the_row),
    "bias_missing": ("qwen2", {}, on_load(no_key_bias)),
    "document_boundary_dropped": ("llama", {}, on_forward(no_boundary)),
    "positions_run_on": ("mistral", {}, positions_go_on),
    "labels_not_shifted": ("llama", {}, on_forward(unshifted)),
    "labels_shifted_twice": ("llama", {}, on_forward(shifted_twice)),
    "mean_per_tile": ("llama", {}, mean_per_tile),
    "mean_per_micro_batch": ("qwen2", {}, mean_per_micro_batch),
    "window_one_wider": ("mistral", WINDOW, on_config(wider_window)),
    "window_missing_in_a_layer": ("mistral", WINDOW, on_load(no_window)),
    "tied_head_without_gradient": ("qwen2", {}, head_without_gradient),
}
# What changes nothing, or less than the precision resolves.
BELOW_FP32 = ("norm_eps", "norm_in_fp32", "rope_table_in_fp64", "positions_run_on")
BELOW_BF16 = (*BELOW_FP32, "rope_theta")
# bf16 takes a CPU seconds: of the others the long form.
SHORT_BF16 = ("document_boundary_dropped", "mean_per_tile")


WANTED = {"batch": 2, "documents": 3, "micro_batches": 2, "loss_tile": 16}


@pytest.fixture(scope="module")
def is_right_unbroken() -> Callable[[Path], bool]:
    """Whether a folder is computed as transformers does; looked at once."""
    return cache(lambda folder: run(folder, **WANTED).failures() == [])


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail_in_fp64(
    make_folder: MakeFolder, is_right_unbroken: Callable[[Path], bool], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    family, fields, mutant = MUTANTS[name]
    folder = make_folder(family, **fields)
    assert is_right_unbroken(folder)
    mutant(monkeypatch)
    result = run(folder, **WANTED)
    assert result.failures()
    assert max(result.loss_rel_error, result.max_rel_error) > 10 * BOUNDS[VerifyDtype.fp64]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, VerifyDtype.fp32) for name in MUTANTS if name not in BELOW_FP32]
    + [soak_unless(name in SHORT_BF16, name, VerifyDtype.bf16) for name in MUTANTS if name not in BELOW_BF16],
)
def test_mutants_fail_in_lower_precision(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, name: str, dtype: VerifyDtype
) -> None:
    family, fields, mutant = MUTANTS[name]
    mutant(monkeypatch)
    folder = make_folder(family, **fields)
    assert run(folder, dtype=dtype, **WANTED).failures()
